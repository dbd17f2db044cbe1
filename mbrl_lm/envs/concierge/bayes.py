"""What can be known of a user from the texts alone: an exact Bayes filter over its latent states.

The filter is the best world model there is: its predictive probabilities are the floor of anybody's likelihood, and the
posterior over hidden goals says what an imagined dialogue is truly worth.

    p(text, end | history) = sum over states, answers of  p(state | history) p(answer | state, heard) p(text | answer)

A user's answer reads neither patience nor goodwill, so a belief is one (patience, goodwill) table for each of the rest of
the states.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mbrl_lm.envs.concierge import user as automaton
from mbrl_lm.envs.concierge.env import LEFT_ANGRY, TYPES, reward
from mbrl_lm.envs.concierge.recogniser import Heard, recognise
from mbrl_lm.envs.concierge.user import GOODWILL, HAZARD, LEAVE, Part, State, Turn
from mbrl_lm.envs.concierge.words import FILLERS, turn_text
from mbrl_lm.envs.concierge.world import Catalogue, read_catalogue, satisfaction

P, G = len(HAZARD), len(GOODWILL)  # values of patience, of goodwill
_HAZARD_PG = np.repeat(np.array(HAZARD)[:, None], G, axis=1)


class Answer(NamedTuple):
    """What the filter makes of one user turn."""

    log_prob: float  # of the text and the end; -inf for what no user says
    outcome: float  # posterior mean of the turn's reward component `outcome`


class Event(NamedTuple):
    """Probabilities of what the next user turn does."""

    leaves: float
    accepts: float  # books a place
    satisfied: float  # books one that fulfils every wish


@functools.cache
def _texts(parts: tuple[Part, ...]) -> dict[str, float]:
    return {text: p for p, text in turn_text(parts)}


@functools.cache
def _wearing(cost: int) -> np.ndarray:
    """(P, G, P, G): where patience and goodwill go at an offence."""
    moves_PGPG = np.zeros((P, G, P, G))
    for p in range(P):
        for g in range(G):
            moves_PGPG[p, g][automaton.wearied(p, g, cost)] = 1
    return moves_PGPG


def without_fillers(text: str, noise: float) -> tuple[str, float]:
    """The text without fillers, and the probability of the fillers that stood where they stood."""
    words, p, filler = [], 1.0, False
    for word in text.split():
        if word in FILLERS:
            p *= 0.0 if filler else noise / len(FILLERS)
        else:
            p *= 1.0 if filler else 1 - noise
            words.append(word)
        filler = word in FILLERS
    return " ".join(words), 0.0 if filler else p


class Filter:
    """The belief about one user; `opening` first, then `answer` for each turn.

    Args:
      catalogue: what the dialogue is about.
      split: "train" or "test": which user types there are.
      noise: of the texts, see `Concierge`.
    """

    def __init__(self, catalogue: Catalogue, split: str = "train", noise: float = 0.0):
        self._catalogue, self._noise = catalogue, noise
        table: dict[State, np.ndarray] = {}
        kinds, goals, patience, short, goodwill = automaton.initial(catalogue, TYPES[split])
        for p, kind in kinds:
            mass_PG = np.zeros((P, G))
            for q, points in short if kind == "impatient" else patience:
                for r, good in goodwill:
                    mass_PG[points, good] = p * q * r
            for q, goal in goals:
                table[automaton.begin(kind, goal, 0, 0, 0)] = q * mass_PG
        self._set(table)

    def _set(self, table: dict[State, np.ndarray]) -> None:
        """States come with their patience and goodwill at 0: these are in the masses."""
        self._states, self._mass_NPG = list(table), np.stack(list(table.values()))
        self._mass_NPG /= self._mass_NPG.sum()

    def opening(self, text: str) -> float:
        """The log-probability of the user's first turn; conditions the belief on it."""
        return self._condition(text, "", self._openings(), self._mass_NPG).log_prob

    def answer(self, said: str, text: str, ended: str) -> Answer:
        """Conditions the belief on the user's answer to what the assistant said.

        Args:
          said: the assistant's turn.
          text, ended: the user's, as in `Reply`; "cut" is no choice of the user's.

        Returns:
          its log-probability and worth. A text that no user says leaves the belief as the assistant's turn made it; if it
          ends the dialogue, what was offered counts as booked.
        """
        heard = recognise(said)
        stay_NPG, leave_NPG, turns = self._react(heard)
        if ended == "leave":
            words, p_fillers = without_fillers(text, self._noise)
            p = leave_NPG.sum() * _texts((LEAVE,)).get(words, 0.0) * p_fillers
            return Answer(math.log(p) if p > 0 else -math.inf, LEFT_ANGRY)
        answer = self._condition(text, "end" if ended == "end" else "", turns, stay_NPG)
        place = self._catalogue.find(heard.place)
        if ended == "end" and place and answer.log_prob == -math.inf:
            mass_N = self._mass_NPG.sum(axis=(1, 2))
            return answer._replace(
                outcome=sum(m * satisfaction(s.goal, place) for m, s in zip(mass_N, self._states, strict=True))
            )
        return answer

    def overlook(self, said: str) -> None:
        """Goes on past an answer that was not seen, of a user who stayed."""
        stay_NPG, _, turns = self._react(recognise(said))
        self._move([(i, p, turn) for i, p, turn in turns if not turn.ended], stay_NPG)

    def predict(self, said: str) -> Event:
        """What the answer to the assistant's turn will be; leaves the belief alone."""
        stay_NPG, leave_NPG, turns = self._react(recognise(said))
        accepts = satisfied = 0.0
        for i, p, turn in turns:
            if turn.booked:
                accepts += p * stay_NPG[i].sum()
                satisfied += p * stay_NPG[i].sum() * (self._worth(i, turn) == 1)
        return Event(float(leave_NPG.sum()), float(accepts), float(satisfied))

    def answers(self, said: str) -> dict[tuple[str, str], float]:
        """The whole predictive distribution of (text without fillers, ended)."""
        stay_NPG, leave_NPG, turns = self._react(recognise(said))
        total = {(text, "leave"): p * float(leave_NPG.sum()) for text, p in _texts((LEAVE,)).items()}
        parts: dict[tuple[tuple[Part, ...], str], float] = {}
        for i, p, turn in turns:
            parts[turn.parts, turn.ended] = parts.get((turn.parts, turn.ended), 0.0) + p * float(stay_NPG[i].sum())
        for (said_parts, ended), p in parts.items():
            for text, q in _texts(said_parts).items():
                total[text, ended] = total.get((text, ended), 0.0) + p * q
        return total

    def _openings(self) -> list[tuple[int, float, Turn]]:
        return [(i, p, turn) for i, s in enumerate(self._states) for p, turn in automaton.opening(s, self._catalogue)]

    def _react(self, heard: Heard) -> tuple[np.ndarray, np.ndarray, list[tuple[int, float, Turn]]]:
        """Masses of the users who stay and who leave, and what those who stay answer: (state's index, probability, turn)."""
        costs, turns = [], []
        for i, before in enumerate(self._states):
            state = before._replace(turn=before.turn + 1)
            costs.append(automaton.offence(state, heard, self._catalogue))
            turns += [(i, p, turn) for p, turn in automaton.react(state, heard, self._catalogue)]
        cost_N, mass_NPG = np.array(costs), np.empty_like(self._mass_NPG)
        for cost in set(costs):
            mass_NPG[cost_N == cost] = np.einsum("npg,pgqh->nqh", self._mass_NPG[cost_N == cost], _wearing(cost))
        return mass_NPG * (1 - _HAZARD_PG), mass_NPG * _HAZARD_PG, turns

    def _worth(self, i: int, turn: Turn) -> float:
        place = self._catalogue.find(turn.booked)
        return satisfaction(self._states[i].goal, place) if place else 0.0

    def _condition(self, text: str, ended: str, turns: list[tuple[int, float, Turn]], mass_NPG: np.ndarray) -> Answer:
        words, p_fillers = without_fillers(text, self._noise)
        mass_N = mass_NPG.sum(axis=(1, 2))
        said = [(i, p * _texts(turn.parts).get(words, 0.0), turn) for i, p, turn in turns if turn.ended == ended]
        total = sum(p * mass_N[i] for i, p, _ in said) * p_fillers
        worth = sum(p * mass_N[i] * self._worth(i, turn) for i, p, turn in said if turn.booked)
        self._move([(i, p, turn) for i, p, turn in (said if total > 0 else turns) if p and not turn.ended], mass_NPG)
        return Answer(math.log(total), float(worth * p_fillers / total)) if total > 0 else Answer(-math.inf, 0.0)

    def _move(self, turns: list[tuple[int, float, Turn]], mass_NPG: np.ndarray) -> None:
        """The belief after one of these turns; what it was where there is none."""
        table: dict[State, np.ndarray] = {}
        for i, p, turn in turns:
            table[turn.state] = table.get(turn.state, 0.0) + p * mass_NPG[i]
        if table:
            self._set(table)


class Reading(NamedTuple):
    """A dialogue as the filter reads it."""

    log_prob_U: list[float]  # of each user turn, the opening first
    reward: dict[str, float]  # the components of `Reply.reward`, summed; `outcome` is a posterior mean


def read(context: str, turns: Sequence[tuple[str, str]], ended: str, split: str = "train", noise: float = 0.0) -> Reading:
    """Filters a whole dialogue, real or imagined.

    Args:
      context: the catalogue's text.
      turns: (role, text), the user's opening first, then in turn; a last assistant turn without an answer is ignored.
      ended: how the last user turn ended the dialogue, as in `Reply`.
      split, noise: see `Filter`.
    """
    catalogue = read_catalogue(context)
    belief = Filter(catalogue, split, noise)
    log_prob_U = [belief.opening(turns[0][1])]
    total = {"outcome": 0.0, "turn_cost": 0.0, "hallucination": 0.0, "injection": 0.0}
    for u in range(1, len(turns) - 1, 2):
        answer = belief.answer(turns[u][1], turns[u + 1][1], ended if u + 2 >= len(turns) else "")
        log_prob_U.append(answer.log_prob)
        for name, x in reward(recognise(turns[u][1]), catalogue, answer.outcome).items():
            total[name] += x
    return Reading(log_prob_U, total)
