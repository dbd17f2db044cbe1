"""The numbers of a tiny run's first steps, kept in golden_first_step.json; `python tests/golden.py` writes them anew."""

import json
import pathlib

import jax
import jax.numpy as jnp
from tiny import config_of, norm, random_dialogues, world

from mbrl_lm import learner, rollout
from mbrl_lm.optimizer import make_optimizer

FILE = pathlib.Path(__file__).parent / "golden_first_step.json"
MESSAGE = """The first steps of a run have changed: some arithmetic between a dialogue and a parameter is not what it was
(initialisation, network, sampling, masks, targets, weights or optimiser). If you did not mean to change it, you have
found a mistake. If you did, say in the commit what changed and why the new numbers are right, and write them with
    python tests/golden.py"""


def first_steps() -> dict[str, float]:
    """Losses, gradient norms and sizes of parameters over two updates by likelihood and one by return."""
    cfg = config_of(model__layers=1, train__supervised_steps=2, imagine__replies=2)
    # Large, so that every part of the optimiser shows in the fourth digit.
    cfg.train.learning_rate, cfg.train.rl_learning_rate, cfg.train.weight_decay = 1e-2, 1e-2, 0.3
    w = world("chat", model__layers=1)
    optimizer = make_optimizer(cfg.train)
    real = random_dialogues(w.protocol, 4, cfg.train.batch, cfg.tokens, cfg.turns)
    by_likelihood, by_return = (
        jax.jit(learner.make_update(w.net, w.protocol, cfg, optimizer, rl=rl)) for rl in (False, True)
    )

    @jax.jit
    def imagine(params, key):
        prompt = rollout.from_an_opening(w.protocol, real, key)
        return rollout.imagine(w.net, w.protocol, params, prompt, key, tokens=cfg.tokens, turns=2 * cfg.imagine.replies)

    key = jax.random.key(0)
    state = jax.jit(lambda key: learner.init_state(w.net, optimizer, key, cfg.turns))(key)
    found = {}

    def note(name, state, metrics):
        found.update({f"{name}/{k}": float(a / jnp.maximum(b, 1)) for k, (a, b) in metrics.items()})
        for k, x in state.params.items():
            found[f"{name}/norm/{k}"] = norm(x)

    for i in range(2):
        state, metrics = by_likelihood(state, real, None, key)
        note(f"likelihood_{i}", state, metrics)
    state = learner.begin_rl(state)
    dream = imagine(state.params, key)
    found["imagined_tokens"] = float(dream.sampled_BT.sum())
    found["imagined_logp"] = float(dream.logp_BT.sum())
    state, metrics = by_return(state, real, dream, key)
    note("return", state, metrics)
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(first_steps(), indent=1) + "\n")
