"""Batches as a function of (seed, step), sorted by length."""

import numpy as np
import pytest

from mbrl_lm import config, protocol
from mbrl_lm.data.batches import batches, chunks, rows_for, take, text_batches
from mbrl_lm.data.records import DataError
from mbrl_lm.replay import empty_dialogues


def dialogues(lengths, tokens=16):
    made = empty_dialogues(len(lengths), tokens, 2)
    made.uid_B[:] = np.arange(len(lengths))
    made.author_BT[:] = np.where(np.arange(tokens)[None] < np.array(lengths)[:, None], protocol.USER, protocol.END)
    return made


TEN = dialogues([9] * 10)


def uids(batch_at, steps):
    return [batch_at(k).uid_B.tolist() for k in steps]


def test_a_batch_is_a_function_of_seed_and_step():
    first = uids(batches(TEN, 3, 4), range(10))
    assert uids(batches(TEN, 3, 4), (9, 4, 0)) == [first[9], first[4], first[0]]
    assert uids(batches(TEN, 4, 4), range(10)) != first
    assert batches(TEN, 3, 4)(0).check().token_BT.shape == (4, 16)


def test_every_epoch_visits_every_row_once_in_a_new_order():
    seen = uids(batches(TEN, 3, 5), range(6))
    epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_short_dialogues_come_in_narrow_batches_of_as_many_tokens():
    mixed = dialogues([3] * 16 + [7] * 8 + [12] * 4)
    batch_at = batches(mixed, 0, 2, widths=(4, 8))
    shapes = [batch_at(k).token_BT.shape for k in range(6)]
    assert sorted(shapes) == [(2, 16), (2, 16), (4, 8), (4, 8), (8, 4), (8, 4)]
    seen = [uid for k in range(6) for uid in batch_at(k).uid_B.tolist()]
    assert sorted(seen) == list(range(28))
    for k in range(6):
        batch = batch_at(k)
        assert (batch.author_BT != protocol.END).sum(axis=1).max() <= batch.token_BT.shape[1]


def test_rows_come_in_fours_where_those_of_full_width_do():
    mixed = dialogues([3] * 40 + [12] * 8)
    shapes = {batches(mixed, 0, 4, widths=(6, 7))(k).token_BT.shape for k in range(4)}
    assert shapes == {(8, 6), (4, 16)}  # 64 tokens are ten rows of six and a few more
    assert {batches(mixed, 0, 3, widths=(5,))(k).token_BT.shape for k in range(4)} == {(9, 5), (3, 16)}


def test_a_width_of_too_few_rows_is_merged_into_the_next():
    mixed = dialogues([3] * 3 + [7] * 9 + [12])
    batch_at = batches(mixed, 0, 2, widths=(4, 8))
    assert {batch_at(k).token_BT.shape for k in range(6)} == {(4, 8), (2, 16)}


def test_more_rows_than_there_are_cannot_be_batched():
    with pytest.raises(DataError, match="lower config.train.batch"):
        batches(TEN, 0, 11)


def test_renamed_dialogues_come_first():
    cfg = config.override(
        config.Config(), {"train.batch": 5, "train.supervised_steps": 10, "train.renamed": 0.3, "widths": ()}
    )
    renamed = TEN.replace(uid_B=TEN.uid_B + 100)
    both_at, plain_at = text_batches(cfg, 3, TEN, renamed), text_batches(cfg, 3, TEN, None)
    assert all(min(uid) >= 100 for uid in uids(both_at, range(3)))
    assert uids(both_at, range(3, 10)) == uids(plain_at, range(3, 10))


def test_few_dialogues_are_computed_in_eights():
    assert [rows_for(n) for n in (0, 1, 8, 9, 57, 64, 400)] == [8, 8, 8, 16, 64, 64, 64]


def test_chunks_fill_the_last_one_up_and_say_so():
    parts = list(chunks(TEN, 4))
    assert [mask.tolist() for _, mask in parts] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert [chunk.uid_B.tolist() for chunk, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]


def test_take_trims_only_the_token_axis():
    some = take(TEN, np.array([2, 1]), 6)
    assert some.token_BT.shape == (2, 6) and some.reward_BU.shape == (2, 2) and some.uid_B.tolist() == [2, 1]
