"""Between the token axis and the turn axis: where the assistant's turns open, close and are answered."""

import chex
import jax.numpy as jnp

from mbrl_lm import protocol as pr
from mbrl_lm.types import Array, Dialogue, Turns


def prompt_lengths(prompt: Dialogue) -> Array:
    """(B,) i32: tokens before the padding."""
    return jnp.sum(prompt.author_BT != pr.END, axis=1, dtype=jnp.int32)


def openings(protocol: pr.Protocol, dialogue: Dialogue) -> Array:
    """bool (B, T): tokens that hand the floor to the assistant. What they end is a state in which the assistant acts."""
    author_BT = dialogue.author_BT.astype(jnp.int32)
    next_BT = jnp.asarray(protocol.switch_RV)[author_BT, dialogue.token_BT]
    return (next_BT == pr.ASSISTANT) & (author_BT != pr.ASSISTANT)


def find_turns(protocol: pr.Protocol, dialogue: Dialogue, unanswered: bool = False) -> Turns:
    """Finds the assistant's turns; U is that of `dialogue.reward_BU`, and later turns are left out.

    A turn is a whole transition (`mask_BU`) when the assistant gave the floor away and either its next turn was reached or
    the dialogue truly ended. The last turn of a truncated dialogue is none: the value of its state is the bootstrap.
    `unanswered`: a last turn that the user was not given the time to answer counts, too; its `reply_BU` is its `close_BU`.
    """
    U = dialogue.reward_BU.shape[1]
    author_BT = dialogue.author_BT.astype(jnp.int32)
    T = author_BT.shape[1]
    position_T = jnp.arange(T)
    opens_BT = openings(protocol, dialogue)
    nth_BT = jnp.cumsum(opens_BT, axis=1) - 1  # the assistant turn that each token follows the opening of

    def locate(marked_BT, turns):
        """Position of the marked token of each turn, -1 if there is none."""
        hit_BTU = marked_BT[..., None] & (nth_BT[..., None] == jnp.arange(turns)[None, None])
        return jnp.max(jnp.where(hit_BTU, position_T[None, :, None], -1), axis=1)

    next_role_BT = jnp.asarray(protocol.switch_RV)[author_BT, dialogue.token_BT]
    closes_BT = (author_BT == pr.ASSISTANT) & (next_role_BT != pr.ASSISTANT)
    open_BU = locate(opens_BT, U + 1)
    close_BU = locate(closes_BT, U)
    end_B = jnp.max(jnp.where(author_BT != pr.END, position_T[None], 0), axis=1)
    has_next_BU = open_BU[:, 1:] >= 0
    spoken_BU = (open_BU[:, :-1] >= 0) & (close_BU >= 0)
    mask_BU = spoken_BU & (has_next_BU | dialogue.ended_B[:, None])
    reply_BU = jnp.where(has_next_BU, open_BU[:, 1:], end_B[:, None])
    last_BU = mask_BU & ~has_next_BU
    if unanswered:
        mask_BU = spoken_BU & (mask_BU | (close_BU == end_B[:, None]))

    def clean(position_BU):
        return jnp.where(mask_BU, position_BU, 0)

    return Turns(clean(open_BU[:, :-1]), clean(close_BU), clean(reply_BU), mask_BU, last_BU)


def gather(x_BT: Array, position_BU: Array) -> Array:
    """Values of a token-axis array at the turns' positions; further axes of `x_BT` stay."""
    chex.assert_equal_shape_prefix([x_BT, position_BU], 1)
    index = position_BU.reshape(*position_BU.shape, *(1,) * (x_BT.ndim - 2))
    return jnp.take_along_axis(x_BT, index, axis=1)


def _belongs(protocol: pr.Protocol, dialogue: Dialogue, role: int, turns: int) -> Array:
    """bool (B, T, U): tokens of the assistant's turns, or of the user's replies to them."""
    opens_BT = openings(protocol, dialogue)
    nth_BT = jnp.cumsum(opens_BT, axis=1) - opens_BT - 1 if role == pr.USER else jnp.cumsum(opens_BT, axis=1) - 1
    return (nth_BT[..., None] == jnp.arange(turns)[None, None]) & (dialogue.author_BT == role)[..., None]


def total(protocol: pr.Protocol, dialogue: Dialogue, x_BT: Array, turns: int, role: int = pr.USER) -> Array:
    """The sum over the user's reply to each of U turns, or over the turn itself, the token that closes it included."""
    at_BTU = _belongs(protocol, dialogue, role, turns)
    return jnp.sum(jnp.where(at_BTU, x_BT[..., None], jnp.zeros((), x_BT.dtype)), axis=1)


def spread(protocol: pr.Protocol, dialogue: Dialogue, x_BU: Array, role: int = pr.ASSISTANT) -> Array:
    """Gives each token of `role` the value of its turn, or of the turn that it replies to; 0 at all other tokens."""
    at_BTU = _belongs(protocol, dialogue, role, x_BU.shape[1])
    return jnp.sum(jnp.where(at_BTU, x_BU[:, None], jnp.zeros((), x_BU.dtype)), axis=-1).astype(x_BU.dtype)
