"""Values and returns over turns: two-hot regression, lambda-returns, the return scale. Written for one stream, `vmap`ped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm.types import Array


def bin_centres(bins: int, limit: float) -> np.ndarray:
    """The (W,) centres symexp(linspace(-limit, limit)), where symexp(x) = sign(x) (exp|x| - 1) (DreamerV3)."""
    if bins % 2 == 0:
        raise ValueError(f"{bins} bins have no centre at 0: take an odd number")
    half = np.expm1(np.linspace(0, limit, bins // 2 + 1, dtype=np.float32))
    return np.concatenate([-half[:0:-1], half])


def two_hot(x: Array, centres_W: np.ndarray) -> Array:
    """Spreads each scalar over the two bins around it so that their mean is the scalar; outer values are clipped.

    Args:
      x: f32 of any shape.
      centres_W: increasing.

    Returns:
      f32 of that shape + (W,), summing to 1.
    """
    centres_W = jnp.asarray(centres_W)
    x = jnp.clip(x, centres_W[0], centres_W[-1])
    high = jnp.clip(jnp.searchsorted(centres_W, x), 1, len(centres_W) - 1)
    low_x, high_x = centres_W[high - 1], centres_W[high]
    weight = ((x - low_x) / (high_x - low_x))[..., None]
    return jax.nn.one_hot(high - 1, len(centres_W)) * (1 - weight) + jax.nn.one_hot(high, len(centres_W)) * weight


def mean(logits_W: Array, centres_W: np.ndarray) -> Array:
    """The expected value of a two-hot head, sum over c > 0 of c (p(c) - p(-c)): exactly 0 for equal logits, compiled too.

    The centres are those of `bin_centres`, symmetric about 0.
    """
    p_W = jax.nn.softmax(logits_W)
    half = len(centres_W) // 2
    positive = np.asarray(centres_W)[half + 1 :].reshape((1,) * (p_W.ndim - 1) + (-1,))
    return jnp.sum((p_W[..., half + 1 :] - p_W[..., :half][..., ::-1]) * positive, axis=-1)


def cross_entropy(logits_W: Array, target: Array, centres_W: np.ndarray) -> Array:
    """Two-hot cross-entropy of a head against scalar targets, which are not differentiated."""
    target_W = two_hot(jax.lax.stop_gradient(target), centres_W)
    return -jnp.sum(target_W * jax.nn.log_softmax(logits_W), axis=-1)


def lambda_returns(
    r_U: Array, next_v_U: Array, discount_U: Array, mask_U: Array, lambda_: float, ratio_U: Array | None = None
) -> Array:
    """Returns over the turns of one dialogue (Sutton & Barto 2018, eq. 12.2, over turns instead of steps):

        R_u = r_u + g_u [V_{u+1} + lambda rho_{u+1} (R_{u+1} - V_{u+1})]

    and R_{u+1} = V_{u+1} where turn u + 1 is no whole transition: a truncation keeps its bootstrap.

    Args:
      r_U: reward earned between turn u and the next.
      next_v_U: V_{u+1}, the value of the state in which the next turn opens.
      discount_U: g_u, 0 after a true end.
      mask_U: bool, whole transitions; elsewhere the result is 0.
      lambda_: 1 = Monte Carlo, 0 = one-step bootstrap.
      ratio_U: rho_u = min(1, pi / b) of each turn, for dialogues that another policy wrote: what followed counts as far as
        this policy would have followed, too. With it V_u + rho_u (R_u - V_u) is the V-trace target (`vtrace`). None: ones.
    """
    ratio_U = jnp.ones_like(r_U) if ratio_U is None else ratio_U
    chex.assert_rank([r_U, next_v_U, discount_U, mask_U, ratio_U], 1)
    chex.assert_equal_shape([r_U, next_v_U, discount_U, mask_U, ratio_U])

    def step(later, x):
        return_after, mask_after, ratio_after = later
        r, v, g, mask, ratio = x
        tail = jnp.where(mask_after, return_after, v)
        R = jnp.where(mask, r + g * (v + lambda_ * ratio_after * (tail - v)), 0.0)
        return (R, mask, ratio), R

    start = (jnp.zeros((), r_U.dtype), jnp.zeros((), bool), jnp.ones((), r_U.dtype))
    return jax.lax.scan(step, start, (r_U, next_v_U, discount_U, mask_U, ratio_U), reverse=True)[1]


def vtrace(return_U: Array, v_U: Array, ratio_U: Array) -> Array:
    """What the value of an off-policy turn is learnt towards (Espeholt et al. 2018, eq. 1, with c = lambda rho):

        v_u = V_u + rho_u (r_u + g_u V_{u+1} - V_u) + g_u lambda rho_u (v_{u+1} - V_{u+1}) = V_u + rho_u (R_u - V_u)

    Args:
      return_U: R_u, of `lambda_returns` with the same ratios.
      v_U: V_u, the value of the state in which the turn opens.
      ratio_U: rho_u.
    """
    chex.assert_equal_shape([return_U, v_U, ratio_U])
    return v_U + ratio_U * (return_U - v_U)


def return_range(return_BU: Array, mask_BU: Array) -> tuple[Array, Array]:
    """The 5th and 95th percentile of the returns; zeros if there are none."""
    x = jnp.where(mask_BU, return_BU, jnp.nan).reshape(-1)
    low, high = jnp.nanpercentile(x, jnp.array([5.0, 95.0]))
    return jnp.nan_to_num(low), jnp.nan_to_num(high)
