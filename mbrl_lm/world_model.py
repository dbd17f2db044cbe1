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


def end_loss(end_logit_BU: Array, last_BU: Array) -> Array:
    """Binary cross-entropy of "the user's reply ends the dialogue", per assistant turn."""
    logp_BU = jax.nn.log_sigmoid(jnp.where(last_BU, end_logit_BU, -end_logit_BU))
    return -logp_BU
