"""The ablation table: rows that can run, command lines that share what they can, and figures worked out by hand."""

import json
import math
import os
import shlex
import signal
import stat
import subprocess
import sys
import time

import pytest

from experiments import ablations
from mbrl_lm import ablation_plan, ablation_runs, ablation_table, command_line, config, presets, trained
from mbrl_lm.ablation_table import Claim, Line

VARIANT = "tiny"
T2 = 4.302652729911275  # the 97.5 % point of Student's t with 2 degrees of freedom (any table)


@pytest.fixture(scope="module")
def plan():
    return ablations.make_plan(VARIANT)


# ---- rows ----


def test_rows_are_fields_of_the_config_and_agree_with_each_other(plan):
    fields = command_line.flatten(config.Config())
    for row in plan.rows.values():
        assert set(row.overrides) <= set(fields), row.name
        for name, value in row.overrides.items():
            assert type(value) is type(fields[name]), (row.name, name)
        assert row.start is None or row.start.items() <= row.overrides.items(), row.name
        assert row.start is not None or row.overrides["train.supervised_steps"] == 0, row.name
        assert row.against in plan.rows and row.expects in ("", "higher", "lower", "no clear difference"), row.name
        assert row.name.replace("_", "").replace(".", "").isalnum() and row.figure in ablation_runs.FIGURES
        assert row.group == "full" or row.name.startswith(row.group.split()[0]), row.name
    for claim in ablations.CLAIMS:
        assert claim.figure in ablation_runs.FIGURES and {claim.row, claim.against or "full"} <= set(plan.rows)


def test_a_row_and_the_run_that_it_begins_from_agree_in_what_likelihood_hangs_on(plan):
    for row in plan.rows.values():
        if row.start is not None:
            later = [name for name in row.overrides if name.startswith(trained.LATER)]
            assert {name for name in row.overrides if name not in later} <= set(row.start), row.name
    assert all(name.startswith(trained.LATER) for name in ablations.START)


def test_every_group_of_the_table_is_there(plan):
    groups = {row.group.split()[0] for row in plan.rows.values()}
    assert groups == {"full", *map(str, range(1, 14)), "N1", "N2"}


def test_a_row_that_contradicts_itself_is_named(monkeypatch):
    monkeypatch.setattr(ablations, "MODEL_FREE", {"imagine.openings": 3.0})
    with pytest.raises(config.ConfigError, match="row 1_model_free: imagine.openings is a part"):
        ablations.make_plan(VARIANT)


def test_equal_rows_are_run_once_and_follow_the_preset(plan, monkeypatch):
    names = ("11_multi_step", "12_supervised_start", "9_shared", "6_horizon_4", "4_tokens_all")
    assert {plan.runs[name] for name in names} == {"full"}
    assert plan.runs["5_none"] == "2_nll_1" and plan.runs["6_horizon_2"] == "6_horizon_2"
    assert len(set(plan.runs.values())) < len(plan.rows) - 8
    assert (plan.runs["5_live"], plan.runs["5_population"], plan.runs["8_none"]) == ("full", "5_population", "full")
    guarded = {"imagine.user": "population", "model.user_heads": 3, "guard.penalty": 0.25}
    guarded |= {"guard.truncation": 0.5, "guard.discriminator": 0.125, "guard.anchors": True}
    monkeypatch.setitem(presets.PRESETS["concierge"], "guarded", presets.PRESETS["concierge"]["tiny"] | guarded)
    other = ablations.make_plan("guarded")
    assert (other.runs["5_live"], other.runs["5_population"], other.runs["8_all"]) == ("5_live", "full", "full")
    assert (
        other.rows["8_penalty"].overrides["guard.penalty"] == 0.25 and not other.rows["8_penalty"].overrides["guard.anchors"]
    )


@pytest.mark.parametrize(
    "rl, every, updates, expected",
    [
        (300, 4, 75, {"train.rl_steps": 75, "collect.every": 1, "collect.batch": 16}),  # 75 collections of 16
        (300, 4, 1800, {"train.rl_steps": 1800, "collect.every": 24, "collect.batch": 16}),
        (300, 2, 75, {"train.rl_steps": 75, "collect.every": 1, "collect.batch": 32}),  # 150 of 16 = 75 of 32
        (220, 2, 100, {"train.rl_steps": 100, "collect.every": 1, "collect.batch": 18}),  # 110 of 16 = 1,760, 100 of 18
        (250, 5, 125, {"train.rl_steps": 125, "collect.every": 3, "collect.batch": 19}),  # 50 of 16 = 800, 42 of 19 = 798
        (300, 0, 75, {"train.rl_steps": 75}),
    ],
)
def test_other_numbers_of_updates_collect_as_many_dialogues(rl, every, updates, expected):
    cfg = config.override(config.Config(), {"train.rl_steps": rl, "collect.every": every, "collect.batch": 16})
    assert ablation_plan.paced(cfg, updates) == expected
    for rl_every, evaluations in ((50, 50 * updates / rl), (1, max(updates / rl, 1))):
        cfg.eval.rl_every = rl_every
        assert ablation_plan.paced(cfg, updates) == expected | {"eval.rl_every": round(evaluations)}


def test_the_small_table_names_everybody_and_leaves_gaps_for_what_is_not_there(tmp_path, monkeypatch):
    plan = ablations.make_plan("default")
    monkeypatch.setattr(plan.full.eval, "final_dialogues", 8)
    line = {
        "step": 9,
        **{f"true/{n}{end}": x for n in ("success", "return") for end, x in (("", 0.5), ("_low", 0.4), ("_high", 0.6))},
    }
    for name in (ablation_plan.start_of(plan.full, plan.rows["full"]), "full"):
        (tmp_path / name / "seed_0").mkdir(parents=True)
        (tmp_path / name / "seed_0" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    rows = ablations.small_table(plan, tmp_path).splitlines()[1:]
    names = ["logged assistants", "behaviour cloning", "greedy", "model-free", "full method", "upper bound"]
    assert [row[2:45].strip() for row in rows] == names
    assert rows[1].split(maxsplit=2)[2] == rows[4].split(maxsplit=2)[2] == "0.500 [ 0.400, 0.600]  0.500 [ 0.400, 0.600]"
    assert rows[2].split()[1:] == rows[3].split()[1:] == ["-", "-"]
    assert float(rows[5].split()[2]) > 0.5 > 0  # the oracle's success


def test_groups_and_names_are_selected_in_the_order_of_the_table(plan):
    assert ablations.select(plan, "6,5_none,1b_model_free") == [
        "full", "1b_model_free", "2_nll_1", "6_horizon_0", "6_horizon_1", "6_horizon_2", "6_horizon_end", "6_openings_0",
        "6_openings_100",
    ]  # fmt: skip
    assert ablations.select(plan, "1") == ["1_model_free", "1b_model_free"]
    assert ablations.select(plan, "all") == [name for name, runs in plan.runs.items() if name == runs]
    claimed = ablations.select(plan, "claims")
    main, quick = (ablations.select(plan, name) for name in ("main", "quick"))
    assert quick[:2] == ["full", "1b_model_free"] and len(quick) == 3 and set(main) < set(claimed)  # 8_none is full
    assert "8_all" in claimed and "9_adapter" not in claimed
    with pytest.raises(config.ConfigError, match="--rows=14 is no row: use all, main, quick, claims"):
        ablations.select(plan, "6,14")


# ---- command lines ----


def test_command_lines_are_configs(plan, tmp_path):
    stages = ablation_plan.command_lines(plan, ablations.select(plan, "all"), 1, tmp_path)
    fields = command_line.flatten(config.Config())
    for line in (line for stage in stages for line in stage):
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "experiments.dream"] and f"--variant={VARIANT}" in words
        given = [word.removeprefix("--config.").split("=", 1) for word in words if word.startswith("--config.")]
        assert {name for name, _ in given} <= set(fields) and ["cpu_devices", "1"] in given


def test_a_command_line_is_parsed_to_the_config_of_its_row(plan, tmp_path):
    _, (line,) = ablation_plan.command_lines(plan, ["7_real_25_anchors"], 1, tmp_path / "a b")
    program = (
        "import sys; from mbrl_lm import command_line as c; f = c.flatten(c.parse(sys.argv));"
        "print(f['imagine.share'], f['guard.anchors'], f['start'])"
    )
    done = subprocess.run([sys.executable, "-c", program, *shlex.split(line)[3:]], capture_output=True, text=True)
    assert done.stdout == f"(0.75, 0.75) True {tmp_path}/a b/start/seed_0\n", done.stderr


def test_likelihood_phases_are_shared_where_they_are_the_same(plan, tmp_path):
    names = ["full", "1b_model_free", "9_adapter", "12_joint", "11_greedy"]
    starts, rows = ablation_plan.command_lines(plan, names, 2, tmp_path)
    assert len(starts) == 6 and len(rows) == 10

    def flags(line):
        return dict(word.removeprefix("--").split("=", 1) for word in shlex.split(line)[3:])

    first = {flags(line)["workdir"]: flags(line) for line in starts}
    kinds = ["start", "start-model.roles=adapter", "start-returns.discount=0.0-signal=rating"]
    assert list(first) == [f"{tmp_path}/{kind}/seed_{seed}" for kind in kinds for seed in (0, 1)]
    one = first[f"{tmp_path}/start-model.roles=adapter/seed_1"]
    assert one["config.train.rl_steps"] == "0" and one["config.imagine.batch"] == "0" and one["config.collect.every"] == "0"
    assert one["config.model.roles"] == "adapter" and one["config.seed"] == "1" and "config.start" not in one
    begun = {flags(line)["workdir"].removeprefix(f"{tmp_path}/"): flags(line).get("config.start") for line in rows}
    assert begun["full/seed_1"] == begun["1b_model_free/seed_1"] == f"{tmp_path}/start/seed_1"
    assert begun["9_adapter/seed_0"] == f"{tmp_path}/start-model.roles=adapter/seed_0" and begun["12_joint/seed_0"] is None
    for k in (0, 1):  # with as many shards as seeds, each has the starts of its own rows
        assert {flags(line)["config.seed"] for line in (starts + rows)[k::2]} == {str(k)}


# ---- from metrics.jsonl to figures ----


def write_run(path, success, gap=0.1, started=True, finished=True, **figures):
    """A run whose evaluations have these successes: the likelihood phase, the beginning of RL, RL, the last one."""
    path.mkdir(parents=True)
    lines = [{"step": 5, "true/success": 0.9, "real_dialogues": 7}] if started else []
    lines += [{"step": 10, "loss/user": 1.0}]
    for i, x in enumerate(success):
        if i == 1:
            lines.append({"step": 12, "loss/user": 1.0, "train/real_return": 0.0})
        line = {"step": 10 + 10 * i, "true/success": x, "true/return": 2 * x, "real_dialogues": 100 + 20 * i, "gap/total": i}
        lines.append(line)
    lines[-1] |= {"gap/total": gap, "true/success_low": success[-1] - 0.1, "true/success_high": success[-1] + 0.1} | figures
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text("{}")
    (path / "commit.txt").write_text("a" * 40 + "\n" + "0123456789" * 4 + " + changes\n")
    if finished:
        (path / "results.json").write_text('{"wall_s": 120.0}')


def test_a_run_is_read_from_the_beginning_of_rl_to_its_last_evaluation(tmp_path):
    write_run(tmp_path / "r", [0.2, 0.4, 0.6, 0.5], gradient_steps=40)
    record = ablation_runs.read_run(tmp_path / "r")
    assert (record["true/success"], record["gap/total"], record["gradient_steps"]) == (0.5, 0.1, 40)
    assert record["gap/total@0"] == 0  # not that of the likelihood phase, nor a later one
    assert record["dialogues_to_threshold"] == 140  # not 7, where the likelihood phase was above it
    assert record["commit"] == "0123456 + changes" and record["wall_s"] == 120 and record["true/left"] is None


def test_a_run_that_begins_from_another_is_compared_with_its_end(tmp_path):
    write_run(tmp_path / "r", [0.4, 0.6, 0.5], started=False)
    write_run(tmp_path / "start", [0.2, 0.3], gap=0.75)
    record = ablation_runs.read_run(tmp_path / "r", tmp_path / "start")
    assert (record["gap/total@0"], record["dialogues_to_threshold"], record["true/success"]) == (0.75, 120, 0.5)
    evaluations = ablation_runs.evaluations_of(tmp_path / "r", tmp_path / "start")
    assert [line["true/success"] for line in evaluations] == [0.3, 0.4, 0.6, 0.5]
    (tmp_path / "r" / "metrics.jsonl").write_text("")
    assert ablation_runs.read_run(tmp_path / "r", tmp_path / "start") is None  # nothing of its own


def test_a_run_without_a_likelihood_phase_begins_with_its_first_evaluation():
    lines = [{"step": 2, "train/real_return": 0}, {"step": 3, "true/success": 0.25}, {"step": 9, "true/success": 0.5}]
    assert [line["step"] for line in ablation_runs.in_rl(lines)] == [3, 9]
    assert [line["step"] for line in ablation_runs.in_rl(lines[1:])] == [3, 9]


def test_the_first_dialogues_above_the_threshold_count():
    def to(*success):
        return ablation_runs.dialogues_to([{"true/success": x, "real_dialogues": i} for i, x in enumerate(success)], 0.5)

    assert [to(0.4, 0.5, 0.3), to(0.6, 0.2), to(0.4, 0.49)] == [1, 0, math.inf]


def test_unfinished_runs_are_not_counted(tmp_path):
    write_run(tmp_path / "full" / "seed_0", [0.2, 0.4], finished=False)
    write_run(tmp_path / "full" / "seed_10", [0.2, 0.4])
    write_run(tmp_path / "full" / "seed_9", [0.2, 0.4])
    with open(tmp_path / "full" / "seed_9" / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "true/succ')
    (tmp_path / "full" / "notes").mkdir()
    records, unfinished = ablation_runs.read_runs(tmp_path, {"full": "", "5_none": ""})
    assert list(records) == [("full", 9), ("full", 10)] and unfinished == ["full/seed_0"]
    for name in ("results.json", "config.json", "commit.txt"):  # only metrics.jsonl was kept
        (tmp_path / "full" / "seed_10" / name).unlink()
    record = ablation_runs.read_run(tmp_path / "full" / "seed_10")
    assert record["true/success"] == 0.4 and record["wall_s"] is None and record["commit"] == ""


# ---- statistics ----


def of(**rows):
    """Records of rows by name: success of seeds 0, 1, ...; None = no run."""
    return {
        (row, seed): {"true/success": x, "commit": "", "true/success_low": x - 1, "true/success_high": x + 1}
        for row, values in rows.items()
        for seed, x in enumerate(values)
        if x is not None
    }


def test_intervals_over_seeds():
    mean, low, high = ablation_runs.over_seeds(of(full=[0.5, 0.6, 0.7]), "full", "true/success")
    half = T2 * 0.1 / math.sqrt(3)  # the standard deviation is .1
    assert (mean, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert ablation_runs.over_seeds(of(full=[0.5]), "full", "true/success") == (0.5, -0.5, 1.5)  # its own
    assert ablation_runs.over_seeds({}, "full", "true/success") is None


def test_differences_are_paired_by_seed():
    records = of(a=[0.1, 0.5, 0.9, 0.3], b=[0.0, 0.3, 0.6, None])
    mean, seeds = ablation_runs.paired(records, "a", "b", "true/success")  # .1, .2, .3
    half = T2 * 0.1 / math.sqrt(3)
    assert seeds == 3 and mean == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert ablation_runs.paired(of(a=[0.1, None], b=[None, 0.2]), "a", "b", "true/success") is None


def test_one_seed_differs_by_an_interval_over_its_dialogues():
    records = of(a=[0.5, 0.9], b=[0.3, None])
    records["a", 0] |= {"true/success_low": 0.2, "true/success_high": 0.8}
    records["b", 0] |= {"true/success_low": -0.1, "true/success_high": 0.7}  # half the widths: .3, .4, and so .5
    assert ablation_runs.paired(records, "a", "b", "true/success") == (pytest.approx((0.2, -0.3, 0.7)), 1)
    del records["b", 0]["true/success_low"]
    assert ablation_runs.paired(records, "a", "b", "true/success") == ((pytest.approx(0.2), None, None), 1)


def test_numbers_are_short():
    assert [ablation_table.number(x) for x in (0.5, -0.0312, 1.5, -1.0)] == [".500", "-.031", "1.500", "-1.000"]
    assert ablation_table.written(ablation_runs.Mean(0.25, 0.125, 0.5)) == ".250 [.125, .500]"


@pytest.mark.parametrize(
    "claim, rows, expected",
    [
        (("difference", "b", 0.15), {"a": [0.5, 0.6, 0.7], "b": [0.3, 0.4, 0.5]},
         "a exceeds b in true/success by .200 [.200, .200] over 3 seeds (target .150): shown"),
        (("difference", "b", 0.25), {"a": [0.5, 0.6, 0.7], "b": [0.3, 0.4, 0.5]},
         "(target .250): shown, short of the target"),
        (("difference", "b", 0.15), {"a": [0.5, 0.6, 0.7], "b": [0.5, 0.4, 0.3]}, "(target .150): not shown"),
        (("difference", "b", 0.15), {"a": [0.3, 0.4], "b": [0.5, 0.6]}, "a differs from b in true/success by -.200..."),
        (("difference", "b", 0.15), {"a": [0.5, None], "b": [0.3, 0.4]}, "over 1 seed (target .150): needs more seeds"),
        (("difference", "b", 0.15), {"a": [0.5, None], "b": [None, 0.4]}, "a and b have no seed in common"),
        (("difference", "b", 0.15), {"a": [0.5]}, "no runs of b with true/success"),
        (("level", "", 0.8), {"a": [0.81, 0.83]}, "a has .820 [.693, .947] in true/success over 2 seeds (target .800): "
         "shown on average, within the spread of the seeds"),
        (("level", "", 0.8), {"a": [0.9, 0.9]}, "(target .800): shown"),
        (("level", "", 0.8), {"a": [0.7, 0.8]}, "(target .800): not shown"),
        (("ratio", "b", 0.9), {"a": [0.8, 0.9], "b": [0.8, 0.9]},
         "a has .850 and b .850 in true/success, a margin of .085..."),
        (("ratio", "b", 0.9), {"a": [0.8, 0.81], "b": [0.8, 0.81]}, "(target at least .900 times): shown"),
        (("ratio", "b", 0.9), {"a": [0.7, 0.7], "b": [0.8, 0.8]}, "(target at least .900 times): not shown"),
        (("ratio_below", "b", 0.5), {"a": [0.1, 0.1], "b": [0.3, 0.3]}, "(target at most .500 times): shown"),
        (("ratio_below", "b", 0.5), {"a": [0.2, 0.2], "b": [0.3, 0.3]}, "(target at most .500 times): not shown"),
        (("no_loss", "b", 0), {"a": [0.5, 0.7], "b": [0.6, 0.7]}, "over 2 seeds: no clear loss"),
        (("no_loss", "b", 0), {"a": [0.5, 0.6], "b": [0.6, 0.7]}, "over 2 seeds: a loss"),
    ],
)  # fmt: skip
def test_claims_become_sentences(claim, rows, expected):
    kind, against, target = claim
    runs = {"a": "a", "b": "b", "": ""}
    text = ablation_table.sentence(Claim("It works", "a", "true/success", kind, against, target), of(**rows), runs)
    told = expected.removesuffix("...")
    assert text.startswith("It works: ") and told in text and (text.endswith(told) or told != expected)


def test_claims_follow_rows_that_are_the_same():
    claim = Claim("It works", "alias", "true/success", "level", target=0.5)
    assert "alias has .600" in ablation_table.sentence(claim, of(a=[0.6, 0.6]), {"alias": "a"})


@pytest.mark.parametrize(
    "values, expects, verdict",
    [
        ([0.1, 0.2, 0.3], "lower", "lower, as it should"),
        ([0.1, 0.2, 0.3], "higher", "**lower**, should be: higher"),
        ([0.1, 0.2, 0.3], "", "lower"),
        ([0.8, 0.9, 1.0], "higher", "higher, as it should"),
        ([0.4, 0.8, 0.6], "lower", "**no clear difference**, should be: lower"),
        ([0.4, 0.8, 0.6], "no clear difference", "no clear difference, as it should"),
        ([0.4], "lower", "needs more seeds"),
    ],
)
def test_what_a_row_does_not_show_is_said(values, expects, verdict):
    line, records = Line("a", "g", "a", "s", expects), of(full=[0.5, 0.6, 0.7], a=values)
    assert ablation_table.measured(line, records, {"full": "full", "a": "a"})[1] == verdict


# ---- the page ----


@pytest.fixture
def finished(tmp_path):
    """Two seeds of the full method, of which one never reaches the threshold; one of model-free RL; where they began."""
    for seed in (0, 1):
        write_run(tmp_path / "start" / f"seed_{seed}", [0.1, 0.2], gap=0.5)
    more = {"user_nll/val": 0.75, "user_nll_floor/val": 0.5, "generated_tokens": 1234567, "true/left": 0.125}
    write_run(tmp_path / "full" / "seed_0", [0.2, 0.4, 0.6], **more)
    write_run(tmp_path / "full" / "seed_1", [0.2, 0.3, 0.4], **more)
    write_run(tmp_path / "1b_model_free" / "seed_0", [0.2, 0.3], gap=0.25)
    write_run(tmp_path / "5_oracle" / "seed_0", [0.2], finished=False)
    write_run(tmp_path / "9_shared" / "seed_0", [0.2, 0.9])  # of another preset, in which that was not the full method
    return tmp_path


def cells(page, name):
    """The line of a row in the first table, title -> cell."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    return dict(zip(lines[0], next(line for line in lines[2:] if line[0] == name), strict=True))


def test_the_table_and_its_csv_say_the_same(finished, plan, capsys):
    assert ablations.main(["ablations", f"--workdir={finished}", f"--variant={VARIANT}", "--table_only"]) == 0
    assert capsys.readouterr().out == f"the table is {finished}/ablations.md\n"
    page = (finished / "ablations.md").read_text()
    full = cells(page, "full")
    assert full["seeds"] == "2" and full["success"].startswith(".500 [-.771, 1.771]")  # t of 1 degree is 12.706; .1 x it
    assert (full["return"], full["user NLL - floor"], full["gap at step 0"]) == ("1.000 [-1.541, 3.541]", ".250", ".500")
    assert (full["generated tokens"], full["minutes"], full["left"]) == ("1,234,567", "2.0", ".125")
    assert full["to .600"] == "-" and full["injected"] == "-" and full["real dialogues"] == "140"
    alone = cells(page, "1b_model_free")
    assert alone["success"] == ".300 [.200, .400]" and alone["gap"] == ".250" and alone["user NLL - floor"] == "-"
    assert cells(page, "11_multi_step (= full)")["seeds"] == "2"
    assert "Not finished, and not counted: 5_oracle/seed_0." in page and "Commits: 0123456 + changes." in page
    assert (
        "- The model helps: full exceeds 1b_model_free in true/success by .300 over 1 seed (target .150): needs more seeds."
        in page
    )
    without = page.split("Rows without a finished run: ")[1].split(".\n")[0].split(", ")
    assert {"5_oracle", "11_greedy"} <= set(without) and not {"full", "12_supervised_start"} & set(without)
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")

    csv = finished / "ablations.csv"
    assert [line.split(",")[:3] for line in csv.read_text().splitlines()] == [
        ["row", "seed", "commit"],
        *[[row, seed, "0123456 + changes"] for row, seed in (("full", "0"), ("full", "1"), ("1b_model_free", "0"))],
    ]
    assert ablations.main(["ablations", f"--from_csv={csv}", f"--variant={VARIANT}"]) == 0
    told = capsys.readouterr().out
    assert told.split("\nNot finished")[0].strip() == page.split("\nNot finished")[0].strip()


def test_a_table_is_extended_by_a_csv(finished, tmp_path_factory, capsys):
    command = ["ablations", f"--variant={VARIANT}", "--table_only"]
    ablations.main([*command, f"--workdir={finished}"])
    other = tmp_path_factory.mktemp("other")
    write_run(other / "full" / "seed_1", [0.2, 0.8])
    ablations.main([*command, f"--workdir={other}", f"--from_csv={finished}/ablations.csv"])
    lines = [line.split(",") for line in (other / "ablations.csv").read_text().splitlines()[1:]]
    found = {(line[0], line[1]): line[3] for line in lines}
    assert found == {("full", "0"): "0.6", ("full", "1"): "0.8", ("1b_model_free", "0"): "0.3"}


def test_curves_are_means_over_seeds_where_all_have_a_point(finished):
    def lines(seed):
        return ablation_runs.evaluations_of(finished / "full" / f"seed_{seed}")

    def curve(*runs):
        return ablation_runs.curve(runs, "real_dialogues", "true/success")

    assert curve(lines(0), lines(1)) == [(100, 0.2), (120, pytest.approx(0.35)), (140, 0.5)]
    assert curve([lines(0)[-1], *lines(0)], lines(1)) == curve(lines(0), lines(1))  # a step that was judged twice
    assert curve(lines(0), lines(1)[:-1]) == [(100, 0.2), (120, pytest.approx(0.35))]


def test_a_group_of_curves_holds_the_full_method_and_each_of_its_rows():
    lines = [Line("full", "full", "full", ""), Line("5_none", "5", "2_nll", ""), Line("5_live", "5", "full", "")]
    lines += [Line("6_a", "6", "full", ""), Line("7_a", "7", "7_a", "")]
    found = ablation_table.curve_groups(lines, ["full", "2_nll"])
    assert found == {"5": {"full": "full", "5_none": "2_nll"}}
    assert ablation_table.curve_groups(lines, ["full"]) == {"full": {"full": "full"}}
    assert ablation_table.curve_groups(lines, []) == {}


# ---- the program ----


def test_commands_are_listed_in_stages_and_none_is_run(tmp_path, capsys):
    command = ["ablations", f"--workdir={tmp_path}/w", f"--variant={VARIANT}", "--list"]
    assert ablations.main([*command, "--rows=quick"]) == 0  # of one seed, as long as nothing else is asked for
    starts, rows = capsys.readouterr().out.strip().split("\n\n")
    assert len(starts.splitlines()) == 1 and len(rows.splitlines()) == 3
    command += ["--rows=full,1b_model_free,11_greedy,8_none,5_oracle"]
    assert ablations.main([*command, "--seeds=1"]) == 0
    starts, rows = capsys.readouterr().out.strip().split("\n\n")
    assert len(starts.splitlines()) == 2 and len(rows.splitlines()) == 4  # unguarded is the full method of this preset
    assert not (tmp_path / "w").exists()
    assert ablations.main([*command, "--seeds=3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 * 6 + 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--rows=quick"], "--workdir=DIR is missing"),
        (["--workdir=w", "--rows=14"], "--rows=14 is no row"),
        (["--workdir=w", "--variant=huge"], "--variant=huge is unknown"),
        (["--workdir=w", "--rws=6"], "Unknown command line flag 'rws'"),
        (["--workdir=w", "--seeds=0"], "flag --seeds=0"),
        (["--workdir=w", "more"], "'more' is not a flag"),
        (["--from_csv=not/there.csv"], "--from_csv=not/there.csv cannot be read"),
    ],
)
def test_mistakes_are_one_line(args, message, capsys):
    args = args if any(arg.startswith("--variant") for arg in args) else [*args, f"--variant={VARIANT}"]
    assert ablations.main(["ablations", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_csv_of_something_else_is_told(tmp_path, capsys):
    path = tmp_path / "x.csv"
    for text, message in (("row,seed\nfull,0\n", "line 2 is no line"), ("row,seed,commit\nnone,0,x\n", "has a row none")):
        path.write_text(text)
        assert ablations.main(["ablations", f"--from_csv={path}", f"--variant={VARIANT}"]) == 2
        assert message in capsys.readouterr().err


DREAM = """#!/bin/bash
# stands for Python with experiments.dream: a run that finishes at once, or waits
for word in "$@"; do case $word in --workdir=*) dir=${word#*=} ;; esac; done
echo begun >>"$dir/begun"
[[ ! -e $HOLD ]] || exec sleep 60
echo '{"step": 1, "true/success": 0.5, "real_dialogues": 7}' >"$dir/metrics.jsonl"
echo '{"wall_s": 60}' >"$dir/results.json"
"""
PROGRAM = "import sys; from experiments import ablations as a; "
PROGRAM += "a.command_lines = (lambda f: lambda *args: f(*args[:-1], sys.argv[1]))(a.command_lines); "
PROGRAM += "sys.exit(a.main(sys.argv[1:]))"


def test_runs_are_run_resumed_and_stopped(tmp_path):
    dream, hold = tmp_path / "dream", tmp_path / "hold"
    dream.write_text(DREAM)
    dream.chmod(dream.stat().st_mode | stat.S_IXUSR)
    command = [sys.executable, "-c", PROGRAM, str(dream), f"--workdir={tmp_path}/w", "--rows=full", "--seeds=2", "--jobs=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"HOLD": str(hold)}}

    hold.touch()
    process = subprocess.Popen([*command, f"--variant={VARIANT}"], **pipes)
    until = time.monotonic() + 30
    while not list(tmp_path.glob("w/*/*/begun")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and "stopped as asked" in out and "the table is" in out, err
    assert len(list(tmp_path.glob("w/*/*/begun"))) == 1

    hold.unlink()
    done = subprocess.run([*command, f"--variant={VARIANT}"], **pipes, timeout=30)
    assert done.returncode == 0, done.stderr
    assert cells((tmp_path / "w" / "ablations.md").read_text(), "full")["success"] == ".500 [.500, .500]"
    assert "start/seed_0" in done.stdout and done.stdout.count(" ok\n") == 4
