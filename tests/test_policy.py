"""The policy gradient per token, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_lm import config, policy


def test_importance_by_hand():
    logp = jnp.log(jnp.array([[0.5, 0.2, 0.3, 1e-9]]))
    behaviour = jnp.log(jnp.array([[0.25, 0.4, 0.3, 1.0]]))
    np.testing.assert_allclose(policy.importance(logp, behaviour), [[1, 0.5, 1, 1e-9]], rtol=1e-5, atol=1e-12)
    assert not jax.grad(lambda x: policy.importance(x, behaviour).sum())(logp).any()


def test_gradient_loss_by_hand():
    logp = jnp.array([[-1.0, -2.0, -0.5]])
    advantage = jnp.array([[2.0, -1.0, 0.0]])
    rho = jnp.array([[1.0, 0.5, 1.0]])
    np.testing.assert_allclose(policy.gradient_loss(logp, advantage, rho), [[2.0, -1.0, 0.0]])
    gradients = jax.grad(lambda *x: policy.gradient_loss(*x).sum(), argnums=(0, 1, 2))(logp, advantage, rho)
    np.testing.assert_allclose(gradients[0], [[-2.0, 0.5, 0.0]])  # descent raises what was better than expected
    assert not gradients[1].any() and not gradients[2].any()


LOGP = jnp.log(jnp.array([[0.5, 0.5, 0.5, 0.5]]))
BEHAVIOUR = jnp.log(jnp.array([[0.25, 0.25, 0.48, 1.0]]))  # ratios 2, 2, 1.04, 0.5
ADVANTAGE = jnp.array([[1.0, -1.0, 3.0, -2.0]])


def gradient_of(name, **settings):
    cfg = config.Policy(loss=name, **settings)
    return jax.grad(lambda logp: policy.LOSSES[name](logp, BEHAVIOUR, ADVANTAGE, cfg).sum())(LOGP)


def test_ppo_by_hand():
    loss = policy.ppo(LOGP, BEHAVIOUR, ADVANTAGE, config.Policy(clip=0.2))
    np.testing.assert_allclose(loss, [[-1.2, 2.0, -3 * 0.5 / 0.48, 1.6]], rtol=1e-5)
    # Nothing pulls where the ratio is past the clip in the direction of the advantage.
    np.testing.assert_allclose(gradient_of("ppo"), [[0, 2.0, -3 * 0.5 / 0.48, 0]], rtol=1e-5)


def test_reinforce_truncates():
    np.testing.assert_allclose(gradient_of("reinforce"), [[-1, 1, -3, 1]], rtol=1e-5)


def test_awr_by_hand():
    weights = [[np.exp(1 / 2), np.exp(-1 / 2), np.exp(3 / 2), np.exp(-2 / 2)]]
    np.testing.assert_allclose(gradient_of("awr", temperature=2.0), -np.array(weights), rtol=1e-5)
    assert gradient_of("awr", temperature=0.01).min() == pytest.approx(-policy.LARGEST_WEIGHT, rel=1e-5)


def test_cloning_imitates_what_was_better():
    assert gradient_of("cloning").tolist() == [[-1, 0, -1, 0]]
