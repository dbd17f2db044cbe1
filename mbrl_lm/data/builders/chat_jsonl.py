"""Chats in the project's own form, one JSON object a line: what an environment logs, and the way in for other data.

    {"turns": [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "hello", "reward": 0.5}],
     "reward": 1, "context": "", "ended": "end", "scenario": ""}

Only `turns` is required; the fields mean what they mean in `Record`.
"""

import json
import numbers

from mbrl_lm.data.builders import base
from mbrl_lm.data.records import DataError, Record, Turn, hold_out

HELD_OUT = 0.05  # of train.jsonl, when there is no val.jsonl
ADVICE = (
    'A line is one JSON object {"turns": [{"role": "assistant" or "user", "text", "reward"?}], "reward"?, "context"?, '
    '"ended"?: "end", "leave" or "cut", "scenario"?}: correct or remove the line.'
)


class ChatJsonl(base.DialogueBuilder, skip_registration=True):
    """train.jsonl, and val.jsonl if it is there; else a twentieth of train.jsonl, by a hash of the scenario."""

    @classmethod
    def raw_files(cls, raw_dir):
        return base.present(raw_dir, ("train.jsonl",), ("val.jsonl",))

    @classmethod
    def read(cls, raw_dir):
        splits = {path.stem: _records(path) for path in cls.raw_files(raw_dir)}
        if "val" not in splits:
            splits["train"], splits["val"] = hold_out(splits["train"], HELD_OUT)
        scenarios = [{record.scenario for record in records if record.scenario} for records in splits.values()]
        both = sorted(set.intersection(*scenarios))
        if both:
            raise DataError(f"{raw_dir}: the scenario {both[0]!r} is in train.jsonl and in val.jsonl: move it to one side")
        return splits


def _records(path) -> list[Record]:
    records = []
    for number, line in base.read_lines(path):
        with base.place(path, f"line {number}", ADVICE):
            records.append(_record(json.loads(line)))
    if not records:
        raise DataError(f"{path} holds no dialogue. {ADVICE}")
    return records


def _record(fields: dict) -> Record:
    _known(fields, ("turns", "reward", "context", "ended", "scenario"))
    return Record(
        turns=tuple(_turn(turn) for turn in fields["turns"]),
        context=base.text(fields.get("context", "")),
        ended=fields.get("ended", "end"),
        reward=_reward(fields.get("reward", 0.0)),
        scenario=base.text(fields.get("scenario", "")),
    )


def _turn(fields: dict) -> Turn:
    _known(fields, ("role", "text", "reward"))
    return Turn(fields["role"], base.text(fields["text"]), _reward(fields.get("reward", 0.0)))


def _known(fields: dict, names: tuple[str, ...]) -> None:
    """A misspelt optional field would silently give its default."""
    if not isinstance(fields, dict):
        raise DataError(f"{fields!r} is not a JSON object")
    unknown = set(fields) - set(names)
    if unknown:
        raise DataError(f"the field {min(unknown)!r} is unknown; known are {', '.join(names)}")


def _reward(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DataError(f"the reward {value!r} is not a number")
    return float(value)
