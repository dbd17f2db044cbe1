"""What a return is compared with: the value of the state, recent returns, or other candidates for the same prompt.

Baselines over a group are written for one stream of K candidates and `vmap`ped. They compare whole dialogues, never turns of
equal number: which turns a dialogue has is the policy's own doing, so turns of equal number are no fair sample.
"""

import chex
import jax
import jax.numpy as jnp

from mbrl_lm import config
from mbrl_lm.types import Array, TrainState


def leave_one_out(return_K: Array, mask_K: Array) -> Array:
    """R_k minus the mean of the others (RLOO, Kool et al. 2019); 0 where there is no other.

    Args:
      return_K: of each candidate.
      mask_K: bool, candidates that count; elsewhere the result is 0.
    """
    chex.assert_equal_shape([return_K, mask_K])
    total, count = jnp.sum(jnp.where(mask_K, return_K, 0.0)), jnp.sum(mask_K)
    others_K = (total - return_K) / jnp.maximum(count - 1, 1)
    return jnp.where(mask_K & (count > 1), return_K - others_K, 0.0)


def normalised(return_K: Array, mask_K: Array) -> Array:
    """(R_k - mean) / standard deviation over the group (GRPO, Shao et al. 2024), 0 where all returns are equal.

    Arguments as in `leave_one_out`.
    """
    chex.assert_equal_shape([return_K, mask_K])
    count = jnp.maximum(jnp.sum(mask_K), 1)
    mean = jnp.sum(jnp.where(mask_K, return_K, 0.0)) / count
    off_K = jnp.where(mask_K, return_K - mean, 0.0)
    spread = jnp.sqrt(jnp.sum(off_K**2) / count)
    return off_K / jnp.maximum(spread, 1e-6)


GROUPS = {"leave_one_out": leave_one_out, "normalised": normalised}


def advantages(
    cfg: config.Config, state: TrainState, return_BU: Array, value_BU: Array, mask_BU: Array, real_rows: int
) -> Array:
    """(R - b) / S of every turn, for the baseline b that the config names and the running range S of the returns.

    Over a group, all turns of a candidate get what its return from the prompt on is better by than the others'; `normalised`
    ones are in units of the group's spread instead. Real dialogues have no group and are compared with recent real returns.

    Args:
      cfg, state: S is the range, but at least `returns.scale_floor` (DreamerV3).
      return_BU, value_BU, mask_BU: of each turn, and which turns count.
      real_rows: the first rows are real, the others imagined, `imagine.candidates` of each prompt together.
    """
    scale = jnp.maximum(cfg.returns.scale_floor, state.return_high - state.return_low)
    if cfg.policy.baseline == "value":
        return (return_BU - value_BU) / scale
    is_real_B1 = (jnp.arange(return_BU.shape[0]) < real_rows)[:, None]
    against_mean_BU = (return_BU - jnp.where(is_real_B1, state.real_mean, state.imagined_mean)) / scale
    if cfg.policy.baseline == "mean":
        return against_mean_BU
    first_B1 = jnp.argmax(mask_BU, axis=1)[:, None]
    return_B, some_B = jnp.take_along_axis(return_BU, first_B1, axis=1)[:, 0], jnp.any(mask_BU, axis=1)
    groups = [x[real_rows:].reshape(-1, cfg.imagine.candidates) for x in (return_B, some_B)]
    better_B = jax.vmap(GROUPS[cfg.policy.baseline])(*groups).reshape(-1)
    better_B = jnp.concatenate([jnp.zeros(real_rows), better_B if cfg.policy.baseline == "normalised" else better_B / scale])
    return jnp.where(is_real_B1, against_mean_BU, better_B[:, None])
