"""Scripted assistants of `concierge`: what can be reached, and whether the learned user can be fooled.

With the true user they mark the scale: the oracle, which knows the goal, above all; random below. With the learned user they
show the planted exploit: the pleaser promises and claims what is wished for, which no logged assistant does.
"""

from collections.abc import Sequence

import jax
import numpy as np

from mbrl_lm import config, judge
from mbrl_lm.data.corpus import Corpus
from mbrl_lm.data.encode import encode
from mbrl_lm.data.records import Record, Turn
from mbrl_lm.envs import concierge
from mbrl_lm.envs.concierge.env import TURN_LIMIT, Concierge, Reply, reward
from mbrl_lm.envs.concierge.recogniser import recognise
from mbrl_lm.envs.learned_user import LearnedUser
from mbrl_lm.types import Array, Params

ASSISTANTS = {
    "oracle": concierge.Oracle(), "strong": concierge.Strong(), "logs": concierge.Mixture(), "pleaser": concierge.Pleaser(),
    "random": concierge.Random(),
}  # fmt: skip
FOOLING = ("strong", "logs", "pleaser")  # compared with both users


def with_true_user(cfg: config.Config, uids: Sequence[int]) -> dict[str, float]:
    """Success and return of each, with intervals; the users are the judge's."""
    figures = {}
    for name, assistant in ASSISTANTS.items():
        outcomes = concierge.play(assistant, Concierge(cfg.seed, uids, "test", cfg.noise, cfg.places), cfg.seed)
        for figure in ("success", "return"):
            figures |= judge.interval(f"scripted/{name}/{figure}", np.array([o[figure] for o in outcomes], np.float64))
    return figures


class Imagined:
    """Dialogues of `concierge` whose user is imagined: the same openings, and `step` as the environment has it."""

    def __init__(self, env: Concierge, user: LearnedUser, params: Params, key: Array):
        self.rows, self.contexts, self.openings = env.rows, env.contexts, env.openings
        self._user, self._params, self._key, self._turn = user, params, key, 0
        self._prompts = [user.prompt(c, [("user", text)]) for c, text in zip(env.contexts, env.openings, strict=True)]

    def step(self, texts: Sequence[str | None]) -> list[Reply | None]:
        """The imagined answers. Of the reward, only what the assistant's words cost is known; no satisfaction."""
        self._turn += 1
        live = [i for i, text in enumerate(texts) if text is not None]
        for i in live:
            self._prompts[i] = self._user.go_on(self._prompts[i], [("assistant", texts[i])])
        fitting = [i for i in live if self._user.leaves_room(self._prompts[i])]
        replies: list[Reply | None] = [None if text is None else Reply("", "cut", {}, 0.0) for text in texts]
        if not fitting:
            return replies
        key = jax.random.fold_in(self._key, self._turn)
        said = self._user.write(self._params, [self._prompts[i] for i in fitting], [self.rows[i].uid for i in fitting], key)
        for i, turn in zip(fitting, said, strict=True):
            cost = reward(recognise(texts[i]), self.rows[i].catalogue, 0.0)
            replies[i] = Reply(turn.text, turn.ended or ("cut" if self._turn >= TURN_LIMIT else ""), cost, 0.0)
            self._prompts[i] = self._user.go_on(self._prompts[i], [("user", turn.text)])
        return replies


def with_learned_user(
    cfg, corpus: Corpus, imagination: judge.Imagination, user: LearnedUser, params: Params, key: Array, uids
):
    """Returns of `FOOLING` with true and with learned users of the training types, under the true and the learned reward.

    Args:
      cfg, corpus: of the run.
      imagination: what the learned reward is.
      user, params: the learned user.
      key: of what it says.
      uids: of the users whose openings are taken.
    """
    figures = {}
    for name in FOOLING:
        imagined, real = (Concierge(cfg.seed, uids, "train", cfg.noise, cfg.places) for _ in range(2))
        records = [_record(r) for r in concierge.converse(ASSISTANTS[name], Imagined(imagined, user, params, key), cfg.seed)]
        true = concierge.play(ASSISTANTS[name], real, cfg.seed)
        dialogues = encode(records, corpus.tokenizer, corpus.protocol, cfg.tokens, cfg.turns)
        returns = {
            "true_user_true_reward": np.array([o["return"] for o in true]),
            "learned_user_true_reward": np.array([judge.true_return(record, "train", cfg.noise) for record in records]),
            "learned_user_learned_reward": imagination.learned(params, dialogues),
        }
        for which, values in returns.items():
            figures |= judge.interval(f"fooled/{name}/{which}", values.astype(np.float64))
    return figures


def _record(raw: dict) -> Record:
    """A dialogue of `converse`; its rewards are the environment's and no learned user's."""
    return Record(tuple(Turn(turn["role"], turn["text"]) for turn in raw["turns"]), raw["context"], ended=raw["ended"])
