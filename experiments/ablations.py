"""The ablation table: what each part of the method does, at the same number of real dialogues, over several seeds.

    python -m experiments.ablations --rows=all --seeds=5 --workdir=W
    python -m experiments.ablations --rows=main --workdir=W             one seed of three rows, and a small table of them
    python -m experiments.ablations --rows=quick --workdir=W            one seed of four rows: is it the model, or imagining?
    python -m experiments.ablations --rows=6,7,3_placebo --workdir=W    by number or name
    python -m experiments.ablations --rows=all --workdir=W --list       the command lines alone, for other machines
    python -m experiments.ablations --workdir=W --table_only            the table again, from the runs' metrics.jsonl
    python -m experiments.ablations --from_csv=results/ablations.csv    the table again, from a CSV, on the standard output

Every run is one command line of experiments.dream and can be resumed; the same command goes on with what is left. Runs that
have their likelihood phase in common begin from one that did only that. On machines that share W, or where n divides the
number of seeds, so that each has the starts of its own runs: `python launch/sweep.py W/commands.txt --shard=i/n`.

The table is W/ablations.md, with W/ablations.csv (a line per row and seed) and W/curves.png. Where --from_csv is given
beside --workdir, it adds the rows and seeds that have no runs in W.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from mbrl_lm import ablation_plan, ablation_runs, ablation_table, config, presets, sweeps
from mbrl_lm.ablation_plan import Plan, Row, command_lines, paced, start_of, table_lines
from mbrl_lm.ablation_table import Claim
from mbrl_lm.config import Config, ConfigError

DATA = "concierge"
MAIN = ("full", "1b_model_free", "11_greedy")
QUICK = ("full", "1b_model_free", "5_none", "8_none")
CLAIMS = (
    Claim("The model helps", "full", "true/success", "difference", "1b_model_free", 0.15),
    Claim("Several turns beat the next one", "full", "true/success", "difference", "11_greedy", 0.2),
    Claim("The level, on seen types (or the next)", "full", "true/success/seen", "level", target=0.8),
    Claim("The level, of the true user's (or the last)", "full", "true/success/seen", "ratio", "5_oracle", 0.9),
    Claim("Guards halve the gap", "8_all", "gap/total", "ratio_below", "8_none", 0.5),
    Claim("Guards cost no success", "8_all", "true/success", "no_loss", "8_none"),
    Claim("A poor model: real dialogues first halve the gap", "13_real", "gap/total", "ratio_below", "13_none", 0.5),
    Claim("A poor model: at no cost of success", "13_real", "true/success", "no_loss", "13_none"),
)
# Where the preset has them off. Doubt about imagined replies is -.1 to 1 deviation on average, when RL begins.
GUARDS = {"penalty": 0.1, "truncation": 3.0, "discriminator": 0.1, "anchors": True}
USER_HEADS = 5  # the same
GUARD_ROWS = "8 guards"
FEW_LOGS = 300  # instead of 2,000: a model that RL exploits
OFF = {"guard.penalty": 0.0, "guard.truncation": 0.0, "guard.discriminator": 0.0, "guard.anchors": False}
NO_IMAGINATION = {"imagine.batch": 0, **OFF}
# Without imagination smaller steps do better: success .63 instead of .60 with the weights of the full method (five seeds).
SMALL_STEPS = {"loss.policy": 2.0, "loss.trust": 0.3, "loss.kl": 0.01}
NO_GOALS = {"model.belief": 0, "world_model.goals": 0}  # what users want is no variable of the model
MODEL_FREE = {**NO_IMAGINATION, **SMALL_STEPS, **NO_GOALS, "loss.user": 0.0}
START = {"train.rl_steps": 0, "collect.every": 0, **NO_IMAGINATION}  # the likelihood phase alone


# ---- the rows ----


def make_rows(full: Config) -> list[Row]:
    """All rows. Values that hang on the preset are computed from it; a row that does not differ from another one is not run.

    Args:
      full: the config of the full method.
    """
    return [
        Row("full", "full", {}, "the full method", tried=51),
        *_model_free(full),
        *_imagination(full),
        *_guards(full),
        *_network_and_gradient(full),
        *_signal_and_start(full),
        *_poor_model(full),
    ]


def _model_free(full: Config) -> list[Row]:
    quarter = paced(full, max(full.train.rl_steps // 4, 1))
    rl, nll = "1 model-free RL", "2 the user's words as well"
    rows = [
        Row("1_model_free", rl, MODEL_FREE | quarter, "real dialogues only, a quarter of the updates", start=NO_GOALS,
            expects="lower"),
        Row("1b_model_free", rl, MODEL_FREE, "the same with as many updates as the full method", start=NO_GOALS,
            expects="lower", tried=12),
    ]  # fmt: skip
    for loss in ("nll", "mae"):
        for weight in (0.01, 0.05, 0.2, 1.0):
            overrides = MODEL_FREE | {"loss.user": weight, "world_model.loss": loss}
            shows = f"user {loss.upper()} beside model-free RL, as a representation loss"
            rows.append(Row(f"2_{loss}_{weight:g}", nll, overrides, shows, start=NO_GOALS, against="1b_model_free"))
    adaptive = MODEL_FREE | {"loss.user": 1.0, "world_model.loss": "mae", "world_model.adaptive": True}
    placebo = MODEL_FREE | {"loss.user": 0.2, "world_model.shuffled": True}
    return [
        *rows,
        Row("2_mae_adaptive", nll, adaptive, "its weight falls as the return rises", start=NO_GOALS,
            against="1b_model_free"),
        Row("3_placebo", "3 placebo", placebo, "users' turns of other dialogues teach nothing of this one", start=NO_GOALS,
            expects="no clear difference", against="1b_model_free"),
        *(
            Row(f"4_tokens_{tokens}", "4 which user tokens", {"world_model.tokens": tokens}, f"{what} beside RL")
            for tokens, what in (("words", "what users say"), ("closing", "how they end a turn"), ("all", "both"))
        ),
    ]  # fmt: skip


def _imagination(full: Config) -> list[Row]:
    who, far, share = "5 imagined user", "6 horizon and prompts", "7 real share"
    untold = {"model.belief": 0}
    rows = [
        Row("5_none", who, NO_IMAGINATION, "the model tells what the user may want, and never imagines", expects="lower"),
        Row("5_frozen", who, {"imagine.user": "frozen"}, "imagined user as it was when RL began"),
        Row("5_live", who, {"imagine.user": "live"}, "imagined user refreshed in every update"),
        Row("5_population", who, {"imagine.user": "population"}, "drawn from past users: harder to exploit"),
        Row("5_untold", who, untold, "it wants one of the places, and the policy is not told which are likely", start=untold,
            expects="lower"),
        Row("5_no_goals", who, NO_GOALS, "it does not keep to one of the places, but to its own words", start=NO_GOALS,
            expects="lower"),
        Row("5_no_goals_live", who, NO_GOALS | {"imagine.user": "live"}, "the same, refreshed in every update",
            start=NO_GOALS, expects="lower"),
        Row("5_oracle", who, {"imagine.user": "oracle", **OFF}, "the true user imagines: what a perfect model is worth",
            expects="higher"),
    ]  # fmt: skip
    replies = {"0": 0, "1": 1, "2": 2, "4": 4, "end": full.turns - 1}
    for name, count in replies.items():
        shows = f"{count} imagined {'reply' if count == 1 else 'replies'}, then the value"
        rows.append(Row(f"6_horizon_{name}", far, {"imagine.replies": count}, shows))
    for percent, shows in ((0, "prompts from all assistant points alike"), (100, "prompts from openings alone")):
        rows.append(Row(f"6_openings_{percent}", far, {"imagine.openings": percent / 100}, shows))
    for imagined in (0.0, 0.5, 0.75, 0.9, 1.0):
        real = f"{1 - imagined:.0%}"
        for anchors in (False, True) if imagined else (False,):
            name = f"7_real_{real[:-1]}" + ("_anchors" if anchors else "")
            shows = f"{real} of the policy gradient from real dialogues" + (", imagined returns anchored" if anchors else "")
            rows.append(Row(name, share, {"imagine.share": (imagined, imagined), "guard.anchors": anchors}, shows))
    return rows


def _guards(full: Config) -> list[Row]:
    group = GUARD_ROWS
    on, heads = _guarded(full), _heads(full)
    rows = [Row("8_none", group, OFF, "the gap of an unguarded policy", expects="higher", figure="gap/total")]
    for name, value in on.items():
        asks = heads if name in ("guard.penalty", "guard.truncation") else {}
        rows.append(Row(name.replace("guard.", "8_"), group, OFF | {name: value} | asks, "a smaller gap, alone", start=asks,
                        expects="lower", figure="gap/total", against="8_none"))  # fmt: skip
    return [*rows, Row("8_all", group, on | heads, "half the gap of no guard, at no loss of success", start=heads,
                       expects="lower", figure="gap/total", against="8_none")]  # fmt: skip


def _guarded(full: Config) -> dict[str, Any]:
    """All guards on, those that the preset has off as in GUARDS."""
    return {f"guard.{name}": getattr(full.guard, name) or value for name, value in GUARDS.items()}


def _heads(full: Config) -> dict[str, int]:
    """An ensemble, which doubt is read off."""
    return {"model.user_heads": full.model.user_heads or USER_HEADS}


def _poor_model(full: Config) -> list[Row]:
    few = {"logs": min(FEW_LOGS, full.logs)}
    group, start = "13 guards of a poor model", few | _heads(full)
    near, real = {"loss.kl": 10 * full.loss.kl}, {"imagine.share": (0.3, 0.3)}
    rows = [
        Row("13_model_free", group, MODEL_FREE | few, "as few logs, and no model", start=NO_GOALS | few, against="13_none"),
        Row("13_none", group, OFF | start, "imagined users who like what true ones do not", start=start),
    ]
    for name, overrides, shows, tried in (
        ("kl", near, "ten times the KL to where RL began", 1),
        ("real", real, "real dialogues have the larger share of the policy gradient", 6),
        ("kl_real", near | real, "both", 1),
        ("live", {"imagine.user": "live"}, "imagined user refreshed in every update", 1),
        ("anchors", {"guard.anchors": True}, "imagined returns mapped to real ones", 1),
        ("all", _guarded(full), "the guards of 8_all", 1),
    ):
        rows.append(Row(f"13_{name}", group, OFF | start | overrides, shows, start=start, expects="lower",
                        figure="gap/total", against="13_none", tried=tried))  # fmt: skip
    return rows


def _network_and_gradient(full: Config) -> list[Row]:
    weights, how = "9 weights of the speakers", "10 the policy gradient"
    whose = {
        "shared": "one network for both speakers",
        "adapter": "one trunk, and a bottleneck for each speaker",
        "separate": "a trunk for each speaker",
    }
    baselines = {
        "value": "the learned value",
        "mean": "the mean of recent returns",
        "leave_one_out": "the other candidates of a prompt",
        "normalised": "candidates, over their spread",
    }
    compared = {"imagine.candidates": 4}
    rows = []
    for roles, shows in whose.items():
        overrides = {"model.roles": roles}
        rows.append(Row(f"9_{roles}", weights, overrides, shows, start=overrides))
    for baseline, shows in baselines.items():
        overrides = {"policy.baseline": baseline} | (compared if baseline in config.GROUPED else {})
        rows.append(Row(f"10_{baseline}", how, overrides, f"baseline: {shows}"))
    rows.append(Row("10_vtrace", how, {"returns.vtrace": True}, "real dialogues count as far as they would be followed"))
    epochs = 2  # with half the updates: as many gradient steps
    ppo = {"policy.loss": "ppo", "train.rl_epochs": epochs} | paced(full, max(full.train.rl_steps // epochs, 1))
    rows += [
        Row("10_ppo", how, ppo, "clipped ratios, two gradient steps on each batch"),
        Row("10_awr", how, {"policy.loss": "awr"}, "likelihood weighted by the exponential of the advantage"),
        Row("10_cloning", how, {"policy.loss": "cloning"}, "likelihood of what did better than expected"),
    ]
    for count in (1, 5):
        overrides = {"model.value_heads": count}
        rows.append(Row(f"10_value_heads_{count}", how, overrides, f"value heads: {count}", start=overrides))
    return rows


def _signal_and_start(full: Config) -> list[Row]:
    signal_, begin = "11 what is maximised", "12 how it begins"
    greedy, outcome = {"signal": "rating", "returns.discount": 0.0}, {"signal": "outcome"}
    # Nothing comes before RL: it gets all the updates, at the rate of the likelihood phase, and learns to speak in it.
    scratch = {"train.supervised_steps": 0, "train.rl_learning_rate": full.train.learning_rate}
    scratch |= {"imagine.user": "live", **NO_GOALS}  # goals, and who imagines, are found in the likelihood phase
    scratch |= paced(full, full.train.supervised_steps + full.train.rl_steps)
    joint = scratch | {"loss.assistant": 1.0}
    alone = MODEL_FREE | scratch | {"loss.assistant": 0.0}
    return [
        Row("11_greedy", signal_, greedy, "the rating of each reply, discount 0", start=greedy, expects="lower"),
        Row("11_multi_step", signal_, {}, "the return of the dialogue"),
        Row("11_outcome", signal_, outcome, "a reward at the end only", start=outcome),
        Row("12_supervised_start", begin, {}, "likelihood first, then RL"),
        Row("12_joint", begin, joint, "likelihood and RL together, from the first update", start=None),
        Row("12_rl_only", begin, alone, "RL alone, of real dialogues, from nothing", start=None, expects="lower"),
        Row("N1_user_gradient", "N1 negative control", {"control": "user_gradient", "imagine.user": "live"},
            "a policy gradient on imagined user turns makes users pleasant, not the policy good",
            expects="higher", figure="gap/total", against="5_live"),
        Row("N2_predictability", "N2 negative control", {"control": "predictability"},
            "a reward for predictable users is earned without helping them", expects="lower"),
    ]  # fmt: skip


def make_plan(variant: str) -> Plan:
    """The rows of a variant.

    Raises:
      ConfigError: there is no such variant, or a row's config contradicts itself.
    """
    full = presets.preset(DATA, variant)
    return ablation_plan.make_plan(variant, full, make_rows(full), START)


def select(plan: Plan, which: str) -> list[str]:
    """The rows with runs that `all`, `main`, `quick`, `claims`, or names and numbers of groups stand for.

    Raises:
      ConfigError: there is no such row.
    """
    claimed = {name for claim in CLAIMS for name in (claim.row, claim.against) if name}
    claimed |= {name for name, row in plan.rows.items() if row.group == GUARD_ROWS}
    return ablation_plan.select(plan, which, {"main": MAIN, "quick": QUICK, "claims": claimed})


# ---- the table ----


def write_table(plan: Plan, workdir: pathlib.Path, before: ablation_runs.Records) -> pathlib.Path:
    """Writes ablations.csv, ablations.md and curves.png.

    Args:
      plan: the rows.
      workdir: where the runs are, and the table is put.
      before: records of runs that are not there.
    """
    lines = table_lines(plan)
    own = {line.name: line.start for line in lines if line.runs == line.name}
    found, unfinished = ablation_runs.read_runs(workdir, own)
    records = before | found
    order = list(plan.rows)
    records = {key: records[key] for key in sorted(records, key=lambda key: (order.index(key[0]), key[1]))}
    ablation_runs.write_csv(workdir / "ablations.csv", records)
    page = ablation_table.markdown(lines, records, CLAIMS, unfinished)
    if ablation_table.plot(workdir / "curves.png", workdir, lines, found):
        page += "\n![learning curves](curves.png)\n"
    (workdir / "ablations.md").write_text(page, encoding="utf-8")
    return workdir / "ablations.md"


def small_table(plan: Plan, workdir: pathlib.Path) -> str:
    """Who does how well with the true user, of the first seed: scripted assistants as a scale, and the rows of MAIN."""
    from mbrl_lm import yardsticks  # imports jax, which nothing else here needs
    from mbrl_lm.envs.concierge import TEST_UIDS

    scripted = yardsticks.with_true_user(plan.full, TEST_UIDS[: plan.full.eval.final_dialogues])
    start = workdir / (start_of(plan.full, plan.rows["full"]) or "")

    def judged(directory: pathlib.Path) -> Mapping[str, float]:
        lines = [x for x in ablation_runs.read_lines(directory / "seed_0" / "metrics.jsonl") if "true/success" in x]
        return lines[-1] if lines else {}

    def of_script(name: str) -> Mapping[str, float]:
        return {key.replace(f"scripted/{name}/", "true/"): x for key, x in scripted.items()}

    shown = {
        "logged assistants": of_script("logs"),
        "behaviour cloning": judged(start),
        **{says: judged(workdir / plan.runs[name]) for name, says in
           (("11_greedy", "greedy"), ("1b_model_free", "model-free"), ("full", "full method"))},
        "upper bound": of_script("oracle"),
    }  # fmt: skip
    head = f"with the true user, held-out types included: {'success':>21} {'return':>22}\n"
    lines = [f"  {says:<43}{_figure(x, 'true/success')} {_figure(x, 'true/return')}\n" for says, x in shown.items()]
    return head + "".join(lines)


def _figure(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return f"{'-':>22}"
    return f"{figures[name]:6.3f} [{figures[name + '_low']:6.3f},{figures[name + '_high']:6.3f}]"


def _read_csv(plan: Plan, path: str) -> ablation_runs.Records:
    try:
        records = ablation_runs.read_csv(pathlib.Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--from_csv={path} cannot be read: {error}") from error
    unknown = sorted({row for row, _ in records} - set(plan.rows))
    if unknown:
        raise ConfigError(f"--from_csv={path} has a row {unknown[0]} that is not in experiments/ablations.py")
    return records


# ---- the command line ----


def make_flags() -> flags.FlagValues:
    """The flags of this program."""
    own = sweeps.make_flags()
    flags.DEFINE_string("rows", "all", "all, main, quick, claims, or names of rows and numbers of groups", flag_values=own)
    flags.DEFINE_integer("seeds", None, "seeds 0, 1, ...: how many (5; main, quick: 1)", lower_bound=1, flag_values=own)
    return own


def main(argv: Sequence[str]) -> int:
    return sweeps.main(argv, make_flags(), __doc__, _main)


def _main(own: flags.FlagValues) -> int:
    plan = make_plan(own.variant)
    names = select(plan, own.rows)
    before = _read_csv(plan, own.from_csv) if own.from_csv else {}
    if not own.workdir:
        if not before:
            raise ConfigError("--workdir=DIR is missing: it names the directory of the runs and their table")
        sys.stdout.write(ablation_table.markdown(table_lines(plan), before, CLAIMS))
        return 0
    workdir, seeds = pathlib.Path(own.workdir), own.seeds or (1 if own.rows in ("main", "quick") else 5)

    def stages(python: str) -> sweeps.Stages:
        return command_lines(plan, names, seeds, workdir, python)

    if own.list:
        sys.stdout.write(sweeps.text(stages("python")))
        return 0
    status = 0
    workdir.mkdir(parents=True, exist_ok=True)
    if not own.table_only:
        status = sweeps.run(stages(sys.executable), workdir, own.jobs)
    if own.rows == "main":
        sys.stdout.write(small_table(plan, workdir))
    sys.stdout.write(f"the table is {write_table(plan, workdir, before)}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
