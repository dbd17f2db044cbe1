"""Parts of an update: rows of like length, and no more tokens than they have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import dialogue

from mbrl_lm import micro_batches
from mbrl_lm import protocol as pr

CHAT = pr.make_protocol("chat", pr.FIRST_PIECE + 8)
LONG = "bos e >a a >u b >a c >u h >a d >u b stop"


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_rows_of_like_length_come_together(parts):
    texts = ["bos >a stop", LONG, "bos a >a b stop", "bos >a a b c stop", "bos a stop", LONG, "bos stop", "bos >a b stop"]
    d = dialogue(CHAT, texts, T=16, U=3)
    order_B = micro_batches.by_length(d, parts)
    assert sorted(order_B.tolist()) == list(range(8))
    length_PB = np.asarray(micro_batches.split_rows(jnp.sum(d.author_BT != pr.END, axis=1)[order_B], parts))
    assert (length_PB.max(axis=1)[:-1] <= length_PB.min(axis=1)[1:]).all()


@pytest.mark.parametrize(
    "rows, at_once, shards, parts",
    [(64, 8, 1, 8), (10, 8, 1, 2), (12, 8, 1, 2), (13, 8, 1, 13), (6, 8, 1, 1), (64, 8, 4, 2), (72, 8, 8, 3), (6, 8, 4, 1)],
)
def test_parts_are_equal_and_as_few_as_may_be(monkeypatch, rows, at_once, shards, parts):
    monkeypatch.setattr(micro_batches, "row_shards", lambda: shards)
    assert micro_batches.parts_of(rows, at_once) == parts


@pytest.mark.parametrize("text, width", [("bos >a stop", 3), ("bos >a a stop", 5), ("bos >a a b stop", 5), (LONG, 16)])
def test_no_more_tokens_are_computed_on_than_there_are(text, width):
    seen = []

    def function(tree):
        seen.append(tree[0].shape)
        return jnp.sum(tree[0]), jnp.int32(tree[0].shape[1]), jnp.sum(tree[1])

    d = dialogue(CHAT, [text, "bos stop"], T=16, U=3)
    tree = ((d.author_BT != pr.END).astype(jnp.int32), jnp.arange(6).reshape(2, 3))
    total, used, others = jax.jit(lambda d, tree: micro_batches.narrowed(function, (5, 3, 40), d, tree))(d, tree)
    assert (int(total), int(used), int(others)) == (len(text.split()) + 2, width, 15)
    assert set(seen) == {(2, 3), (2, 5), (2, 16)}


def test_rows_keep_their_order_whatever_part_they_were_in():
    texts = [LONG, "bos >a stop", LONG, "bos a >a b stop"]
    d = dialogue(CHAT, texts, T=16, U=3)
    name_B = jnp.array([7, 5, 3, 1])

    def function(rows):
        d, name_B = rows
        assert d.token_BT.shape[0] == 2, "a part"
        return {"length": jnp.sum(d.author_BT != pr.END, axis=1), "name": name_B}

    found = jax.jit(lambda *rows: micro_batches.mapped(function, (5,), rows, 2))(d, name_B)
    assert found["name"].tolist() == [7, 5, 3, 1] and found["length"].tolist() == [len(text.split()) for text in texts]
