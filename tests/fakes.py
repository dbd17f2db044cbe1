"""Stand-ins shared by the tests of evaluation: networks whose every probability is known, and negotiations on disk."""

import itertools
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import config, sharding
from mbrl_lm.nn import Net
from mbrl_lm.types import Heads

BINS = 11


def one_device():
    """A mesh of one device."""
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


def table_net(bins: int = BINS) -> Net:
    """A network without memory: params["table"], (V, V), holds the logits of the next token in the row of the last one."""

    def heads(params, x_BTV, role_BT=None):
        zeros_BTW = jnp.zeros((*x_BTV.shape[:2], bins))
        return Heads(
            logits_BTV=x_BTV,
            value_BTEW=zeros_BTW[:, :, None],
            reward_BTW=zeros_BTW,
            end_BT=zeros_BTW[..., 0],
            user_BTEV=jnp.zeros((*x_BTV.shape[:2], 0, x_BTV.shape[-1])),
            real_BT=zeros_BTW[..., 0],
            belief_BTZ=zeros_BTW[..., :0],
        )

    def trunk(params, token_BT, dropout_key=None):
        return params["table"][token_BT]

    def step(params, token_B, index, cache):
        return trunk(params, token_B[:, None]), cache

    return Net(
        init=lambda key: None,
        init_cache=lambda B, S: (),
        trunk=trunk,
        heads=heads,
        prefill=lambda params, token_BT, cache: cache,
        step=step,
    )


def uniform(V: int) -> dict[str, np.ndarray]:
    """Parameters of a table_net to which every token is equally likely."""
    return {"table": np.zeros((V, V), np.float32)}


def follows(V: int, next_token: Mapping[int, int]) -> dict[str, np.ndarray]:
    """Parameters of a table_net that knows what comes after some tokens, whoever speaks."""
    params = uniform(V)
    for token, after in next_token.items():
        params["table"][token, after] = 50.0
    return params


def write_deals(raw_dir: pathlib.Path, scenarios: int = 60, held_out: int = 10) -> pathlib.Path:
    """Writes train.txt and val.txt of Deal or No Deal: scenarios of their own, each seen from both sides; some fail."""
    rng = np.random.default_rng(0)
    counts = [c for c in itertools.product(range(1, 5), repeat=3) if 5 <= sum(c) <= 7]
    lines, seen = [], set()
    while len(lines) < 2 * (scenarios + held_out):
        count = counts[rng.integers(len(counts))]
        values = [tuple(rng.integers(0, 5, 3).tolist()) for _ in "ab"]
        contexts = [tuple(itertools.chain(*zip(count, value, strict=True))) for value in values]
        if contexts[0] == contexts[1] or seen & {*contexts}:  # what one side sees names the scenario
            continue
        seen |= {*contexts}
        share = [int(rng.integers(0, c + 1)) for c in count]
        shares = [share, [c - s for c, s in zip(count, share, strict=True)]]
        agreed = rng.random() < 0.8
        for me, them in ((0, 1), (1, 0)):
            names = ("YOU", "THEM") if me == 0 else ("THEM", "YOU")
            said = [f"i want {share[0]} book and {share[1]} hat", "ok deal" if agreed else "no way", "<selection>"]
            dialogue = " <eos> ".join(f"{names[i % 2]}: {text}" for i, text in enumerate(said))
            items = [f"item{i}={n}" for i, n in itertools.chain(enumerate(shares[me]), enumerate(shares[them]))]
            own, other = (" ".join(map(str, contexts[side])) for side in (me, them))
            lines.append(
                f"<input> {own} </input> <dialogue> {dialogue} </dialogue> "
                f"<output> {' '.join(items if agreed else ['<disagree>'] * 6)} </output> "
                f"<partner_input> {other} </partner_input>\n"
            )
    raw_dir.mkdir(parents=True, exist_ok=True)
    (raw_dir / "train.txt").write_text("".join(lines[: 2 * scenarios]))
    (raw_dir / "val.txt").write_text("".join(lines[2 * scenarios :]))
    return raw_dir
