"""The values of the other side of a negotiation, inferred from what it says and imagined with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import dialogue, noisy, world

from mbrl_lm import deal, outcome, rollout, valuation
from mbrl_lm import protocol as pr
from mbrl_lm.config import Imagine
from mbrl_lm.envs import negotiation
from mbrl_lm.scoring import score

SCENARIOS = [((1, 4, 4, 1, 1, 2), (1, 0, 4, 2, 1, 2)), ((2, 1, 1, 5, 3, 1), (2, 2, 1, 0, 3, 2)), ((2, 1, 2, 3, 1, 2),) * 2]
KEY = jax.random.key(4)
T = 24


@pytest.fixture(scope="module")
def w():
    return world("negotiation", seed=2, tokens=T)


def openings(w, rows=32):
    ours, theirs = negotiation.openings(w.cfg, w.protocol, SCENARIOS, np.arange(rows))
    return jax.tree.map(jnp.asarray, ours), jax.tree.map(jnp.asarray, theirs)


def place(dialogue, value_BI):
    """Where given values stand among those that are possible."""
    return np.argmax(np.all(valuation.valuations(dialogue)[0] == value_BI[:, None], axis=-1), axis=1)


def test_what_is_possible_is_worth_ten_points_and_nothing_is_worth_nothing_to_both():
    own = dialogue(pr.make_protocol("negotiation", 27), ["bos 1 0 4 2 1 2 >a", "bos 2 1 1 3 3 1 >u", "bos 5 1 5 1 5 1 >u"])
    value_BZI, there_BZ = map(np.asarray, valuation.valuations(own))
    for b, count in enumerate(((1, 4, 1), (2, 1, 3))):
        some = value_BZI[b][there_BZ[b]]
        assert np.all(some @ count == 10) and np.all(some >= 0) and len(np.unique(some, axis=0)) == len(some)
    assert np.all(value_BZI[0][there_BZ[0]][:, 0] > 0)  # ours is worth 0 there
    assert there_BZ.sum(axis=1).tolist() == [18, 14, 1]
    assert value_BZI[2, 0].tolist() == [1, 1, 1]  # fifteen items are never on the table
    assert np.all(np.asarray(valuation.OUTCOMES) >= [outcome.number_of(np.array([c])) for c in valuation.COUNTS])


def test_the_other_side_sees_its_own_values_and_no_outcome_of_ours():
    protocol = pr.make_protocol("negotiation", 27)
    ours = dialogue(protocol, ["bos 1 4 4 1 1 2 >a a b >u c >o 1 0 1 stop", "bos 1 4 4 1 1 2 >u a >a b"])
    theirs = dialogue(protocol, ["bos 1 0 4 2 1 2 >u a b >a c >o", "bos 1 6 4 0 1 4 >a a >u b"])
    seen = valuation.own_view(protocol, ours, jnp.array([[0, 2, 2], [6, 0, 4]]))
    np.testing.assert_array_equal(seen.token_BT, theirs.token_BT)
    np.testing.assert_array_equal(seen.author_BT, theirs.author_BT)
    again = valuation.with_outcome(protocol, seen, ours)
    np.testing.assert_array_equal(
        again.token_BT[0], dialogue(protocol, ["bos 1 0 4 2 1 2 >u a b >a c >o 0 4 0 stop"]).token_BT[0]
    )
    np.testing.assert_array_equal(again.token_BT[1], theirs.token_BT[1])
    none = dialogue(protocol, ["bos 1 4 4 1 1 2 >a a >o none stop"])
    seen = valuation.own_view(protocol, none, jnp.array([[0, 2, 2]]))
    last = valuation.with_outcome(protocol, seen, none)
    np.testing.assert_array_equal(last.token_BT, dialogue(protocol, ["bos 1 0 4 2 1 2 >u a >o none stop"]).token_BT)


def test_likelihoods_are_of_its_words_alone(w):
    ours, theirs = rollout.converse(
        w.protocol, *(rollout.View(w.net, w.params, side) for side in openings(w, 8)), KEY, tokens=T, turns=3
    )
    found = valuation.log_likelihoods(w.net, w.protocol, w.params, ours)
    scored = score(w.net, w.protocol, w.params, theirs)
    expected = -np.sum(scored.nll_BT, axis=1, where=np.asarray(theirs.author_BT) == pr.ASSISTANT)
    true = place(ours, deal.values(theirs))
    np.testing.assert_allclose(np.asarray(found)[range(8), true], expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(np.isfinite(found), valuation.valuations(ours)[1])


def test_who_speaks_is_told_by_what_is_said(w):
    """The values of those who talk are likelier than others, once they have talked."""
    sides = openings(w, 96)
    ours, theirs = rollout.converse(
        w.protocol, *(rollout.View(w.net, w.params, side) for side in sides), KEY, tokens=T, turns=6
    )
    true = place(ours, deal.values(theirs))
    worth = {}
    for name, said in (("before", sides[0]), ("after", ours)):
        logp_BZ = valuation.log_likelihoods(w.net, w.protocol, w.params, said)
        worth[name] = np.mean(np.asarray(jax.nn.softmax(logp_BZ))[range(96), true])
    assert worth["after"] > 1.3 * worth["before"]


def test_futures_are_those_of_somebody_with_these_values(w):
    """Were only one valuation possible, imagination would be the conversation with it."""
    ours, theirs = openings(w)
    user, Z = noisy(w.params, 7, 0.3), valuation.table().shape[3]
    likely_BZ = jnp.where(jnp.arange(Z)[None] == place(ours, deal.values(theirs))[:, None], 0.0, -jnp.inf)
    settings = {"tokens": T, "turns": 8, "temperature": 1.0, "copies": 2}
    terms = {"terms": Imagine(), "sure": False, "user": user, "logp_BZ": likely_BZ}
    dreamt = valuation.imagine(w.net, w.protocol, w.params, ours, KEY, **terms, **settings)
    views = rollout.View(w.net, w.params, ours), rollout.View(w.net, user, theirs)
    np.testing.assert_array_equal(dreamt.token_BT, rollout.converse(w.protocol, *views, KEY, **settings)[0].token_BT)


@pytest.mark.parametrize("sure", [False, True])
def test_a_deal_is_worth_what_it_brings_both(w, sure):
    context = "bos 1 4 4 1 1 2 >a a b >u c >o"  # the other side values them 0, 2, 2
    outcomes = "1 1 1 stop", "0 0 1 stop", "1 0 0 stop", "none stop", "2 0 0 stop"
    ours = dialogue(w.protocol, [f"{context} {outcome}" for outcome in outcomes])
    lefts = "0 3 0 stop", "1 4 0 stop", "0 4 1 stop", "none stop", "none stop"
    theirs = dialogue(w.protocol, [f"bos 1 0 4 2 1 2 >u a b >a c >o {left}" for left in lefts])
    worth_B = np.array([7 + 6 / 2, 2 + 8 / 2 - 4 / 4, 4 + 10 / 2, 0, 0])
    if sure:
        for side, params in ((ours, w.params), (theirs, noisy(w.params, 7))):
            nll_BT = score(w.net, w.protocol, params, side).nll_BT
            worth_B = worth_B * np.exp(-np.sum(nll_BT, axis=1, where=side.author_BT == pr.OUTCOME) / 2)
    priced = valuation.priced(
        w.net, w.protocol, w.params, noisy(w.params, 7), ours, jnp.tile(jnp.array([[0, 2, 2]]), (5, 1)),
        Imagine(generosity=0.5, waste=0.25), sure,
    )  # fmt: skip
    np.testing.assert_allclose(priced.reward_BU.sum(axis=1), worth_B, rtol=1e-4)


def test_values_are_drawn_for_every_copy(w):
    """As likely as what was said makes them, and the first copy draws what it would draw alone."""
    ours, _ = openings(w, 4)
    settings = {"terms": Imagine(), "sure": False, "tokens": T, "turns": 1, "temperature": 1.0}
    alone = valuation.imagine(w.net, w.protocol, w.params, ours, KEY, **settings)
    many = valuation.imagine(w.net, w.protocol, w.params, ours, KEY, copies=6, **settings)
    np.testing.assert_array_equal(many.token_BT[::6], alone.token_BT)
    assert len(np.unique(np.asarray(many.token_BT), axis=0)) > 12
