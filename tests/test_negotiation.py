"""Negotiations between two models: what a pair of transcripts is worth, who sits where, and the two views of one talk."""

import jax
import numpy as np
import pytest
from fakes import follows, one_device, table_net
from tiny import config_of, dialogue, noisy, tokens, world

from experiments import dream
from mbrl_lm import config, deal, learner, outcome
from mbrl_lm import protocol as pr
from mbrl_lm.envs import negotiation
from mbrl_lm.envs.negotiation import Table, has_floor, hear, plan_cost, prompts, settle, summary
from mbrl_lm.optimizer import make_optimizer

PROTOCOL = pr.make_protocol("negotiation", 27, turn_tokens=4)
SCENARIOS = [((1, 4, 4, 1, 1, 2), (1, 0, 4, 2, 1, 2)), ((2, 1, 1, 3, 3, 1), (2, 2, 1, 0, 3, 2)), ((1, 2, 2, 3, 1, 2),) * 2]
MOST = negotiation.outcomes(SCENARIOS)
KEY = jax.random.key(3)


def pairs(*shares, scenario=SCENARIOS[0]):
    """Both views of dialogues that end with these outcomes."""
    ours, theirs = (" ".join(map(str, numbers)) for numbers in scenario)
    rows_a = [f"bos {ours} >a a >u b >o {a}" for a, _ in shares]
    rows_b = [f"bos {theirs} >u a >a b >o {b}" for _, b in shares]
    return dialogue(PROTOCOL, rows_a), dialogue(PROTOCOL, rows_b)


# ---- the result ----


def test_a_deal_needs_two_shares_that_add_up():
    told = settle(*pairs(
        ("1 0 1 stop", "0 4 0 stop"),  # 1 x 4 + 1 x 2, and 4 x 2
        ("1 0 1 stop", "0 3 0 stop"),  # one hat is left over
        ("1 4 1 stop", "0 4 0 stop"),  # both want the hats
        ("none stop", "none stop"),
        ("1 0 1 stop", "none stop"),
        ("1 0 stop", "0 4 1 stop"),  # malformed
        ("1 0 1", "0 4 0 stop"),  # cut short
        ("1 0 1 stop", "0 4 0"),
        ("0 4 0 stop", "1 0 1 stop"),
    ), MOST)  # fmt: skip
    assert told["agreed"].tolist() == [True] + [False] * 7 + [True]
    assert told["score_a"].tolist() == [6, 0, 0, 0, 0, 0, 0, 0, 4]
    assert told["score_b"].tolist() == [8, 0, 0, 0, 0, 0, 0, 0, 2]
    assert told["pareto"].tolist() == [True] + [False] * 8  # the last one is worse for both than the first


def test_a_deal_is_pareto_efficient_when_no_other_split_is_better_for_one_and_as_good_for_the_other():
    # Items a, b, c are worth 4, 1, 2 to us and 0, 2, 2 to them: only the first is theirs for nothing.
    shares = (
        ("1 1 1 stop", "0 3 0 stop"),
        ("0 0 1 stop", "1 4 0 stop"),
        ("1 4 1 stop", "0 0 0 stop"),
        ("1 0 0 stop", "0 4 1 stop"),
        ("0 0 0 stop", "1 4 1 stop"),  # the one before is as good for them and better for us
    )
    told = settle(*pairs(*shares), MOST)
    assert told["score_a"].tolist() == [7, 2, 10, 4, 0] and told["score_b"].tolist() == [6, 8, 0, 10, 10]
    assert told["pareto"].tolist() == [True, False, True, True, False]
    # In place of the second one the fourth gives either side 2 more, in place of the last one ours 4.
    assert deal.result(*pairs(*shares), MOST).waste.tolist() == [0, 4, 0, 0, 4]


def test_one_side_may_read_for_both():
    shares = ("1 0 1 stop", "none stop"), ("none stop", "0 4 0 stop"), ("0 4 0 stop", "0 4 0 stop")
    ours, theirs = pairs(*shares)
    told = deal.result_for_both(ours, deal.values(theirs), MOST)
    assert told.agreed.tolist() == [True, False, True]
    assert told.score_a.tolist() == [6, 0, 4] and told.score_b.tolist() == [8, 0, 2]
    assert told.waste.tolist() == [0, 0, 8]


def test_of_imagined_negotiations_the_user_reads_the_outcome():
    """Not the policy, which might learn to read what is worth most to it."""
    reward = {"imagine__generosity": 0.5, "imagine__waste": 0.25}
    w = world("negotiation", seed=1, imagine__user="frozen", imagine__temperature=1.0, **reward)
    state = learner.init_state(w.net, make_optimizer(w.cfg.train), KEY, w.cfg.turns)
    state = state.replace(params=w.params, reference=noisy(w.params, 7, 0.5))
    sides = table(cfg=w.cfg).openings(np.arange(48))
    dreamt = dream.dream_of_both(w.net, w.protocol, w.cfg, MOST, state, sides, KEY)
    by_user, by_policy = (
        outcome.read(w.net, w.protocol, p, dreamt, MOST, dream.READINGS) for p in (state.reference, state.params)
    )
    np.testing.assert_array_equal(dreamt.token_BT, by_user.token_BT)
    assert np.any(dreamt.token_BT != by_policy.token_BT)
    told = deal.result_for_both(by_user, deal.values(sides[1]), MOST)
    assert 4 < told.agreed.sum() < 48 and told.waste.any()
    np.testing.assert_allclose(dreamt.reward_BU.sum(axis=1), told.score_a + 0.5 * told.score_b - 0.25 * told.waste)
    assert dreamt.ended_B.all()


def test_points_go_to_the_last_turn_of_the_assistant():
    numbers = " ".join(map(str, SCENARIOS[0][0]))
    rows = [
        f"bos {numbers} >a a >u b >a a >o 1 0 1 stop",
        f"bos {numbers} >u b >a a >u b >o none stop",
        f"bos {numbers} >u b >o none stop",
    ]
    told = deal.earned(dialogue(PROTOCOL, rows), np.array([6.0, 3.0, 2.0]))
    np.testing.assert_array_equal(np.asarray(told.reward_BU)[:, :3], [[0, 6, 0], [3, 0, 0], [2, 0, 0]])


# ---- the openings ----


def table(net=None, partner=None, cfg=None, rows=4):
    return Table(cfg or config_of(), PROTOCOL, net, partner, one_device(), SCENARIOS, rows)


def test_fewer_are_planned_at_a_time():
    cfg = config_of(plan="rollouts", imagine__reward="split", planner__candidates=2, planner__futures=1)
    assert [table(table_net(), table_net(), cfg, rows).rows for rows in (4, 64)] == [4, negotiation.PLANNED_ROWS]
    assert table(table_net(), table_net(), rows=64).rows == 64


def test_every_scenario_is_played_four_ways():
    ours, theirs = table().openings(np.arange(13))
    seen = {}
    for b in range(12):
        sides = tuple(tuple((d.token_BT[b, 1:7] - pr.NUMBER).tolist()) for d in (ours, theirs))
        speaker = {pr.TO_ASSISTANT: "we", pr.TO_USER: "they"}[int(ours.token_BT[b, 7])]
        assert theirs.token_BT[b, 7] == PROTOCOL.mirror_V[ours.token_BT[b, 7]]
        assert sides in (SCENARIOS[b % 3], SCENARIOS[b % 3][::-1])
        seen.setdefault(b % 3, []).append((sides == SCENARIOS[b % 3], speaker))
    ways = [(seat, speaker) for seat in (False, True) for speaker in ("they", "we")]
    assert sorted(seen[0]) == sorted(seen[1]) == ways
    assert (ours.token_BT[12] == ours.token_BT[0]).all()  # and then again
    assert ours.uid_B.tolist() == theirs.uid_B.tolist() == list(range(13))
    for side in (ours, theirs):
        assert (side.token_BT[:, 0] == pr.BOS).all() and side.token_BT.shape == (13, 8)
        assert (side.author_BT == pr.CONTEXT).all() and not side.turn_BT.any()


def test_a_negotiation_that_cannot_open_is_refused():
    with pytest.raises(config.ConfigError, match="raise --config.tokens=7"):
        prompts([SCENARIOS[0][0]], [pr.USER], 7, 2)


# ---- the talk ----


def test_both_see_one_talk_in_mirrored_roles_and_its_figures_are_those_of_settle():
    ours, theirs = world("negotiation", seed=1), world("negotiation", seed=5, model__layers=1, model__width=8)
    sat = table(ours.net, theirs.net)
    views = []
    read = sat._read
    sat._read = lambda *args: views.append(read(*args)) or views[-1]
    figures, dialogues = sat.play(ours.params, theirs.params, KEY, 10, 1.0)
    assert len(views) == 3 and all(len(x) == 10 for x in figures.values())
    a, b = (jax.tree.map(lambda *x: np.concatenate(x), *side) for side in zip(*jax.device_get(views), strict=True))
    assert (a.token_BT[:10] == dialogues.token_BT).all()  # as the policy saw them
    said = (a.author_BT == pr.ASSISTANT) | (a.author_BT == pr.USER)
    assert (b.token_BT[said] == PROTOCOL.mirror_V[a.token_BT[said]]).all()
    mirrored = {pr.ASSISTANT: pr.USER, pr.USER: pr.ASSISTANT}
    assert (b.author_BT[said] == np.vectorize(mirrored.get)(a.author_BT[said])).all()
    for view in (a, b):
        author_BT, turn_BT = map(np.asarray, pr.parse(PROTOCOL, view.token_BT))
        assert (author_BT == view.author_BT).all() and (turn_BT == view.turn_BT).all()
    again = settle(a, b, MOST)
    assert all((figures[name] == again[name][:10]).all() for name in again)
    turns = [len(np.unique(a.turn_BT[b][said[b]])) for b in range(10)]
    assert figures["turns"].tolist() == turns and len(set(turns)) > 1
    assert len({row.tobytes() for row in dialogues.token_BT}) == 10


@pytest.mark.parametrize("plan,sides", [("none", 1), ("rollouts", 1), ("gumbel", 1), ("rollouts", 2), ("gumbel", 2)])
def test_the_partner_plays_with_its_own_network(plan, sides):
    # We say a and hand over; the partner says b and calls for the outcome; then each writes that it gets one half.
    chains = "1 2 3", "1 2 3"
    params = []
    for word, then, share in (("a", ">u", chains[0]), ("b", ">o", chains[1])):
        said = [*tokens(f">o {share}"), pr.STOP]
        after = dict(zip(said[:-1], said[1:], strict=True)) | {pr.TO_ASSISTANT: tokens(word)[0]}
        params.append(follows(27, after | {tokens(word)[0]: tokens(then)[0]}))
    scenario = (2, 1, 4, 1, 6, 1), (2, 1, 4, 1, 6, 1)
    planner = {"candidates": 2, "futures": 1, "simulations": 2, "sides": sides}
    cfg = config_of(plan=plan, imagine__reward="split", **{f"planner__{name}": x for name, x in planner.items()})
    sat = Table(cfg, PROTOCOL, table_net(), table_net(), one_device(), [scenario], 4)
    figures, dialogues = sat.play(*params, KEY, 4, 0.5)
    numbers = " ".join(map(str, scenario[0]))
    we_begin, they_begin = f"bos {numbers} >a a >u b >o 1 2 3 stop", f"bos {numbers} >u b >o 1 2 3 stop"
    expected = dialogue(PROTOCOL, [they_begin, we_begin, we_begin, they_begin])
    assert (dialogues.token_BT == expected.token_BT).all() and dialogues.ended_B.all()
    assert figures["score_a"].tolist() == [6] * 4 and figures["score_b"].tolist() == [6] * 4
    assert figures["turns"].tolist() == [1, 2, 2, 1]
    assert (dialogues.author_BT == expected.author_BT).all()
    if plan != "none":  # in the first and last row the partner called for the outcome: ours was read, and no turn planned
        assert figures["plan_tokens"].tolist()[1] > figures["plan_tokens"].tolist()[0] > 0
        assert plan_cost(figures)["plan/tokens_a_turn"] > 1
    else:
        assert plan_cost(figures) == {}
    scores = dialogues.reward_BU
    assert scores.sum(axis=1).tolist() == [6] * 4 and (scores[[1, 2], 0] == 6).all()


def test_dialogues_that_have_ended_are_no_longer_computed_and_the_others_stay_as_they_are(monkeypatch):
    ours, theirs = world("negotiation", seed=1), world("negotiation", seed=5, model__layers=1, model__width=8)
    cfg = config_of(plan="rollouts", imagine__reward="split", planner__candidates=2, planner__futures=1, planner__depth=1)
    found, sizes = [], []
    for fewest in (16, 4):
        monkeypatch.setattr(negotiation, "FEWEST_ROWS", fewest)
        sat = table(ours.net, theirs.net, cfg, rows=16)
        speak = sat._speak

        def watched(params, side, *args, speak=speak):
            sizes.append(len(side.uid_B))
            return speak(params, side, *args)

        sat._speak = watched
        figures, dialogues = sat.play(ours.params, theirs.params, KEY, 16, 1.0)
        found.append((dialogues.token_BT, figures["plan_tokens"], figures["score_a"]))
    for whole, fewer in zip(*found, strict=True):
        np.testing.assert_array_equal(whole, fewer)
    assert set(sizes) > {16} and min(sizes) <= 8


def test_a_side_hears_words_and_no_outcome_and_has_not_ended_where_it_waits():
    numbers = " ".join(map(str, SCENARIOS[0][0]))
    spoken = dialogue(PROTOCOL, [f"bos {numbers} >a a >u", f"bos {numbers} >a a >o 1 0 1 stop"])
    waiting = dialogue(PROTOCOL, [f"bos {numbers} >u", f"bos {numbers} >u"], ended=[True, True])
    heard = hear(PROTOCOL, waiting, spoken)
    expected = dialogue(PROTOCOL, [f"bos {numbers} >u a >a", f"bos {numbers} >u a >o"])
    for name in ("token_BT", "author_BT", "turn_BT"):
        np.testing.assert_array_equal(getattr(heard, name), getattr(expected, name))
    assert has_floor(PROTOCOL, heard).all() and not heard.ended_B.any() and heard.cut_B.all()
    assert not has_floor(PROTOCOL, spoken).any()  # the one waits, the other has written its outcome


def test_summary():
    told = summary({
        "score_a": np.array([6, 0, 4, 0]), "score_b": np.array([8, 0, 2, 0]), "agreed": np.array([True, False, True, False]),
        "pareto": np.array([True, False, False, False]), "turns": np.array([2, 5, 4, 5]),
    })  # fmt: skip
    assert told == {
        "score_a": 2.5, "score_b": 2.5, "score_a_agreed": 5, "score_b_agreed": 5, "agreed": 50, "pareto": 50, "turns": 4,
    }  # fmt: skip
    none = {"score_a": np.zeros(2), "score_b": np.zeros(2), "agreed": np.zeros(2, bool), "pareto": np.zeros(2, bool)}
    assert summary(none | {"turns": np.ones(2)})["score_a_agreed"] == 0
