"""The launch scripts: their syntax, what they pass on, and that set-up is repeated exactly when it has to be."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ["launch/setup.sh", "launch/local.sh", "launch/test.sh", ".ci/run"]

# Stands for Python: makes a "virtual environment" of itself, writes down what it is asked, fails where it is told to.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$*" in
  "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-c import sys, venv"*) [[ -z ${NO_PYTHON-} ]] ;;
  "- "*) echo "digest-${DIGEST-1}" ;;
  "-m uv pip install"*) [[ -z ${NO_UV-} ]] ;;
  "-m pip "*"requirements.lock"*) [[ -z ${NO_PIP-} ]] ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A clone whose only Python is the fake one: call it with a script's name and arguments."""
    root = tmp_path / "a clone"
    for name in [*SCRIPTS, "requirements.lock", "setup.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("bash", "dirname", "cat", "awk", "env", "flock", "rm", "touch", "mkdir", "cp"):
        (path / name).symlink_to(shutil.which(name))
    (path / "python3").write_text(PYTHON)
    (path / "python3").chmod(0o755)

    def call(*command, cwd=tmp_path, **env):
        log = tmp_path / "log"
        log.write_text("")
        env = {"PATH": str(path), "HOME": str(tmp_path / "no_home"), "LOG": str(log)} | env
        command = ["bash", str(root / command[0]), *command[1:]]
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return done, log.read_text().splitlines()

    call.root = root
    return call


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name):
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
    assert os.access(ROOT / name, os.X_OK) or name == "launch/setup.sh"  # which is sourced


def test_flags_go_on_to_the_experiment_as_they_are(clone):
    done, log = clone("launch/local.sh", "--", "--config.data=deal_or_no_deal", "--config.data_dir=a b", "--variant=paper")
    assert done.returncode == 0, done.stderr
    run = f"-P -m experiments.dream --workdir={clone.root}/runs/dream-deal_or_no_deal-paper"
    assert log[-1] == f"{run} --config.data=deal_or_no_deal --config.data_dir=a b --variant=paper"
    main = f"-P -m experiments.ablations --rows=main --variant=short --workdir={clone.root}/runs/concierge"
    assert clone("launch/local.sh")[1][-1] == main


def test_flags_without_the_dashes_are_refused(clone):
    done, log = clone("launch/local.sh", "--config.seed=1")
    assert done.returncode == 2 and not log
    assert done.stderr == "error: write -- before the flags of the experiment: bash launch/local.sh -- --config.seed=1\n"


def test_set_up_is_repeated_when_it_was_cut_short_or_its_input_changed(clone):
    def installs(**env):
        done, log = clone("launch/local.sh", **env)
        made = sum("-m venv" in line for line in log)
        return (
            done.returncode,
            made,
            sum("-m uv pip install" in line for line in log),
            sum("--editable" in line for line in log),
        )

    assert installs(NO_UV="1", NO_PIP="1") == (1, 1, 1, 0)
    assert installs() == (0, 1, 1, 1)  # starts anew
    assert installs() == (0, 0, 0, 0)
    assert installs(DIGEST="2") == (0, 0, 1, 1)  # into the same environment
    assert installs(DIGEST="2") == (0, 0, 0, 0)


def test_pip_takes_over_when_uv_does_not_work(clone):
    done, log = clone("launch/local.sh", NO_UV="1")
    assert done.returncode == 0 and "going on with pip" in done.stderr
    assert any("-m pip" in line and "--require-hashes" in line and "requirements.lock" in line for line in log)


def test_without_a_suitable_python_there_is_one_error(clone):
    done, _ = clone("launch/test.sh", NO_PYTHON="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python from 3.11") and done.stderr.count("\n") == 1


def test_ci_runs_the_tests_and_slow_ones_only_on_demand(clone):
    done, log = clone(".ci/run")
    assert done.returncode == 0 and "ruff check" in log[-2] and "pytest" in log[-1] and "-m not slow" in log[-1]
    _, log = clone("launch/test.sh", "--slow", "-x")
    assert "not slow" not in log[-1] and log[-1].endswith(" -x")


def test_the_lock_names_no_host_and_no_heavy_package():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock and "--index" not in lock and "--find-links" not in lock
    names = {line.split("==")[0].lower() for line in lock.splitlines() if "==" in line and not line.startswith(" ")}
    assert {"jax", "pytest", "ruff", "uv", "setuptools"} <= names
    assert not [name for name in names if name in ("tensorflow", "torch") or name.startswith(("nvidia", "tf-nightly"))]
