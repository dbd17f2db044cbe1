"""The Bayes filter: against brute-force enumeration, and as the floor that it is."""

import math

import numpy as np
import pytest

from mbrl_lm.envs.concierge import Concierge, Mixture, converse, logs
from mbrl_lm.envs.concierge import user as automaton
from mbrl_lm.envs.concierge.bayes import Filter, read, without_fillers
from mbrl_lm.envs.concierge.chance import draw
from mbrl_lm.envs.concierge.env import LEFT_ANGRY, TYPES, add_noise
from mbrl_lm.envs.concierge.recogniser import recognise
from mbrl_lm.envs.concierge.words import turn_text
from mbrl_lm.envs.concierge.world import Catalogue, Place, read_catalogue, satisfaction

CATALOGUE = Catalogue(
    (Place("ada", "cafe", "north", "cheap", "quiet"), Place("bolt", "bar", "south", "dear", "lively"),
     Place("coral", "cafe", "south", "fair", "cosy")), "falcon", ("discount",),
)  # fmt: skip


def spoken(record) -> list[tuple[str, str]]:
    return [(turn["role"], turn["text"]) for turn in record["turns"]]


def enumerate_paths(catalogue, turns, ended, split):
    """log p of every user turn and the posterior worth of the last one, by following every latent state on its own."""
    kinds, goals, patience, short, goodwill = automaton.initial(catalogue, TYPES[split])
    live = [
        (a * b * c * d * e, automaton.begin(kind, goal, points, haste, good))
        for a, kind in kinds for b, goal in goals for c, points in patience for d, haste in short for e, good in goodwill
    ]  # fmt: skip

    def likelihood(turn, text):
        return dict((said, p) for p, said in turn_text(turn.parts)).get(text, 0.0)

    def keep(options, text, ended):
        return [(p * likelihood(t, text), t, s) for p, t, s in options if t.ended == ended]

    def normalised(options):
        total = sum(p for p, _, _ in options)
        return math.log(total), [(p / total, t, s) for p, t, s in options if p]

    logs_U = []
    for u in range(0, len(turns), 2):
        if u == 0:
            options = [(w * p, t, s) for w, s in live for p, t in automaton.opening(s, catalogue)]
        else:
            heard = recognise(turns[u - 1][1])
            options = [(w * p, t, s) for w, s in live for p, t in automaton.respond(s, heard, catalogue)]
        log_p, options = normalised(keep(options, turns[u][1], ended if u == len(turns) - 1 else ""))
        logs_U.append(log_p)
        live = [(p, t.state) for p, t, _ in options]
    if ended == "leave":
        return logs_U, LEFT_ANGRY
    places = [(p, s.goal, catalogue.find(t.booked)) for p, t, s in options]
    return logs_U, sum(p * satisfaction(goal, place) for p, goal, place in places if place)


SAID = ("what area ?", "how about coral , a cosy cafe ?", "i promise you will love it", "sorry , no discount")


@pytest.mark.parametrize("split", ["train", "test"])
def test_filter_equals_brute_force(split):
    rng = np.random.default_rng(0)
    ends = set()
    for _ in range(4):
        kinds, goals, *rest = automaton.initial(CATALOGUE, TYPES[split])
        state = automaton.begin(*(draw(d, rng.random()) for d in (kinds, goals, *rest)))
        turn = draw(automaton.opening(state, CATALOGUE), rng.random())
        turns, n = [("user", draw(turn_text(turn.parts), rng.random()))], 0
        while not turn.ended and n < 3:
            said = SAID[int(rng.integers(len(SAID)))]
            turn = draw(automaton.respond(turn.state, recognise(said), CATALOGUE), rng.random())
            turns += [("assistant", said), ("user", draw(turn_text(turn.parts), rng.random()))]
            n += 1
        ends.add(turn.ended)
        brute, worth = enumerate_paths(CATALOGUE, turns, turn.ended, split)
        exact = read(CATALOGUE.text(), turns, turn.ended, split)
        np.testing.assert_allclose(exact.log_prob_U, brute, rtol=1e-9)
        assert exact.reward["outcome"] == pytest.approx(worth)
    assert len(ends) > 1


def test_a_user_tires_for_the_filter_too():
    """Small talk until every turn costs patience because it is late."""
    turns = [("user", "i need a place")]
    for _ in range(automaton.TIRED_AFTER + 2):
        turns += [("assistant", "hello , welcome"), ("user", "ok , i still need a place")]
    brute, _ = enumerate_paths(CATALOGUE, turns, "", "train")
    np.testing.assert_allclose(read(CATALOGUE.text(), turns, "").log_prob_U, brute, rtol=1e-9)


def test_every_log_is_possible_and_worth_what_it_earned():
    env = Concierge(5, range(300), "train", noise=0.1)
    records = converse(Mixture(), env)
    outcomes = [env.outcome(i) for i in range(300)]
    exact = [read(r["context"], spoken(r), r["ended"], noise=0.1) for r in records]
    assert all(np.isfinite(x.log_prob_U).all() for x in exact)
    true = np.array([LEFT_ANGRY if o["left"] else o["satisfaction"] for o in outcomes])
    costs = ("turn_cost", "hallucination", "injection")
    paid = [sum(x.reward[name] for name in costs) for x in exact]
    assert paid == pytest.approx([o["return"] - t for o, t in zip(outcomes, true, strict=True)])
    error = np.array([x.reward["outcome"] for x in exact]) - true
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(300), "the posterior is calibrated"
    assert all(x.reward["outcome"] == LEFT_ANGRY for x, o in zip(exact, outcomes, strict=True) if o["left"])


def test_predictions_are_distributions_that_agree_with_each_other():
    belief = Filter(CATALOGUE, "test")
    belief.opening("hello , i need a place for tonight")
    for said in SAID:
        answers, event = belief.answers(said), belief.predict(said)
        assert sum(answers.values()) == pytest.approx(1)
        assert event.leaves == pytest.approx(sum(p for (_, ended), p in answers.items() if ended == "leave"))
        ends = sum(p for (_, ended), p in answers.items() if ended == "end")
        assert event.accepts == pytest.approx(ends) and event.satisfied <= event.accepts
    # Conditioning on an answer gives the probability that was predicted for it.
    (text, ended), p = max(answers.items(), key=lambda x: x[1])
    assert belief.answer(SAID[-1], text, ended).log_prob == pytest.approx(math.log(p))


def test_nothing_gets_below_the_floor():
    """Whatever predicts the answers, its expected likelihood under the true user is at most the filter's."""
    rng = np.random.default_rng(1)
    checked = 0
    for record in logs(3, 8):
        right, wrong = (Filter(read_catalogue(record["context"]), split) for split in ("train", "test"))
        turns = spoken(record)
        right.opening(turns[0][1]), wrong.opening(turns[0][1])
        for u in range(1, len(turns) - 1, 2):
            answers, others = right.answers(turns[u][1]), wrong.answers(turns[u][1])
            p = np.array(list(answers.values()))
            entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
            noisy = p * rng.uniform(0.5, 2, len(p))
            for q in (np.array([others.get(key, 0.0) for key in answers]), noisy / noisy.sum(), p**2 / (p**2).sum()):
                assert -(p[p > 0] * np.log(np.maximum(q[p > 0], 1e-300))).sum() >= entropy - 1e-12
            checked += 1
            if u + 2 < len(turns):
                right.answer(turns[u][1], turns[u + 1][1], ""), wrong.answer(turns[u][1], turns[u + 1][1], "")
    assert checked > 10


def test_the_true_user_as_world_model_has_divergence_zero():
    """Over many users, the mean of log p* over the filter's own answers is minus its entropy: KL 0 within rounding."""
    belief, other = Filter(CATALOGUE, "train"), Filter(CATALOGUE, "train")
    for b in (belief, other):
        b.opening("i need a place")
        b.answer("what area ?", "somewhere in the south", "")
    p, q = belief.answers("how about bolt ?"), other.answers("how about bolt ?")
    assert abs(sum(x * math.log(x / q[key]) for key, x in p.items() if x)) < 1e-12


def test_text_that_no_user_says_is_minus_infinity_and_loses_nothing():
    belief = Filter(CATALOGUE)
    belief.opening("hello , i need a place")
    assert belief.answer("what area ?", "blorp", "").log_prob == -math.inf
    assert np.isfinite(belief.answer("what kind of place ?", "i want a cafe", "").log_prob)
    assert belief.predict("how about bolt ?").satisfied == 0 < belief.predict("how about ada ?").satisfied
    booked = belief.answer("how about ada ?", "lovely", "end")
    assert booked.log_prob == -math.inf and 0 < booked.outcome < 1


def test_an_answer_that_was_not_seen_is_summed_over():
    """p(later answer) = sum over the hidden one, of users who stay."""
    said, later = "how about coral , a cosy cafe ?", ("how about bolt ?", "no , something else please", "")
    hidden = Filter(CATALOGUE)
    hidden.opening("i need a place")
    answers = {text: p for (text, ended), p in hidden.answers(said).items() if not ended}
    total = 0.0
    for text, p in answers.items():
        seen = Filter(CATALOGUE)
        seen.opening("i need a place")
        seen.answer(said, text, "")
        total += p / sum(answers.values()) * math.exp(seen.answer(*later).log_prob)
    hidden.overlook(said)
    assert math.exp(hidden.answer(*later).log_prob) == pytest.approx(total)


def test_a_wish_rules_places_out():
    belief = Filter(CATALOGUE)
    belief.opening("i need a place")
    belief.answer("what area ?", "somewhere in the north", "")
    leaves, accepts, satisfied = belief.predict("how about ada ?")
    assert accepts == satisfied == pytest.approx(1 - leaves)
    assert belief.predict("how about bolt ?").satisfied == 0


def test_fillers_are_undone_exactly():
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(4000):
        text = add_noise("yes book it", 0.3, rng)
        seen[text] = seen.get(text, 0) + 1
    for text, count in seen.items():
        words, p = without_fillers(text, 0.3)
        assert words == "yes book it" and abs(count / 4000 - p) < 4 * math.sqrt(p / 4000)
    assert without_fillers("um um yes", 0.3)[1] == 0 and without_fillers("yes um", 0.3)[1] == 0
    assert without_fillers("um yes", 0.0)[1] == 0
