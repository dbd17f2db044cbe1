"""The page that a run ends with: what it found, its curves, and dialogues to read."""

import json
import pathlib
from collections.abc import Mapping, Sequence

from mbrl_lm.metrics import write_atomic

CURVES = (
    ("held-out user", "nats per token", ("user_nll/val",)),
    ("held-out text", "perplexity per word", ("word_ppl/val",)),
    ("return", "return of a dialogue", ("true/return", "imagined/return")),
    ("success", "share of dialogues", ("true/success",)),
    ("deals", "points", ("partner/score_a", "partner/score_b")),
)
HEADLINE = {
    "word_ppl/val": "held-out perplexity per word, both speakers",
    "user_nll/val": "held-out user, nats per token",
    "user_nll_floor/val": "the least that anybody could reach",
    "split_accuracy/val": "recorded deals read right",
    "true/success": "success with the true user",
    "true/return": "return with the true user or partner",
    "imagined/return": "return with the imagined user",
    "gap/total": "exploitation gap",
    "partner/agreed": "deals with the partner, %",
}


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def headline(workdir: pathlib.Path, figures: Mapping[str, float]) -> str:
    """What the run found, in a few lines: the last figures beside the first ones of the same name."""
    rows = read_metrics(workdir)

    def since(name: str) -> str:
        first = next((row for row in rows if row.get(name) is not None), None)
        return f"{figures[name]:.3f}" + (f" (at update {first['step']}: {first[name]:.3f})" if first else "")

    lines = []
    for name, meaning in HEADLINE.items():
        if name not in figures:
            continue
        interval = ""
        if f"{name}_low" in figures:
            interval = f", 95 % interval [{figures[f'{name}_low']:.3f}, {figures[f'{name}_high']:.3f}]"
        lines.append(f"{meaning}: {since(name)}{interval}")
    return "\n".join(lines)


def write_report(workdir: pathlib.Path, figures: Mapping[str, float], samples: str) -> pathlib.Path:
    """Writes `report.md` and `curves.png` from the run's `metrics.jsonl` and final figures.

    Args:
      workdir: the run directory.
      figures: name -> number, all of results.json.
      samples: dialogues to read.
    """
    plotted = _plot(workdir / "curves.png", read_metrics(workdir))
    lines = [f"# {workdir.name}", "", *(f"- {line}" for line in headline(workdir, figures).splitlines()), ""]
    lines += ["![learning curves](curves.png)", ""] if plotted else []
    lines += ["| figure | value |", "|---|---|", *(f"| {name} | {x:.4g} |" for name, x in sorted(figures.items())), ""]
    lines += ["## Dialogues of the trained policy", "", "```", samples.strip(), "```", ""]
    write_atomic(workdir / "report.md", "\n".join(lines))
    return workdir / "report.md"


def _plot(path: pathlib.Path, rows: Sequence[Mapping[str, float]]) -> bool:
    """Draws every curve of which there are two points; returns whether there was any."""
    plotted = {name for _, _, names in CURVES for name in names}
    series = {name: [(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in plotted}
    panels = [
        (title, unit, [name for name in names if len(series[name]) > 1])
        for title, unit, names in CURVES
        if any(len(series[name]) > 1 for name in names)
    ]
    if not panels:
        return False
    import matplotlib  # slow to import, and needed once

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (title, unit, names) in zip(axes[0], panels, strict=True):
        for name in names:
            axis.plot(*zip(*series[name], strict=True), marker=".", label=name)
        axis.set(title=title, xlabel="updates", ylabel=unit)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
