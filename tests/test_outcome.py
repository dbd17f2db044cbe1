"""Outcomes of negotiations: whole splits are compared, and only those that are possible."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import dialogue, noisy, world

from mbrl_lm import outcome
from mbrl_lm import protocol as pr
from mbrl_lm.scoring import score

ROWS = ["bos 1 4 2 1 1 2 >a a >u b >o 1 0 1 stop", "bos 2 1 1 3 3 1 >u a c >a b >o none stop", "bos 1 4 2 1 1 2 >a a >u b"]


def test_all_splits_are_there_once_and_no_deal():
    token_BS4, used_BS = map(np.asarray, outcome.possible(jnp.array([[1, 2, 1], [3, 2, 2]]), 40))
    assert outcome.number_of(np.array([[1, 2, 1], [3, 2, 2]])) == 37
    for b, counts in enumerate(((1, 2, 1), (3, 2, 2))):
        expected = {
            (*(pr.NUMBER + n for n in split), pr.STOP) for split in itertools.product(*(range(n + 1) for n in counts))
        }
        expected |= {(pr.NO_DEAL, pr.STOP, pr.PAD, pr.PAD)}
        found = [tuple(row) for row in token_BS4[b][used_BS[b]].tolist()]
        assert set(found) == expected and len(found) == len(expected)


def test_the_likeliest_of_the_possible_outcomes_is_read():
    """Against the score of every outcome, written out."""
    w = world("negotiation", seed=3, model__layers=1)
    params = noisy(w.params, 4, 0.5)
    rows = dialogue(w.protocol, ROWS)
    read = jax.jit(lambda p, d: outcome.read(w.net, w.protocol, p, d, 37))(params, rows)
    for b, counts in ((0, (1, 2, 1)), (1, (2, 1, 3))):
        begun = ROWS[b].split(" >o ")[0] + " >o "
        splits = [" ".join(map(str, s)) for s in itertools.product(*(range(n + 1) for n in counts))]
        outcomes = ["none stop", *(f"{split} stop" for split in splits)]
        written = dialogue(w.protocol, [begun + text for text in outcomes])
        logp_BT = score(w.net, w.protocol, params, written).logp_BT
        logp_S = np.asarray(jnp.sum(jnp.where(written.author_BT == pr.OUTCOME, logp_BT, 0.0), axis=1))
        best = int(np.argmax(logp_S))
        np.testing.assert_array_equal(read.token_BT[b], written.token_BT[best])
        np.testing.assert_array_equal(read.author_BT[b], written.author_BT[best])
    np.testing.assert_array_equal(read.token_BT[2], rows.token_BT[2])  # nobody called for an outcome
    np.testing.assert_array_equal(read.ended_B, [True, True, False])


def test_what_was_written_before_does_not_matter():
    w = world("negotiation", seed=3, model__layers=1)
    rows = dialogue(w.protocol, [ROWS[0], ROWS[0].replace("1 0 1 stop", "0 2 0 stop"), ROWS[0].replace("1 0 1 stop", "1")])
    tokens_BT = np.asarray(outcome.read(w.net, w.protocol, w.params, rows, 13).token_BT)
    assert (tokens_BT == tokens_BT[0]).all()
