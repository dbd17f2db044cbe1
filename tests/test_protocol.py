"""The table of who speaks: parsing, budgets, mirrors."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import dialogue, random_rows, tokens

from mbrl_lm import protocol as pr

CHAT = pr.make_protocol("chat", pr.FIRST_PIECE + 8, unknown=[pr.FIRST_PIECE + 7], turn_tokens=4)
DEAL = pr.make_protocol("negotiation", pr.FIRST_PIECE + 8, turn_tokens=4)
ROLE = {"c": pr.CONTEXT, "a": pr.ASSISTANT, "u": pr.USER, "o": pr.OUTCOME, ".": pr.END}


@pytest.mark.parametrize(
    ("protocol", "text", "authors", "turns"),
    [
        (CHAT, "bos a >u b c >a d >u stop _ _", "cccuuuaau..", "00011122344"),
        (CHAT, "bos >a b >u c leave _", "ccaauu.", "0011223"),
        (CHAT, "bos a >u b c >a d _ _", "cccuuua..", "000111233"),  # truncated, padded
        (CHAT, "bos a >u b c >a d", "cccuuua", "0001112"),  # truncated, full
        (CHAT, "bos a _ _", "cc..", "0011"),
        (DEAL, "bos 1 2 >a b >u >o 3 2 1 stop _", "ccccaauoooo.", "000011233334"),
        (DEAL, "bos >u b >a c >o none stop", "ccuuaaoo", "00112233"),
        (CHAT, "bos >u b >u c >a d >a >u", "ccuuuuaaa", "001111222"),  # a hand-over to oneself is a word
    ],
)
def test_parse_reads_hand_written_rows(protocol, text, authors, turns):
    author_BT, turn_BT = pr.parse(protocol, jnp.array([tokens(text)]))
    assert author_BT.dtype == jnp.int8 and turn_BT.dtype == jnp.int16
    assert author_BT[0].tolist() == [ROLE[x] for x in authors]
    assert turn_BT[0].tolist() == [int(x) for x in turns]


@pytest.mark.parametrize("protocol", [CHAT, DEAL])
def test_parse_agrees_with_the_table_spoken_one_token_at_a_time(protocol):
    said, wrote = random_rows(protocol, 0, 40, 30)
    parsed = dialogue(protocol, said, T=30).author_BT
    for row, authors in zip(parsed, wrote, strict=True):
        assert row.tolist() == authors + [pr.END] * (30 - len(authors))


def test_rows_are_parsed_each_by_itself():
    said = [tokens("bos a >u b stop"), tokens("bos a >a b >u")]
    alone = [pr.parse(CHAT, jnp.array([row])) for row in said]
    together = pr.parse(CHAT, jnp.array(said))
    for b in range(2):
        assert all((x[b] == y[0]).all() for x, y in zip(together, alone[b], strict=True))


def test_authors_follow_from_the_tokens_on_either_machine():
    rows = dialogue(CHAT, ["bos a >u b >a c >u stop", "bos >a b >u c leave"])
    stale = rows.replace(author_BT=jnp.zeros_like(rows.author_BT), turn_BT=jnp.ones_like(rows.turn_BT))
    for attributed, kind in ((pr.attributed, jnp.ndarray), (pr.attributed_on_host, np.ndarray)):
        found = attributed(CHAT, stale)
        assert isinstance(found.author_BT, kind) and isinstance(found.turn_BT, kind)
        np.testing.assert_array_equal(found.author_BT, rows.author_BT)
        np.testing.assert_array_equal(found.turn_BT, rows.turn_BT)


def test_each_role_has_its_temperature():
    assert pr.temperatures().tolist() == [1.0] * len(pr.ROLES)
    temperature_R = pr.temperatures(assistant=0.5, user=0.75, outcome=0.25)
    by_role = dict(zip(pr.ROLES, temperature_R.tolist(), strict=True))
    assert by_role == {"context": 1.0, "assistant": 0.5, "user": 0.75, "outcome": 0.25, "end": 1.0}


def test_what_each_role_may_write():
    words = set(range(pr.FIRST_PIECE, pr.FIRST_PIECE + 8))
    numbers = set(range(pr.NUMBER, pr.NUMBER + pr.LARGEST_NUMBER + 1))
    allowed = {name: set(np.flatnonzero(row)) for name, row in zip(pr.ROLES, CHAT.allowed_RV, strict=True)}
    assert allowed["assistant"] == words - {pr.FIRST_PIECE + 7} | {pr.TO_USER}  # no unknown word, no end
    assert allowed["user"] == words - {pr.FIRST_PIECE + 7} | {pr.TO_ASSISTANT, pr.STOP, pr.LEAVE}
    assert allowed["outcome"] == set()
    assert allowed["end"] == {pr.PAD}
    allowed = {name: set(np.flatnonzero(row)) for name, row in zip(pr.ROLES, DEAL.allowed_RV, strict=True)}
    assert allowed["assistant"] == words | {pr.TO_USER, pr.TO_OUTCOME}
    assert allowed["user"] == words | {pr.TO_ASSISTANT, pr.TO_OUTCOME}
    assert allowed["outcome"] == numbers | {pr.NO_DEAL, pr.STOP}
    assert numbers < set(range(pr.FIRST_PIECE)) and max(numbers) == pr.FIRST_PIECE - 1


def test_who_speaks_next():
    for protocol in (CHAT, DEAL):
        switch = protocol.switch_RV
        assert switch[pr.ASSISTANT, pr.TO_USER] == switch[pr.CONTEXT, pr.TO_USER] == pr.USER
        assert switch[pr.USER, pr.TO_ASSISTANT] == switch[pr.CONTEXT, pr.TO_ASSISTANT] == pr.ASSISTANT
        assert switch[pr.ASSISTANT, pr.TO_ASSISTANT] == pr.ASSISTANT and switch[pr.USER, pr.TO_USER] == pr.USER
        assert (switch[:, [pr.PAD, pr.STOP, pr.LEAVE]] == pr.END).all() and (switch[pr.END] == pr.END).all()
        assert (switch[:, pr.FIRST_PIECE :] == np.arange(len(pr.ROLES))[:, None]).all()
    assert (CHAT.switch_RV[:, pr.TO_OUTCOME] != pr.OUTCOME).sum() == len(pr.ROLES) - 1  # only of OUTCOME itself
    assert (DEAL.switch_RV[[pr.ASSISTANT, pr.USER], pr.TO_OUTCOME] == pr.OUTCOME).all()


def test_handovers():
    handover = [set(np.flatnonzero(row)) for row in CHAT.handover_RV]
    assert handover[pr.ASSISTANT] == {pr.TO_USER}
    assert handover[pr.USER] == {pr.TO_ASSISTANT, pr.STOP, pr.LEAVE}
    handover = [set(np.flatnonzero(row)) for row in DEAL.handover_RV]
    assert handover[pr.ASSISTANT] == {pr.TO_USER, pr.TO_OUTCOME}
    assert handover[pr.OUTCOME] == {pr.STOP}


def test_on_the_last_token_of_a_budget_only_handovers_are_left():
    role = jnp.array([pr.ASSISTANT, pr.ASSISTANT, pr.ASSISTANT, pr.OUTCOME, pr.OUTCOME, pr.END])
    place = jnp.array([2, 3, 9, 2, 3, 1000])
    may = np.asarray(pr.may_write(DEAL, role, place))
    assert (may[0] == DEAL.allowed_RV[pr.ASSISTANT]).all()
    for row in (1, 2):
        assert set(np.flatnonzero(may[row])) == {pr.TO_USER, pr.TO_OUTCOME}
    assert (may[3] == DEAL.allowed_RV[pr.OUTCOME]).all()
    assert set(np.flatnonzero(may[4])) == {pr.STOP}
    assert set(np.flatnonzero(may[5])) == {pr.PAD}


def test_place_in_turn():
    turn_BT = jnp.array([[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]], jnp.int16)
    assert pr.place_in_turn(turn_BT).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


def test_the_mirror_is_an_involution_that_swaps_the_two_speakers():
    V = DEAL.vocab_size
    assert (DEAL.mirror_V[DEAL.mirror_V] == np.arange(V)).all()
    swap = np.array([pr.CONTEXT, pr.USER, pr.ASSISTANT, pr.OUTCOME, pr.END])
    assert (DEAL.switch_RV[swap][:, DEAL.mirror_V] == swap[DEAL.switch_RV]).all()
    assert (DEAL.allowed_RV[swap][:, DEAL.mirror_V] == DEAL.allowed_RV).all()
    assert (DEAL.mirror_V != np.arange(V)).sum() == 2


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="use 'chat' or 'negotiation'"):
        pr.make_protocol("monologue", 40)
