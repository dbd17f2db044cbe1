"""The optimiser of a run and the schedule of its rate."""

from typing import Any

import jax
import optax
import optax.contrib

from mbrl_lm import config
from mbrl_lm.sharding import letters

ADAM_B2, ADAM_RMS = 0.98, 0.2


def make_optimizer(cfg: config.Train) -> optax.GradientTransformation:
    """Muon (Jordan 2024) on the matrices of the trunk and AdamW on the rest, or AdamW on all.

    The rate warms up, falls along a cosine to that of RL, and along another one to a tenth of it. Muon's steps are scaled to
    the root mean square of Adam's (Liu et al. 2025), so that one rate serves both. Value heads may have a higher one: what
    they are to follow moves with the policy, and neither optimiser minds how heavy their loss is.
    """
    # At least 2: XLA leaves out a division by 1, and the likelihood phase of a run without RL would be rounded otherwise.
    rate = optax.cosine_decay_schedule(cfg.rl_learning_rate, max(cfg.rl_steps * cfg.rl_epochs, 2), alpha=0.1)
    if cfg.supervised_steps:
        warm = min(cfg.warmup, cfg.supervised_steps - 1)
        supervised = optax.warmup_cosine_decay_schedule(
            0.0, cfg.learning_rate, warm, cfg.supervised_steps, end_value=cfg.rl_learning_rate
        )
        rate = optax.join_schedules([supervised, rate], [cfg.supervised_steps])
    if cfg.optimizer == "muon":
        step = optax.contrib.muon(
            rate,
            weight_decay=cfg.weight_decay,
            adam_b2=ADAM_B2,
            consistent_rms=ADAM_RMS,
            muon_weight_dimension_numbers=_trunk_matrices,
        )
    else:
        step = optax.adamw(rate, b2=ADAM_B2, weight_decay=cfg.weight_decay, mask=_decays)
    return optax.chain(optax.clip_by_global_norm(cfg.clip), _with_value_rate(step, cfg.value_rate))


def _with_value_rate(step: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """The same with so much longer steps of the value heads; its state is that of `step`."""

    def longer(path, x):
        return factor * x if path[-1].key == "value_EDW" else x

    def update(gradient, state, params=None):
        steps, state = step.update(gradient, state, params)
        return jax.tree_util.tree_map_with_path(longer, steps), state

    return optax.GradientTransformation(step.init, update)


def _decays(params: Any) -> Any:
    """Weight decay falls on matrices, not on norms and other vectors."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _trunk_matrices(params: Any) -> Any:
    """Which axes of a parameter are a matrix's input and output, by its letters; None where it is no matrix of the trunk."""

    def axes(path, x):
        names = letters(path, x.ndim)
        stacked, names = names.startswith("L"), names.removeprefix("L")
        if len(names) < 2 or set(names) & set("EVWX"):
            return None
        first = tuple(i + stacked for i in range(len(names)))
        into, out = (first[:1], first[1:]) if names[0] == "D" else (first[:-1], first[-1:])
        return optax.contrib.MuonDimensionNumbers(into, out)

    return jax.tree_util.tree_map_with_path(axes, params)
