"""Rows divided into parts, each of them computed on no more tokens than it has."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mbrl_lm.sharding import constrain, row_shards
from mbrl_lm.turns import prompt_lengths
from mbrl_lm.types import Array, Dialogue

AT_ONCE_ON_CPU = 8  # rows: what a token loop or a forward pass keeps of more of them leaves the processor's own cache
AT_ONCE = 64  # rows of each device that are read in one forward pass elsewhere; it is memory that limits them


def rows_at_once() -> int:
    """Rows of each device that are read in one forward pass, where nothing is differentiated."""
    return AT_ONCE_ON_CPU if jax.default_backend() == "cpu" else AT_ONCE


def parts_of(rows: int, at_once: int) -> int:
    """Into how many parts rows are divided, so that all have the same number, and each device at most `at_once` of them."""
    shards = row_shards()
    each = rows // shards if rows % shards == 0 else rows  # what cannot be spread is on every device
    return next(parts for parts in range(1, each + 1) if each % parts == 0 and each // parts <= at_once)


def split_rows(tree: Any, parts: int) -> Any:
    """(B, ...) -> (parts, B / parts, ...), every part spread over all devices as the whole was."""

    def split(x):
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, "LB" + "_" * (x.ndim - 2))

    return jax.tree.map(split, tree)


def merge_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def by_length(dialogue: Dialogue, parts: int) -> Array:
    """The order of rows in which `split_rows` puts rows of like length together, the shortest in the first part."""
    return jnp.argsort(prompt_lengths(dialogue)).reshape(parts, -1).T.reshape(-1)


def narrowed(function: Callable[[Any], Any], widths: Sequence[int], dialogue: Dialogue, tree: Any) -> Any:
    """function(tree), computed on no more tokens than the rows have: on the narrowest of `widths` that holds them all.

    Args:
      function: of a tree of arrays (B, T, ...) and others; its result must not hang on padding, nor its shape on T.
      widths: numbers of tokens; those below T are compiled beside it, and which one runs is found out at run time.
      dialogue: the rows, which say how long they are.
      tree: what is narrowed.
    """
    T = dialogue.token_BT.shape[1]
    widths = _up_to(T, widths)

    def narrow(width):
        return lambda x: x[:, :width] if x.ndim > 1 and x.shape[1] == T else x

    longest = jnp.max(prompt_lengths(dialogue))
    branches = [lambda tree, width=width: function(jax.tree.map(narrow(width), tree)) for width in widths]
    return jax.lax.switch(jnp.searchsorted(jnp.array(widths), longest), branches, tree)


def mapped(function: Callable[[Any], Any], widths: Sequence[int], rows: Any, parts: int) -> Any:
    """function(rows), part by part, so that only one part's activations are held; the result is in the order of the rows.

    Args:
      function, widths: as in `narrowed`.
      rows: a tuple of trees of arrays (B, ...), the first of which is the dialogue.
      parts: a divisor of B.
    """
    if parts == 1:
        return narrowed(function, widths, rows[0], rows)
    order_B = by_length(rows[0], parts)
    ordered = jax.tree.map(lambda x: jnp.take(x, order_B, axis=0), rows)
    found = jax.lax.map(lambda x: narrowed(function, widths, x[0], x), split_rows(ordered, parts))
    return jax.tree.map(lambda x: x[jnp.argsort(order_B)], merge_rows(found))


def _up_to(T: int, widths: Sequence[int]) -> list[int]:
    return [*(width for width in sorted(widths) if width < T), T]
