"""From a config to token arrays: the partner's scenarios, the logs of the environment, the tokenizer of a run."""

import dataclasses
import json

import numpy as np
import pytest
from fakes import write_deals

from mbrl_lm import config, presets, tokenizer
from mbrl_lm import protocol as pr
from mbrl_lm.data.builders.deal_or_no_deal import NAMES, OTHER_NAMES, DealOrNoDeal, renamings, scenario_key
from mbrl_lm.data.corpus import item_names, load_corpus, rename, write_logs
from mbrl_lm.data.encode import encode
from mbrl_lm.data.records import DataError
from mbrl_lm.envs.concierge.renaming import RENAMINGS


def config_of(data, data_dir="", **values):
    values = {name.replace("__", "."): value for name, value in values.items()}
    return config.override(presets.preset(data, "tiny"), {"data_dir": str(data_dir), "logs": 12, "val_logs": 4} | values)


def write_chats(raw_dir, word):
    raw_dir.mkdir()
    for split in ("train", "val"):
        lines = [
            {"turns": [{"role": "user", "text": f"{word} {split} {i}"}, {"role": "assistant", "text": f"ok {word}"}]}
            for i in range(8)
        ]
        (raw_dir / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return raw_dir


@pytest.fixture
def deals(tmp_path):
    return write_deals(tmp_path / "deals")


def scenarios(dialogues, records):
    """The scenarios of encoded dialogues, by what the assistant sees."""
    by_numbers = {record.numbers: record.scenario for record in records}
    return {by_numbers[tuple((row[1:7] - pr.NUMBER).tolist())] for row in dialogues.token_BT}


def test_learner_partner_and_judge_share_no_scenario(deals, tmp_path):
    corpus = load_corpus(config_of("deal_or_no_deal", deals, tokenizer__min_count=1, partner__share=0.3), tmp_path)
    raw = DealOrNoDeal.read(deals)
    assert len(corpus.train.uid_B) + len(corpus.others.uid_B) == len(raw["train"]) == 120
    assert 10 < len(corpus.others.uid_B) < 70 and len(corpus.others.uid_B) % 2 == 0  # both views of a scenario
    learnt, partners = (scenarios(d, raw["train"]) for d in (corpus.train, corpus.others))
    judged = {scenario_key(record.numbers, record.partner_numbers) for record in corpus.val_records}
    assert len(learnt) + len(partners) == 60 and not learnt & partners
    assert len(judged) == 10 and not judged & (learnt | partners)
    assert corpus.val_records == raw["val"] and len(corpus.val.uid_B) == 20
    assert corpus.protocol.switch_RV[pr.USER, pr.TO_OUTCOME] == pr.OUTCOME


def test_renamed_dialogues_stay_on_their_side(deals, tmp_path):
    train, others = DealOrNoDeal.read(deals)["train"][:40], DealOrNoDeal.read(deals)["train"][40:]
    held_out = [renamings(record)[2] for record in train[:8]] + [renamings(record)[3] for record in others[:8]]
    unseen = {record.scenario for record in held_out + others}
    every = {record.scenario for record in rename(train, renamings)}
    assert every & unseen
    assert {record.scenario for record in rename(train, renamings, held_out, others)} == every - unseen


def test_dialogues_are_renamed_where_it_is_asked_for(deals, tmp_path):
    values = {"tokenizer__min_count": 1, "partner__share": 0.3}
    assert load_corpus(config_of("deal_or_no_deal", deals, train__renamed=0.0, **values), tmp_path).renamed is None
    corpus = load_corpus(config_of("deal_or_no_deal", deals, train__renamed=0.5, **values), tmp_path)
    assert len(corpus.renamed.uid_B) > 5 * len(corpus.train.uid_B)
    assert len(corpus.others_renamed.uid_B) > 5 * len(corpus.others.uid_B)


def pieces_of(*texts):
    return tokenizer.Tokenizer(tokenizer.train(texts, config.Tokenizer()))


def test_tokens_are_renamed_as_words_are(deals):
    said = "two books a hat the ball one book all hats balls a basketball basketballs"
    pieces = pieces_of(said, "i want you can have")
    record = DealOrNoDeal.read(deals)["train"][0]
    record = dataclasses.replace(record, turns=(dataclasses.replace(record.turns[0], text=said), *record.turns[1:]))
    protocol = pr.make_protocol(
        "negotiation", pieces.vocab_size, pieces.unknown, names=item_names(pieces, NAMES, OTHER_NAMES)
    )
    (own,) = encode([record], pieces, protocol, 64, 8).token_BT
    others = [encode([other], pieces, protocol, 64, 8).token_BT[0] for other in renamings(record)]
    assert len(others) == len(protocol.naming_XV) == 6
    words = (own >= pr.FIRST_PIECE) & ~np.isin(own, pieces.unknown)
    assert words.sum() >= len(said.split()) and len({tuple(other) for other in others}) == 6
    for other, naming_V, order_I in zip(others, protocol.naming_XV, protocol.order_XI, strict=True):
        assert naming_V[own][words].tolist() == other[words].tolist()
        assert other[1:7:2].tolist() == own[1:7:2][order_I].tolist()


def test_the_kinds_of_item_have_every_naming_where_they_are_spoken_of(deals, tmp_path):
    train = deals / "train.txt"
    train.write_text(train.read_text().replace("ok deal", "ok , a ball , all books hats and balls"))
    corpus = load_corpus(config_of("deal_or_no_deal", deals, tokenizer__min_count=1), tmp_path)
    assert len(corpus.protocol.naming_XV) == 6


def test_items_without_a_token_of_their_own_have_one_naming():
    assert item_names(pieces_of("a book and two hats"), NAMES) == []
    usual = pieces_of("book hat ball books hats balls")
    assert [usual.decode(tokens) for tokens in item_names(usual, NAMES, OTHER_NAMES)] == [
        "book hat ball",
        "books hats balls",
    ]
    assert len(pr.make_protocol("negotiation", 40).naming_XV) == 1


def test_the_environments_dialogues_are_renamed_where_it_is_asked_for(tmp_path):
    assert load_corpus(config_of("concierge", train__renamed=0.0), tmp_path).renamed is None
    corpus = load_corpus(config_of("concierge", train__renamed=0.5), tmp_path)
    assert len(corpus.renamed.uid_B) == RENAMINGS * len(corpus.train.uid_B)
    (tmp_path / "small").mkdir()
    small = load_corpus(config_of("concierge", places=(3, 3)), tmp_path / "small")
    marks = small.tokenizer.encode(";")
    assert (np.isin(small.train.token_BT, marks).sum(axis=1) < np.isin(corpus.train.token_BT, marks).sum(axis=1).max()).all()


def test_negotiations_to_be_judged_by_may_not_be_learnt_from(deals, tmp_path):
    known = (deals / "train.txt").read_text().splitlines()[0]
    with (deals / "val.txt").open("a") as file:
        file.write(known + "\n")
    with pytest.raises(DataError, match="train.txt and in val.txt"):
        load_corpus(config_of("deal_or_no_deal", deals), tmp_path)


def test_a_chat_has_no_partner(tmp_path):
    corpus = load_corpus(config_of("chat_jsonl", write_chats(tmp_path / "raw", "hello")), tmp_path)
    assert corpus.others is None and len(corpus.train.uid_B) == len(corpus.val.uid_B) == 8
    assert corpus.protocol.switch_RV[pr.USER, pr.TO_OUTCOME] == pr.USER
    assert corpus.protocol.vocab_size == corpus.tokenizer.vocab_size
    corpus.train.check()


def test_goals_need_contexts_that_list_items(tmp_path):
    with pytest.raises(config.ConfigError, match="world_model.goals needs contexts that list items, ';' between them"):
        load_corpus(config_of("chat_jsonl", write_chats(tmp_path / "raw", "hello"), world_model__goals=4), tmp_path)
    corpus = load_corpus(config_of("concierge", world_model__goals=4), tmp_path)
    assert corpus.tokenizer.decode([corpus.protocol.separator]) == ";"


def test_the_environments_logs_are_written_once(tmp_path):
    cfg = config_of("concierge")
    corpus = load_corpus(cfg, tmp_path)
    train, val = tmp_path / "logs" / "train.jsonl", tmp_path / "logs" / "val.jsonl"
    sizes = [len(path.read_text().splitlines()) for path in (train, val)]
    assert sizes == [12, 4] and len(corpus.train.uid_B) == 12
    uids = [{json.loads(line)["scenario"] for line in path.read_text().splitlines()} for path in (train, val)]
    assert not uids[0] & uids[1]
    before = train.stat().st_mtime_ns
    again = load_corpus(cfg, tmp_path)
    assert train.stat().st_mtime_ns == before
    assert all((np.asarray(x) == again.train.__dict__[name]).all() for name, x in corpus.train.__dict__.items())
    other = write_logs(cfg, tmp_path / "elsewhere")
    assert (other / "train.jsonl").read_bytes() == train.read_bytes()


def test_logs_that_were_cut_short_are_written_again(tmp_path):
    cfg = config_of("concierge")
    write_logs(cfg, tmp_path / "logs")
    (tmp_path / "logs" / "val.jsonl").unlink()  # it is written last
    (tmp_path / "logs" / "train.jsonl").write_text("{")
    assert len(load_corpus(cfg, tmp_path).train.uid_B) == 12


def test_the_tokenizer_of_a_run_is_kept(tmp_path):
    cfg = config_of("chat_jsonl", write_chats(tmp_path / "raw", "hello"), tokenizer__kind="word")
    first = load_corpus(cfg, tmp_path).tokenizer
    assert (tmp_path / "tokenizer.model").read_bytes() == first.proto and len(first.encode("hello ok")) == 2
    kept = tokenizer.train(["other words"], cfg.tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(kept)
    assert load_corpus(cfg, tmp_path).tokenizer.proto == kept


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
    given = tmp_path / "given.model"
    given.write_bytes(tokenizer.train(["hello ok train"], config.Tokenizer()))
    cfg = config_of("chat_jsonl", write_chats(tmp_path / "raw", "hello"), tokenizer__model_file=str(given))
    corpus = load_corpus(cfg, tmp_path)
    assert corpus.tokenizer.proto == given.read_bytes() and not (tmp_path / "tokenizer.model").exists()
    assert not corpus.protocol.allowed_RV[pr.ASSISTANT, list(corpus.tokenizer.unknown)].any()
    (unknown,) = corpus.tokenizer.unknown
    assert (corpus.val.token_BT == unknown).any()  # "val" is no word of it
    with pytest.raises(config.ConfigError, match="cannot be read as a SentencePiece model"):
        load_corpus(config_of("chat_jsonl", tmp_path / "raw", tokenizer__model_file=str(tmp_path / "absent")), tmp_path)


def test_a_missing_directory_of_raw_files_is_told(tmp_path):
    with pytest.raises(DataError, match="absent is not a directory; expected there: train.jsonl.*config.data_dir"):
        load_corpus(config_of("chat_jsonl", tmp_path / "absent"), tmp_path)
