"""Scripted partners: what they demand, when they agree, what they write down; at the table with a policy that is known."""

import jax
import numpy as np
import pytest
from fakes import follows, one_device, table_net
from tiny import config_of, dialogue

from mbrl_lm import protocol as pr
from mbrl_lm.envs import haggler, offers
from mbrl_lm.envs.haggler import STYLES, Haggler, Listener, Said
from mbrl_lm.envs.negotiation import Table

COUNT, VALUE = (1, 3, 2), (4, 2, 0)  # 10 points
HARD, AGREEABLE = STYLES["hard"], STYLES["agreeable"]


def me(text: str) -> Said:
    return Said(True, text)


def you(text: str) -> Said:
    return Said(False, text)


@pytest.mark.parametrize("share", [share for share in np.ndindex(2, 4, 3) if any(share)])
def test_its_own_words_say_what_it_means(share):
    for template in haggler.OFFERS:
        assert offers.read(template.format(haggler.in_words(share, COUNT)), COUNT) == share
    assert all(offers.read(text, COUNT) is None for text in (*haggler.VAGUE, *haggler.ACCEPTANCE, haggler.REFUSAL))
    assert all(map(offers.accepts, haggler.ACCEPTANCE)) and not offers.accepts(haggler.REFUSAL)


def test_what_stands_is_seen_from_its_side():
    said = [me("i want the book and 3 hats"), you("i need 2 hats , you can have the rest")]
    assert haggler.standing(said, COUNT) == ((1, 1, 2), False, False)
    assert haggler.standing([*said, me("deal")], COUNT) == ((1, 1, 2), False, True)
    assert haggler.standing(said[:1] + [you("ok deal")], COUNT) == ((1, 3, 0), True, True)
    assert haggler.standing([you("hello")], COUNT) == (None, False, False)


def test_it_gives_away_what_it_does_not_value_first():
    assert haggler.proposal(COUNT, VALUE, 10) == (1, 3, 0)
    assert haggler.proposal(COUNT, VALUE, 6) == (1, 1, 0)  # two items: the three hats are worth as much


def test_the_hard_one_demands_less_and_less_and_no_less_than_its_least():
    said, demands = [], []
    for _ in range(HARD.patience):
        text = haggler.reply(HARD, COUNT, VALUE, said, luck=0)
        demands.append(haggler.worth(offers.read(text, COUNT), VALUE))
        said += [me(text), you("i want the book and 3 hats")]  # nothing for it
    assert demands[0] >= 9 and demands == sorted(demands, reverse=True) and demands[-1] == 6
    assert haggler.reply(HARD, COUNT, VALUE, said, 0) == haggler.REFUSAL
    said += [me(haggler.REFUSAL), you("please")]
    assert haggler.reply(HARD, COUNT, VALUE, said, 0) is None
    assert haggler.settled(HARD, COUNT, VALUE, said, own_call=True) is None
    refused = [me("i want the book and 3 hats"), you("no"), me(haggler.REFUSAL), you("please")]
    assert haggler.settled(HARD, COUNT, VALUE, refused, own_call=True) is None, "its own offer was turned down"


def test_it_agrees_to_what_is_worth_its_demand_and_then_calls_for_the_outcome():
    said = [you("i take the balls , you take the rest")]
    text = haggler.reply(HARD, COUNT, VALUE, said, luck=1)
    assert text in haggler.ACCEPTANCE
    said += [me(text), you("great")]
    assert haggler.reply(HARD, COUNT, VALUE, said, 1) is None
    assert haggler.settled(HARD, COUNT, VALUE, said, own_call=True) == (1, 3, 0)


def test_the_agreeable_one_is_vague_and_takes_what_it_gets():
    assert haggler.reply(AGREEABLE, COUNT, VALUE, [], 0) in haggler.VAGUE
    said = [me("what do you need ?"), you("i need the book and the hats"), me("hi"), you("ok"), me("hi"), you("ok")]
    assert haggler.reply(AGREEABLE, COUNT, (0, 0, 5), said, 0) in haggler.ACCEPTANCE


def test_who_calls_for_the_outcome_takes_what_the_other_one_offered():
    mine, yours = [me("i want the book and 3 hats")], [you("i want the book and 3 hats")]
    assert haggler.settled(HARD, COUNT, VALUE, mine, own_call=False) == (1, 3, 0)
    assert haggler.settled(HARD, COUNT, VALUE, yours, own_call=False) is None  # worth nothing, and not agreed to
    assert haggler.settled(AGREEABLE, COUNT, (0, 0, 5), yours, own_call=False) == (0, 0, 2)
    assert haggler.settled(HARD, COUNT, VALUE, [], own_call=False) is None


class Words:
    """A tokenizer of whole sentences: b agrees, c offers, others are what the script comes up with."""

    def __init__(self):
        self.texts = ["i want the book", "deal", "i take the balls , you take the rest"]

    def encode(self, text):
        self.texts += [] if text in self.texts else [text]
        return [pr.FIRST_PIECE + self.texts.index(text)]

    def decode(self, ids):
        return " ".join(self.texts[i - pr.FIRST_PIECE] for i in ids if i >= pr.FIRST_PIECE)


def test_a_deal_at_the_table():
    """The policy offers a half, again and again; the script agrees, and calls for the outcome; both name one split."""
    V = pr.FIRST_PIECE + 8
    protocol = pr.make_protocol("negotiation", V, turn_tokens=4)
    words, one = Words(), pr.NUMBER + 1
    offer = words.encode("i take 1 book , 1 hat and 1 ball , you take the rest")[0]
    params = follows(V, {pr.TO_ASSISTANT: offer, offer: pr.TO_USER, pr.TO_OUTCOME: one, one: one})
    scenario = ((2, 2, 2, 1, 2, 2),) * 2
    script = Haggler("agreeable", words, protocol)
    table = Table(config_of(tokens=40), protocol, table_net(), script, one_device(), [scenario], 4)
    figures, dialogues = table.play(params, None, jax.random.key(0), 4, 0.5)
    assert figures["agreed"].all() and dialogues.ended_B.all() and figures["pareto"].all()
    assert figures["score_a"].tolist() == figures["score_b"].tolist() == [5] * 4
    # offer, deal, offer, outcome; before it, where the script begins
    assert sorted(figures["turns"].tolist()) == [4, 4, 5, 5]


def test_it_writes_only_where_it_has_the_floor_and_its_outcome_where_one_was_called_for():
    protocol = pr.make_protocol("negotiation", pr.FIRST_PIECE + 3, turn_tokens=4)
    script = Haggler("hard", Words(), protocol)
    # As the script sees it: it is the assistant; word c offers it all but the balls.
    rows = [
        "bos 1 4 3 2 2 0 >u c >a",
        "bos 1 4 3 2 2 0 >u c",
        "bos 1 4 3 2 2 0 >u c >a b >u b >a",
        "bos 1 4 3 2 2 0 >u c >a b >u >o",
    ]
    before = dialogue(protocol, rows)
    answered = script.answer(before, np.array([True, False, True, False]))
    expected = [rows[0] + " b >u", rows[1], rows[2] + " >o", rows[3]]
    np.testing.assert_array_equal(answered.token_BT, dialogue(protocol, expected).token_BT)
    assert answered.sampled_BT.sum() == 3
    settled = script.settle(answered)
    expected = [*expected[:2], expected[2] + " 1 3 0 stop", expected[3] + " 1 3 0 stop"]
    np.testing.assert_array_equal(settled.token_BT, dialogue(protocol, expected).token_BT)
    assert settled.ended_B.tolist() == [False, False, True, True]


def test_a_listener_takes_the_last_offer_for_the_deal():
    protocol = pr.make_protocol("negotiation", pr.FIRST_PIECE + 3, turn_tokens=4)
    rows = ["bos 1 4 3 2 2 0 >u c >o 1 0 0 stop", "bos 1 4 3 2 2 0 >a c >o none stop", "bos 1 4 3 2 2 0 >u b >o none stop"]
    settled = Listener(Words(), protocol).settle(dialogue(protocol, rows))
    expected = [rows[0].replace("1 0 0", "1 3 0"), rows[1].replace("none", "0 0 2"), rows[2]]
    np.testing.assert_array_equal(settled.token_BT, dialogue(protocol, expected).token_BT)
