"""The table of negotiations: command lines, matches, the CSV and the page; a tiny negotiator with every partner."""

import json
import types

import numpy as np
import pytest
from fakes import write_deals
from test_dream import NEGOTIATION, finish, lines, one_line, results, run, start

from experiments import match, negotiate
from mbrl_lm import judge
from mbrl_lm import negotiation_table as table
from mbrl_lm.config import Config, ConfigError

# ---- the plan ----


def own(tmp_path, *args):
    flags = negotiate.make_flags()
    flags([negotiate.__file__, f"--workdir={tmp_path}", "--data_dir=D", *args])
    return flags


def test_rows_agree_with_the_presets_and_every_row_of_the_paper_is_there():
    for variant in ("paper", "default", "tiny"):
        negotiate.check(variant)
    assert set(table.PAPER) < {row.name for row in negotiate.ROWS}
    assert {row.run for row in negotiate.ROWS} == set(negotiate.RUNS)
    assert list(negotiate.PARTNERS) == list(match.PARTNERS)


def test_a_setting_that_contradicts_itself_is_named(monkeypatch):
    monkeypatch.setitem(negotiate.RUNS, "ours", {"imagine.sides": 3})
    with pytest.raises(ConfigError, match="ours: imagine.sides is 1 or 2"):
        negotiate.check("paper")


def test_policies_begin_with_the_likelihood_model_and_matches_with_policies(tmp_path):
    flags = own(tmp_path, "--seeds=2", "--rows=ours,rollouts", "--planned_dialogues=12", "--split=test")
    likelihood, policies, matches = negotiate.stages(flags, negotiate.select(flags.rows), "python")
    assert len(likelihood) == len(policies) == 2 and len(matches) == 4
    assert all(f"--config.start={tmp_path}/likelihood/seed_{seed}" in line for seed, line in enumerate(policies))
    rollouts, ours = matches[:2]
    assert f"--config.start={tmp_path}/likelihood/seed_0" in rollouts and "--config.plan=rollouts" in rollouts
    assert f"--config.start={tmp_path}/ours/seed_0" in ours and "--config.eval.final_dialogues=400" in ours
    assert "--config.eval.final_dialogues=12" in rollouts and "--config.eval.split=test" in rollouts


@pytest.mark.parametrize(
    "args, message",
    [
        (["--rows=theirs"], "--rows=theirs is no row: use all, or likelihood"),
        (["--workdir=W", "--rows=all"], "--data_dir=DIR is missing"),
        ([], "--workdir=DIR is missing"),
        (["--from_csv=absent.csv"], "--from_csv=absent.csv cannot be read"),
        (["--workdir=W", "--data_dir=D", "--variant=small"], "--variant=small is unknown for deal_or_no_deal"),
        (["what"], "'what' is not a flag"),
    ],
)
def test_mistakes_are_one_line(args, message, capsys):
    assert negotiate.main(["negotiate", *args]) == 2
    assert message in one_line(capsys.readouterr().err)


# ---- the table ----


def put(workdir, row, seed, scores, partner="p1", ppl=5.0, **figures):
    """What a finished match leaves."""
    directory = workdir / "match" / row / f"seed_{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    base = {"score_a": float(np.mean(scores)), "score_b": 5.0, "agreed": 90.0, "pareto": 60.0, "score_a_se": 0.25}
    kept = {"commit": "abcdefg" + "h" * 33, "figures": base | figures, "score_a": scores}
    (directory / f"{partner}.json").write_text(json.dumps(kept))
    (directory / "results.json").write_text(json.dumps({"word_ppl/val": ppl, "split_accuracy/val/whole": 0.9}))


@pytest.fixture
def matches(tmp_path):
    put(tmp_path, "likelihood", 0, [4, 6, 8, 2])
    put(tmp_path, "likelihood", 1, [6, 6, 8, 4], ppl=5.2)
    put(tmp_path, "rollouts", 0, [6, 6], **{"plan/tokens_a_turn": 1500.0, "plan/seconds_a_turn": 0.5})
    put(tmp_path, "ours", 0, [9, 9, 8, 8], ppl=5.25)
    put(tmp_path, "ours", 0, [6, 6, 7, 7], partner="p2", ppl=5.25)
    put(tmp_path, "ours", 0, [9, 9, 9, 9], partner="self", ppl=5.25)
    put(tmp_path, "ours_guards", 0, [9, 9, 8, 8, 1], ppl=5.25, score_b=4.5)
    put(tmp_path, "ours_planning", 0, [9.5, 9.5, 9.5, 9], ppl=5.25)
    for partner in list(negotiate.PARTNERS)[1:]:
        put(tmp_path, "ours_guards", 0, [8, 7, 6, 5, 1], partner=partner, ppl=5.25)
        put(tmp_path, "ours_planning", 0, [8, 7, 6, 7], partner=partner, ppl=5.25)
    return tmp_path


def test_what_planning_gains_is_paired_by_scenario(matches):
    records = table.read_matches(matches, negotiate.lines(negotiate.ROWS), list(negotiate.PARTNERS))
    record = records["rollouts", "p1", 0]
    assert record["plan_gain"] == 1 and record["dialogues"] == 2 and record["plan_tokens_a_turn"] == 1500
    assert record["plan_gain_low"] == pytest.approx(1 - 12.706, abs=1e-3)
    everybody = records["ours_planning", "all", 0]  # .1, .1, .3 and 1.8 on the mean over five partners
    assert everybody["plan_gain"] == pytest.approx(0.575) and everybody["dialogues"] == 20 and everybody["score_a"] is None
    assert everybody["plan_gain_low"] == pytest.approx(0.575 - 3.18245 * 0.82209 / 2, abs=1e-3)
    assert ("rollouts", "all", 0) not in records and ("ours_guards", "all", 0) not in records
    assert records["likelihood", "p1", 1]["commit"] == "abcdefg" and records["likelihood", "p1", 1]["plan_gain"] is None


def test_the_page_and_its_csv_say_the_same(matches, capsys):
    page = negotiate.write_table(matches, {}).read_text()
    assert negotiate.main(["negotiate", f"--from_csv={matches / 'negotiations.csv'}"]) == 0
    assert capsys.readouterr().out == page
    (line,) = [line for line in page.splitlines() if line.startswith("| likelihood | 5.5 ± 0.5 v")]
    assert "5.4 v 5.5" in line and "| 5.10 ± 0.10 |" in line
    assert "| ours | 8.5 ± 0.2 | 6.5 ± 0.2 | - | - | 9.0 ± 0.2 | +2.0 (p1) |" in page  # it has learnt with p1
    assert "| ours_guards | 7.0 ± 0.2 | 5.4 ± 0.2 | 5.4 ± 0.2 | 5.4 ± 0.2 | 5.4 ± 0.2 | +0.0 (self) |" in page
    assert "| rollouts | +1.00 [-11.71, +13.71] | - | - | - | - | - | 1500 | 0.50 |" in page
    assert "LIKELIHOOD: perplexity at most 5.40: 5.10: reached" in page
    assert "LIKELIHOOD: at least 85 % agreed with itself: 90.00: reached" in page
    assert "ours: at least 8.3 points against p1: 8.50: reached" in page
    assert "ours: at least 94.4 % agreed (target 97): 90.00: not reached" in page
    assert "ours: the partner has more than 4.2 (target 5): 5.00: reached" in page
    assert "ours_guards: the partner has more than 4.2 (target 5): 4.50: reached, the target not" in page
    assert "LIKELIHOOD: 5 to 6 points for the other side: 5.00: reached" in page
    assert "ours: from p1 to p2 its score falls by 2.00 (less than 1.85): not reached" in page
    assert "ours: perplexity rises by 5.0 % (less than 7 %): reached" in page  # over the seeds that it has itself
    assert "rollouts: planning adds +1.00 [-11.71, +13.71] points with p1 (an interval above 0): not reached" in page
    assert "ours_planning: planning adds +0.88 [+0.11, +1.64] points with p1 (an interval above 0): reached" in page
    assert "planning adds +0.57 [-0.73, +1.88] points with all partners (an interval above 0): not reached" in page


def test_a_table_is_extended_by_a_csv(matches, tmp_path_factory):
    negotiate.write_table(matches, {})
    other = tmp_path_factory.mktemp("other")
    put(other, "rl", 0, [7, 7])
    before = table.read_csv(matches / "negotiations.csv")
    assert (
        "ours: at least 8.3 points against p1: ours has not negotiated yet" in negotiate.write_table(other, {}).read_text()
    )
    negotiate.write_table(other, before)
    after = table.read_csv(other / "negotiations.csv")
    assert set(after) == set(before) | {("rl", "p1", 0)} and list(after)[2][0] == "rl"


# ---- a negotiator ----


def test_whoever_reads_for_the_partner_sits_at_the_table(monkeypatch):
    class Seated(Exception):
        pass

    def table(*_, listener, **__):
        raise Seated(listener)

    monkeypatch.setattr(match.negotiation, "Table", table)
    corpus = types.SimpleNamespace(val_records=[], protocol=None)
    model = types.SimpleNamespace(corpus=corpus, net=None, mesh=None, planned_user=lambda cfg: None)
    with pytest.raises(Seated) as told:
        match.play(Config(), model, judge.Opposite(None, None, "a reader"), set())
    assert told.value.args == ("a reader",)


def test_a_negotiator_is_trained_with_both_sides_and_sits_at_every_table(tmp_path):
    data = NEGOTIATION | {"data_dir": write_deals(tmp_path / "deals"), "train.undropped": 0.5}
    unjudged = {"eval.dialogues": 0, "eval.final_dialogues": 0}
    run(tmp_path / "likelihood", data | unjudged | {"train.rl_steps": 0, "imagine.batch": 0})
    settings = {"imagine.sides": 2, "imagine.user": "population", "imagine.generosity": 0.2, "imagine.candidates": 2}
    settings |= {"policy.baseline": "leave_one_out", "start": tmp_path / "likelihood", "eval.every": 2}
    run(tmp_path / "ours", data | unjudged | settings)
    assert "train/imagined_reward" in lines(tmp_path / "ours")[-2] and "loss/policy_imagined" in lines(tmp_path / "ours")[-2]
    assert not (tmp_path / "ours" / "partner").exists()
    flags = {"data": "deal_or_no_deal", "data_dir": data["data_dir"], "start": tmp_path / "ours", "eval.final_dialogues": 4}
    flags |= {name: x for name, x in NEGOTIATION.items() if name.startswith("partner.")}
    flags |= {
        "plan": "rollouts",
        "planner.candidates": 2,
        "planner.futures": 1,
        "planner.reward": "sure_split",
        "cpu_devices": 2,
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "self.json").write_text(
        json.dumps({"figures": {"score_a": 1, "score_b": 2, "agreed": 3, "pareto": 4}})
    )
    code, out, err = finish(start(tmp_path / "m", flags, "match"))
    assert code == 0, err
    figures = results(tmp_path / "m")
    assert figures["self/score_b"] == 2 and "at the table with self" not in out  # it was there
    for partner in match.PARTNERS[:-1]:
        assert 0 <= figures[f"{partner}/agreed"] <= 100 and figures[f"{partner}/plan/tokens_a_turn"] > 1
        kept = json.loads((tmp_path / "m" / f"{partner}.json").read_text())
        assert len(kept["score_a"]) == 4 and kept["commit"] in (tmp_path / "m" / "commit.txt").read_text()
    assert (tmp_path / "likelihood" / "partner").exists() and figures["word_ppl/val"] > 1
    code, _, err = finish(start(tmp_path / "n", flags | {"eval.split": "test"}, "match"))
    assert code == 2 and "has no test split, only train, val" in one_line(err)
