"""Likelihood of held-out dialogues, by hand: what a word is, whose it is, and what follows imagined turns."""

import types

import jax
import numpy as np
import pytest
from fakes import follows, one_device, table_net, uniform
from tiny import VOCAB, dialogue, tokens

from mbrl_lm import config, tokenizer
from mbrl_lm import protocol as pr
from mbrl_lm.heldout import Heldout, _hidden_turns, _word_counts, words_per_token

CHAT = pr.make_protocol("chat", VOCAB, turn_tokens=4)
NEGOTIATION = pr.make_protocol("negotiation", VOCAB, turn_tokens=4)
WORDS = types.SimpleNamespace(vocab_size=VOCAB, opens_word=np.ones(VOCAB - pr.FIRST_PIECE, bool))
KEY = jax.random.key(0)


def figures(said, params, protocol=CHAT, **sizes):
    return Heldout(table_net(), protocol, WORDS, one_device(), dialogue(protocol, said), **sizes).closed_loop(params)


def words(rows, protocol=CHAT, pieces=WORDS):
    return np.asarray(_word_counts(words_per_token(pieces), dialogue(protocol, rows)))


# ---- words ----


def test_a_hand_over_is_two_words_and_an_end_is_one():
    assert words(["bos e >u a b >a c >u d stop"])[0, 3:10].tolist() == [1, 1, 2, 1, 2, 1, 1]
    assert words(["bos >u a leave"])[0, 2:4].tolist() == [1, 1]
    assert words(["bos 1 1 1 1 1 1 >a a >o"], NEGOTIATION)[0, 8:10].tolist() == [1, 1]
    assert not words(["bos >u a leave"])[0, 4:].any()  # padding


def test_only_a_piece_that_opens_a_word_is_one_and_a_turns_first_always_is():
    opens_word = np.ones(VOCAB - pr.FIRST_PIECE, bool)
    opens_word[[1, 2]] = False  # b, c
    pieces = types.SimpleNamespace(vocab_size=VOCAB, opens_word=opens_word)
    assert words(["bos >u a b c a >a b c >u c a stop"], pieces=pieces)[0, 2:12].tolist() == [1, 0, 0, 1, 2, 1, 0, 2, 1, 1]


def test_a_subword_model_counts_the_words_of_a_text():
    texts = ["the little boat sails on the lake", "sailing boats are little", "a lake"]
    pieces = tokenizer.Tokenizer(tokenizer.train(texts * 20, config.Tokenizer("unigram", 300)))
    protocol = pr.make_protocol("chat", pieces.vocab_size)
    said = [pieces.encode(text) for text in texts]
    assert any(len(ids) > len(text.split()) for ids, text in zip(said, texts, strict=True))
    row = [pr.BOS, pr.TO_USER, *said[0], pr.TO_ASSISTANT, *said[1], pr.TO_USER, *said[2], pr.STOP]
    whole = dialogue(protocol, [row], T=64)
    words_T = np.asarray(_word_counts(words_per_token(pieces), whole))[0]
    per_turn = [words_T[whole.turn_BT[0] == turn].sum() for turn in (1, 2, 3)]
    assert per_turn == [7 + 2, 4 + 2, 2 + 1]


# ---- perplexity ----


def test_perplexity_is_the_vocabulary_where_every_token_is_a_word():
    told = figures(["bos e >u a b c stop", "bos f >u d leave"], uniform(VOCAB))
    assert told["word_ppl/val"] == told["user_word_ppl/val"] == pytest.approx(VOCAB)
    assert told["user_nll/val"] == pytest.approx(np.log(VOCAB))
    assert told["word_ppl/val/turn_1"] == pytest.approx(VOCAB) and "word_ppl/val/turn_2" not in told
    assert not any(name.startswith("assistant") for name in told)  # it said nothing


def test_perplexity_per_word_by_role_and_by_turn():
    rows = ["bos e >u a b >a c >u d stop", "bos f >a a >u b >a"]
    after = {tokens("d")[0]: pr.STOP, tokens("c")[0]: pr.TO_USER}  # of these two the network is sure
    told = figures(rows, follows(VOCAB, after))
    nats = np.log(VOCAB)
    by_hand = {  # nats in units of log V, words, tokens
        "user": (2 + 1 + 1 + 2, 1 + 1 + 2 + 1 + 1 + 1 + 2, 7),
        "assistant": (1 + 2, 1 + 2 + 1 + 2, 4),
        1: (3 + 2, 4 + 3, None),
        2: (1 + 2, 3 + 3, None),
        3: (1, 2, None),
    }
    for role in ("user", "assistant"):
        nll, count, size = by_hand[role]
        assert told[f"{role}_nll/val"] == pytest.approx(nll * nats / size, rel=1e-5)
        assert told[f"{role}_word_ppl/val"] == pytest.approx(np.exp(nll * nats / count), rel=1e-5)
    for turn in (1, 2, 3):
        nll, count, _ = by_hand[turn]
        assert told[f"word_ppl/val/turn_{turn}"] == pytest.approx(np.exp(nll * nats / count), rel=1e-5)
    assert told["word_ppl/val"] == pytest.approx(np.exp(9 * nats / 15), rel=1e-5)
    assert "split_accuracy/val" not in told


def test_dialogues_that_fill_the_last_chunk_count_nothing():
    rows = ["bos e >u a b >a c >u d stop", "bos f >u a >a", "bos f >u d >a a >u b >a c c >u a stop"]
    params = follows(VOCAB, {tokens("d")[0]: pr.STOP})
    whole, filled = figures(rows * 2, params, rows=6), figures(rows, params, rows=2)
    assert whole.keys() == filled.keys()
    assert all(filled[name] == pytest.approx(whole[name], rel=1e-6) for name in whole)


def test_a_split_is_right_when_every_token_of_the_outcome_is_likeliest():
    chain = {pr.TO_OUTCOME: "1", pr.NUMBER + 1: "2", pr.NUMBER + 2: "3", pr.NUMBER + 3: "stop"}
    params = follows(VOCAB, {token: tokens(after)[0] for token, after in chain.items()})
    start = "bos 2 1 2 1 3 1 >a a >u b >o"
    rows = [f"{start} 1 2 3 stop", f"{start} 1 2 2 stop", f"{start} none stop", f"{start} 1 2 3 stop", f"{start} 0 2 3 stop"]
    told = figures(rows, params, NEGOTIATION)
    assert told["split_accuracy/val"] == pytest.approx(2 / 4)  # of the deals
    nats = 50 + 50 + 50 + np.log(VOCAB)  # 2 for 3, an end after 2; 0 for 1, of which it knows nothing
    assert told["outcome_nll/val"] == pytest.approx(nats / 4, rel=1e-4)


# ---- open loop ----

LONG = "bos e >u a >a b b >u c c >a d >u a b >a c >u d stop"
#       0   1 2  3 4  5 6 7  8 9 10 11 12 13 14 15 16 17 18 19


def test_the_hidden_turns_stand_before_a_user_turn_that_the_uid_chooses():
    rows = [LONG, LONG, LONG, "bos e >u a stop", "bos e >a a >u b >a", "bos e >a a >u b >a c >u d leave"]
    given = dialogue(CHAT, rows)
    start_B, first_B, last_B = _hidden_turns(given, 1)
    # User turns of LONG are 1, 3, 5, 7; one turn stands before the last three; uids 0, 1, 2 take them in turn.
    assert start_B.tolist() == [5, 11, 16, 0, 3, 7]
    assert first_B.tolist() == [8, 13, 18, 0, 5, 9]
    assert last_B.tolist() == [11, 16, 20, 0, 7, 11]
    start_B, first_B, _ = _hidden_turns(given, 4)
    assert start_B.tolist() == [3, 8, 3, 0, 0, 0] and first_B.tolist() == [13, 18, 13, 0, 0, 0]


def open_loop(said, params, **sizes):
    return Heldout(table_net(), CHAT, WORDS, one_device(), dialogue(CHAT, said), **sizes).open_loop(params, KEY)


def test_without_memory_imagined_turns_change_nothing():
    told = open_loop([LONG] * 6, uniform(VOCAB))
    horizons = [k for k in (1, 2, 4) if f"user_nll/val/open_loop_{k}" in told]
    assert 1 in horizons
    for k in horizons:
        assert told[f"user_nll/val/open_loop_{k}"] == pytest.approx(np.log(VOCAB))
        assert told[f"user_nll/val/open_loop_{k}"] == told[f"user_nll/val/open_loop_{k}_real"]
        assert told[f"user_word_ppl/val/open_loop_{k}"] == told[f"user_word_ppl/val/open_loop_{k}_real"]


def test_the_real_turn_is_scored_after_the_imagined_one():
    # In the place of c >u the network writes d g f >u; it is sure of the real turn b stop that follows.
    a, b, d, g, f = tokens("a b d g f")
    said = {pr.TO_ASSISTANT: d, d: g, g: f, f: pr.TO_USER, b: pr.STOP}
    params = follows(VOCAB, said | {pr.TO_USER: b})
    told = open_loop(["bos e >u a >a c >u b stop"], params)
    assert told["user_nll/val/open_loop_1"] == pytest.approx(0, abs=1e-5) == told["user_nll/val/open_loop_1_real"]
    assert told["user_word_ppl/val/open_loop_1"] == pytest.approx(1)
    params = follows(VOCAB, said | {pr.TO_USER: a})  # now b is a surprise
    told = open_loop(["bos e >u a >a c >u b stop"], params)
    assert told["user_nll/val/open_loop_1"] == pytest.approx(50 / 2, rel=1e-5)


def test_as_many_turns_are_imagined_as_asked_for():
    # Both speakers write as they do in the dialogue: after any even number of imagined turns the user has the floor.
    a, b, c = tokens("a b c")
    params = follows(VOCAB, {pr.TO_USER: a, a: pr.TO_ASSISTANT, pr.TO_ASSISTANT: c, c: pr.TO_USER, b: pr.STOP})
    told = open_loop(["bos e >u a >a c >u a >a c >u b stop"], params)
    assert told["user_nll/val/open_loop_2"] == pytest.approx(0, abs=1e-5)  # of "a >a"
    assert told["user_nll/val/open_loop_4"] == pytest.approx(50 / 2, rel=1e-5)  # of "b stop", which surprises


def test_rows_that_fill_a_chunk_and_rows_without_a_hidden_turn_count_nothing():
    params = follows(VOCAB, {pr.TO_ASSISTANT: tokens("g")[0], tokens("g")[0]: pr.TO_USER})
    params["table"][pr.TO_USER, tokens("b")[0]] = 3.0  # so that turns differ in nats per token
    said = ["bos e >u a stop", "bos e >u a >a c >u b stop", "bos e >u a a >a c >u c c c stop"]
    told, without = open_loop(said, params, rows=2), open_loop(said[1:], params)
    for name in ("user_nll/val/open_loop_1", "user_word_ppl/val/open_loop_1"):
        assert told[name] == pytest.approx(without[name], rel=1e-6) and told[name] == told[f"{name}_real"]
    assert "user_nll/val/open_loop_4" not in told
