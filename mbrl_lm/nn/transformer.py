"""The decoder-only transformer and its heads, as one tuple of pure functions: `Net`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl_lm import config
from mbrl_lm import protocol as pr
from mbrl_lm.nn.layers import Block, RMSNorm, Tracker, Words, fan_in
from mbrl_lm.types import Array, Heads, KVCache, Params

MARKS = (pr.BOS, pr.TO_USER, pr.TO_ASSISTANT, pr.TO_OUTCOME)  # what a speaker's turn, or the context, begins with
IN_CONTEXT, OF_USER, OF_ASSISTANT = (MARKS.index(mark) for mark in (pr.BOS, pr.TO_USER, pr.TO_ASSISTANT))
WANTED = len(MARKS)  # the part of the context that the user wants, in its own view
LOUD = 3.0  # standard deviation of what a probability of 1 adds to a hidden unit
LIKENESS = 4  # power of the cosine by which words count that are like one of the context


class Net(NamedTuple):
    """A network as pure functions; nothing above this floor knows what is inside.

    init(key) -> params
    init_cache(B, S) -> KVCache for S positions
    trunk(params, token_BT, dropout_key=None) -> x_BTD, what the heads read, of `trunk_width`; x at t has seen tokens 0 ... t
    heads(params, x_BTD, role_BT=None) -> Heads; the role is that of the next token's author, for what is its own
    prefill(params, token_BT, cache) -> cache after reading all T tokens from position 0
    step(params, token_B, index, cache) -> (x_BTD of one token, cache); the token stands at `index` in every row
    """

    init: Callable[[Array], Params]
    init_cache: Callable[[int, int], KVCache]
    trunk: Callable[..., Array]
    heads: Callable[..., Heads]
    prefill: Callable[[Params, Array, KVCache], KVCache]
    step: Callable[[Params, Array, Array, KVCache], tuple[Array, KVCache]]

    def forward(self, params: Params, token_BT: Array) -> Heads:
        """Heads at every position."""
        return self.heads(params, self.trunk(params, token_BT))

    def decode_step(self, params: Params, token_B: Array, index: Array, cache: KVCache, role_B: Array | None = None):
        """Heads without a T axis at the one token of each row that stands at `index`, and the cache after it."""
        x_BTD, cache = self.step(params, token_B, index, cache)
        heads = self.heads(params, x_BTD, None if role_B is None else role_B[:, None])
        return jax.tree.map(lambda a: a[:, 0], heads), cache


def turn_marks(token_BT: Array, spoken_BS: Array | None, index: Array | int) -> tuple[Array, Array | None]:
    """The place in MARKS of the mark that each token's turn began with, or WANTED, (B, T), and the cache of these."""
    mark_BT = jnp.full_like(token_BT, -1)
    for place, mark in enumerate(MARKS):
        mark_BT = jnp.where(token_BT == mark, place, mark_BT)
    first_BT = (index + jnp.arange(token_BT.shape[1])[None] == 0) & (token_BT == pr.WANTED)
    mark_BT = jnp.where(first_BT, WANTED, mark_BT)
    if spoken_BS is not None and token_BT.shape[1] == 1:
        before_B1 = jax.lax.dynamic_slice_in_dim(spoken_BS, jnp.maximum(index - 1, 0), 1, axis=1)
        spoken_BT = jnp.where(mark_BT >= 0, mark_BT, before_B1)
    else:  # from position 0 on
        last_BT = jax.lax.cummax(jnp.where(mark_BT >= 0, jnp.arange(token_BT.shape[1])[None], 0), axis=1)
        spoken_BT = jnp.maximum(jnp.take_along_axis(mark_BT, last_BT, axis=1), 0)
    wanted_BT = spoken_BT == WANTED
    past_BT = jnp.cumsum(wanted_BT & (token_BT == pr.OTHERS), axis=1) > 0
    spoken_BT = jnp.where(wanted_BT & past_BT, IN_CONTEXT, spoken_BT)
    if spoken_BS is not None:
        spoken_BS = jax.lax.dynamic_update_slice_in_dim(spoken_BS, spoken_BT, index, axis=1)
    return spoken_BT, spoken_BS


class Transformer(nn.Module):
    cfg: config.Model
    vocab_size: int

    @nn.nowrap
    def dtype(self):
        return jnp.dtype(self.cfg.dtype)

    def setup(self):
        D, V, W = self.cfg.width, self.vocab_size, self.cfg.bins
        self.embed_VD = self.param("embed_VD", nn.initializers.normal(D**-0.5), (V, D))
        if not self.cfg.tied:
            self.unembed_DV = self.param("unembed_DV", nn.initializers.normal(D**-0.5), (D, V))
        # Zero: value, reward and hazard start out neutral, whatever the trunk says (DreamerV3).
        E = self.cfg.value_heads
        self.value_EDW = self.param("value_EDW", nn.initializers.zeros, (E, D, W))
        self.reward_DW = self.param("reward_DW", nn.initializers.zeros, (D, W))
        self.end_D = self.param("end_D", nn.initializers.zeros, (D,))
        self.real_D = self.param("real_D", nn.initializers.zeros, (D,))
        self.user_EDV = jnp.zeros((0, D, V))  # an empty array could not be saved
        if self.cfg.user_heads:
            self.user_EDV = self.param("user_EDV", nn.initializers.normal(D**-0.5), (self.cfg.user_heads, D, V))
        Z = self.cfg.belief
        if Z:
            self.belief_DF = self.param("belief_DF", fan_in(D), (D, D))
            self.belief_FZ = self.param("belief_FZ", nn.initializers.zeros, (D, Z))
            self.tell_DF = self.param("tell_DF", fan_in(D), (D, D))
            self.tell_ZF = self.param("tell_ZF", nn.initializers.normal(LOUD), (Z, D))
            self.tell_FD = self.param("tell_FD", nn.initializers.zeros, (D, D))
        C = self.cfg.match_width
        self.code_VC = self.param("code_VC", nn.initializers.normal(C**-0.5), (V, C)) if self.cfg.match_taps else None
        if self.cfg.speakers:
            self.speaker_VD = self.param("speaker_VD", nn.initializers.normal(D**-0.5), (WANTED + 1, D))
        self.tracker = Tracker(self.cfg) if self.cfg.tracked else None
        self.norm = RMSNorm()
        self.drop = nn.Dropout(self.cfg.dropout)
        block = nn.remat(Block, prevent_cse=not self.cfg.scan_layers) if self.cfg.remat else Block
        if self.cfg.scan_layers:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=self.cfg.layers,
            )(self.cfg)
        else:
            self.blocks = [block(self.cfg) for _ in range(self.cfg.layers)]

    def read(self, token_BT: Array, cache: KVCache | None, index: Array | int) -> tuple[Array, KVCache | None]:
        """Embeds the tokens that stand at index, index + 1, ... and runs the layers over them."""
        x_BTD = self.embed_VD.astype(self.dtype())[token_BT] * jnp.asarray(self.cfg.width**0.5, self.dtype())
        if self.cfg.word_dropout and self.has_rng("dropout"):
            kept_BT = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.cfg.word_dropout, token_BT.shape)
            x_BTD = jnp.where((kept_BT | (token_BT < pr.FIRST_PIECE))[..., None], x_BTD, 0)
        spoken_BT, spoken_BS = None, None if cache is None else cache.spoken_BS
        if self.cfg.speakers or self.cfg.tracked:
            spoken_BT, spoken_BS = turn_marks(token_BT, spoken_BS, index)
        if self.cfg.speakers:
            x_BTD += self.speaker_VD.astype(self.dtype())[spoken_BT] * jnp.asarray(self.cfg.width**0.5, self.dtype())
        code_BTXC, codes = self.codes(token_BT, cache, index)
        words = None if code_BTXC is None else Words(code_BTXC)
        sums = None if cache is None else (cache.said_BSNC, cache.told_BSNC)
        if self.cfg.tracked:
            code_BSC = code_BTXC[:, :, -1] if codes is None else codes[:, self.cfg.match_taps - 1 :]
            agree_BTD, words, sums = self.track(token_BT, spoken_BT, spoken_BS, code_BTXC, code_BSC, sums, index)
            x_BTD += agree_BTD
        x_BTD = self.drop(x_BTD, deterministic=not self.has_rng("dropout"))
        layers = None if cache is None else (cache.k_LBKSH, cache.v_LBKSH, cache.x_LBSD)
        found_BTC = None if code_BTXC is None else jnp.zeros_like(code_BTXC[:, :, 0])
        carry = x_BTD, found_BTC
        if self.cfg.scan_layers:
            carry, layers = self.blocks(carry, layers, index, words)
        else:
            after = []
            for i, block in enumerate(self.blocks):
                layer = None if layers is None else tuple(a[i] for a in layers)
                carry, layer = block(carry, layer, index, words)
                after.append(layer)
            layers = None if layers is None else tuple(zip(*after, strict=True))
        x_BTD = jnp.concatenate([self.norm(carry[0]), *([] if found_BTC is None else [carry[1]])], axis=-1)
        return x_BTD, None if layers is None else KVCache(*layers, codes, spoken_BS, *sums)

    def track(self, token_BT, spoken_BT, spoken_BS, code_BTXC, code_BSC, kept: Any, index) -> tuple[Array, Words, Any]:
        """What `Tracker` adds to the stream, the words with what the user has said, and what is kept after them.

        A word counts as far as it is like one of the context: 1 if that holds it, nearly 0 if its code is orthogonal.
        Codes of synonyms come to lie beside each other.
        """
        T, (N, C) = token_BT.shape[1], (self.cfg.heads, self.cfg.match_width)
        sums = [jnp.zeros((len(token_BT), N, C), self.dtype())] * 2
        if kept is None:
            spoken_BS = spoken_BT
        else:
            sums = [jax.lax.dynamic_index_in_dim(sum_BSNC, index, axis=1, keepdims=False) for sum_BSNC in kept]
        place_T, place_S = index + jnp.arange(T), jnp.arange(spoken_BS.shape[1])

        def held(spoken, place):
            return jnp.isin(spoken, jnp.array((IN_CONTEXT, WANTED))) & (place[None] > 0)  # what it begins with is no word

        unit_BTC, unit_BSC = (
            x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6) for x in (code_BTXC[:, :, -1], code_BSC)
        )
        alike_BTS = jnp.einsum("BTC,BSC->BTS", unit_BTC, unit_BSC)
        before_BTS = held(spoken_BS, place_S)[:, None] & (place_S[None] < place_T[:, None])[None]
        count_BT = jnp.max(jnp.where(before_BTS, alike_BTS, 0), axis=-1) ** LIKENESS
        user_BT, assistant_BT = (count_BT * (spoken_BT == whose) for whose in (OF_USER, OF_ASSISTANT))
        wanted_BT = held(spoken_BT, place_T) & (spoken_BT == WANTED)
        user_BT = jnp.where(wanted_BT, 1, user_BT)  # to itself the user has said what it wants
        agree_BTD, *after = self.tracker(code_BTXC, user_BT, assistant_BT, token_BT == pr.TO_ASSISTANT, sums)
        if kept is not None:  # a sum stands behind its token's place: the first one is that of nothing
            put = jax.lax.dynamic_update_slice_in_dim
            kept = [put(old, new, index + 1, axis=1) for old, new in zip(kept, after, strict=True)]
        return agree_BTD, Words(code_BTXC, *after, held(spoken_BT, place_T)), kept

    def codes(self, token_BT: Array, cache: KVCache | None, index: Array | int) -> tuple[Array | None, Array | None]:
        """The codes of each token and of those before it, (B, T, X, C), and the cache of codes after them."""
        X, T = self.cfg.match_taps, token_BT.shape[1]
        if not X:
            return None, None if cache is None else cache.code_BSC
        code_BTC = self.code_VC.astype(self.dtype())[token_BT]
        if cache is None:
            kept, window_BTC = None, jnp.pad(code_BTC, ((0, 0), (X - 1, 0), (0, 0)))
        else:
            kept = jax.lax.dynamic_update_slice_in_dim(cache.code_BSC, code_BTC, index + X - 1, axis=1)
            window_BTC = jax.lax.dynamic_slice_in_dim(kept, index, T + X - 1, axis=1)
        return jnp.stack([window_BTC[:, i : i + T] for i in range(X)], axis=2), kept

    def tell(self, x_BTD: Array) -> tuple[Array, Array]:
        """How sure it is of what the user wants, logits (B, T, Z), and the stream of who has been told that.

        A belief is learnt from the posterior alone, and told as a fact: what a policy needs to know, to ask or to offer, is
        then one number, not a thing to be found out from returns.
        """
        if not self.cfg.belief:
            return jnp.zeros((*x_BTD.shape[:2], 0)), x_BTD
        dtype = x_BTD.dtype
        hidden_BTF = jax.nn.silu(jnp.einsum("BTD,DF->BTF", x_BTD, self.belief_DF.astype(dtype)))
        belief_BTZ = jnp.einsum("BTF,FZ->BTZ", hidden_BTF, self.belief_FZ.astype(dtype)).astype(jnp.float32)
        known_BTZ = jax.lax.stop_gradient(jax.nn.softmax(belief_BTZ)).astype(dtype)
        hidden_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, self.tell_DF.astype(dtype))
        hidden_BTF = jax.nn.silu(hidden_BTF + jnp.einsum("BTZ,ZF->BTF", known_BTZ, self.tell_ZF.astype(dtype)))
        return belief_BTZ, x_BTD + jnp.einsum("BTF,FD->BTD", hidden_BTF, self.tell_FD.astype(dtype))

    def heads(self, x_BTD: Array, role_BT: Array | None = None) -> Heads:
        x_BTD, found_BTC = jnp.split(x_BTD, [self.cfg.width], axis=-1)
        belief_BTZ, told_BTD = self.tell(x_BTD)
        unembed_DV = self.embed_VD.T if self.cfg.tied else self.unembed_DV
        says_BTD = x_BTD if role_BT is None else jnp.where((role_BT == pr.ASSISTANT)[..., None], told_BTD, x_BTD)
        logits_BTV = jnp.einsum("BTD,DV->BTV", says_BTD, unembed_DV.astype(x_BTD.dtype)).astype(jnp.float32)
        if self.cfg.match_taps:
            logits_BTV += jnp.einsum("BTC,VC->BTV", found_BTC, self.code_VC.astype(found_BTC.dtype)).astype(jnp.float32)
        x_BTD = x_BTD.astype(jnp.float32)
        watched_BTD = jax.lax.stop_gradient(x_BTD)  # what guards read must not shape what they guard
        return Heads(
            logits_BTV=logits_BTV,
            value_BTEW=jnp.einsum("BTD,EDW->BTEW", told_BTD.astype(jnp.float32), self.value_EDW),
            reward_BTW=jnp.einsum("BTD,DW->BTW", x_BTD, self.reward_DW),
            end_BT=jnp.einsum("BTD,D->BT", x_BTD, self.end_D),
            user_BTEV=jnp.einsum("BTD,EDV->BTEV", watched_BTD, self.user_EDV),
            real_BT=jnp.einsum("BTD,D->BT", watched_BTD, self.real_D),
            belief_BTZ=belief_BTZ,
        )

    def __call__(self, token_BT: Array) -> Heads:
        return self.heads(self.read(token_BT, None, 0)[0])


def trunk_width(cfg: config.Model) -> int:
    """D of what the heads read: the stream, and the code of what was found in the context."""
    return cfg.width + (cfg.match_width if cfg.match_taps else 0)


def make_transformer(cfg: config.Model, vocab_size: int) -> Net:
    """One transformer for both speakers, as pure functions."""
    module = Transformer(cfg, vocab_size)

    def init(key):
        return module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def init_cache(B, S):
        K, H = cfg.kv_heads, cfg.width // cfg.heads
        dtype, X = jnp.dtype(cfg.dtype), cfg.match_taps
        C = cfg.match_width if X else 0
        shapes = [(B, K, S, H + C), (B, K, S, H + C), (B, S + cfg.conv_width - 1 if cfg.conv_width > 1 else 0, cfg.width)]
        marks = S if cfg.speakers or cfg.tracked else 0
        sums = (B, S + 1 if cfg.tracked else 0, cfg.heads, C)
        rest = (
            jnp.zeros((B, S + X - 1 if X else 0, C), dtype),
            jnp.zeros((B, marks), jnp.int32),
            *(jnp.zeros(sums, dtype) for _ in range(2)),
        )
        if cfg.scan_layers:
            return KVCache(*(jnp.zeros((cfg.layers, *s), dtype) for s in shapes), *rest)
        return KVCache(*(tuple(jnp.zeros(s, dtype) for _ in range(cfg.layers)) for s in shapes), *rest)

    def trunk(params, token_BT, dropout_key=None):
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return module.apply({"params": params}, token_BT, None, 0, rngs=rngs, method="read")[0]

    def heads(params, x_BTD, role_BT=None):
        return module.apply({"params": params}, x_BTD, role_BT, method="heads")

    def prefill(params, token_BT, cache):
        return module.apply({"params": params}, token_BT, cache, 0, method="read")[1]

    def step(params, token_B, index, cache):
        return module.apply({"params": params}, token_B[:, None], cache, index, method="read")

    return Net(init, init_cache, trunk, heads, prefill, step)
