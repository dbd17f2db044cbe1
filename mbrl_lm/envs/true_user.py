"""Real dialogues with an environment's true user: the policy writes its turns on the device, the user answers in text."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from mbrl_lm import config
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import lengths, put, take
from mbrl_lm.envs import ENVS
from mbrl_lm.nn import Net
from mbrl_lm.planner import Planned, make_planner
from mbrl_lm.replay import empty_dialogues
from mbrl_lm.sharding import pjit
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.types import Array, Dialogue, Params

ENDING = {"": pr.TO_ASSISTANT, "cut": pr.TO_ASSISTANT, "end": pr.STOP, "leave": pr.LEAVE}


class TrueUser:
    """An environment played by a policy; turns are written in `rows` dialogues at a time.

    Args:
      cfg: the run's config; `cfg.data` names the environment.
      net, protocol, tokenizer: of the policy.
      mesh: the device mesh.
      rows: dialogues at a time, those that go on; what a row says does not depend on the others.
      signal: what `reward_BU` is: "return", or "rating", what such a user would give each single reply.
      imagined_user: parameters that speak for the user where `cfg.plan` looks ahead; None: those of the policy.

    Attributes:
      seconds: of each time that turns were written, all rows together.
    """

    def __init__(
        self,
        cfg: config.Config,
        net: Net,
        protocol: pr.Protocol,
        tokenizer: Tokenizer,
        mesh,
        rows: int,
        signal: str = "return",
        imagined_user: Params | None = None,
    ):
        self.cfg, self.protocol, self.tokenizer, self.rows, self.signal = cfg, protocol, tokenizer, rows, signal
        self.seconds: list[float] = []
        self._imagined_user = imagined_user
        self._decide = pjit(make_planner(cfg, net, protocol), mesh)

    def play(self, params: Params, key: Array, uids: Sequence[int], split: str, temperature: float):
        """Plays one dialogue for each uid.

        Args:
          params: of the policy.
          key: of the policy's samples; the user's luck hangs on (cfg.seed, uid) alone.
          uids: as many as you like; see the environment for who may use which.
          split: "train" or "test" users.
          temperature: of the policy.

        Returns:
          dialogues: Dialogue of numpy arrays with the environment's rewards, the policy's log-probabilities at its tokens.
          outcomes: one dict for each, as the environment tells it. Of plans, too: `plan_tokens`, written for its turns, and
            `plan_worth`, the return that was expected when the first one was chosen.
        """
        env, temperature_R = self._env(uids, split), pr.temperatures(assistant=temperature)
        dialogues, going_B = jax.tree.map(np.array, self._open(env, np.array(uids))), np.ones(len(uids), bool)
        totals: list[dict[str, float]] = [{} for _ in uids]
        while going_B.any():
            # The shortest first: of like length, they need not wait until each other's prompts have run out.
            live, length_B = np.flatnonzero(going_B), lengths(dialogues)
            live = live[np.argsort(length_B[live], kind="stable")][: self.rows]
            planned = self._speak(params, take(dialogues, live), key, temperature_R)
            after, going_B[live] = self._answer(env, live, length_B[live], planned, totals)
            put(dialogues, live, after)
        return dialogues, [env.outcome(i) | total for i, total in enumerate(totals)]

    def openings(self, uids: Sequence[int], split: str) -> Dialogue:
        """The prompts that `play` starts from: context and the user's first turn."""
        return self._open(self._env(uids, split), np.array(uids))

    def _env(self, uids: Sequence[int], split: str):
        return ENVS[self.cfg.data](self.cfg.seed, uids, split, self.cfg.noise, self.cfg.places)

    def _open(self, env, uids: np.ndarray) -> Dialogue:
        dialogue = empty_dialogues(len(env.contexts), self.cfg.tokens, self.cfg.turns)
        dialogue.uid_B[:] = uids
        encode = self.tokenizer.encode
        for b, (context, opening) in enumerate(zip(env.contexts, env.openings, strict=True)):
            tokens = [pr.BOS, *encode(context), pr.TO_USER, *encode(opening), pr.TO_ASSISTANT]
            if len(tokens) > self.cfg.tokens:
                raise config.ConfigError(f"a dialogue opens with {len(tokens)} tokens: raise --config.tokens")
            dialogue.token_BT[b, : len(tokens)] = tokens
        return pr.attributed_on_host(self.protocol, dialogue)

    def _speak(self, params: Params, prompt: Dialogue, key: Array, temperature_R: np.ndarray) -> Planned:
        """The assistant's next turn in up to `rows` dialogues."""
        count, since = len(prompt.uid_B), time.monotonic()
        row_R = np.arange(self.rows)
        prompt = take(prompt, row_R % count).replace(ended_B=row_R >= count)
        planned = jax.device_get(self._decide(params, prompt, key, temperature_R, self._imagined_user))
        self.seconds.append(time.monotonic() - since)
        return jax.tree.map(lambda x: np.array(x[:count]), planned)

    def _answer(self, env, live: np.ndarray, before_R: np.ndarray, planned: Planned, totals) -> tuple[Dialogue, np.ndarray]:
        """The users' replies to turns that begin at `before_R`, in the rows `live` of `env`; and which dialogues go on."""
        dialogue, length_R = planned.dialogue, lengths(planned.dialogue)
        # A turn that ran out of tokens was never handed over: it is not said.
        said_R = dialogue.token_BT[np.arange(len(live)), length_R - 1] == pr.TO_USER
        handed_R = np.sum((dialogue.token_BT == pr.TO_USER) & (dialogue.author_BT == pr.ASSISTANT), axis=1)
        texts: list[str | None] = [None] * len(totals)
        for r in np.flatnonzero(said_R):
            texts[live[r]] = self.tokenizer.decode(dialogue.token_BT[r, before_R[r] : length_R[r]])
        replies = env.step(texts)
        ended_R, going_R = np.zeros(len(live), bool), np.zeros(len(live), bool)
        for r in np.flatnonzero(said_R):
            reply, total, turn, length = replies[live[r]], totals[live[r]], handed_R[r] - 1, length_R[r]
            total.setdefault("plan_worth", float(planned.worth_B[r]))
            total["plan_tokens"] = total.get("plan_tokens", 0) + int(planned.tokens_B[r])
            dialogue.reward_BU[r, turn] = reply.signal(self.signal)
            for name, x in reply.reward.items():
                total[name] = total.get(name, 0.0) + x
            tokens = [*self.tokenizer.encode(reply.text), ENDING[reply.ended]]
            fits = length + len(tokens) <= self.cfg.tokens
            tokens = tokens[: self.cfg.tokens - length]
            dialogue.token_BT[r, length : length + len(tokens)] = tokens
            ended_R[r] = fits and reply.ended in ("end", "leave")
            going_R[r] = fits and not reply.ended and turn + 1 < self.cfg.turns
        dialogue = pr.attributed_on_host(self.protocol, dialogue)
        return dialogue.replace(ended_B=ended_R, cut_B=~ended_R), going_R
