"""The policy gradient per token, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import policy


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
