"""The figures of finished runs as CSV, one line each: python results/collect.py RUN_DIRECTORY... > results/main_job.csv"""

import csv
import json
import pathlib
import sys

from mbrl_lm.ablation_runs import short


def rows(workdir: pathlib.Path) -> list[tuple]:
    """(data, variant, seed, commit, figure, value) of one run, sorted by figure."""
    config = json.loads((workdir / "config.json").read_text())
    commit = (workdir / "commit.txt").read_text().splitlines()[-1]
    run = config["data"], config["variant"], config["seed"], short(commit)
    figures = json.loads((workdir / "results.json").read_text())
    return [(*run, name, f"{x:.6g}") for name, x in sorted(figures.items())]


if __name__ == "__main__":
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("data", "variant", "seed", "commit", "figure", "value"))
    for workdir in sys.argv[1:]:
        writer.writerows(rows(pathlib.Path(workdir)))
