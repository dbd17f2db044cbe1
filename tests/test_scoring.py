"""Scores of given dialogues, against sums over the vocabulary written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import dialogue, largest_difference, noisy, norm, random_dialogues, world

from mbrl_lm import protocol as pr
from mbrl_lm import scoring

W = world("chat", model__layers=1)
REFERENCE = noisy(W.params, 6)
TEMPERATURE = np.array([1.0, 0.6, 1.5, 0.8, 1.0], np.float32)
REAL = random_dialogues(W.protocol, 1, 4, 24)


def scored(params, d, reference=REFERENCE):
    return scoring.score(W.net, W.protocol, params, d, temperature=TEMPERATURE, reference=reference)


def sampling_logp(logits_BTV, d, b, t):
    """Log-probabilities of the sampling distribution of the token at t of row b, from scratch; -inf where not allowed."""
    logits_V = np.array(logits_BTV[b, t - 1], np.float64)
    role, turn = int(d.author_BT[b, t]), d.turn_BT[b]
    last = (turn[:t] == turn[t]).sum() == W.protocol.budget_R[role] - 1
    logits_V = logits_V / TEMPERATURE[role]
    logits_V[~(W.protocol.handover_RV if last else W.protocol.allowed_RV)[role]] = -np.inf
    return logits_V - np.log(np.exp(logits_V).sum()), bool(last)


def test_scores_by_hand():
    s = jax.jit(scored)(W.params, REAL)
    forward, seen_last = jax.jit(W.net.forward), 0
    own_BTV, reference_BTV = (np.asarray(forward(p, REAL.token_BT).logits_BTV) for p in (W.params, REFERENCE))
    s = jax.tree.map(np.asarray, s)
    for b, t in zip(*np.nonzero((REAL.author_BT == pr.ASSISTANT) | (REAL.author_BT == pr.USER)), strict=True):
        own_V, last = sampling_logp(own_BTV, REAL, b, t)
        reference_V, _ = sampling_logp(reference_BTV, REAL, b, t)
        p_V, token, seen_last = np.exp(own_V), REAL.token_BT[b, t], seen_last + last
        some_V = p_V > 0
        np.testing.assert_allclose(s.logp_BT[b, t], own_V[token], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(s.reference_logp_BT[b, t], reference_V[token], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(s.entropy_BT[b, t], -(p_V[some_V] * own_V[some_V]).sum(), rtol=1e-4, atol=1e-5)
        kl = (p_V[some_V] * (own_V[some_V] - reference_V[some_V])).sum()
        np.testing.assert_allclose(s.kl_BT[b, t], kl, rtol=1e-3, atol=1e-5)
        assert bool(s.likeliest_BT[b, t]) == (token == own_V.argmax()) and s.allowed_BT[b, t]
    assert seen_last > 3 and s.kl_BT.max() > 0.1
    for x in (s.nll_BT, s.logp_BT, s.entropy_BT, s.kl_BT):
        assert not x[:, 0].any()


def test_there_is_no_divergence_from_itself_and_none_without_a_reference():
    own = jax.jit(lambda p, d: scored(p, d, p))(W.params, REAL)
    none = jax.jit(lambda p, d: scored(p, d, None))(W.params, REAL)
    assert float(jnp.max(jnp.abs(own.kl_BT))) < 1e-6
    assert largest_difference(own.logp_BT, own.reference_logp_BT) < 1e-6
    assert not none.kl_BT.any() and not none.reference_logp_BT.any()
    assert largest_difference(own.nll_BT, none.nll_BT) < 1e-6


def test_the_slow_parameters_are_a_second_reference():
    both = jax.jit(lambda r: scoring.score(W.net, W.protocol, W.params, REAL, reference=W.params, slow=r))(REFERENCE)
    one = jax.jit(lambda r: scoring.score(W.net, W.protocol, W.params, REAL, reference=r))(REFERENCE)
    assert largest_difference(both.slow_kl_BT, one.kl_BT) < 1e-6 and float(jnp.max(one.kl_BT)) > 0.1
    assert float(jnp.max(jnp.abs(both.kl_BT))) < 1e-6 and not one.slow_kl_BT.any()


@pytest.mark.parametrize("chunk_logits", [1, 4 * 6 * 27])
def test_chunks_change_neither_values_nor_gradients(chunk_logits, monkeypatch):
    """One token at a time, and six."""

    def total(params):
        s = scored(params, REAL)
        return jnp.sum(s.nll_BT) + jnp.sum(s.logp_BT**2) + jnp.sum(s.kl_BT) + jnp.sum(s.entropy_BT), s

    whole = jax.jit(jax.value_and_grad(total, has_aux=True))(W.params)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", chunk_logits)
    parts = jax.jit(jax.value_and_grad(lambda p: total(p), has_aux=True))(W.params)  # traced anew
    assert largest_difference(whole[0][1], parts[0][1]) < 1e-5
    assert largest_difference(whole[1], parts[1]) < 1e-5 * norm(whole[1])


def test_what_the_protocol_forbids_has_a_likelihood_but_no_policy_gradient():
    d = dialogue(W.protocol, ["bos a >a b stop", "bos a >a b c d e f >u"])  # the assistant hangs up; a turn over its budget
    s = jax.jit(scored)(W.params, d)
    forbidden = [(0, 4), (1, 6), (1, 7)]
    for b, t in forbidden:
        assert not s.allowed_BT[b, t] and s.logp_BT[b, t] == 0 and s.reference_logp_BT[b, t] == 0 and s.nll_BT[b, t] > 0
    assert s.allowed_BT[0, 3] and s.allowed_BT[1, 8]
    at = np.zeros(d.token_BT.shape, bool)
    at[tuple(zip(*forbidden, strict=True))] = True
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.where(at, scored(p, d).logp_BT, 0))))(W.params)
    assert norm(gradient) == 0


def test_nothing_flows_into_the_reference():
    gradient = jax.jit(jax.grad(lambda r: jnp.sum(scored(W.params, REAL, r).kl_BT)))(REFERENCE)
    assert norm(gradient) == 0
