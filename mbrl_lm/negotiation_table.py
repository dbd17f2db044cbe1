"""The table of negotiators and their partners: from the results of matches to a CSV, to Markdown, and to sentences.

A record is the figures of one row, partner and seed. The page can be made again from the CSV alone.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mbrl_lm import ablation_runs
from mbrl_lm.ablation_runs import Mean, interval

KEYS = ("row", "partner", "seed")
FIGURES = (
    "score_a", "score_b", "score_a_agreed", "score_b_agreed", "agreed", "pareto", "turns", "words_a_message", "copied",
    "word_ppl", "split_accuracy", "score_a_se", "score_b_se", "plan_gain", "plan_gain_low", "plan_gain_high",
    "plan_tokens_a_turn", "plan_seconds_a_turn", "dialogues", "wall_s",
)  # fmt: skip
LIKELIHOOD, PARTNER, HELD_OUT = "likelihood", "p1", "p2"
EVERYBODY = "all"  # who planning is judged with, too: what it gains on the mean over the partners, scenario by scenario

Key = tuple[str, str, int]  # row, partner, seed
Record = dict[str, float | str | None]
Records = dict[Key, Record]


class Line(NamedTuple):
    """A row of the table: its name, its runs, the row whose policy it plans with, and whom that has learnt with."""

    name: str
    shows: str
    trained: str  # the directory of the run that negotiates
    plain: str = ""  # the same policy without a planner
    imagined: str = "self"  # the partner that the policy imagined as it learnt


class Paper(NamedTuple):
    """What Lewis et al. (2017) report, against their LIKELIHOOD model."""

    score_a: float
    score_b: float
    score_a_agreed: float
    score_b_agreed: float
    agreed: float
    pareto: float


PAPER = {
    "likelihood": Paper(5.4, 5.5, 6.2, 6.2, 87.9, 49.6),
    "rl": Paper(7.1, 4.2, 7.9, 4.7, 89.9, 58.6),
    "rollouts": Paper(7.3, 5.1, 7.9, 5.5, 92.9, 63.7),
    "rl_rollouts": Paper(8.3, 4.2, 8.8, 4.5, 94.4, 74.8),
}
PAPER_FALL = 8.3 - 4.6  # RL+ROLLOUTS, from the model to people


# ---- from matches to records ----


def read_matches(workdir: pathlib.Path, lines: Sequence[Line], partners: Sequence[str]) -> Records:
    """What there is of W/match/<row>/seed_<n>, with what planning gained over the same policy's plain turns."""
    records = {}
    for line in lines:
        for path in sorted((workdir / "match" / line.name).glob("seed_*")):
            seed, done = int(path.name.removeprefix("seed_")), _read(path / "results.json")
            trained = _read(workdir / line.trained / path.name / "results.json")
            gains = []
            for partner in partners:
                match = _read(path / f"{partner}.json")
                if not match:
                    continue
                found = {name.replace("plan/", "plan_"): x for name, x in match["figures"].items()}
                record: Record = {name: found.get(name) for name in FIGURES}
                record |= {"word_ppl": done.get("word_ppl/val"), "split_accuracy": done.get("split_accuracy/val/whole")}
                record |= {"dialogues": len(match["score_a"]), "wall_s": trained.get("wall_s")}
                record |= {"commit": ablation_runs.short(match["commit"])}
                plain = _read(workdir / "match" / line.plain / path.name / f"{partner}.json") if line.plain else {}
                if plain:
                    gains.append([x - y for x, y in zip(match["score_a"], plain["score_a"], strict=False)])
                    record |= gain(gains[-1])
                records[line.name, partner, seed] = record
            if len(gains) == len(partners):
                mean = [math.fsum(same) / len(same) for same in zip(*gains, strict=True)]
                everybody = gain(mean) | {"dialogues": sum(map(len, gains)), "commit": record["commit"]}
                records[line.name, EVERYBODY, seed] = dict.fromkeys(FIGURES) | everybody
    return records


def gain(more: Sequence[float]) -> Record:
    """What planning adds to the points, scenario by scenario -> the mean, and its 95 % interval over them."""
    mean = interval(more)
    return {"plan_gain": mean.mean, "plan_gain_low": mean.low, "plan_gain_high": mean.high}


def _read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# ---- the CSV ----


def write_csv(path: pathlib.Path, records: Records) -> None:
    """One line per row, partner and seed; what is not known is empty."""
    ablation_runs.write_csv(path, records, KEYS, FIGURES)


def read_csv(path: pathlib.Path) -> Records:
    """What `write_csv` wrote.

    Raises:
      ValueError: it is no such file.
    """
    return ablation_runs.read_csv(path, KEYS, FIGURES, "negotiations")


# ---- the page ----


def over_seeds(records: Records, row: str, partner: str, figure: str) -> tuple[Mean, float | None] | None:
    """The mean over seeds with its interval, and its standard error; with one seed, that of its dialogues if it is known."""
    keys = [key for key in records if key[:2] == (row, partner) and records[key].get(figure) is not None]
    if not keys:
        return None
    values = [records[key][figure] for key in keys]
    if len(values) == 1:
        return Mean(values[0]), records[keys[0]].get(f"{figure}_se")
    mean = math.fsum(values) / len(values)
    return interval(values), math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def drift(records: Records, row: str) -> float | None:
    """By how many percent a row's perplexity is above that of LIKELIHOOD, over the seeds that both have."""
    ppl = {(name, seed): record["word_ppl"] for (name, partner, seed), record in records.items() if partner == PARTNER}
    pairs = [(x, ppl.get((LIKELIHOOD, seed))) for (name, seed), x in ppl.items() if name == row]
    more = [100 * (x / before - 1) for x, before in pairs if x is not None and before is not None]
    return math.fsum(more) / len(more) if more else None


def cell(records: Records, row: str, partner: str, figure: str, digits: int = 1) -> str:
    """`7.1 ± 0.1`, the mean and its standard error; `-` where nothing is known."""
    found = over_seeds(records, row, partner, figure)
    if found is None:
        return "-"
    mean, error = found
    return f"{mean.mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def markdown(lines: Sequence[Line], records: Records, partners: Mapping[str, str]) -> str:
    """The page: rows against p1 beside the paper's, all partners, what planning gains, and what became of the aims."""
    shown = [line for line in lines if any(key[0] == line.name for key in records)]
    seeds = sorted({seed for _, _, seed in records})
    page = f"# Negotiations\n\nSeeds: {', '.join(map(str, seeds)) or 'none'}; "
    page += "± is a standard error, over seeds, or over the dialogues of the only one.\n"
    page += "\n## Against p1, the own LIKELIHOOD model\n\n"
    head = ["row", "all: own v its points", "agreed", "% agreed", "% Pareto", "perplexity", "drift", "splits read", "turns",
            "words", "% copied", "training, min", "paper: all", "agreed", "% agreed", "% Pareto"]  # fmt: skip
    page += _table(head, [_main_line(line, records) for line in shown])
    page += "\n## Own points with each partner\n\n"
    head = ["row", *(f"{name}: {what}" for name, what in partners.items()), f"gap: imagined - {HELD_OUT}"]
    page += _table(head, [_matrix_line(line, records, list(partners)) for line in shown])
    page += "\n## % agreed, and the partner's points\n\n"
    page += _table(["row", *partners], [_partners_line(line, records, list(partners)) for line in shown])
    planned = [line for line in shown if line.plain]
    if planned:
        page += "\n## What planning gains, in the same scenarios\n\n"
        page += _table(
            ["row", *partners, EVERYBODY, "tokens a turn", "seconds a turn"],
            [_gain_line(line, records, [*partners, EVERYBODY]) for line in planned],
        )
    return page + "\n## What was to be shown\n\n" + "".join(f"- {told}\n" for told in aims(lines, records))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def _main_line(line: Line, records: Records) -> list[str]:
    def of(figure: str, digits: int = 1) -> str:
        return cell(records, line.name, PARTNER, figure, digits)

    more = drift(records, line.name)
    wall = over_seeds(records, line.name, PARTNER, "wall_s")
    own = [
        f"{of('score_a')} v {of('score_b')}",
        f"{of('score_a_agreed')} v {of('score_b_agreed')}",
        of("agreed"),
        of("pareto"),
    ]
    said = [of("split_accuracy", 3), of("turns"), of("words_a_message"), of("copied", 0)]
    paper = ["-"] * 4
    if theirs := PAPER.get(line.name):
        scores = f"{theirs.score_a} v {theirs.score_b}", f"{theirs.score_a_agreed} v {theirs.score_b_agreed}"
        paper = [*scores, str(theirs.agreed), str(theirs.pareto)]
    minutes = f"{wall[0].mean / 60:.0f}" if wall else "-"
    return [line.name, *own, of("word_ppl", 2), "-" if more is None else f"{more:+.1f} %", *said, minutes, *paper]


def _partners_line(line: Line, records: Records, partners: Sequence[str]) -> list[str]:
    figures = (
        f"{cell(records, line.name, partner, 'agreed', 0)}, {cell(records, line.name, partner, 'score_b')}"
        for partner in partners
    )
    return [line.name, *figures]


def _matrix_line(line: Line, records: Records, partners: Sequence[str]) -> list[str]:
    imagined, other = (over_seeds(records, line.name, partner, "score_a") for partner in (line.imagined, HELD_OUT))
    gap = f"{imagined[0].mean - other[0].mean:+.1f} ({line.imagined})" if imagined and other else "-"
    return [line.name, *(cell(records, line.name, partner, "score_a") for partner in partners), gap]


def _gain_line(line: Line, records: Records, partners: Sequence[str]) -> list[str]:
    cost = [
        cell(records, line.name, PARTNER, f"plan_{name}_a_turn", digits) for name, digits in (("tokens", 0), ("seconds", 2))
    ]
    return [line.name, *(_gain(planning_gain(records, line.name, partner)) for partner in partners), *cost]


def planning_gain(records: Records, row: str, partner: str) -> Mean | None:
    """What planning adds to a row's points, with its 95 % interval over seeds; of one seed, over its scenarios."""
    found = over_seeds(records, row, partner, "plan_gain")
    if found is None or found[0].low is not None:
        return found and found[0]
    ends = (over_seeds(records, row, partner, f"plan_gain_{end}") for end in ("low", "high"))
    return Mean(found[0].mean, *(end and end[0].mean for end in ends))


def _gain(mean: Mean | None) -> str:
    if mean is None:
        return "-"
    return f"{mean.mean:+.2f}" + (f" [{mean.low:+.2f}, {mean.high:+.2f}]" if mean.low is not None else "")


class Aim(NamedTuple):
    """Something that a row has to reach: a figure with p1; the target is what it should reach beyond that."""

    says: str
    row: str
    figure: str
    holds: Callable[[float], bool]
    target: float | None = None


def aims(lines: Sequence[Line], records: Records) -> list[str]:
    """What became of each aim, in words."""
    told = []

    def judge(says: str, holds: bool, target: bool = True) -> None:
        told.append(f"{says}: {'not reached' if not holds else 'reached' if target else 'reached, the target not'}")

    for aim in AIMS:
        found = over_seeds(records, aim.row, PARTNER, aim.figure)
        says = aim.says if aim.target is None else f"{aim.says} (target {aim.target:g})"
        if found is None:
            told.append(f"{says}: {aim.row} has not negotiated yet")
        else:
            mean = found[0].mean
            judge(f"{says}: {mean:.2f}", aim.holds(mean), aim.target is None or mean >= aim.target)
    for row in (line.name for line in lines if line.name.startswith("ours")):
        base = over_seeds(records, row, PARTNER, "score_a")
        for partner in (HELD_OUT, "hard"):
            other = over_seeds(records, row, partner, "score_a")
            if base and other:
                fall, most = base[0].mean - other[0].mean, PAPER_FALL / 2
                judge(f"{row}: from p1 to {partner} its score falls by {fall:.2f} (less than {most:.2f})", fall < most)
        more = drift(records, row)
        if more is not None:
            judge(f"{row}: perplexity rises by {more:.1f} % (less than 7 %)", more < 7)
    for line in (line for line in lines if line.plain):
        for partner, name in ((PARTNER, PARTNER), (EVERYBODY, "all partners")):
            mean = planning_gain(records, line.name, partner)
            if mean is not None:
                says = f"{line.name}: planning adds {_gain(mean)} points with {name} (an interval above 0)"
                judge(says, (mean.low or 0.0) > 0)
    return told


AIMS = (
    Aim("LIKELIHOOD: perplexity at most 5.40", LIKELIHOOD, "word_ppl", lambda x: x <= 5.40),
    Aim("LIKELIHOOD: splits read right, at least .85", LIKELIHOOD, "split_accuracy", lambda x: x >= 0.85),
    Aim("LIKELIHOOD: at least 85 % agreed with itself", LIKELIHOOD, "agreed", lambda x: x >= 85),
    Aim("LIKELIHOOD: 5 to 6 points with itself", LIKELIHOOD, "score_a", lambda x: 5 <= x <= 6),
    Aim("LIKELIHOOD: 5 to 6 points for the other side", LIKELIHOOD, "score_b", lambda x: 5 <= x <= 6),
    *(
        aim
        for row in ("ours", "ours_guards", "ours_planning")
        for aim in (
            Aim(f"{row}: at least 8.3 points against p1", row, "score_a", lambda x: x >= 8.3),
            Aim(f"{row}: the partner has more than 4.2", row, "score_b", lambda x: x > 4.2, target=5.0),
            Aim(f"{row}: at least 94.4 % agreed", row, "agreed", lambda x: x >= 94.4, target=97),
            Aim(f"{row}: at least 74.8 % Pareto efficient", row, "pareto", lambda x: x >= 74.8, target=85),
        )
    ),
)
