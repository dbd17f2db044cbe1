"""What a sentence of a negotiation offers, read by rules: who gets how many of each kind of item.

For scripted partners, who must understand what they are told without a model of language.
"""

import dataclasses
import re
from collections.abc import Sequence

from mbrl_lm.protocol import ITEMS

SPEAKER, HEARER = 0, 1
Share = tuple[int, ...]  # of each kind of item, so many for one side

_NOUNS = ({"book", "hat", "ball", "basketball"}, {"books", "hats", "balls", "basketballs"})
_ITEM = {"book": 0, "books": 0, "hat": 1, "hats": 1, "ball": 2, "balls": 2, "basketball": 2, "basketballs": 2}
_NUMBER = {"a": 1, "an": 1, "one": 1, "single": 1, "two": 2, "both": 2, "couple": 2, "three": 3, "four": 4, "five": 5}
_NUMBER |= {str(n): n for n in range(1, 10)}
_EVERY = 99  # as many as there are
_ALL = {"all", "every", "everything"}
_WHO = dict.fromkeys(("i", "im", "me", "my", "mine", "myself"), SPEAKER)
_WHO |= dict.fromkeys(("you", "u", "your", "yours", "ya", "yourself"), HEARER)
_REST = {"rest", "remaining", "else", "remainder", "leftover", "leftovers", "others", "other"}
_NOT = {"not", "no", "cannot", "cant", "dont", "without", "wont", "never", "nope"}
_YES = {"deal", "ok", "okay", "sure", "agreed", "agree", "fine", "works", "yes", "yeah", "yep", "yup", "alright", "perfect",
        "great", "good", "done", "fair", "cool", "awesome", "k", "right", "thanks", "accept", "do", "correct"}  # fmt: skip
_SENTENCE = {".", "?", "!", ";", "but", "then", "so"}  # what was named before has its owner
_PAUSE = _SENTENCE | {",", "if", "and", "-", "/", "for", "or", "because", "since"}


def _words(text: str) -> list[str]:
    text = text.lower().replace("`", "'").replace("’", "'")
    text = re.sub(r"(i|you|u|it|that|they|we)'(d|ll|m|re|ve|s)\b", r"\1", text)
    text = re.sub(r"n't\b", " not", text)
    return re.findall(r"[a-z]+|\d+|[.,;?!/-]", text)


def accepts(text: str) -> bool:
    """Whether a sentence that offers nothing agrees with what was offered before."""
    words = set(_words(text))
    return bool(_YES & words) and not _NOT & words


def mirrored(share: Share, count: Sequence[int]) -> Share:
    """What is left for the other side."""
    return tuple(n - x for n, x in zip(count, share, strict=True))


@dataclasses.dataclass
class _Reading:
    """Of one sentence, as far as it was read."""

    count: Sequence[int]
    given: tuple[dict[int, int], dict[int, int]]  # of speaker and hearer, by item
    owner: int = SPEAKER  # who gets what is named next
    named: list[int] = dataclasses.field(default_factory=list)  # items since the owner was
    negated: bool = False
    rest: int | None = None  # who gets what nobody was given
    rest_named: bool = False  # since the owner was

    def put(self, item: int, number: int) -> None:
        if self.negated:
            return
        number = min(number, self.count[item])
        other = self.given[1 - self.owner]
        if other.get(item, 0) + number > self.count[item]:
            other.pop(item)
        self.given[self.owner][item] = number
        self.named.append(item)

    def put_rest(self) -> None:
        if not self.negated:
            self.rest, self.rest_named = self.owner, True

    def turn_to(self, who: int, afterwards: bool) -> None:
        """Names an owner of what follows or, `afterwards`, of what was just named: "2 balls for you", "rest is yours"."""
        if afterwards and (self.named or self.rest_named):
            for item in self.named:
                if item in self.given[self.owner]:
                    self.given[who][item] = self.given[self.owner].pop(item)
            self.rest = who if self.rest_named else self.rest
            self.close()
        elif who != self.owner:
            self.close()
        self.owner = who

    def close(self) -> None:
        self.named, self.rest_named = [], False

    def share(self, before: Share | None) -> Share | None:
        """Of the speaker."""
        own, other = self.given
        if not own and not other and self.rest is None:
            return None
        share = []
        for item, count in enumerate(self.count):
            if item in own:
                share.append(own[item])
            elif item in other:
                share.append(count - other[item])
            elif self.rest is not None:
                share.append(count if self.rest == SPEAKER else 0)
            elif own and other:  # both were given something, and nothing was said of this
                share.append(before[item] if before else 0)
            else:
                share.append(0 if own else count)
        return tuple(share)


def read(text: str, count: Sequence[int], before: Share | None = None) -> Share | None:
    """The share of the speaker in what a turn offers, or None.

    Args:
      text: of the turn.
      count: of each kind of item on the table.
      before: the share of the speaker in the offer that stands, for kinds that are not spoken of.
    """
    reading, number = _Reading(count, ({}, {})), 0
    words = _words(text)
    for at, word in enumerate(words):
        before_it, after_it = (words[i] if 0 <= i < len(words) else "" for i in (at - 1, at + 1))
        if word in _WHO:
            reading.turn_to(_WHO[word], before_it in ("for", "to") or word in ("yours", "mine"))
            number = 0
        elif word in _NOT:
            reading.negated = True
        elif word in _PAUSE:
            if word in _SENTENCE:
                reading.close()
            if word in _SENTENCE or word == ",":
                reading.negated = False
            number = 0
        elif word in _ITEM:
            item = _ITEM[word]
            reading.put(item, number or (_EVERY if word in _NOUNS[1] else 1))
            number = 0
        elif word == "each" and 0 < number < _EVERY:
            for item in range(ITEMS):
                reading.put(item, number)
            number = 0
        elif word in _REST and after_it not in _ITEM:
            reading.put_rest()
            number = 0
        elif word in _ALL:
            number = _EVERY
            if word == "everything" and after_it not in ("else", "but", "except"):
                for item in range(ITEMS):
                    reading.put(item, number)
                number = 0
            elif word == "everything" and after_it in ("but", "except"):
                reading.put_rest()
                reading.owner = 1 - reading.owner  # of the exception
        elif word in _NUMBER and not (word in ("a", "an", "one") and number):
            number = _NUMBER[word]
    return reading.share(before)
