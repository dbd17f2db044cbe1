"""Runs both updates and imagination on the mesh argv[1], three steps each, and writes numbers; for test_sharding.py."""

import json
import sys

import jax
import numpy as np
from tiny import config_of, random_dialogues, world

from mbrl_lm import config, learner, rollout, sharding
from mbrl_lm.optimizer import make_optimizer

ROWS, STEPS = 16, 3


def on_mesh(sizes: list[int]) -> dict:
    cfg = config_of(model__layers=1, train__micro_batch=1, train__supervised_steps=STEPS)
    w = world("chat", model__layers=1, vocab=28)
    mesh = sharding.make_mesh(config.Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])
    optimizer = make_optimizer(cfg.train)
    traces = {"likelihood": 0, "return": 0, "imagine": 0}

    def traced(name, f):
        def counting(*args):
            traces[name] += 1
            return f(*args)

        return sharding.pjit(counting, mesh, donate=() if name == "imagine" else (0,))

    def dream(params, real, key):
        prompt = rollout.from_an_opening(w.protocol, real, key)
        return rollout.imagine(w.net, w.protocol, params, prompt, key, tokens=cfg.tokens, turns=4)

    by_likelihood, by_return = (
        traced(name, learner.make_update(w.net, w.protocol, cfg, optimizer, rl=rl))
        for name, rl in (("likelihood", False), ("return", True))
    )
    imagine = traced("imagine", dream)
    key, real = jax.random.key(0), random_dialogues(w.protocol, 4, ROWS, cfg.tokens, cfg.turns)
    state = sharding.pjit(lambda key: learner.init_state(w.net, optimizer, key, cfg.turns), mesh)(key)
    numbers = {}
    for step in range(STEPS):
        state, metrics = by_likelihood(state, real, None, key)
        numbers |= {f"likelihood/{step}/{k}": x for k, x in metrics.items()}
    state = sharding.pjit(learner.begin_rl, mesh, donate=(0,))(state)
    tokens = []
    for step in range(STEPS):
        imagined = imagine(state.params, real, jax.random.key(step))
        tokens += np.asarray(imagined.token_BT).tolist()
        numbers[f"imagined/{step}"] = imagined.logp_BT.sum(), imagined.sampled_BT.sum()
        state, metrics = by_return(state, real, imagined, key)
        numbers |= {f"return/{step}/{k}": x for k, x in metrics.items()}

    def pieces(x):
        return len({str(shard.index) for shard in x.addressable_shards})

    trees = {"params": state.params, "target": state.target, "reference": state.reference}
    parts = {"token_BT": pieces(imagined.token_BT)}
    for name, tree in trees.items():
        for layer, array in (("mlp", "up_DF"), ("attention", "wq_DNH")):
            parts[f"{name}/{layer}/{array}"] = pieces(tree["blocks_0"][layer][array])
    for path, moment in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if "mu" in names and "blocks_0" in names and names[-1] in ("up_DF", "wq_DNH"):
            parts[f"mu/{names[-2]}/{names[-1]}"] = pieces(moment)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    numbers |= {jax.tree_util.keystr(path): (np.abs(x).sum(), np.sin(x).sum()) for path, x in leaves}
    return {
        "numbers": {k: [float(x) for x in pair] for k, pair in numbers.items()},
        "tokens": tokens,
        "parts": parts,
        "traces": traces,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(on_mesh(json.loads(sys.argv[1]))) + "\n")
