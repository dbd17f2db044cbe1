"""What keeps a policy from exploiting an inaccurate imagined user: doubt about its replies, and anchors in real returns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import lsq_linear

from mbrl_lm.types import Array, TrainState

QUANTILES = 17  # of the anchors
_NARROWEST = 1e-9  # an interval for the solver, where quantiles are equal


def disagreement(user_BTEV: Array) -> Array:
    """How much an ensemble disagrees on the next token, (B, T), nats: the mutual information of token and member,

        I = H(mean_e p_e) - mean_e H(p_e)

    which is 0 where all members say the same, however uncertain they are of it (Lakshminarayanan et al. 2017; BALD).
    """
    logp_BTEV = jax.nn.log_softmax(user_BTEV)
    mean_BTV = jnp.mean(jnp.exp(logp_BTEV), axis=2)
    whole_BT = -jnp.sum(mean_BTV * jnp.log(jnp.maximum(mean_BTV, 1e-20)), axis=-1)
    return whole_BT + jnp.mean(jnp.sum(jnp.exp(logp_BTEV) * logp_BTEV, axis=-1), axis=2)


def doubt(disagreement_BU: Array, state: TrainState) -> Array:
    """Standard deviations by which the disagreement on a reply is above what it is on real replies to turns of that number.

    Disagreement may fall along a dialogue while the error grows, hence a scale for each turn. Whose replies: see `targets`.
    """
    deviation_U = jnp.sqrt(jnp.maximum(state.doubt_square_U - state.doubt_U**2, 0.0))
    return (disagreement_BU - state.doubt_U[None]) / jnp.maximum(deviation_U, 1e-3)[None]


def watch_disagreement(state: TrainState, disagreement_BU: Array, mask_BU: Array, decay: float) -> TrainState:
    """Moves the running moments of the disagreement on by the turns of one batch of real dialogues, the first of which sets
    them: from 0, they would take `1 / (1 - decay)` batches, in which every reply were doubtful."""
    count_U = jnp.sum(mask_BU, axis=0)
    keep_U = jnp.where(state.doubt_square_U > 0, decay, 0.0)

    def moved(old_U, x_BU):
        mean_U = jnp.sum(jnp.where(mask_BU, x_BU, 0.0), axis=0) / jnp.maximum(count_U, 1)
        return jnp.where(count_U > 0, keep_U * old_U + (1 - keep_U) * mean_U, old_U)

    return state.replace(
        doubt_U=moved(state.doubt_U, disagreement_BU), doubt_square_U=moved(state.doubt_square_U, disagreement_BU**2)
    )


def before_first(stop_BU: Array) -> Array:
    """bool (B, U): turns before the first one that is marked."""
    return jnp.cumsum(stop_BU, axis=1) == 0


def anchors(imagined: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The quantiles of imagined returns, and where they come to: (2, W), knots of a monotone map.

    Of all maps that are monotone and stretch nothing, it is the nearest one to the quantiles of the real returns of the same
    openings, by least squares. A map between distributions, not a regression of one on the other: that would shrink to the
    mean, since single dialogues of one opening have little to do with each other. It may not stretch: where more dialogues
    succeed in imagination than in truth, the slower ones of the successes would be worth what failures are.
    """
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    x_W, y_W = np.quantile(imagined, levels), np.quantile(real, levels)
    most_W = np.diff(x_W, prepend=-np.inf)  # the first knot goes anywhere, the others up, by as much as in imagination
    least_W = np.where(np.isinf(most_W), -np.inf, 0.0)
    sums_WW = np.tril(np.ones((QUANTILES, QUANTILES)))
    steps = lsq_linear(sums_WW, y_W, (least_W, np.maximum(most_W, least_W + _NARROWEST)), method="bvls")
    return np.stack([x_W, sums_WW @ steps.x]).astype(np.float32)


def to_real(return_BU: Array, anchor_XW: Array) -> Array:
    """Imagined returns at the real ones' level: x + shift(x), linear between the anchors and constant beyond them."""
    chex.assert_rank(anchor_XW, 2)
    return return_BU + jnp.interp(return_BU, anchor_XW[0], anchor_XW[1] - anchor_XW[0])
