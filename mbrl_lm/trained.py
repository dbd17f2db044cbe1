"""A run as it was left: what the programs start from that look at a trained model, and runs that go on where it stopped."""

import pathlib
from typing import NamedTuple

import jax

from mbrl_lm import command_line, learner, nn, sharding
from mbrl_lm.checkpoint import Checkpoints, saved_steps
from mbrl_lm.config import Config, ConfigError
from mbrl_lm.data.corpus import Corpus, load_corpus
from mbrl_lm.replay import Replay
from mbrl_lm.types import Params, TrainState

# What a run may have otherwise than the run by whose likelihood phase it begins: what has its effect later only.
LATER = ("imagine.", "collect.", "guard.", "policy.", "returns.", "loss.", "eval.", "mesh.", "control",
         "start", "train.rl_steps", "train.rl_epochs", "train.rl_batch", "train.rl_learning_rate", "train.value_rate",
         "train.micro_batch", "world_model.loss", "world_model.threshold", "world_model.tokens", "world_model.adaptive",
         "world_model.shuffled", "partner.steps", "partner.model.", "checkpoint", "cpu_devices", "log_every", "model.remat",
         "plan")  # fmt: skip


class Trained(NamedTuple):
    """A model, its data, and where it runs."""

    net: nn.Net
    corpus: Corpus
    state: TrainState
    step: int
    mesh: jax.sharding.Mesh

    def imagined_user(self, cfg: Config) -> Params | None:
        """Whose words users have in imagination, as in training; None: the model's own."""
        return learner.judged_user(cfg, self.state)

    def planned_user(self, cfg: Config) -> Params | None:
        """Whose words a planner imagines: the model's of when RL began, fitted to people alone; None: the present one's."""
        began = cfg.train.supervised_steps and self.step > cfg.train.supervised_steps  # else there is no other one
        return self.state.reference if cfg.plan != "none" and cfg.planner.user == "reference" and began else None


def load(cfg: Config, workdir: pathlib.Path) -> Trained:
    """The newest checkpoint of the run in `workdir`, which may still be going on.

    Args:
      cfg: its config; what acts on the state of a run is as it was trained.
      workdir: its directory.

    Raises:
      ConfigError: nothing was saved yet.
      CheckpointError: it cannot be read.
    """
    checkpoints = workdir / "checkpoints"
    if not saved_steps(checkpoints):
        raise ConfigError(f"{workdir} holds no checkpoint yet: train there with experiments.dream")
    mesh = sharding.make_mesh(cfg.mesh)
    corpus = load_corpus(cfg, workdir)
    net = nn.make_net(cfg.model, corpus.protocol.vocab_size)
    step, state, _ = _restore(cfg, net, mesh, checkpoints)
    return Trained(net, corpus, state, step, mesh)


def take_over(cfg: Config, net: nn.Net, mesh: jax.sharding.Mesh, fresh: TrainState) -> tuple[TrainState, float]:
    """A fresh state with the parameters and the optimiser of the run in `cfg.start`, and the seconds that it took.

    Raises:
      ConfigError: there is no such run, it differs in what its likelihood phase hangs on, or that is not finished.
      CheckpointError: it cannot be read.
    """
    directory = pathlib.Path(cfg.start)
    theirs = command_line.read_config(directory)
    own, other = command_line.flatten(cfg), command_line.flatten(theirs)
    for name in own:
        if own[name] != other[name] and not name.startswith(LATER):
            raise ConfigError(f"--config.start={cfg.start} has {name}={other[name]}, this run {own[name]}: make them agree")
    if cfg.train.supervised_steps not in saved_steps(directory / "checkpoints"):
        raise ConfigError(
            f"--config.start={cfg.start} holds no checkpoint of update {cfg.train.supervised_steps}: finish it"
        )
    _, started, meta = _restore(theirs, net, mesh, directory / "checkpoints", cfg.train.supervised_steps)
    return fresh.replace(step=started.step, params=started.params, opt_state=started.opt_state), meta["wall_s"]


def _restore(cfg: Config, net: nn.Net, mesh, directory: pathlib.Path, step: int | None = None):
    """The step, the state and the notes of a checkpoint, the newest one by default."""
    shapes = sharding.abstract(jax.eval_shape(learner.initialiser(cfg, net), jax.random.key(cfg.seed)), mesh)
    replay = Replay(max(cfg.collect.capacity, 1), cfg.tokens, cfg.turns)
    with Checkpoints(directory, keep=None) as kept:
        step, state, _, meta = kept.restore(shapes, replay.arrays(), step)
    return step, state, meta
