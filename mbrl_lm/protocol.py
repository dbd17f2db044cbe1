"""Who speaks: roles, special tokens and the table that says who speaks after which token.

A conversation is one stream of tokens, `BOS context <to first speaker> words <to other speaker> words ... <end>`. The
hand-over token is written by the speaker who gives the floor away. One finite-state table drives the sampling loop, the
parser of real dialogues and the masks of every loss, so they cannot disagree.

Special tokens have the first ids of every vocabulary and the tokenizer's pieces are shifted past them: no text, whatever a
user types, can encode to a role or to an end.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm.types import Array, Dialogue

ROLES = ("context", "assistant", "user", "outcome", "end")
CONTEXT, ASSISTANT, USER, OUTCOME, END = range(5)

LARGEST_NUMBER = 10
SPECIAL = ("<pad>", "<bos>", "<to_user>", "<to_assistant>", "<to_outcome>", "<end>", "<leave>", "<no_deal>") + tuple(
    f"<{n}>" for n in range(LARGEST_NUMBER + 1)
)
PAD, BOS, TO_USER, TO_ASSISTANT, TO_OUTCOME, STOP, LEAVE, NO_DEAL, NUMBER = range(9)  # NUMBER + n stands for the number n
# In a user's own view of a context that lists items: what it wants follows, in the place of BOS; the others follow.
WANTED, OTHERS = NUMBER + 1, NUMBER + 2
FIRST_PIECE = len(SPECIAL)
ITEMS = 3  # kinds of item in a negotiation
OUTCOME_TOKENS = ITEMS + 1  # the own share of each kind, and the end


@dataclasses.dataclass(frozen=True, eq=False)
class Protocol:
    """The finite-state tables of one kind of conversation.

    Attributes:
      switch_RV: (R, V) i8, the role that speaks after `role` has written `token`.
      allowed_RV: (R, V) bool, what a role may sample. Real text may hold other tokens (unknown words); they are read, and no
        policy gradient falls on them.
      budget_R: (R,) i32, the most tokens of one turn, its hand-over included; on the last one only hand-overs are allowed.
      mirror_V: (V,) i32, the same token as the other party of the conversation sees it: `<to_user>` <-> `<to_assistant>`.
      separator: the token between the items that a context lists; -1 where none is known.
      naming_XV: (X, V) i32, the same token where the kinds of item are called otherwise; the first naming is the own one.
      order_XI: (X, 3) i32, which kind then stands in each place.
    """

    switch_RV: np.ndarray
    allowed_RV: np.ndarray
    budget_R: np.ndarray
    mirror_V: np.ndarray
    separator: int
    naming_XV: np.ndarray
    order_XI: np.ndarray

    @property
    def vocab_size(self) -> int:
        return self.switch_RV.shape[1]

    @property
    def handover_RV(self) -> np.ndarray:
        """(R, V) bool: tokens by which a role gives the floor away."""
        return self.allowed_RV & (self.switch_RV != np.arange(len(ROLES))[:, None])


def make_protocol(
    kind: str,
    vocab_size: int,
    unknown: Sequence[int] = (),
    turn_tokens: int = 32,
    separator: int = -1,
    names: Sequence[Sequence[int]] = (),
) -> Protocol:
    """The tables of a kind of conversation.

    Args:
      kind: "chat" (an assistant serves a user, who may end the dialogue or walk away) or "negotiation" (either side may call
        for the outcome, which then is written as numbers).
      vocab_size: of special tokens and pieces together.
      unknown: ids of pieces that stand for unknown words: read, never sampled.
      turn_tokens: the budget of a turn.
      separator: the token between the items of a context, if there is one.
      names: tokens that the kinds of item of a negotiation are called, one for each kind: of one, of many; later ones win.
    """
    R, V = len(ROLES), vocab_size
    switch_RV = np.repeat(np.arange(R, dtype=np.int8)[:, None], V, axis=1)
    switch_RV[CONTEXT, TO_USER] = switch_RV[ASSISTANT, TO_USER] = USER
    switch_RV[CONTEXT, TO_ASSISTANT] = switch_RV[USER, TO_ASSISTANT] = ASSISTANT
    switch_RV[:, [PAD, STOP, LEAVE]] = END

    words_V = np.arange(V) >= FIRST_PIECE
    words_V[list(unknown)] = False
    allowed_RV = np.zeros((R, V), bool)
    allowed_RV[CONTEXT] = True  # the context is given, never sampled
    allowed_RV[ASSISTANT] = allowed_RV[USER] = words_V
    allowed_RV[ASSISTANT, TO_USER] = allowed_RV[USER, TO_ASSISTANT] = True
    allowed_RV[END, PAD] = True
    if kind == "chat":
        allowed_RV[USER, [STOP, LEAVE]] = True
    elif kind == "negotiation":
        switch_RV[[ASSISTANT, USER], TO_OUTCOME] = OUTCOME
        allowed_RV[[ASSISTANT, USER], TO_OUTCOME] = True
        allowed_RV[OUTCOME, NO_DEAL] = allowed_RV[OUTCOME, STOP] = True
        allowed_RV[OUTCOME, NUMBER : NUMBER + LARGEST_NUMBER + 1] = True
    else:
        raise ValueError(f"unknown kind of conversation {kind!r}: use 'chat' or 'negotiation'")

    mirror_V = np.arange(V, dtype=np.int32)
    mirror_V[[TO_USER, TO_ASSISTANT]] = TO_ASSISTANT, TO_USER
    order_XI = np.array(list(itertools.permutations(range(ITEMS)))[: None if names else 1])
    naming_XV = np.tile(np.arange(V, dtype=np.int32), (len(order_XI), 1))
    for naming_V, order_I in zip(naming_XV[1:], order_XI[1:], strict=True):
        for word in names:
            naming_V[np.take(word, order_I)] = word
    no_limit = np.iinfo(np.int32).max
    budget_R = np.array([no_limit, turn_tokens, turn_tokens, OUTCOME_TOKENS, no_limit], np.int32)
    return Protocol(switch_RV, allowed_RV, budget_R, mirror_V, separator, naming_XV, order_XI)


def parse(protocol: Protocol, token_BT: Array) -> tuple[Array, Array]:
    """Reads who wrote each token, and in which turn.

    Args:
      token_BT: i32, starting with BOS.

    Returns:
      author_BT: i8, the role that wrote each token; PAD after the end has the author END.
      turn_BT: i16, 0 for the context, one more at every hand-over.
    """
    switch_RV = jnp.asarray(protocol.switch_RV)

    def read(role_B, token_B):
        return switch_RV[role_B, token_B], role_B

    start_B = jnp.full(token_BT.shape[0], CONTEXT, jnp.int8)
    _, role_TB = jax.lax.scan(read, start_B, token_BT.T)
    author_BT = jnp.where(token_BT == PAD, jnp.int8(END), role_TB.T)  # a truncated row has no end token before its padding
    changed_BT = jnp.diff(author_BT, axis=1, prepend=author_BT[:, :1]) != 0
    return author_BT, jnp.cumsum(changed_BT, axis=1).astype(jnp.int16)


def attributed(protocol: Protocol, dialogue: Dialogue) -> Dialogue:
    """The dialogue with the author and the turn of each of its tokens, whatever they were before."""
    author_BT, turn_BT = parse(protocol, dialogue.token_BT)
    return dialogue.replace(author_BT=author_BT, turn_BT=turn_BT)


_parse = jax.jit(parse, static_argnums=0)


def attributed_on_host(protocol: Protocol, dialogue: Dialogue) -> Dialogue:
    """`attributed`, of numpy arrays."""
    author_BT, turn_BT = map(np.asarray, _parse(protocol, dialogue.token_BT))
    return dialogue.replace(author_BT=author_BT, turn_BT=turn_BT)


def temperatures(*, assistant: float = 1.0, user: float = 1.0, outcome: float = 1.0) -> np.ndarray:
    """(R,) f32: the temperature at which the tokens of each role are sampled."""
    temperature_R = np.ones(len(ROLES), np.float32)
    temperature_R[[ASSISTANT, USER, OUTCOME]] = assistant, user, outcome
    return temperature_R


def place_in_turn(turn_BT: Array) -> Array:
    """How many tokens of the same turn stand before each token: i32, 0 for a turn's first."""
    position_T = jnp.arange(turn_BT.shape[1])[None]
    first_BT = jnp.diff(turn_BT, axis=1, prepend=-1) != 0
    return position_T - jax.lax.cummax(jnp.where(first_BT, position_T, 0), axis=1)


def may_write(protocol: Protocol, role: Array, place: Array) -> Array:
    """Which tokens a role may write at a place of its turn.

    Args:
      role: i8 of any shape.
      place: i32 of the same shape, the tokens already written in this turn.

    Returns:
      bool of that shape + (V,): the protocol's table, and only hand-overs on the last token of the turn's budget.
    """
    spent = place >= jnp.asarray(protocol.budget_R)[role] - 1
    return jnp.where(spent[..., None], jnp.asarray(protocol.handover_RV)[role], jnp.asarray(protocol.allowed_RV)[role])
