"""The frame of a run: its intervals, and that what it learns goes on where it was stopped."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from fakes import one_device
from tiny import config_of, dialogue, world

from mbrl_lm import app, learner
from mbrl_lm.checkpoint import saved_steps
from mbrl_lm.loop import Loop
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.replay import Replay

CFG = config_of(checkpoint_every=2, log_every=1, eval__every=3, train__supervised_steps=4, train__rl_steps=3)
TOTAL = 7


@functools.cache
def parts():
    w = world("chat", model__layers=1)
    return functools.partial(learner.init_state, w.net, make_optimizer(CFG.train)), w


def go(workdir, stop_at=None):
    """A run whose updates count to TOTAL; returns (steps learnt, steps evaluated, whether it finished, last state)."""
    run, (init_state, w) = app.Run(CFG, "tiny", workdir), parts()
    real = dialogue(w.protocol, ["bos e >a a >u b stop"] * 2)
    replay, learnt, evaluated = Replay(4, CFG.tokens, CFG.turns), [], []
    with Loop(run, one_device(), init_state, TOTAL, replay) as loop:
        for step in loop:
            loop.state = loop.state.replace(step=loop.state.step + 1)
            replay.collected += 1
            loop.learnt({"half": (jnp.array(step / 2), jnp.array(1.0))}, real)
            learnt.append(step)
            if loop.evaluates:
                evaluated.append(step + 1)
                loop.write({"figure": float(step)}, "<bos>")
            if step + 1 == stop_at:
                run.preempted.set()
    assert replay.collected == int(loop.state.step)
    return learnt, evaluated, loop.finished, loop.state


def test_intervals(tmp_path):
    learnt, evaluated, finished, state = go(tmp_path)
    assert learnt == list(range(TOTAL)) and finished and int(state.step) == TOTAL
    assert evaluated == [3, 4, 6]  # every third, and where RL begins; the last evaluation is the experiment's
    assert saved_steps(tmp_path / "checkpoints") == [4, 6, 7]  # the newest three of 2, 4, 6 and the last
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 4, 5, 6, 6, 7]
    assert [row["half"] for row in rows if "half" in row] == [k / 2 for k in range(TOTAL)]
    assert (tmp_path / "params.txt").exists()


@pytest.mark.parametrize("stop_at", [3, 7])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, stop_at):
    learnt, _, finished, _ = go(tmp_path / "a", stop_at)
    assert learnt[-1] + 1 == stop_at == saved_steps(tmp_path / "a" / "checkpoints")[-1] and not finished
    rest, _, finished, state = go(tmp_path / "a")
    assert learnt + rest == list(range(TOTAL)) and finished and int(state.step) == TOTAL
    go(tmp_path / "b")
    for name in ("metrics.jsonl", "samples.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert np.isfinite(state.params["embed_VD"]).all()
