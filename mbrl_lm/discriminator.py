"""Can a fresh network tell imagined user turns from real ones? Its AUC: 0.5 where it cannot, 1 where it always can."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbrl_lm import config, world_model
from mbrl_lm import protocol as pr
from mbrl_lm.nn import make_net
from mbrl_lm.sharding import constrain, pjit

MODEL = config.Model(layers=2, width=64, heads=4, kv_heads=4, mlp_width=128, dropout=0.1)
BATCH, UPDATES, LEARNING_RATE = 32, 200, 2e-3
Rows = Sequence[Sequence[int]]  # tokens
WIDTH = 64  # tokens before and with the turn that are looked at


def auc(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """The probability that a positive scores above a negative, ties counting half (Mann and Whitney 1947)."""
    positive, negative = score_N[positive_N], score_N[~positive_N]
    above = (positive[:, None] > negative[None]).mean()
    return float(above + (positive[:, None] == negative[None]).mean() / 2)


def rows_of(token_rows: Rows, width: int) -> np.ndarray:
    """Rows whose *last* `width` tokens are kept, padded at their end."""
    token_BT = np.full((len(token_rows), width), pr.PAD, np.int32)
    for b, row in enumerate(token_rows):
        token_BT[b, : min(len(row), width)] = row[-width:]
    return token_BT


def discriminate(real: Rows, imagined: Rows, vocab_size: int, mesh, seed: int) -> float:
    """Trains a fresh network on the first half of the pairs and gives its AUC on the second.

    Args:
      real, imagined: tokens of dialogues up to and with a user turn, paired: the same history, another reply. Pairs of one
        dialogue should stand together, so that few are in both halves.
      vocab_size: V.
      mesh: the device mesh.
      seed: of the network and its batches.
    """
    net = make_net(MODEL, vocab_size)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, UPDATES), weight_decay=0.01)
    half = len(real) // 2
    token_NT = {name: rows_of(rows, WIDTH) for name, rows in (("real", real), ("imagined", imagined))}

    def logit(params, token_BT, key=None):
        token_BT = constrain(token_BT, "BT")
        last_B = jnp.maximum(jnp.sum(token_BT != pr.PAD, axis=1) - 1, 0)
        end_BT = net.heads(params, net.trunk(params, token_BT, key)).end_BT
        return jnp.take_along_axis(end_BT, last_B[:, None], axis=1)

    def loss(params, token_BT, real_B, key):
        return jnp.mean(world_model.end_loss(logit(params, token_BT, key), real_B[:, None]))

    def update(params, moments, token_BT, real_B, key):
        change, moments = optimizer.update(jax.grad(loss)(params, token_BT, real_B, key), moments, params)
        return optax.apply_updates(params, change), moments

    key = jax.random.key(seed)
    params = pjit(net.init, mesh)(key)
    moments = optimizer.init(params)
    step, judge = pjit(update, mesh, donate=(0, 1)), pjit(logit, mesh)
    for n in range(UPDATES):
        pick = np.random.default_rng((seed, n)).integers(half, size=BATCH // 2)
        token_BT = np.concatenate([token_NT["real"][pick], token_NT["imagined"][pick]])
        params, moments = step(params, moments, token_BT, np.arange(BATCH) < BATCH // 2, jax.random.fold_in(key, n))
    tested = [np.asarray(judge(params, token_NT[name][half:]))[:, 0] for name in ("real", "imagined")]
    return auc(np.concatenate(tested), np.repeat([True, False], len(real) - half))
