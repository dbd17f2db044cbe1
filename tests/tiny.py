"""Tiny networks, protocols and hand-written dialogues, shared by the tests of the core."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbrl_lm import config, learner, targets
from mbrl_lm import protocol as pr
from mbrl_lm.nn import Net, make_net
from mbrl_lm.replay import empty_dialogues
from mbrl_lm.types import Dialogue, Params

VOCAB = pr.FIRST_PIECE + 8
TURN_TOKENS = 4
MARKS = {
    "_": pr.PAD,
    "bos": pr.BOS,
    ">u": pr.TO_USER,
    ">a": pr.TO_ASSISTANT,
    ">o": pr.TO_OUTCOME,
    "stop": pr.STOP,
    "leave": pr.LEAVE,
    "none": pr.NO_DEAL,
}

MODEL = {
    "layers": 2,
    "width": 16,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 24,
    "conv_width": 3,
    "dropout": 0.0,
    "tied": True,
    "scan_layers": False,
    "remat": False,
    "dtype": "float32",
    "bins": 11,
    "user_heads": 2,
    "speakers": False,
    "match_taps": 3,
    "match_width": 4,
    "bin_limit": 3.0,
}
LOSS = {"policy": 2.0, "user": 1.0, "outcome": 1.0, "assistant": 0.0}
LOSS |= {"value": 0.5, "value_real": 0.5, "slow_value": 0.0, "reward": 0.5, "end": 0.1, "kl": 0.1, "entropy": 0.0}
RETURNS = {"discount": 0.97, "lambda_": 0.95, "scale_floor": 1.0, "scale_decay": 0.99, "target_decay": 0.98}
TRAIN = {"batch": 4, "micro_batch": 0, "warmup": 1, "supervised_steps": 4, "rl_steps": 200, "clip": 1.0}
TRAIN |= {"learning_rate": 2e-3, "rl_learning_rate": 3e-4, "weight_decay": 0.01}


class World(NamedTuple):
    """A network with what belongs to it."""

    cfg: config.Config
    protocol: pr.Protocol
    net: Net
    params: Params


def config_of(**values: Any) -> config.Config:
    """A tiny config; names like `model__layers` set fields. What tests rely on is written out, so that no default enters."""
    cfg = config.Config(tokens=24, turns=5, turn_tokens=TURN_TOKENS)
    cfg.model = config.Model(**MODEL)
    cfg.loss = config.Loss(**LOSS)
    cfg.returns = config.Returns(**RETURNS)
    cfg.train = config.Train(**TRAIN)
    cfg.imagine = config.Imagine(batch=4, replies=4, temperature=1.0, reward="learned")
    return config.override(cfg, {name.replace("__", "."): value for name, value in values.items()})


def noisy(params: Params, seed: int = 1, size: float = 0.2) -> Params:
    """Adds noise to every parameter: no head, norm or convolution stays at the neutral value it starts from."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@functools.cache
def world(kind: str = "chat", seed: int = 1, vocab: int = VOCAB, **values: Any) -> World:
    """A network with noisy parameters and its protocol."""
    cfg = config_of(**values)
    protocol = pr.make_protocol(kind, vocab, turn_tokens=cfg.turn_tokens)
    net = make_net(cfg.model, vocab)
    return World(cfg, protocol, net, noisy(jax.jit(net.init)(jax.random.key(0)), seed))


def tokens(text: str) -> list[int]:
    """Reads `bos a b >u c >a d >u stop`: letters are words, digits the numbers, the rest MARKS."""

    def token(x):
        return MARKS[x] if x in MARKS else pr.NUMBER + int(x) if x.isdigit() else pr.FIRST_PIECE + ord(x) - ord("a")

    return [token(x) for x in text.split()]


def dialogue(
    protocol: pr.Protocol,
    rows: Sequence[str | Sequence[int]],
    T: int = 24,
    U: int = 5,
    ended: Sequence[bool] | None = None,
    reward: Sequence[Sequence[float]] | None = None,
) -> Dialogue:
    """Real dialogues of hand-written rows, padded; a row has ended when its last token says so, unless `ended` does."""
    rows = [tokens(row) if isinstance(row, str) else list(row) for row in rows]
    out = empty_dialogues(len(rows), T, U)
    for b, row in enumerate(rows):
        out.token_BT[b, : len(row)] = row
        out.reward_BU[b, : len(reward[b]) if reward else 0] = reward[b] if reward else []
    author_BT, turn_BT = map(np.asarray, pr.parse(protocol, out.token_BT))
    ended_B = np.array([row[-1] in (pr.STOP, pr.LEAVE) for row in rows] if ended is None else ended)
    uid_B = np.arange(len(rows), dtype=np.uint32)
    return out.replace(author_BT=author_BT, turn_BT=turn_BT, ended_B=ended_B, cut_B=~ended_B, uid_B=uid_B).check()


def random_rows(protocol: pr.Protocol, seed: int, rows: int, T: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and authors of random dialogues of at most T tokens, spoken by the table one token at a time."""
    rng = np.random.default_rng(seed)
    token_rows, author_rows = [], []
    for b in range(rows):
        first, name = int(rng.choice([pr.USER, pr.ASSISTANT])), pr.FIRST_PIECE + b % (protocol.vocab_size - pr.FIRST_PIECE)
        said = [pr.BOS, name, {pr.USER: pr.TO_USER, pr.ASSISTANT: pr.TO_ASSISTANT}[first]]
        wrote, role, place = [pr.CONTEXT] * 3, first, 0
        while len(said) < T and role != pr.END:
            last = place == protocol.budget_R[role] - 1
            choices_V = (protocol.handover_RV if last else protocol.allowed_RV)[role]
            if role != pr.OUTCOME and rng.random() < 0.8:  # ends are rare
                choices_V = choices_V & ~np.isin(np.arange(len(choices_V)), [pr.STOP, pr.LEAVE, pr.TO_OUTCOME])
            token = int(rng.choice(np.flatnonzero(choices_V)))
            said.append(token)
            wrote.append(role)
            role, before = int(protocol.switch_RV[role, token]), role
            place = place + 1 if role == before else 0
        token_rows.append(said)
        author_rows.append(wrote)
    return token_rows, author_rows


def random_dialogues(protocol: pr.Protocol, seed: int, rows: int, T: int = 24, U: int = 5) -> Dialogue:
    """Random real dialogues with random rewards."""
    rewards = np.random.default_rng(seed).normal(size=(rows, U))
    return dialogue(protocol, random_rows(protocol, seed, rows, T)[0], T, U, reward=rewards.tolist())


def written(real: Dialogue, seed: int = 0) -> Dialogue:
    """The same dialogues as if our own network had written all after the context."""
    own_BT = (real.author_BT != pr.CONTEXT) & (real.author_BT != pr.END)
    logp_BT = -np.random.default_rng(seed).uniform(0.5, 3.0, own_BT.shape).astype(np.float32)
    return real.replace(sampled_BT=own_BT, logp_BT=logp_BT * own_BT, reward_BU=0 * real.reward_BU)


def norm(tree: Any) -> float:
    """The Euclidean norm of all leaves together."""
    return float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))))


def take(tree: Any, index: Any) -> Any:
    """Rows of a batch."""
    return jax.tree.map(lambda x: x[index], tree)


def largest_difference(a: Any, b: Any) -> float:
    """Over all leaves of two trees."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.subtract(x, y, dtype=np.float64)), initial=0)) for x, y in leaves)


def component_gradients(w: World, real: Dialogue, imagined: Dialogue) -> dict[str, Params]:
    """The gradient of the sum of each component of an update by return."""
    key = jax.random.key(0)
    state = learner.init_state(w.net._replace(init=lambda key: w.params), optax.sgd(1.0), key, w.cfg.turns)
    reference = noisy(w.params, 5, 0.05)
    build = targets.make_targets(w.net, w.protocol, w.cfg, lambda rows: 1, rl=True)

    @jax.jit
    def gradients(params):
        batch, _, _ = build(state.replace(target=params, params=params), real, imagined, key)

        def totals(params):
            found = learner.losses(w.net, w.protocol, w.cfg, params, reference, reference, batch, None)
            return {name: targets.masked_sum(x, batch.masks[name]) for name, x in found.items()}

        return jax.jacrev(totals)(params)

    return gradients(w.params)
