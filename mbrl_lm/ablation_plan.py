"""From the rows of an ablation table, which are data, to command lines of `experiments.dream`.

Rows of equal config are run once; rows that do not differ before RL begin with one and the same likelihood phase.
"""

import copy
import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mbrl_lm import config, contradictions, sweeps
from mbrl_lm.ablation_table import Line
from mbrl_lm.command_line import flatten
from mbrl_lm.config import Config, ConfigError


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: how it differs from the full method, and what that should show."""

    name: str
    group: str  # its number, and what the group is about
    overrides: Mapping[str, Any]  # dotted names of the config
    shows: str
    # Those of them that the likelihood phase has, too; rows that agree in them share it. None: the row has no such phase.
    start: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    expects: str = ""  # higher, lower or no clear difference: of `figure`, compared with `against`
    figure: str = "true/success"
    against: str = "full"
    tried: int = 1  # configurations


@dataclasses.dataclass(frozen=True)
class Plan:
    """All rows of a variant, and which of them have runs of their own."""

    variant: str
    full: Config
    rows: dict[str, Row]
    runs: dict[str, str]  # row -> the first row with the same config
    alone: Mapping[str, Any]  # overrides of a run that is a likelihood phase alone


def make_plan(variant: str, full: Config, rows: Sequence[Row], alone: Mapping[str, Any]) -> Plan:
    """Which rows are run.

    Args:
      variant: of the preset.
      full: the config of the full method, from which rows differ.
      rows: in the table's order.
      alone: overrides of a run that is a likelihood phase alone.

    Raises:
      ConfigError: a row's config contradicts itself.
    """
    plan = Plan(variant, full, {row.name: row for row in rows}, {}, alone)
    first: dict[str, str] = {}
    for row in rows:
        for overrides in [row.overrides] + ([alone | row.start] if row.start is not None else []):
            try:
                contradictions.check(config.override(copy.deepcopy(full), dict(overrides)))
            except ConfigError as error:
                raise ConfigError(f"row {row.name}: {error}") from error
        same = repr((differing(full, row.overrides), start_of(full, row)))
        plan.runs[row.name] = first.setdefault(same, row.name)
    return plan


def differing(full: Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Those that change something, by name."""
    before = flatten(full)
    return {name: overrides[name] for name in sorted(overrides) if overrides[name] != before[name]}


def start_of(full: Config, row: Row) -> str | None:
    """The directory, inside W, of the likelihood phase that a row begins with."""
    if row.start is None:
        return None
    return "-".join(["start", *(f"{name}={value}" for name, value in differing(full, row.start).items())])


def paced(full: Config, updates: int) -> dict[str, int]:
    """RL in so many updates with as many real dialogues, but for a few, and as many evaluations, as evenly in its course."""
    pace, fields = updates / full.train.rl_steps, {"train.rl_steps": updates}
    if full.eval.rl_every:
        fields["eval.rl_every"] = max(round(full.eval.rl_every * pace), 1)
    if not full.collect.every:
        return fields
    wanted = full.collect.batch * math.ceil(full.train.rl_steps / full.collect.every)
    choices = []
    for every in sorted({max(math.floor(full.collect.every * pace), 1), math.ceil(full.collect.every * pace)}):
        times = math.ceil(updates / every)
        batch = max(round(wanted / times), 1)
        choices.append((abs(times * batch - wanted), every, batch))
    _, every, batch = min(choices)
    return fields | {"collect.every": every, "collect.batch": batch}


def select(plan: Plan, which: str, words: Mapping[str, Iterable[str]]) -> list[str]:
    """The rows with runs that some words, names and numbers of groups stand for, in the table's order.

    Args:
      plan: the rows.
      which: separated by commas.
      words: names of rows that a word stands for, beside `all`.

    Raises:
      ConfigError: there is no such row.
    """
    words = {"all": plan.rows, **words}
    chosen = set()
    for word in which.split(","):
        group = [row.name for row in plan.rows.values() if row.group.split()[0] == word]
        names = words.get(word) or group or [word]
        if not set(names) <= set(plan.rows):
            groups = ",".join(dict.fromkeys(row.group.split()[0] for row in plan.rows.values()))
            raise ConfigError(
                f"--rows={word} is no row: use {', '.join(words)}, numbers of {groups}, or names as in the table"
            )
        chosen |= {plan.runs[name] for name in names}
    return [name for name in plan.rows if name in chosen]


def command_lines(
    plan: Plan, names: Sequence[str], seeds: int, workdir: pathlib.Path, python: str = "python"
) -> list[list[str]]:
    """Two stages of command lines: the likelihood phases that are begun with, and the rows; seeds are next to each other."""
    starts, rows = {}, []
    for name in names:
        row = plan.rows[name]
        begin = start_of(plan.full, row)
        if begin:
            starts[begin] = plan.alone | row.start
        for seed in range(seeds):
            more = {"start": str(workdir / begin / f"seed_{seed}")} if begin else {}
            rows.append(_command(plan, workdir / name, seed, row.overrides, more, python))
    first = [
        _command(plan, workdir / begin, seed, overrides, {}, python)
        for begin, overrides in starts.items()
        for seed in range(seeds)
    ]
    return [stage for stage in (first, rows) if stage]


def _command(plan: Plan, directory: pathlib.Path, seed: int, overrides, more: Mapping[str, str], python: str) -> str:
    fields = {"seed": seed, "cpu_devices": 1, **differing(plan.full, overrides), **more}
    return sweeps.command(python, "experiments.dream", directory / f"seed_{seed}", plan.variant, fields)


def table_lines(plan: Plan) -> list[Line]:
    """The rows as lines of the table."""
    return [
        Line(
            row.name, row.group, plan.runs[row.name], row.shows, row.expects, row.figure, row.against, row.tried,
            start_of(plan.full, row) or "",
        )
        for row in plan.rows.values()
    ]  # fmt: skip
