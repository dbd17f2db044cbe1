"""Real dialogues with an environment's true user: the policy writes its turns on the device, the user answers in text."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from mbrl_lm import config
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import join, lengths, take
from mbrl_lm.envs import ENVS
from mbrl_lm.nn import Net
from mbrl_lm.planner import make_planner
from mbrl_lm.replay import empty_dialogues
from mbrl_lm.sharding import pjit
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.types import Array, Dialogue, Params

ENDING = {"": pr.TO_ASSISTANT, "cut": pr.TO_ASSISTANT, "end": pr.STOP, "leave": pr.LEAVE}


class TrueUser:
    """An environment played by a policy; `rows` dialogues at a time.

    Args:
      cfg: the run's config; `cfg.data` names the environment.
      net, protocol, tokenizer: of the policy.
      mesh: the device mesh.
      rows: dialogues at a time.
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
        parts, outcomes = [], []
        for start in range(0, len(uids), self.rows):
            some = list(uids[start : start + self.rows])
            env = self._env(some + some[:1] * (self.rows - len(some)), split)
            dialogues, rewards = self._play(env, params, key, np.array(some), temperature)
            parts.append(take(dialogues, np.arange(len(some))))
            outcomes += [env.outcome(i) | rewards[i] for i in range(len(some))]
        return join(parts), outcomes

    def openings(self, uids: Sequence[int], split: str) -> Dialogue:
        """The prompts that `play` starts from: context and the user's first turn."""
        return self._open(self._env(uids, split), np.array(uids))

    def _env(self, uids: Sequence[int], split: str):
        return ENVS[self.cfg.data](self.cfg.seed, uids, split, self.cfg.noise, self.cfg.places)

    def _open(self, env, uids: np.ndarray) -> Dialogue:
        dialogue = empty_dialogues(len(env.contexts), self.cfg.tokens, self.cfg.turns)
        dialogue.uid_B[: len(uids)] = uids
        encode = self.tokenizer.encode
        for b, (context, opening) in enumerate(zip(env.contexts, env.openings, strict=True)):
            tokens = [pr.BOS, *encode(context), pr.TO_USER, *encode(opening), pr.TO_ASSISTANT]
            if len(tokens) > self.cfg.tokens:
                raise config.ConfigError(f"a dialogue opens with {len(tokens)} tokens: raise --config.tokens")
            dialogue.token_BT[b, : len(tokens)] = tokens
        return pr.attributed_on_host(self.protocol, dialogue)

    def _play(self, env, params, key, uids, temperature) -> tuple[Dialogue, list[dict[str, float]]]:
        dialogue = self._open(env, uids)
        ended, going = np.zeros(self.rows, bool), np.ones(self.rows, bool)
        temperature_R = pr.temperatures(assistant=temperature)
        totals: list[dict[str, float]] = [{} for _ in range(self.rows)]
        for turn in range(self.cfg.turns):
            before = lengths(dialogue)
            since = time.monotonic()
            prompt = dialogue.replace(ended_B=~going)
            planned = jax.device_get(self._decide(params, prompt, key, temperature_R, self._imagined_user))
            self.seconds.append(time.monotonic() - since)
            dialogue = jax.tree.map(np.array, planned.dialogue)
            length = lengths(dialogue)
            # A turn that ran out of tokens was never handed over: it is not said.
            going &= dialogue.token_BT[np.arange(self.rows), length - 1] == pr.TO_USER
            spoken = [self.tokenizer.decode(dialogue.token_BT[b, before[b] : length[b]]) for b in range(self.rows)]
            replies = env.step([text if goes_on else None for text, goes_on in zip(spoken, going, strict=True)])
            for b in np.flatnonzero(going):
                reply = replies[b]
                totals[b].setdefault("plan_worth", float(planned.worth_B[b]))
                totals[b]["plan_tokens"] = totals[b].get("plan_tokens", 0) + int(planned.tokens_B[b])
                dialogue.reward_BU[b, turn] = reply.signal(self.signal)
                for name, x in reply.reward.items():
                    totals[b][name] = totals[b].get(name, 0.0) + x
                tokens = [*self.tokenizer.encode(reply.text), ENDING[reply.ended]]
                fits = length[b] + len(tokens) <= self.cfg.tokens
                tokens = tokens[: self.cfg.tokens - length[b]]
                dialogue.token_BT[b, length[b] : length[b] + len(tokens)] = tokens
                ended[b] = fits and reply.ended in ("end", "leave")
                going[b] = fits and not reply.ended
            dialogue = pr.attributed_on_host(self.protocol, dialogue)
            if not going.any():
                break
        return dialogue.replace(ended_B=ended, cut_B=~ended), totals
