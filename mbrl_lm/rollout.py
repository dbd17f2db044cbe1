"""The one jitted token loop: a whole imagined conversation, whoever is speaking in each row.

Each step writes exactly one token in *every* row. A row's role changes when that row writes its own hand-over token: there
is no barrier at the turns, no padding between them, one scalar cache index and a purely causal mask. A row reads its prompt
until that runs out, then samples; so ragged prompts need no padding on the left.

A *view* is one stream of tokens with its own network and parameters. `imagine` has one view: the network writes both sides;
or two of the same words, where the user has parameters or a context of its own.
`converse` has two, mirrored: each party sees its own private context and is the assistant of its own view; every step both
read the same token, sampled from the view whose owner is speaking.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import protocol as pr
from mbrl_lm.micro_batches import AT_ONCE_ON_CPU, mapped, narrowed, parts_of
from mbrl_lm.nn import Net
from mbrl_lm.scoring import policy_logits
from mbrl_lm.sharding import letters
from mbrl_lm.turns import openings, prompt_lengths
from mbrl_lm.types import Array, Dialogue, KVCache, Params


class View(NamedTuple):
    """One stream of tokens: who predicts it, and what it starts from. Prompts may be narrower than the result."""

    net: Net
    params: Params
    prompt: Dialogue


@flax.struct.dataclass
class Stream:
    """What the loop keeps of one view."""

    cache: KVCache
    token_BT: Array
    author_BT: Array
    sampled_BT: Array
    logp_BT: Array
    role_B: Array  # i32, who writes the next token
    place_B: Array  # i32, tokens already written in this turn


@flax.struct.dataclass
class Rows:
    """What the loop keeps of some rows, in all views."""

    streams: list[Stream]
    key_B: Array  # of their random numbers
    length_B: Array  # i32, of their prompts
    taken_B: Array  # i32, turns written
    done_B: Array  # bool, nothing more is written


def last_of(prompt: Dialogue, x_BT: Array) -> Array:
    """(B,): what stands at the last token of each dialogue."""
    return jnp.take_along_axis(x_BT, prompt_lengths(prompt)[:, None] - 1, axis=1)[:, 0]


def next_role(protocol: pr.Protocol, prompt: Dialogue) -> Array:
    """(B,) i32: who writes next."""
    author_B, token_B = (last_of(prompt, x) for x in (prompt.author_BT, prompt.token_BT))
    return jnp.asarray(protocol.switch_RV)[author_B.astype(jnp.int32), token_B].astype(jnp.int32)


def prefix(protocol: pr.Protocol, dialogue: Dialogue, length_B: Array) -> Dialogue:
    """The first `length_B` tokens of each dialogue, as a prompt: nothing after them is known, no reward, no end."""
    keep_BT = jnp.arange(dialogue.token_BT.shape[1])[None] < length_B[:, None]
    prompt = dialogue.replace(
        token_BT=jnp.where(keep_BT, dialogue.token_BT, pr.PAD),
        sampled_BT=jnp.zeros_like(dialogue.sampled_BT),
        logp_BT=jnp.zeros_like(dialogue.logp_BT),
        reward_BU=jnp.zeros_like(dialogue.reward_BU),
        ended_B=jnp.zeros_like(dialogue.ended_B),
        cut_B=jnp.ones_like(dialogue.cut_B),
    )
    return pr.attributed(protocol, prompt)


def from_an_opening(protocol: pr.Protocol, dialogue: Dialogue, key: Array, first: float = 0.0) -> Dialogue:
    """Prompts that end where the assistant is about to speak: in each dialogue, one such point.

    With probability `first` it is the dialogue's first one, else one drawn at random. A dialogue without one is marked as
    ended, and so is not continued.
    """
    opens_BT = openings(protocol, dialogue)
    point_key, first_key = jax.random.split(key)
    first_B1 = jax.random.bernoulli(first_key, first, (opens_BT.shape[0], 1))
    rank_BT = jnp.where(first_B1, -jnp.arange(opens_BT.shape[1])[None], jax.random.uniform(point_key, opens_BT.shape))
    chance_BT = jnp.where(opens_BT, rank_BT, -jnp.inf)
    length_B = jnp.argmax(chance_BT, axis=1).astype(jnp.int32) + 1
    return prefix(protocol, dialogue, length_B).replace(ended_B=~jnp.any(opens_BT, axis=1))


def copied(tree: Any, copies: int) -> Any:
    """Every row of a pytree so many times, copies next to each other; rows are found by the letters of the names."""

    def repeat(path, x):
        return jnp.repeat(x, copies, axis=letters(path, x.ndim).index("B"))

    return tree if copies == 1 else jax.tree_util.tree_map_with_path(repeat, tree)


def picked(tree: Any, row_R: Array) -> Any:
    """Some rows of a pytree, in any order; rows are found by the letters of the names."""
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.take(x, row_R, axis=letters(path, x.ndim).index("B")), tree)


def copy_uids(uid_B: Array, copies: int, salt: int = 0) -> Array:
    """(B * copies,) u32: names of the copies of each row. The first one keeps the row's; the others' are scattered.

    With another salt copies of copies are nobody's namesakes (multiplications and shifts as in MurmurHash3, Appleby).
    """
    copy_BC = jnp.broadcast_to(jnp.arange(copies, dtype=jnp.uint32)[None], (uid_B.shape[0], copies))
    mixed_BC = uid_B[:, None] ^ ((copy_BC + jnp.uint32(salt << 16)) * jnp.uint32(0xCC9E2D51))
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        mixed_BC = mixed_BC * jnp.uint32(factor)
        mixed_BC = mixed_BC ^ (mixed_BC >> shift)
    return jnp.where(copy_BC == 0, uid_B[:, None], mixed_BC).reshape(-1)


def _start(protocol: pr.Protocol, view: View, tokens: int, copies: int) -> Stream:
    """Reads the prompt in one pass; entries past a row's own prompt are overwritten before they are seen."""
    prompt = view.prompt
    B, P = prompt.token_BT.shape

    def prefilled(token_BT):
        return view.net.prefill(view.params, token_BT, view.net.init_cache(B, tokens))

    cache = narrowed(prefilled, (P // 2,), prompt, prompt.token_BT)
    author_B, place_B = (last_of(prompt, x) for x in (prompt.author_BT, pr.place_in_turn(prompt.turn_BT)))
    role_B = next_role(protocol, prompt)
    place_B = jnp.where(role_B == author_B, place_B + 1, 0)

    def widen(x_BT, fill):
        return jnp.pad(x_BT, ((0, 0), (0, tokens - P)), constant_values=fill)

    stream = Stream(
        cache=cache,
        token_BT=widen(prompt.token_BT, pr.PAD),
        author_BT=widen(prompt.author_BT, pr.END),
        sampled_BT=widen(prompt.sampled_BT, False),
        logp_BT=widen(prompt.logp_BT, 0.0),
        role_B=role_B,
        place_B=place_B.astype(jnp.int32),
    )
    return copied(stream, copies)


def _mirrored(protocol: pr.Protocol, streams: Sequence[Stream], wrote: Sequence[Any]) -> list[Any]:
    """What each view reads when two parties talk: in its USER role the other one's token, mirrored; else its own."""
    mirror_V = jnp.asarray(protocol.mirror_V)
    read = []
    for own, (other_token_B, other_logp_B), stream in zip(wrote, reversed(wrote), streams, strict=True):
        listens_B = stream.role_B == pr.USER
        read.append((jnp.where(listens_B, mirror_V[other_token_B], own[0]), jnp.where(listens_B, other_logp_B, own[1])))
    return read


def _shared(streams: Sequence[Stream], wrote: Sequence[Any]) -> list[Any]:
    """What both views read when they see the same tokens: the second one speaks for all but the assistant."""
    other_B = streams[0].role_B != pr.ASSISTANT
    said = tuple(jnp.where(other_B, theirs_B, ours_B) for ours_B, theirs_B in zip(*wrote, strict=True))
    return [said, said]


def _converse(
    protocol: pr.Protocol, views: Sequence[View], key: Array, *, copies: int = 1, **settings: Any
) -> list[Dialogue]:
    """The token loop over one view, or over two; on a CPU a few rows at a time, those of like length together.

    What a step reads of eight rows, in all views, stays in the processor's own cache: one of 64 rows takes twice as long as
    eight of eight. And each part is over when its own rows are.
    """
    B = views[0].prompt.uid_B.shape[0]
    parts = parts_of(B, max(AT_ONCE_ON_CPU // (copies * len(views)), 1)) if jax.default_backend() == "cpu" else 1
    if parts == 1:
        return _together(protocol, views, key, copies=copies, **settings)

    def folded(tree):  # what belongs to the same prompt
        return jax.tree.map(lambda x: x.reshape(B, -1, *x.shape[1:]), tree)

    def unfolded(tree):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    def some(prompts):
        first, *others = prompts
        prompts = [first, *map(unfolded, others)]
        seen = [view._replace(prompt=prompt) for view, prompt in zip(views, prompts, strict=True)]
        written = _together(protocol, seen, key, copies=copies, **settings)
        return jax.tree.map(lambda x: x.reshape(-1, copies, *x.shape[1:]), written)

    prompts = [view.prompt for view in views]
    return unfolded(mapped(some, (), (prompts[0], *map(folded, prompts[1:])), parts))


def _together(
    protocol: pr.Protocol,
    views: Sequence[View],
    key: Array,
    *,
    tokens: int,
    turns: int,
    temperature: Array | float,
    mirrored: bool = False,
    copies: int = 1,
) -> list[Dialogue]:
    """The token loop over all rows; two views are of the same tokens, or mirrored."""
    switch_RV = jnp.asarray(protocol.switch_RV).astype(jnp.int32)

    def write(view, stream, t, key_B, stream_key):
        """Samples the token at position t in one view; returns it with its log-probability."""
        token_B = jax.lax.dynamic_index_in_dim(stream.token_BT, t - 1, axis=1, keepdims=False)
        heads, cache = view.net.decode_step(view.params, token_B, t - 1, stream.cache, stream.role_B)
        logits_BV = policy_logits(protocol, heads.logits_BTV, stream.role_B, stream.place_B, temperature)
        keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, t), stream_key))(key_B)
        token_B = jax.vmap(jax.random.categorical)(keys, logits_BV).astype(jnp.int32)
        logp_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=1)[:, 0]
        return stream.replace(cache=cache), (token_B, logp_B)

    def read(stream, t, token_B, logp_B, live_B):
        """Puts a token at position t and moves the row's role on."""

        def write_at(x_BT, x_B):
            given_B = jax.lax.dynamic_index_in_dim(x_BT, t, axis=1, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(x_BT, jnp.where(live_B, x_B.astype(x_BT.dtype), given_B), t, axis=1)

        role_B = switch_RV[stream.role_B, token_B]
        return stream.replace(
            token_BT=write_at(stream.token_BT, token_B),
            author_BT=write_at(stream.author_BT, stream.role_B),
            sampled_BT=write_at(stream.sampled_BT, stream.role_B != pr.END),
            logp_BT=write_at(stream.logp_BT, logp_B),
            role_B=jnp.where(live_B, role_B, stream.role_B),
            place_B=jnp.where(live_B, jnp.where(role_B == stream.role_B, stream.place_B + 1, 0), stream.place_B),
        )

    def step(carry):
        t, rows = carry
        live_B = (t >= rows.length_B) & ~rows.done_B
        written = (write(v, s, t, rows.key_B, i) for i, (v, s) in enumerate(zip(views, rows.streams, strict=True)))
        streams, wrote = zip(*written, strict=True)
        if len(views) == 2:
            wrote = _mirrored(protocol, streams, wrote) if mirrored else _shared(streams, wrote)
        after = [read(s, t, *w, live_B) for s, w in zip(streams, wrote, strict=True)]
        speakers = (pr.ASSISTANT, pr.USER)
        old_B, new_B = streams[0].role_B, after[0].role_B
        handed_B = live_B & (old_B != new_B) & jnp.isin(new_B, jnp.array(speakers))
        taken_B = rows.taken_B + handed_B
        over_B = jnp.all(jnp.stack([s.role_B == pr.END for s in after]), axis=0)
        done_B = rows.done_B | over_B | (taken_B >= turns)
        return t + 1, rows.replace(streams=after, taken_B=taken_B, done_B=done_B)

    def goes_on(carry):
        t, rows = carry
        return (t < tokens) & ~jnp.all(rows.done_B)

    total = views[0].prompt.uid_B.shape[0] * copies
    each = [total // view.prompt.uid_B.shape[0] for view in views]  # 1 where a view has a row for every copy
    prompts = [copied(v.prompt, n).replace(uid_B=copy_uids(v.prompt.uid_B, n)) for v, n in zip(views, each, strict=True)]
    streams = [_start(protocol, view, tokens, n) for view, n in zip(views, each, strict=True)]
    first = prompts[0]
    length_B = prompt_lengths(first)
    done_B = (streams[0].role_B == pr.END) | first.ended_B
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first.uid_B)
    rows = Rows(streams, row_keys, length_B, jnp.zeros_like(length_B), done_B)
    _, rows = jax.lax.while_loop(goes_on, step, (jnp.min(jnp.where(done_B, tokens, length_B)), rows))
    return [_as_dialogue(protocol, prompt, stream) for prompt, stream in zip(prompts, rows.streams, strict=True)]


def _as_dialogue(protocol: pr.Protocol, prompt: Dialogue, stream: Stream) -> Dialogue:
    ended_B = (stream.role_B == pr.END) | prompt.ended_B
    return Dialogue(
        token_BT=stream.token_BT,
        author_BT=stream.author_BT,
        turn_BT=pr.parse(protocol, stream.token_BT)[1],
        sampled_BT=stream.sampled_BT,
        logp_BT=stream.logp_BT,
        reward_BU=prompt.reward_BU,
        ended_B=ended_B,
        cut_B=~ended_B,
        uid_B=prompt.uid_B,
    )


def imagine(
    net: Net,
    protocol: pr.Protocol,
    params: Params,
    prompt: Dialogue,
    key: Array,
    *,
    tokens: int,
    turns: int,
    temperature: Array | float = 1.0,
    user: Params | None = None,
    user_view: Dialogue | None = None,
    copies: int = 1,
) -> Dialogue:
    """Continues each dialogue with one network on both sides.

    Args:
      net: the network.
      protocol: who speaks after which token.
      params: its parameters; nothing is differentiated.
      prompt: (B, P) ragged prompts, P <= tokens; one that has ended, or is marked `ended_B`, stays as it is.
      key: a row's random numbers are fold_in(fold_in(key, uid), t): its text does not depend on its batch or shard.
      tokens: T of the result.
      turns: turns written, either side's, before a row is cut: 1 writes the speaker's turn, 2 h imagines h replies to it.
      temperature: of the sampling distribution, one or per role.
      user: other parameters of the same network, which speak for the user and read the outcome.
      user_view: the prompts as the user sees them, if otherwise: another context of the same length; of every prompt, or of
        every copy.
      copies: how often each prompt is continued; it is read once. Copies stand next to each other, and the first one is what
        would be written alone.
    """
    views = [View(net, params, prompt)]
    if user is not None or user_view is not None:
        views.append(View(net, params if user is None else user, prompt if user_view is None else user_view))
    return _converse(protocol, views, key, tokens=tokens, turns=turns, temperature=temperature, copies=copies)[0]


def converse(
    protocol: pr.Protocol,
    ours: View,
    theirs: View,
    key: Array,
    *,
    tokens: int,
    turns: int = np.iinfo(np.int32).max,
    temperature: Array | float = 1.0,
    copies: int = 1,
) -> tuple[Dialogue, Dialogue]:
    """Lets two parties with private contexts talk; each is the assistant of its own view, and writes its own outcome.

    The two prompts of a row must have the same length and mirrored hand-overs. In either result `sampled_BT` is true on the
    tokens of both parties. Arguments as in `imagine`; the random numbers follow the uid of `ours`.
    """
    views = [ours, theirs]
    return tuple(
        _converse(protocol, views, key, tokens=tokens, turns=turns, temperature=temperature, mirrored=True, copies=copies)
    )
