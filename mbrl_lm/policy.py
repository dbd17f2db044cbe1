"""The assistant's turns: policy gradient with truncated importance weights. Per-token losses; the learner sums them."""

import chex
import jax
import jax.numpy as jnp

from mbrl_lm.types import Array


def importance(logp_BT: Array, behaviour_logp_BT: Array) -> Array:
    """min(1, pi / b) per token, without gradient: V-trace's truncation (Espeholt et al. 2018) of off-policy tokens.

    It is 1 on fresh samples. On a logged token that is being unlearnt it goes to 0, so that a negative advantage cannot push
    a probability down for ever.
    """
    return jnp.minimum(1.0, jnp.exp(jax.lax.stop_gradient(logp_BT - behaviour_logp_BT)))


def gradient_loss(logp_BT: Array, advantage_BT: Array, importance_BT: Array) -> Array:
    """-sg(rho A) log pi per token (REINFORCE, Williams 1992): the turn's advantage on each of its tokens."""
    chex.assert_equal_shape([logp_BT, advantage_BT, importance_BT])
    return -jax.lax.stop_gradient(importance_BT * advantage_BT) * logp_BT
