"""Every builder on raw files that the tests write: what it reads, and what it says of malformed ones."""

import dataclasses
import json
import lzma
import zipfile

import pytest

from mbrl_lm import data
from mbrl_lm.data.builders import deal_or_no_deal
from mbrl_lm.data.builders.multiwoz import MultiWoz
from mbrl_lm.data.records import DataError, Record, Turn

DEAL = (
    "<input> 1 4 4 1 1 2 </input> <dialogue> THEM: 4 hats : ok ? <eos> YOU: deal <eos> THEM: <selection> </dialogue> "
    "<output> item0=1 item1=0 item2=1 item0=0 item1=4 item2=0 </output> <partner_input> 1 0 4 2 1 2 </partner_input>\n"
)
MIRRORED = (
    "<input> 1 0 4 2 1 2 </input> <dialogue> YOU: 4 hats : ok ? <eos> THEM: deal <eos> YOU: <selection> </dialogue> "
    "<output> item0=0 item1=4 item2=0 item0=1 item1=0 item2=1 </output> <partner_input> 1 4 4 1 1 2 </partner_input>\n"
)
SHARES = "item0=1 item1=0 item2=1 item0=0 item1=4 item2=0"


def write_deals(path, *lines):
    path.mkdir()
    (path / "train.txt").write_text("".join(lines))
    (path / "val.txt").write_text(DEAL)
    return path


def loaded(name, raw_dir, tmp_path):
    return data.load(name, raw_dir, tmp_path / "cache")


def test_deal_or_no_deal(tmp_path):
    broken_off = DEAL.replace(SHARES, " ".join(["<disconnect>"] * 6))
    splits = loaded("deal_or_no_deal", write_deals(tmp_path / "raw", DEAL, MIRRORED, broken_off), tmp_path)
    deal, mirrored, no_deal = splits["train"]
    assert deal == Record(
        turns=(Turn("user", "4 hats : ok ?"), Turn("assistant", "deal"), Turn("user", "")),
        numbers=(1, 4, 4, 1, 1, 2),
        partner_numbers=(1, 0, 4, 2, 1, 2),
        outcome=(1, 0, 1),
        reward=6.0,
        scenario="1 0 4 2 1 2 / 1 4 4 1 1 2",
    )
    assert (mirrored.outcome, mirrored.reward, mirrored.scenario) == ((0, 4, 0), 8.0, deal.scenario)
    assert (no_deal.outcome, no_deal.reward) == ((), 0.0)
    assert splits["val"] == [deal] and set(splits) == {"train", "val"}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("</dialogue>", "", "four parts"),
        ("YOU: deal", "deal", "'YOU:' or 'THEM:'"),
        ("THEM: <selection>", "THEM: bye", "not '<selection>'"),
        ("<input> 1 4", "<input> 4", "six numbers"),
        ("1 4 4 1 1 2", "1 11 4 1 1 2", "holds 11"),
        ("1 4 4 1 1 2", "1 x 4 1 1 2", "'x'"),
        ("1 0 4 2 1 2", "2 0 4 2 1 2", "differently"),
        ("item0=1", "item0=2", "add up"),
        ("item0=1", "item9=1", "neither two shares"),
        (SHARES, "<disagree>", "neither two shares"),
        ("hats", "h\udce4ts", "UTF-8"),
    ],
)
def test_a_malformed_negotiation_names_file_and_line(tmp_path, old, new, what):
    raw_dir = write_deals(tmp_path / "raw")
    bad = DEAL.replace(old, new, 1)
    assert bad != DEAL
    (raw_dir / "train.txt").write_bytes((DEAL + "\n" + bad).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=rf"train.txt, line 3: .*{what}"):
        loaded("deal_or_no_deal", raw_dir, tmp_path)


def test_renamings_are_the_same_negotiation_over_other_items():
    turns = (Turn("user", "book or hats ? that basketball"), Turn("assistant", "2 balls"), Turn("user", ""))
    record = Record(turns, numbers=(1, 4, 4, 1, 1, 2), partner_numbers=(1, 0, 4, 2, 1, 2), outcome=(1, 0, 1), reward=6.0)
    renamed = deal_or_no_deal.renamings(record)
    assert len(renamed) == 6 and dataclasses.replace(renamed[0], scenario="") == record
    assert renamed[0].scenario == "1 0 4 2 1 2 / 1 4 4 1 1 2" and len({other.scenario for other in renamed}) == 6
    said = [" / ".join(turn.text for turn in other.turns[:2]) for other in renamed]
    assert said == [
        "book or hats ? that basketball / 2 balls",
        "book or balls ? that hat / 2 hats",
        "hat or books ? that basketball / 2 balls",
        "ball or books ? that hat / 2 hats",
        "hat or balls ? that book / 2 books",
        "ball or hats ? that book / 2 books",
    ]
    third = renamed[3]  # what was said of hats is said of books, of balls of hats, of books of balls
    assert (third.numbers, third.partner_numbers, third.outcome) == ((4, 1, 1, 2, 1, 4), (4, 2, 1, 2, 1, 0), (0, 1, 1))
    worth = {sum(n * v for n, v in zip(other.outcome, other.numbers[1::2], strict=True)) for other in renamed}
    assert worth == {6} == {int(other.reward) for other in renamed}
    assert deal_or_no_deal.renamings(Record(turns, numbers=record.numbers, outcome=()))[3].outcome == ()


def test_selfplay_contexts(tmp_path):
    (tmp_path / "selfplay.txt").write_text("1 0 1 1 3 3\n1 1 1 0 3 3\n")
    a, b = (1, 0, 1, 1, 3, 3), (1, 1, 1, 0, 3, 3)
    assert deal_or_no_deal.selfplay_contexts(tmp_path) == [(a, b)]
    assert deal_or_no_deal.scenario_key(a, b) == deal_or_no_deal.scenario_key(b, a) == "1 0 1 1 3 3 / 1 1 1 0 3 3"
    for content, what in (("1 0 1 1 3 3", "line 1: the other side"), ("1 0 1 1 3 3\n2 1 1 0 3 3", "line 2: .*differently")):
        (tmp_path / "selfplay.txt").write_text(content + "\n")
        with pytest.raises(DataError, match=what):
            deal_or_no_deal.selfplay_contexts(tmp_path)


def write_zip(path, dialogues):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.name.removesuffix(".zip"), json.dumps(dialogues))


def tourists(n):
    log = [{"text": "A room ?", "metadata": {}}, {"text": "Where ? \n"}, {"text": "North ."}]
    return {f"PMUL{i}": {"goal": {"message": ["secret"]}, "log": log} for i in range(n)}


def test_multiwoz(tmp_path):
    write_zip(tmp_path / "val.json.zip", tourists(40))
    write_zip(tmp_path / "test.json.zip", tourists(1))
    splits = loaded("multiwoz", tmp_path, tmp_path)
    turns = (Turn("user", "A room ?"), Turn("assistant", "Where ? \n"), Turn("user", "North ."))
    assert splits["test"] == [Record(turns, scenario="PMUL0")]
    train, val = ({record.scenario for record in splits[split]} for split in ("train", "val"))
    assert train | val == set(tourists(40)) and not train & val and 1 <= len(val) <= 10
    write_zip(tmp_path / "train.json.zip", tourists(2))
    assert {split: len(records) for split, records in MultiWoz.read(tmp_path).items()} == {"train": 2, "val": 40, "test": 1}


def test_malformed_multiwoz(tmp_path):
    (tmp_path / "val.json.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match="val.json.zip cannot be read"):
        loaded("multiwoz", tmp_path, tmp_path)
    write_zip(tmp_path / "val.json.zip", {**tourists(1), "PMUL7": {"log": [{"txt": "hi"}]}})
    with pytest.raises(DataError, match="dialogue PMUL7: no field 'text'"):
        loaded("multiwoz", tmp_path, tmp_path)


def test_sgd(tmp_path):
    def dialogue(name):
        turns = [{"speaker": "USER", "utterance": "Food!", "frames": []}, {"speaker": "SYSTEM", "utterance": "Where?"}]
        return {"dialogue_id": name, "turns": turns}

    (tmp_path / "train").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "train" / "schema.json").write_text("[]")
    (tmp_path / "train" / "dialogues_002.json").write_text(json.dumps([dialogue("2_0")]))
    (tmp_path / "train" / "dialogues_001.json.xz").write_bytes(lzma.compress(json.dumps([dialogue("1_0")]).encode()))
    (tmp_path / "dev" / "dialogues_001.json").write_text(json.dumps([dialogue("d")]))
    splits = loaded("sgd", tmp_path, tmp_path)
    assert [record.scenario for record in splits["train"]] == ["train 1_0", "train 2_0"]
    turns = (Turn("user", "Food!"), Turn("assistant", "Where?"), Turn("user", ""))  # what ends it is that the user is silent
    assert splits["val"] == [Record(turns, scenario="val d")]
    (tmp_path / "dev" / "dialogues_001.json").write_text(json.dumps([dialogue("d"), {"dialogue_id": "e", "turns": []}]))
    with pytest.raises(DataError, match="dialogues_001.json, dialogue 1: .*at least one turn"):
        loaded("sgd", tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["deal_or_no_deal", "multiwoz", "sgd", "chat_jsonl", "concierge"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(DataError, match="nowhere is not a directory; expected there: .*Set config.data_dir"):
        loaded(name, tmp_path / "nowhere", tmp_path)
    with pytest.raises(DataError, match=" has no .*expected there"):
        loaded(name, tmp_path, tmp_path)
