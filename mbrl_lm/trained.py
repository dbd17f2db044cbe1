"""A run as it was left: what the programs start from that look at a trained model."""

from typing import NamedTuple

import jax

from mbrl_lm import app, learner, nn, sharding
from mbrl_lm.checkpoint import Checkpoints, saved_steps
from mbrl_lm.config import ConfigError
from mbrl_lm.data.corpus import Corpus, load_corpus
from mbrl_lm.replay import Replay
from mbrl_lm.types import TrainState


class Trained(NamedTuple):
    """A model, its data, and where it runs."""

    net: nn.Net
    corpus: Corpus
    state: TrainState
    step: int
    mesh: jax.sharding.Mesh


def load(run: app.Run) -> Trained:
    """The newest checkpoint of the run in `run.workdir`, which may still be going on.

    Raises:
      ConfigError: nothing was saved yet.
      CheckpointError: it cannot be read.
    """
    if not saved_steps(run.checkpoints):
        raise ConfigError(f"{run.workdir} holds no checkpoint yet: train there with experiments.dream")
    cfg, mesh = run.config, sharding.make_mesh(run.config.mesh)
    corpus = load_corpus(cfg, run.workdir)
    net = nn.make_net(cfg.model, corpus.protocol.vocab_size)
    shapes = sharding.abstract(jax.eval_shape(learner.initialiser(cfg, net), jax.random.key(cfg.seed)), mesh)
    replay = Replay(max(cfg.collect.capacity, 1), cfg.tokens, cfg.turns)
    with Checkpoints(run.checkpoints, keep=None) as kept:
        step, state, _, _ = kept.restore(shapes, replay.arrays())
    return Trained(net, corpus, state, step, mesh)
