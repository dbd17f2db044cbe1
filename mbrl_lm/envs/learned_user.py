"""The learned user seen from the host: text in, text out, like the true one."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import config, goals, rollout
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

        def weigh(params, dialogue, from_B):
            if most:  # what it says now may tell what it wants, as what it has said did
                prompt = rollout.prefix(protocol, dialogue, from_B)
                whole_B, before_B = (goals.log_evidence(net, protocol, params, d, most) for d in (dialogue, prompt))
                return whole_B - before_B
            replied_BT = jnp.arange(cfg.tokens)[None] >= from_B[:, None]
            said_BT = replied_BT & (dialogue.author_BT == pr.USER)
            return -jnp.sum(jnp.where(said_BT, score(net, protocol, params, dialogue).nll_BT, 0.0), axis=1)

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
        """log q(turn | prompt) in nats, the token that closes it included; both are tokens."""
        whole = self._dialogue([[*prompt, *turn] for prompt, turn in zip(prompts, turns, strict=True)], range(len(turns)))
        from_B, parts = np.array([len(prompt) for prompt in prompts], np.int32), []
        for start, (part, mask) in zip(range(0, len(turns), self._rows), chunks(whole, self._rows), strict=True):
            index = np.minimum(np.arange(start, start + self._rows), len(turns) - 1)
            parts.append(np.asarray(self._weigh(params, part, from_B[index]))[mask])
        return np.concatenate(parts).astype(np.float64)

    def leaves_room(self, prompt: Sequence[int]) -> bool:
        """Whether a whole turn of the user still fits behind a history."""
        return len(prompt) + self._cfg.turn_tokens <= self._cfg.tokens

    def _dialogue(self, rows: Sequence[list[int]], uids: Sequence[int]) -> Dialogue:
        dialogue = empty_dialogues(len(rows), self._cfg.tokens, self._cfg.turns)
        for b, row in enumerate(rows):
            if len(row) > self._cfg.tokens:
                raise config.ConfigError(f"a dialogue of {len(row)} tokens does not fit: raise --config.tokens")
            dialogue.token_BT[b, : len(row)] = row
        dialogue.uid_B[:] = np.asarray(uids, np.uint32)
        return pr.attributed_on_host(self._protocol, dialogue)
