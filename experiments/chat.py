"""A person talks with the assistant of a trained run, and plays its user.

    python -m experiments.chat --workdir=W [--config.eval.temperature=0.5]

What is typed is said; a line that begins with / is a command, and /help lists them. Input may be piped in. Dialogues in
which an answer of the assistant was answered are appended to W/conversations/train.jsonl, and are data like any other:

    python -m experiments.dream --workdir=W2 --config.data=chat_jsonl --config.data_dir=W/conversations
"""

import contextlib
import dataclasses
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import jax

from mbrl_lm import app, config, conversation, trained
from mbrl_lm.conversation import Speaker
from mbrl_lm.data import DATASETS
from mbrl_lm.data.corpus import Corpus
from mbrl_lm.envs.concierge import TEST_UIDS, Concierge

CHAT_UIDS = TEST_UIDS[200_000_000:]  # whose catalogues a person is shown: nobody is judged or trained with them
HELP = {
    "/imagine": "what the model imagines that you would say next: samples with their log-probabilities",
    "/value": "what the model expected when it answered your last turn, and the reward that it reads off that turn",
    "/end": "you are satisfied and end the dialogue; `/end thank you , bye` says so with these words",
    "/leave": "you walk away; words may follow, too",
    "/new": "another dialogue, with another context",
    "/help": "this list",
    "/quit": "stop; the end of the input and Ctrl-C do so, too",
}
BEST = 10  # a rating; it becomes a reward of 1
HOW_ENDED = {"": "", "end": " (and ends, satisfied)", "leave": " (and leaves)", "cut": " ... (no room for more)"}


class Session:
    """One person at the terminal, from the first dialogue to the last.

    Args:
      speaker: the model's side.
      contexts: of the n-th dialogue of the run.
      key: of all that the model samples.
      path: of the jsonl file that finished dialogues are appended to.
      stream: what is typed, line by line; repeated on the screen if it is no terminal.
      say: shows a line.
    """

    def __init__(
        self, speaker: Speaker, contexts: Callable[[int], str], key, path: Path, stream: TextIO, say: Callable[[str], None]
    ):
        self._speaker, self._contexts, self._key, self._path = speaker, contexts, key, path
        self._stream, self._say = stream, say
        self._next = conversation.prepare(path)  # no context twice, as long as every dialogue is kept
        self._held: str | None = None  # a line that was read, but not heeded yet
        self._commands = {"/imagine": self._imagine, "/value": self._value, "/new": self._new, "/help": self._help}

    def run(self) -> None:
        """Talks until /quit, the end of the input or Ctrl-C; what was said is kept whatever ends it."""
        self._begin()
        try:
            while (line := self._read()) is not None and line != "/quit":
                self._heed(line)
            self._cut(rated=line is not None)
        except KeyboardInterrupt:
            self._say("\ninterrupted")
        finally:
            self._cut(rated=False)

    def _read(self) -> str | None:
        """The next line, None at the end of the input."""
        if self._held is not None:
            line, self._held = self._held, None
            return line
        line = self._stream.readline()
        if line and not self._stream.isatty():
            self._say(f"> {line.strip()}")
        return line.strip() if line else None

    def _heed(self, line: str) -> None:
        """Says a line, or carries it out if it is a command."""
        name, _, words = line.partition(" ")
        closes = name in ("/end", "/leave")
        if line.startswith("/") and not closes and line not in self._commands:
            self._say(f"{line} is no command, and was not said; /help lists the commands")
        elif self._now.ended and name not in ("", "/value", "/new", "/help"):
            self._say("this dialogue is over: /new begins another one, /quit stops")
        elif closes:
            self._hear(words, name[1:])
        elif line in self._commands:
            self._commands[line]()
        elif line:
            self._hear(line)

    # ---- a dialogue ----

    def _begin(self) -> None:
        self._now = self._speaker.open(self._contexts(self._next))
        self._dialogue_key, self._asked = jax.random.fold_in(self._key, self._next), 0
        self._next += 1
        self._say(f"\n--- dialogue {self._next} ---")
        if self._now.context:
            self._say("\n  ".join(["the assistant knows:", *self._now.context.split(" ; ")]))
        self._say("you are its user: what do you say?")

    def _new(self) -> None:
        self._cut(rated=True)
        self._begin()

    def _hear(self, typed: str, ended: str = "") -> None:
        """The person's turn, and what the assistant answers."""
        text = self._speaker.spell(typed)
        length, room = self._speaker.length(text), self._speaker.room(self._now)
        if length > room:
            return self._say(f"not said: it has {length} tokens, and there is room for {room}; say it shorter, or /end")
        if unknown := self._speaker.unknown(text):
            self._say(f"the model does not know: {' '.join(unknown)}")
        self._now = self._speaker.hear(self._now, text, ended)
        if not ended:
            heard = len(self._now.turns)
            self._now = self._speaker.answer(self._now, jax.random.fold_in(self._dialogue_key, 0))
            for turn in self._now.turns[heard:]:
                self._say(f"assistant: {turn.text or '(nothing)'}")
        if self._now.ended == "cut":
            most = f"{self._speaker.tokens} tokens and {self._speaker.turns} turns of the assistant"
            self._say(f"there is no room for another turn: a dialogue of this run has at most {most}; it is cut here")
        if self._now.ended:
            self._finish(rated=True)
            self._say("/new begins another dialogue, /quit stops")

    def _cut(self, rated: bool) -> None:
        """Ends a dialogue that goes on."""
        if not self._now.ended:
            self._now = dataclasses.replace(self._now, ended="cut")
            self._finish(rated)

    def _finish(self, rated: bool) -> None:
        """Keeps a dialogue that has ended, with a rating if the person is asked for one and gives it."""
        if conversation.recorded(self._now) is None:
            if self._now.turns:
                self._say("not kept: you answered no turn of the assistant")
            return
        reward = None
        try:
            reward = self._rating() if rated else None
        finally:  # Ctrl-C in place of a rating skips it
            conversation.append(self._path, conversation.recorded(self._now, reward))
            self._say(f"kept in {self._path}")

    def _rating(self) -> float | None:
        self._say(f"how good was this dialogue, from 0 to {BEST}? return skips")
        while line := self._read():
            if line.startswith("/"):
                self._held = line
                return None
            with contextlib.suppress(ValueError):
                if 0 <= float(line) <= BEST:
                    return float(line) / BEST
            self._say(f"{line} is no rating: give a number from 0 to {BEST}; return skips")
        return None

    # ---- on request: nothing of it is said ----

    def _imagine(self) -> None:
        self._asked += 1
        for turn in self._speaker.imagine(self._now, jax.random.fold_in(self._dialogue_key, self._asked)):
            figures = f"log-probability {turn.log_prob:.2f}, {math.exp(turn.log_prob / turn.tokens):.2f} a token"
            self._say(f"  you, imagined: {turn.text or '(nothing)'}{HOW_ENDED[turn.ended]}  [{figures}]")

    def _value(self) -> None:
        reading = self._speaker.read(self._now)
        if reading is None:
            return self._say("you have not spoken yet: the value is read where the assistant is about to answer")
        self._say(f"value, the return that it expected when it was to answer: {reading.value:+.3f}")
        if reading.reward is None:
            self._say("reward: your opening answers nothing, so none is read off it")
        else:
            self._say(f"reward that it reads off your last turn: {reading.reward:+.3f}")

    def _help(self) -> None:
        for command, text in HELP.items():
            self._say(f"  {command:10}{text}")


def contexts(cfg: config.Config, corpus: Corpus) -> Callable[[int], str]:
    """What the assistant knows in the n-th dialogue: a catalogue of `concierge`, else the context of a held-out dialogue."""
    if cfg.data == "concierge":
        return lambda n: Concierge(cfg.seed, [CHAT_UIDS[n]], "train", cfg.noise, cfg.places).contexts[0]
    return lambda n: corpus.val_records[n % len(corpus.val_records)].context


def main(run: app.Run):
    cfg = run.config
    if DATASETS[cfg.data].kind != "chat":
        raise config.ConfigError(
            f"{run.workdir} holds a run on {cfg.data}, a negotiation in which each side has a view of its own: give the "
            "--workdir of a run on chats, such as concierge"
        )
    app.say("loading the model")
    model = trained.load(run.config, run.workdir)
    protocol, tokenizer = model.corpus.protocol, model.corpus.tokenizer
    speaker = Speaker(cfg, model.net, protocol, tokenizer, model.mesh, model.state.params, model.planned_user(cfg))
    path = run.workdir / "conversations" / "train.jsonl"
    sys.stdin.reconfigure(errors="replace")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a closed terminal is Ctrl-C, too
        signal.signal(number, signal.default_int_handler)
    app.say(f"this is update {model.step} of {run.workdir}; /help lists the commands. The first answer takes some seconds.")
    Session(speaker, contexts(cfg, model.corpus), jax.random.key(cfg.seed), path, sys.stdin, app.say).run()


if __name__ == "__main__":
    app.run(main, of_run=True)
