"""Real dialogues collected while learning: the newest ones, and how many there ever were."""

from collections.abc import Mapping

import jax
import numpy as np

from mbrl_lm.data.batches import put
from mbrl_lm.types import Dialogue


def empty_dialogues(rows: int, tokens: int, turns: int) -> Dialogue:
    """Dialogues of zeros on the host, (B, T) and (B, U)."""
    BT = (rows, tokens)
    return Dialogue(
        token_BT=np.zeros(BT, np.int32),
        author_BT=np.zeros(BT, np.int8),
        turn_BT=np.zeros(BT, np.int16),
        sampled_BT=np.zeros(BT, bool),
        logp_BT=np.zeros(BT, np.float32),
        reward_BU=np.zeros((rows, turns), np.float32),
        ended_B=np.zeros(rows, bool),
        cut_B=np.zeros(rows, bool),
        uid_B=np.zeros(rows, np.uint32),
    )


class Replay:
    """A ring of the newest `capacity` dialogues on the host, saved with every checkpoint."""

    def __init__(self, capacity: int, tokens: int, turns: int):
        self.collected = 0
        self._rows = empty_dialogues(capacity, tokens, turns)
        self._capacity = capacity

    def __len__(self) -> int:
        return min(self.collected, self._capacity)

    def add(self, dialogues: Dialogue) -> None:
        """Takes B dialogues in; the oldest make room."""
        place = (self.collected + np.arange(len(dialogues.uid_B))) % self._capacity
        put(self._rows, place, dialogues)
        self.collected += len(place)

    def sample(self, seed: int, step: int, rows: int) -> Dialogue:
        """`rows` dialogues with replacement; a function of what is held and of (seed, step)."""
        chosen = np.random.default_rng((seed, step)).integers(len(self), size=rows)
        return jax.tree.map(lambda x: x[chosen], self._rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {**self._rows.__dict__, "collected": np.array(self.collected)}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes up what `arrays` gave."""
        self.collected = int(arrays["collected"])
        self._rows = Dialogue(**{name: arrays[name] for name in self._rows.__dict__})
