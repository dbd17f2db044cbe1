"""The decoder-only transformer and its heads, as one tuple of pure functions: `Net`."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mbrl_lm import config
from mbrl_lm.nn.layers import Block, RMSNorm
from mbrl_lm.types import Array, Heads, KVCache, Params


class Net(NamedTuple):
    """A network as pure functions; nothing above this floor knows what is inside.

    init(key) -> params
    init_cache(B, S) -> KVCache for S positions
    trunk(params, token_BT, dropout_key=None) -> x_BTD, what the heads read; x at t has seen tokens 0 ... t
    heads(params, x_BTD) -> Heads
    prefill(params, token_BT, cache) -> cache after reading all T tokens from position 0
    decode_step(params, token_B, index, cache) -> (Heads without a T axis, cache); the token stands at `index` in every row
    """

    init: Callable[[Array], Params]
    init_cache: Callable[[int, int], KVCache]
    trunk: Callable[..., Array]
    heads: Callable[[Params, Array], Heads]
    prefill: Callable[[Params, Array, KVCache], KVCache]
    decode_step: Callable[[Params, Array, Array, KVCache], tuple[Heads, KVCache]]

    def forward(self, params: Params, token_BT: Array) -> Heads:
        """Heads at every position."""
        return self.heads(params, self.trunk(params, token_BT))


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
        self.value_DW = self.param("value_DW", nn.initializers.zeros, (D, W))
        self.reward_DW = self.param("reward_DW", nn.initializers.zeros, (D, W))
        self.end_D = self.param("end_D", nn.initializers.zeros, (D,))
        self.norm = RMSNorm()
        self.drop = nn.Dropout(self.cfg.dropout)
        block = nn.remat(Block, prevent_cse=not self.cfg.scan_layers) if self.cfg.remat else Block
        if self.cfg.scan_layers:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=self.cfg.layers,
            )(self.cfg)
        else:
            self.blocks = [block(self.cfg) for _ in range(self.cfg.layers)]

    def read(self, token_BT: Array, cache: KVCache | None, index: Array | int) -> tuple[Array, KVCache | None]:
        """Embeds the tokens that stand at index, index + 1, ... and runs the layers over them."""
        x_BTD = self.embed_VD.astype(self.dtype())[token_BT] * jnp.asarray(self.cfg.width**0.5, self.dtype())
        x_BTD = self.drop(x_BTD, deterministic=not self.has_rng("dropout"))
        layers = None if cache is None else (cache.k_LBKSH, cache.v_LBKSH, cache.x_LBSD)
        if self.cfg.scan_layers:
            x_BTD, layers = self.blocks(x_BTD, layers, index)
        else:
            after = []
            for i, block in enumerate(self.blocks):
                x_BTD, layer = block(x_BTD, None if layers is None else tuple(a[i] for a in layers), index)
                after.append(layer)
            layers = None if layers is None else tuple(zip(*after, strict=True))
        return self.norm(x_BTD), None if layers is None else KVCache(*layers)

    def heads(self, x_BTD: Array) -> Heads:
        unembed_DV = self.embed_VD.T if self.cfg.tied else self.unembed_DV
        logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, unembed_DV.astype(x_BTD.dtype)).astype(jnp.float32)
        x_BTD = x_BTD.astype(jnp.float32)
        return Heads(
            logits_BTV=logits_BTV,
            value_BTW=jnp.einsum("BTD,DW->BTW", x_BTD, self.value_DW),
            reward_BTW=jnp.einsum("BTD,DW->BTW", x_BTD, self.reward_DW),
            end_BT=jnp.einsum("BTD,D->BT", x_BTD, self.end_D),
        )

    def __call__(self, token_BT: Array) -> Heads:
        return self.heads(self.read(token_BT, None, 0)[0])


def make_net(cfg: config.Model, vocab_size: int) -> Net:
    """The network of a config, as pure functions."""
    module = Transformer(cfg, vocab_size)

    def init(key):
        return module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def init_cache(B, S):
        K, H = cfg.kv_heads, cfg.width // cfg.heads
        dtype = jnp.dtype(cfg.dtype)
        shapes = [(B, K, S, H), (B, K, S, H), (B, S + cfg.conv_width - 1 if cfg.conv_width > 1 else 0, cfg.width)]
        if cfg.scan_layers:
            return KVCache(*(jnp.zeros((cfg.layers, *s), dtype) for s in shapes))
        return KVCache(*(tuple(jnp.zeros(s, dtype) for _ in range(cfg.layers)) for s in shapes))

    def trunk(params, token_BT, dropout_key=None):
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return module.apply({"params": params}, token_BT, None, 0, rngs=rngs, method="read")[0]

    def heads(params, x_BTD):
        return module.apply({"params": params}, x_BTD, method="heads")

    def prefill(params, token_BT, cache):
        return module.apply({"params": params}, token_BT, cache, 0, method="read")[1]

    def decode_step(params, token_B, index, cache):
        x_BTD, cache = module.apply({"params": params}, token_B[:, None], cache, index, method="read")
        return jax.tree.map(lambda a: a[:, 0], heads(params, x_BTD)), cache

    return Net(init, init_cache, trunk, heads, prefill, decode_step)
