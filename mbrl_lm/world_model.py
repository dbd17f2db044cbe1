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


def shuffled_targets(dialogue: Dialogue) -> Array:
    """i32 (B, T): the user's tokens replaced by those that the user of the row before says at the same place of its turns.

    A placebo for the world model's loss. Where the other one's turn is over, or was never said, it is padding.
    """
    (B, T), turns = dialogue.token_BT.shape, dialogue.turn_BT.astype(jnp.int32)
    other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), dialogue)
    token_BT, place_BT = jnp.arange(T)[None], pr.place_in_turn(dialogue.turn_BT)
    row_B1 = jnp.arange(B)[:, None]
    first_BT = jnp.full((B, T), T).at[row_B1, other.turn_BT.astype(jnp.int32)].min(jnp.broadcast_to(token_BT, (B, T)))
    at_BT = jnp.minimum(first_BT[row_B1, jnp.minimum(turns, T - 1)] + place_BT, T - 1)
    same_BT = other.turn_BT[row_B1, at_BT] == dialogue.turn_BT
    said_BT = jnp.where(same_BT, other.token_BT[row_B1, at_BT], pr.PAD)
    return jnp.where(dialogue.author_BT == pr.USER, said_BT, dialogue.token_BT)


def closing_tokens(protocol: pr.Protocol, dialogue: Dialogue) -> Array:
    """bool (B, T): tokens by which the user hands over, ends or leaves."""
    return jnp.asarray(protocol.handover_RV)[pr.USER][dialogue.token_BT] & (dialogue.author_BT == pr.USER)


def end_loss(end_logit_BU: Array, last_BU: Array) -> Array:
    """Binary cross-entropy of "the user's reply ends the dialogue", per assistant turn."""
    logp_BU = jax.nn.log_sigmoid(jnp.where(last_BU, end_logit_BU, -end_logit_BU))
    return -logp_BU
