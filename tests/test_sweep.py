"""launch/sweep.py: what runs, in which order, where it writes, and what is told; the runs are small Python programs."""

import importlib.util
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

SWEEP = pathlib.Path(__file__).parent.parent / "launch" / "sweep.py"
_spec = importlib.util.spec_from_file_location("sweep", SWEEP)
sweep = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweep)

# A run: writes down when it begins and ends, then finishes as told.
RUN = """
import os, pathlib, signal, sys, time
workdir, what = pathlib.Path(sys.argv[1].partition("=")[2]), sys.argv[2]
events = workdir.parent / "events"
def note(text):
    with open(events, "a") as file:
        file.write(text + " " + workdir.name + "\\n")
note("begin")
print("hello from", workdir.name, os.environ.get("XLA_FLAGS", ""), sorted(os.sched_getaffinity(0)))
if what == "slow":
    signal.signal(signal.SIGTERM, lambda *_: None)
    note("deaf")
    time.sleep(1)
if what == "wait":
    time.sleep(60)
time.sleep(0.15)
note("end")
if what != "lost":
    (workdir / "results.json").write_text("{}")
sys.exit(3 if what == "fail" else 0)
"""


@pytest.fixture
def bench(tmp_path):
    """Makes command lines; `bench.call` sweeps over them, `bench.events` is what the runs wrote down."""
    (tmp_path / "run.py").write_text(RUN)

    class Bench:
        path = tmp_path

        @staticmethod
        def line(name, what="ok", start=""):
            more = [f"--config.start={tmp_path / start}"] if start else []
            return shlex.join([sys.executable, "-S", str(tmp_path / "run.py"), f"--workdir={tmp_path / name}", what, *more])

        @staticmethod
        def start(lines, *args, **env):
            (tmp_path / "commands.txt").write_text("\n".join(lines) + "\n")
            command = [sys.executable, "-S", str(SWEEP), *args, str(tmp_path / "commands.txt")]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return subprocess.Popen(command, env=os.environ | env, **pipes)

        @classmethod
        def call(cls, lines, *args, **env):
            process = cls.start(lines, *args, **env)
            out, err = process.communicate(timeout=30)
            return process.returncode, out.splitlines(), err.splitlines()

        @staticmethod
        def events():
            path = tmp_path / "events"
            return path.read_text().splitlines() if path.exists() else []

    return Bench


def test_what_stands_after_a_blank_line_waits(bench):
    status, out, err = bench.call([bench.line("a"), bench.line("b"), "", "", bench.line("c")], "--jobs=2")
    assert (status, err) == (0, [])
    assert bench.events()[-2:] == ["begin c", "end c"] and {*bench.events()[:2]} == {"begin a", "begin b"}
    assert [line.split()[0] for line in out] == ["1/3", "2/3", "3/3"]
    assert f"  {bench.path.name}/c  " in out[2] and out[2].endswith(" min  ok")
    assert (bench.path / "a" / "log.txt").read_text().startswith("hello from a")


def test_what_begins_with_a_run_waits_for_that_run_alone(bench):
    lines = [bench.line("a"), bench.line("b", "slow"), bench.line("c"), "", bench.line("d", start="c"), bench.line("e")]
    assert bench.call(lines, "--jobs=2")[0] == 0
    events = bench.events()
    assert events.index("end c") < events.index("begin d") < events.index("end b") < events.index("begin e")


def test_what_begins_with_a_run_that_fails_begins_with_its_stage(bench):
    lines = [bench.line("a", "lost"), bench.line("b", "slow"), "", bench.line("c", start="a")]
    status, _, err = bench.call(lines, "--jobs=2")
    assert status == 1 and "ended without results.json" in err[0]
    assert bench.events()[-2:] == ["begin c", "end c"]


def test_at_most_so_many_at_a_time(bench):
    bench.call([bench.line(name) for name in "abc"], "--jobs=1")
    assert bench.events() == [f"{what} {name}" for name in "abc" for what in ("begin", "end")]


def test_what_is_done_is_not_started(bench):
    (bench.path / "a").mkdir()
    (bench.path / "a" / "results.json").write_text("{}")
    lines = [bench.line("a"), bench.line("b"), "", bench.line("c")]
    assert bench.call(lines, "--print") == (0, [lines[1], "", lines[3]], [])
    assert bench.events() == []
    _, out, _ = bench.call(lines)
    assert bench.events() == ["begin b", "end b", "begin c", "end c"]
    assert out[0] == "1 of 3 are done" and out[1].startswith("2/3") and not (bench.path / "a" / "log.txt").exists()


def test_shards_are_disjoint_and_together_everything():
    commands = sweep.read("\n".join(f"run --workdir=w/{i}" for i in range(7)))
    parts = [[command.workdir.name for command in sweep.share(commands, f"{i}/3")] for i in (1, 2, 3)]
    assert parts == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    for wrong in ("0/3", "4/3", "3", "a/b", ""):
        with pytest.raises(ValueError, match="is not one of"):
            sweep.share(commands, wrong)


def test_a_shard_counts_what_is_done_too(bench):
    lines = [bench.line(name) for name in "abcd"]
    (bench.path / "a").mkdir()
    (bench.path / "a" / "results.json").write_text("{}")
    assert bench.call(lines, "--print", "--shard=2/2")[1] == [lines[1], lines[3]]


def test_a_failure_stops_nothing_and_is_told_at_the_end(bench):
    lines = [
        bench.line("a", "fail"),
        bench.line("b", "lost"),
        "",
        bench.line("c"),
        "/not/there --workdir=" + str(bench.path / "d"),
    ]
    status, out, err = bench.call(lines)
    assert status == 1 and "end c" in bench.events()
    assert sorted(line.split()[-1] for line in out) == ["failed", "failed", "failed", "ok"]
    told = {line.split(": ")[1].split("/")[-1]: line for line in err}
    assert set(told) == {"a", "b", "d"} and all(line.endswith(f"/{name}/log.txt") for name, line in told.items())
    assert "exit status 3" in told["a"] and "without results.json" in told["b"] and "could not be started" in told["d"]


def test_a_log_goes_on_where_a_run_is_started_again(bench):
    bench.call([bench.line("a", "lost")])
    bench.call([bench.line("a")])
    assert (bench.path / "a" / "log.txt").read_text().count("hello from a") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_stopped_stops_the_runs_and_starts_no_other(bench, number):
    lines = [bench.line("a", "slow"), bench.line("b", "wait"), bench.line("c"), "", bench.line("d")]
    process = bench.start(lines, "--jobs=2")
    until = time.monotonic() + 20
    while len(bench.events()) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1 and err == "" and "the same command goes on" in out and out.startswith("1/4 ")
    assert out.count(" stopped\n") == 1 and sorted(bench.events()) == ["begin a", "begin b", "deaf a", "end a"]
    ours = str(bench.path / "run.py")
    running = [p for p in pathlib.Path("/proc").glob("[0-9]*/cmdline") if p.exists() and ours in _read(p)]
    assert not running


def _read(path):
    try:
        return path.read_text()
    except OSError:
        return ""


def test_each_job_has_its_share_of_the_cores():
    assert [sweep.cores_of(slot, 2, [0, 1, 2, 3]) for slot in (0, 1)] == [[0, 1], [2, 3]]
    assert [sweep.cores_of(slot, 3, [4, 5, 6, 7, 8]) for slot in (0, 1, 2)] == [[4], [5, 6], [7, 8]]
    assert [sweep.cores_of(slot, 2, [5, 6]) for slot in (0, 1)] == [[5], [6]]
    assert [sweep.cores_of(slot, 3, [0, 1]) for slot in (0, 1, 2)] == [[0], [1], [0]]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen on this system")
def test_a_run_on_one_core_has_no_pool_of_threads(bench):
    cores = sorted(os.sched_getaffinity(0))
    bench.call([bench.line("a"), bench.line("c")], f"--jobs={len(cores)}", XLA_FLAGS="--given")
    log = (bench.path / "a" / "log.txt").read_text()
    assert log == f"hello from a --given --xla_cpu_multi_thread_eigen=false [{cores[0]}]\n"
    if len(cores) > 1:
        bench.call([bench.line("b")], "--jobs=1", XLA_FLAGS="--given")
        assert (bench.path / "b" / "log.txt").read_text() == f"hello from b --given {cores}\n"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen on this system")
def test_a_run_beside_which_no_other_may_begin_has_all_cores(bench):
    cores = sorted(os.sched_getaffinity(0))
    lines = [bench.line("a"), "", bench.line("b", start="a"), bench.line("c", "slow", "a"), "", bench.line("d", start="b")]
    bench.call(lines, "--jobs=2")
    logs = {name: (bench.path / name / "log.txt").read_text() for name in "abcd"}
    had_all = [f"{cores}\n" in logs[name] for name in "abcd"]
    assert had_all == [True, *[len(cores) == 1] * 3], "c still runs when d begins"


@pytest.mark.parametrize(
    "line, args, message",
    [
        ("python run.py", (), "line 1 needs one --workdir=DIR"),
        ("python 'run.py --workdir=w", (), "line 1: No closing quotation"),
        ("run --workdir=w", ("--jobs=0",), "--jobs must be at least 1"),
        ("run --workdir=w", ("--shard=3/2",), "--shard=3/2 is not one of"),
    ],
)
def test_mistakes_are_one_line(bench, line, args, message):
    status, out, err = bench.call([line], *args)
    assert (status, out, len(err)) == (2, [], 1) and err[0].startswith(f"error: {message}")


def test_commands_come_from_the_standard_input_too():
    command = [sys.executable, "-S", str(SWEEP), "--print"]
    done = subprocess.run(command, input="run --workdir=w/a\n\n\nrun --workdir=w/b\n", capture_output=True, text=True)
    assert done.stdout == "run --workdir=w/a\n\nrun --workdir=w/b\n"
