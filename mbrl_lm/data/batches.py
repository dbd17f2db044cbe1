"""The batch of a step, as a pure function of (seed, step): resuming needs no iterator state."""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mbrl_lm import config
from mbrl_lm import protocol as pr
from mbrl_lm.data.records import DataError
from mbrl_lm.types import Dialogue

ROWS = 4  # a batch is divided over micro-batches and devices


def text_batches(cfg: config.Config, seed: int, dialogues: Dialogue, renamed: Dialogue | None) -> Callable[[int], Dialogue]:
    """Batches to learn both speakers from by likelihood: first of renamed dialogues, then of those that were said.

    Renamings show what the task does not depend on; how people really name things is learnt last.
    """
    said_at = batches(dialogues, seed, cfg.train.batch, cfg.widths)
    if renamed is None:
        return said_at
    renamed_at = batches(renamed, seed, cfg.train.batch, cfg.widths)
    until = round(cfg.train.renamed * cfg.train.supervised_steps)
    return lambda step: renamed_at(step) if step < until else said_at(step)


def lengths(dialogues: Dialogue) -> np.ndarray:
    """Tokens of each dialogue before its padding, (B,)."""
    return np.sum(dialogues.author_BT != pr.END, axis=1)


def take(dialogues: Dialogue, rows: np.ndarray, width: int | None = None) -> Dialogue:
    """Some rows, and of the tokens the first `width`."""
    T = dialogues.token_BT.shape[1]
    per_token = {name for name in dialogues.__dict__ if name.endswith("_BT")}
    picked = {name: x[rows, : width or T] if name in per_token else x[rows] for name, x in dialogues.__dict__.items()}
    return Dialogue(**picked)


def put(dialogues: Dialogue, rows: np.ndarray, some: Dialogue) -> None:
    """Sets rows in place, the inverse of `take`; of `some` the first ones, if there are more of them."""
    jax.tree.map(lambda x, new: x.__setitem__(rows, new[: len(rows)]), dialogues, some)


def join(parts: Sequence[Dialogue]) -> Dialogue:
    """One set of rows after the other, on the host."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def rows_for(dialogues: int, most: int = 64) -> int:
    """How many of so many dialogues are computed together: `most`, or all of them, in eights, where there are fewer."""
    return min(most, 8 * math.ceil(max(dialogues, 1) / 8))


def chunks(dialogues: Dialogue, rows: int) -> Iterator[tuple[Dialogue, np.ndarray]]:
    """Chunks of exactly `rows` dialogues with a mask (rows,) of the true ones; the last chunk is filled up."""
    total = len(dialogues.uid_B)
    for start in range(0, total, rows):
        index = np.arange(start, start + rows)
        yield take(dialogues, np.minimum(index, total - 1)), index < total


def batches(dialogues: Dialogue, seed: int, batch: int, widths: Sequence[int] = ()) -> Callable[[int], Dialogue]:
    """Batches of dialogues of like length, so that little of them is padding.

    A row goes to the narrowest width that holds it. A batch of half the width has twice the rows: the same number of tokens,
    padding included, or a few less, since rows come in fours where those of full width do. Every epoch visits each row at
    most once, in an order of its own, and leaves out what does not fill a batch.

    Args:
      dialogues: numpy arrays of B' rows and T tokens.
      seed: of the order, at least 0.
      batch: rows of a batch of full width.
      widths: narrower ones than T.

    Returns:
      batch_at: step -> Dialogue of about `batch` * T / width rows and `width` tokens.

    Raises:
      DataError: if there are fewer rows than a batch takes.
    """
    T, length_B = dialogues.token_BT.shape[1], lengths(dialogues)
    groups = []
    narrower = 0
    for width in sorted({*widths, T}):
        rows = np.flatnonzero((length_B > narrower) & (length_B <= width))
        size = batch * T // width
        size -= size % math.gcd(batch, ROWS)
        if len(rows) >= size or width == T:
            groups.append((width, size, rows))
            narrower = width
    if not 1 <= groups[-1][1] <= len(length_B):
        raise DataError(f"a batch of {batch} from {len(length_B)} dialogues: lower config.train.batch or give more data")
    width, size, rows = groups[-1]
    if len(rows) < size:  # too few long ones: shorter ones fill their batch
        others = np.setdiff1d(np.arange(len(length_B)), rows)
        longest = others[np.argsort(-length_B[others], kind="stable")]
        groups[-1] = (width, size, np.concatenate([rows, longest[: size - len(rows)]]))
    counts = [len(rows) // size for _, size, rows in groups]
    total = sum(counts)

    def epoch_order(epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        rng = np.random.default_rng((seed, epoch))
        return rng.permutation(np.repeat(np.arange(len(groups)), counts)), [rng.permutation(rows) for _, _, rows in groups]

    held: list = [-1, None]  # the order of the epoch that was asked for last

    def batch_at(step: int) -> Dialogue:
        epoch, place = divmod(int(step), total)
        if held[0] != epoch:
            held[:] = epoch, epoch_order(epoch)
        order, rows = held[1]
        group = order[place]
        nth = int(np.sum(order[:place] == group))
        width, size, _ = groups[group]
        return take(dialogues, rows[group][nth * size : (nth + 1) * size], width)

    return batch_at
