"""The layers of the transformer, on one stream of tokens per row, with an explicit cache."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl_lm import config
from mbrl_lm.types import Array

NEAR = 4  # tokens, of what belongs to a word that is looked up


def fan_in(size: int, layers: int = 0) -> nn.initializers.Initializer:
    """Normal of variance 1 / size, divided by 2 L for what is added to the residual stream (Radford et al. 2019)."""
    return nn.initializers.normal((size * (2 * layers or 1)) ** -0.5)


class RMSNorm(nn.Module):
    """x / rms(x) * scale (Zhang & Sennrich 2019), in float32."""

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        scale_D = self.param("scale_D", nn.initializers.ones, (x_BTD.shape[-1],))
        x32_BTD = x_BTD.astype(jnp.float32)
        rms_BT1 = jnp.sqrt(jnp.mean(x32_BTD**2, axis=-1, keepdims=True) + 1e-6)
        return (x32_BTD / rms_BT1 * scale_D[None, None]).astype(x_BTD.dtype)


def rotate(x_BTNH: Array, position_T: Array) -> Array:
    """Rotary position embedding (Su et al. 2021): pairs (h, h + H/2) turn by position / 10000^(2h/H)."""
    half = x_BTNH.shape[-1] // 2
    frequency_H = 10_000.0 ** (-jnp.arange(half) / half)
    angle_TH = position_T[:, None] * frequency_H[None]
    sin_BTNH, cos_BTNH = jnp.sin(angle_TH)[None, :, None], jnp.cos(angle_TH)[None, :, None]
    a_BTNH, b_BTNH = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
    turned_BTNH = [a_BTNH * cos_BTNH - b_BTNH * sin_BTNH, a_BTNH * sin_BTNH + b_BTNH * cos_BTNH]
    return jnp.concatenate(turned_BTNH, axis=-1).astype(x_BTNH.dtype)


def attend(q_BTKGH: Array, k_BKSH: Array, v_BKSH: Array, index: Array | int, scale: float) -> Array:
    """Causal attention of the tokens at index, index + 1, ... over positions 0 ... S-1; returns (B, T, K, G, H).

    Plain einsums: on a CPU they are faster than `jax.nn.dot_product_attention`.
    """
    T, S = q_BTKGH.shape[1], k_BKSH.shape[2]
    score_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH) * scale
    seen_TS = jnp.arange(S)[None] <= index + jnp.arange(T)[:, None]
    score_BKGTS = jnp.where(seen_TS[None, None, None], score_BKGTS.astype(jnp.float32), -1e30)
    weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weight_BKGTS, v_BKSH)


class CausalConv(nn.Module):
    """x + depthwise causal convolution of x: n-gram features, which a small transformer else spends a layer on.

    Random taps give every channel its own mixture of the tokens before, so that attention can find a token by what stands
    before it. With taps that begin at zero, to look things up in the context is learnt far later.
    """

    taps: int

    @nn.compact
    def __call__(self, x_BTD: Array, cache_BSD: Array | None, index: Array | int) -> tuple[Array, Array | None]:
        T = x_BTD.shape[1]
        tap_XD = self.param("tap_XD", fan_in(self.taps), (self.taps, x_BTD.shape[-1])).astype(x_BTD.dtype)
        if cache_BSD is None:
            window_BTD = jnp.pad(x_BTD, ((0, 0), (self.taps - 1, 0), (0, 0)))
        else:
            cache_BSD = jax.lax.dynamic_update_slice_in_dim(cache_BSD, x_BTD, index + self.taps - 1, axis=1)
            window_BTD = jax.lax.dynamic_slice_in_dim(cache_BSD, index, T + self.taps - 1, axis=1)
        taps = [window_BTD[:, i : i + T] * tap_XD[i][None, None] for i in range(self.taps)]
        return x_BTD + sum(taps), cache_BSD


def taps(near_K: Array, size: float) -> nn.initializers.Initializer:
    """(X, K): a head at first takes the NEAR tokens before the own one, or else that one, and a little of the others."""

    def init(key, shape, dtype=jnp.float32):
        before_X1 = jnp.arange(shape[0])[::-1, None]
        first_XK = jnp.where(near_K[None], (before_X1 > 0) & (before_X1 <= NEAR), before_X1 == 0)
        return size * first_XK.astype(dtype) + 0.1 * jax.random.normal(key, shape, dtype)

    return init


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): N query heads share K key/value heads.

    Beside what it makes of the stream, each head compares the tokens shortly before the one that asks, t, with those shortly
    before the one that is asked, s, and gets those shortly before s:

        score + sum_ij a_i b_j [token t - i = token s - j],     value, sum_j c_j (token s - j)

    with codes in the tokens' place that are all but orthogonal. At first one half of the heads finds what follows a word
    that was said lately, wherever else it stands, the other half what stands before it; so looking things up in a context is
    learnt from the first updates on. What was found can be said as it is: by a gate for each head, which the stream sets,
    its code adds to the logits (as pointer networks copy, See et al. 2017).
    """

    cfg: config.Model

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Any, index: Array | int, code_BTXC: Array | None) -> tuple[Array, Any, Any]:
        (T, D), N, K = x_BTD.shape[1:], self.cfg.heads, self.cfg.kv_heads
        H, C = D // N, 0 if code_BTXC is None else code_BTXC.shape[-1]
        dtype = x_BTD.dtype
        wq_DNH = self.param("wq_DNH", fan_in(D), (D, N, H)).astype(dtype)
        wk_DKH = self.param("wk_DKH", fan_in(D), (D, K, H)).astype(dtype)
        wv_DKH = self.param("wv_DKH", fan_in(D), (D, K, H)).astype(dtype)
        wo_NHD = self.param("wo_NHD", fan_in(D, self.cfg.layers), (N, H + C, D)).astype(dtype)

        position_T = index + jnp.arange(T)
        q_BTNH = rotate(jnp.einsum("BTD,DNH->BTNH", x_BTD, wq_DNH), position_T)
        k_BKTH = rotate(jnp.einsum("BTD,DKH->BTKH", x_BTD, wk_DKH), position_T).swapaxes(1, 2)
        v_BKTH = jnp.einsum("BTD,DKH->BKTH", x_BTD, wv_DKH)
        if C:
            X, follows_K = code_BTXC.shape[2], jnp.arange(K) < (K + 1) // 2
            asks_XN = self.param("asks_XN", nn.initializers.ones, (X, N))
            asked_XK = self.param("asked_XK", taps(follows_K, 2.0), (X, K))
            given_XK = self.param("given_XK", taps(~follows_K, 1.0), (X, K))
            q_BTNC = jnp.einsum("BTXC,XN->BTNC", code_BTXC, asks_XN.astype(dtype)) * H**0.5  # `attend` divides by it
            k_BKTC, v_BKTC = (jnp.einsum("BTXC,XK->BKTC", code_BTXC, tap.astype(dtype)) for tap in (asked_XK, given_XK))
            q_BTNH = jnp.concatenate([q_BTNH, q_BTNC], axis=-1)
            k_BKTH, v_BKTH = jnp.concatenate([k_BKTH, k_BKTC], axis=-1), jnp.concatenate([v_BKTH, v_BKTC], axis=-1)
        if cache is not None:
            k_BKTH = jax.lax.dynamic_update_slice_in_dim(cache[0], k_BKTH, index, axis=2)
            v_BKTH = jax.lax.dynamic_update_slice_in_dim(cache[1], v_BKTH, index, axis=2)
            cache = (k_BKTH, v_BKTH)
        q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], K, N // K, -1)
        out_BTNH = attend(q_BTKGH, k_BKTH, v_BKTH, index, H**-0.5).reshape(*q_BTNH.shape[:3], H + C)
        found_BTC = None
        if C:
            gate_DN = self.param("gate_DN", fan_in(D), (D, N)).astype(dtype)
            gate_BTN = jnp.einsum("BTD,DN->BTN", x_BTD, gate_DN)
            found_BTC = jnp.einsum("BTN,BTNC->BTC", gate_BTN, out_BTNH[..., H:])
        return jnp.einsum("BTNH,NHD->BTD", out_BTNH, wo_NHD), found_BTC, cache


class GatedMLP(nn.Module):
    """(silu(x Wg) * x Wu) Wd (Shazeer 2020)."""

    cfg: config.Model

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        D, F, dtype = x_BTD.shape[-1], self.cfg.mlp_width, x_BTD.dtype
        gate_DF = self.param("gate_DF", fan_in(D), (D, F)).astype(dtype)
        up_DF = self.param("up_DF", fan_in(D), (D, F)).astype(dtype)
        down_FD = self.param("down_FD", fan_in(F, self.cfg.layers), (F, D)).astype(dtype)
        gate_BTF = jax.nn.silu(jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF))
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, up_DF)
        return jnp.einsum("BTF,FD->BTD", gate_BTF * up_BTF, down_FD)


class Block(nn.Module):
    """One layer: convolution and attention, then the MLP, each on a normalised input, added to the residual stream.

    What the attention found in the context is summed over the layers beside it.

    Dropout is on exactly when a "dropout" key is given to `apply`.
    """

    cfg: config.Model

    @nn.compact
    def __call__(self, carry: Any, cache: Any, index: Array | int, code_BTXC: Array | None) -> tuple[Any, Any]:
        x_BTD, found_BTC = carry
        k, v, inputs = (None, None, None) if cache is None else cache
        drop = nn.Dropout(self.cfg.dropout, deterministic=not self.has_rng("dropout"))
        h_BTD = RMSNorm(name="norm_attention")(x_BTD)
        if self.cfg.conv_width > 1:
            h_BTD, inputs = CausalConv(self.cfg.conv_width, name="conv")(h_BTD, inputs, index)
        kv = None if cache is None else (k, v)
        h_BTD, more_BTC, kv = Attention(self.cfg, name="attention")(h_BTD, kv, index, code_BTXC)
        found_BTC = None if more_BTC is None else found_BTC + more_BTC
        x_BTD = x_BTD + drop(h_BTD)
        h_BTD = GatedMLP(self.cfg, name="mlp")(RMSNorm(name="norm_mlp")(x_BTD))
        return (x_BTD + drop(h_BTD), found_BTC), None if cache is None else (*kv, inputs)
