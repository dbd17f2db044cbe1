"""The runs of a sweep as records: the figures of each row and seed, from the runs' own files or from a CSV.

A record is read from `W/<row>/seed_<n>/metrics.jsonl`, which holds nothing that depends on the clock; wall time and commit
come from `results.json` and `commit.txt` beside it, where they are there. Records are kept as one CSV, a line per row and
seed, from which tables can be made again without the runs.
"""

import csv
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.special import stdtrit

THRESHOLD = 0.6  # of true/success, in "real dialogues to a threshold"
TO_THRESHOLD = "dialogues_to_threshold"
BEFORE_RL = "gap/total@0"
FINAL = (  # as they stand in the last evaluation
    "true/success", "true/success_low", "true/success_high", "true/success/seen", "true/success/seen_low",
    "true/success/seen_high", "true/success/held_out", "true/success/held_out_low", "true/success/held_out_high",
    "true/return", "true/return_low", "true/return_high", "imagined/return", "gap/total", "gap/total_low", "gap/total_high",
    "gap/total/seen", "gap/total/held_out", "user_nll/val", "user_nll_floor/val", "user_nll/policy", "user_nll_floor/policy",
    "true/left", "true/hallucinated", "true/injected",
    "real_dialogues", "generated_tokens", "gradient_steps",
)  # fmt: skip
FIGURES = (*FINAL, BEFORE_RL, TO_THRESHOLD, "wall_s")

Record = dict[str, float | str | None]  # figure -> number, None where it is not known; and "commit"
Records = dict[tuple[str, int], Record]  # (row, seed) -> record


class Mean(NamedTuple):
    """A mean and its 95 % interval, which is None where nothing is known of it."""

    mean: float
    low: float | None = None
    high: float | None = None


# ---- from runs to records ----


def read_runs(workdir: pathlib.Path, rows: Mapping[str, str]) -> tuple[Records, list[str]]:
    """The finished runs of some rows, and the names of those that were begun and are not finished.

    Args:
      workdir: W.
      rows: row -> the directory in W of the likelihood phase that it begins from, "" if it has its own.
    """
    records, unfinished = {}, []
    for row, start in rows.items():
        for path in sorted((workdir / row).glob("seed_*"), key=lambda path: (len(path.name), path.name)):
            found = re.fullmatch(r"seed_(\d+)", path.name)
            if found is None:
                continue
            record = read_run(path, workdir / start / path.name if start else None)
            if record is None:
                unfinished.append(f"{row}/{path.name}")
            else:
                records[row, int(found[1])] = record
    return records, unfinished


def read_run(path: pathlib.Path, start: pathlib.Path | None = None) -> Record | None:
    """The figures of one run; None if it has not come to its end.

    A directory with `config.json` is where a run was; without `results.json` it goes on. Where both are missing, only
    `metrics.jsonl` was kept of a finished run.
    """
    results = _read_json(path / "results.json")
    if results is None and (path / "config.json").exists():
        return None
    evaluations = evaluations_of(path, start)
    if not evaluations:
        return None
    record: Record = {name: evaluations[-1].get(name) for name in FINAL}
    record[BEFORE_RL] = evaluations[0].get("gap/total")
    record[TO_THRESHOLD] = dialogues_to(evaluations, THRESHOLD)
    record["wall_s"] = (results or {}).get("wall_s")
    commits = path / "commit.txt"
    commit = (commits.read_text(encoding="utf-8").splitlines() or [""])[-1] if commits.exists() else ""
    return record | {"commit": short(commit)}


def short(commit: str) -> str:
    """A commit as tables name it: seven digits, and whether the tree had changes."""
    return commit[:7] + commit[40:]


def read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl, in order; a last one that is only half written, by a run that goes on, is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def evaluations_of(path: pathlib.Path, start: pathlib.Path | None = None) -> list[Mapping]:
    """The evaluations of a run in RL, the first one of the policy that RL starts from, as far as it was judged.

    Args:
      path: of the run.
      start: of the run whose likelihood phase it begins from; its last evaluation then is the first one here.
    """
    own = in_rl(read_lines(path / "metrics.jsonl"))
    theirs = read_lines(start / "metrics.jsonl") if start else []
    return [line for line in theirs if line.get("true/success") is not None][-1:] + own if own else []


def in_rl(lines: Sequence[Mapping]) -> list[Mapping]:
    """The evaluations of a run from the beginning of RL on: the first one is of the policy that RL starts from.

    The figures `train/...` are of updates by return. The evaluation before the first of them is of what RL starts from;
    where there is none, all is RL.
    """
    first = next((i for i, line in enumerate(lines) if any(name.startswith("train/") for name in line)), len(lines))
    judged = [i for i, line in enumerate(lines) if line.get("true/success") is not None]
    before = [i for i in judged if i < first]
    begins = before[-1] if before and len(before) < len(judged) else 0
    return [lines[i] for i in judged if i >= begins]


def dialogues_to(evaluations: Sequence[Mapping], threshold: float) -> float:
    """The real dialogues at the first evaluation with that success; infinite if there is none."""
    return next((line["real_dialogues"] for line in evaluations if line["true/success"] >= threshold), math.inf)


def _read_json(path: pathlib.Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---- records and CSV ----


def write_csv(
    path: pathlib.Path, records: Mapping, keys: Sequence[str] = ("row", "seed"), figures: Sequence[str] = FIGURES
) -> None:
    """One line per record: its key, commit, and the figures; what is not known is empty."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*keys, "commit", *figures))
        for key, record in records.items():
            values = ("" if record.get(name) is None else f"{record[name]:.8g}" for name in figures)
            writer.writerow((*key, record["commit"], *values))


def read_csv(
    path: pathlib.Path, keys: Sequence[str] = ("row", "seed"), figures: Sequence[str] = FIGURES, what: str = "ablations"
) -> dict:
    """What `write_csv` wrote; `what` the table is of.

    Raises:
      ValueError: it is no such file.
    """
    records = {}
    with open(path, encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            try:
                key = tuple(int(line[name]) if name == "seed" else line[name] for name in keys)
                found = {name: float(line[name]) if line.get(name) else None for name in figures}
                records[key] = found | {"commit": line["commit"]}
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no line of a table of {what} ({error!r})") from error
    return records


# ---- statistics over seeds ----


def interval(values: Sequence[float]) -> Mean:
    """The mean over seeds and its 95 % t-interval; no interval from one seed."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Mean(mean)
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return Mean(mean, mean - half, mean + half)


def by_seed(records: Records, row: str, figure: str) -> dict[int, float]:
    """Seed -> figure, where it is known."""
    return {seed: x for (name, seed), record in records.items() if name == row and (x := record.get(figure)) is not None}


def over_dialogues(record: Record, figure: str) -> Mean:
    """A figure of one run, with the interval over its dialogues where that is known."""
    return Mean(*(record.get(f"{figure}{end}") for end in ("", "_low", "_high")))


def over_seeds(records: Records, row: str, figure: str) -> Mean | None:
    """The mean of a row; with one seed, the interval is the run's own over its dialogues."""
    values = by_seed(records, row, figure)
    if not values:
        return None
    if len(values) == 1:
        (seed,) = values
        return over_dialogues(records[row, seed], figure)
    return interval(list(values.values()))


def paired(records: Records, row: str, against: str, figure: str) -> tuple[Mean, int] | None:
    """The mean of x - y over the seeds that both rows have, and their number.

    From one seed, the interval is over dialogues, as if those of the two runs had nothing to do with each other.
    """
    x, y = by_seed(records, row, figure), by_seed(records, against, figure)
    seeds = sorted(set(x) & set(y))
    if not seeds:
        return None
    difference = interval([x[seed] - y[seed] for seed in seeds])
    if len(seeds) == 1:
        runs = [over_dialogues(records[name, seeds[0]], figure) for name in (row, against)]
        if all(run.low is not None and run.high is not None for run in runs):
            half = math.hypot(*(run.high - run.low for run in runs)) / 2
            difference = Mean(difference.mean, difference.mean - half, difference.mean + half)
    return difference, len(seeds)


# ---- learning curves ----


def curve(runs: Sequence[Sequence[Mapping]], x: str, y: str) -> list[tuple[float, float]]:
    """Means over seeds of the evaluations that all of them have, by step.

    Args:
      runs: the evaluations of each seed.
      x, y: names of figures.
    """
    known = [{line["step"]: line for line in lines if None not in (line.get(x), line.get(y))} for lines in runs]
    steps = sorted(set.intersection(*map(set, known)))
    return [tuple(math.fsum(seed[step][name] for seed in known) / len(known) for name in (x, y)) for step in steps]
