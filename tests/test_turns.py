"""Where the assistant's turns open, close and are answered, in hand-written dialogues."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import dialogue

from mbrl_lm import protocol as pr
from mbrl_lm import turns as turns_lib

CHAT = pr.make_protocol("chat", pr.FIRST_PIECE + 8)
DEAL = pr.make_protocol("negotiation", pr.FIRST_PIECE + 8)

TWO = [(1, 2, 3, False), (3, 4, 5, False)]

# protocol, text, ended, then (open, close, reply, last) of each whole transition
#          0   1 2  3 4 5  6 7  8 9 10  ...
CASES = {
    "ended by the user": (CHAT, "bos a >u b c >a d >u e >a f g >u stop", True, [(5, 7, 9, False), (9, 12, 13, True)]),
    "the user leaves after words": (CHAT, "bos >a b >u c d leave", True, [(1, 3, 6, True)]),
    "cut at an opening": (CHAT, "bos >a b >u c >a d >u e >a", False, [(1, 3, 5, False), (5, 7, 9, False)]),
    "cut in the assistant's turn": (CHAT, "bos >a b >u c >a d", False, [(1, 3, 5, False)]),
    "cut after the assistant's turn": (CHAT, "bos >a b >u c >a d >u", False, [(1, 3, 5, False)]),
    "cut in the user's turn": (CHAT, "bos >a b >u c >a d >u e", False, [(1, 3, 5, False)]),
    "nothing but a context": (CHAT, "bos a >a", False, []),
    "an opening is no turn": (CHAT, "bos a >u b >a", False, []),
    "an empty turn": (CHAT, "bos >a >u >a >u stop", True, [(1, 2, 3, False), (3, 4, 5, True)]),
    "the user calls for the outcome": (DEAL, "bos 1 2 >a b >u c >o 1 2 3 stop", True, [(3, 5, 11, True)]),
    "the assistant calls for the outcome": (DEAL, "bos >u b >a c >o none stop", True, [(3, 5, 7, True)]),
    "an outcome that is cut": (DEAL, "bos >u b >a c >o 1 2", False, []),
    "more turns than U": (CHAT, "bos >a >u >a >u >a >u >a >u stop", True, [*TWO, (5, 6, 7, False)]),
    "exactly U turns": (CHAT, "bos >a >u >a >u >a >u stop", True, [*TWO, (5, 6, 7, True)]),
    "U turns and an opening": (CHAT, "bos >a >u >a >u >a >u >a", False, [*TWO, (5, 6, 7, False)]),
}


@pytest.mark.parametrize("name", CASES)
def test_turns_of_hand_written_dialogues(name):
    protocol, text, ended, expected = CASES[name]
    found = turns_lib.find_turns(protocol, dialogue(protocol, [text], T=16, U=3, ended=[ended]))
    slots = expected + [(0, 0, 0, False)] * (3 - len(expected))
    assert found.mask_BU[0].tolist() == [u < len(expected) for u in range(3)]
    columns = (found.open_BU, found.close_BU, found.reply_BU, found.last_BU)
    assert list(zip(*(x[0].tolist() for x in columns), strict=True)) == slots


def test_rows_do_not_see_each_other():
    texts = [text for protocol, text, *_ in CASES.values() if protocol is CHAT]
    ended = [ended for protocol, _, ended, _ in CASES.values() if protocol is CHAT]
    together = turns_lib.find_turns(CHAT, dialogue(CHAT, texts, T=16, U=3, ended=ended))
    for b, (text, end) in enumerate(zip(texts, ended, strict=True)):
        alone = turns_lib.find_turns(CHAT, dialogue(CHAT, [text], T=16, U=3, ended=[end]))
        assert all((x[b] == y[0]).all() for x, y in zip(together.__dict__.values(), alone.__dict__.values(), strict=True))


def test_spread_gives_each_assistant_token_its_turns_value():
    d = dialogue(CHAT, ["bos a >u b >a c d >u e >a f >u stop", "bos >a c >u leave"], T=14, U=3)
    x_BU = jnp.array([[1.5, -2.0, 9.0], [4.0, 9.0, 9.0]])
    spread = turns_lib.spread(CHAT, d, x_BU)
    assert spread.tolist() == [
        [0, 0, 0, 0, 0, 1.5, 1.5, 1.5, 0, 0, -2.0, -2.0, 0, 0],
        [0, 0, 4.0, 4.0] + [0] * 10,
    ]
    assert turns_lib.spread(CHAT, d, x_BU > 0).dtype == bool
    assert ((spread > 0) == turns_lib.spread(CHAT, d, x_BU > 0)).all()


def test_total_sums_over_the_replies_or_over_the_turns_themselves():
    d = dialogue(CHAT, ["bos a >u b >a c d >u e >a f >u stop", "bos >a c >u leave"], T=14, U=3)
    x_BT = jnp.broadcast_to(2.0 ** jnp.arange(14), (2, 14))
    assert turns_lib.total(CHAT, d, x_BT, 3).tolist() == [[2**8 + 2**9, 2**12, 0], [2**4, 0, 0]]
    assert turns_lib.total(CHAT, d, x_BT, 3, pr.ASSISTANT).tolist() == [[2**5 + 2**6 + 2**7, 2**10 + 2**11, 0], [12, 0, 0]]


def test_turns_that_are_left_out_spread_nothing():
    d = dialogue(CHAT, ["bos >a >u >a >u >a >u stop"], T=8, U=2)
    assert turns_lib.spread(CHAT, d, jnp.array([[1.0, 2.0]])).tolist() == [[0, 0, 1, 0, 2, 0, 0, 0]]


def test_gather_and_spread_are_a_round_trip():
    d = dialogue(CHAT, [text for protocol, text, *_ in CASES.values() if protocol is CHAT], T=16, U=3)
    found = turns_lib.find_turns(CHAT, d)
    x_BU = jnp.asarray(np.random.default_rng(0).normal(size=found.mask_BU.shape), jnp.float32)
    back = turns_lib.gather(turns_lib.spread(CHAT, d, x_BU), found.close_BU)
    assert (jnp.where(found.mask_BU, back, 0) == jnp.where(found.mask_BU, x_BU, 0)).all()
    assert found.mask_BU.sum() > 10


def test_gather_keeps_further_axes():
    x_BTW = jnp.arange(24.0).reshape(2, 4, 3)
    at = jnp.array([[3, 0], [1, 1]])
    assert turns_lib.gather(x_BTW, at).tolist() == [[[9, 10, 11], [0, 1, 2]], [[15, 16, 17], [15, 16, 17]]]
    assert turns_lib.gather(x_BTW[..., 0], at).tolist() == [[9, 0], [15, 15]]
