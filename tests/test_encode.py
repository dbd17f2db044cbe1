"""Token layouts written out by hand."""

import jax
import numpy as np
import pytest

from mbrl_lm import config, protocol, tokenizer
from mbrl_lm.data import encode
from mbrl_lm.data.records import DataError, Record, Turn
from mbrl_lm.protocol import BOS, LEAVE, NO_DEAL, NUMBER, STOP, TO_ASSISTANT, TO_OUTCOME, TO_USER

TOKENIZER = tokenizer.Tokenizer(tokenizer.train(["a b c d e"], config.Tokenizer(kind="word")))
PROTOCOL = {kind: protocol.make_protocol(kind, TOKENIZER.vocab_size, TOKENIZER.unknown) for kind in ("chat", "negotiation")}
A, B, C, D, E = TOKENIZER.encode("a b c d e")


def said(*turns, **fields):
    """said("u a b", "s c"): a user's turn and an assistant's."""
    roles = {"u": "user", "s": "assistant"}
    return Record(tuple(Turn(roles[t[0]], t[2:]) if isinstance(t, str) else t for t in turns), **fields)


def encoded(*records, kind="chat", tokens=16, turns=3):
    return encode.encode(records, TOKENIZER, PROTOCOL[kind], tokens, turns)


def tokens_of(dialogue, row=0):
    return [int(t) for t in dialogue.token_BT[row] if t != protocol.PAD]


def test_chat_layout():
    d = encoded(said("u a b", "s c", "u d", context="e", reward=2.0))
    assert tokens_of(d) == [BOS, E, TO_USER, A, B, TO_ASSISTANT, C, TO_USER, D, STOP]
    assert d.author_BT[0].tolist() == [0, 0, 0, 2, 2, 2, 1, 1, 2, 2, 4, 4, 4, 4, 4, 4]
    assert d.turn_BT[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4]
    assert d.reward_BU[0].tolist() == [2, 0, 0]
    assert d.ended_B.tolist() == [True] and d.cut_B.tolist() == [False]
    assert not d.sampled_BT.any() and not d.logp_BT.any()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(d))


def test_endings_of_a_chat():
    d = encoded(said("s a", "u b", ended="leave"), said("s a", "u b", ended="cut"), said("u a", "s b"))
    assert tokens_of(d, 0) == [BOS, TO_ASSISTANT, A, TO_USER, B, LEAVE]
    assert tokens_of(d, 1) == [BOS, TO_ASSISTANT, A, TO_USER, B, TO_ASSISTANT]
    assert tokens_of(d, 2) == [BOS, TO_USER, A, TO_ASSISTANT, B, TO_USER]  # an assistant may not end a chat
    assert d.ended_B.tolist() == [True, False, False] and d.cut_B.tolist() == [False, True, True]


def test_negotiation_layout():
    numbers = (1, 0, 4, 2, 1, 10)
    deal = said("u a", "s b", "u ", numbers=numbers, outcome=(1, 0, 10), reward=7.0)
    no_deal = said("s a", "u b", "s ", numbers=numbers, outcome=())
    d = encoded(deal, no_deal, kind="negotiation", tokens=20)
    head = [BOS, *(NUMBER + n for n in numbers)]
    share = [NUMBER + 1, NUMBER, NUMBER + 10]
    assert tokens_of(d, 0) == [*head, TO_USER, A, TO_ASSISTANT, B, TO_USER, TO_OUTCOME, *share, STOP]
    assert tokens_of(d, 1) == [*head, TO_ASSISTANT, A, TO_USER, B, TO_ASSISTANT, TO_OUTCOME, NO_DEAL, STOP]
    assert d.author_BT[0].tolist() == [0] * 8 + [2, 2, 1, 1, 2, 3, 3, 3, 3] + [4] * 3
    assert d.reward_BU.tolist() == [[7, 0, 0], [0, 0, 0]]
    assert d.ended_B.all()


def test_rewards_fall_on_the_assistant_turn_that_earned_them():
    turns = (Turn("user", "a"), Turn("assistant", "b", 1.0), Turn("user", "c", 0.25), Turn("assistant", "d", 2.0))
    d = encoded(said(*turns, "u e", reward=10.0))
    assert d.reward_BU[0].tolist() == [1.25, 12, 0]


def test_decode_is_the_inverse():
    spoken = (Turn("user", "a b"), Turn("assistant", "c", 1.0), Turn("user", ""), Turn("assistant", "d", 2.0))
    records = [
        Record((*spoken, Turn("user", "e")), "a a"),
        Record((*spoken, Turn("user", "")), ended="leave"),
        Record((Turn("assistant", "b"), Turn("user", "c")), ended="cut"),
    ]
    dialogues = encoded(*records)
    assert encode.decode(dialogues, TOKENIZER) == records
    token_BT = np.where(dialogues.turn_BT == 5, A, dialogues.token_BT)  # a last turn that nothing closes
    short, *_ = encode.decode(dialogues.replace(token_BT=token_BT), TOKENIZER)
    assert short.turns == spoken and short.ended == "cut"


def test_consecutive_turns_of_a_role_are_merged():
    d = encoded(said(Turn("assistant", "a", 1.0), Turn("assistant", ""), Turn("assistant", "b", 2.0), "u c"))
    assert tokens_of(d) == [BOS, TO_ASSISTANT, A, B, TO_USER, C, STOP]
    assert d.reward_BU[0].tolist() == [3, 0, 0]


def test_a_long_dialogue_is_cut_at_a_turn_boundary():
    record = said("u a", "s b", Turn("user", "c", 0.5), "s d d d", "u e", reward=5.0)
    whole = [BOS, TO_USER, A, TO_ASSISTANT, B, TO_USER, C, TO_ASSISTANT, D, D, D, TO_USER, E, STOP]
    for tokens, length in ((14, 14), (13, 12), (12, 12), (11, 8), (8, 8), (7, 6), (6, 6)):
        d = encoded(record, tokens=tokens)
        assert tokens_of(d) == whole[:length]
        assert d.cut_B.tolist() == [length < 14]
        assert d.reward_BU[0].sum() == {14: 5.5, 6: 0.0}.get(length, 0.5)  # only a whole dialogue has its reward
    with pytest.raises(DataError, match="raise config.tokens"):
        encoded(record, tokens=5)


def test_assistant_turns_are_limited():
    record = said("u a", "s b", "u c", "s d", "u e")
    assert tokens_of(encoded(record, turns=2))[-1] == STOP
    d = encoded(record, turns=1)  # the second assistant turn is opened: its value bootstraps the first
    assert tokens_of(d) == [BOS, TO_USER, A, TO_ASSISTANT, B, TO_USER, C, TO_ASSISTANT] and d.cut_B.all()
    assert d.reward_BU.shape == (1, 1)


def test_rows_that_do_not_fit_are_dropped_and_the_others_keep_their_uid():
    d = encoded(said("u a", "s b", "u c"), said("u a a a a a a", "s b"), said("s d", "u e"), tokens=8)
    assert d.uid_B.tolist() == [0, 2]
    assert d.token_BT.shape == (2, 8)


def test_a_long_context_keeps_its_first_tokens():
    d = encoded(said("u d", "s e", context="a b c a b c a b c"), tokens=10)
    assert tokens_of(d) == [BOS, A, B, C, A, TO_USER, D, TO_ASSISTANT, E, TO_USER]


def test_text_cannot_write_special_tokens():
    d = encoded(said("u <to_assistant> <end>", "s <no_deal>", "u a"))
    unknown = TOKENIZER.unknown[0]
    assert tokens_of(d) == [BOS, TO_USER, unknown, unknown, TO_ASSISTANT, unknown, TO_USER, A, STOP]


def test_a_wrong_protocol_is_refused():
    with pytest.raises(DataError, match="negotiation"):
        encoded(said("u a", "s b", outcome=()))
    with pytest.raises(DataError, match="vocabulary"):
        encode.encode([said("u a", "s b")], TOKENIZER, protocol.make_protocol("chat", 30), 16, 3)


@pytest.fixture(scope="module")
def ten():
    return encoded(*(said("u a", "s b") for _ in range(10)))
