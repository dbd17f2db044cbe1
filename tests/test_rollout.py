"""The token loop with one view: it writes what `score` reads, and each row by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TURN_TOKENS, dialogue, largest_difference, noisy, random_dialogues, take, tokens, world

from mbrl_lm import protocol as pr
from mbrl_lm import rollout
from mbrl_lm.scoring import policy_logits, score
from mbrl_lm.turns import openings

T, B = 24, 20
TEMPERATURE = np.array([1.0, 0.6, 1.5, 0.8, 1.0], np.float32)  # by role


@functools.cache
def writer(kind: str, turns: int = 99, T: int = T):
    """imagine(params, prompt, seed, temperature) of a tiny network, compiled."""
    w = world(kind, seed=3, model__layers=1)

    def write(params, prompt, seed, temperature):
        key = jax.random.key(seed)
        return rollout.imagine(w.net, w.protocol, params, prompt, key, tokens=T, turns=turns, temperature=temperature)

    return w, jax.jit(write)


@functools.cache
def ragged(kind: str, P: int = 12):
    """Prompts of 3 to P tokens that end anywhere, also inside a turn."""
    protocol = writer(kind)[0].protocol
    whole = random_dialogues(protocol, 5, B, P)
    length_B = np.minimum((whole.author_BT != pr.END).sum(axis=1), np.random.default_rng(2).integers(3, P + 1, B))
    return jax.device_get(rollout.prefix(protocol, whole, length_B)), length_B


@pytest.fixture(params=["chat", "negotiation"])
def imagined(request):
    w, write = writer(request.param)
    prompt, length_B = ragged(request.param)
    return w, prompt, length_B, write(w.params, prompt, 0, TEMPERATURE)


def test_log_probabilities_are_those_of_score(imagined):
    w, _, _, out = imagined
    scores = jax.jit(lambda p, d, t: score(w.net, w.protocol, p, d, temperature=t))(w.params, out, TEMPERATURE)
    assert scores.allowed_BT[np.asarray(out.sampled_BT)].all()
    assert largest_difference(jnp.where(out.sampled_BT, scores.logp_BT, 0), out.logp_BT) < 2e-5
    roles = np.asarray(out.author_BT)[np.asarray(out.sampled_BT)]
    assert {pr.ASSISTANT, pr.USER} <= set(roles.tolist())
    plain = jax.jit(lambda p, d: score(w.net, w.protocol, p, d))(w.params, out)
    for role in set(roles.tolist()) - {pr.CONTEXT}:  # the temperature of every role matters
        here_BT = out.sampled_BT & (out.author_BT == role)
        assert float(jnp.max(jnp.where(here_BT, jnp.abs(plain.logp_BT - out.logp_BT), 0))) > 1e-2


def test_authors_and_turns_are_the_parsed_ones(imagined):
    w, _, _, out = imagined
    out.check()
    author_BT, turn_BT = pr.parse(w.protocol, out.token_BT)
    assert (out.author_BT == author_BT).all() and (out.turn_BT == turn_BT).all()


def test_prompts_stay_and_exactly_what_follows_is_sampled(imagined):
    _, prompt, length_B, out = imagined
    given_BT = np.arange(T)[None] < length_B[:, None]
    P = prompt.token_BT.shape[1]
    assert (np.asarray(out.token_BT)[:, :P] == prompt.token_BT)[given_BT[:, :P]].all()
    assert (out.sampled_BT == (~given_BT & (out.author_BT != pr.END))).all()
    assert (np.asarray(out.logp_BT)[~np.asarray(out.sampled_BT)] == 0).all()
    assert len(set(length_B.tolist())) > 3 and out.sampled_BT.sum() > 2 * B
    assert (out.uid_B == prompt.uid_B).all() and (out.cut_B == ~out.ended_B).all()


def test_rows_run_until_they_end_or_the_tokens_do(imagined):
    w, _, length_B, out = imagined
    last_B = np.asarray(out.author_BT != pr.END).sum(axis=1) - 1
    final = np.asarray(out.token_BT)[np.arange(B), last_B]
    ends = np.isin(final, [pr.STOP, pr.LEAVE])
    assert ((last_B == T - 1) | ends).all() and (np.asarray(out.ended_B) == ends).all()
    assert ends.sum() >= 2 and (last_B[ends] < T - 1).any()
    after_BT = np.arange(T)[None] > last_B[:, None]
    assert (np.asarray(out.token_BT)[after_BT] == pr.PAD).all() and not np.asarray(out.sampled_BT)[after_BT].any()


def test_no_turn_outruns_its_budget(imagined):
    w, _, _, out = imagined
    place_BT, author_BT = np.asarray(pr.place_in_turn(out.turn_BT)), np.asarray(out.author_BT)
    spoken_BT = (author_BT == pr.ASSISTANT) | (author_BT == pr.USER)
    assert place_BT[spoken_BT].max() == TURN_TOKENS - 1
    last_BT = spoken_BT & (place_BT == TURN_TOKENS - 1)
    assert w.protocol.handover_RV[author_BT[last_BT], np.asarray(out.token_BT)[last_BT]].all()


def test_a_row_alone_is_the_row_in_a_batch(imagined):
    w, prompt, _, out = imagined
    write = writer("chat" if w is writer("chat")[0] else "negotiation")[1]
    order = np.random.default_rng(0).permutation(B)
    shuffled = write(w.params, take(prompt, order), 0, TEMPERATURE)
    chosen = np.array([7, 2])
    few = write(w.params, take(prompt, chosen), 0, TEMPERATURE)
    for same, index in ((shuffled, order), (few, chosen)):
        assert (same.token_BT == out.token_BT[index]).all()
        assert largest_difference(same.logp_BT, out.logp_BT[index]) < 1e-5
    other = write(w.params, prompt.replace(uid_B=prompt.uid_B + 100), 0, TEMPERATURE)
    later = write(w.params, prompt, 1, TEMPERATURE)
    assert (other.token_BT != out.token_BT).any() and (later.token_BT != out.token_BT).any()


@pytest.mark.parametrize("turns", [2, 99])
@pytest.mark.parametrize("copies, rows", [(1, 2), (2, 4), (4, 4)])
def test_what_is_written_does_not_hang_on_how_many_rows_are_written_at_once(imagined, monkeypatch, turns, copies, rows):
    w, prompt, _, _ = imagined
    steps = []  # rows of each one

    def step(params, token_B, *rest):
        jax.debug.callback(functools.partial(steps.append, len(token_B)))
        return w.net.step(params, token_B, *rest)

    def write():
        view = rollout.copied(prompt, copies)  # the user has a row of its own for every copy
        settings = {"tokens": T, "turns": turns, "temperature": TEMPERATURE, "copies": copies, "user_view": view}
        return rollout.imagine(w.net._replace(step=step), w.protocol, w.params, prompt, jax.random.key(0), **settings)

    written = []
    for at_once in (B * copies, rows):
        monkeypatch.setattr(rollout, "AT_ONCE_ON_CPU", 2 * at_once)  # of both views
        written.append(write())
        jax.effects_barrier()
        assert set(steps) == {at_once}
        steps.clear()
    together, apart = written
    assert largest_difference(together.logp_BT, apart.logp_BT) < 1e-5
    for name in ("token_BT", "author_BT", "turn_BT", "sampled_BT", "ended_B", "cut_B", "uid_B"):
        np.testing.assert_array_equal(getattr(together, name), getattr(apart, name), err_msg=name)


def test_a_prompt_may_be_as_wide_as_the_result(imagined):
    w, prompt, _, out = imagined
    write = writer("chat" if w is writer("chat")[0] else "negotiation")[1]
    text = [row[row != pr.PAD].tolist() for row in prompt.token_BT]
    wide = write(w.params, dialogue(w.protocol, text, T=T, ended=[False] * B), 0, TEMPERATURE)
    assert (wide.token_BT == out.token_BT).all() and largest_difference(wide.logp_BT, out.logp_BT) < 1e-5


@pytest.mark.parametrize("turns", [1, 2])
def test_a_limit_on_turns_cuts_rows_after_that_many(turns):
    w, whole = writer("chat")
    prompt, length_B = ragged("chat")
    out, free = writer("chat", turns)[1](w.params, prompt, 0, TEMPERATURE), whole(w.params, prompt, 0, TEMPERATURE)
    switch = np.asarray(w.protocol.switch_RV)
    for b in range(B):
        row, author = np.asarray(free.token_BT[b]), np.asarray(free.author_BT[b])
        taken, end = 0, T
        for t in range(length_B[b], T):
            after = switch[author[t], row[t]]
            taken += after != author[t] and after in (pr.ASSISTANT, pr.USER)
            if taken == turns:
                end = t + 1
                break
        assert out.token_BT[b].tolist() == row[:end].tolist() + [pr.PAD] * (T - end)
    assert (out.cut_B & (out.author_BT[:, -1] == pr.END)).any()


def test_rows_that_have_ended_stay_as_they_are():
    w, write = writer("chat")
    texts = ["bos a >u b stop", "bos a >u b >a", "bos a >u b leave", "bos >a"]
    prompt = dialogue(w.protocol, texts, T=12, ended=[True, True, False, False])
    out = write(w.params, prompt, 0, TEMPERATURE)
    for b in range(3):
        assert out.token_BT[b].tolist() == tokens(texts[b]) + [pr.PAD] * (T - len(texts[b].split()))
        assert not out.sampled_BT[b].any()
    assert out.sampled_BT[3].any() and out.ended_B[0] and out.ended_B[2]


def test_no_parameters_are_needed_where_all_rows_have_ended():
    w, write = writer("chat")
    prompt = dialogue(w.protocol, ["bos a >u b stop"] * B, T=12)
    out = write(jax.tree.map(lambda x: x * jnp.nan, w.params), prompt, 0, TEMPERATURE)
    assert not out.logp_BT.any() and not out.sampled_BT.any()


def test_sampling_follows_the_softmax():
    rows, texts = 4000, ["bos a b >u c d >a", "bos a b >u"]
    w, write = writer("chat", T=8)
    for text in texts:
        prompt = dialogue(w.protocol, [text] * rows, T=len(text.split())).replace(uid_B=np.arange(rows, dtype=np.uint32))
        t = len(text.split())
        token_B = np.asarray(write(w.params, prompt, 3, TEMPERATURE).token_BT[:, t])
        logits_BV = w.net.forward(w.params, prompt.token_BT[:1]).logits_BTV[:, -1]
        role_B = jnp.array([pr.ASSISTANT if text.endswith(">a") else pr.USER])
        logits_BV = policy_logits(w.protocol, logits_BV, role_B, jnp.zeros(1, jnp.int32), TEMPERATURE)
        expected_V = rows * np.asarray(jax.nn.softmax(logits_BV[0]))
        count_V, likely_V = np.bincount(token_B, minlength=len(expected_V)), expected_V > 5
        assert not count_V[expected_V == 0].any() and likely_V.sum() >= 4
        chi_square = ((count_V - expected_V) ** 2 / np.maximum(expected_V, 1e-9))[likely_V].sum()
        assert chi_square < likely_V.sum() + 5 * (2 * likely_V.sum()) ** 0.5


def test_prompts_from_an_opening_end_where_the_assistant_is_about_to_speak():
    protocol = writer("chat")[0].protocol
    whole = random_dialogues(protocol, 8, 40, T)
    prompt = jax.jit(lambda d, k: rollout.from_an_opening(protocol, d, k))(whole, jax.random.key(0))
    length_B = np.asarray(rollout.prompt_lengths(prompt))
    has_B = (whole.token_BT == pr.TO_ASSISTANT).any(axis=1)
    assert has_B.any() and not has_B.all() and (np.asarray(prompt.ended_B) == ~has_B).all()
    last_B = np.asarray(prompt.token_BT)[np.arange(40), length_B - 1]
    assert (last_B[has_B] == pr.TO_ASSISTANT).all()
    kept_BT = np.arange(T)[None] < length_B[:, None]
    assert (np.asarray(prompt.token_BT) == np.where(kept_BT, whole.token_BT, pr.PAD)).all()
    assert not prompt.reward_BU.any()


def test_some_of_the_prompts_end_where_the_assistant_first_speaks():
    protocol = writer("chat")[0].protocol
    whole = random_dialogues(protocol, 8, 400, T)
    opens_BT = np.asarray(openings(protocol, whole))
    several_B = opens_BT.sum(axis=1) > 1
    firsts = []
    for share in (0.0, 0.5, 1.0):
        prompt = rollout.from_an_opening(protocol, whole, jax.random.key(0), share)
        first_B = np.asarray(rollout.prompt_lengths(prompt)) == np.argmax(opens_BT, axis=1) + 1
        firsts.append(first_B[several_B].mean())
    assert firsts[2] == 1 and abs(firsts[1] - (1 + firsts[0]) / 2) < 0.1 and firsts[0] < 0.6


def test_it_reads_its_parameters():
    w, write = writer("chat")
    prompt, _ = ragged("chat")
    a, b = (write(p, prompt, 0, TEMPERATURE) for p in (w.params, noisy(w.params, 9)))
    assert (a.token_BT != b.token_BT).any()


def test_other_parameters_may_speak_for_the_user():
    """Each side's tokens have the log-probabilities of its own parameters, and both have read all tokens."""
    w, write = writer("chat")
    prompt, _ = ragged("chat")
    theirs = noisy(w.params, 9, 0.5)

    def talk(user):
        settings = {"tokens": T, "turns": 99, "temperature": TEMPERATURE, "user": user}
        return rollout.imagine(w.net, w.protocol, w.params, prompt, jax.random.key(0), **settings)

    out = jax.device_get(jax.jit(talk)(theirs))
    scores = {
        role: jax.jit(lambda p: score(w.net, w.protocol, p, out, temperature=TEMPERATURE))(params).logp_BT
        for role, params in ((pr.ASSISTANT, w.params), (pr.USER, theirs))
    }
    for role, logp_BT in scores.items():
        here_BT = out.sampled_BT & (out.author_BT == role)
        assert here_BT.sum() > 20 and largest_difference(logp_BT[here_BT], out.logp_BT[here_BT]) < 1e-4
    assert (jax.device_get(write(w.params, prompt, 0, TEMPERATURE)).token_BT != out.token_BT).any()
    assert (out.author_BT == np.asarray(pr.parse(w.protocol, out.token_BT)[0])).all()
