"""The assistant's turns: what is done with an advantage. Per-token losses; the learner sums them.

`LOSSES` maps a name of `config.Policy.loss` to `logp, behaviour_logp, advantage, settings -> loss`, all (B, T).
"""

import math

import chex
import jax
import jax.numpy as jnp

from mbrl_lm import config
from mbrl_lm.types import Array, Dialogue

LARGEST_WEIGHT = 20.0  # of advantage-weighted regression, as in its source


def importance(logp_BT: Array, behaviour_logp_BT: Array) -> Array:
    """min(1, pi / b) per token, without gradient: V-trace's truncation (Espeholt et al. 2018) of off-policy tokens.

    It is 1 on fresh samples. On a logged token that is being unlearnt it goes to 0, so that a negative advantage cannot push
    a probability down for ever.
    """
    return jnp.minimum(1.0, jnp.exp(jax.lax.stop_gradient(logp_BT - behaviour_logp_BT)))


def behaviour(dialogue: Dialogue, reference_logp_BT: Array) -> Array:
    """log b of each token. A logged token has no recorded probability: the reference, fitted to the logs, stands in for who
    wrote it."""
    return jnp.where(dialogue.sampled_BT, dialogue.logp_BT, reference_logp_BT)


def gradient_loss(logp_BT: Array, advantage_BT: Array, importance_BT: Array) -> Array:
    """-sg(rho A) log pi per token (REINFORCE, Williams 1992): the turn's advantage on each of its tokens."""
    chex.assert_equal_shape([logp_BT, advantage_BT, importance_BT])
    return -jax.lax.stop_gradient(importance_BT * advantage_BT) * logp_BT


def reinforce(logp_BT: Array, behaviour_logp_BT: Array, advantage_BT: Array, cfg: config.Policy) -> Array:
    """The policy gradient, with truncated importance weights."""
    return gradient_loss(logp_BT, advantage_BT, importance(logp_BT, behaviour_logp_BT))


def ppo(logp_BT: Array, behaviour_logp_BT: Array, advantage_BT: Array, cfg: config.Policy) -> Array:
    """-min(rho A, clip(rho, 1 - c, 1 + c) A), rho = pi / b per token (Schulman et al. 2017)."""
    chex.assert_equal_shape([logp_BT, behaviour_logp_BT, advantage_BT])
    ratio_BT = jnp.exp(logp_BT - jax.lax.stop_gradient(behaviour_logp_BT))
    clipped_BT = jnp.clip(ratio_BT, 1 - cfg.clip, 1 + cfg.clip)
    advantage_BT = jax.lax.stop_gradient(advantage_BT)
    return -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def awr(logp_BT: Array, behaviour_logp_BT: Array, advantage_BT: Array, cfg: config.Policy) -> Array:
    """-min(exp(A / temperature), 20) log pi: advantage-weighted regression (Peng et al. 2019)."""
    chex.assert_equal_shape([logp_BT, advantage_BT])
    weight_BT = jnp.exp(jnp.minimum(advantage_BT / cfg.temperature, math.log(LARGEST_WEIGHT)))
    return -jax.lax.stop_gradient(weight_BT) * logp_BT


def cloning(logp_BT: Array, behaviour_logp_BT: Array, advantage_BT: Array, cfg: config.Policy) -> Array:
    """-1[A > 0] log pi: likelihood of the turns that did better than expected (binary CRR, Wang et al. 2020)."""
    chex.assert_equal_shape([logp_BT, advantage_BT])
    return -jnp.where(advantage_BT > 0, logp_BT, 0.0)


LOSSES = {"reinforce": reinforce, "ppo": ppo, "awr": awr, "cloning": cloning}
