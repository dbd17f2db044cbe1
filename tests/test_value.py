"""Returns over turns and two-hot regression, against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_lm import value

CENTRES = value.bin_centres(5, float(np.log(3)))  # symexp of -log 3, -log 3 / 2, 0, ...: -2, -0.732, 0, 0.732, 2


def returns(r, next_v, discount, mask, lambda_, ratio=None):
    arrays = [jnp.array(x, jnp.float32) for x in (r, next_v, discount)]
    ratio = None if ratio is None else jnp.array(ratio, jnp.float32)
    return np.asarray(value.lambda_returns(*arrays, jnp.array(mask, bool), lambda_, ratio))


def test_bin_centres():
    half = 3**0.5 - 1
    np.testing.assert_allclose(CENTRES, [-2, -half, 0, half, 2], atol=1e-6)
    many = value.bin_centres(51, 3.0)
    assert many[25] == 0 and (many == -many[::-1]).all() and (np.diff(many) > 0).all()
    np.testing.assert_allclose(many[-1], np.e**3 - 1, rtol=1e-5)
    with pytest.raises(ValueError, match="odd"):
        value.bin_centres(50, 3.0)


def test_two_hot():
    half = 3**0.5 - 1
    hot = value.two_hot(jnp.array([0.0, half / 4, -half, 2.0, 7.0, -7.0, (half + 2) / 2]), CENTRES)
    expected = [
        [0, 0, 1, 0, 0],
        [0, 0, 0.75, 0.25, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0.5, 0.5],
    ]
    np.testing.assert_allclose(hot, expected, atol=1e-6)


def test_the_mean_of_two_hot_is_the_number():
    centres = value.bin_centres(51, 3.0)
    x = jnp.linspace(-19, 19, 301).reshape(7, 43)
    np.testing.assert_allclose(value.mean(jnp.log(value.two_hot(x, centres)), centres), x, atol=1e-4)


@pytest.mark.parametrize("bins", [5, 11, 51, 255])
@pytest.mark.parametrize("logit", [0.0, 0.3, -4.7])
def test_the_mean_of_equal_logits_is_exactly_zero(bins, logit):
    centres = value.bin_centres(bins, 3.0)
    for mean in (value.mean, jax.jit(lambda x, c: value.mean(x, centres))):
        assert (mean(jnp.full((3, 2, bins), logit), centres) == 0).all()


def test_cross_entropy():
    logits = jnp.array([[0.0, 1.0, 2.0, 3.0, 4.0]])
    p = np.exp(np.arange(5.0)) / np.exp(np.arange(5.0)).sum()
    half = 3**0.5 - 1
    expected = -(0.75 * np.log(p[2]) + 0.25 * np.log(p[3]))
    np.testing.assert_allclose(value.cross_entropy(logits, jnp.array([half / 4]), CENTRES), [expected], rtol=1e-5)
    assert jax.grad(lambda x: value.cross_entropy(logits, x, CENTRES).sum())(jnp.array([half / 4])) == 0


def test_lambda_returns_by_hand():
    # R_2 = 4 + 0.5 * 10 = 9;  R_1 = 2 + 0.5 (0.75 * 6 + 0.25 * 9) = 5.375;  R_0 = 1 + 0.5 (0.75 * 8 + 0.25 * 5.375)
    r = returns([1, 2, 4], [8, 6, 10], [0.5] * 3, [1, 1, 1], 0.25)
    np.testing.assert_allclose(r, [4.671875, 5.375, 9.0])


def test_lambda_one_is_discounted_monte_carlo():
    r = returns([1, 2, 4], [100, 100, 100], [0.5, 0.5, 0], [1, 1, 1], 1.0)
    np.testing.assert_allclose(r, [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4])


def test_lambda_zero_is_one_step():
    r = returns([1, 2, 4], [8, 6, 10], [0.5, 0.5, 0], [1, 1, 1], 0.0)
    np.testing.assert_allclose(r, [5, 5, 4])


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_a_truncation_keeps_its_bootstrap_and_a_true_end_drops_it(lambda_):
    cut = returns([1, 1, 0], [0, 10, 77], [0.5] * 3, [1, 1, 0], lambda_)
    ended = returns([1, 1, 0], [0, 10, 77], [0.5, 0, 0.5], [1, 1, 0], lambda_)
    np.testing.assert_allclose(cut, [1 + 0.5 * lambda_ * 6, 6, 0])
    np.testing.assert_allclose(ended, [1 + 0.5 * lambda_ * 1, 1, 0])


@pytest.mark.parametrize("start", [0, 1])
def test_lambda_returns_are_the_weighted_sum_of_n_step_returns(start):
    rng = np.random.default_rng(0)
    r, v, g, lambda_, n = rng.normal(size=6), rng.normal(size=6), rng.uniform(0.5, 1, 6), 0.8, 6
    n_step = []
    for last in range(start, n):
        weight, total = 1.0, 0.0
        for u in range(start, last + 1):
            total, weight = total + weight * r[u], weight * g[u]
        n_step.append(total + weight * v[last])
    weights = [(1 - lambda_) * lambda_**k for k in range(n - start - 1)] + [lambda_ ** (n - start - 1)]
    np.testing.assert_allclose(returns(r, v, g, [1] * 6, lambda_)[start], np.dot(weights, n_step), rtol=1e-5)


def test_what_followed_counts_as_far_as_the_policy_would_have_followed():
    # R_2 = 4 + 0.5 * 10 = 9;  R_1 = 2 + 0.5 (6 + 0.5 * 0.25 (9 - 6)) = 5.1875;  R_0 = 1 + 0.5 (8 + 0.5 * 0.75 (5.1875 - 8))
    r = returns([1, 2, 4], [8, 6, 10], [0.5] * 3, [1, 1, 1], 0.5, [0.1, 0.75, 0.25])
    np.testing.assert_allclose(r, [4.47265625, 5.1875, 9.0])
    one = returns([1, 2, 4], [8, 6, 10], [0.5] * 3, [1, 1, 1], 0.5, [1.0] * 3)
    assert one.tolist() == returns([1, 2, 4], [8, 6, 10], [0.5] * 3, [1, 1, 1], 0.5).tolist()


def test_vtrace_is_the_recursion_of_its_source():
    rng = np.random.default_rng(1)
    r, g, ratio, lambda_ = rng.normal(size=5), rng.uniform(0.5, 1, 5), rng.uniform(0, 1, 5), 0.8
    v = rng.normal(size=6)  # of the states 0 ... 5
    target = np.append(np.zeros(5), v[5])
    for u in reversed(range(5)):
        delta = ratio[u] * (r[u] + g[u] * v[u + 1] - v[u])
        target[u] = v[u] + delta + g[u] * lambda_ * ratio[u] * (target[u + 1] - v[u + 1])
    return_U = returns(r, v[1:], g, [1] * 5, lambda_, ratio)
    found = value.vtrace(*(jnp.asarray(x, jnp.float32) for x in (return_U, v[:5], ratio)))
    np.testing.assert_allclose(found, target[:5], rtol=1e-4)


def test_turns_that_are_no_transitions_have_no_return_and_are_not_seen():
    a = returns([1, 5, 3], [2, 5, 3], [0.5] * 3, [1, 0, 0], 0.9)
    b = returns([1, 7, 9], [2, -4, 1], [0.5] * 3, [1, 0, 0], 0.9)
    assert (a == b).all() and a.tolist() == [2.0, 0, 0]


def test_return_range():
    x = jnp.arange(101.0).reshape(1, 101)
    np.testing.assert_allclose(value.return_range(x, x >= 0), [5, 95], atol=1e-4)
    np.testing.assert_allclose(value.return_range(x, x >= 50), [52.5, 97.5], atol=1e-4)
    assert [float(y) for y in value.return_range(x, x < 0)] == [0, 0]
