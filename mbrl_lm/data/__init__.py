"""Recorded dialogues. To add a data set, write a builder and name it in DATASETS."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

from mbrl_lm.data import prepare
from mbrl_lm.data.builders import deal_or_no_deal
from mbrl_lm.data.builders.base import DialogueBuilder
from mbrl_lm.data.builders.chat_jsonl import ChatJsonl
from mbrl_lm.data.builders.deal_or_no_deal import DealOrNoDeal
from mbrl_lm.data.builders.multiwoz import MultiWoz
from mbrl_lm.data.builders.sgd import Sgd
from mbrl_lm.data.records import DataError, Record
from mbrl_lm.envs.concierge import renaming


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A source of dialogues.

    Attributes:
      builder: reads its raw files.
      kind: of the conversations, as `protocol.make_protocol` takes it.
      renamings: a dialogue -> the same under other names of things that the task does not tell apart, its own first: all of
        them, or some where there are too many.
      names: what the kinds of item are called that a negotiation is about, in each number a name for each kind.
      other_names: the same, of names that are used seldom.
    """

    builder: type[DialogueBuilder]
    kind: Literal["chat", "negotiation"]
    renamings: Callable[[Record], list[Record]] | None = None
    names: Sequence[Sequence[str]] = ()
    other_names: Sequence[Sequence[str]] = ()


DATASETS = {
    "concierge": Dataset(ChatJsonl, "chat", renaming.renamings),  # logs that the environment writes
    "deal_or_no_deal": Dataset(
        DealOrNoDeal, "negotiation", deal_or_no_deal.renamings, deal_or_no_deal.NAMES, deal_or_no_deal.OTHER_NAMES
    ),
    "multiwoz": Dataset(MultiWoz, "chat"),
    "sgd": Dataset(Sgd, "chat"),
    "chat_jsonl": Dataset(ChatJsonl, "chat"),  # any chats in the project's own form
}


def load(name: str, data_dir: str | pathlib.Path, cache_dir: str | pathlib.Path) -> dict[str, list[Record]]:
    """The records of a data set: split ("train", "val", and "test" where there is one) -> records in the files' order.

    Args:
      name: in DATASETS.
      data_dir: where the raw files are.
      cache_dir: where the prepared record files are kept; any directory that may grow by the size of the data.

    Raises:
      DataError: if the name is unknown, or raw files are missing or malformed.
    """
    if name not in DATASETS:
        raise DataError(f"the data set {name!r} is unknown: use one of {', '.join(DATASETS)}")
    return prepare.load(DATASETS[name].builder, data_dir, cache_dir)
