"""What the user wants, as a hidden variable: an imagined user then keeps to it, as a real one does.

A context lists items, a separator between them; the user wants one of those that are as long as the first. The assistant
does not know which one, the user does: in its *own view* of a dialogue that item z stands first, between two marks that
stand for BOS and a separator. Recorded users do not tell z either. It is inferred by Bayes' rule from what they have said,

    p(z | said) ~ product over the user's tokens of p(token | own view of z, tokens before it),   z uniform beforehand,

with the network itself, which learns the user's words in own views of a z that is drawn from this (stochastic EM: Celeux &
Diebolt 1985). In imagination z is drawn in the same way, from the prompt. At first the network knows nothing, and what
stands first may come to mean what is not wanted; so learning begins with a hint: who wants an item says words of it. And
until it can tell them apart, it takes the likeliest z: drawn ones would teach it little (Celeux & Govaert 1992).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_lm import protocol as pr
from mbrl_lm import rollout
from mbrl_lm.micro_batches import mapped, parts_of, rows_at_once
from mbrl_lm.nn import Net
from mbrl_lm.scoring import score
from mbrl_lm.types import Array, Dialogue, Params


def separates(protocol: pr.Protocol, dialogue: Dialogue) -> Array:
    """bool (B, T): tokens of the context that stand after an item."""
    return (dialogue.token_BT == protocol.separator) & (dialogue.author_BT == pr.CONTEXT)


def item_width(protocol: pr.Protocol, dialogue: Dialogue) -> Array:
    """i32 (B,): tokens of the first item of each context with its separator; 0 where nothing is listed."""
    return jnp.argmax(separates(protocol, dialogue), axis=1).astype(jnp.int32)


def items(protocol: pr.Protocol, dialogue: Dialogue, most: int) -> Array:
    """bool (B, Z): whether there is an item z = 0, 1, ... up to `most`, as long as the first. There always is the first."""
    separates_BT = separates(protocol, dialogue)
    before_BT = jnp.cumsum(separates_BT, axis=1)
    end_BZ = item_width(protocol, dialogue)[:, None] * (1 + jnp.arange(most))[None]
    inside_BZ = end_BZ < separates_BT.shape[1]
    end_BZ = jnp.where(inside_BZ, end_BZ, 0)
    # Item z ends at a separator, the z-th one after the first's.
    there_BZ = inside_BZ & jnp.take_along_axis(separates_BT, end_BZ, axis=1)
    there_BZ &= jnp.take_along_axis(before_BT, end_BZ, axis=1) == 1 + jnp.arange(most)[None]
    return (jnp.cumprod(there_BZ, axis=1) > 0).at[:, 0].set(True)


def own_view(protocol: pr.Protocol, dialogue: Dialogue, z_B: Array) -> Dialogue:
    """The dialogues as a user sees them who wants item z: it stands first, marked, and those before it one place later."""
    T = dialogue.token_BT.shape[1]
    place_T = jnp.arange(T)[None]
    width_B1, z_B1 = item_width(protocol, dialogue)[:, None], z_B[:, None]
    from_BT = jnp.where(place_T <= width_B1 * (z_B1 + 1), place_T - width_B1, place_T)
    from_BT = jnp.where(place_T <= width_B1, place_T + width_B1 * z_B1, from_BT)
    from_BT = jnp.minimum(from_BT, T - 1).at[:, 0].set(0)  # past the end where there is no item z
    token_BT = jnp.take_along_axis(dialogue.token_BT, from_BT, axis=1)
    listed_B1 = width_B1 > 0
    token_BT = jnp.where(listed_B1 & (place_T == 0), pr.WANTED, token_BT)
    return dialogue.replace(token_BT=jnp.where(listed_B1 & (place_T == width_B1), pr.OTHERS, token_BT))


def mentions(protocol: pr.Protocol, dialogue: Dialogue, most: int) -> Array:
    """f32 (B, Z): how many of the words of each item the user says, however often."""
    token_BT, user_BT = dialogue.token_BT, dialogue.author_BT == pr.USER
    said_BT = jnp.any((token_BT[:, :, None] == token_BT[:, None]) & user_BT[:, None], axis=2)
    said_BT &= (dialogue.author_BT == pr.CONTEXT) & (token_BT != protocol.separator)
    width_B1 = jnp.maximum(item_width(protocol, dialogue), 1)[:, None]
    item_BT = (jnp.arange(token_BT.shape[1])[None] - 1) // width_B1
    return jnp.sum(said_BT[:, None] & (item_BT[:, None] == jnp.arange(most)[None, :, None]), axis=2, dtype=jnp.float32)


def said(
    net: Net,
    protocol: pr.Protocol,
    params: Params,
    views: Dialogue,
    role: int,
    summed: Callable[[Array], Array] = lambda logp_BT: jnp.sum(logp_BT, axis=1),
) -> Array:
    """(B, ...): `summed` of the log-likelihoods of the tokens that a role has written, (B, T), nats, 0 elsewhere."""
    B, T = views.token_BT.shape

    def of_some(x) -> Array:
        nll_BT = score(net, protocol, params, x[0]).nll_BT
        return summed(-jnp.where(x[0].author_BT == role, nll_BT, 0.0))

    return mapped(of_some, (T // 2,), (views,), parts_of(B, rows_at_once()))


def log_likelihoods(
    net: Net, protocol: pr.Protocol, params: Params, dialogue: Dialogue, most: int, *summed: Callable[[Array], Array]
) -> Array:
    """f32 (B, Z): log p(all that the user says | own view of z), nats; -inf where there is no item z; see `said`."""
    B = dialogue.token_BT.shape[0]
    views = own_view(protocol, rollout.copied(dialogue, most), jnp.tile(jnp.arange(most), B))
    logp = said(net, protocol, params, views, pr.USER, *summed)
    logp = logp.reshape(B, most, *logp.shape[1:])
    there_BZ = items(protocol, dialogue, most)
    return jnp.where(there_BZ.reshape(B, most, *[1] * (logp.ndim - 2)), logp, -jnp.inf)


def log_likelihoods_so_far(net: Net, protocol: pr.Protocol, params: Params, dialogue: Dialogue, most: int) -> Array:
    """f32 (B, Z, T): the same of what the user has said up to each token."""
    T = dialogue.token_BT.shape[1]

    def so_far(logp_BT):  # computed on no more tokens than there are, after which nothing is said
        return jnp.pad(jnp.cumsum(logp_BT, axis=1), ((0, 0), (0, T - logp_BT.shape[1])), mode="edge")

    return log_likelihoods(net, protocol, params, dialogue, most, so_far)


def belief(logp_BZT: Array, count: int) -> Array:
    """f32 (B, T, count): how likely the likeliest items are what the user wants, in that order."""
    p_BTZ = jax.nn.softmax(logp_BZT, axis=1).swapaxes(1, 2)
    return jax.lax.top_k(p_BTZ, count)[0]


def log_evidence(net: Net, protocol: pr.Protocol, params: Params, dialogue: Dialogue, most: int) -> Array:
    """f32 (B,): log p(all that the user says), whatever it wants: the mean over the items, nats."""
    logp_BZ = log_likelihoods(net, protocol, params, dialogue, most)
    return jax.nn.logsumexp(logp_BZ, axis=1) - jnp.log(jnp.sum(logp_BZ > -jnp.inf, axis=1))


def drawn(logp_BZ: Array, key: Array, uid_B: Array, copies: int = 1) -> Array:
    """i32 (B * copies,): items, each drawn from softmax(logp); the copies of a row stand next to each other.

    They share out what is likely among them (systematic sampling: Kitagawa 1996), so that their mean hangs little on luck.
    The first one is what would be drawn alone.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, uid_B)
    start_B1 = jax.vmap(jax.random.uniform)(keys)[:, None]
    place_BC = (start_B1 + jnp.arange(copies)[None] / copies) % 1.0
    edge_BZ = jnp.cumsum(jax.nn.softmax(logp_BZ, axis=1), axis=1)
    edge_BZ /= edge_BZ[:, -1:]  # exactly 1 from the last item on that there is
    return jnp.sum(place_BC[:, :, None] >= edge_BZ[:, None, :-1], axis=-1, dtype=jnp.int32).reshape(-1)


def imagine(
    most: int,
    net: Net,
    protocol: pr.Protocol,
    params: Params,
    prompt: Dialogue,
    key: Array,
    *,
    user: Params | None = None,
    copies: int = 1,
    logp_BZ: Array | None = None,
    **settings: Any,
) -> Dialogue:
    """`rollout.imagine`, whose arguments it takes, with users who want one of `most` items; 0: they have no goals.

    Every copy of a prompt has a user of its own. `logp_BZ`: the log-likelihoods of what was said, if they are known.
    """
    view = None
    if most:
        if logp_BZ is None:
            logp_BZ = log_likelihoods(net, protocol, params if user is None else user, prompt, most)
        z_B = drawn(logp_BZ, jax.random.fold_in(key, 1), prompt.uid_B, copies)
        view = own_view(protocol, rollout.copied(prompt, copies), z_B)
    return rollout.imagine(net, protocol, params, prompt, key, user=user, user_view=view, copies=copies, **settings)
