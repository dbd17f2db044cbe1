"""A person in the user's place: typed text becomes turns, the model answers, and what was said becomes data again.

Typed text is data. Only `Speaker` puts role and end tokens between turns, and no text encodes to one of them.
"""

import dataclasses
import errno
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from mbrl_lm import config, value
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import lengths
from mbrl_lm.data.records import Turn, normalise
from mbrl_lm.envs.learned_user import ENDED, HAND_OVER
from mbrl_lm.envs.true_user import ENDING
from mbrl_lm.nn import Net
from mbrl_lm.planner import make_planner
from mbrl_lm.replay import empty_dialogues
from mbrl_lm.sharding import pjit
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.types import Array, Dialogue, Params

SAMPLES = 3  # of the user's next turn, imagined at once


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What was said so far; the user speaks first.

    Attributes:
      context: as the person sees it; the model reads as much of it as `data.encode` keeps.
      tokens: the same dialogue as the model reads it, up to the last hand-over or the end.
      turns: of both sides, in turn.
      ended: "" while it goes on; else "end", "leave" or "cut", as in `Record`.
    """

    context: str
    tokens: tuple[int, ...]
    turns: tuple[Turn, ...] = ()
    ended: str = ""


class Imagined(NamedTuple):
    """A user turn as the model imagines it."""

    text: str
    ended: str  # "" goes on, "end", "leave"; "cut": it ran out of tokens
    log_prob: float  # nats, of the whole turn under the sampling distribution, the token that closes it included
    tokens: int


class Reading(NamedTuple):
    """What the model thinks of a conversation, in the units of the run's rewards."""

    value: float  # of the point at which the assistant was about to speak last
    reward: float | None  # earned by the user's last turn; None where that one answers nothing


class Speaker:
    """The model's side of conversations, one at a time.

    Args:
      cfg: of the run; the assistant is sampled at `eval.temperature`, the imagined user at 1.
      net, protocol, tokenizer: of the model.
      mesh: the device mesh.
      params: of the model.
      imagined_user: parameters that speak for the user where `cfg.plan` looks ahead; None: those of the model.
    """

    def __init__(
        self,
        cfg: config.Config,
        net: Net,
        protocol: pr.Protocol,
        tokenizer: Tokenizer,
        mesh,
        params: Params,
        imagined_user: Params | None = None,
    ):
        self.tokens, self.turns = cfg.tokens, cfg.turns
        self._tokenizer, self._params = tokenizer, params
        temperature_R = pr.temperatures(assistant=cfg.eval.temperature)
        centres_W = value.bin_centres(cfg.model.bins, cfg.model.bin_limit)

        def writer(cfg):
            plan = make_planner(cfg, net, protocol)

            def write(params, dialogue, key):
                prompt = pr.attributed(protocol, dialogue)
                return plan(params, prompt, key, temperature_R, imagined_user).dialogue

            return pjit(write, mesh)

        def read(params, token_BT):
            heads = net.heads(params, net.trunk(params, token_BT))
            return value.mean(heads.value_BTEW, centres_W).mean(axis=-1), value.mean(heads.reward_BTW, centres_W)

        # One shape for both sides: what is compiled for the first answer imagines the user, too.
        self._write, self._read = writer(dataclasses.replace(cfg, plan="none")), pjit(read, mesh)
        self._decide = self._write if cfg.plan == "none" else writer(cfg)

    def open(self, context: str) -> Conversation:
        """A conversation in which nothing was said yet."""
        row = [pr.BOS, *self._tokenizer.encode(context)][: self.tokens // 2]
        return Conversation(context, (*row, pr.TO_USER))

    def spell(self, typed: str) -> str:
        """Typed text in words of the vocabulary: a word that it does not hold as it is takes the form of `normalise`.

        Subword models know every word, and are given the text as it was typed.
        """
        words = typed.encode("utf-8", "replace").decode().split()
        return " ".join(word if self._knows(word) else normalise(word) for word in words)

    def unknown(self, text: str) -> list[str]:
        """The words of a text that the model reads as unknown, each once."""
        return [word for word in dict.fromkeys(text.split()) if not self._knows(word)]

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer.encode(text))

    def room(self, now: Conversation) -> int:
        """Tokens that the user's next turn may have, without the one that closes it."""
        return self.tokens - len(now.tokens) - 1

    def hear(self, now: Conversation, text: str, ended: str = "") -> Conversation:
        """The conversation with the user's next turn.

        Args:
          now: the floor is the user's.
          text: of the turn; may be empty.
          ended: "" gives the floor to the assistant, "end" or "leave" ends the conversation.

        Raises:
          ValueError: the conversation is over, or the turn does not fit into `room`.
        """
        words = self._tokenizer.encode(text)
        if now.ended or len(words) > self.room(now):
            raise ValueError(f"it has ended ({now.ended!r}), or its room of {self.room(now)} tokens is too small")
        tokens = (*now.tokens, *words, ENDING[ended])
        return Conversation(now.context, tokens, (*now.turns, Turn("user", text)), ended)

    def answer(self, now: Conversation, key: Array) -> Conversation:
        """The conversation with the assistant's next turn; cut where that one has no room, or leaves none for the user's.

        Args:
          now: the floor is the assistant's.
          key: of a conversation; its turns draw by their places in it.
        """
        if sum(turn.role == "assistant" for turn in now.turns) >= self.turns:
            return dataclasses.replace(now, ended="cut")
        said = self._continue(now, key, 1, self._decide)[0][0]
        if said[-1:] != [HAND_OVER["assistant"]]:  # it ran out of tokens: never handed over, it is not said
            return dataclasses.replace(now, ended="cut")
        turns = (*now.turns, Turn("assistant", self._tokenizer.decode(said)))
        after = Conversation(now.context, (*now.tokens, *said), turns)
        return after if self.room(after) > 0 else dataclasses.replace(after, ended="cut")

    def imagine(self, now: Conversation, key: Array) -> list[Imagined]:
        """Samples of the user's next turn; nothing is said."""
        turns = []
        for said, log_prob in self._continue(now, key, SAMPLES, self._write):
            turns.append(Imagined(self._tokenizer.decode(said), ENDED.get(said[-1], "cut"), log_prob, len(said)))
        return turns

    def read(self, now: Conversation) -> Reading | None:
        """What the heads say of the user's last turn, and had said when the assistant answered; None if it never had to."""
        if pr.TO_ASSISTANT not in now.tokens:
            return None
        value_BT, reward_BT = jax.device_get(self._read(self._params, self._dialogue(now, rows=0).token_BT[:1]))
        opened = max(t for t, token in enumerate(now.tokens) if token == pr.TO_ASSISTANT)
        replied = max(t for t, token in enumerate(now.tokens) if token in ENDED)
        answers = sum(turn.role == "user" for turn in now.turns) > 1  # the opening is no reply
        return Reading(float(value_BT[0, opened]), float(reward_BT[0, replied]) if answers else None)

    def _continue(self, now: Conversation, key: Array, rows: int, write) -> list[tuple[list[int], float]]:
        """The next turn of whoever has the floor, in the first `rows` rows: its tokens and its log-probability."""
        written = jax.device_get(write(self._params, self._dialogue(now, rows), key))
        turns = [slice(len(now.tokens), end) for end in lengths(written)[:rows]]
        return [(written.token_BT[b, at].tolist(), float(written.logp_BT[b, at].sum())) for b, at in enumerate(turns)]

    def _dialogue(self, now: Conversation, rows: int) -> Dialogue:
        """The conversation in each row; those after the first `rows` are not continued."""
        dialogue = empty_dialogues(SAMPLES, self.tokens, self.turns)
        dialogue.token_BT[:, : len(now.tokens)] = now.tokens
        row_B = np.arange(SAMPLES)
        return dialogue.replace(ended_B=row_B >= rows, uid_B=row_B.astype(np.uint32))

    def _knows(self, word: str) -> bool:
        return not set(self._tokenizer.encode(word)) & set(self._tokenizer.unknown)


# ---- what is kept ----


def recorded(now: Conversation, reward: float | None = None) -> dict[str, Any] | None:
    """A conversation in the `chat_jsonl` form; None if no turn of the assistant was answered. One that goes on is cut.

    A last turn of the assistant that nobody answered is left out: it is no whole transition, and a reward that fell on it
    would teach nothing.

    Args:
      now: the conversation.
      reward: of the whole of it.
    """
    turns = now.turns[:-1] if now.turns and now.turns[-1].role == "assistant" else now.turns
    if not any(turn.role == "assistant" for turn in turns):
        return None
    said = [{"role": turn.role, "text": turn.text} for turn in turns]
    fields = {"context": now.context, "turns": said, "ended": now.ended or "cut"}
    return fields if reward is None else fields | {"reward": reward}


def prepare(path: pathlib.Path) -> int:
    """Makes sure that lines can be appended to a file; returns how many it has.

    Raises:
      ConfigError: they cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "it is not writable")
        return path.read_bytes().count(b"\n") if path.exists() else 0
    except OSError as error:
        raise config.ConfigError(f"{path} cannot be used ({error.strerror}): make it and its directory writable") from error


def append(path: pathlib.Path, fields: dict[str, Any]) -> None:
    """Appends one whole line that is on the disk when this returns; half a line before it stays a line of its own."""
    text = json.dumps(fields).encode() + b"\n"
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        text = b"\n" + text
    with open(path, "ab") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
