"""What is read off the text of dialogues, by hand."""

import numpy as np
import pytest

from mbrl_lm.envs.concierge import TEST_UIDS, Concierge, Mixture, Strong, converse, habits

CONTEXT = (
    "iris grill east dear quiet ; gusto bar north dear cosy ; coral diner south fair lively ; code quartz ; "
    "keep the code private ; no drinks"
)


def said(*texts, ended="end"):
    return CONTEXT, [("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)], ended


def test_offers_by_the_places_that_are_left():
    found = habits(
        [
            said("hello , i need a place", "what about iris , a grill ?", "no , a bar", "i suggest iris , a grill", ""),
            said("hello", "which price would you like ?", "something dear", "i suggest gusto , a bar", "yes , book it"),
            said("hello", "which price would you like ?", "something cheap", "i suggest gusto , a bar", "ok"),
            said("hello", "what about iris , a grill ?", "no , not that one", "i suggest gusto , a bar", "", ended="leave"),
        ]
    )
    assert found == pytest.approx(
        {
            "asks": 2 / 4, "offers": 6 / 4, "contradictory": 1 / 8,
            "offers/left_0": 1 / 6, "fits/left_0": 0,  # nothing is cheap
            "offers/left_1": 1 / 6, "fits/left_1": 0,  # the grill again, for a bar
            "offers/left_2": 2 / 6, "fits/left_2": 1, "offers/left_3": 2 / 6, "fits/left_3": 1,
            "accepted/fits": 1 / 4, "accepted/misfits": 2 / 2,
        }
    )  # fmt: skip


def test_an_offer_that_nobody_answered_is_neither_taken_nor_refused():
    said_so_far = "hello , something dear", "i suggest gusto , a bar", "no", "what about coral , a diner ?", ""
    found = habits([said(*said_so_far, ended="cut")])
    assert found["offers"] == 2 and found["accepted/fits"] == 0 and "accepted/misfits" not in found


def test_dialogues_without_a_question_or_an_offer():
    assert habits([said("hello", "good to see you", "ok , bye")]) == {"asks": 0, "offers": 0}


def test_the_strong_assistant_offers_what_alone_is_left_and_its_users_are_consistent():
    def of(assistant):
        records = converse(assistant, Concierge(0, TEST_UIDS[:200], "train", places=(4, 5)))
        return habits([(r["context"], [(turn["role"], turn["text"]) for turn in r["turns"]], r["ended"]) for r in records])

    strong, logs = of(Strong()), of(Mixture())
    assert strong["accepted/fits"] > 0.85 and logs["accepted/misfits"] < 0.15
    assert strong["offers/left_1"] > 0.95 and strong["fits/left_1"] == 1 and strong["contradictory"] == 0
    assert logs["offers/left_1"] < 0.6 and logs["fits/left_1"] < 0.7 and logs["contradictory"] < 0.02
    assert np.sum([x for name, x in logs.items() if name.startswith("offers/left")]) == pytest.approx(1)
