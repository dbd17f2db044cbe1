"""The main job from the outside, on a tiny scale: what a run leaves behind, stopping and resuming, other data, mistakes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from fakes import one_device, write_deals

from mbrl_lm import config, learner, nn, sharding, tokenizer
from mbrl_lm.checkpoint import Checkpoints, saved_steps
from mbrl_lm.replay import Replay

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {  # smaller than `tiny`: three updates by likelihood, then five by return
    "cpu_devices": 2,
    "train.batch": 4,
    "train.supervised_steps": 3,
    "train.rl_steps": 5,
    "imagine.batch": 4,
    "eval.every": 3,
    "eval.dialogues": 4,
    "eval.final_dialogues": 6,
    "checkpoint_every": 4,
    "log_every": 1,
}
CONCIERGE = SMALL | {"eval.rl_every": 2, "logs": 48, "val_logs": 8, "collect.batch": 4, "collect.capacity": 6}
NEGOTIATION = SMALL | {
    "data": "deal_or_no_deal",
    "train.supervised_steps": 2,
    "train.rl_steps": 2,
    "turns": 6,
    "turn_tokens": 12,
    "tokenizer.min_count": 1,
    "partner.share": 0.3,
    "partner.steps": 2,
    "partner.model.layers": 1,
    "partner.model.width": 24,
    "partner.model.mlp_width": 32,
}
CHAT = {"data": "chat_jsonl", "cpu_devices": 2, "tokens": 96, "train.batch": 4, "train.supervised_steps": 4, "eval.every": 3}


def start(workdir, flags, program="dream") -> subprocess.Popen:
    """`python -m experiments.dream --variant=tiny`, or another program, with these fields of the config."""
    env = {name: x for name, x in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-m", f"experiments.{program}", f"--workdir={workdir}"]
    command += ["--variant=tiny"] if program == "dream" else []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *(f"--config.{k}={v}" for k, v in flags.items())], cwd=ROOT, env=env, **pipes)


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def run(workdir, flags, program="dream") -> str:
    """Runs to the end and returns what was said on stdout."""
    code, out, err = finish(start(workdir, flags, program))
    assert code == 0, err
    return out


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def results(workdir) -> dict[str, float]:
    return json.loads((workdir / "results.json").read_text())


# ---- a whole run ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (its directory, what it said)."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    return workdir, run(workdir, CONCIERGE)


def test_a_run_leaves_its_results_behind(whole):
    workdir, said = whole
    figures = results(workdir)
    named = ("word_ppl/val", "user_nll/val", "true/success", "true/return", "true/success_low", "true/success_high")
    named += ("imagined/return", "gap/total", "gap/user_model", "gap/reward_model", "wall_s")
    assert not [name for name in named if not isinstance(figures.get(name), float)]
    assert (figures["gradient_steps"], figures["real_dialogues"]) == (8, 48 + 3 * 4)  # collected at updates 4, 6 and 8
    assert figures["gap/total"] == pytest.approx(figures["gap/user_model"] + figures["gap/reward_model"])
    page = (workdir / "report.md").read_text()
    assert f"the report is {workdir / 'report.md'}" in said and "held-out user, nats per token" in said
    assert "| gap/total |" in page and "<to_assistant>" in page and (workdir / "curves.png").stat().st_size > 5000
    assert json.loads((workdir / "config.json").read_text())["collect.capacity"] == 6
    assert "embed_VD" in (workdir / "params.txt").read_text() and (workdir / "commit.txt").exists()
    samples = (workdir / "samples.txt").read_text()
    assert [line for line in samples.splitlines() if line.startswith("===")] == [f"=== step {n}" for n in (3, 4, 6, 8)]
    assert samples.count("<bos>") == 4 * 2
    (events,) = (workdir / "tensorboard").iterdir()
    assert events.stat().st_size > 1000
    assert saved_steps(workdir / "checkpoints") == [4, 8]


def test_a_finished_run_is_judged_by_the_exact_user(whole, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "w")
    before = results(workdir)
    ahead = {"plan": "rollouts", "planner.candidates": 2, "planner.futures": 1, "planner.depth": 1}
    said = run(workdir, {"eval.final_dialogues": 6, "eval.user_dialogues": 6} | ahead, "evaluate")
    after = results(workdir)
    assert {name: after[name] for name in before} == before, "the same policy with the same users scores the same"
    named = ("true/success/seen", "imagined/true_return", "drift/policy_under_reference", "scripted/oracle/success")
    named += ("fooled/pleaser/learned_user_true_reward", "user/recorded/kl_enumerated", "user/policy/kl")
    named += ("user/recorded/ece/leaves", "user/policy/hazard_true/turn_1", "user/recorded/action_sensitivity")
    named += ("user/recorded/discriminator_auc", "user/recorded/distinct_2/imagined", "user/recorded/turn_nll/hidden_1")
    assert not [name for name in named if not isinstance(after.get(name), float)]
    assert after["user/recorded/nll"] > after["user/recorded/nll_floor"] > 0.3
    assert after["user_nll/val"] == pytest.approx(after["user/recorded/nll"], rel=0.2)
    gain = after["plan/true/return"] - before["true/return"]
    assert after["plan/gain"] == pytest.approx(gain, abs=1e-5) and after["plan/tokens_a_turn"] > 2
    assert "The same with its turns planned" in said and "seconds a turn" in said
    assert "The learned user" in said and "learned user, learned reward" in said
    assert "evaluation.png" in (workdir / "evaluation.md").read_text() and (workdir / "evaluation.png").exists()


def test_a_run_that_goes_on_is_judged_on_the_page_only(whole, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "w")
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "checkpoints")
    code, out, err = finish(start(workdir, {}, "evaluate"))
    assert code == 2 and "no checkpoint yet" in err and not (workdir / "results.json").exists()


def test_the_metrics_of_a_run(whole):
    rows = lines(whole[0])
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    assert [row["real_dialogues"] for row in rows if "real_dialogues" in row] == [48, 52, 56, 60]
    assert all(("loss/policy_imagined" in row) == (row["step"] > 3) for row in rows if "gradient_norm" in row)
    assert all(x is not None for row in rows for x in row.values())
    final, figures = rows[-1], results(whole[0])
    assert all(final[name] == pytest.approx(figures[name], rel=1e-6) for name in final if name != "step")


def test_figures_are_collected_from_the_runs(whole):
    done = subprocess.run([sys.executable, ROOT / "results" / "collect.py", whole[0]], capture_output=True, text=True)
    table = [line.split(",") for line in done.stdout.splitlines()]
    assert table[0] == ["data", "variant", "seed", "commit", "figure", "value"]
    assert {row[4]: float(row[5]) for row in table[1:]} == pytest.approx(results(whole[0]), rel=1e-5)
    assert {tuple(row[:3]) for row in table[1:]} == {("concierge", "tiny", "0")}


def test_a_finished_run_says_so_and_does_nothing(whole):
    workdir, _ = whole
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "config.json"}
    assert run(workdir, CONCIERGE) == f"this run is finished: its report is {workdir / 'report.md'}\n"
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "config.json"}
    assert {k: v for k, v in after.items() if k.is_file()} == {k: v for k, v in before.items() if k.is_file()}


# ---- stopped and resumed ----


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The same run, stopped by a signal in its sixth update and resumed: (its directory, what it said when it stopped)."""
    workdir = tmp_path_factory.mktemp("resumed") / "w"
    process = start(workdir, CONCIERGE)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 6' in metrics.read_text()):
        time.sleep(0.02)  # then it is evaluated, which takes longer than the signal
    process.send_signal(signal.SIGTERM)
    code, said, err = finish(process)
    assert code == 0, err
    assert saved_steps(workdir / "checkpoints") == [4, 6] and not (workdir / "results.json").exists()
    run(workdir, CONCIERGE)
    return workdir, said


def test_a_signal_stops_a_run_after_its_step(resumed):
    assert resumed[1].endswith("stopped as asked; the same command resumes\n")


def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_one(whole, resumed):
    for name in ("metrics.jsonl", "samples.txt", "params.txt", "tokenizer.model"):
        assert (resumed[0] / name).read_bytes() == (whole[0] / name).read_bytes(), name
    clock = {"wall_s": 0}
    assert results(resumed[0]) | clock == results(whole[0]) | clock


def last_checkpoint(workdir, at=8):
    """Everything in the newest checkpoint: the train state and the replay."""
    cfg = config.Config()
    saved = json.loads((workdir / "config.json").read_text())
    config.override(cfg, {name: x for name, x in saved.items() if name != "variant"})
    net = nn.make_net(cfg.model, tokenizer.load(str(workdir / "tokenizer.model")).vocab_size)
    init = learner.initialiser(cfg, net)
    shapes = sharding.abstract(jax.eval_shape(init, jax.random.key(0)), one_device())
    with Checkpoints(workdir / "checkpoints", 3) as checkpoints:
        step, state, arrays, meta = checkpoints.restore(shapes, Replay(cfg.collect.capacity, cfg.tokens, cfg.turns).arrays())
    assert step == at and meta["wall_s"] > 0
    return state, arrays


def test_a_resumed_run_ends_with_the_parameters_and_the_replay_of_an_uninterrupted_one(whole, resumed):
    (state_a, replay_a), (state_b, replay_b) = map(last_checkpoint, (whole[0], resumed[0]))
    assert int(state_a.step) == 8 and int(replay_a["collected"]) == 12
    leaves = zip(jax.tree.leaves((state_a, replay_a)), jax.tree.leaves((state_b, replay_b)), strict=True)
    assert all((a == b).all() for a, b in leaves)


def test_another_config_is_refused_by_name(whole):
    code, out, err = finish(start(whole[0], CONCIERGE | {"imagine.replies": 2}))
    assert (code, out) == (2, "")
    assert "imagine.replies was 4 and is 2" in one_line(err)


# ---- begun where another run stopped ----


def test_a_run_begun_with_anothers_likelihood_phase_is_the_run_that_learnt_it_itself(whole, tmp_path):
    run(tmp_path / "start", CONCIERGE | {"train.rl_steps": 0, "checkpoint_every": 100, "loss.kl": 0.7})
    state, _ = last_checkpoint(tmp_path / "start", at=3)
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.target), strict=True)
    assert all((a == b).all() for a, b in leaves), "it ends with the average of its parameters"
    workdir, seconds = tmp_path / "w", results(tmp_path / "start")["wall_s"]
    run(workdir, CONCIERGE | {"start": tmp_path / "start"})
    own, others = ([row for row in lines(path) if row["step"] > 3] for path in (workdir, whole[0]))
    assert own == others and len(own) == 8
    (state_a, replay_a), (state_b, replay_b) = map(last_checkpoint, (whole[0], workdir))
    leaves = zip(jax.tree.leaves((state_a, replay_a)), jax.tree.leaves((state_b, replay_b)), strict=True)
    assert all((a == b).all() for a, b in leaves)
    assert results(workdir) | {"wall_s": 0} == results(whole[0]) | {"wall_s": 0}
    assert results(workdir)["wall_s"] > seconds / 2


# ---- other data ----


def test_users_with_goals(tmp_path):
    """Likelihood, imagination, the judge and the report, and the same with a planner that imagines such users."""
    flags = {"world_model.goals": 4, "places": "(3,4)", "train.rl_steps": 2, "eval.dialogues": 2, "eval.final_dialogues": 4}
    run(tmp_path / "w", CONCIERGE | flags)
    before = results(tmp_path / "w")
    assert before["gradient_steps"] == 5 and 0 < before["user_nll/val/goals"] < 2 * before["user_nll/val"]
    ahead = {"plan": "rollouts", "planner.candidates": 2, "planner.futures": 1, "planner.depth": 1}
    run(tmp_path / "w", {"eval.final_dialogues": 4, "eval.user_dialogues": 4} | ahead, "evaluate")
    after = results(tmp_path / "w")
    assert {name: after[name] for name in before} == before and after["user/recorded/kl"] > 0


def test_negotiations(tmp_path):
    deals = write_deals(tmp_path / "deals")
    distilled = {"plan": "rollouts", "loss.distil": 0.5, "planner.candidates": 2, "planner.futures": 1, "planner.depth": 1}
    run(tmp_path / "w", NEGOTIATION | {"data_dir": deals} | distilled)
    assert "loss/distil" in lines(tmp_path / "w")[-2]
    figures = results(tmp_path / "w")
    named = ("partner/score_a", "partner/score_b", "partner/agreed", "partner/pareto", "partner/turns", "split_accuracy/val")
    named += ("true/return", "imagined/return", "gap/total", "outcome_nll/val", "word_ppl/val", "user_nll/val")
    named += ("split_accuracy/val/whole",)
    assert not [name for name in named if not isinstance(figures.get(name), float)]
    assert figures["true/return"] == figures["partner/score_a"] and 0 <= figures["partner/agreed"] <= 100
    assert figures["gap/total"] == pytest.approx(figures["gap/user_model"] + figures["gap/reward_model"])
    assert 60 < figures["real_dialogues"] < 120 and "true/success" not in figures  # the partner learns from the others
    assert 0 < figures["logs/return"] < 10
    assert "<to_outcome>" in (tmp_path / "w" / "report.md").read_text()


# ---- mistakes ----


def one_line(err: str) -> str:
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def write_chats(raw_dir):
    raw_dir.mkdir()
    chats = [
        [
            ("user", f"hello , can you help me with number {i} ?"),
            ("assistant", f"yes , number {i} is easy ."),
            ("user", "thank you"),
        ]
        for i in range(40)
    ]
    text = [json.dumps({"turns": [{"role": role, "text": said} for role, said in chat]}) + "\n" for chat in chats]
    (raw_dir / "train.jsonl").write_text("".join(text))
    return raw_dir


def test_each_mistake_is_one_line_and_the_corrected_command_works_in_the_same_directory(tmp_path):
    chats, workdir = write_chats(tmp_path / "chats"), tmp_path / "w"
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train.jsonl").write_text((chats / "train.jsonl").read_text() + '{"turns": [{"role": "user"}]}\n')
    good = CHAT | {"data_dir": chats}
    mistakes = (
        (good | {"data_dir": bad}, "train.jsonl, line 41: no field 'text'"),
        (good | {"data_dir": tmp_path / "absent"}, "absent is not a directory"),
        (good | {"model.heads": 3}, "model.heads must divide model.width"),
        (good | {"model.wdth": 8}, "there is no field --config.model.wdth; the nearest one is --config.model.width"),
    )
    for process, (_, message) in zip([start(workdir, flags) for flags, _ in mistakes], mistakes, strict=True):
        code, _, err = finish(process)
        assert code == 2 and message in one_line(err)
    assert "held-out perplexity per word" in run(workdir, good)
    figures = results(workdir)
    assert figures["gradient_steps"] == 4 and figures["word_ppl/val"] > 1 and "user_nll/val/open_loop_1" in figures
    assert not [name for name in figures if name.startswith(("true/", "gap/", "imagined/"))]
    assert "hello , can you help me" in (workdir / "samples.txt").read_text()
    assert (workdir / "report.md").exists()
