"""The exact user in the learned one's place: what a perfect world model would be."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from mbrl_lm.envs.concierge.bayes import Filter
from mbrl_lm.envs.concierge.world import read_catalogue
from mbrl_lm.envs.learned_user import UserTurn


class ExactUser:
    """Has the methods of `LearnedUser`; a prompt is [context, (role, text), ...] and a turn is one token."""

    def __init__(self, split: str = "train"):
        self._split = split
        self._answers = functools.cache(self._answers)  # of each history once, however many turns are weighed

    def prompt(self, context, spoken):
        return [context, *spoken]

    def go_on(self, prompt, spoken):
        return [*prompt, *spoken]

    def turn_tokens(self, turn):
        return [turn]

    def leaves_room(self, prompt):
        return True

    def write(self, params, prompts, uids: Sequence[int], key) -> list[UserTurn]:
        turns = []
        for prompt, uid in zip(prompts, uids, strict=True):
            answers = self._answers(tuple(prompt))
            p, rng = np.array(list(answers.values())), np.random.default_rng((int(uid), len(prompt)))
            turns.append(UserTurn(*list(answers)[rng.choice(len(p), p=p / p.sum())]))
        return turns

    def log_prob(self, params, prompts, turns) -> np.ndarray:
        return np.array([self._log_prob(tuple(prompt), turn) for prompt, (turn,) in zip(prompts, turns, strict=True)])

    def _log_prob(self, prompt, turn: UserTurn) -> float:
        if len(prompt) == 1:
            return self._belief(prompt).opening(turn.text)
        p = self._answers(prompt).get(tuple(turn), 0.0)
        return math.log(p) if p > 0 else -math.inf

    def _answers(self, prompt) -> dict[tuple[str, str], float]:
        return self._belief(prompt[:-1]).answers(prompt[-1][1])

    def _belief(self, prompt) -> Filter:
        belief, spoken = Filter(read_catalogue(prompt[0]), self._split), prompt[1:]
        if spoken:
            belief.opening(spoken[0][1])
        for u in range(1, len(spoken) - 1, 2):
            belief.answer(spoken[u][1], spoken[u + 1][1], "")
        return belief
