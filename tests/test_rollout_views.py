"""The token loop with two mirrored views: two parties with private contexts, each the assistant of its own view."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import dialogue, largest_difference, noisy, random_rows, world

from mbrl_lm import protocol as pr
from mbrl_lm import rollout
from mbrl_lm.rollout import View
from mbrl_lm.scoring import score

T, B = 24, 16
TEMPERATURE = np.array([1.0, 0.7, 1.0, 1.4, 1.0], np.float32)
GREEDY = np.full(len(pr.ROLES), 1e-5, np.float32)
OURS = world("negotiation", model__layers=1)
THEIRS = world("negotiation", seed=2, model__layers=2, model__width=24, model__conv_width=1)


def swapped(params):
    """A network that sees `<to_user>` as this one sees `<to_assistant>`."""
    assert OURS.cfg.model.tied  # the embedding is the output layer too
    return params | {name: params[name][OURS.protocol.mirror_V] for name in ("embed_VD", "code_VC")}


@functools.cache
def talkers(own: bool):
    """converse, compiled: with another network on the other side, or the same one."""
    other = OURS if own else THEIRS

    def talk(params, their_params, ours, theirs, temperature):
        views = View(OURS.net, params, ours), View(other.net, their_params, theirs)
        return rollout.converse(OURS.protocol, *views, jax.random.key(0), tokens=T, temperature=temperature)

    return jax.jit(talk)


@functools.cache
def prompts(private: bool = True):
    """Prompts of 3 tokens, either side first; the contexts of the two sides differ if they are private."""
    rows = [row[:3] for row in random_rows(OURS.protocol, 3, B, 3)[0]]
    mirror = OURS.protocol.mirror_V
    theirs = [[row[0], row[1] + private * (-1) ** b, int(mirror[row[2]])] for b, row in enumerate(rows, start=1)]
    theirs = [[a, max(b, pr.FIRST_PIECE), c] for a, b, c in theirs]
    pair = [dialogue(OURS.protocol, x, T=3, ended=[False] * B) for x in (rows, theirs)]
    return pair[0], pair[1]


@functools.cache
def talked():
    return jax.device_get(talkers(False)(OURS.params, THEIRS.params, *prompts(), TEMPERATURE))


def test_copies_of_a_table_talk_apart_and_the_first_as_if_alone():
    views = [View(side.net, side.params, x) for side, x in zip((OURS, THEIRS), prompts(), strict=True)]
    talk = functools.partial(rollout.converse, OURS.protocol, *views, jax.random.key(0), tokens=T, temperature=TEMPERATURE)
    for alone, copies in zip(talked(), talk(copies=2), strict=True):
        np.testing.assert_array_equal(copies.token_BT[::2], alone.token_BT)
        assert (copies.token_BT[1::2] != alone.token_BT).any(axis=1).mean() > 0.5


def spoken(d):
    return (d.author_BT == pr.ASSISTANT) | (d.author_BT == pr.USER)


def test_both_hear_the_same_tokens_mirrored():
    ours, theirs = talked()
    swap = np.array([pr.CONTEXT, pr.USER, pr.ASSISTANT, pr.OUTCOME, pr.END])
    talk_BT = spoken(ours)
    assert (talk_BT == spoken(theirs)).all() and talk_BT.sum() > 3 * B
    assert (OURS.protocol.mirror_V[ours.token_BT] == theirs.token_BT)[talk_BT].all()
    assert (swap[ours.author_BT] == theirs.author_BT)[talk_BT].all()
    assert (ours.sampled_BT & theirs.sampled_BT)[talk_BT].all()
    for d in (ours, theirs):
        d.check()
        author_BT, turn_BT = pr.parse(OURS.protocol, d.token_BT)
        assert (d.author_BT == author_BT).all() and (d.turn_BT == turn_BT).all()


def test_each_token_has_the_log_probability_of_its_speakers_own_view():
    ours, theirs = talked()
    own, other = (
        jax.jit(lambda p, d, t, w=w: score(w.net, w.protocol, p, d, temperature=t).logp_BT)(w.params, d, TEMPERATURE)
        for w, d in ((OURS, ours), (THEIRS, theirs))
    )
    for d, mine, yours in ((ours, own, other), (theirs, other, own)):
        expected = jnp.where(d.author_BT == pr.USER, yours, mine)
        assert largest_difference(jnp.where(d.sampled_BT, expected, 0), d.logp_BT) < 2e-5
    speaks_BT = ours.sampled_BT & (ours.author_BT == pr.USER)
    assert float(jnp.max(jnp.where(speaks_BT, jnp.abs(own - other), 0))) > 0.1  # it does matter whose view it is


def test_each_writes_its_own_outcome():
    ours, theirs = talked()
    both_B = np.asarray(ours.ended_B & theirs.ended_B)
    assert both_B.sum() >= 3
    starts = [np.argmax(d.author_BT == pr.OUTCOME, axis=1) for d in (ours, theirs)]
    assert (starts[0] == starts[1])[both_B].all()
    written = [[d.token_BT[b][d.author_BT[b] == pr.OUTCOME].tolist() for b in range(B)] for d in (ours, theirs)]
    assert any(a != b for a, b in zip(*written, strict=True))
    assert any(len(a) != len(b) for a, b, both in zip(*written, both_B, strict=True) if both)  # one waits for the other
    for row, both in zip(written[0] + written[1], np.tile(both_B, 2), strict=True):
        assert not both or (row[-1] == pr.STOP and len(row) <= pr.OUTCOME_TOKENS)


def test_the_other_sides_parameters_decide_what_it_says():
    ours, _ = talked()
    changed, _ = talkers(False)(OURS.params, noisy(THEIRS.params, 4), *prompts(), TEMPERATURE)
    for b in range(B):
        different = np.flatnonzero(changed.token_BT[b] != ours.token_BT[b])
        if len(different):
            assert ours.author_BT[b, different[0]] == pr.USER  # nothing differs before its first other word
    assert (changed.token_BT != ours.token_BT).any()


def test_a_party_hears_the_others_words_but_never_its_context():
    """Greedy parties: with another context on one side, the dialogue changes only from that side's words on."""
    ours, theirs = prompts()
    talk = talkers(False)
    a, _ = talk(OURS.params, THEIRS.params, ours, theirs, TEMPERATURE)
    token_BT = theirs.token_BT.copy()
    token_BT[:, 1] = pr.FIRST_PIECE + (token_BT[:, 1] - pr.FIRST_PIECE + 3) % 8
    b, _ = talk(OURS.params, THEIRS.params, ours, theirs.replace(token_BT=token_BT), TEMPERATURE)
    firsts = [np.flatnonzero(x) for x in np.asarray(a.token_BT != b.token_BT)]
    assert sum(len(first) > 0 for first in firsts) > B // 4
    assert all(a.author_BT[i, first[0]] == pr.USER for i, first in enumerate(firsts) if len(first))


def test_talking_to_its_own_mirror_image_is_imagination():
    """Greedy, with one context for both: the two views are the one network that writes both sides, and its mirror image."""
    ours, theirs = prompts(private=False)
    seen, mirrored = talkers(True)(OURS.params, swapped(OURS.params), ours, theirs, GREEDY)

    def imagine(params, prompt):
        key = jax.random.key(0)
        return rollout.imagine(OURS.net, OURS.protocol, params, prompt, key, tokens=T, turns=99, temperature=GREEDY)

    alone = jax.jit(imagine)(OURS.params, ours)
    assert (seen.token_BT == alone.token_BT).all() and (seen.author_BT == alone.author_BT).all()
    assert (mirrored.token_BT == OURS.protocol.mirror_V[np.asarray(alone.token_BT)]).all()
    assert (seen.ended_B == alone.ended_B).all() and len(np.unique(alone.token_BT, axis=0)) > 2
    for role in (pr.ASSISTANT, pr.USER):
        assert (alone.author_BT == role).sum() > B


def test_swapping_the_seats_swaps_the_views():
    """Greedy: who is called `ours` does not matter."""
    ours, theirs = prompts()
    seen, heard = talkers(True)(OURS.params, noisy(OURS.params, 4), ours, theirs, GREEDY)
    swapped_heard, swapped_seen = talkers(True)(noisy(OURS.params, 4), OURS.params, theirs, ours, GREEDY)
    for a, b in ((seen, swapped_seen), (heard, swapped_heard)):
        assert (a.token_BT == b.token_BT).all() and (a.ended_B == b.ended_B).all()
