"""Runs command lines, a few at a time, and skips those that are done:

    python launch/sweep.py [--jobs=2] [--shard=1/4] [--print] [FILE]

One command line per line of FILE (or of the standard input), each with the --workdir=DIR that it writes to; a line whose DIR
holds results.json is done. What stands after a blank line begins when all before it has ended, or as soon as the run is done
that it begins with, --config.start=DIR. The output of each goes to DIR/log.txt. Each of the jobs has its own share of this
machine's cores; a run beside which no other one may begin has them all. A run that fails stops no other one; the exit status
is then 1, and the last lines name it. Ctrl-C or SIGTERM asks those that run to stop, a second one asks again; the same
command goes on with what is left.
"""

import argparse
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_POLL_S = 0.05
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false"  # a pool of threads on one core only gets in its own way


def finished(workdir: pathlib.Path) -> bool:
    """Whether a run has come to its end."""
    return (workdir / "results.json").exists()


class Command(NamedTuple):
    """One line: what it says, where it writes to, its stage, which begins when the one before has ended, and its start."""

    line: str
    workdir: pathlib.Path
    stage: int
    start: pathlib.Path | None = None  # of another run, with which it begins

    @property
    def name(self) -> str:
        return "/".join(self.workdir.parts[-2:])

    @property
    def log(self) -> pathlib.Path:
        return self.workdir / "log.txt"

    def done(self) -> bool:
        return finished(self.workdir)


class Job(NamedTuple):
    """A command that runs."""

    command: Command
    process: subprocess.Popen
    slot: int
    began_s: float


class Stop:
    """Counts how often this process was asked to stop; whoever holds it passes that on."""

    def __init__(self):
        self.asked = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        self.asked += 1


def read(text: str) -> list[Command]:
    """The commands of a file.

    Raises:
      ValueError: a line that cannot be split into words, or has no --workdir.
    """
    commands, stage, blank = [], 0, False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            blank = True
            continue
        stage, blank = stage + (blank and bool(commands)), False
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        given = _values(words, "--workdir")
        if len(given) != 1 or not given[0]:
            raise ValueError(f"line {number} needs one --workdir=DIR, which tells whether it is done: {line}")
        start = next(map(pathlib.Path, _values(words, "--config.start")), None)
        commands.append(Command(line.strip(), pathlib.Path(given[0]), stage, start))
    return commands


def _values(words: Sequence[str], flag: str) -> list[str]:
    return [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]


def share(commands: Sequence[Command], shard: str) -> list[Command]:
    """Every n-th command from the i-th on, for a shard i/n.

    Raises:
      ValueError: that is no shard.
    """
    try:
        i, n = map(int, shard.split("/"))
    except ValueError:
        i = n = 0
    if not 1 <= i <= n:
        raise ValueError(f"--shard={shard} is not one of 1/n, 2/n, ... n/n")
    return list(commands[i - 1 :: n])


def cores_of(slot: int, jobs: int, cores: Sequence[int]) -> list[int]:
    """The cores of one of the jobs: an equal share, or one core that several have where there are more jobs than cores."""
    if jobs >= len(cores):
        return [cores[slot % len(cores)]]
    return list(cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs])


def launch(command: Command, slot: int, jobs: int) -> Job:
    """Starts a command on the cores of its slot, in a session of its own: a terminal's Ctrl-C reaches it once, from us.

    One job has all cores.
    """
    env, pin = dict(os.environ), None
    if hasattr(os, "sched_setaffinity"):
        cores = cores_of(slot, jobs, sorted(os.sched_getaffinity(0)))
        if len(cores) == 1:
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {_ONE_CORE}".strip()

        def pin():
            os.sched_setaffinity(0, cores)

    command.workdir.mkdir(parents=True, exist_ok=True)
    with open(command.log, "ab") as log:
        process = subprocess.Popen(
            shlex.split(command.line), env=env, preexec_fn=pin, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Job(command, process, slot, time.monotonic())


def may_begin(waiting: Sequence[Command], running: Sequence[Command]) -> Command | None:
    """The first command of the earliest stage that has not ended, or that begins with a run that is done."""
    stage = min((command.stage for command in [*waiting, *running]), default=0)
    return next((x for x in waiting if x.stage == stage or (x.start and finished(x.start))), None)


def run_all(commands: Sequence[Command], jobs: int, stop: Stop) -> Iterator[tuple[Command, str, float]]:
    """Runs commands, `jobs` at a time; as they end, yields each with what is wrong with it ("": nothing) and its minutes."""
    waiting, running, passed_on = list(commands), [], stop.asked
    while (waiting and not stop.asked) or running:
        while len(running) < jobs and not stop.asked:
            command = may_begin(waiting, [job.command for job in running])
            if command is None:
                break
            waiting.remove(command)
            slot = min(set(range(jobs)) - {job.slot for job in running})
            alone = not running and may_begin(waiting, [command]) is None  # until it ends
            try:
                running.append(launch(command, slot, 1 if alone else jobs))
            except OSError as error:
                yield command, f"it could not be started: {error}", 0.0
        if passed_on < stop.asked:
            passed_on = stop.asked
            for job in running:
                job.process.terminate()
        for job in [job for job in running if job.process.poll() is not None]:
            running.remove(job)
            yield job.command, _wrong(job), (time.monotonic() - job.began_s) / 60
        if running:
            time.sleep(_POLL_S)


def _wrong(job: Job) -> str:
    if job.process.returncode:
        return f"exit status {job.process.returncode}"
    return "" if job.command.done() else "it ended without results.json"


def run(commands: Sequence[Command], jobs: int) -> int:
    """Runs what is not done, with one line for each that ends; returns the exit status."""
    stop, failed = Stop(), []
    left = [command for command in commands if not command.done()]
    ended = len(commands) - len(left)
    if ended:
        _say(f"{ended} of {len(commands)} are done")
    for command, wrong, minutes in run_all(left, jobs, stop):
        ended += 1
        how = "ok" if not wrong else "stopped" if stop.asked else "failed"
        failed += [(command, wrong)] if how == "failed" else []
        _say(f"{ended}/{len(commands)}  {command.name}  {minutes:.1f} min  {how}")
    if stop.asked:
        _say("stopped as asked; the same command goes on with what is left")
    for command, wrong in failed:
        sys.stderr.write(f"error: {command.name}: {wrong}; see {command.log}\n")
    return 1 if failed or stop.asked else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _print_left(commands: Sequence[Command]) -> None:
    """What is not done, in the form that it was read in."""
    stage = None
    for command in commands:
        if not command.done():
            _say(command.line if stage in (None, command.stage) else f"\n{command.line}")
            stage = command.stage


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default="-", help="of command lines; - is the standard input")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="only every N-th line, from the I-th on")
    parser.add_argument("--print", action="store_true", help="print what is left instead of running it")
    given = parser.parse_args(argv)
    try:
        if given.jobs < 1:
            raise ValueError("--jobs must be at least 1")
        text = sys.stdin.read() if given.file == "-" else pathlib.Path(given.file).read_text(encoding="utf-8")
        commands = share(read(text), given.shard)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if given.print:
        _print_left(commands)
        return 0
    return run(commands, given.jobs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
