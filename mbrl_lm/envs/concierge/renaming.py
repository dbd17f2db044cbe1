"""What the world does not tell apart: a dialogue under other names of its places, codes and values is as likely.

Names, codes, kinds and areas may be exchanged among themselves, cheap with dear and quiet with lively (their synonyms go
with them), and the places of a catalogue may stand in any order.
"""

import dataclasses
import zlib

import numpy as np

from mbrl_lm.data.records import Record
from mbrl_lm.envs.concierge.recogniser import recognise
from mbrl_lm.envs.concierge.words import CODES, NAMES, VALUES
from mbrl_lm.envs.concierge.world import read_catalogue

RENAMINGS = 16  # of a dialogue, its own names among them: far fewer than there are
_FREE = (NAMES, CODES, VALUES["kind"], VALUES["area"])
_MIRRORED = ((("cheap", "dear"), ("affordable", "fancy")), (("quiet", "lively"), ("calm", "busy")))


def renamings(record: Record) -> list[Record]:
    """The dialogue as it was, and under other names drawn at random: a function of the record alone."""
    rng = np.random.default_rng(zlib.crc32(repr((record.context, record.spoken)).encode()))
    return [record, *(_renamed(record, rng) for _ in range(RENAMINGS - 1))]


def _renamed(record: Record, rng: np.random.Generator) -> Record:
    new = {}
    for names in _FREE:
        new |= {name: names[i] for name, i in zip(names, rng.permutation(len(names)), strict=True)}
    for pairs in _MIRRORED:
        if rng.random() < 0.5:
            new |= {a: b for pair in pairs for a, b in (pair, pair[::-1])}

    def rename(text: str) -> str:
        return " ".join(new.get(word, word) for word in text.split())

    catalogue = read_catalogue(rename(record.context))
    places = tuple(catalogue.places[i] for i in rng.permutation(len(catalogue.places)))
    # A question names values in one order only: "cheap , fair or dear ?".
    turns = tuple(
        turn
        if turn.role == "assistant" and recognise(turn.text).act == "ask"
        else dataclasses.replace(turn, text=rename(turn.text))
        for turn in record.turns
    )
    return dataclasses.replace(record, context=catalogue._replace(places=places).text(), turns=turns)
