"""Baselines by hand, and which rows they fall on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of, world

from mbrl_lm import advantage, learner, targets
from mbrl_lm.optimizer import make_optimizer

R, ALL = jnp.array([1.0, 2.0, 6.0]), jnp.ones(3, bool)


def test_leave_one_out_by_hand():
    np.testing.assert_allclose(advantage.leave_one_out(R, ALL), [1 - 4, 2 - 3.5, 6 - 1.5])
    np.testing.assert_allclose(advantage.leave_one_out(R, jnp.array([True, False, True])), [-5, 0, 5])
    assert not advantage.leave_one_out(R, jnp.array([True, False, False])).any(), "nobody to compare with"


def test_normalised_by_hand():
    spread = np.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 3)
    np.testing.assert_allclose(advantage.normalised(R, ALL), np.array([-2, -1, 3]) / spread, rtol=1e-6)
    np.testing.assert_allclose(advantage.normalised(R, jnp.array([True, False, True])), [-1, 0, 1], rtol=1e-6)
    assert not advantage.normalised(jnp.full(3, 2.0), ALL).any()


def advantages_of(baseline, candidates=2):
    """Of two real rows and four imagined ones, two prompts with two candidates each."""
    cfg = config_of(policy__baseline=baseline, imagine__candidates=candidates)
    w = world("chat", model__layers=1)
    state = learner.init_state(w.net, make_optimizer(cfg.train), jax.random.key(0))
    state = state.replace(real_mean=jnp.float32(10.0), imagined_mean=jnp.float32(20.0), return_high=jnp.float32(2.0))
    return_BU = jnp.array([[1, 2, 0], [3, 0, 0], [0, 5, 6], [0, 9, 0], [7, 8, 0], [0, 0, 0]], jnp.float32)
    mask_BU = return_BU != 0
    return np.asarray(advantage.advantages(cfg, state, return_BU, return_BU / 2, mask_BU, 2)), mask_BU


def test_against_the_value_and_the_running_means():
    got, mask_BU = advantages_of("value")
    np.testing.assert_allclose(got[mask_BU], np.array([0.5, 1, 1.5, 2.5, 3, 4.5, 3.5, 4]) / 2)
    got, mask_BU = advantages_of("mean")
    np.testing.assert_allclose(got[mask_BU], np.array([-9, -8, -7, -15, -14, -11, -13, -12]) / 2)


@pytest.mark.parametrize("baseline, pairs", [("leave_one_out", [-2, -2, 2, 0, 0]), ("normalised", [-1, -1, 1, 0, 0])])
def test_candidates_are_compared_from_their_first_turn_on(baseline, pairs):
    """5 against 9 after the one prompt; after the other one, 7 has nobody to be compared with."""
    got, mask_BU = advantages_of(baseline)
    np.testing.assert_allclose(got[mask_BU], [-4.5, -4, -3.5, *pairs], rtol=1e-5)


def test_running_means_know_real_from_imagined():
    w = world("chat", model__layers=1)
    cfg = config_of(returns__scale_decay=0.5)
    state = learner.init_state(w.net, make_optimizer(cfg.train), jax.random.key(0))
    return_BU, mask_BU = jnp.array([[2.0, 4.0], [8.0, 0.0]]), jnp.array([[True, True], [True, False]])
    imagined_B = jnp.array([False, True])

    def after(state, return_BU, mask_BU, since):
        moved = targets.watch_returns(cfg.returns, state, return_BU, mask_BU, imagined_B, since)
        return moved, (float(moved.real_mean), float(moved.imagined_mean))

    begun, means = after(state, return_BU, mask_BU, 0)
    assert means == (3.0, 8.0), "the first ones are taken as they are"
    moved, means = after(begun, 2 * return_BU, mask_BU, 5)
    assert means == (4.5, 12.0)
    assert after(moved, return_BU, mask_BU & False, 6)[1] == means, "nothing seen, nothing moved"
