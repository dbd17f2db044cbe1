"""Rewards of imagined dialogues, on hand-written outcomes."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import dialogue

from mbrl_lm import config, reward, value
from mbrl_lm import protocol as pr
from mbrl_lm.turns import find_turns
from mbrl_lm.types import Heads

DEAL = pr.make_protocol("negotiation", pr.FIRST_PIECE + 8)
CENTRES = value.bin_centres(11, 3.0)
CONTEXT = "bos 1 4 3 1 2 0"  # one item worth 4, three worth 1, two worth 0
TALK = ">a a >u b >a c >u"

# the tokens from the outcome on, the share that is read (None: not whole), the points
CASES = {
    "all": (">o 1 3 2 stop", (1, 3, 2), 7),
    "some": (">o 1 0 2 stop", (1, 0, 2), 4),
    "nothing": (">o 0 0 0 stop", (0, 0, 0), 0),
    "no deal": (">o none stop", None, 0),
    "more than there is": (">o 2 3 2 stop", (2, 3, 2), 0),
    "two numbers": (">o 1 3 stop", None, 0),
    "no numbers": (">o stop", None, 0),
    "no deal after a number": (">o 1 none 1 stop", None, 0),
    "an outcome that is cut": (">o 1 3 2", None, 0),
    "never called for": ("d", None, 0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padding", [0, 3])
def test_split_by_hand(name, padding):
    tail, share, points = CASES[name]
    text = f"{CONTEXT} {TALK} {tail}"
    d = dialogue(DEAL, [text], T=len(text.split()) + padding, U=3)
    found_share, whole = reward.outcome_share(d)
    assert bool(whole[0]) == (share is not None)
    if share:
        assert tuple(found_share[0].tolist()) == share
    turns = find_turns(DEAL, d)
    reward_BU = reward.split(d, turns, None, CENTRES)
    np.testing.assert_allclose(reward_BU, [[0, points, 0]])  # on the last of two turns


def test_split_values_the_own_share_by_the_own_context():
    rows = [f"bos {context} {TALK} >o 1 0 2 stop" for context in ("1 4 3 1 2 3", "1 0 3 2 2 2", "2 1 3 1 2 2")]
    d = dialogue(DEAL, rows, U=3)
    reward_BU = reward.split(d, find_turns(DEAL, d), None, CENTRES)
    np.testing.assert_allclose(reward_BU[:, 1], [10, 4, 5])


def test_what_is_left_to_the_other_side_may_count():
    """Of one, three and two items one, none and two are taken: the three are left, worth a third of ten points."""
    d = dialogue(
        DEAL, [f"{CONTEXT} {TALK} >o {tail}" for tail in ("1 0 2 stop", "0 1 1 stop", "none stop", "2 0 0 stop")], U=3
    )
    reward_BU = reward.split(d, find_turns(DEAL, d), None, CENTRES, 0.3)
    np.testing.assert_allclose(reward_BU[:, 1], [4 + 1, 1 + 1 + 2 / 3 + 1 / 2, 0, 0], rtol=1e-6)


def test_learned_reads_the_reward_head_where_the_user_has_replied():
    d = dialogue(DEAL, ["bos >a a >u b >a c >u d >o 1 1 1 stop", "bos >a a >u b >a"], T=16, U=3)
    logits_BTW = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 11)), jnp.float32)
    zeros = jnp.zeros((2, 16))
    others = {"value_BTEW": -logits_BTW[:, :, None], "user_BTEV": zeros[..., None, None], "real_BT": zeros}
    others["belief_BTZ"] = zeros[..., None]
    heads = Heads(logits_BTV=zeros[..., None], reward_BTW=logits_BTW, end_BT=zeros, **others)
    found = reward.learned(d, find_turns(DEAL, d), heads, CENTRES)
    p = np.exp(logits_BTW) / np.exp(logits_BTW).sum(-1, keepdims=True)
    mean = (p * CENTRES).sum(-1)
    expected = [[mean[0, 5], mean[0, 13], 0], [mean[1, 5], 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_registry():
    assert reward.REWARDS == {"learned": reward.learned, "split": reward.split, "sure_split": reward.sure_split}
    assert set(config.REWARDS) == {"", *reward.REWARDS}, "what a config may name"


def test_a_split_that_is_not_sure_is_worth_its_probability():
    """After each token of the outcome the model gives the written one a half, but for the end, which it gives a quarter."""
    d = dialogue(DEAL, [f"{CONTEXT} {TALK} >o 1 3 2 stop", f"{CONTEXT} {TALK} d"], U=3)
    probability_BT = np.full(d.token_BT.shape, 0.5)
    probability_BT[d.token_BT == pr.STOP] = 0.25
    V = DEAL.vocab_size
    logits_BTV = np.full((*d.token_BT.shape, V), -np.inf, np.float32)
    for b, t in np.ndindex(2, d.token_BT.shape[1] - 1):
        token, p = d.token_BT[b, t + 1], probability_BT[b, t + 1]
        logits_BTV[b, t, [token, V - 1 if token != V - 1 else V - 2]] = np.log([p, 1 - p])
    logits_BTV[:, -1, 0] = 0
    others = dict.fromkeys(("value_BTEW", "reward_BTW", "end_BT", "user_BTEV", "real_BT", "belief_BTZ"))
    heads = Heads(logits_BTV=jnp.asarray(logits_BTV), **others)
    reward_BU = reward.sure_split(d, find_turns(DEAL, d), heads, CENTRES)
    np.testing.assert_allclose(reward_BU, [[0, 7 * 0.5**3 * 0.25, 0], [0, 0, 0]], rtol=1e-5)
