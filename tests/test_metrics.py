"""Metrics: the same bytes from the same run, resumed or not; fetched one step late; nothing of the clock in them."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_lm import metrics


def run(workdir, steps, start=None, total=6, seed_s=0.0):
    """A run of some steps, with a sample every third."""
    with metrics.Writer(workdir, total, start=start, show=["loss"], stream=io.StringIO()) as writer:
        writer.phase("training")
        for step in steps:
            writer.tick(step, tokens=100)
            writer.write(step, {"loss": 1 / (step + 3), "a/count": step, "bad": float("nan")})
            if step % 3 == 0:
                writer.samples(step, f"user: hi {step}\n=== step 1 is only text\nassistant: ho")


def files(workdir):
    return {name: (workdir / name).read_bytes() for name in ("metrics.jsonl", "samples.txt")}


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", range(1, 7))
    return files(tmp_path / "whole")


def test_lines_are_sorted_rounded_and_valid_json(whole):
    first = whole["metrics.jsonl"].decode().splitlines()[0]
    assert first == '{"a/count": 1, "bad": null, "loss": 0.25, "step": 1}'
    assert json.loads(whole["metrics.jsonl"].decode().splitlines()[3])["loss"] == 0.14285715  # 1 / 7 in float32


def test_the_last_bits_of_a_float64_leave_no_trace(tmp_path):
    with metrics.Writer(tmp_path, 1, stream=io.StringIO()) as writer:
        writer.write(1, {"x": 0.1 + 0.2, "y": 0.3, "z": np.float32(0.3)})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": 0.3, "y": 0.3, "z": 0.3}\n'


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_resumed_run_writes_the_same_bytes(tmp_path, whole, start):
    run(tmp_path, range(1, start + 2))  # one step further than the checkpoint
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"a/count": ')  # and a line that a kill cut short
    run(tmp_path, range(start + 1, 7), start=start)
    assert files(tmp_path) == whole


def test_a_fresh_run_starts_fresh_files(tmp_path, whole):
    run(tmp_path, range(0, 4))
    run(tmp_path, range(1, 7))
    assert files(tmp_path) == whole


def test_reduce_divides_sums_and_leaves_out_what_was_not_counted():
    pairs = {"a": (jnp.float32(6), jnp.float32(4)), "b": (jnp.float32(0), jnp.float32(0)), "c": (3.0, 2)}
    assert metrics.reduce(pairs) == {"a": 1.5, "c": 1.5}


def test_delayed_is_one_step_late():
    delayed = metrics.Delayed()
    assert delayed.flush() is None
    assert delayed.push(1, {"a": (jnp.float32(1), jnp.float32(1))}) is None
    assert delayed.push(2, {"a": (jnp.float32(4), jnp.float32(2))}) == (1, {"a": 1.0})
    assert delayed.flush() == (2, {"a": 2.0})
    assert delayed.flush() is None


def test_results_are_flat_sorted_and_replaced_whole(tmp_path):
    metrics.results(tmp_path, {"true/success": np.float64(0.5), "real_dialogues": 12, "data": "concierge"})
    path = metrics.results(tmp_path, {"wall_s": 1.5, "true/success": jnp.float32(0.25), "gap/total": float("inf")})
    assert path.read_text() == '{\n  "gap/total": null,\n  "true/success": 0.25,\n  "wall_s": 1.5\n}\n'
    assert [child.name for child in tmp_path.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    metrics.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        metrics.write_atomic(path, "new \udc00")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_progress_line_says_where_the_run_is(tmp_path, monkeypatch):
    seconds = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(seconds))
    stream = io.StringIO()
    with metrics.Writer(tmp_path, 3000, show=["loss"], every_s=0, stream=stream) as writer:
        writer.phase("rl")
        for step in range(1, 4):
            writer.tick(step, tokens=1500)
            writer.write(step, {"loss": 0.5, "other": 1})
    first, *_, last = stream.getvalue().splitlines()
    assert first == "0/3000  rl"
    assert last.startswith("3/3000  rl  loss 0.5  ") and " tokens/s  " in last and last.endswith(" left")


def test_a_terminal_gets_a_live_line_and_brackets_are_text(tmp_path):
    stream = io.StringIO()
    stream.isatty = lambda: True
    with metrics.Writer(tmp_path, 10, stream=stream) as writer:
        writer.phase("[red]rl")
        writer.tick(1, tokens=1)
        writer.write(1, {})
    assert "[red]rl" in stream.getvalue()


def test_tensorboard_events_hold_the_metrics_and_the_throughput(tmp_path):
    run(tmp_path, range(1, 4))
    run(tmp_path, range(3, 6), start=2)
    events = list((tmp_path / "tensorboard").iterdir())
    assert events and all("tfevents" in path.name for path in events)
    assert any(b"loss" in path.read_bytes() and b"tokens_per_s" in path.read_bytes() for path in events)
    assert "per_s" not in (tmp_path / "metrics.jsonl").read_text()
