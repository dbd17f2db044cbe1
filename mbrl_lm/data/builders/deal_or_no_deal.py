"""Deal or No Deal (Lewis et al. 2017): two people divide books, hats and balls, whose values are private.

A line is one dialogue as one of the two saw it: YOU is the assistant, THEM the user. The reward is the own value of the
agreed split, 0..10, and 0 without a deal.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence

from mbrl_lm.data.builders import base
from mbrl_lm.data.records import DataError, Record, Turn
from mbrl_lm.protocol import ITEMS

ROLE = {"YOU": "assistant", "THEM": "user"}
SELECTION = "<selection>"  # what the speaker who calls for the outcome says
NO_DEAL = ("<disagree>", "<no_agreement>", "<disconnect>")
NAMES = (("book", "hat", "ball"), ("books", "hats", "balls"))
OTHER_NAMES = (("book", "hat", "basketball"), ("books", "hats", "basketballs"))
ALSO = {x: name for names in zip(OTHER_NAMES, NAMES, strict=True) for x, name in zip(*names, strict=True) if x != name}
ADVICE = (
    "A line reads '<input> c0 v0 c1 v1 c2 v2 </input> <dialogue> YOU: words <eos> THEM: words <eos> ... YOU: <selection> "
    "</dialogue> <output> six outcomes </output> <partner_input> c0 w0 c1 w1 c2 w2 </partner_input>': fetch the file again."
)
_LINE = re.compile(
    r"<input> (.*?) </input> <dialogue> (.*) </dialogue> <output> (.*?) </output> <partner_input> (.*?) </partner_input>"
)
_TURN = re.compile(r"(YOU|THEM):(?: (.*))?")
_SHARE = re.compile(r"item([0-2])=(\d+)")

Context = tuple[int, ...]  # count and own value of each kind of item: c0 v0 c1 v1 c2 v2


class DealOrNoDeal(base.DialogueBuilder, skip_registration=True):
    """train.txt and val.txt, and test.txt if it is there."""

    @classmethod
    def raw_files(cls, raw_dir):
        return base.present(raw_dir, ("train.txt", "val.txt"), ("test.txt",))

    @classmethod
    def read(cls, raw_dir):
        splits = {}
        for path in cls.raw_files(raw_dir):
            splits[path.stem] = records = []
            for number, line in base.read_lines(path):
                with base.place(path, f"line {number}", ADVICE):
                    records.append(_record(line))
        return splits


def scenario_key(a: Context, b: Context) -> str:
    """Names a pair of contexts, whichever side it is seen from."""
    return " / ".join(" ".join(map(str, context)) for context in sorted((tuple(a), tuple(b))))


def renamings(record: Record) -> list[Record]:
    """The dialogue under every naming of the three kinds of item, its own first: the rules do not tell them apart."""
    return [_renamed(record, order) for order in itertools.permutations(range(ITEMS))]


def _renamed(record: Record, order: Sequence[int]) -> Record:
    """What was said of kind `order[j]` is said of kind j."""
    word = {names[old]: names[new] for names in NAMES for new, old in enumerate(order) if new != old}
    said = (" ".join(word.get(ALSO.get(w, w), w) for w in turn.text.split()) for turn in record.turns)
    turns = tuple(dataclasses.replace(turn, text=text) for turn, text in zip(record.turns, said, strict=True))
    numbers, partner_numbers = (
        tuple(pair for old in order for pair in context[2 * old : 2 * old + 2])
        for context in (record.numbers, record.partner_numbers)
    )
    return dataclasses.replace(
        record,
        turns=turns,
        numbers=numbers,
        partner_numbers=partner_numbers,
        outcome=tuple(record.outcome[old] for old in order) if record.outcome else record.outcome,
        scenario=scenario_key(numbers, partner_numbers),
    )


def selfplay_contexts(data_dir: str | pathlib.Path) -> list[tuple[Context, Context]]:
    """The pairs of contexts in selfplay.txt, lines 2k and 2k + 1, to negotiate over.

    Raises:
      DataError: if the file is missing or malformed.
    """
    (path,) = base.present(pathlib.Path(data_dir), ("selfplay.txt",))
    contexts = []
    advice = "Two lines in a row are 'c0 v0 c1 v1 c2 v2' of the two sides, with equal counts: fetch the file again."
    for number, line in base.read_lines(path):
        with base.place(path, f"line {number}", advice):
            contexts.append(_context(line))
            if len(contexts) % 2 == 0:
                _check_counts(*contexts[-2:])
    if len(contexts) % 2:
        raise DataError(f"{path}, line {number}: the other side's context is missing. {advice}")
    return list(zip(contexts[::2], contexts[1::2], strict=True))


def _record(line: str) -> Record:
    match = _LINE.fullmatch(line)
    if match is None:
        raise DataError("the four parts of a line were not found")
    own, dialogue, output, partner = match.groups()
    numbers, partner_numbers = _context(own), _context(partner)
    _check_counts(numbers, partner_numbers)
    outcome = _outcome(output, numbers)
    return Record(
        turns=_turns(dialogue),
        numbers=numbers,
        partner_numbers=partner_numbers,
        outcome=outcome,
        reward=float(sum(share * value for share, value in zip(outcome, numbers[1::2], strict=False))),  # no deal: ()
        scenario=scenario_key(numbers, partner_numbers),
    )


def _context(text: str) -> Context:
    numbers = tuple(map(int, text.split()))
    if len(numbers) != 2 * ITEMS:
        raise DataError(f"the context {text!r} does not hold six numbers")
    return numbers


def _check_counts(own: Context, partner: Context) -> None:
    if own[::2] != partner[::2]:
        raise DataError(f"the two sides count the items differently: {own[::2]} and {partner[::2]}")


def _turns(dialogue: str) -> tuple[Turn, ...]:
    turns = []
    for text in dialogue.split(" <eos> "):
        match = _TURN.fullmatch(text.strip())
        if match is None:
            raise DataError(f"the turn {text!r} does not begin with 'YOU:' or 'THEM:'")
        turns.append(Turn(ROLE[match[1]], match[2] or ""))
    if turns[-1].text != SELECTION:
        raise DataError(f"the last turn is {turns[-1].text!r}, not {SELECTION!r}")
    return (*turns[:-1], Turn(turns[-1].role, ""))


def _outcome(output: str, numbers: Context) -> tuple[int, ...]:
    words = output.split()
    if len(words) == 2 * ITEMS and words[0] in NO_DEAL and len(set(words)) == 1:
        return ()
    shares = [_SHARE.fullmatch(word) for word in words]
    if not all(shares) or [int(share[1]) for share in shares] != [*range(ITEMS), *range(ITEMS)]:
        raise DataError(f"the output {output!r} is neither two shares of three items nor six times one of {NO_DEAL}")
    share = [int(share[2]) for share in shares]
    if [a + b for a, b in zip(share[:ITEMS], share[ITEMS:], strict=True)] != list(numbers[::2]):
        raise DataError(f"the shares in {output!r} do not add up to the counts {numbers[::2]}")
    return tuple(share[:ITEMS])
