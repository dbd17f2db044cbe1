"""What all builders share: the stored features, and helpers that read raw files with errors that name the place."""

import abc
import contextlib
import json
import lzma
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mbrl_lm.data.records import ENDINGS, ROLES, DataError, Record, Turn


def features() -> tfds.features.FeaturesDict:
    """The stored form of a `Record`, the same for every data set. Rewards are kept in float32."""
    return tfds.features.FeaturesDict(
        {
            "turns": tfds.features.Sequence(
                {
                    "role": tfds.features.ClassLabel(names=ROLES),
                    "text": tfds.features.Text(),
                    "reward": np.float32,
                }
            ),
            "context": tfds.features.Text(),
            "numbers": tfds.features.Sequence(np.int32),
            "partner_numbers": tfds.features.Sequence(np.int32),
            "has_outcome": np.bool_,
            "outcome": tfds.features.Sequence(np.int32),
            "ended": tfds.features.ClassLabel(names=ENDINGS),
            "reward": np.float32,
            "scenario": tfds.features.Text(),
        }
    )


def to_example(record: Record) -> dict[str, Any]:
    return {
        "turns": {
            "role": [turn.role for turn in record.turns],
            "text": [turn.text for turn in record.turns],
            "reward": [turn.reward for turn in record.turns],
        },
        "context": record.context,
        "numbers": record.numbers,
        "partner_numbers": record.partner_numbers,
        "has_outcome": record.outcome is not None,
        "outcome": record.outcome or (),
        "ended": record.ended,
        "reward": record.reward,
        "scenario": record.scenario,
    }


def from_example(example: dict[str, Any]) -> Record:
    said = example["turns"]
    columns = zip(said["role"], said["text"], said["reward"], strict=True)
    return Record(
        turns=tuple(Turn(ROLES[role], text.decode(), float(reward)) for role, text, reward in columns),
        context=example["context"].decode(),
        numbers=tuple(map(int, example["numbers"])),
        partner_numbers=tuple(map(int, example["partner_numbers"])),
        outcome=tuple(map(int, example["outcome"])) if example["has_outcome"] else None,
        ended=ENDINGS[example["ended"]],
        reward=float(example["reward"]),
        scenario=example["scenario"].decode(),
    )


class DialogueBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder over local raw files. A data set is a subclass with `raw_files` and `read`.

    Change VERSION whenever `read` gives other records from the same files.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Where TFDS would look for checksums of downloads. There are none, and its own search needs a package that it does not
    # declare (importlib_resources).
    code_path = None

    def __init__(self, *, raw_dir: pathlib.Path, **kwargs):
        self.raw_dir = pathlib.Path(raw_dir)
        super().__init__(file_format="array_record", **kwargs)

    @classmethod
    @abc.abstractmethod
    def raw_files(cls, raw_dir: pathlib.Path) -> list[pathlib.Path]:
        """The files that are read, sorted. Raises DataError if one is missing."""

    @classmethod
    @abc.abstractmethod
    def read(cls, raw_dir: pathlib.Path) -> dict[str, list[Record]]:
        """Split -> its records in a fixed order. Raises DataError on malformed data."""

    def _info(self) -> tfds.core.DatasetInfo:
        # In the files' order: rows can be traced back, and shuffling is done where the batches are made.
        return tfds.core.DatasetInfo(builder=self, features=features(), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        splits = self.read(self.raw_dir)
        for split, records in splits.items():
            if not records:
                raise DataError(f"{self.raw_dir}: the split {split!r} holds no dialogue: complete its files or remove them")
        return {split: self._generate_examples(records) for split, records in splits.items()}

    def _generate_examples(self, records):
        yield from enumerate(map(to_example, records))


def present(raw_dir: pathlib.Path, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[pathlib.Path]:
    """The files of `raw_dir` that match glob patterns: each needed one must match, an optional one may."""
    also = f", and if you have them {', '.join(optional)}" if optional else ""
    expected = f"expected there: {', '.join(needed)}{also}. Set config.data_dir to the directory that holds them."
    if not raw_dir.is_dir():
        raise DataError(f"{raw_dir} is not a directory; {expected}")
    found = {pattern: sorted(raw_dir.glob(pattern)) for pattern in (*needed, *optional)}
    missing = [pattern for pattern in needed if not found[pattern]]
    if missing:
        raise DataError(f"{raw_dir} has no {', '.join(missing)}; {expected}")
    return [path for paths in found.values() for path in paths]


@contextlib.contextmanager
def place(path: pathlib.Path, where: str, advice: str) -> Iterator[None]:
    """Turns what goes wrong inside into a DataError that names the file, the place in it and what to do."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}, {where}: {what}. {advice}") from error


def answered(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """A recording in which the assistant has the last word: that the user says nothing more is what ends it."""
    return (*turns, Turn("user", "")) if turns and turns[-1].role == "assistant" else turns


def text(value: Any) -> str:
    """The value, if it is text that can be stored."""
    if not isinstance(value, str):
        raise DataError(f"{value!r} is not text")
    value.encode("utf-8")  # fails on half of a surrogate pair
    return value


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without white space at its ends) of the lines that are not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            with place(path, f"line {number}", "The file must be UTF-8 text."):
                stripped = line.decode("utf-8").strip()
            if stripped:
                yield number, stripped


def read_json(path: pathlib.Path) -> Any:
    """The one JSON value in a `.json`, `.json.xz` or `.json.zip` file."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".json")]
                if len(names) != 1:
                    raise DataError(f"it holds {len(names)} .json files, not one")
                content = archive.read(names[0])
        else:
            content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return json.loads(content)
    except (ValueError, lzma.LZMAError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): fetch the file again") from error
