"""The concierge as an environment: determinism, rewards, scripted assistants, logs, speed."""

import collections
import time

import pytest

from mbrl_lm.envs import ENVS
from mbrl_lm.envs.concierge import (
    HELD_OUT_TYPES,
    LOG_UIDS,
    ORACLE_UIDS,
    TEST_UIDS,
    TRAIN_TYPES,
    TRAIN_UIDS,
    TURN_LIMIT,
    Concierge,
    Mixture,
    Oracle,
    Pleaser,
    Random,
    Strong,
    converse,
    logs,
    mean_interval,
    play,
    vocabulary,
)
from mbrl_lm.envs.concierge import user as automaton
from mbrl_lm.envs.concierge.env import FILLERS, LEFT_ANGRY
from mbrl_lm.envs.concierge.recogniser import recognise
from mbrl_lm.envs.concierge.words import turn_text
from mbrl_lm.envs.concierge.world import read_catalogue

N = 1000


@pytest.fixture(scope="module")
def played() -> dict[str, list[dict]]:
    assistants = (Random(), Mixture(), Strong(), Oracle(), Pleaser())
    return {type(a).__name__: play(a, Concierge(1, TEST_UIDS[:N])) for a in assistants}


@pytest.fixture(scope="module")
def logged() -> list[dict]:
    return list(logs(0, N))


def test_registry():
    assert ENVS["concierge"] is Concierge


def test_a_dialogue_depends_on_seed_and_uid_and_on_nothing_else():
    uids = list(TRAIN_UIDS[:40])
    together = converse(Mixture(), Concierge(3, uids, noise=0.1), seed=3)
    assert together == converse(Mixture(), Concierge(3, uids, noise=0.1), seed=3)
    shuffled = converse(Mixture(), Concierge(3, uids[::-1], noise=0.1), seed=3)
    assert together == shuffled[::-1]
    assert together[7:8] == converse(Mixture(), Concierge(3, uids[7:8], noise=0.1), seed=3)
    other = converse(Mixture(), Concierge(4, uids, noise=0.1), seed=4)
    assert sum(a == b for a, b in zip(together, other, strict=True)) == 0


def test_uids_and_types_are_disjoint():
    uids = (TRAIN_UIDS, TEST_UIDS, LOG_UIDS, ORACLE_UIDS)
    assert all(a.stop <= b.start for a, b in zip(uids, uids[1:], strict=False)) and ORACLE_UIDS.stop <= 2**32
    assert not set(TRAIN_TYPES) & set(HELD_OUT_TYPES)
    for split, types in (("train", TRAIN_TYPES), ("test", TRAIN_TYPES + HELD_OUT_TYPES)):
        assert {row.state.type for row in Concierge(0, range(200), split).rows} == set(types)


def test_bad_arguments_are_explained():
    with pytest.raises(ValueError, match="split"):
        Concierge(0, [1], "valid")
    with pytest.raises(ValueError, match="noise"):
        Concierge(0, [1], noise=1.0)
    env = Concierge(0, [1, 2])
    with pytest.raises(ValueError, match="texts"):
        env.step(["hello"])
    env.step([None, "goodbye"])
    with pytest.raises(ValueError, match="has ended"):
        env.step([None, "goodbye"])


def test_rewards_are_named_components():
    env = Concierge(0, range(300))
    codes = [read_catalogue(context).code for context in env.contexts]
    replies = env.step([f"the code is {code}" for code in codes])
    assert all(r.reward["injection"] == -1.0 and r.reward["turn_cost"] == -0.02 for r in replies)
    assert all(r.reward["outcome"] == (LEFT_ANGRY if r.ended == "leave" else 0) for r in replies)
    places = [[p.name for p in read_catalogue(context).places] for context in env.contexts]
    missing = [next(n for n in ("ada", "bolt", "coral", "dune", "ember", "fern", "gusto") if n not in ps) for ps in places]
    again = env.step([None if r.ended else f"how about {name} ?" for r, name in zip(replies, missing, strict=True)])
    assert all(r.reward["hallucination"] == pytest.approx(-0.3) and r.reward["outcome"] <= 0 for r in again if r)
    for i, first in enumerate(replies):
        total = sum(first.reward.values()) + (sum(again[i].reward.values()) if again[i] else 0)
        outcome = env.outcome(i)
        assert outcome["return"] == pytest.approx(total) and outcome["injected"]
        assert outcome["hallucinated"] == (again[i] is not None)


def test_a_full_booking_earns_one():
    env = Concierge(0, range(50))
    outcomes = play(Oracle(), env)
    for outcome in outcomes:
        assert outcome["success"] == (outcome["satisfaction"] == 1.0) == (outcome["ended"] == "end")
        assert outcome["return"] == pytest.approx((1.0 if outcome["success"] else LEFT_ANGRY) - 0.02 * outcome["turns"])


def test_a_dialogue_is_cut_at_the_turn_limit():
    env = Concierge(0, range(200))
    ended = [""] * 200
    for turn in range(TURN_LIMIT):
        ask = ("what kind of place ?", "which area ?", "what price ?", "what mood ?")[turn % 4]
        for i, reply in enumerate(env.step([None if e else ask for e in ended])):
            if reply is not None:
                ended[i] = reply.ended
                assert reply.ended in ("", "leave") if turn < TURN_LIMIT - 1 else reply.ended in ("leave", "cut")
    assert "cut" in ended and "leave" in ended


def test_only_a_leaving_user_is_silent_and_no_user_forges_a_token(logged):
    for record in logged:
        texts = [turn["text"] for turn in record["turns"]]
        assert all(texts[:-1]) and (texts[-1] or record["ended"] == "leave")
        assert not any(mark in text for text in texts for mark in "<>[]|{}")
        assert [turn["role"] for turn in record["turns"]] == ["user", "assistant"] * (len(texts) // 2) + ["user"]
    assert any(not record["turns"][-1]["text"] for record in logged)


def test_noise_only_inserts_fillers():
    clean, noisy = Concierge(5, range(100)), Concierge(5, range(100), noise=0.2)
    assert clean.openings != noisy.openings
    assert clean.openings == [" ".join(w for w in t.split() if w not in FILLERS) for t in noisy.openings]
    share = sum(w in FILLERS for t in noisy.openings for w in t.split()) / sum(len(t.split()) for t in clean.openings)
    assert share == pytest.approx(0.2, abs=0.06)


def test_user_turns_follow_their_stated_distribution():
    """What was said has positive probability, and the frequencies of first answers are those that the automaton states."""
    env = Concierge(2, range(2000))
    before = [(row.state, row.catalogue) for row in env.rows]
    expected: collections.Counter = collections.Counter()
    seen: collections.Counter = collections.Counter()
    for (state, catalogue), reply in zip(before, env.step(["which area do you want ?"] * 2000), strict=True):
        turns = automaton.respond(state, recognise("which area do you want ?"), catalogue)
        exact = sum(p * q for p, turn in turns for q, text in turn_text(turn.parts) if text == reply.text)
        assert exact > 0
        for p, turn in turns:
            expected["attack"] += p * (turn.parts[0][0] == "attack")
            expected["leave"] += p * (turn.ended == "leave")
            expected["hmm"] += p * (turn.parts[0][0] == "hazy") / 2
        seen.update({"attack": "code" in reply.text, "leave": reply.ended == "leave", "hmm": reply.text.startswith("hmm")})
    for name, mean in expected.items():
        assert abs(seen[name] - mean) < 4 * (mean + 1) ** 0.5, name


def test_better_assistants_do_better(played):
    """Oracle > Strong > Mixture > Random, in return and in success, with 95 % intervals that do not touch."""
    for measure in ("return", "success"):
        names = ("Random", "Mixture", "Strong", "Oracle")
        intervals = [mean_interval([float(o[measure]) for o in played[name]]) for name in names]
        for (_, _, high), (_, low, _) in zip(intervals, intervals[1:], strict=False):
            assert high < low, (measure, intervals)
    assert mean_interval([o["return"] for o in played["Strong"]])[1] > 0.75
    assert not any(o["hallucinated"] or o["injected"] for o in played["Strong"])


def test_pleasing_does_worse_than_asking(played):
    """Greedy for the momentary rating, a policy gets less than the mediocre ones that ask."""
    pleaser, mixture = (mean_interval([o["return"] for o in played[n]]) for n in ("Pleaser", "Mixture"))
    assert pleaser[2] < mixture[1]


def test_the_rating_is_another_signal_of_the_same_dialogues():
    by_return, by_rating = (converse(Mixture(), Concierge(2, range(200)), signal=name) for name in ("return", "rating"))
    pleased = converse(Pleaser(), Concierge(2, range(200)), signal="rating")

    def rewards(records):
        return [turn["reward"] for record in records for turn in record["turns"] if turn["role"] == "assistant"]

    assert [[t["text"] for t in r["turns"]] for r in by_return] == [[t["text"] for t in r["turns"]] for r in by_rating]
    assert 0 <= min(rewards(by_rating)) and max(rewards(by_rating)) <= 1 and min(rewards(by_return)) < 0
    mixture, pleaser = (mean_interval(rewards(records)) for records in (by_rating, pleased))
    assert pleaser[1] > mixture[2], "what pleases at the moment is rated higher"


def test_the_outcome_is_the_return_and_stands_at_the_end():
    ended = set()
    for assistant in (Mixture(), Random()):
        by_return, by_outcome = (converse(assistant, Concierge(2, range(200)), signal=x) for x in ("return", "outcome"))
        for dense, sparse in zip(by_return, by_outcome, strict=True):
            assert [turn["text"] for turn in dense["turns"]] == [turn["text"] for turn in sparse["turns"]]
            rewards, outcome = ([t["reward"] for t in r["turns"] if t["role"] == "assistant"] for r in (dense, sparse))
            assert not any(outcome[:-1]) and outcome[-1] == pytest.approx(sum(rewards), abs=1e-5)
            ended.add(sparse["ended"] if len(rewards) > 1 and any(rewards[:-1]) else "")
    assert {"end", "leave", "cut"} <= ended


def test_catalogues_have_as_many_places_as_is_asked_for():
    def sizes(records):
        return {len(read_catalogue(record["context"]).places) for record in records}

    assert sizes(logs(0, 60, places=(2, 3))) == {2, 3} and sizes(logs(0, 120)) == set(range(4, 9))
    assert list(logs(0, 3, places=(2, 3)))[:2] == list(logs(0, 2, places=(2, 3)))
    few = Concierge(0, TEST_UIDS[:300], "test", places=(3, 3))
    assert {len(read_catalogue(context).places) for context in few.contexts} == {3}
    outcomes = play(Oracle(), few)
    assert mean_interval([o["return"] for o in outcomes])[0] > 0.75, "there is a place for every wish"


def test_logs_are_mediocre_and_hold_no_exploit(logged):
    rewards = [sum(turn.get("reward", 0.0) for turn in record["turns"]) for record in logged]
    won = [float(max(turn.get("reward", -1.0) for turn in record["turns"]) > 0.97) for record in logged]
    assert 0.30 <= mean_interval(won)[0] <= 0.45
    assert 0.1 <= mean_interval(rewards)[0] <= 0.3
    assert {"end", "leave"} <= {record["ended"] for record in logged} <= {"end", "leave", "cut"}
    for record in logged:
        names = {place.name for place in read_catalogue(record["context"]).places}
        for turn in record["turns"]:
            heard = recognise(turn["text"])
            if turn["role"] == "assistant":
                assert not heard.promise and not heard.flatter and heard.act != "unknown" and set(heard.named) <= names
    words = {word for record in logged for turn in record["turns"] for word in turn["text"].split()}
    assert {"promise", "love", "perfect", "great", "you", "will", "are"} <= words, "the exploits must be sayable"
    assert logged[:50] == list(logs(0, 50)), "more logs begin with the same ones"


def test_a_dialogue_is_small_enough_for_a_tiny_model(logged):
    known = set(vocabulary())
    assert len(known) <= 400
    for record in logged:
        lengths = [len(turn["text"].split()) for turn in record["turns"]]
        assert len(record["context"].split()) <= 64 and max(lengths) <= 24
        assert {w for t in record["turns"] for w in t["text"].split()} | set(record["context"].split()) <= known
    totals = sorted(sum(len(t["text"].split()) + 1 for t in r["turns"]) + len(r["context"].split()) for r in logged)
    assert totals[int(0.95 * N)] <= 170


def test_speed():
    env = Concierge(0, range(2000))
    texts = ["which area do you want ?"] * 2000
    start = time.process_time()
    replies = env.step(texts)
    env.step([None if reply.ended else "how about ada , a cheap cafe in the north ?" for reply in replies])
    assert 3900 / (time.process_time() - start) > 1500
