"""How far the learned user is off the true one, where the true one is exactly known.

A *point* is one user turn of a real dialogue, with the history that it answers. At every point the exact filter gives the
true predictive distribution p, and the model gives q:

    nll - floor = mean of log p(turn) - log q(turn)         an unbiased estimate of KL(p || q), from the turns that were said
    KL(p || q)  = sum over all turns of p log(p / q)        exact, where the possible turns can be enumerated

The same figures on the dialogues that the present policy brings about say how the model fares where it is used.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mbrl_lm.data.records import Record
from mbrl_lm.discriminator import discriminate
from mbrl_lm.envs.concierge.bayes import Event, Filter
from mbrl_lm.envs.concierge.env import SUCCESS
from mbrl_lm.envs.concierge.words import phrase
from mbrl_lm.envs.concierge.world import read_catalogue
from mbrl_lm.envs.learned_user import LearnedUser, UserTurn
from mbrl_lm.judge import interval
from mbrl_lm.types import Params

# The turns by which each event of `bayes.Event` is said.
WORDINGS = {
    "leaves": frozenset(UserTurn(text, "leave") for _, text in phrase("leave")),
    "accepts": frozenset(UserTurn(text, "end") for part in ("accept", "settle") for _, text in phrase(part)),
    "satisfied": frozenset(UserTurn(text, "end") for _, text in phrase("accept")),
}
HIDDEN = (1, 2, 4)  # user replies that are imagined instead of seen
BINS = 10  # of the expected calibration error
ENUMERATED = 0.1  # points a dialogue at which KL(p || q) is summed over all turns; some hundred each
EVENT_POINTS = 1  # a dialogue, at which leaving and accepting are summed over all their wordings


@dataclasses.dataclass(frozen=True)
class Point:
    """One user turn.

    Attributes:
      dialogue: its index; turn: 0 for the opening, then 1, 2, ...
      spoken: (role, text) of everything before it.
      said: the turn; log_prob: log p(said); satisfied: it books a place that fulfils every wish.
      event: the true probabilities of what it does; None at the opening.
      answers: log p of every possible turn, where that was asked for.
    """

    dialogue: int
    turn: int
    context: str
    spoken: tuple[tuple[str, str], ...]
    said: UserTurn
    log_prob: float
    satisfied: bool = False
    event: Event | None = None
    answers: dict[UserTurn, float] | None = None


def points(records: Sequence[Record], split: str, enumerate_every: int = 0, noise: float = 0.0) -> Iterator[Point]:
    """The user turns of dialogues; at every n-th one with an assistant turn before it, all that could have been said."""
    seen = 0
    for i, record in enumerate(records):
        spoken = record.spoken
        belief = Filter(read_catalogue(record.context), split, noise)
        yield Point(i, 0, record.context, (), UserTurn(spoken[0][1], ""), belief.opening(spoken[0][1]))
        for u in range(1, len(spoken) - 1, 2):
            ended = record.ended if u + 2 >= len(spoken) and record.ended != "cut" else ""
            answers, (_, act), (_, text) = None, spoken[u], spoken[u + 1]
            if enumerate_every and seen % enumerate_every == 0:
                answers = {UserTurn(*key): p for key, p in belief.answers(act).items() if p > 0}
            seen += 1
            event = belief.predict(act)
            log_prob, outcome = belief.answer(act, text, ended)
            said, before = UserTurn(text, ended), tuple(spoken[: u + 1])
            yield Point(i, (u + 1) // 2, record.context, before, said, log_prob, outcome > SUCCESS, event, answers)


class UserReport:
    """Compares the learned user with the true one.

    Args:
      user: the learned user.
      params: of the model.
      vocab_size, mesh: for the discriminator.
      seed: of what is sampled.
    """

    def __init__(self, user: LearnedUser, params: Params, vocab_size: int, mesh, seed: int):
        self._user, self._params, self._vocab_size, self._mesh, self._seed = user, params, vocab_size, mesh, seed
        self._key = jax.random.fold_in(jax.random.key(seed), 3)

    def report(self, records: Sequence[Record], split: str, noise: float = 0.0) -> dict[str, float]:
        """All figures on some dialogues with the true user; with noise, without those that go through all wordings.

        Args:
          records: dialogues; what was said in them by the user is the true user's.
          split: which types these users are of.
          noise: of their texts.
        """
        total = sum(map(_answers, records))
        every = 0 if noise else max(round(total / len(records) / ENUMERATED), 1)
        told = [p for p in points(records, split, every, noise) if self._fits(p)]
        if not told:
            return {}
        answers = [p for p in told if p.turn]
        figures = self.likelihood(told) | self.sensitivity(answers) | self.open_loop(records, split, noise)
        if not noise:
            figures |= self.divergence([p for p in answers if p.answers])
            figures |= self.calibration(answers[:: max(len(answers) // (EVENT_POINTS * len(records)), 1)])
        return figures | self.imitation(answers)

    def likelihood(self, told: Sequence[Point]) -> dict[str, float]:
        """Nats per token and per turn against the floor, over all turns and by turn."""
        log_q = self._log_prob([self._prompt(p) for p in told], [p.said for p in told])
        log_p, turn = np.array([p.log_prob for p in told]), np.array([p.turn for p in told])
        tokens = sum(len(self._user.turn_tokens(p.said)) for p in told)
        figures = {"nll": -log_q.sum() / tokens, "nll_floor": -log_p.sum() / tokens, **interval("kl", log_p - log_q)}
        for u in np.unique(turn):
            figures[f"turn_nll/turn_{u}"] = -log_q[turn == u].mean()
            figures[f"turn_nll_floor/turn_{u}"] = -log_p[turn == u].mean()
        return figures

    def divergence(self, told: Sequence[Point]) -> dict[str, float]:
        """KL(p || q), summed over all that could have been said."""
        rows = [(self._prompt(p), turn) for p in told for turn in p.answers]
        log_q = self._log_prob([prompt for prompt, _ in rows], [turn for _, turn in rows])
        kl, start = [], 0
        for p in told:
            p_N = np.array(list(p.answers.values()))
            kl.append(float(np.sum(p_N * (np.log(p_N) - log_q[start : start + len(p_N)]))))
            start += len(p_N)
        return interval("kl_enumerated", np.array(kl))

    def calibration(self, told: Sequence[Point]) -> dict[str, float]:
        """Expected calibration error, and distance from and correlation with the true probabilities, of leaving, accepting,
        and being satisfied."""
        turns = sorted(WORDINGS["leaves"] | WORDINGS["accepts"])
        log_q = self._log_prob([self._prompt(p) for p in told for _ in turns], turns * len(told))
        q_NA, figures = np.exp(log_q).reshape(len(told), len(turns)), {}
        turn_N = np.array([p.turn for p in told])
        for event, wordings in WORDINGS.items():
            q_N = np.minimum(q_NA[:, [turn in wordings for turn in turns]].sum(axis=1), 1.0)
            p_N = np.array([getattr(p.event, event) for p in told])
            happened_N = np.array([p.satisfied if event == "satisfied" else p.said in wordings for p in told], np.float64)
            figures[f"ece/{event}"] = calibration_error(q_N, happened_N)
            figures[f"error/{event}"] = np.abs(q_N - p_N).mean()
            figures[f"correlation/{event}"] = correlation(q_N, p_N)
            for u in np.unique(turn_N) if event == "leaves" else ():
                figures[f"hazard/turn_{u}"], figures[f"hazard_true/turn_{u}"] = (
                    q_N[turn_N == u].mean(),
                    p_N[turn_N == u].mean(),
                )
        return figures

    def sensitivity(self, told: Sequence[Point]) -> dict[str, float]:
        """By how much a turn gets less likely after the assistant turn of another dialogue at the same place, in nats."""
        by_turn: dict[int, list[Point]] = {}
        for p in told:
            by_turn.setdefault(p.turn, []).append(p)
        pairs = [(p, same[i - 1]) for same in by_turn.values() if len(same) > 1 for i, p in enumerate(same)]
        swapped = [dataclasses.replace(p, spoken=(*p.spoken[:-1], other.spoken[-1])) for p, other in pairs]
        fitting = [(p, s) for (p, _), s in zip(pairs, swapped, strict=True) if self._fits(s)]
        if not fitting:
            return {}
        said = [p.said for p, _ in fitting]
        true, other = (self._log_prob([self._prompt(pair[side]) for pair in fitting], said) for side in (0, 1))
        return interval("action_sensitivity", true - other)

    def open_loop(self, records: Sequence[Record], split: str, noise: float = 0.0) -> dict[str, float]:
        """Nats of a turn when the last k replies before it were imagined, the assistant's turns being as they were.

        The floor knows the assistant's turns and sums over all that the user may have said between.
        """
        figures = {}
        for k in HIDDEN:
            hidden = [_hide(record, split, noise, k, i) for i, record in enumerate(records) if _answers(record) > k]
            rows = [(self._user.prompt(x.context, x.spoken), x) for x in hidden]
            for step in range(k):
                rows = [(prompt, x) for prompt, x in rows if self._user.leaves_room(prompt)]
                key = jax.random.fold_in(self._key, 10 * k + step)
                replies = self._user.write(self._params, [prompt for prompt, _ in rows], [x.dialogue for _, x in rows], key)
                rows = [
                    (self._user.go_on(prompt, [("user", reply.text), ("assistant", x.acts[step])]), x)
                    for (prompt, x), reply in zip(rows, replies, strict=True)
                ]
            rows = [(prompt, x) for prompt, x in rows if self._user.leaves_room(prompt)]
            if rows:
                log_q = self._log_prob([prompt for prompt, _ in rows], [x.said for _, x in rows])
                figures[f"turn_nll/hidden_{k}"] = -log_q.mean()
                figures[f"turn_nll_floor/hidden_{k}"] = -np.mean([x.log_prob for _, x in rows])
        return figures

    def imitation(self, told: Sequence[Point]) -> dict[str, float]:
        """How varied imagined turns are, and how well a fresh network tells them from the real ones."""
        prompts = [self._prompt(p) for p in told]
        imagined = self._user.write(self._params, prompts, range(len(told)), self._key)
        turns = {"real": [p.said for p in told], "imagined": imagined}
        figures, rows = {}, {}
        for name, some in turns.items():
            figures |= {f"distinct_{n}/{name}": distinct([turn.text for turn in some], n) for n in (1, 2)}
            rows[name] = [[*prompt, *self._user.turn_tokens(turn)] for prompt, turn in zip(prompts, some, strict=True)]
        auc = discriminate(rows["real"], rows["imagined"], self._vocab_size, self._mesh, self._seed)
        return figures | {"discriminator_auc": auc}

    def _prompt(self, p: Point) -> list[int]:
        return self._user.prompt(p.context, p.spoken)

    def _fits(self, p: Point) -> bool:
        return self._user.leaves_room(self._prompt(p))

    def _log_prob(self, prompts: Sequence[list[int]], turns: Sequence[UserTurn]) -> np.ndarray:
        return self._user.log_prob(self._params, prompts, [self._user.turn_tokens(turn) for turn in turns])


def calibration_error(q_N: np.ndarray, happened_N: np.ndarray) -> float:
    """Expected calibration error: |mean probability - frequency|, averaged over ten bins of probability by their size."""
    bin_N = np.minimum((q_N * BINS).astype(int), BINS - 1)
    gaps = [abs(q_N[bin_N == b].sum() - happened_N[bin_N == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(q_N))


def correlation(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    return float(np.corrcoef(x_N, y_N)[0, 1]) if x_N.std() > 0 and y_N.std() > 0 else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams as a share of all n-grams (Li et al. 2016)."""
    grams = [tuple(words[i : i + n]) for text in texts for words in [text.split()] for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


class _Hidden(NamedTuple):
    """A turn that follows k answers which are not shown."""

    dialogue: int
    context: str
    spoken: list[tuple[str, str]]  # up to the assistant turn whose answer is the first not shown
    acts: list[str]  # the k assistant turns after that
    said: UserTurn
    log_prob: float  # log p(said) of the filter that did not see these answers either


def _answers(record: Record) -> int:
    """How many user turns answer an assistant's."""
    return (len(record.turns) - 1) // 2


def _hide(record: Record, split: str, noise: float, k: int, i: int) -> _Hidden:
    """Hides k answers of dialogue i before one that its number chooses."""
    spoken = record.spoken
    last = k + 1 + i % (_answers(record) - k)
    ended = record.ended if last == _answers(record) and record.ended != "cut" else ""
    belief = Filter(read_catalogue(record.context), split, noise)
    belief.opening(spoken[0][1])
    for u in range(1, last):
        if u < last - k:
            belief.answer(spoken[2 * u - 1][1], spoken[2 * u][1], "")
        else:
            belief.overlook(spoken[2 * u - 1][1])
    said = UserTurn(spoken[2 * last][1], ended)
    log_prob = belief.answer(spoken[2 * last - 1][1], *said).log_prob
    acts = [spoken[2 * u - 1][1] for u in range(last - k + 1, last + 1)]
    return _Hidden(i, record.context, spoken[: 2 * (last - k)], acts, said, log_prob)
