"""Dialogues as text: what every builder yields and every encoder reads."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from typing import Literal

from mbrl_lm import protocol

ROLES = ("assistant", "user")
ENDINGS = ("end", "leave", "cut")
_WORD = re.compile(r"\d+(?:[.:,]\d+)*|\w+(?:['’]\w+)*|[^\w\s]")


class DataError(ValueError):
    """Raw data that cannot be used; the message says where, what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one speaker says before giving the floor away.

    Attributes:
      role: who speaks.
      text: raw text; may be empty.
      reward: earned by the turn. A user turn's reward belongs to the assistant turn that it answers.
    """

    role: Literal["assistant", "user"]
    text: str
    reward: float = 0.0

    def __post_init__(self):
        if self.role not in ROLES:
            raise DataError(f"role {self.role!r} is unknown: use one of {', '.join(ROLES)}")
        if not math.isfinite(self.reward):
            raise DataError(f"reward {self.reward} of a turn is not finite")


@dataclasses.dataclass(frozen=True)
class Record:
    """One dialogue.

    Attributes:
      turns: at least one.
      context: text that the assistant knows beforehand.
      numbers: structured context, each 0..10.
      partner_numbers: the same of the other party of a negotiation; never shown to the assistant.
      outcome: of a negotiation: () for no deal, else the own share of three kinds of item; None if there is no outcome.
      ended: "end" (completed), "leave" (the user walked away) or "cut" (the recording stops before the end).
      reward: of the whole dialogue, in the data set's own units; it is added to the last assistant turn.
      scenario: records of one scenario never fall on both sides of a split; "" = a scenario of its own.
    """

    turns: tuple[Turn, ...]
    context: str = ""
    numbers: tuple[int, ...] = ()
    partner_numbers: tuple[int, ...] = ()
    outcome: tuple[int, ...] | None = None
    ended: Literal["end", "leave", "cut"] = "end"
    reward: float = 0.0
    scenario: str = ""

    @property
    def spoken(self) -> list[tuple[str, str]]:
        """(role, text) of its turns."""
        return [(turn.role, turn.text) for turn in self.turns]

    def __post_init__(self):
        if not self.turns:
            raise DataError("a dialogue needs at least one turn")
        if self.ended not in ENDINGS:
            raise DataError(f"ended {self.ended!r} is unknown: use one of {', '.join(ENDINGS)}")
        for name, values in (("numbers", self.numbers), ("partner_numbers", self.partner_numbers)):
            _check_numbers(name, values)
        if self.outcome is not None:
            _check_numbers("outcome", self.outcome)
            if len(self.outcome) not in (0, 3) or self.ended != "end":
                raise DataError(f"outcome {self.outcome} must be () or three shares, of a dialogue that ended by 'end'")
        if not math.isfinite(self.reward):
            raise DataError(f"reward {self.reward} of a dialogue is not finite")
        before = [turn.reward for turn in self.turns]
        for i, turn in enumerate(self.turns):
            if turn.role == "assistant":
                before = before[:i]
                break
        else:
            before.append(self.reward)
        if any(before):
            raise DataError("there is a reward, but no assistant turn before it that could have earned it")


def normalise(text: str) -> str:
    """Lower case, with punctuation split off the words: for word models of text that is not tokenised already."""
    return " ".join(_WORD.findall(text.lower()))


def hold_out(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Divides records by a hash of their scenario: (kept, held out), each in the given order.

    A scenario's side does not depend on the other records, except that the one of the smallest hash is held out when
    `share` of a few records would be none.

    Raises:
      DataError: if all records are of one scenario.
    """
    place = [_place(record) for record in records]
    threshold = max(share, min(place))
    kept = [record for record, x in zip(records, place, strict=True) if x > threshold]
    if not kept:
        raise DataError("all dialogues are of one scenario and cannot be divided: give a validation file of other scenarios")
    return kept, [record for record, x in zip(records, place, strict=True) if x <= threshold]


def _place(record: Record) -> float:
    """Uniform in [0, 1), the same for all records of a scenario, or for all equal records where there is none."""
    name = record.scenario or repr((record.context, record.numbers, [(turn.role, turn.text) for turn in record.turns]))
    digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:6]) / 2.0**48


def _check_numbers(name: str, values: tuple[int, ...]) -> None:
    wrong = [n for n in values if not 0 <= n <= protocol.LARGEST_NUMBER]
    if wrong:
        raise DataError(f"{name} {values} holds {wrong[0]}: only 0..{protocol.LARGEST_NUMBER} have a token")
