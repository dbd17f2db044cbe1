"""Renamings of the concierge's dialogues: the exact filter cannot tell them from the dialogue itself."""

import functools

import numpy as np
import pytest

from mbrl_lm.data import DATASETS
from mbrl_lm.data.records import Record, Turn
from mbrl_lm.envs.concierge import Concierge, Mixture, Random, bayes, converse, logs
from mbrl_lm.envs.concierge.env import wrong_claims
from mbrl_lm.envs.concierge.recogniser import recognise
from mbrl_lm.envs.concierge.renaming import RENAMINGS, renamings
from mbrl_lm.envs.concierge.words import CODES, NAMES, VALUES, vocabulary
from mbrl_lm.envs.concierge.world import read_catalogue

SOME = (1, 4, 9)  # of the renamings of a dialogue


def record_of(raw):
    turns = tuple(Turn(turn["role"], turn["text"], turn.get("reward", 0.0)) for turn in raw["turns"])
    return Record(turns, raw["context"], ended=raw["ended"], scenario=raw["scenario"])


@functools.cache
def records():
    """Logged dialogues, some over small catalogues, and some of an assistant that says anything, true or false."""
    raw = [*logs(0, 10), *logs(1, 10, places=(2, 3)), *converse(Random(), Concierge(0, range(15), places=(3, 5)))]
    return [record_of(x) for x in raw]


def read(record):
    return bayes.read(record.context, record.spoken, record.ended)


def test_a_renamed_dialogue_is_as_likely_and_earns_the_same():
    changed = 0
    for record in records():
        own, others = read(record), renamings(record)
        assert len(others) == RENAMINGS and others[0] is record
        for other in (others[i] for i in SOME):
            found = read(other)
            np.testing.assert_allclose(found.log_prob_U, own.log_prob_U, rtol=0, atol=1e-9)
            assert found.reward == pytest.approx(own.reward, abs=1e-9)
            changed += other.spoken != record.spoken and other.context != record.context
    assert changed > 0.8 * len(SOME) * len(records())


def test_claims_stay_true_or_false_and_acts_what_they_were():
    false = true = 0
    for record in records():
        for other in renamings(record)[1:]:
            catalogues = [read_catalogue(x.context) for x in (record, other)]
            for a, b in zip(record.turns, other.turns, strict=True):
                assert (a.role, a.reward) == (b.role, b.reward)
                if a.role == "assistant":
                    heard = [recognise(x.text) for x in (a, b)]
                    lies = [wrong_claims(h, c) for h, c in zip(heard, catalogues, strict=True)]
                    assert heard[0].act == heard[1].act and lies[0] == lies[1], (a.text, b.text)
                    false, true = false + (lies[0] > 0), true + (lies[0] == 0 and bool(heard[0].claims))
    assert false > 30 and true > 30


def test_a_questions_wording_stays():
    asked = 0
    for record in records():
        for other in renamings(record)[1:4]:
            for a, b in zip(record.turns, other.turns, strict=True):
                if a.role == "assistant" and recognise(a.text).act == "ask":
                    asked += any(word in a.text.split() for word in VALUES["price"] + VALUES["mood"])
                    assert a.text == b.text
    assert asked > 3, "some questions name what may be answered"


def test_what_is_exchanged():
    """Each kind of name among its like; a catalogue in any order; all of it words that the world knows."""
    known, seen = set(vocabulary()), {name: set() for name in ("names", "codes", "kinds", "areas", "cheap", "order")}
    for record in records():
        before = read_catalogue(record.context)
        for other in renamings(record):
            assert {w for text in (other.context, *(t.text for t in other.turns)) for w in text.split()} <= known
            after = read_catalogue(other.context)
            assert len(after.places) == len(before.places) and after.forbidden == before.forbidden
            assert len({p.name for p in after.places}) == len(before.places)
            seen["names"] |= {p.name for p in after.places}
            seen["codes"].add(after.code)
            seen["kinds"] |= {p.kind for p in after.places}
            seen["areas"] |= {p.area for p in after.places}
            prices = [sorted(p.price for p in c.places) for c in (before, after)]
            mirrored = sorted({"cheap": "dear", "dear": "cheap"}.get(x, x) for x in prices[0])
            assert prices[1] in (prices[0], mirrored)
            seen["cheap"].add(prices[1] == prices[0])
            where = [[(p.price == "fair", p.mood == "cosy") for p in c.places] for c in (before, after)]  # these stay
            assert sorted(where[0]) == sorted(where[1])
            seen["order"].add(where[0] == where[1])
    assert seen["names"] == set(NAMES) and seen["codes"] == set(CODES)
    assert (seen["kinds"], seen["areas"]) == (set(VALUES["kind"]), set(VALUES["area"]))
    assert seen["cheap"] == seen["order"] == {True, False}


def test_renamings_hang_on_the_dialogue_alone():
    record = records()[0]
    assert renamings(record) == renamings(record_of(next(logs(0, 1)))) and DATASETS["concierge"].renamings is renamings
    assert len({(other.context, tuple(other.spoken)) for other in renamings(record)}) == RENAMINGS
    assert all((x.ended, x.reward, x.scenario) == (record.ended, record.reward, record.scenario) for x in renamings(record))
    fewer = [record_of(raw) for raw in converse(Mixture(), Concierge(0, [10**9]))]
    assert renamings(fewer[0]) == renamings(record)
