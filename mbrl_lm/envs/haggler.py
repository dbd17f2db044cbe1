"""Scripted partners of a negotiation: real values, plain words, and no model of language that a policy could have learnt.

What such a partner says next is a function of what was said so far: which offer stands, who made it, whether the other side
has agreed, and how much it still demands.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mbrl_lm import protocol as pr
from mbrl_lm.data.builders.deal_or_no_deal import NAMES
from mbrl_lm.envs import offers
from mbrl_lm.envs.offers import Share, mirrored
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.types import Dialogue

OFFERS = (
    "i would like {} , you can have the rest",
    "i need {} . you get the rest",
    "how about i take {} and you get the rest ?",
    "i want {} and you can have the rest",
)
VAGUE = ("hi , what would you like ?", "what do you need ?", "i can work with you . what do you want ?")
ACCEPTANCE = ("deal", "ok deal", "that works for me")
REFUSAL = "no deal"


@dataclasses.dataclass(frozen=True)
class Style:
    """How a partner bargains, in points of its own."""

    first: int  # what it demands at its first turn
    step: int  # less at each further one
    least: int  # what it never goes below
    patience: int  # turns after which it walks away
    vague: int = 0  # turns in which it offers nothing of its own


STYLES = {
    "hard": Style(first=9, step=1, least=6, patience=8),
    "agreeable": Style(first=5, step=2, least=1, patience=10, vague=3),
}


class Said(NamedTuple):
    """One turn, as the partner hears it."""

    own: bool
    text: str


class Standing(NamedTuple):
    """Where a negotiation is."""

    share: Share | None  # what the partner itself gets in the offer that stands
    own: bool  # whether it was the partner that made it
    agreed: bool  # by the other side


def standing(said: Sequence[Said], count: Sequence[int]) -> Standing:
    """The offer that stands after some turns."""
    now = Standing(None, False, False)
    for turn in said:
        before = now.share if now.share is None or turn.own else mirrored(now.share, count)
        share = offers.read(turn.text, count, before)
        if share is not None:
            share = share if turn.own else mirrored(share, count)
            now = Standing(share, turn.own, now.agreed and share == now.share)  # who says it again is still agreed
        elif now.share is not None and turn.own != now.own and offers.accepts(turn.text):
            now = now._replace(agreed=True)
    return now


def demand(style: Style, turns: int) -> int:
    """The points that a partner asks for after so many turns of its own."""
    return max(style.least, style.first - style.step * turns)


def worth(share: Share, value: Sequence[int]) -> int:
    """The points of a share."""
    return sum(x * v for x, v in zip(share, value, strict=True))


def proposal(count: Sequence[int], value: Sequence[int], points: int) -> Share:
    """Of the shares worth at least so many points the one that leaves the other side most items, and of these the best."""
    shares = [tuple(int(x) for x in share) for share in np.ndindex(*(n + 1 for n in count))]
    points = min(points, worth(count, value))
    return max((s for s in shares if worth(s, value) >= points), key=lambda s: (-sum(s), worth(s, value)))


def in_words(share: Share, count: Sequence[int]) -> str:
    """`2 hats and the ball`."""

    def named(number: int, most: int, one: str, many: str) -> str:
        if most == 1:
            return f"the {one}"
        return f"all the {many}" if number == most else f"{number} {many if number > 1 else one}"

    return " and ".join(named(*kind) for kind in zip(share, count, *NAMES, strict=True) if kind[0])


def reply(style: Style, count: Sequence[int], value: Sequence[int], said: Sequence[Said], luck: int) -> str | None:
    """What a partner says next; None: it calls for the outcome.

    Args:
      style: of the partner.
      count, value: of the kinds of item, as it sees them.
      said: the turns so far.
      luck: any number; it chooses the wording.
    """
    now, turns = standing(said, count), sum(turn.own for turn in said)
    if now.agreed or (turns and _last_own(said) == REFUSAL):
        return None
    wanted = demand(style, turns)
    if now.share is not None and not now.own and worth(now.share, value) >= wanted:
        return ACCEPTANCE[luck % len(ACCEPTANCE)]
    if turns >= style.patience:
        return REFUSAL
    if turns < style.vague:
        return VAGUE[(luck + turns) % len(VAGUE)]
    share = proposal(count, value, wanted)
    return OFFERS[(luck + turns) % len(OFFERS)].format(in_words(share, count))


def _last_own(said: Sequence[Said]) -> str:
    return [turn.text for turn in said if turn.own][-1]


def settled(style: Style, count: Sequence[int], value: Sequence[int], said: Sequence[Said], own_call: bool) -> Share | None:
    """The share that a partner writes when the outcome has been called for, by itself or by the other side; None: no deal.

    An offer that stands is taken to be agreed to by whoever calls for the outcome, if it is the other one's; an offer of the
    other side that was not answered is a deal if the partner would have taken it.
    """
    now, turns = standing(said, count), sum(turn.own for turn in said)
    if now.share is None or now.agreed:
        return now.share
    if own_call:
        return None
    return now.share if now.own or worth(now.share, value) >= demand(style, turns) else None


class Listener:
    """Reads by rules what was agreed on: the last offer that was made. Its views of the dialogues are numpy.

    Args:
      tokenizer, protocol: of the dialogues.
    """

    def __init__(self, tokenizer: Tokenizer, protocol: pr.Protocol):
        self._tokenizer, self._protocol = tokenizer, protocol

    def settle(self, dialogue: Dialogue) -> Dialogue:
        """The dialogues with the own outcome where one was called for."""
        token_BT, ended_B = dialogue.token_BT.copy(), dialogue.ended_B.copy()
        for b, token_T in enumerate(token_BT):
            called = np.flatnonzero((token_T == pr.TO_OUTCOME) & (dialogue.author_BT[b] != pr.END))
            if not len(called) or called[0] + 1 + pr.OUTCOME_TOKENS > len(token_T):
                continue
            own_call = dialogue.author_BT[b, called[0]] == pr.ASSISTANT
            share = self.share(*self._numbers(dialogue, b), self._said(dialogue, b), bool(own_call))
            tokens = [pr.NO_DEAL, pr.STOP] if share is None else [*(pr.NUMBER + n for n in share), pr.STOP]
            token_T[called[0] + 1 :] = pr.PAD
            token_T[called[0] + 1 : called[0] + 1 + len(tokens)] = tokens
            ended_B[b] = True
        dialogue = dialogue.replace(token_BT=token_BT, ended_B=ended_B, cut_B=~ended_B)
        return pr.attributed_on_host(self._protocol, dialogue)

    def share(self, count: Sequence[int], value: Sequence[int], said: Sequence[Said], own_call: bool) -> Share | None:
        """What it takes to be its own share; None: no deal."""
        return standing(said, count).share

    def _numbers(self, dialogue: Dialogue, b: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Counts and own values."""
        numbers = (dialogue.token_BT[b, 1 : 1 + 2 * pr.ITEMS] - pr.NUMBER).tolist()
        return tuple(numbers[::2]), tuple(numbers[1::2])

    def _said(self, dialogue: Dialogue, b: int) -> list[Said]:
        token_T, author_T, turn_T = dialogue.token_BT[b], dialogue.author_BT[b], dialogue.turn_BT[b]
        said_T = np.isin(author_T, (pr.ASSISTANT, pr.USER))
        turns = (np.flatnonzero(said_T & (turn_T == turn)) for turn in np.unique(turn_T[said_T]))
        return [Said(bool(author_T[at[0]] == pr.ASSISTANT), self._tokenizer.decode(token_T[at])) for at in turns]


class Haggler(Listener):
    """A scripted partner at the table.

    Args:
      style: a name in STYLES.
      tokenizer, protocol: of the dialogues.
    """

    def __init__(self, style: str, tokenizer: Tokenizer, protocol: pr.Protocol):
        super().__init__(tokenizer, protocol)
        self._style = STYLES[style]

    def answer(self, dialogue: Dialogue, floor_B: np.ndarray) -> Dialogue:
        """The dialogues with one more turn of the partner's where it has the floor, as far as there is room."""
        token_BT, length_B = dialogue.token_BT.copy(), np.sum(dialogue.author_BT != pr.END, axis=1)
        sampled_BT = dialogue.sampled_BT.copy()
        for b in np.flatnonzero(floor_B):
            text = reply(self._style, *self._numbers(dialogue, b), self._said(dialogue, b), int(dialogue.uid_B[b]))
            tokens = [pr.TO_OUTCOME] if text is None else [*self._tokenizer.encode(text), pr.TO_USER]
            at = slice(length_B[b], length_B[b] + len(tokens))
            token_BT[b, at] = tokens[: token_BT.shape[1] - length_B[b]]
            sampled_BT[b, at] = True
        return pr.attributed_on_host(self._protocol, dialogue.replace(token_BT=token_BT, sampled_BT=sampled_BT))

    def share(self, count: Sequence[int], value: Sequence[int], said: Sequence[Said], own_call: bool) -> Share | None:
        return settled(self._style, count, value, said, own_call)
