"""The network: one function however it is computed, causal, and neutral where it has learnt nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of, largest_difference, noisy, tokens, world

from mbrl_lm import protocol as pr
from mbrl_lm.nn import make_net
from mbrl_lm.nn.layers import Tracker
from mbrl_lm.nn.transformer import turn_marks

SHAPES = [
    {
        "model__scan_layers": False,
        "model__conv_width": 3,
        "model__kv_heads": 2,
        "model__tied": True,
        "model__tracked": True,
    },
    {
        "model__scan_layers": True,
        "model__conv_width": 3,
        "model__kv_heads": 1,
        "model__tied": False,
        "model__speakers": True,
        "model__tracked": True,
    },
    {"model__scan_layers": False, "model__conv_width": 1, "model__kv_heads": 4, "model__tied": False},
    {"model__scan_layers": True, "model__conv_width": 1, "model__kv_heads": 2, "model__tied": True, "model__match_taps": 0},
]
TOKENS = np.random.default_rng(0).integers(0, 27, (3, 12)).astype(np.int32)
TOKENS[0, :6] = pr.WANTED, 25, pr.OTHERS, pr.TO_USER, pr.OTHERS, 25  # a user's own view


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_equals_forward(shape):
    w = world(**shape)
    whole = jax.jit(w.net.forward)(w.params, TOKENS)
    decode = jax.jit(w.net.decode_step)
    prompt = 5
    # The prompt is read with garbage after it, and the cache is longer than the text: neither may matter.
    rubbish = np.concatenate([TOKENS[:, :prompt], 3 + 0 * TOKENS[:, prompt : prompt + 3]], axis=1)
    cache = jax.jit(w.net.prefill)(w.params, rubbish, w.net.init_cache(3, 16))
    for t in range(prompt - 1, TOKENS.shape[1]):
        heads, cache = decode(w.params, TOKENS[:, t], t, cache)
        assert largest_difference(heads, jax.tree.map(lambda x, t=t: x[:, t], whole)) < 2e-5


def test_decode_from_nothing_equals_forward():
    w = world(**SHAPES[0])
    whole = jax.jit(w.net.forward)(w.params, TOKENS)
    decode, cache = jax.jit(w.net.decode_step), w.net.init_cache(3, 16)
    for t in range(6):
        heads, cache = decode(w.params, TOKENS[:, t], t, cache)
        assert largest_difference(heads, jax.tree.map(lambda x, t=t: x[:, t], whole)) < 2e-5


def test_scanned_layers_equal_unrolled_ones():
    unrolled, scanned = world(model__scan_layers=False), world(model__scan_layers=True)
    params = dict(unrolled.params)
    params["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), params.pop("blocks_0"), params.pop("blocks_1"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, dict(scanned.params))
    a = jax.jit(unrolled.net.forward)(unrolled.params, TOKENS)
    assert largest_difference(a, jax.jit(scanned.net.forward)(params, TOKENS)) < 1e-5
    assert float(jnp.std(a.logits_BTV)) > 0.1


@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_neither_values_nor_gradients(scan):
    plain = world(model__scan_layers=scan)
    remat = make_net(config_of(model__scan_layers=scan, model__remat=True).model, plain.protocol.vocab_size)

    def value_and_gradient(net):
        def total(params):
            return jnp.sum(jnp.sin(net.forward(params, TOKENS).logits_BTV))

        return jax.jit(jax.value_and_grad(total))(plain.params)

    a, b = value_and_gradient(plain.net), value_and_gradient(remat)
    assert largest_difference(a, b) < 2e-4 * float(jnp.max(jnp.abs(a[1]["embed_VD"])))
    program = str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(remat.trunk(p, TOKENS))))(plain.params))
    assert "remat" in program or "checkpoint" in program


def test_nothing_before_a_token_sees_it():
    w = world()
    forward = jax.jit(w.net.forward)
    whole = forward(w.params, TOKENS)
    for t in (0, 4, 11):
        other = TOKENS.copy()
        other[:, t] = (other[:, t] + 5) % 27
        changed = forward(w.params, other)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(changed), strict=True):
            assert (a[:, :t] == b[:, :t]).all()
            assert a.size == 0 or float(jnp.min(jnp.max(jnp.abs(a[:, t] - b[:, t]), axis=0))) > 0
        if t < 11:
            assert float(jnp.max(jnp.abs(whole.logits_BTV[:, -1] - changed.logits_BTV[:, -1]))) > 1e-4


def test_padding_and_other_rows_change_nothing():
    w = world()
    forward = jax.jit(w.net.forward)
    wide = np.pad(TOKENS, ((0, 1), (0, 4)))
    cut = jax.tree.map(lambda x: x[:3, :12], forward(w.params, wide))
    assert largest_difference(cut, forward(w.params, TOKENS)) < 1e-5


def test_bfloat16_trunk_with_float32_heads():
    w = world()
    net = make_net(config_of(model__dtype="bfloat16").model, w.protocol.vocab_size)
    assert jax.eval_shape(net.trunk, w.params, TOKENS).dtype == jnp.bfloat16
    heads, cache = jax.jit(net.forward)(w.params, TOKENS), net.init_cache(3, 16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(heads))
    assert all(x.dtype in (jnp.bfloat16, jnp.int32) for x in jax.tree.leaves(cache))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))
    exact = jax.jit(w.net.forward)(w.params, TOKENS)
    error = jnp.max(jnp.abs(heads.logits_BTV - exact.logits_BTV))
    assert 1e-4 < float(error) < 0.1 * float(jnp.max(jnp.abs(exact.logits_BTV)))


def test_heads_start_exactly_neutral():
    net = make_net(config_of().model, 27)
    heads = jax.jit(net.forward)(jax.jit(net.init)(jax.random.key(3)), TOKENS)
    assert not any(x.any() for x in (heads.value_BTEW, heads.reward_BTW, heads.end_BT, heads.real_BT))
    assert float(jnp.std(heads.logits_BTV)) > 0.1


def test_dropout_is_on_exactly_when_a_key_is_given():
    w = world(model__dropout=0.3)
    none = world(model__dropout=0.0)
    trunk = jax.jit(w.net.trunk)
    plain = jax.jit(none.net.trunk)(w.params, TOKENS)
    assert largest_difference(trunk(w.params, TOKENS), plain) < 1e-5
    a, b = (trunk(w.params, TOKENS, jax.random.key(k)) for k in (0, 1))
    assert largest_difference(a, trunk(w.params, TOKENS, jax.random.key(0))) == 0
    assert largest_difference(a, b) > 0.1 and largest_difference(a, plain) > 0.1
    assert largest_difference(jax.jit(none.net.trunk)(w.params, TOKENS, jax.random.key(0)), plain) == 0


def test_noise_reaches_every_parameter():
    net = make_net(config_of().model, 27)
    params = jax.jit(net.init)(jax.random.key(0))
    gaps = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), params, noisy(params))
    assert min(jax.tree.leaves(gaps)) > 0.01


def test_every_channel_begins_with_a_mixture_of_neighbours_of_its_own():
    taps = [x for path, x in jax.tree_util.tree_leaves_with_path(world(model__conv_width=3).params) if "tap_XD" in str(path)]
    assert taps and all(np.std(x, axis=1).min() > 0.3 and abs(np.mean(x)) < 0.3 for x in taps)


def test_what_has_been_said_is_summed_by_hand():
    """Open gates, and codes that are the tokens themselves: a user's a, b, the assistant's b, then a new turn of its own."""
    cfg = config_of(model__heads=2, model__kv_heads=2, model__width=4).model
    code_BTXC = jnp.zeros((1, 5, 2, 3)).at[0, jnp.arange(5), -1, jnp.array([0, 1, 1, 2, 2])].set(1.0)
    user, assistant = (jnp.array([x], bool) for x in ([1, 1, 0, 0, 1], [0, 0, 1, 0, 0]))
    begins, sums = jnp.array([[0, 0, 0, 1, 0]], bool), [jnp.zeros((1, 2, 3))] * 2
    tracker = Tracker(cfg)
    params = jax.tree.map(
        jnp.zeros_like, tracker.init(jax.random.key(0), code_BTXC, user, assistant, begins, sums)["params"]
    )
    params["agree_ND"] += 1.0
    agree, said, told = tracker.apply({"params": params}, code_BTXC, user, assistant, begins, sums)
    assert said[0, :, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert told[0, :, 1].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(agree[0, :, 0], [0, 0, 2 * np.log(2), 0, 0], rtol=1e-6)
    _, on, _ = tracker.apply({"params": params}, code_BTXC[:, 4:], user[:, 4:], assistant[:, 4:], begins[:, 4:],
                             [said[:, 3], told[:, 3]])  # fmt: skip
    assert on[0, 0].tolist() == said[0, 4].tolist()


def tracked(text, codes):
    """How much is added to what the user and what the assistant has said, at each token: words have the given codes."""
    w = world("chat", model__tracked=True)
    code_VC = np.zeros_like(w.params["code_VC"])
    for word, code in codes.items():
        code_VC[tokens(word)[0], : len(code)] = code
    token_BT = jnp.array([tokens(text)])
    params = w.params | {"code_VC": jnp.asarray(code_VC)}
    params["tracker"] = jax.tree.map(jnp.zeros_like, w.params["tracker"])  # all gates are open
    cache = jax.jit(w.net.prefill)(params, token_BT, w.net.init_cache(1, token_BT.shape[1]))
    return [np.asarray(jnp.diff(x, axis=1))[0, :, 0] for x in (cache.said_BSNC, cache.told_BSNC)]


def test_words_count_that_are_like_one_of_the_context():
    """a and b stand in it; c is like neither, d has a cosine of .8 with b."""
    codes = {"a": [1, 0, 0], "b": [0, 2, 0], "c": [0, 0, 1], "d": [0, 0.8, 0.6]}
    #                              bos a  b  >u c  a  >a b  d  >u d  >a
    said_TC, told_TC = tracked("bos a b >u c a >a b d >u d >a", codes)
    like_b = 0.8**4 * np.array(codes["d"])
    expected = np.zeros((2, 12, 3))
    expected[0, 5], expected[0, 10] = codes["a"], like_b
    expected[1, 7], expected[1, 8] = codes["b"], like_b
    expected[1, 11] = -expected[1, 7] - expected[1, 8]  # its next turn begins
    np.testing.assert_allclose(said_TC[:, :3], expected[0], atol=1e-5)
    np.testing.assert_allclose(told_TC[:, :3], expected[1], atol=1e-5)


def test_in_its_own_view_what_a_user_wants_is_marked_and_counts_as_said():
    codes = {word: np.eye(4)[i] for i, word in enumerate("abcd")}
    for text, kinds, grows in (
        ("1 a b 2 c d >u c >a d >u", [4, 4, 4, 0, 0, 0, 1, 1, 2, 2, 1], [0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]),
        ("bos a b 2 c d >u c >a d >u", [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 1], [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
    ):
        assert np.asarray(turn_marks(jnp.array([tokens(text)]), None, 0)[0])[0].tolist() == kinds
        np.testing.assert_allclose(tracked(text, codes)[0].sum(axis=1), grows, atol=1e-5)
