"""The learned user seen from the host: text in, text out, like the true one."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import config, goals
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import chunks, lengths
from mbrl_lm.envs.true_user import ENDING
from mbrl_lm.nn import Net
from mbrl_lm.replay import empty_dialogues
from mbrl_lm.scoring import score
from mbrl_lm.sharding import pjit
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.types import Array, Dialogue, Params

Spoken = Sequence[tuple[str, str]]  # (role, text)
HAND_OVER = {"assistant": pr.TO_USER, "user": pr.TO_ASSISTANT}
ENDED = {pr.TO_ASSISTANT: "", pr.STOP: "end", pr.LEAVE: "leave"}


class UserTurn(NamedTuple):
    text: str
    ended: str  # "" goes on, "end", "leave"; "cut": it ran out of tokens


class LearnedUser:
    """What a network says and thinks in the user's place; `rows` dialogues at a time.

    Args:
      cfg: the run's config.
      net, protocol, tokenizer: of the model.
      mesh: the device mesh.
      rows: dialogues at a time.
    """

    def __init__(self, cfg: config.Config, net: Net, protocol: pr.Protocol, tokenizer: Tokenizer, mesh, rows: int = 64):
        self._cfg, self._protocol, self._tokenizer, self._rows = cfg, protocol, tokenizer, rows
        most = cfg.world_model.goals

        def write(params, prompt, key):
            return goals.imagine(most, net, protocol, params, prompt, key, tokens=cfg.tokens, turns=1)

        def weigh(params, dialogue):
            if most:
                return goals.log_evidence(net, protocol, params, dialogue, most)
            nll_BT = score(net, protocol, params, dialogue).nll_BT
            return -jnp.sum(jnp.where(dialogue.author_BT == pr.USER, nll_BT, 0.0), axis=1)

        self._write, self._weigh = pjit(write, mesh), pjit(weigh, mesh)

    def prompt(self, context: str, spoken: Spoken) -> list[int]:
        """A history, the user's opening first, in which every turn was handed over."""
        return self.go_on([pr.BOS, *self._tokenizer.encode(context), pr.TO_USER], spoken)

    def go_on(self, prompt: Sequence[int], spoken: Spoken) -> list[int]:
        """A history with more turns."""
        row = list(prompt)
        for role, text in spoken:
            row += [*self._tokenizer.encode(text), HAND_OVER[role]]
        return row

    def turn_tokens(self, turn: UserTurn) -> list[int]:
        """A user turn with the token that closes it."""
        return [*self._tokenizer.encode(turn.text), ENDING[turn.ended]]

    def write(self, params: Params, prompts: Sequence[list[int]], uids: Sequence[int], key: Array) -> list[UserTurn]:
        """The user's next turn, sampled; prompts end in the token that hands the floor to the user."""
        turns = []
        for part, mask in chunks(self._dialogue(prompts, uids), self._rows):
            before_B = lengths(part)
            written = jax.device_get(self._write(params, part, key))
            for token_T, start, end in zip(written.token_BT[mask], before_B[mask], lengths(written)[mask], strict=True):
                ended = ENDED.get(int(token_T[end - 1]), "cut") if end > start else "cut"
                turns.append(UserTurn(self._tokenizer.decode(token_T[start:end]), ended))
        return turns

    def log_prob(self, params: Params, prompts: Sequence[list[int]], turns: Sequence[list[int]]) -> np.ndarray:
        """log q(turn | prompt) in nats, the token that closes it included; both are tokens.

        It is log q(prompt, turn) - log q(prompt): what is said now may tell what the user wants, as what it has said did.
        A prompt with many turns is read once.
        """
        whole_N = self._log_evidence(params, [[*prompt, *turn] for prompt, turn in zip(prompts, turns, strict=True)])
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        before_N = self._log_evidence(params, list(place))
        return whole_N - before_N[[place[tuple(prompt)] for prompt in prompts]]

    def leaves_room(self, prompt: Sequence[int]) -> bool:
        """Whether a whole turn of the user still fits behind a history."""
        return len(prompt) + self._cfg.turn_tokens <= self._cfg.tokens

    def _log_evidence(self, params: Params, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """f64 (N,): log q(all that the user says), nats."""
        parts = chunks(self._dialogue(rows, range(len(rows))), self._rows)
        return np.concatenate([np.asarray(self._weigh(params, part))[mask] for part, mask in parts]).astype(np.float64)

    def _dialogue(self, rows: Sequence[Sequence[int]], uids: Sequence[int]) -> Dialogue:
        dialogue = empty_dialogues(len(rows), self._cfg.tokens, self._cfg.turns)
        for b, row in enumerate(rows):
            if len(row) > self._cfg.tokens:
                raise config.ConfigError(f"a dialogue of {len(row)} tokens does not fit: raise --config.tokens")
            dialogue.token_BT[b, : len(row)] = row
        dialogue.uid_B[:] = np.asarray(uids, np.uint32)
        return pr.attributed_on_host(self._protocol, dialogue)
