"""Going on where another run stopped: what is taken over, and which runs are refused."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from fakes import one_device
from tiny import config_of, largest_difference, world

from mbrl_lm import app, command_line, learner, trained
from mbrl_lm.checkpoint import Checkpoints, saved_steps
from mbrl_lm.config import ConfigError
from mbrl_lm.loop import Loop
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.replay import Replay

STEPS = 4  # by likelihood


def config(**values):
    return config_of(model__layers=1, train__supervised_steps=STEPS, **values)


def fresh(cfg, seed=0):
    w = world("chat", model__layers=1)
    return jax.jit(learner.initialiser(cfg, w.net))(jax.random.key(seed))


def finished(directory, cfg, at=STEPS):
    """Leaves a run with one checkpoint behind; its state."""
    params = jax.tree.map(lambda x: x + 1.5, fresh(cfg).params)
    _, opt_state = make_optimizer(cfg.train).update(params, fresh(cfg).opt_state, params)
    state = fresh(cfg).replace(step=jnp.int32(at), params=params, opt_state=opt_state, real_mean=jnp.float32(9.0))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"variant": "tiny", **command_line.flatten(cfg)}))
    replay = Replay(max(cfg.collect.capacity, 1), cfg.tokens, cfg.turns)
    replay.collected = 5
    with Checkpoints(directory / "checkpoints", 3) as checkpoints:
        checkpoints.save(at, state, replay.arrays(), {"wall_s": 12.5})
    return state


def take_over(cfg):
    return trained.take_over(cfg, world("chat", model__layers=1).net, one_device(), fresh(cfg, 1))


def test_parameters_and_optimiser_are_taken_over_and_nothing_else(tmp_path):
    theirs = finished(tmp_path / "start", config(train__rl_steps=0, imagine__batch=0, collect__capacity=7))
    cfg = config(start=str(tmp_path / "start"), imagine__user="population", train__rl_steps=20, guard__penalty=0.1)
    state, seconds = take_over(cfg)
    assert seconds == 12.5 and int(state.step) == STEPS
    assert largest_difference((state.params, state.opt_state), (theirs.params, theirs.opt_state)) == 0
    own = fresh(cfg, 1)
    for name in ("target", "reference", "population", "real_mean", "return_high", "doubt_U", "anchor_XW", "imagined_tokens"):
        assert largest_difference(getattr(state, name), getattr(own, name)) == 0, name
    assert largest_difference(state.params, own.params) > 1


def test_a_run_begins_where_the_other_one_stopped(tmp_path):
    finished(tmp_path / "start", config())
    cfg, w = config(start=str(tmp_path / "start"), train__rl_steps=2, checkpoint_every=100), world("chat", model__layers=1)
    begin = functools.partial(trained.take_over, cfg, w.net, one_device())
    (tmp_path / "own").mkdir()
    run, replay = app.Run(cfg, "tiny", tmp_path / "own"), Replay(4, cfg.tokens, cfg.turns)
    with Loop(run, one_device(), learner.initialiser(cfg, w.net), STEPS + 2, replay, begin) as loop:
        assert loop.wall_s > 12.5 and int(loop.state.step) == STEPS and replay.collected == 0
        run.preempted.set()
        for step in loop:
            assert step == STEPS
            loop._done += 1  # what `learnt` counts
    assert saved_steps(run.checkpoints) == [STEPS + 1]
    run.preempted.clear()
    with Loop(run, one_device(), learner.initialiser(cfg, w.net), STEPS + 2, replay, lambda state: 1 / 0) as loop:
        assert list(loop) == [STEPS + 1]  # its own checkpoint counts from now on


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__width": 24}, "has model.width=16, this run 24: make them agree"),
        ({"places": (3, 4)}, r"has places=\(4, 8\), this run \(3, 4\)"),
        ({"seed": 3}, "has seed=0, this run 3"),
        ({"train__learning_rate": 1.0}, "has train.learning_rate"),
        ({"tokens": 32}, "has tokens=24"),
        ({"signal": "outcome"}, "has signal=return"),
        ({"world_model__goals": 4}, "has world_model.goals=0, this run 4"),
    ],
)
def test_a_run_with_another_likelihood_phase_is_refused(tmp_path, values, message):
    finished(tmp_path / "start", config())
    with pytest.raises(ConfigError, match=message):
        trained.take_over(config(start=str(tmp_path / "start"), **values), None, None, None)


def test_what_has_its_effect_later_may_differ(tmp_path):
    finished(tmp_path / "start", config())
    later = {
        "imagine__replies": 1,
        "world_model__loss": "mae",
        "guard__truncation": 2.0,
        "policy__loss": "ppo",
        "loss__kl": 0.7,
        "train__rl_epochs": 2,
    }
    later |= {"eval__every": 3, "control": "user_gradient", "collect__every": 9, "checkpoint_every": 3, "train__rl_steps": 9}
    assert int(take_over(config(start=str(tmp_path / "start"), **later))[0].step) == STEPS


@pytest.mark.parametrize(
    "at, user, theirs", [(STEPS, "frozen", None), (STEPS + 1, "frozen", "reference"), (STEPS + 1, "live", None)]
)
def test_users_have_in_imagination_the_words_that_they_had_in_training(at, user, theirs):
    cfg = config(imagine__user=user)
    model = trained.Trained(None, None, fresh(cfg).replace(step=jnp.int32(at)), at, one_device())
    assert model.imagined_user(cfg) is (getattr(model.state, theirs) if theirs else None)


def test_a_start_that_is_not_there_or_not_finished_is_told(tmp_path):
    finished(tmp_path / "start", config(), at=STEPS - 1)
    with pytest.raises(ConfigError, match=f"holds no checkpoint of update {STEPS}: finish it"):
        trained.take_over(config(start=str(tmp_path / "start")), None, None, None)
    with pytest.raises(ConfigError, match="absent holds no run"):
        trained.take_over(config(start=str(tmp_path / "absent")), None, None, None)
