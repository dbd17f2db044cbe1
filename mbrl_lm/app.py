"""The start and the end of a program: flags, devices, run directory, pre-emption, and errors in one line.

An experiment is `app.run(main)` with `main(run)`. Its config is the preset of `--config.data` and `--variant`, changed by
the `--config.a.b=v` that were given and by nothing else. Whatever a user can get wrong ends the process with exit code 2 and
one line on stderr; `--debug` shows where it happened.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import app as absl_app
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from mbrl_lm import command_line, metrics, report, sharding
from mbrl_lm.checkpoint import CheckpointError, is_full_disk, saved_steps
from mbrl_lm.config import Config, ConfigError
from mbrl_lm.data.records import DataError
from mbrl_lm.metrics import write_atomic

_EXIT_USER_ERROR = 2


@dataclasses.dataclass(frozen=True)
class Run:
    """What an experiment is given."""

    config: Config
    variant: str
    workdir: pathlib.Path
    preempted: threading.Event = dataclasses.field(default_factory=threading.Event)
    began_s: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.workdir / "checkpoints"

    def stop_requested(self) -> bool:
        """Whether to save and return now: some process got SIGTERM or SIGINT. Every process has to ask after every step."""
        if jax.process_count() == 1:
            return self.preempted.is_set()
        return bool(multihost_utils.process_allgather(np.int32(self.preempted.is_set())).any())

    def finished(self) -> bool:
        """Whether the results of this run are written; says so, and where the report is."""
        results, report = self.workdir / "results.json", self.workdir / "report.md"
        if results.exists():
            say(f"this run is finished: its report is {report if report.exists() else results}")
        return results.exists()


def run(main: Callable[[Run], None], of_run: bool = False) -> NoReturn:
    """Parses the flags, makes the run directory, calls `main(run)` and exits: with 0 if it returns, 2 on a user's error.

    Args:
      main: the experiment.
      of_run: it looks at the run in `--workdir`, whose config it takes, and starts none.
    """
    absl_app.run(lambda config: _run(main, config, of_run), flags_parser=functools.partial(_parse, of_run=of_run))


def say(text: str) -> None:
    """One line to the user, on stdout, from process 0 only."""
    if jax.process_index() == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def conclude(run: Run, figures: Mapping[str, float], samples: str) -> None:
    """Writes the report and `results.json`, and says what was found. Only after that is the run finished."""
    page = report.write_report(run.workdir, figures, samples)
    metrics.results(run.workdir, figures)
    say(report.headline(run.workdir, figures))
    say(f"the report is {page}")


def record(run: Run, figures: Mapping[str, float]) -> None:
    """Puts figures that were found later into the `results.json` of a finished run; only says so where it goes on."""
    path = run.workdir / "results.json"
    if path.exists():
        metrics.results(run.workdir, json.loads(path.read_text(encoding="utf-8")) | dict(figures))
        say(f"the figures are in {path}")
    else:
        say("the run is not finished: it has no results.json yet, and the figures are only on the page")


def write_params(path: str | pathlib.Path, params: Any) -> None:
    """Writes one line per parameter: path, shape, type, letters of its axes, and how it is laid out on the mesh.

    Args:
      path: of the text file.
      params: a tree of arrays, or of ShapeDtypeStructs.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    rows, count = [], 0
    for names, leaf in leaves:
        layout = getattr(getattr(leaf, "sharding", None), "spec", None)
        name = jax.tree_util.keystr(names, simple=True, separator="/")
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((name, shape, str(leaf.dtype), sharding.letters(names, leaf.ndim) or "-", str(layout or "-")))
        count += leaf.size
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if jax.process_index() == 0:
        write_atomic(path, "\n".join([*lines, f"{count:,} parameters", ""]))


def _run(main: Callable[[Run], None], config: Config, of_run: bool) -> None:
    with _told():
        if not command_line.WORKDIR.value:
            raise ConfigError("--workdir=DIR is missing: it names the directory of this run")
        run = Run(config, command_line.VARIANT.value, pathlib.Path(command_line.WORKDIR.value).absolute())
        _quiet_logs()
        if of_run:
            _set_up_jax(run)
            return main(run)
        _make_workdir(run)
        _set_up_jax(run)
        _write_config(run)
        _catch_signals(run)
        main(run)
        if run.preempted.is_set() and not (run.workdir / "results.json").exists():
            say("stopped as asked; the same command resumes")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Ends the process on what a user can put right; everything else is a bug and keeps its traceback."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError) as error:
        _fail(str(error), error)
    except OSError as error:
        if not is_full_disk(error):
            raise
        _fail("the disk is full; free some space and give the same command, which resumes", error)


def _fail(message: str, error: BaseException | None = None) -> NoReturn:
    """Ends the process with one line (before it, the traceback, if it is wanted)."""
    if error is not None and command_line.FLAGS.is_parsed() and command_line.DEBUG.value:
        traceback.print_exception(error)
    sys.stderr.write(f"error: {'; '.join(line.strip() for line in message.strip().splitlines())}\n")
    sys.stderr.flush()
    if error is not None and command_line.FLAGS.is_parsed() and jax.distributed.is_initialized():
        os._exit(_EXIT_USER_ERROR)  # an ordinary exit would wait for the other processes
    sys.exit(_EXIT_USER_ERROR)


def _parse(argv: Sequence[str], of_run: bool) -> Config:
    try:
        return command_line.parse(argv, of_run)
    except ConfigError as error:
        _fail(str(error), error)


# ---- the run directory ----


def _make_workdir(run: Run) -> None:
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(run.workdir, os.W_OK):
            raise PermissionError(errno.EACCES, "it is not writable")
    except OSError as error:
        raise ConfigError(f"--workdir={run.workdir} cannot be used ({error.strerror}): give another one") from error


def _write_config(run: Run) -> None:
    """Writes `config.json` and `commit.txt`; refuses a directory whose run was started with another config.

    Raises:
      ConfigError: naming the fields that differ. A directory in which nothing was saved yet may be started anew.
    """
    path = run.workdir / "config.json"
    text = json.dumps({"variant": run.variant, **command_line.flatten(run.config)}, indent=2)
    config = json.loads(text)  # as it reads when it is resumed: a tuple is a list
    begun = saved_steps(run.checkpoints) or (run.workdir / "results.json").exists()
    if path.exists() and begun:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is damaged ({error}): use another --workdir") from error
        differing = [
            f"{name} was {before.get(name)!r} and is {config.get(name)!r}"
            for name in {**config, **before}
            if before.get(name) != config.get(name) and name not in command_line.MAY_CHANGE and name != "variant"
        ]
        if differing:
            named = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if differing[5:] else "")
            raise ConfigError(
                f"{run.workdir} holds a run with another config: {named}. Give the flags of that run, or another --workdir"
            )
    if jax.process_index() == 0:
        if not begun and path.exists() and path.read_text(encoding="utf-8") != text + "\n":
            _remove_derived(run.workdir)
        write_atomic(path, text + "\n")
        commits = run.workdir / "commit.txt"
        known = commits.read_text(encoding="utf-8").split("\n")[:-1] if commits.exists() else []
        now = commit()
        if now not in known[-1:]:
            write_atomic(commits, "\n".join([*known, now, ""]))


def _remove_derived(workdir: pathlib.Path) -> None:
    """Removes what a start with another config made before its first checkpoint (prepared data are keyed by content)."""
    (workdir / "tokenizer.model").unlink(missing_ok=True)
    for name in ("logs", "partner"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def commit() -> str:
    """The commit of the code, "+ changes" if the tree is not clean; "unknown" without git."""

    def git(*command: str) -> str:
        git = ["git", "-C", str(pathlib.Path(__file__).parent), *command]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" + changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ---- the machine ----


def _quiet_logs() -> None:
    """Leaves the libraries' warnings to --debug: what goes wrong is raised, and told once."""
    if command_line.DEBUG.value:
        return
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("jax").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _set_up_jax(run: Run) -> None:
    """Everything that has to be set before the backend starts."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if "JAX_NUM_CPU_DEVICES" not in os.environ:  # has no effect where there is an accelerator
        jax.config.update("jax_num_cpu_devices", run.config.cpu_devices)
    # Two programs in flight on virtual devices may each hold a thread that the other's collective waits for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(_cache_dir(run)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if command_line.DISTRIBUTED.value or "JAX_COORDINATOR_ADDRESS" in os.environ:
        counts = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        try:  # what is not given here, jax asks the cluster for
            jax.distributed.initialize(**{k: int(os.environ[v]) for k, v in counts.items() if v in os.environ})
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"the processes cannot be joined: {error}. Set JAX_COORDINATOR_ADDRESS=host:port, "
                              "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave --distributed out") from error  # fmt: skip


def _cache_dir(run: Run) -> pathlib.Path:
    """Where compiled programs are kept from run to run; in the run directory if there is no writable home."""
    with contextlib.suppress(OSError, RuntimeError):
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        path = pathlib.Path(home) / "mbrl_lm" / "xla"
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    return run.workdir / "xla_cache"


def _catch_signals(run: Run) -> None:
    """The first SIGTERM or SIGINT asks the loop to save and return; a second one ends the process at once."""

    def ask(number, frame):
        run.preempted.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; a second signal ends the process at once\n")  # safe within a handler

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
