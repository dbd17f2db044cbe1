"""The ring of collected dialogues."""

import jax
import numpy as np

from mbrl_lm.replay import Replay, empty_dialogues


def numbered(first: int, rows: int):
    out = empty_dialogues(rows, 6, 2)
    out.uid_B[:] = np.arange(first, first + rows)
    out.token_BT[:] = out.uid_B[:, None]
    out.reward_BU[:] = out.uid_B[:, None]
    return out


def held(replay: Replay) -> set[int]:
    return set(replay.sample(0, 0, 400).uid_B.tolist())


def test_the_newest_dialogues_are_kept():
    replay = Replay(5, 6, 2)
    assert len(replay) == 0 and replay.collected == 0
    replay.add(numbered(0, 3))
    assert len(replay) == 3 and held(replay) == {0, 1, 2}  # the empty places are never drawn
    replay.add(numbered(3, 4))
    assert len(replay) == 5 and replay.collected == 7 and held(replay) == {2, 3, 4, 5, 6}
    replay.add(numbered(7, 5))
    assert held(replay) == {7, 8, 9, 10, 11} and replay.collected == 12


def test_rows_stay_whole_and_are_copies():
    replay = Replay(5, 6, 2)
    given = numbered(3, 4)
    replay.add(given)
    given.token_BT[:] = 99
    drawn = replay.sample(1, 2, 50)
    drawn.check()
    assert (drawn.token_BT == drawn.uid_B[:, None]).all() and (drawn.reward_BU == drawn.uid_B[:, None]).all()
    drawn.token_BT[:] = 99
    assert replay.sample(1, 2, 50).token_BT.max() < 99


def test_a_sample_is_a_function_of_seed_and_step():
    replay = Replay(50, 6, 2)
    replay.add(numbered(0, 50))
    first = replay.sample(1, 7, 20).uid_B
    replay.sample(1, 8, 20)
    assert (replay.sample(1, 7, 20).uid_B == first).all()
    assert (replay.sample(1, 8, 20).uid_B != first).any() and (replay.sample(2, 7, 20).uid_B != first).any()


def test_sampling_is_uniform():
    replay = Replay(10, 6, 2)
    replay.add(numbered(0, 14))
    count = np.bincount(replay.sample(0, 0, 10_000).uid_B, minlength=14)
    assert not count[:4].any() and abs(count[4:] - 1000).max() < 150


def test_what_a_checkpoint_keeps_comes_back():
    replay, other = Replay(5, 6, 2), Replay(5, 6, 2)
    replay.add(numbered(0, 7))
    saved = jax.tree.map(np.array, replay.arrays())
    other.load(saved)
    for after in (replay, other):
        after.add(numbered(7, 2))
    assert other.collected == 9 and len(other) == 5
    a, b = replay.sample(0, 3, 40), other.sample(0, 3, 40)
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
