"""Weights of its own for each speaker: combinators of a `Net`, which all read the same tokens.

The policy's part writes the assistant's turns and says what a state is worth; the world model's part writes the user's turns
and says what they earn, whether they end the dialogue, and whether they are real.
"""

import flax.struct
import jax
import jax.numpy as jnp

from mbrl_lm import config
from mbrl_lm import protocol as pr
from mbrl_lm.nn.transformer import Net, make_transformer, trunk_width
from mbrl_lm.types import Array, Heads, KVCache, Params


@flax.struct.dataclass
class Caches:
    """Of the two networks."""

    assistant: KVCache
    user: KVCache


def _speaks_for_user(role: Array | None, x: Array) -> Array:
    """bool, to be broadcast against the last axis of `x`; without roles nobody reads the logits."""
    return jnp.zeros((*x.shape[:-1], 1), bool) if role is None else (role == pr.USER)[..., None]


def _joined(policy: Heads, world: Heads, logits: Array) -> Heads:
    return world.replace(logits_BTV=logits, value_BTEW=policy.value_BTEW, belief_BTZ=policy.belief_BTZ)


def separate(net: Net, width: int) -> Net:
    """Two networks of one make, of `width` each; what they put out stands side by side."""

    def init(key):
        assistant_key, user_key = jax.random.split(key)
        return {"assistant": net.init(assistant_key), "user": net.init(user_key)}

    def init_cache(B, S):
        return Caches(net.init_cache(B, S), net.init_cache(B, S))

    def trunk(params, token_BT, dropout_key=None):
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        parts = [net.trunk(params[name], token_BT, key) for name, key in zip(("assistant", "user"), keys, strict=True)]
        return jnp.concatenate(parts, axis=-1)

    def heads(params, x_BTD, role_BT=None):
        policy = net.heads(params["assistant"], x_BTD[..., :width], role_BT)
        world = net.heads(params["user"], x_BTD[..., width:])
        logits_BTV = jnp.where(_speaks_for_user(role_BT, x_BTD), world.logits_BTV, policy.logits_BTV)
        return _joined(policy, world, logits_BTV)

    def prefill(params, token_BT, cache):
        return Caches(*(net.prefill(params[n], token_BT, getattr(cache, n)) for n in ("assistant", "user")))

    def step(params, token_B, index, cache):
        policy_BTD, assistant = net.step(params["assistant"], token_B, index, cache.assistant)
        world_BTD, user = net.step(params["user"], token_B, index, cache.user)
        return jnp.concatenate([policy_BTD, world_BTD], axis=-1), Caches(assistant, user)

    return Net(init, init_cache, trunk, heads, prefill, step)


def adapted(net: Net, cfg: config.Model) -> Net:
    """One trunk and a bottleneck for each speaker behind it, x + silu(x down) up (Houlsby et al. 2019), at first nothing."""

    def init(key):
        D, F = trunk_width(cfg), cfg.adapter_width
        trunk_key, *keys = jax.random.split(key, 3)
        params = {"trunk": net.init(trunk_key)}
        for name, name_key in zip(("assistant", "user"), keys, strict=True):
            params[name] = {"down_DF": jax.random.normal(name_key, (D, F)) * D**-0.5, "up_FD": jnp.zeros((F, D))}
        return params

    def adapt(adapter: Params, x_BTD: Array) -> Array:
        down_BTF = jax.nn.silu(jnp.einsum("...D,DF->...F", x_BTD, adapter["down_DF"].astype(x_BTD.dtype)))
        return x_BTD + jnp.einsum("...F,FD->...D", down_BTF, adapter["up_FD"].astype(x_BTD.dtype))

    def trunk(params, token_BT, dropout_key=None):
        return net.trunk(params["trunk"], token_BT, dropout_key)

    def heads(params, x_BTD, role_BT=None):
        policy_BTD, world_BTD = (adapt(params[name], x_BTD) for name in ("assistant", "user"))
        spoken_BTD = jnp.where(_speaks_for_user(role_BT, x_BTD), world_BTD, policy_BTD)
        policy, world, spoken = (net.heads(params["trunk"], x, role_BT) for x in (policy_BTD, world_BTD, spoken_BTD))
        return _joined(policy, world, spoken.logits_BTV)  # XLA drops the logits of the other two

    def prefill(params, token_BT, cache):
        return net.prefill(params["trunk"], token_BT, cache)

    def step(params, token_B, index, cache):
        return net.step(params["trunk"], token_B, index, cache)

    return Net(init, net.init_cache, trunk, heads, prefill, step)


ROLES = {"shared": lambda net, cfg: net, "adapter": adapted, "separate": lambda net, cfg: separate(net, trunk_width(cfg))}


def make_net(cfg: config.Model, vocab_size: int) -> Net:
    """The network of a config, as pure functions."""
    return ROLES[cfg.roles](make_transformer(cfg, vocab_size), cfg)
