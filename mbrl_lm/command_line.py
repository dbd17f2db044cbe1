"""The command line: a few flags, and `--config.a.b=v` for every field of the config.

absl and ml_collections do the parsing; here every mistake becomes one line that says what would be right.
"""

import dataclasses
import difflib
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from mbrl_lm import contradictions, presets
from mbrl_lm.config import Config, ConfigError, override

FLAGS = flags.FLAGS
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; the same command resumes what is in it.")
VARIANT = flags.DEFINE_string("variant", "default", "The preset of --config.data to start from.")
DEBUG = flags.DEFINE_bool("debug", False, "Show tracebacks and the libraries' warnings.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes. The addresses come from the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU), or from "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which imply this flag.",
)

# What a resumed run may change: how often it reports, and what it runs on. All else changes what it computes.
MAY_CHANGE = (
    "checkpoint_every", "checkpoints", "cpu_devices", "eval.every", "eval.rl_every", "eval.samples", "log_every",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat", "train.micro_batch",
)  # fmt: skip


def parse(argv: Sequence[str], of_run: bool = False) -> Config:
    """The config of a command line: the preset of `--config.data` and `--variant`, and the fields that were given.

    Args:
      argv: `sys.argv`, which absl reads too.
      of_run: start from the config of the run in `--workdir` instead; only how it is judged, and on what, can be given.

    Raises:
      ConfigError: an unknown flag or field, a value of a wrong type, a config that cannot work, or no run.
      SystemExit: after `--help`.
    """
    if any(re.fullmatch(r"--?(h|help|helpshort)", arg) for arg in argv[1:]):
        _help(argv[0])
    _check_fields(argv)
    config_flags.DEFINE_config_dataclass("config", Config())  # not at import: it reads the command line
    try:
        rest = FLAGS(argv)[1:]
    except flags.Error as error:
        raise ConfigError(_wrong_type(str(error))) from error
    if rest:
        raise ConfigError(f"{rest[0]!r} is not a flag: write --name=value")
    given = config_flags.get_override_values(FLAGS["config"])
    if of_run:
        config = read_config(pathlib.Path(WORKDIR.value or ""))
        fixed = [name for name in given if not name.startswith(("eval.", "plan")) and name not in MAY_CHANGE]
        if fixed:
            raise ConfigError(f"--config.{fixed[0]} is fixed by the run in {WORKDIR.value}: leave it out")
    else:
        config = presets.preset(given.get("data", Config().data), VARIANT.value)
    override(config, given)
    contradictions.check(config)
    return config


def read_config(workdir: pathlib.Path) -> Config:
    """The config of the run in a directory.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    path = workdir / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        del fields["variant"]
        return override(Config(), {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})
    except FileNotFoundError as error:
        raise ConfigError(f"--workdir={workdir} holds no run: train one there with experiments.dream") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): is it of another version of this program?") from error


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        flat |= flatten(value, f"{prefix}{field.name}.") if nested else {prefix + field.name: value}
    return flat


def _help(program: str) -> NoReturn:
    """Writes all flags and the fields of the config with their defaults, and ends the process."""
    sys.stdout.write(f"{sys.modules['__main__'].__doc__ or program}\n\nFlags:\n")
    for flag in WORKDIR, VARIANT, DISTRIBUTED, DEBUG:
        sys.stdout.write(f"  --{flag.name}={flag.default}\n      {FLAGS[flag.name].help}\n")
    sys.stdout.write("\nThe config, before the preset of --config.data and --variant:\n")
    sys.stdout.writelines(f"  --config.{name}={value}\n" for name, value in flatten(Config()).items())
    sys.exit(0)


def _check_fields(argv: Sequence[str]) -> None:
    """Raises a ConfigError if a `--config.a.b` names no field; absl and ml_collections would show a traceback."""
    fields = flatten(Config())
    for arg in argv[1:]:
        if arg == "--":
            return
        if re.match(r"--?(no)?config(=|$)", arg):
            raise ConfigError(f"{arg.split('=')[0]} takes no value: set single fields, as in --config.model.width=256")
        found = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        if found is None or found[1] in fields:
            continue
        inside = [name for name in fields if name.startswith(found[1] + ".")]
        if inside:
            raise ConfigError(f"--config.{found[1]} is a group of fields: set one of them, as in --config.{inside[0]}=...")
        nearest = difflib.get_close_matches(found[1], fields, n=1, cutoff=0)[0]
        raise ConfigError(f"there is no field --config.{found[1]}; the nearest one is --config.{nearest}")


def _wrong_type(message: str) -> str:
    found = re.match(r"flag --config\.([\w.]+)=(.*?):", message)
    if found is None:
        return message
    default = flatten(Config())[found[1]]
    return f"--config.{found[1]}={found[2]} has the wrong type: it takes {type(default).__name__}, as in {default!r}"
