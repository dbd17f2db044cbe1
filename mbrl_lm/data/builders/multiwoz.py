"""MultiWOZ 2.1 (Eric et al. 2019) in ConvLab form: a clerk helps a tourist to find and book places.

A file maps a dialogue's id to {goal, log: [{text, ...}]}; even entries of the log are the user's, odd ones the system's.
The goal is the user's secret and is not read.
"""

from mbrl_lm.data.builders import base
from mbrl_lm.data.records import ROLES, DataError, Record, Turn, hold_out

SPLITS = ("train", "val", "test")
HELD_OUT = 0.1  # of the dialogues of val.json.zip, when there is no training file


class MultiWoz(base.DialogueBuilder, skip_registration=True):
    """val.json.zip, and train.json.zip and test.json.zip if they are there.

    Without a training file, the val file is divided by a hash of the dialogue id: nine tenths become the split "train", the
    rest "val".
    """

    @classmethod
    def raw_files(cls, raw_dir):
        return base.present(raw_dir, ("val.json.zip",), ("train.json.zip", "test.json.zip"))

    @classmethod
    def read(cls, raw_dir):
        files = {path.name.split(".")[0]: path for path in cls.raw_files(raw_dir)}
        splits = {split: _records(files[split]) for split in SPLITS if split in files}
        if "train" not in splits:
            splits["train"], splits["val"] = hold_out(splits["val"], HELD_OUT)
        return splits


def _records(path) -> list[Record]:
    dialogues = base.read_json(path)
    if not isinstance(dialogues, dict) or not dialogues:
        raise DataError(f"{path} does not map dialogue ids to dialogues: give the ConvLab form of MultiWOZ 2.1")
    records = []
    for name, dialogue in dialogues.items():
        with base.place(path, f"dialogue {name}", "It must be {'log': [{'text': ...}, ...]}: give the ConvLab form."):
            turns = tuple(Turn(ROLES[1 - i % 2], base.text(entry["text"])) for i, entry in enumerate(dialogue["log"]))
            records.append(Record(base.answered(turns), scenario=name))
    return records
