"""Metrics, samples and the progress line of one run.

On the device a metric is a pair (sum, weight), so that means over micro-batches, shards and steps add up; it is fetched one
step late, so that fetching never makes the device wait. `metrics.jsonl` and `samples.txt` hold nothing that depends on the
clock: the same command and seed write the same bytes, resumed or not. What depends on the clock goes to TensorBoard and to
the progress line.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
import rich.console
import rich.progress
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from mbrl_lm.types import Array

_SAMPLE = "=== step "
_FLUSH_S = 10.0  # between two writes of the event file to disk
_PACE = 50  # steps over which tokens/s and the time left are measured


def write_atomic(path: str | pathlib.Path, content: str | bytes) -> None:
    """Writes a file that is either the old one or the whole new one, whatever happens meanwhile."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def results(workdir: str | pathlib.Path, figures: Mapping[str, float | int | str]) -> pathlib.Path:
    """Writes `results.json`, metric name -> number, sorted; its existence says that the run is finished."""
    path = pathlib.Path(workdir) / "results.json"
    figures = {name: figure if isinstance(figure, str) else _plain(figure, np.float64) for name, figure in figures.items()}
    write_atomic(path, json.dumps(figures, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return path


def reduce(metrics: Mapping[str, tuple[Array, Array]]) -> dict[str, float]:
    """Fetches (sum, weight) pairs and divides them; a metric that nothing was counted for is left out."""
    fetched = jax.device_get(dict(metrics))
    return {name: float(total) / float(weight) for name, (total, weight) in fetched.items() if weight != 0}


class Delayed:
    """Fetches the metrics of a step when the next one has been dispatched.

    Flush it before a checkpoint is saved: a run that resumes from step k expects the lines up to k to be written.
    """

    def __init__(self):
        self._held: tuple[int, Mapping[str, tuple[Array, Array]]] | None = None

    def push(self, step: int, metrics: Mapping[str, tuple[Array, Array]]) -> tuple[int, dict[str, float]] | None:
        """Holds the metrics of a step; returns (step, reduced metrics) of the one held before, None without one."""
        for leaf in jax.tree.leaves(dict(metrics)):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        previous = self.flush()
        self._held = (step, metrics)
        return previous

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """Returns what is held, waiting for the device."""
        held, self._held = self._held, None
        return None if held is None else (held[0], reduce(held[1]))


class Writer:
    """Writes one run's `metrics.jsonl`, `samples.txt`, TensorBoard events and progress line. Only process 0 writes."""

    def __init__(
        self,
        workdir: str | pathlib.Path,
        total_steps: int,
        start: int | None = None,
        show: Sequence[str] = (),
        every_s: float = 10.0,
        stream: TextIO | None = None,
    ):
        """Opens the files of a run.

        Args:
          workdir: the run directory, which exists.
          total_steps: of the whole run, for the time left.
          start: the step of the checkpoint that the run resumes from: later lines are dropped, since they will be written
            again. None for a fresh run, which drops all lines.
          show: names of the metrics on the progress line.
          every_s: seconds between two progress lines where there is no terminal.
          stream: of the progress line; stderr by default.
        """
        self._workdir = pathlib.Path(workdir)
        self._enabled = jax.process_index() == 0
        self._progress = Progress(total_steps, start or 0, show, every_s, stream)
        if not self._enabled:
            return
        _truncate_lines(self._workdir / "metrics.jsonl", start)
        _truncate_samples(self._workdir / "samples.txt", start)
        self._metrics = open(self._workdir / "metrics.jsonl", "a", encoding="utf-8")
        self._samples = open(self._workdir / "samples.txt", "a", encoding="utf-8")
        (self._workdir / "tensorboard").mkdir(exist_ok=True)
        # tensorboardX's SummaryWriter writes in a thread that dies silently on a full disk
        self._events = EventsWriter(str(self._workdir / "tensorboard" / "events"), f".{os.getpid()}")
        self._flushed_s = time.monotonic()
        if start is not None:  # tells TensorBoard to forget the steps that will be written again
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=start + 1, session_log=log))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def phase(self, name: str) -> None:
        """Names what the run is doing, on the progress line."""
        self._progress.phase(name)

    def tick(self, step: int, tokens: int) -> None:
        """Counts one finished step, and the tokens that it trained on or wrote, for the progress line."""
        self._progress.tick(step, tokens)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line of metrics, rounded to float32 so that it does not hang on the last bits of a sum.

        A figure that is not finite is written as null.
        """
        if not self._enabled:
            return
        figures = {name: _plain(value, np.float32) for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **figures}, sort_keys=True, allow_nan=False) + "\n")
        self._metrics.flush()
        self._progress.show(figures)
        self._write_events(step, {**metrics, **self._progress.throughput()})

    def samples(self, step: int, text: str) -> None:
        """Appends sample dialogues to `samples.txt` under a heading with the step."""
        if self._enabled:
            lines = (f" {line}" if line.startswith(_SAMPLE) else line for line in text.strip("\n").splitlines())
            self._samples.write("\n".join([f"{_SAMPLE}{step}", *lines, "", ""]))
            self._samples.flush()

    def close(self) -> None:
        if self._enabled:
            self._progress.close()
            self._metrics.close()
            self._samples.close()
            self._events.close()
            self._enabled = False

    def _write_events(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            scalar = summary.scalar(name, float(value))
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=scalar))
        if time.monotonic() - self._flushed_s > _FLUSH_S:
            self._events.flush()
            self._flushed_s = time.monotonic()


class Progress:
    """Step, phase, a few metrics, tokens/s and the time left: a live line on a terminal, else a line now and then.

    Only process 0 shows it. The arguments are those of `Writer`.
    """

    def __init__(
        self, total: int, start: int = 0, show: Sequence[str] = (), every_s: float = 10.0, stream: TextIO | None = None
    ):
        self._total, self._step, self._shown, self._every_s = total, start, tuple(show), every_s
        self._stream, self._quiet = stream or sys.stderr, jax.process_index() != 0
        self._phase, self._figures, self._tokens = "", {}, 0
        self._pace: deque[tuple[float, int, int]] = deque(maxlen=_PACE)  # (seconds, step, tokens so far)
        self._printed_s = -math.inf
        self._live = None
        if self._stream.isatty() and not self._quiet:
            columns = rich.progress.BarColumn(bar_width=20), rich.progress.TextColumn("{task.description}", markup=False)
            console = rich.console.Console(file=self._stream)
            self._live = rich.progress.Progress(*columns, console=console, refresh_per_second=4, transient=True)
            self._task = self._live.add_task("", total=total, completed=start)
            self._live.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def phase(self, name: str) -> None:
        if name == self._phase:
            return
        self._phase = name
        self._pace.clear()  # steps of another phase take another time
        self._refresh(now=True)

    def tick(self, step: int, tokens: int) -> None:
        self._step = step
        self._tokens += tokens
        self._pace.append((time.monotonic(), step, self._tokens))
        self._refresh(now=step == self._total)

    def show(self, figures: Mapping[str, Any]) -> None:
        self._figures |= {name: figures[name] for name in self._shown if figures.get(name) is not None}

    def throughput(self) -> dict[str, float]:
        """Tokens and steps per second over the last steps; {} before the second one, whose start is a compilation."""
        if len(self._pace) < 2 or self._pace[-1][0] == self._pace[0][0]:
            return {}
        (t0, step0, tokens0), (t1, step1, tokens1) = self._pace[0], self._pace[-1]
        return {"tokens_per_s": (tokens1 - tokens0) / (t1 - t0), "steps_per_s": (step1 - step0) / (t1 - t0)}

    def line(self) -> str:
        """The text of the progress line."""
        parts = [f"{self._step}/{self._total}", self._phase, *(f"{k} {v:.4g}" for k, v in self._figures.items())]
        speed = self.throughput()
        if speed.get("tokens_per_s", 0) > 0:
            parts.append(f"{speed['tokens_per_s']:,.0f} tokens/s")
        if speed.get("steps_per_s", 0) > 0:
            left_s = round((self._total - self._step) / speed["steps_per_s"])
            parts.append(f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left")
        return "  ".join(part for part in parts if part)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _refresh(self, now: bool) -> None:
        if self._live:
            self._live.update(self._task, completed=self._step, description=self.line())
        elif not self._quiet and (now or time.monotonic() - self._printed_s >= self._every_s):
            self._printed_s = time.monotonic()
            self._stream.write(self.line() + "\n")
            self._stream.flush()


def _plain(value: Any, dtype: type) -> int | float | None:
    """A number as JSON writes it: integers as they are, floats as the shortest text that names their `dtype` value."""
    if isinstance(value, int | np.integer):
        return int(value)
    return float(str(dtype(value))) if math.isfinite(value) else None


def _truncate_lines(path: pathlib.Path, start: int | None) -> None:
    """Drops the lines of steps after `start`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if start is not None else ():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_atomic(path, "".join(kept))


def _truncate_samples(path: pathlib.Path, start: int | None) -> None:
    """Drops the samples of steps after `start`."""
    if not path.exists():
        return
    kept, keep = [], False
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if start is not None else ():
        if line.startswith(_SAMPLE):
            step = line.removeprefix(_SAMPLE).strip()
            keep = step.isdigit() and int(step) <= start
        if keep:
            kept.append(line)
    write_atomic(path, "".join(kept))
