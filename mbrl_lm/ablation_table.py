"""The table of many runs: one line per row, means over seeds with 95 % intervals, claims as sentences, learning curves."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from mbrl_lm.ablation_runs import (
    BEFORE_RL,
    THRESHOLD,
    TO_THRESHOLD,
    Mean,
    Records,
    by_seed,
    curve,
    evaluations_of,
    interval,
    over_seeds,
    paired,
)

CURVES = (("true/success", "success"), ("true/return", "return"))
AXES = (("real_dialogues", "real dialogues"), ("step", "updates"))
KINDS = ("difference", "no_loss", "ratio", "ratio_below", "level")


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that rows have to show, x being the figure of `row` and y that of `against`.

    Kinds: `difference`, x - y is above 0 by an interval that excludes it, and is to reach the target; `no_loss`, x - y
    is not below 0; `ratio`, x is at least `target` times y; `ratio_below`, at most; `level`, x is at least the target.
    """

    says: str
    row: str
    figure: str
    kind: str
    against: str = ""
    target: float = 0.0

    def __post_init__(self):
        assert self.kind in KINDS and bool(self.against) == (self.kind != "level"), self


class Line(NamedTuple):
    """A line of the table: a row, whose runs it shows (its own, or those of an equal row), and what is expected of it."""

    name: str
    group: str
    runs: str
    shows: str
    expects: str = ""  # higher, lower or no clear difference: of `figure`, compared with `against`
    figure: str = "true/success"
    against: str = "full"
    tried: int = 1
    start: str = ""  # the directory, beside its own, of the likelihood phase that it begins from


# ---- sentences ----


def number(x: float) -> str:
    """Three decimals, without the zero before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{x:.3f}")


def written(x: Mean | None) -> str:
    """`.512 [.498, .526]`, without the interval where there is none, `-` where nothing is known."""
    if x is None:
        return "-"
    return number(x.mean) + (f" [{number(x.low)}, {number(x.high)}]" if x.low is not None and x.high is not None else "")


def sentence(claim: Claim, records: Records, runs: Mapping[str, str]) -> str:
    """What became of a claim, in words.

    Args:
      claim: names rows.
      records: of runs.
      runs: row -> the row whose runs it shows.
    """
    names = [name for name in (claim.row, claim.against) if name]
    figures = [by_seed(records, runs[name], claim.figure) for name in names]
    missing = [name for name, values in zip(names, figures, strict=True) if not values]
    if missing:
        return f"{claim.says}: no runs of {' and '.join(missing)} with {claim.figure}"
    seeds = sorted(set.intersection(*map(set, figures)))
    if not seeds:
        return f"{claim.says}: {' and '.join(names)} have no seed in common"
    margin = interval([_margin(claim, *(values[seed] for values in figures)) for seed in seeds])
    found = f"{_found(claim, margin, [interval([x[seed] for seed in seeds]) for x in figures])} over {_seeds(len(seeds))}"
    return f"{claim.says}: {found}{_target(claim)}: {_verdict(claim, margin)}"


def _margin(claim: Claim, x: float, y: float = 0.0) -> float:
    """By how much one seed's figures are on the right side."""
    if claim.kind == "level":
        return x - claim.target
    factor = claim.target if claim.kind.startswith("ratio") else 1.0
    return (factor * y - x) if claim.kind == "ratio_below" else (x - factor * y)


def _found(claim: Claim, margin: Mean, means: Sequence[Mean]) -> str:
    if claim.kind == "level":
        return f"{claim.row} has {written(means[0])} in {claim.figure}"
    if claim.kind.startswith("ratio"):
        x, y = (number(mean.mean) for mean in means)
        return f"{claim.row} has {x} and {claim.against} {y} in {claim.figure}, a margin of {written(margin)}"
    verb = "exceeds" if margin.mean > 0 else "differs from"
    return f"{claim.row} {verb} {claim.against} in {claim.figure} by {written(margin)}"


def _target(claim: Claim) -> str:
    if claim.kind == "no_loss":
        return ""
    words = {"ratio": "at least {} times", "ratio_below": "at most {} times"}.get(claim.kind, "{}")
    return f" (target {words.format(number(claim.target))})"


def _verdict(claim: Claim, margin: Mean) -> str:
    if margin.low is None:
        return "needs more seeds"
    if claim.kind == "difference":
        return "not shown" if margin.low <= 0 else "shown" if margin.mean >= claim.target else "shown, short of the target"
    if claim.kind == "no_loss":
        return "no clear loss" if margin.high >= 0 else "a loss"
    return (
        "not shown"
        if margin.mean < 0
        else "shown"
        if margin.low >= 0
        else "shown on average, within the spread of the seeds"
    )


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def measured(line: Line, records: Records, runs: Mapping[str, str]) -> tuple[str, str]:
    """How a line differs from the one that it is compared with, and whether it shows what it should, in words."""
    against = runs[line.against]
    if line.runs == against:
        return "the same runs", ""
    pair = paired(records, line.runs, against, line.figure)
    if pair is None:
        return "-", "no runs of both" if line.expects else ""
    difference, seeds = pair
    over = ", over its dialogues" if seeds == 1 and difference.low is not None else ""
    which = f"{line.figure} {written(difference)} against {line.against} ({_seeds(seeds)}{over})"
    if seeds == 1:
        return which, "needs more seeds"
    found = "higher" if difference.low > 0 else "lower" if difference.high < 0 else "no clear difference"
    verdict = {"": found, found: f"{found}, as it should"}.get(line.expects, f"**{found}**, should be: {line.expects}")
    return which, verdict


# ---- the table ----

Cell = Callable[[Records, str], str]  # of a row


def markdown(lines: Sequence[Line], records: Records, claims: Sequence[Claim], unfinished: Sequence[str] = ()) -> str:
    """The page: the figures of every row that has runs, what rows should show and do, and the claims."""
    runs = {line.name: line.runs for line in lines}
    shown = [line for line in lines if any(row == line.runs for row, _ in records)]
    head = ("row", "seeds", *(title for title, _ in COLUMNS), "tried")
    out = ["# Ablations", "", _row(head), _row(["---"] * len(head))]
    for line in shown:
        out.append(_row([_name(line), *_cells(line, records), str(line.tried)]))
    out += ["", *_notes(records), "", "## What the rows show", ""]
    out += [_row(("row", "should show", "measured", "")), _row(["---"] * 4)]
    out += [_row((line.name, line.shows, *measured(line, records, runs))) for line in shown]
    out += ["", "## Claims", "", *(f"- {sentence(claim, records, runs)}." for claim in claims), ""]
    without = [line.name for line in lines if line not in shown]
    out += [f"Rows without a finished run: {', '.join(without)}.", ""] if without else []
    out += [f"Not finished, and not counted: {', '.join(unfinished)}.", ""] if unfinished else []
    return "\n".join(out)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(line: Line) -> str:
    return line.name if line.runs == line.name else f"{line.name} (= {line.runs})"


def _cells(line: Line, records: Records) -> list[str]:
    seeds = [seed for row, seed in records if row == line.runs]
    same = line.runs != line.name and line.runs == "full"  # its figures stand in the first line
    return [str(len(seeds)), *("" if same else cell(records, line.runs) for _, cell in COLUMNS)]


def _notes(records: Records) -> list[str]:
    commits = sorted({str(record["commit"]) for record in records.values() if record["commit"]})
    return [
        "Means over seeds with 95 % t-intervals; from one seed, the interval over its dialogues. The gap at step 0 is that "
        f"of the policy that RL starts from. To {number(THRESHOLD)}: real dialogues, logs included, until an evaluation in "
        "RL shows that success; - if a seed never gets there. Minutes include a likelihood phase that is shared. Tried: "
        "configurations of the row.",
        *([f"Commits: {', '.join(commits)}."] if commits else []),
    ]


def _mean(figure: str, spread: bool = False) -> Cell:
    def cell(records: Records, row: str) -> str:
        x = over_seeds(records, row, figure)
        return written(x if spread or x is None else Mean(x.mean))

    return cell


def _count(figure: str, unit: float = 1.0, decimals: int = 0) -> Cell:
    def cell(records: Records, row: str) -> str:
        x = over_seeds(records, row, figure)
        return "-" if x is None or math.isinf(x.mean) else f"{x.mean / unit:,.{decimals}f}"

    return cell


def _above(figure: str, floor: str) -> Cell:
    def cell(records: Records, row: str) -> str:
        x, y = by_seed(records, row, figure), by_seed(records, row, floor)
        return written(Mean(interval([x[s] - y[s] for s in x]).mean)) if x and set(x) == set(y) else "-"

    return cell


COLUMNS = (
    ("success", _mean("true/success", spread=True)),
    ("seen types", _mean("true/success/seen")),
    ("held-out types", _mean("true/success/held_out")),
    ("return", _mean("true/return", spread=True)),
    ("imagined return", _mean("imagined/return")),
    ("gap", _mean("gap/total", spread=True)),
    ("of seen types", _mean("gap/total/seen")),
    ("gap at step 0", _mean(BEFORE_RL)),
    ("user NLL - floor", _above("user_nll/val", "user_nll_floor/val")),
    ("on the policy's", _above("user_nll/policy", "user_nll_floor/policy")),
    ("left", _mean("true/left")),
    ("hallucinated", _mean("true/hallucinated")),
    ("injected", _mean("true/injected")),
    (f"to {number(THRESHOLD)}", _count(TO_THRESHOLD)),
    ("real dialogues", _count("real_dialogues")),
    ("generated tokens", _count("generated_tokens")),
    ("gradient steps", _count("gradient_steps")),
    ("minutes", _count("wall_s", 60, 1)),
)


# ---- learning curves ----


def curve_groups(lines: Sequence[Line], told: Collection[str]) -> dict[str, dict[str, str]]:
    """Group -> name of a curve -> the row whose runs it shows; the full method stands beside every group.

    Args:
      lines: of the table.
      told: rows with runs.
    """
    full = {"full": "full"} if "full" in told else {}
    groups: dict[str, dict[str, str]] = {}
    for line in lines:
        if line.runs in told and line.runs not in full:
            groups.setdefault(line.group, dict(full))[line.name] = line.runs
    return groups or ({"full": full} if full else {})


def _evaluations(workdir: pathlib.Path, lines: Sequence[Line], records: Records) -> dict[str, list[list[Mapping]]]:
    """Row -> the evaluations of each seed in RL."""
    start, told = {line.runs: line.start for line in lines}, {}
    for row, seed in records:
        name = f"seed_{seed}"
        begun = workdir / start[row] / name if start[row] else None
        told.setdefault(row, []).append(evaluations_of(workdir / row / name, begun))
    return told


def plot(path: pathlib.Path, workdir: pathlib.Path, lines: Sequence[Line], records: Records) -> bool:
    """Draws the curves of finished runs, a group in each line of panels; returns whether there were any."""
    told = _evaluations(workdir, lines, records)
    groups = curve_groups(lines, told)
    if not groups:
        return False
    import matplotlib  # slow to import, and needed once

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(x, y) for y in CURVES for x in AXES]
    size = 4 * len(panels) + 2, 2.8 * len(groups)  # beside the panels, names of rows
    figure, axes = pyplot.subplots(len(groups), len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes_of_group, (group, rows) in zip(axes, groups.items(), strict=True):
        for axis, ((x, x_title), (y, y_title)) in zip(axes_of_group, panels, strict=True):
            for name, runs in rows.items():
                points = curve(told[runs], x, y)
                axis.plot([a for a, _ in points], [b for _, b in points], marker=".", label=name)
            axis.set(title=group, xlabel=x_title, ylabel=y_title)
            axis.grid(alpha=0.3)
        axes_of_group[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return True
