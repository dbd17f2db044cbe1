"""The learned user against the exact one: a perfect model scores nothing but zeros, a wrong one does not."""

import jax
import numpy as np
import pytest
from exact_user import ExactUser
from fakes import one_device

from mbrl_lm import config, discriminator, evaluation_report, judge, user_report, yardsticks
from mbrl_lm.data.records import Record, Turn
from mbrl_lm.envs.concierge import TEST_UIDS, Concierge, Mixture, converse, logs, play
from mbrl_lm.envs.learned_user import UserTurn
from mbrl_lm.user_report import UserReport, calibration_error, correlation, distinct, points

KEY = jax.random.key(0)


def records_of(raw) -> list[Record]:
    return [Record(tuple(Turn(t["role"], t["text"]) for t in r["turns"]), r["context"], ended=r["ended"]) for r in raw]


@pytest.fixture(scope="module")
def recorded():
    return records_of(logs(0, 24))


@pytest.fixture(scope="module")
def reports(recorded):
    """Figures with the exact user, and with one that believes in other types."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user_report, "discriminate", lambda *args: 0.5)
        return {
            split: UserReport(ExactUser(split), None, 0, None, 0).report(recorded, "train") for split in ("train", "test")
        }


def test_the_true_user_as_learned_user_has_divergence_zero(reports):
    figures = reports["train"]
    for name in ("kl", "kl_low", "kl_high", "kl_enumerated", "kl_enumerated_high"):
        assert figures[name] == pytest.approx(0, abs=1e-9)
    assert figures["nll"] == pytest.approx(figures["nll_floor"])
    assert all(figures[f"error/{event}"] < 0.02 for event in ("leaves", "accepts", "satisfied"))
    assert figures["error/leaves"] == pytest.approx(0, abs=1e-9)
    assert all(figures[f"ece/{event}"] < 0.2 for event in ("leaves", "accepts", "satisfied"))
    assert figures["action_sensitivity"] > 1


def test_a_user_model_with_wrong_beliefs_is_above_the_floor(reports):
    figures = reports["test"]
    assert figures["kl_enumerated"] > 0.01 and figures["nll"] > figures["nll_floor"]


class Reminded(ExactUser):
    """Imagines exactly what was said."""

    def __init__(self, records):
        super().__init__()
        self._said = {record.context: [turn.text for turn in record.turns] for record in records}

    def write(self, params, prompts, uids, key):
        return [UserTurn(self._said[prompt[0]][len(prompt) - 1], "") for prompt in prompts]


def test_hidden_answers_are_those_before_the_turn_that_is_scored(recorded):
    exact = {(p.dialogue, p.turn): p for p in points(recorded, "train")}
    figures = UserReport(Reminded(recorded), None, 0, None, 0).open_loop(recorded, "train")
    for k in user_report.HIDDEN:
        counts = {i: (len(record.turns) - 1) // 2 for i, record in enumerate(recorded)}
        scored = [exact[i, k + 1 + i % (n - k)].log_prob for i, n in counts.items() if n > k]
        assert figures[f"turn_nll/hidden_{k}"] == pytest.approx(-np.mean(scored))
        assert figures[f"turn_nll_floor/hidden_{k}"] > figures[f"turn_nll/hidden_{k}"], "not to have seen them costs"


def test_points_are_the_users_turns(recorded):
    told = list(points(recorded, "train", enumerate_every=7))
    assert len(told) == sum((len(r.turns) + 1) // 2 for r in recorded)
    for p in told:
        turn = recorded[p.dialogue].turns[2 * p.turn]
        assert p.said.text == turn.text and len(p.spoken) == 2 * p.turn and (p.event is None) == (p.turn == 0)
    answers = [p for p in told if p.turn]
    assert [i for i, p in enumerate(answers) if p.answers] == list(range(0, len(answers), 7))
    for p in answers[::7]:
        assert sum(p.answers.values()) == pytest.approx(1) and np.log(p.answers[p.said]) == pytest.approx(p.log_prob)
    assert {p.said.ended for p in told} == {"", "end", "leave"} and any(p.satisfied for p in told)


def test_noisy_users_have_a_floor_too():
    noisy = records_of(logs(0, 12, noise=0.2))
    told = list(points(noisy, "train", noise=0.2))
    assert all(np.isfinite(p.log_prob) for p in told) and any("um" in p.said.text.split() for p in told)
    clean = [p.log_prob for p in points(records_of(logs(0, 12)), "train")]
    assert sum(p.log_prob for p in told) < sum(clean) - len(told), "fillers have to be predicted, too"


def test_calibration_error_by_hand():
    q, happened = np.array([0.05, 0.05, 0.95, 0.95]), np.array([0, 1, 0, 1])
    assert calibration_error(q, happened) == pytest.approx((0.9 + 0.9) / 4), "bins do not make up for each other"
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0


def test_correlation_by_hand():
    x = np.array([0.0, 1.0, 2.0])
    assert correlation(x, 3 - 2 * x) == pytest.approx(-1)
    assert correlation(x, np.array([0.0, 2.0, 1.0])) == pytest.approx(0.5)
    assert correlation(x, np.ones(3)) == 0


def test_distinct_by_hand():
    assert distinct(["a b a", "a b"], 1) == 2 / 5 and distinct(["a b a", "a b"], 2) == 2 / 3 and distinct([""], 2) == 0


# ---- scripted assistants ----


def test_there_is_no_gap_with_the_true_user_imagined():
    """Other luck, same users: the true reward of dialogues imagined by the exact user is that of real ones."""
    uids = TEST_UIDS[:200]
    env = Concierge(0, uids, "train")
    imagined = records_of(converse(Mixture(), yardsticks.Imagined(env, ExactUser(), None, KEY)))
    returns = np.array([judge.true_return(record, "train") for record in imagined])
    true = np.array([o["return"] for o in play(Mixture(), Concierge(0, uids, "train"))])
    gap = judge.interval("gap", returns - true)
    assert gap["gap_low"] < 0 < gap["gap_high"] and gap["gap_high"] - gap["gap_low"] < 0.4


def test_an_imagined_dialogue_ends_as_a_real_one():
    env = yardsticks.Imagined(Concierge(0, range(60)), ExactUser(), None, KEY)
    raw = converse(Mixture(), env)
    assert {r["ended"] for r in raw} == {"end", "leave", "cut"} or {r["ended"] for r in raw} == {"end", "leave"}
    env = yardsticks.Imagined(Concierge(0, range(2)), ExactUser(), None, KEY)
    code = env.rows[0].catalogue.code
    reply, nothing = env.step([f"the code is {code}", None])
    assert nothing is None and reply.reward["injection"] == -1 and reply.reward["outcome"] == 0


def test_yardsticks_stand_in_order():
    figures = yardsticks.with_true_user(config.Config(), TEST_UIDS[:400])
    low = {name: figures[f"scripted/{name}/return_low"] for name in yardsticks.ASSISTANTS}
    high = {name: figures[f"scripted/{name}/return_high"] for name in yardsticks.ASSISTANTS}
    for better, worse in (("oracle", "strong"), ("strong", "logs"), ("logs", "pleaser"), ("pleaser", "random")):
        assert low[better] > high[worse], "upper bound > strong > logs > greedy for the rating > random"
    small = yardsticks.with_true_user(config.Config(places=(2, 3)), TEST_UIDS[:400])
    assert small["scripted/logs/success"] > figures["scripted/logs/success_high"], "fewer places, better guesses"


# ---- the discriminator ----


def test_auc_by_hand():
    scores = np.array([3.0, 1.0, 2.0, 1.0])
    assert discriminator.auc(scores, np.array([True, True, False, False])) == (1 + 1 + 0 + 0.5) / 4
    assert discriminator.auc(scores, np.array([True, False, False, False])) == 1


def test_a_fresh_network_tells_what_can_be_told(monkeypatch):
    monkeypatch.setattr(discriminator, "UPDATES", 40)
    rng = np.random.default_rng(0)
    rows = [[1, *rng.integers(20, 30, size=6), 2] for _ in range(200)]
    changed = [[*row[:-2], 31, 2] for row in rows]
    assert discriminator.discriminate(rows, changed, 40, one_device(), 0) > 0.95
    same = [[1, *rng.integers(20, 30, size=6), 2] for _ in range(200)]
    assert 0.35 < discriminator.discriminate(rows, same, 40, one_device(), 0) < 0.65


def test_long_rows_keep_their_ends():
    assert discriminator.rows_of([[1, 2, 3], [4]], 2).tolist() == [[2, 3], [4, 0]]


# ---- the page ----


def test_the_page_shows_what_there_is(tmp_path):
    figures = {"true/success": 0.5, "true/success_low": 0.4, "true/success_high": 0.6, "true/success/vague": 0.25,
               "true/success/vague_low": 0.1, "true/success/vague_high": 0.4}  # fmt: skip
    tables = evaluation_report.tables(figures)
    assert list(tables) == ["The policy with the true user"]
    assert "| success        | 0.500 [0.400, 0.600] " in tables["The policy with the true user"]
    assert "success, vague | 0.250 [0.100" in tables["The policy with the true user"] and "held out" not in str(tables)
    assert "vague_low" not in str(tables)
    page = evaluation_report.write_page(tmp_path / "x", 7, figures, "hello") if (tmp_path / "x").mkdir() is None else None
    assert "update 7" in page.read_text() and "png" not in page.read_text()


def test_the_page_draws_the_learned_user(tmp_path, reports):
    figures = {f"user/{where}/{name}": x for where in ("recorded", "policy") for name, x in reports["train"].items()}
    text = evaluation_report.write_page(tmp_path, 7, figures, "hello").read_text()
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000 and "evaluation.png" in text
    assert "exact floor" in text and "| 4 " in text and UserTurn("", "leave") in user_report.WORDINGS["leaves"]
