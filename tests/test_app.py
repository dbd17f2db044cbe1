"""The start and the end of a program, from the outside: what a user types, what he is told, and the exit code."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from mbrl_lm import app
from mbrl_lm.config import Config
from mbrl_lm.data.records import DataError
from mbrl_lm.metrics import results

PROGRAM = """
import os, time, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mbrl_lm import app
from mbrl_lm.checkpoint import Checkpoints
from mbrl_lm.data.records import DataError
from mbrl_lm.metrics import results
from mbrl_lm.sharding import make_mesh

def main(run):
    if run.finished():
        return
    what = os.environ.get("TEST_MAIN", "")
    if what == "data":
        raise DataError("line 3 is not JSON\\ncorrect it")
    if what == "deaf":
        app.say("looping")
        time.sleep(60)
    with Checkpoints(run.checkpoints, keep=1) as checkpoints:
        if what == "loop":
            app.say("looping")
            while not run.stop_requested():
                time.sleep(0.01)
        everywhere = NamedSharding(make_mesh(run.config.mesh), PartitionSpec())
        checkpoints.save(run.config.train.rl_steps, {"x": jax.device_put(np.ones(2), everywhere)}, {}, {})
    app.write_params(run.workdir / "params.txt", {"mlp": {"up_DF": jax.numpy.ones((2, 3))}, "step": jax.numpy.ones(())})
    app.say(f"{run.config.model.width} {run.config.data} {jax.device_count()} {jax.process_count()}")
    if what == "results":
        results(run.workdir, {"x": 1})

app.run(main)
"""


def start(tmp_path, *args, what="", **env) -> subprocess.Popen:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = os.environ | {"TEST_MAIN": what, "HOME": str(tmp_path), "XDG_CACHE_HOME": ""} | env
    env.pop("JAX_NUM_CPU_DEVICES", None)
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(program), f"--workdir={tmp_path / 'w'}", *args], env=env, **pipes)


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def one_line(err: str) -> str:
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---- one process: the parts ----


def make_run(path, **changes):
    config = Config()
    for name, value in changes.items():
        *groups, field = name.split("__")
        setattr(functools.reduce(getattr, groups, config), field, value)
    return app.Run(config, "default", path)


def test_a_directory_of_another_config_is_refused_once_something_is_saved(tmp_path):
    app._write_config(make_run(tmp_path))
    app._write_config(make_run(tmp_path, seed=3))  # nothing is saved: a new start
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    app._write_config(make_run(tmp_path, seed=3, log_every=1, mesh__tensor=2))
    assert json.loads((tmp_path / "config.json").read_text())["mesh.tensor"] == 2
    with pytest.raises(app.ConfigError, match=r"model.width was 128 and is 64\. Give the flags of that run"):
        app._write_config(make_run(tmp_path, seed=3, model__width=64))
    assert json.loads((tmp_path / "config.json").read_text())["model.width"] == 128
    assert len((tmp_path / "commit.txt").read_text().splitlines()) == 1


def test_a_new_start_with_another_config_makes_everything_anew(tmp_path):
    app._write_config(make_run(tmp_path))
    for name in ("logs", "partner", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer.model").touch()
    app._write_config(make_run(tmp_path))
    assert (tmp_path / "tokenizer.model").exists() and (tmp_path / "partner").exists()
    app._write_config(make_run(tmp_path, seed=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["commit.txt", "config.json", "data"]


def test_a_finished_run_says_where_its_report_is(tmp_path, capsys):
    run = make_run(tmp_path)
    assert not run.finished()
    results(tmp_path, {"x": 1})
    assert run.finished() and str(tmp_path / "results.json") in capsys.readouterr().out
    (tmp_path / "report.md").touch()
    assert run.finished() and str(tmp_path / "report.md") in capsys.readouterr().out


def test_the_compilation_cache_survives_without_a_home(tmp_path, monkeypatch):
    run = make_run(tmp_path / "w")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert app._cache_dir(run) == tmp_path / "cache" / "mbrl_lm" / "xla"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert app._cache_dir(run) == tmp_path / "w" / "xla_cache"


def test_write_params_names_shapes_letters_and_the_count(tmp_path):
    params = {"mlp": {"up_DF": np.ones((2, 3), np.float32)}, "bias": np.ones((4,), np.float32)}
    app.write_params(tmp_path / "params.txt", params)
    assert (tmp_path / "params.txt").read_text().splitlines() == [
        "bias       4    float32  -   -",
        "mlp/up_DF  2x3  float32  DF  -",
        "10 parameters",
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("line 3 is not JSON\ncorrect it"), "error: line 3 is not JSON; correct it"),
        (app.ConfigError("bad"), "error: bad"),
        (OSError(28, "No space left on device"), "error: the disk is full; free some space and give the same command"),
    ],
)
def test_errors_of_the_user_are_told_in_one_line(error, message, capsys):
    with pytest.raises(SystemExit) as caught, app._told():
        raise error
    assert caught.value.code == 2
    assert message in one_line(capsys.readouterr().err)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(FileNotFoundError), app._told():
        raise FileNotFoundError(2, "a bug")


# ---- processes ----


def test_an_unknown_field_and_bad_data_end_with_one_line(tmp_path):
    processes = [
        start(tmp_path, "--config.model.wdth=3"),
        start(tmp_path, what="data"),
        start(tmp_path, "--debug", what="data"),
    ]
    field, data, debug = map(finish, processes)
    assert field[0] == data[0] == debug[0] == 2
    assert "the nearest one is --config.model.width" in one_line(field[2])
    assert one_line(data[2]) == "error: line 3 is not JSON; correct it\n"
    assert "Traceback" in debug[2] and debug[2].endswith(data[2])


def test_only_the_given_fields_are_overridden_and_the_same_command_resumes(tmp_path):
    args = ("--config.model.width=64", "--config.cpu_devices=3", "--config.train.rl_steps=9")
    code, out, err = finish(start(tmp_path, *args, what="results"))
    assert (code, out, err) == (0, "64 concierge 3 1\n", "")
    written = json.loads((tmp_path / "w" / "config.json").read_text())
    assert written["model.width"] == 64 and written["variant"] == "default"
    assert list((tmp_path / ".cache" / "mbrl_lm" / "xla").iterdir())
    assert "mlp/up_DF" in (tmp_path / "w" / "params.txt").read_text()
    other, same = map(finish, [start(tmp_path, *args[:2]), start(tmp_path, *args)])
    assert other[0] == 2 and "train.rl_steps was 9 and is" in one_line(other[2])
    assert same[:2] == (0, f"this run is finished: its report is {tmp_path / 'w' / 'results.json'}\n")


def test_a_signal_saves_and_exits_cleanly(tmp_path):
    process = start(tmp_path, what="loop")
    assert process.stdout.readline() == "looping\n"
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0 and "stopped as asked; the same command resumes" in out and "stopping after this step" in err
    assert len(list((tmp_path / "w" / "checkpoints").iterdir())) == 1


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    process = start(tmp_path, what="deaf")
    assert process.stdout.readline() == "looping\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n" and "a second signal" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == -signal.SIGTERM


def test_two_processes_make_one_run_and_stop_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [start(tmp_path, what="loop", JAX_PROCESS_ID=str(i), **joined) for i in range(2)]
    assert any(line == "looping\n" for line in processes[0].stdout)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other, second, _) = map(finish, processes)
    assert code == other == 0, err
    assert "concierge 4 2\n" in out and "concierge" not in second
    assert len(list((tmp_path / "w" / "checkpoints").iterdir())) == 1
