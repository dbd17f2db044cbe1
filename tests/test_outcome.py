"""Outcomes of negotiations: whole splits are compared, and only those that are possible."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import follows, table_net
from tiny import dialogue, noisy, world

from mbrl_lm import outcome
from mbrl_lm import protocol as pr
from mbrl_lm.reward import outcome_share
from mbrl_lm.scoring import score

ROWS = ["bos 1 4 2 1 1 2 >a a >u b >o 1 0 1 stop", "bos 2 1 1 3 3 1 >u a c >a b >o none stop", "bos 1 4 2 1 1 2 >a a >u b"]


def test_all_splits_are_there_once_and_no_deal():
    count_BI = jnp.array([[1, 2, 1], [3, 2, 2]])
    share_BSI, used_BS = outcome.slots(count_BI, 40)
    assert outcome.number_of(np.asarray(count_BI)) == 37
    for b, counts in enumerate(((1, 2, 1), (3, 2, 2))):
        expected = set(itertools.product(*(range(n + 1) for n in counts)))
        found = [tuple(share) for share in np.asarray(share_BSI)[b, 1:][used_BS[b, 1:]].tolist()]
        assert set(found) == expected and len(found) == len(expected) and used_BS[b, 0]
    np.testing.assert_array_equal(outcome.slot_of(share_BSI, count_BI)[:, 1:], np.broadcast_to(np.arange(1, 40), (2, 39)))


def test_supposed_values_make_all_items_worth_ten_points():
    table = outcome.supposed_values()
    for count in ((1, 4, 2), (3, 1, 1), (1, 1, 5)):
        values = table[count]
        assert (values @ np.array(count) == 10).all() and len({tuple(v) for v in values.tolist()}) > 1


def written_out(w, params, begun: str, counts) -> tuple[list[str], np.ndarray]:
    """Every outcome of a dialogue as text, no deal first, and its log-probability among all of them, by the score."""
    splits = [" ".join(map(str, s)) for s in itertools.product(*(range(n + 1) for n in counts))]
    texts = ["none stop", *(f"{split} stop" for split in splits)]
    rows = dialogue(w.protocol, [f"{begun} >o {text}" for text in texts])
    logp_BT = score(w.net, w.protocol, params, rows).logp_BT
    logp_S = np.asarray(jnp.sum(jnp.where(rows.author_BT == pr.OUTCOME, logp_BT, 0.0), axis=1))
    return texts, logp_S - np.logaddexp.reduce(logp_S)


def with_values(words: list[str], counts, values) -> str:
    """A dialogue, as words, in which other values are told."""
    return " ".join(["bos", *(str(n) for pair in zip(counts, values, strict=True) for n in pair), *words[7:]])


def mirrored(words: list[str]) -> list[str]:
    return [{">a": ">u", ">u": ">a"}.get(word, word) for word in words]


NAMES = [[pr.FIRST_PIECE + i for i in (0, 1, 2)], [pr.FIRST_PIECE + i for i in (3, 4, 5)]]  # a b c, d e f
LETTERS = "abcdef"


def renamed(words: list[str], order) -> list[str]:
    """A dialogue in which kind j is called what kind `order[j]` was: what is said, and the counts."""
    called = {LETTERS[3 * row + old]: LETTERS[3 * row + new] for row in (0, 1) for new, old in enumerate(order)}
    context = [x for old in order for x in words[1 + 2 * old : 3 + 2 * old]]
    return [words[0], *context, *(called.get(word, word) for word in words[7:])]


@pytest.mark.parametrize("readings, names", [(None, ()), (1, ()), (None, NAMES), (4, NAMES)])
def test_the_likeliest_split_is_read_from_both_seats_under_every_naming(readings, names):
    """Against the score of every outcome, written out, with supposed values in either seat."""
    w = world("negotiation", seed=3, model__layers=1)
    params = noisy(w.params, 4, 0.5)
    rows = dialogue(w.protocol, ROWS)
    protocol = pr.make_protocol("negotiation", w.protocol.vocab_size, turn_tokens=4, names=names)
    read = jax.jit(lambda p, d: outcome.read(w.net, protocol, p, d, 37, readings))(params, rows)
    orders = list(itertools.permutations(range(3))) if names else [(0, 1, 2)]
    for b, counts in ((0, (1, 2, 1)), (1, (2, 1, 3))):
        begun = ROWS[b].split(" >o ")[0]
        splits = [" ".join(map(str, s)) for s in itertools.product(*(range(n + 1) for n in counts))]
        found = []
        for n in range(readings or (6 if names else 3)):
            order, supposed = orders[n % len(orders)], (n + 1) % 3
            words, count = renamed(begun.split(), order), tuple(counts[old] for old in order)
            values = outcome.supposed_values()[count][supposed].tolist()
            for seat, seen in enumerate((words, mirrored(words))):
                texts, logp_S = written_out(w, params, with_values(seen, count, values), count)
                shares = [[int(x) for x in split.split()] for split in splits]
                shares = [[n - x for n, x in zip(counts, share, strict=True)] if seat else share for share in shares]
                called = [" ".join(str(share[old]) for old in order) for share in shares]
                found.append(logp_S[[0, *(texts.index(f"{text} stop") for text in called)]])
        total_S = np.mean(found, axis=0)
        expected = dialogue(w.protocol, [f"{begun} >o {splits[int(np.argmax(total_S[1:]))]} stop"])
        np.testing.assert_array_equal(read.token_BT[b], expected.token_BT[0])
        np.testing.assert_array_equal(read.author_BT[b], expected.author_BT[0])
        assert np.exp(total_S[0]) < outcome.NO_DEAL_SURE
    np.testing.assert_array_equal(read.token_BT[2], rows.token_BT[2])  # nobody called for an outcome
    np.testing.assert_array_equal(read.ended_B, [True, True, False])


def test_two_sides_read_alike_whatever_their_values_are():
    w = world("negotiation", seed=3, model__layers=1)
    params, counts = noisy(w.params, 4, 0.5), (1, 2, 1)
    words = ROWS[0].split(" >o ")[0].split()
    seats = [with_values(words, counts, (4, 1, 4)), with_values(mirrored(words), counts, (0, 5, 0)), " ".join(words)]
    rows = dialogue(w.protocol, [f"{begun} >o none stop" for begun in seats])
    read = outcome.read(w.net, w.protocol, params, rows, 13)
    share_BI = np.asarray(outcome_share(read)[0])
    assert share_BI[0].tolist() == share_BI[2].tolist()
    assert (share_BI[0] + share_BI[1]).tolist() == list(counts)


def test_no_deal_is_read_where_it_is_sure():
    net, V = table_net(), pr.FIRST_PIECE + 8
    protocol = pr.make_protocol("negotiation", V, turn_tokens=4)
    rows = dialogue(protocol, ROWS[:1])
    for sure, expected in ((0.99, "none stop"), (0.97, "0 0 0 stop")):
        params = follows(V, {pr.NO_DEAL: pr.STOP})
        numbers = slice(pr.NUMBER, pr.NUMBER + pr.LARGEST_NUMBER + 1)
        params["table"][pr.TO_OUTCOME, numbers] = -50.0
        params["table"][pr.TO_OUTCOME, [pr.NO_DEAL, pr.NUMBER]] = np.log([sure, 1 - sure])
        params["table"][numbers, pr.NUMBER] = 5.0  # it is almost always nothing that somebody gets
        params["table"][pr.TO_OUTCOME, pr.STOP] = -50.0
        read = jax.jit(lambda p, d: outcome.read(net, protocol, p, d, 13))(params, rows)
        text = ROWS[0].split(" >o ")[0] + f" >o {expected}"
        found = np.asarray(read.token_BT)[0]
        assert (found[rows.author_BT[0] == pr.OUTCOME][0] == pr.NO_DEAL) == (expected == "none stop"), text


def test_what_was_written_before_does_not_matter():
    w = world("negotiation", seed=3, model__layers=1)
    rows = dialogue(w.protocol, [ROWS[0], ROWS[0].replace("1 0 1 stop", "0 2 0 stop"), ROWS[0].replace("1 0 1 stop", "1")])
    tokens_BT = np.asarray(outcome.read(w.net, w.protocol, w.params, rows, 13).token_BT)
    assert (tokens_BT == tokens_BT[0]).all()
