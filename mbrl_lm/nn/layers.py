"""The layers of the transformer, on one stream of tokens per row, with an explicit cache."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl_lm import config
from mbrl_lm.types import Array

NEAR = 4  # tokens, of what belongs to a word that is looked up
AGREES = 3.0  # how loud it is at first that an assistant says what the user said; embeddings have unit scale


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


class Words(NamedTuple):
    """The tokens as such, beside what the layers have made of them."""

    code_BTXC: Array  # codes of each token and of those before it, all but orthogonal
    said_BTNC: Array | None = None  # where the user is tracked: what the user has said so far,
    told_BTNC: Array | None = None  # the assistant in its latest turn,
    held_BT: Array | None = None  # and the words of the context


def taps(first_K: list[range], size_K: list[float]) -> nn.initializers.Initializer:
    """(X, K): a head at first takes the tokens that stand so far before the own one, and a little of the others."""

    def init(key, shape, dtype=jnp.float32):
        before_X = range(shape[0])[::-1]
        first_XK = jnp.array([[before in first for first in first_K] for before in before_X])
        return first_XK * jnp.array(size_K, dtype)[None] + 0.1 * jax.random.normal(key, shape, dtype)

    return init


class Matching(nn.Module):
    """What heads compare tokens by as such: the codes that they ask for, that they are asked by, and that they give."""

    cfg: config.Model

    @nn.compact
    def __call__(self, words: Words) -> tuple[Array, Array, Array]:
        X, N, K = words.code_BTXC.shape[2], self.cfg.heads, self.cfg.kv_heads
        dtype, follow, tracks = words.code_BTXC.dtype, (K + 1) // 2, words.said_BTNC is not None
        own, near = range(1), range(1, NEAR + 1)
        asked_K, given_K, size_K = [near] * follow + [own] * (K - follow), [own] * follow + [near] * (K - follow), [2.0] * K
        asks = jnp.ones((X, N))
        if tracks:  # the last head; it asks the context alone, for what the user has said is said by the user, too
            asked_K[-1], given_K[-1], size_K[-1] = range(NEAR), range(NEAR + 1), 5.0
            asks = asks.at[:, -1].set(0.0)
        asks_XN = self.param("asks_XN", lambda _: asks).astype(dtype)
        asked_XK = self.param("asked_XK", taps(asked_K, size_K), (X, K)).astype(dtype)
        given_XK = self.param("given_XK", taps(given_K, [1.0] * K), (X, K)).astype(dtype)
        q_BTNC = jnp.einsum("BTXC,XN->BTNC", words.code_BTXC, asks_XN)
        k_BKTC, v_BKTC = (jnp.einsum("BTXC,XK->BKTC", words.code_BTXC, tap_XK) for tap_XK in (asked_XK, given_XK))
        if tracks:
            tracks_N = self.param("tracks_N", lambda _: (jnp.arange(N) == N - 1).astype(jnp.float32)).astype(dtype)
            q_BTNC += words.said_BTNC * tracks_N[None, None, :, None]
            k_BKTC = k_BKTC.at[:, -1].multiply(words.held_BT[..., None].astype(dtype))
        return q_BTNC, k_BKTC, v_BKTC


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): N query heads share K key/value heads.

    Beside what it makes of the stream, each head compares the tokens shortly before the one that asks, t, with those shortly
    before the one that is asked, s, and gets those shortly before s:

        score + sum_ij a_i b_j [token t - i = token s - j],     value, sum_j c_j (token s - j)

    with codes in the tokens' place that are all but orthogonal. At first one half of the heads finds what follows a word
    that was said lately, wherever else it stands, the other half what stands before it; so looking things up in a context is
    learnt from the first updates on. What was found can be said as it is: by a gate for each head, which the stream sets,
    its code adds to the logits (as pointer networks copy, See et al. 2017).

    Where the user is tracked, the last head at first asks for all that the user has said, and so finds what fits it. The
    stream is told how well what a head found fits, how much there is to fit, how sure it is (what is found in several
    places is blurred), and whether the assistant's latest turn meant it: attention is divided among what fits equally well,
    so that the last of these is near the probability that the user wanted what is on offer.
    """

    cfg: config.Model

    @nn.compact
    def __call__(self, x_BTD: Array, cache: Any, index: Array | int, words: Words | None) -> tuple[Array, Any, Any]:
        (T, D), N, K = x_BTD.shape[1:], self.cfg.heads, self.cfg.kv_heads
        H, C = D // N, 0 if words is None else words.code_BTXC.shape[-1]
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
            q_BTNC, k_BKTC, v_BKTC = Matching(self.cfg, name="matching")(words)
            q_BTNC *= H**0.5  # `attend` divides by it
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
        x_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, wo_NHD)
        if C and words.said_BTNC is not None:
            code_BTNC, said_BTNC, told_BTNC = out_BTNH[..., H:], words.said_BTNC, words.told_BTNC
            for name, a_BTNC, b_BTNC in (
                ("fit_ND", 2 * code_BTNC, said_BTNC),
                ("size_ND", said_BTNC, said_BTNC),
                ("sure_ND", code_BTNC, code_BTNC),
                ("meant_ND", 2 * code_BTNC, told_BTNC),
            ):
                pair_ND = self.param(name, fan_in(2 * N), (N, D)).astype(dtype)
                x_BTD += jnp.einsum("BTN,ND->BTD", jnp.sum(a_BTNC * b_BTNC, axis=-1), pair_ND)
        return x_BTD, found_BTC, cache


class Tracker(nn.Module):
    """What the user has said that the context speaks of, and how far the assistant's latest turn agrees with it.

    Both are running sums of the codes of words, one for each head, with gates g that read a word and those before it:

        said_n(t) = sum_s g_n(s) code(s)    over what the user has said until t
        told_n(t) = the same                over what the assistant has said in its latest turn

    In a user's own view what it wants counts as said from the start. This is the state that dialogue systems track
    (Henderson et al. 2014), but nothing names what is in it. <said_n, told_n>, on a logarithmic scale, is added to the
    stream.
    """

    cfg: config.Model

    @nn.compact
    def __call__(self, code_BTXC: Array, user_BT: Array, assistant_BT: Array, begins_BT: Array, sums: Any) -> Any:
        """Reads on.

        Args:
          code_BTXC: of each token and those before it.
          user_BT, assistant_BT: in [0, 1], how much each word counts, by who says it.
          begins_BT: bool, where a turn of the assistant begins.
          sums: said and told before the first token, (B, N, C) each.

        Returns:
          What is added to the stream, (B, T, D), and the two sums after each token, (B, T, N, C).
        """
        (X, C), N, D = code_BTXC.shape[2:], self.cfg.heads, self.cfg.width
        dtype = code_BTXC.dtype

        def summed(name, counts_BT, before_BNC):
            gate_XCN = self.param(name, fan_in(4 * X * C), (X, C, N)).astype(dtype)
            gate_BTN = 1 + jnp.einsum("BTXC,XCN->BTN", code_BTXC, gate_XCN)
            gate_BTN *= counts_BT[..., None]
            return before_BNC[:, None] + jnp.cumsum(jnp.einsum("BTN,BTC->BTNC", gate_BTN, code_BTXC[:, :, -1]), axis=1)

        said_BTNC = summed("said_XCN", user_BT, sums[0])
        told_BTNC = summed("told_XCN", assistant_BT, sums[1])
        begun_BT = jax.lax.cummax(jnp.where(begins_BT, jnp.arange(begins_BT.shape[1])[None], -1), axis=1)
        before_BTNC = jnp.take_along_axis(told_BTNC, jnp.maximum(begun_BT, 0)[..., None, None], axis=1)
        told_BTNC -= jnp.where(begun_BT[..., None, None] >= 0, before_BTNC, 0)
        agree_BTN = jnp.sum(said_BTNC * told_BTNC, axis=-1)
        agree_ND = self.param("agree_ND", nn.initializers.normal(AGREES * N**-0.5), (N, D)).astype(dtype)
        agree_BTN = jnp.sign(agree_BTN) * jnp.log1p(jnp.abs(agree_BTN))
        return jnp.einsum("BTN,ND->BTD", agree_BTN, agree_ND), said_BTNC, told_BTNC


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
    def __call__(self, carry: Any, cache: Any, index: Array | int, words: Words | None) -> tuple[Any, Any]:
        x_BTD, found_BTC = carry
        k, v, inputs = (None, None, None) if cache is None else cache
        drop = nn.Dropout(self.cfg.dropout, deterministic=not self.has_rng("dropout"))
        h_BTD = RMSNorm(name="norm_attention")(x_BTD)
        if self.cfg.conv_width > 1:
            h_BTD, inputs = CausalConv(self.cfg.conv_width, name="conv")(h_BTD, inputs, index)
        kv = None if cache is None else (k, v)
        h_BTD, more_BTC, kv = Attention(self.cfg, name="attention")(h_BTD, kv, index, words)
        found_BTC = None if more_BTC is None else found_BTC + more_BTC
        x_BTD = x_BTD + drop(h_BTD)
        h_BTD = GatedMLP(self.cfg, name="mlp")(RMSNorm(name="norm_mlp")(x_BTD))
        return (x_BTD + drop(h_BTD), found_BTC), None if cache is None else (*kv, inputs)
