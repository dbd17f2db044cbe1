"""Tables of many runs: their command lines, run by launch/sweep.py, and the frame of a program that makes such a table."""

import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from mbrl_lm.config import ConfigError

SWEEP = pathlib.Path(__file__).parent.parent / "launch" / "sweep.py"
Stages = list[list[str]]  # command lines; those of a stage begin when the one before has ended, or their own start is done


def command(python: str, module: str, workdir: pathlib.Path, variant: str, fields: Mapping[str, Any]) -> str:
    """One run as a command line; `fields` are those of the config that it sets."""
    given = [f"--config.{name}={str(value).replace(', ', ',')}" for name, value in fields.items()]
    return shlex.join([python, "-m", module, f"--workdir={workdir}", f"--variant={variant}", *given])


def text(stages: Stages) -> str:
    """As launch/sweep.py reads them."""
    return "\n\n".join("\n".join(stage) for stage in stages) + "\n"


def run(stages: Stages, workdir: pathlib.Path, jobs: int) -> int:
    """Runs what is not done, from W/commands.txt; being stopped stops all of it. Returns the exit status."""
    commands = workdir / "commands.txt"
    commands.write_text(text(stages), encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(SWEEP), f"--jobs={jobs}", str(commands)], start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: process.terminate())
    return process.wait()


def make_flags(variant: str = "default") -> flags.FlagValues:
    """Flags that these programs have in common, with the variant they take; those of one run are not meant here."""
    own = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "where the runs and the table are put", flag_values=own)
    flags.DEFINE_string("variant", variant, "the preset of every run", flag_values=own)
    flags.DEFINE_integer("jobs", 2, "runs at a time", lower_bound=1, flag_values=own)
    flags.DEFINE_bool("list", False, "write the command lines instead of running them", flag_values=own)
    flags.DEFINE_bool("table_only", False, "write the table of the runs that are there", flag_values=own)
    flags.DEFINE_string("from_csv", None, "the CSV of a table: the table without its runs", flag_values=own)
    flags.DEFINE_bool("help", False, "this text", flag_values=own)
    return own


def main(argv: Sequence[str], own: flags.FlagValues, doc: str, body: Callable[[flags.FlagValues], int]) -> int:
    """Parses `own`, calls `body` with it, and tells a user's mistake in one line."""
    try:
        rest = own(list(argv))[1:]
        if rest:
            raise ConfigError(f"{rest[0]!r} is not a flag: write --name=value")
        if own.help:
            sys.stdout.write(f"{doc}\n{own.get_help()}")
            return 0
        return body(own)
    except (flags.Error, ConfigError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
