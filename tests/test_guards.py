"""What keeps imagination honest: doubt and anchors by hand, and heads that watch without shaping what they watch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import component_gradients, norm, random_dialogues, world, written

from mbrl_lm import guards, learner


def state_of(doubt_U, square_U):
    """A train state with these moments of the disagreement; nothing else is of interest."""
    w = world("chat", model__layers=1)
    state = learner.init_state(w.net, optax.sgd(1.0), jax.random.key(0))
    return state.replace(doubt_U=jnp.array(doubt_U, jnp.float32), doubt_square_U=jnp.array(square_U, jnp.float32))


def ensemble(*members):
    """(1, 1, E, V) logits of members that give these probabilities."""
    return jnp.log(jnp.array(members, jnp.float32))[None, None]


def entropy(*p):
    return -sum(x * np.log(x) for x in p)


def test_members_who_say_the_same_do_not_disagree():
    logits_V = np.random.default_rng(0).normal(size=(2, 3, 1, 7)) * 3
    np.testing.assert_allclose(guards.disagreement(jnp.asarray(np.repeat(logits_V, 4, axis=2), jnp.float32)), 0, atol=1e-6)
    assert abs(float(guards.disagreement(ensemble((0.5, 0.5), (0.5, 0.5)))[0, 0])) < 1e-6, "uncertain, and at one about it"


def test_disagreement_by_hand():
    certain = jnp.array([[[[60.0, 0.0, 0.0], [0.0, 60.0, 0.0]]]])
    np.testing.assert_allclose(guards.disagreement(certain), [[np.log(2)]], rtol=1e-6)
    expected = entropy(0.7, 0.3) - (entropy(0.9, 0.1) + entropy(0.5, 0.5)) / 2
    np.testing.assert_allclose(guards.disagreement(ensemble((0.9, 0.1), (0.5, 0.5))), [[expected]], rtol=1e-4)


def test_doubt_is_in_standard_deviations_of_the_turn():
    """A mean of 1 and a deviation of 0.5 on first replies, of 2 and 2 on second ones."""
    state = state_of([1.0, 2.0], [1.25, 8.0])
    doubt_BU = guards.doubt(jnp.array([[2.0, 2.0], [0.5, 6.0]]), state)
    np.testing.assert_allclose(doubt_BU, [[2, 0], [-1, 2]], atol=1e-6)
    np.testing.assert_allclose(guards.doubt(jnp.array([[0.002]]), state_of([0.0], [0.0])), [[2]], rtol=1e-5)  # of a floor


def test_moments_of_disagreement_by_hand():
    state = state_of([1.0, 2.0], [4.0, 5.0])
    x_BU, mask_BU = jnp.array([[3.0, 9.0], [5.0, 9.0], [100.0, 9.0]]), jnp.array([[True, False]] * 2 + [[False, False]])
    moved = guards.watch_disagreement(state, x_BU, mask_BU, 0.75)
    np.testing.assert_allclose(moved.doubt_U, [0.75 * 1 + 0.25 * 4, 2])
    np.testing.assert_allclose(moved.doubt_square_U, [0.75 * 4 + 0.25 * 17, 5])


def test_the_first_real_replies_set_the_scale():
    """With moments that started from 0, nearly every reply would be doubtful until they had filled."""
    x_BU = jnp.array([[3.0, 1.0], [5.0, 9.0]])
    state = guards.watch_disagreement(state_of([0.0, 0.0], [0.0, 0.0]), x_BU, jnp.array([[True, False]] * 2), 0.99)
    np.testing.assert_allclose(guards.doubt(x_BU, state)[:, 0], [-1, 1], rtol=1e-5)
    state = guards.watch_disagreement(state, x_BU, jnp.array([[False, True]] * 2), 0.99)
    np.testing.assert_allclose(guards.doubt(x_BU, state), [[-1, -1], [1, 1]], rtol=1e-5)


def test_before_first():
    stop_BU = jnp.array([[False, True, False, True], [True, False, False, False], [False] * 4, [False, False, False, True]])
    assert guards.before_first(stop_BU).astype(int).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]


@functools.cache
def returns(seed=0):
    """Imagined returns that are too high and too wide, and real ones."""
    rng = np.random.default_rng(seed)
    return rng.normal(0.8, 0.4, 200), rng.normal(0.2, 0.1, 300)


def test_anchors_are_quantiles_and_do_not_pair_single_dialogues():
    imagined, real = returns()
    anchor_XW = guards.anchors(imagined, real)
    assert anchor_XW.shape == (2, guards.QUANTILES) and anchor_XW.dtype == np.float32
    assert (anchor_XW == guards.anchors(imagined[::-1], np.random.default_rng(1).permutation(real))).all()
    half = guards.QUANTILES // 2
    np.testing.assert_allclose(anchor_XW[:, half], [np.median(imagined), np.median(real)], rtol=1e-5)
    assert np.mean(imagined < anchor_XW[0, 0]) == pytest.approx(0.5 / guards.QUANTILES, abs=0.01)


def test_imagined_returns_come_to_the_level_of_real_ones():
    imagined, real = returns()
    anchor_XW = guards.anchors(imagined, real)
    np.testing.assert_allclose(guards.to_real(jnp.asarray(anchor_XW[:1]), anchor_XW), anchor_XW[1:], atol=1e-6)
    told = np.asarray(guards.to_real(jnp.asarray(imagined, jnp.float32)[None], anchor_XW))
    assert told.mean() == pytest.approx(real.mean(), abs=0.05) and told.std() == pytest.approx(real.std(), abs=0.08)
    # As a regression would not: what is best stays best.
    grid = np.asarray(guards.to_real(jnp.linspace(-1, 2, 500)[None], anchor_XW))[0]
    assert (np.diff(grid) > 0).all()
    assert told[0, imagined.argmax()] == told.max() and told[0, imagined.argmin()] == told.min()


def test_anchors_never_stretch():
    """Real returns that are wider are met in the mean alone."""
    real, imagined = returns()
    told = np.asarray(guards.to_real(jnp.asarray(imagined, jnp.float32)[None], guards.anchors(imagined, real)))
    assert told.mean() == pytest.approx(real.mean(), abs=0.05) and told.std() == pytest.approx(imagined.std(), abs=0.005)


def test_slow_successes_of_imagination_are_no_failures():
    """Eleven of 17 imagined dialogues succeed, at 1 or .9, and five real ones: what a turn costs stays a tenth, and success
    comes to the mean of the real dialogues of these ranks, less that tenth: (5 * (1 - .1) + 6 * 0) / 11."""
    imagined = np.array([0.0] * 6 + [0.9] * 6 + [1.0] * 5)
    anchor_XW = guards.anchors(np.repeat(imagined, 100), np.repeat([0.0] * 12 + [1.0] * 5, 100))
    np.testing.assert_allclose(anchor_XW[0], imagined, atol=1e-6)
    slow = (5 * (1 - 0.1) + 6 * 0.0) / 11
    np.testing.assert_allclose(anchor_XW[1], [0.0] * 6 + [slow] * 6 + [slow + 0.1] * 5, atol=1e-5)


def test_to_real_by_hand():
    """Twice the return and one more between the anchors; beyond them a return of one more is one more."""
    anchor_XW = jnp.array([[0.0, 1.0, 2.0], [1.0, 3.0, 5.0]])
    found = guards.to_real(jnp.array([[-1.0, 0.0, 0.25, 1.5, 2.0, 4.0]]), anchor_XW)
    np.testing.assert_allclose(found, [[0, 1, 1.5, 4, 5, 7]], rtol=1e-6)


def test_without_real_dialogues_the_anchors_change_nothing():
    x_BU = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    fresh = learner.init_state(world("chat", model__layers=1).net, optax.sgd(1.0), jax.random.key(0))
    assert (guards.to_real(x_BU, fresh.anchor_XW) == x_BU).all()
    same = guards.anchors(returns()[0], returns()[0])
    np.testing.assert_allclose(guards.to_real(x_BU, same), x_BU, atol=1e-6)


def test_what_guards_read_never_shapes_the_trunk():
    w = world("chat", model__layers=1, loss__distil=1.0, model__belief=2, world_model__goals=2)
    real, imagined = random_dialogues(w.protocol, 1, 6), written(random_dialogues(w.protocol, 2, 6))
    gradients = component_gradients(w, real, imagined)
    own = {"user_heads": {"user_EDV"}, "real_reply": {"real_D"}, "imagined_reply": {"real_D"}}
    for name, gradient in gradients.items():
        touched = {key for key, part in gradient.items() if norm(part) > 0}
        assert touched == own[name] if name in own else not touched & {"user_EDV", "real_D"}, name
        assert name in own or name == "outcome" or "embed_VD" in touched
