"""Playing scripted assistants against the user, and the logs that learning starts from."""

import math
from collections.abc import Iterator, Sequence

from mbrl_lm.envs.concierge.assistants import Mixture, briefs
from mbrl_lm.envs.concierge.env import LOG_UIDS, Concierge
from mbrl_lm.envs.concierge.world import PLACES

_CHUNK = 256


def converse(assistant, env: Concierge, seed: int = 0, signal: str = "return") -> list[dict]:
    """Plays every dialogue of `env` to its end.

    Args:
      assistant: anything with `act(brief, history) -> text`.
      seed: of the assistant's own luck.
      signal: what a record gives as a turn's reward, see `Reply.signal`.

    Returns:
      chat_jsonl records: context, turns (role, text, and on the assistant's the reward), ended, scenario.
    """
    notes = briefs(env, seed)
    histories: list[list[tuple[str, str]]] = [[("user", text)] for text in env.openings]
    records = [
        {"context": context, "turns": [{"role": "user", "text": text}], "ended": "", "scenario": str(row.uid)}
        for context, text, row in zip(env.contexts, env.openings, env.rows, strict=True)
    ]
    while not all(record["ended"] for record in records):
        for brief, row in zip(notes, env.rows, strict=True):
            brief.goal = row.state.goal  # a changer's may be another by now
        texts = [
            None if record["ended"] else assistant.act(brief, history)
            for record, brief, history in zip(records, notes, histories, strict=True)
        ]
        for text, reply, record, history in zip(texts, env.step(texts), records, histories, strict=True):
            if reply is None:
                continue
            history += [("assistant", text), ("user", reply.text)]
            record["turns"] += [
                {"role": "assistant", "text": text, "reward": round(reply.signal(signal), 6)},
                {"role": "user", "text": reply.text},
            ]
            record["ended"] = reply.ended
    return records


def play(assistant, env: Concierge, seed: int = 0) -> list[dict]:
    """The outcomes of all dialogues of `env` when `assistant` serves them: see `Concierge.outcome`."""
    converse(assistant, env, seed)
    return [env.outcome(i) for i in range(len(env.rows))]


def logs(seed: int, n: int, noise: float = 0.0, signal: str = "return", places: tuple[int, int] = PLACES) -> Iterator[dict]:
    """`n` chat_jsonl records of the behaviour mixture with users of the training types, over the first `n` of LOG_UIDS.

    A record depends on (seed, its uid, noise, signal, places) only, so that more logs begin with the same ones.
    """
    for start in range(0, n, _CHUNK):
        uids = LOG_UIDS[start : min(start + _CHUNK, n)]
        yield from converse(Mixture(), Concierge(seed, uids, "train", noise, places), seed, signal)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % normal interval (low, high)."""
    n = len(values)
    mean = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)
    return mean, mean - half, mean + half
