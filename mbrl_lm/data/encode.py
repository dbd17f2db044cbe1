"""Records to token arrays."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from mbrl_lm import protocol as protocol_lib
from mbrl_lm.data.records import DataError, Record, Turn
from mbrl_lm.protocol import BOS, LEAVE, NO_DEAL, NUMBER, OUTCOME, PAD, STOP, TO_ASSISTANT, TO_OUTCOME, TO_USER, Protocol
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.types import Dialogue

ROLE = {"assistant": protocol_lib.ASSISTANT, "user": protocol_lib.USER}
NAME = {number: role for role, number in ROLE.items()}
OPENING = {"assistant": TO_ASSISTANT, "user": TO_USER}  # the token after which a role speaks
HAND_OVER = {"assistant": TO_USER, "user": TO_ASSISTANT}  # the token by which it gives the floor to the other
CLOSING = (TO_USER, TO_ASSISTANT, TO_OUTCOME, STOP, LEAVE)  # the last token of a turn
ENDING = {"end": STOP, "leave": LEAVE, "cut": None}
FEWEST_TURNS = 2  # of a dialogue that is cut: fewer teach nothing about a reply


@dataclasses.dataclass
class _Row:
    tokens: list[int]
    rewards: list[float]  # per assistant turn
    ended: bool
    shortened: bool  # turns at the end were left out
    clipped: bool  # the end of the context was left out


def encode(records: Sequence[Record], tokenizer: Tokenizer, protocol: Protocol, tokens: int, turns: int) -> Dialogue:
    """Lays dialogues out as `BOS numbers context <to first speaker> words <to other speaker> words ... ending`.

    A dialogue that is too long is cut at its last turn boundary that fits: it then ends in a hand-over token, `cut_B` is set
    and the reward of the whole dialogue is not given. A dialogue of which not even two turns fit is dropped. A context takes
    at most T/2 tokens; its first ones are kept. How often each happened is logged.

    Args:
      records: B' dialogues.
      tokenizer: its vocabulary is the protocol's.
      protocol: the tables of the kind of conversation.
      tokens: T, of a row.
      turns: U, the assistant turns of a row; one more may be opened, whose state bootstraps the last.

    Returns:
      Dialogue of numpy arrays with B <= B' rows in the order of the records; `uid_B` is the record's index.

    Raises:
      DataError: if a negotiated outcome meets a protocol without outcomes, or no dialogue is left.
    """
    if tokenizer.vocab_size != protocol.vocab_size:
        sizes = f"{tokenizer.vocab_size} and {protocol.vocab_size}"
        raise DataError(f"tokenizer and protocol differ in their vocabulary ({sizes}): make the protocol for this tokenizer")
    rows = {uid: row for uid, record in enumerate(records) if (row := _row(record, tokenizer, protocol, tokens, turns))}
    logging.info(
        "Encoded %d of %d dialogues to %d tokens and %d turns: %d dropped, %d cut to fit, %d with their context clipped.",
        len(rows), len(records), tokens, turns, len(records) - len(rows),
        sum(row.shortened for row in rows.values()), sum(row.clipped for row in rows.values()),
    )  # fmt: skip
    if not rows:
        raise DataError(f"none of {len(records)} dialogues fits into {tokens} tokens: raise config.tokens and config.turns")

    token_BT = np.full((len(rows), tokens), PAD, np.int32)
    reward_BU = np.zeros((len(rows), turns), np.float32)
    for b, row in enumerate(rows.values()):
        token_BT[b, : len(row.tokens)] = row.tokens
        reward_BU[b, : len(row.rewards)] = row.rewards
    author_BT, turn_BT = jax.tree.map(np.asarray, protocol_lib.parse(protocol, token_BT))
    ended_B = np.array([row.ended for row in rows.values()])
    return Dialogue(
        token_BT=token_BT,
        author_BT=author_BT,
        turn_BT=turn_BT,
        sampled_BT=np.zeros(token_BT.shape, bool),
        logp_BT=np.zeros(token_BT.shape, np.float32),
        reward_BU=reward_BU,
        ended_B=ended_B,
        cut_B=~ended_B,
        uid_B=np.array(list(rows), np.uint32),
    ).check()


def decode(dialogues: Dialogue, tokenizer: Tokenizer) -> list[Record]:
    """The inverse of `encode`, as far as tokens tell: contexts, turns, their rewards, and how the dialogues end.

    A turn that the end of the row cut short was never said: it is left out.
    """
    endings = {STOP: "end", LEAVE: "leave"}
    records = []
    for b, token_T in enumerate(np.asarray(dialogues.token_BT)):
        author_T, turn_T = np.asarray(dialogues.author_BT[b]), np.asarray(dialogues.turn_BT[b])
        last = int(np.sum(author_T != protocol_lib.END)) - 1
        turns, u = [], 0
        for turn in range(1, int(turn_T[last]) + 1):
            at = np.flatnonzero((turn_T == turn) & (author_T != protocol_lib.END))
            if not len(at) or author_T[at[0]] not in NAME or token_T[at[-1]] not in CLOSING:
                continue
            role = NAME[author_T[at[0]]]
            reward = float(dialogues.reward_BU[b, u]) if role == "assistant" and u < dialogues.reward_BU.shape[1] else 0.0
            u += role == "assistant"
            turns.append(Turn(role, tokenizer.decode(token_T[at]), reward))
        context = tokenizer.decode(token_T[author_T == protocol_lib.CONTEXT])
        records.append(Record(tuple(turns), context, ended=endings.get(int(token_T[last]), "cut")))
    return records


def _row(record: Record, tokenizer: Tokenizer, protocol: Protocol, tokens: int, turns: int) -> _Row | None:
    """One dialogue as tokens; None if not even its first turns fit."""
    said = _merge(record.turns)
    context = [BOS, *(NUMBER + n for n in record.numbers), *tokenizer.encode(record.context)]
    row = context[: tokens // 2] + [OPENING[said[0].role]]
    clipped = len(context) > tokens // 2
    words = [tokenizer.encode(turn.text) for turn in said]
    ending, ended = _ending(record, said[-1].role, protocol)

    whole = len(row) + sum(map(len, words)) + len(said) - 1 + len(ending)
    is_action = [turn.role == "assistant" for turn in said]
    kept = len(said)
    if whole > tokens or sum(is_action) > turns:
        length, kept = len(row), 0
        for k in range(1, len(said)):
            length += len(words[k - 1]) + 1
            if length <= tokens and sum(is_action[:k]) <= turns:
                kept = k
        if kept < FEWEST_TURNS:
            return None
        ending, ended = [HAND_OVER[said[kept - 1].role]], False

    for turn, word in zip(said[: kept - 1], words, strict=False):
        row += [*word, HAND_OVER[turn.role]]
    row += words[kept - 1] + ending
    shortened = kept < len(said)
    rewards = _rewards(said[:kept], 0.0 if shortened else record.reward)
    return _Row(row, rewards, ended, shortened, clipped)


def _merge(turns: Sequence[Turn]) -> list[Turn]:
    """Consecutive turns of one role become one."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            last = merged.pop()
            turn = Turn(turn.role, " ".join(filter(None, (last.text, turn.text))), last.reward + turn.reward)
        merged.append(turn)
    return merged


def _ending(record: Record, role: str, protocol: Protocol) -> tuple[list[int], bool]:
    """The tokens that close a dialogue after the words of its last turn, and whether it then has truly ended."""
    if record.outcome is not None:
        if protocol.switch_RV[ROLE[role], TO_OUTCOME] != OUTCOME:
            raise DataError("a dialogue has an outcome, but the protocol has none: use the kind 'negotiation'")
        shares = [NUMBER + n for n in record.outcome] or [NO_DEAL]
        return [TO_OUTCOME, *shares, STOP], True
    stop = ENDING[record.ended]
    if stop is not None and protocol.allowed_RV[ROLE[role], stop]:
        return [stop], True
    # A recording often stops after the assistant's goodbye. Only the user may end a chat, and it was not recorded that it
    # did: the floor goes to the user and the dialogue counts as truncated, so that no policy learns to hang up.
    return [HAND_OVER[role]], False


def _rewards(turns: Sequence[Turn], reward: float) -> list[float]:
    """Rewards per assistant turn: its own, that of the user's reply, and the dialogue's reward on the last one."""
    rewards: list[float] = []
    for turn in turns:
        if turn.role == "assistant":
            rewards.append(turn.reward)
        elif rewards:
            rewards[-1] += turn.reward
    if rewards:
        rewards[-1] += reward
    return rewards
