"""The table of Lewis et al. (2017), Deal or No Deal, reproduced beside turn-level actor-critic in imagination.

    python -m experiments.negotiate --workdir=W --data_dir=DIR --rows=all --seeds=5
    python -m experiments.negotiate --workdir=W --data_dir=DIR --rows=likelihood,ours     some rows, and what they begin with
    python -m experiments.negotiate --workdir=W --data_dir=DIR --split=test               on the contexts of test.txt
    python -m experiments.negotiate --workdir=W --data_dir=DIR --list                     the command lines alone
    python -m experiments.negotiate --workdir=W --table_only                              the table again
    python -m experiments.negotiate --from_csv=results/negotiations.csv                   the same from a CSV

Stages of command lines, each of which can be resumed: the likelihood model and the partner p2, then policies by return, then
every row's match with every partner (experiments.match). The table is W/negotiations.md, with W/negotiations.csv.
"""

import copy
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from mbrl_lm import contradictions, negotiation_table, presets, sweeps
from mbrl_lm.config import ConfigError, override
from mbrl_lm.negotiation_table import Line

DATA = "deal_or_no_deal"
PARTNERS = {  # as in experiments.match
    "p1": "LIKELIHOOD",
    "p2": "other net, other scenarios",
    "hard": "script, demands much",
    "agreeable": "script, gives in",
    "self": "itself",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One negotiator: the run that it was trained by, and how it chooses its turns."""

    name: str
    run: str
    shows: str
    plan: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# ---- what is trained ----

SELF_PLAY = {  # whole negotiations with a copy of the model in the other seat, both at the temperature of the table
    "imagine.sides": 2,
    "imagine.share": (1.0, 1.0),
    "imagine.batch": 32,
    "imagine.temperature": 0.5,
    "train.rl_batch": 8,
    "train.rl_steps": 800,
    "train.rl_learning_rate": 8e-4,
    "train.value_rate": 5.0,
    "loss.policy": 20.0,
    "loss.value": 0.05,  # the critic begins far off: ten times that, and its gradient leaves the policy none of the step
    "loss.value_real": 0.05,
    "loss.reward": 0.0,
    "loss.end": 0.01,
    "loss.assistant": 0.5,
    "returns.scale_floor": 10.0,  # the points of a negotiation
}
OURS = SELF_PLAY | {"imagine.generosity": 0.4, "imagine.waste": 1.0}  # what a deal leaves to the other side counts
RUNS = {  # by the name of their directory
    "likelihood": {"train.rl_steps": 0, "imagine.batch": 0, "eval.dialogues": 0},
    # As in the paper: REINFORCE on points less their mean, fading by token, against the frozen model, beside supervision.
    "rl": SELF_PLAY
    | {
        "imagine.user": "frozen",
        "policy.baseline": "mean",
        "returns.discount": 1.0,
        "returns.lambda_": 1.0,
        "returns.token_discount": 0.95,
        "loss.kl": 0.0,
        "loss.value": 0.0,
        "loss.value_real": 0.0,
    },
    "ours": OURS | {"imagine.user": "frozen"},
    # Partners who have not learnt to bargain, and more and more of those who have; a step stays near the last ones.
    "ours_guards": OURS
    | {
        "imagine.user": "population",
        "imagine.population": 8,
        "imagine.refresh": 100,
        "loss.trust": 0.3,
    },
}
ROLLOUTS = {  # ten candidates, five roll-outs of each to the end, points times the probability of the outcome
    "plan": "rollouts",
    "planner.candidates": 10,
    "planner.futures": 5,
    "planner.depth": 16,
    "planner.future_tokens": 64,
    "planner.reward": "sure_split",
}
BELIEF = ROLLOUTS | {"planner.sides": 2}  # the same with partners whose values are drawn from what they have said
ROWS = (
    Row("likelihood", "likelihood", "what people would say"),
    Row("rl", "rl", "REINFORCE on self-play, as in the paper"),
    Row("rollouts", "likelihood", "the likelihood model, planning as in the paper", ROLLOUTS),
    Row("rl_rollouts", "rl", "both", ROLLOUTS),
    Row("ours", "ours", "actor-critic over turns in imagination"),
    Row("ours_guards", "ours_guards", "the same with a population of partners, and a trust region"),
    Row("ours_planning", "ours_guards", "with these, and planning with what the partner may value", BELIEF),
)


def lines(rows: Sequence[Row]) -> list[Line]:
    """The rows as lines of the table."""
    plain = {row.run: row.name for row in ROWS if not row.plan}
    imagined = {run: "p1" if fields.get("imagine.user") == "frozen" else "self" for run, fields in RUNS.items()}
    return [Line(row.name, row.shows, row.run, plain[row.run] if row.plan else "", imagined[row.run]) for row in rows]


def select(which: str) -> list[Row]:
    """The rows that `all` or some names stand for.

    Raises:
      ConfigError: there is no such row.
    """
    names = [row.name for row in ROWS] if which == "all" else which.split(",")
    unknown = sorted(set(names) - {row.name for row in ROWS})
    if unknown:
        raise ConfigError(f"--rows={unknown[0]} is no row: use all, or {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if row.name in names]


def stages(own: flags.FlagValues, rows: Sequence[Row], python: str) -> sweeps.Stages:
    """The command lines: likelihood models, policies by return, matches."""
    workdir, data = pathlib.Path(own.workdir), {"data": DATA, "data_dir": own.data_dir}
    runs = [name for name in RUNS if name in {"likelihood", *(row.run for row in rows)}]
    by_likelihood, by_return, matches = [], [], []
    for seed in range(own.seeds):
        start = workdir / "likelihood" / f"seed_{seed}"
        for name in runs:
            fields = data | {"seed": seed, **RUNS[name]}
            if name == "likelihood":
                by_likelihood.append(sweeps.command(python, "experiments.dream", start, own.variant, fields))
            else:
                fields |= {"start": str(start), "cpu_devices": 1, "eval.dialogues": 0, "eval.final_dialogues": 0}
                directory = workdir / name / f"seed_{seed}"
                by_return.append(sweeps.command(python, "experiments.dream", directory, own.variant, fields))
        for row in rows:
            dialogues = own.planned_dialogues if row.plan else own.dialogues
            fields = data | {"seed": seed, "start": str(workdir / row.run / f"seed_{seed}"), "cpu_devices": 1, **row.plan}
            fields |= {"eval.final_dialogues": dialogues, "eval.split": own.split}
            directory = workdir / "match" / row.name / f"seed_{seed}"
            matches.append(sweeps.command(python, "experiments.match", directory, own.variant, fields))
    return [stage for stage in (by_likelihood, by_return, matches) if stage]


def check(variant: str) -> None:
    """Refuses a variant that does not exist, and settings that contradict each other.

    Raises:
      ConfigError: naming the row.
    """
    for name, overrides in [*RUNS.items(), *((row.name, row.plan) for row in ROWS)]:
        try:
            contradictions.check(override(copy.deepcopy(presets.preset(DATA, variant)), {"data_dir": ".", **overrides}))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


# ---- the command line ----


def make_flags() -> flags.FlagValues:
    """The flags of this program."""
    own = sweeps.make_flags(variant="paper")
    flags.DEFINE_string("rows", "all", "all, or names of rows", flag_values=own)
    flags.DEFINE_integer("seeds", 5, "seeds 0, 1, ...: how many", lower_bound=1, flag_values=own)
    flags.DEFINE_string("data_dir", None, "where train.txt and val.txt (test.txt) are", flag_values=own)
    flags.DEFINE_string("split", "val", "whose contexts are negotiated over: val or test", flag_values=own)
    flags.DEFINE_integer("dialogues", 400, "with each partner", lower_bound=2, flag_values=own)
    flags.DEFINE_integer("planned_dialogues", 64, "the same where every turn is planned", lower_bound=2, flag_values=own)
    return own


def write_table(workdir: pathlib.Path, before: negotiation_table.Records) -> pathlib.Path:
    """Writes negotiations.csv and negotiations.md."""
    rows, partners = [line.name for line in lines(ROWS)], [*PARTNERS, negotiation_table.EVERYBODY]
    records = before | negotiation_table.read_matches(workdir, lines(ROWS), list(PARTNERS))
    order = sorted(records, key=lambda key: (rows.index(key[0]), key[2], partners.index(key[1])))
    records = {key: records[key] for key in order}
    negotiation_table.write_csv(workdir / "negotiations.csv", records)
    page = workdir / "negotiations.md"
    page.write_text(negotiation_table.markdown(lines(ROWS), records, PARTNERS), encoding="utf-8")
    return page


def _read_csv(path: str) -> negotiation_table.Records:
    try:
        records = negotiation_table.read_csv(pathlib.Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--from_csv={path} cannot be read: {error}") from error
    unknown = sorted({row for row, _, _ in records} - {row.name for row in ROWS})
    if unknown:
        raise ConfigError(f"--from_csv={path} has a row {unknown[0]} that is not in experiments/negotiate.py")
    return records


def _main(own: flags.FlagValues) -> int:
    rows = select(own.rows)
    check(own.variant)
    before = _read_csv(own.from_csv) if own.from_csv else {}
    if not own.workdir:
        if not before:
            raise ConfigError("--workdir=DIR is missing: it names the directory of the runs and their table")
        sys.stdout.write(negotiation_table.markdown(lines(ROWS), before, PARTNERS))
        return 0
    if not own.data_dir and not own.table_only:
        raise ConfigError("--data_dir=DIR is missing: it holds train.txt and val.txt of Deal or No Deal")
    if own.list:
        sys.stdout.write(sweeps.text(stages(own, rows, "python")))
        return 0
    status, workdir = 0, pathlib.Path(own.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if not own.table_only:
        status = sweeps.run(stages(own, rows, sys.executable), workdir, own.jobs)
    sys.stdout.write(f"the table is {write_table(workdir, before)}\n")
    return status


def main(argv: Sequence[str]) -> int:
    return sweeps.main(argv, make_flags(), __doc__, _main)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
