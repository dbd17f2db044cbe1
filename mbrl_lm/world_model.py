"""The model of the user: which tokens it is trained on, and how its error is measured."""

import jax
import jax.numpy as jnp

from mbrl_lm import protocol as pr
from mbrl_lm.types import Array, Dialogue


def real_tokens(dialogue: Dialogue, role: int) -> Array:
    """bool (B, T): tokens of `role` that were read from the world and not written by our own network."""
    return (dialogue.author_BT == role) & ~dialogue.sampled_BT


def user_tokens(dialogue: Dialogue) -> Array:
    """The real user's words, hand-overs and leaves: all that the world model may learn from."""
    return real_tokens(dialogue, pr.USER)


def clipped_mae(nll_BT: Array, threshold: float) -> Array:
    """1[p <= threshold] (1 - p), p = exp(-nll): linear in the probability, and nothing where the model is good enough.

    Source: the world-model loss of PaW (2026), whose gradient cannot be dominated by tokens that nobody can predict.
    """
    p_BT = jnp.exp(-nll_BT)
    return jnp.where(p_BT <= threshold, 1.0 - p_BT, 0.0)


def closing_tokens(protocol: pr.Protocol, dialogue: Dialogue) -> Array:
    """bool (B, T): tokens by which the user hands over, ends or leaves."""
    return jnp.asarray(protocol.handover_RV)[pr.USER][dialogue.token_BT] & (dialogue.author_BT == pr.USER)


def end_loss(end_logit_BU: Array, last_BU: Array) -> Array:
    """Binary cross-entropy of "the user's reply ends the dialogue", per assistant turn."""
    logp_BU = jax.nn.log_sigmoid(jnp.where(last_BU, end_logit_BU, -end_logit_BU))
    return -logp_BU
