"""Chats in JSON lines, the cache, the split of scenarios, and the recorded human data where it is at hand."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from mbrl_lm import data
from mbrl_lm.data import prepare
from mbrl_lm.data.builders import deal_or_no_deal
from mbrl_lm.data.builders.base import DialogueBuilder
from mbrl_lm.data.records import DataError, Record, Turn, hold_out, normalise

RAW = pathlib.Path(os.environ.get("MBRL_LM_DATA", "/nonexistent"))
CHAT = {"turns": [{"role": "user", "text": "Olá 日本 🙂"}, {"role": "assistant", "text": "ok", "reward": 0.5}]}


def write(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def chat(i, **fields):
    return {"turns": [{"role": "user", "text": f"text {i}"}, {"role": "assistant", "text": "ok"}], **fields}


@pytest.fixture
def raw_dir(tmp_path):
    write(tmp_path / "raw" / "train.jsonl", CHAT, chat(1, reward=2, context="c", ended="leave", scenario="s"))
    write(tmp_path / "raw" / "val.jsonl", chat(2))
    return tmp_path / "raw"


def test_chat_jsonl(raw_dir, tmp_path, capfd):
    splits = data.load("chat_jsonl", raw_dir, tmp_path / "cache")
    turns = (Turn("user", "text 1"), Turn("assistant", "ok"))
    assert splits["train"] == [
        Record((Turn("user", "Olá 日本 🙂"), Turn("assistant", "ok", 0.5))),
        Record(turns, context="c", ended="leave", reward=2.0, scenario="s"),
    ]
    assert [record.turns[0].text for record in splits["val"]] == ["text 2"]
    assert capfd.readouterr() == ("", "")  # TFDS is silent


def test_the_stored_form_keeps_every_field(tmp_path):
    records = [
        Record((Turn("user", ""),), numbers=(7,), partner_numbers=(0, 10), outcome=()),
        Record((Turn("assistant", "a", -1.5), Turn("user", "b", 2.0)), "c", (), (), (1, 0, 3), "end", 4.0, "s"),
        Record((Turn("assistant", "a"),), ended="cut"),
    ]

    class Fixed(DialogueBuilder, skip_registration=True):
        raw_files = classmethod(lambda cls, raw_dir: [])
        read = classmethod(lambda cls, raw_dir: {"train": records})

    assert prepare.load(Fixed, tmp_path, tmp_path / "cache") == {"train": records}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "Expecting"),
        ("[]", "not a JSON object"),
        ("{}", "no field 'turns'"),
        ('{"turns": []}', "at least one turn"),
        ('{"turns": 3}', "not iterable"),
        ('{"turns": [{"role": "system", "text": ""}]}', "role 'system'"),
        ('{"turns": [{"role": "user", "text": 3}]}', "3 is not text"),
        ('{"turns": [{"role": "user", "text": "\\ud800"}]}', "surrogates not allowed"),
        ('{"turns": [{"role": "user", "text": "", "reward": 1}]}', "no assistant turn before"),
        ('{"turns": [{"role": "user", "text": ""}], "reward": 1}', "no assistant turn before"),
        ('{"turns": [{"role": "assistant", "text": ""}], "reward": "1"}', "'1' is not a number"),
        ('{"turns": [{"role": "assistant", "text": ""}], "reward": NaN}', "not finite"),
        ('{"turns": [{"role": "assistant", "text": ""}], "rewards": 1}', "'rewards' is unknown"),
        ('{"turns": [{"role": "assistant", "text": ""}], "ended": "left"}', "ended 'left'"),
    ],
)
def test_a_malformed_chat_names_file_and_line(raw_dir, tmp_path, line, what):
    with (raw_dir / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=f"train.jsonl, line 3: .*{what}.*correct or remove the line"):
        data.load("chat_jsonl", raw_dir, tmp_path / "cache")


def test_a_scenario_stays_on_one_side(raw_dir, tmp_path):
    write(raw_dir / "val.jsonl", chat(2, scenario="s"))
    with pytest.raises(DataError, match="'s' is in train.jsonl and in val.jsonl"):
        data.load("chat_jsonl", raw_dir, tmp_path / "cache")


def test_hold_out():
    records = [Record((Turn("user", str(i)),), scenario=f"s{i // 3}") for i in range(600)]
    train, val = hold_out(records, 0.05)
    assert not {record.scenario for record in train} & {record.scenario for record in val}
    assert len(train) + len(val) == 600 and 10 <= len(val) <= 60
    assert hold_out(list(reversed(records)), 0.05)[1] == val[::-1]
    assert set(hold_out(records[:300], 0.05)[1]) <= set(val)  # a scenario's side does not depend on the others
    assert len(hold_out(records[:6], 0.0001)[1]) == 3  # never empty
    same = [Record((Turn("user", "again"),))] * 2 + [Record((Turn("user", "other"),))]
    assert {len(set(side)) for side in hold_out(same, 0.01)} == {1}
    with pytest.raises(DataError, match="one scenario"):
        hold_out(records[:3], 0.05)


def test_the_cache_follows_the_content_of_the_raw_files(raw_dir, tmp_path, monkeypatch):
    first = data.load("concierge", raw_dir, tmp_path / "cache")
    prepared = []
    monkeypatch.setattr(prepare, "_prepare", lambda *args, original=prepare._prepare: (prepared.append(1), original(*args)))
    assert data.load("concierge", raw_dir, tmp_path / "cache") == first and not prepared
    size = (raw_dir / "val.jsonl").stat().st_size
    write(raw_dir / "val.jsonl", chat(3))
    assert (raw_dir / "val.jsonl").stat().st_size == size  # the same name and size
    assert data.load("concierge", raw_dir, tmp_path / "cache")["val"][0].turns[0].text == "text 3" and prepared


def test_an_interrupted_preparation_poisons_nothing(raw_dir, tmp_path, monkeypatch):
    def interrupted(self, **kwargs):
        directory = pathlib.Path(self.data_dir)
        directory.mkdir(parents=True)
        (directory / "dataset_info.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DialogueBuilder, "download_and_prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.load("chat_jsonl", raw_dir, tmp_path / "cache")
        patch.setattr(prepare.shutil, "rmtree", lambda *args, **kwargs: None)  # a kill leaves the directory behind
        with pytest.raises(KeyboardInterrupt):
            data.load("chat_jsonl", raw_dir, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "chat_jsonl").iterdir())) == 1
    assert len(data.load("chat_jsonl", raw_dir, tmp_path / "cache")["train"]) == 2


def test_a_faster_process_wins(raw_dir, tmp_path, monkeypatch):
    rename = os.rename

    def taken(source, target):
        rename(source, target)
        if ".unfinished-" not in str(target):  # not the renaming inside TFDS
            raise OSError("Directory not empty")

    monkeypatch.setattr(prepare.os, "rename", taken)
    assert len(data.load("chat_jsonl", raw_dir, tmp_path / "cache")["train"]) == 2


def test_unknown_data_set():
    with pytest.raises(DataError, match="use one of concierge, deal_or_no_deal"):
        data.load("wizard", "", "")


def test_normalise():
    assert normalise("Don't go, it's 10:45!  (£3.50 each)") == "don't go , it's 10:45 ! ( £ 3.50 each )"


def test_neither_tensorflow_nor_torch_is_imported(raw_dir, tmp_path):
    code = (
        "import sys; from mbrl_lm import data; from mbrl_lm.data import encode; "
        f"data.load('chat_jsonl', {str(raw_dir)!r}, {str(tmp_path / 'cache')!r}); "
        "sys.exit(any(name in sys.modules for name in ('tensorflow', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deal_or_no_deal", {"train": 10_095, "val": 1_087}),
        ("multiwoz", {"train": 904, "val": 95, "test": 1_000}),
        ("sgd", {"train": 5_275, "val": 2_098}),
    ],
)
def test_recorded_data(tmp_path, name, sizes):
    if not (RAW / name).is_dir():
        pytest.skip(f"{RAW / name} is absent: set MBRL_LM_DATA to the directory that holds {name}")
    splits = data.load(name, RAW / name, tmp_path)
    assert {split: len(records) for split, records in splits.items() if split in sizes} == sizes
    scenarios = {split: {record.scenario for record in records} for split, records in splits.items()}
    assert not scenarios["train"] & scenarios["val"]
    if name == "deal_or_no_deal":
        assert (len(scenarios["train"]), len(scenarios["val"])) == (1_884, 200)
        assert collections.Counter(record.outcome == () for record in splits["train"]) == {False: 7_882, True: 2_213}
        pairs = deal_or_no_deal.selfplay_contexts(RAW / name)
        assert len(pairs) == 4_086
        assert all(record.reward == 0 or record.outcome for record in splits["train"])
