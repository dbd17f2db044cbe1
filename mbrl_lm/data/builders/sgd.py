"""Schema-Guided Dialogue (Rastogi et al. 2020): a virtual assistant and a user, over many services.

A file is a list of {dialogue_id, turns: [{speaker: USER | SYSTEM, utterance, ...}]}.
"""

from mbrl_lm.data.builders import base
from mbrl_lm.data.records import DataError, Record, Turn

ROLE = {"USER": "user", "SYSTEM": "assistant"}
SPLIT = {"train": "train", "dev": "val", "test": "test"}  # directory -> split


class Sgd(base.DialogueBuilder, skip_registration=True):
    """The directories train and dev, and test if it is there, of dialogues_*.json files, plain or compressed by xz."""

    @classmethod
    def raw_files(cls, raw_dir):
        return base.present(raw_dir, ("train/dialogues_*.json*", "dev/dialogues_*.json*"), ("test/dialogues_*.json*",))

    @classmethod
    def read(cls, raw_dir):
        splits = {}
        for path in cls.raw_files(raw_dir):
            split = SPLIT[path.parent.name]
            splits.setdefault(split, []).extend(_records(path, split))
        return splits


def _records(path, split) -> list[Record]:
    dialogues = base.read_json(path)
    if not isinstance(dialogues, list):
        raise DataError(f"{path} is not a list of dialogues: give a dialogues_*.json file of the data set")
    records = []
    for i, dialogue in enumerate(dialogues):
        advice = "It must be {'dialogue_id', 'turns': [{'speaker': 'USER' or 'SYSTEM', 'utterance'}]}: fetch the file again."
        with base.place(path, f"dialogue {i}", advice):
            turns = tuple(Turn(ROLE[turn["speaker"]], base.text(turn["utterance"])) for turn in dialogue["turns"])
            scenario = f"{split} {base.text(dialogue['dialogue_id'])}"  # the splits count from the same numbers
            records.append(Record(base.answered(turns), scenario=scenario))
    return records
