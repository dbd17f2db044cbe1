"""The joint update: the three hard rules by gradient, how components are counted, and the golden first step."""

import functools
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import config_of, dialogue, largest_difference, noisy, norm, random_dialogues, take, world, written

from mbrl_lm import learner, targets
from mbrl_lm import protocol as pr
from mbrl_lm.scoring import score
from mbrl_lm.turns import find_turns, gather, spread
from mbrl_lm.types import Dialogue

B, T = 8, 24
PROBES = ("probe_BTV", "watched_BTV")
LIKELIHOOD = ("user", "user_heads", "outcome", "assistant", "value_real", "reward", "end")
RETURN = (
    *LIKELIHOOD,
    "value",
    "slow_value",
    "policy_real",
    "policy_imagined",
    "kl",
    "trust",
    "distil",
    "entropy",
    "real_reply",
    "imagined_reply",
)
POLICY = {"policy_real": 1.0, "policy_imagined": 1.0, "kl": 0.5, "entropy": 0.1}


def real_rows(rows: int = B) -> Dialogue:
    return random_dialogues(learner_world().protocol, 1, rows, T)


def imagined_rows(seed: int = 2) -> Dialogue:
    """Rows of which the context and the first turn were real and the rest is our own."""
    rows = random_dialogues(learner_world().protocol, seed, B, T)
    own = written(rows, seed)
    return own.replace(sampled_BT=own.sampled_BT & (own.turn_BT > 1), logp_BT=own.logp_BT * (own.turn_BT > 1))


def learner_world():
    return world("chat", model__layers=1, model__tied=False)


def probed(net):
    """The network with probes (B, T, V) on its logits and on its user heads': their gradients say where losses touch it."""

    def apart(f):
        return lambda params, *args: f({k: v for k, v in params.items() if k not in PROBES}, *args)

    def heads(params, x_BTD, role_BT=None):
        out = apart(net.heads)(params, x_BTD, role_BT)
        watched_BTEV = out.user_BTEV + params["watched_BTV"][:, :, None]
        return out.replace(logits_BTV=out.logits_BTV + params["probe_BTV"], user_BTEV=watched_BTEV)

    return net._replace(trunk=apart(net.trunk), heads=lambda p, *x: (heads if "probe_BTV" in p else net.heads)(p, *x))


@functools.cache
def compiled(rl: bool, probe: bool, micro_batch: int, options):
    """The update with the weights as an argument, so that it is compiled once for all of them."""
    w = learner_world()
    net = probed(w.net) if probe else w.net
    cfg = config_of(model__layers=1, model__tied=False, train__micro_batch=micro_batch, **dict(options))

    def update(weights, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learner, "weights", lambda cfg, state, imagines: weights)
            patch.setattr(learner, "likelihood_weights", lambda cfg: weights)
            return learner.make_update(net, w.protocol, cfg, optax.sgd(1.0), rl=rl)(*args)

    return jax.jit(update)


def gradient(real, imagined, weights=None, *, rl=True, probe=False, target=None, micro_batch=0, **options):
    """The gradient of one update, read off a step of plain descent, and the metrics.

    `weights` are those of components, all others 0; without them they are the config's. `options` are fields of the config.
    """
    w, names = learner_world(), RETURN if rl else LIKELIHOOD
    params = dict(w.params)
    if probe:
        rows = len(real.uid_B) + (len(imagined.uid_B) if imagined is not None else 0)
        params |= {name: jnp.zeros((rows, T, w.protocol.vocab_size)) for name in PROBES}
    state = learner.init_state(w.net._replace(init=lambda key: params), optax.sgd(1.0), jax.random.key(0), w.cfg.turns)
    state = state.replace(target=params | (target or {}), reference=noisy(params, 5, 0.05))
    if weights is None:
        state = state.replace(step=jnp.int32(w.cfg.train.supervised_steps))
        weights = learner.weights(w.cfg, state, imagined is not None) if rl else learner.likelihood_weights(w.cfg)
    weights = {name: jnp.float32(weights.get(name, 0.0)) for name in names}
    update = compiled(rl, probe, micro_batch, tuple(sorted(options.items())))
    after, metrics = update(weights, state, real, imagined, jax.random.key(0))
    metrics = {name: np.array(pair) for name, pair in metrics.items()}
    return jax.tree.map(lambda a, b: a - b, params, dict(after.params)), metrics


def touched(g, probe="probe_BTV"):
    """bool (B, T): at which tokens the loss reached the network's logits."""
    return np.asarray(jnp.any(g[probe] != 0, axis=-1))


def test_rule_1_the_user_is_learnt_from_real_user_tokens_only():
    real, imagined = real_rows(), imagined_rows()
    replayed = written(take(real, slice(7, 8)))  # a row in which our own network wrote the user's words too
    real = jax.tree.map(lambda a, b: np.concatenate([a[:7], b]), real, replayed)
    expected_BT = np.concatenate([(real.author_BT == pr.USER) & ~real.sampled_BT, np.zeros((B, T), bool)])
    assert expected_BT.sum() > 10 and (imagined.author_BT == pr.USER).sum() > 10
    for name, probe in (("user", "probe_BTV"), ("user_heads", "watched_BTV")):
        g, _ = gradient(real, imagined, {name: 1.0}, probe=True)
        assert (touched(g, probe) <= expected_BT).all()
        if name == "user":  # each of the user heads leaves out some rows
            assert (touched(g) == expected_BT).all()
        assert not any(touched(g, other).any() for other in PROBES if other != probe)
        other, _ = gradient(real, imagined_rows(seed=7), {name: 1.0}, probe=True)
        assert largest_difference(g, other) == 0 and touched(g, probe).any()


def test_rule_2_the_policy_gradient_touches_the_assistants_tokens_only():
    real, imagined = real_rows(), imagined_rows()
    g, _ = gradient(real, imagined, POLICY, probe=True)
    author_BT = np.concatenate([real.author_BT, imagined.author_BT])
    assert not (touched(g) & (author_BT != pr.ASSISTANT)).any()
    assert (touched(g) & (author_BT == pr.ASSISTANT)).sum() > 10
    assert touched(g)[:B].any() and touched(g)[B:].any() and not touched(g, "watched_BTV").any()


def test_what_a_planner_chose_is_imitated_and_is_no_action_of_the_policys():
    """The first turn of each imagined dialogue: likelihood, whatever it was worth; the others: the policy gradient."""
    real, imagined = real_rows(), imagined_rows()
    turns = find_turns(learner_world().protocol, imagined)
    chosen_BU = turns.mask_BU & np.asarray(gather(imagined.sampled_BT, turns.close_BU))
    first_BU = chosen_BU & (np.cumsum(chosen_BU, axis=1) == 1)
    first_BT, chosen_BT = (np.asarray(spread(learner_world().protocol, imagined, x)) for x in (first_BU, chosen_BU))
    assert first_BT.sum() > 10 and (chosen_BT & ~first_BT).sum() > 10
    g, metrics = gradient(real, imagined, {"distil": 1.0}, probe=True, loss__distil=1.0)
    assert not touched(g)[:B].any() and (touched(g)[B:] <= first_BT).all() and touched(g)[B:].any()
    w = learner_world()
    nats_BT = -score(w.net, w.protocol, w.params, imagined).logp_BT
    assert metrics["loss/distil"] == pytest.approx([float(jnp.sum(nats_BT * first_BT)), first_BT.sum()], rel=1e-4)
    g, _ = gradient(real, imagined, {"policy_imagined": 1.0}, probe=True, loss__distil=1.0)
    assert (touched(g)[B:] <= chosen_BT & ~first_BT).all() and touched(g)[B:].any()


def test_a_control_breaks_rule_2_in_imagined_rows_alone():
    real, imagined = real_rows(), imagined_rows()
    g, _ = gradient(real, imagined, POLICY | {"kl": 0.0}, probe=True, control="user_gradient")
    user_BT = np.concatenate([real.author_BT, imagined.author_BT]) == pr.USER
    assert not touched(g)[:B][user_BT[:B]].any() and touched(g)[B:][user_BT[B:]].sum() > 10
    plain, _ = gradient(real, imagined, POLICY | {"kl": 0.0}, probe=True)
    assert largest_difference(*(jnp.where(user_BT[..., None], 0.0, x["probe_BTV"] != 0) for x in (g, plain))) == 0


def test_a_control_breaks_rule_3():
    real, imagined = real_rows(), imagined_rows()
    user_BT = imagined.author_BT == pr.USER
    foreseen = imagined.replace(logp_BT=np.where(user_BT, imagined.logp_BT / 2, imagined.logp_BT))
    told = [gradient(real, x, control="predictability")[1] for x in (imagined, foreseen)]
    sums = [metrics["train/imagined_reward"][0] for metrics in told]
    plain = gradient(real, imagined)[1]["train/imagined_reward"][0]
    assert sums[0] < sums[1] < plain and sums[1] - sums[0] == pytest.approx(plain - sums[1], rel=1e-3)
    assert (told[0]["train/real_reward"] == told[1]["train/real_reward"]).all()


def test_the_policy_gradient_of_imagined_rows_leaves_their_prompts_alone():
    real, imagined = real_rows(), imagined_rows()
    imagined = imagined.replace(sampled_BT=imagined.sampled_BT & (imagined.turn_BT > 2))
    before_BT = np.concatenate([np.ones((B, T), bool), imagined.turn_BT <= 2])
    g, _ = gradient(real, imagined, {"policy_imagined": 1.0}, probe=True)
    assert touched(g).any() and not (touched(g) & before_BT).any()
    g, _ = gradient(real, imagined, {"policy_real": 1.0}, probe=True)
    assert touched(g)[:B].any() and not touched(g)[B:].any()


def test_rule_3_how_predictable_the_user_is_never_enters_the_reward():
    w, real, imagined = learner_world(), real_rows(), imagined_rows()
    plain, metrics = gradient(real, imagined)
    shift_BT = np.random.default_rng(3).normal(size=(B, T)).astype(np.float32) * 3
    user_BT = imagined.author_BT == pr.USER
    foreseen = imagined.replace(logp_BT=imagined.logp_BT + np.where(user_BT, shift_BT, 0).astype(np.float32))
    after, changed = gradient(real, foreseen)
    assert largest_difference(plain, after) == 0 and metrics.keys() == changed.keys()
    assert all((metrics[name] == changed[name]).all() for name in metrics)
    # A slow critic that finds other words likely, everything else equal: the same rewards, returns and advantages.
    after, changed = gradient(real, imagined, target={"unembed_DV": noisy(w.params["unembed_DV"], 8, 1.0)})
    assert largest_difference(plain, after) == 0
    assert all((metrics[name] == changed[name]).all() for name in metrics)
    # User heads that doubt other words, where no guard is asked for: only how much they doubt is told.
    after, changed = gradient(real, imagined, target={"user_EDV": noisy(w.params["user_EDV"], 8, 1.0)})
    assert largest_difference(plain, after) == 0
    assert {name for name in metrics if (metrics[name] != changed[name]).any()} == {"train/doubt"}
    assert abs(metrics["train/imagined_reward"][0]) > 0.01


def test_gradient_accumulation_equals_the_whole_batch():
    real, imagined = real_rows(), imagined_rows()
    whole, metrics = gradient(real, imagined)
    for rows in (2, 3):  # 3 does not divide 16 rows: one at a time
        parts, same = gradient(real, imagined, micro_batch=rows)
        assert largest_difference(whole, parts) < 1e-5
        assert all(np.allclose(metrics[name], same[name], rtol=1e-4, atol=1e-5) for name in metrics)
    assert norm(whole) > 0.1


@pytest.mark.parametrize("rl", [False, True])
def test_padding_changes_nothing(rl):
    real, imagined = real_rows(), imagined_rows() if rl else None

    def widen(x):
        return np.pad(x, ((0, 0), (0, 8)), constant_values=pr.END if x.dtype == np.int8 else 0) if x.shape == (B, T) else x

    def parsed(d):
        return d.replace(turn_BT=np.asarray(pr.parse(learner_world().protocol, d.token_BT)[1]))

    wide = [d if d is None else parsed(jax.tree.map(widen, d)) for d in (real, imagined)]
    a, metrics = gradient(real, imagined, rl=rl)
    b, same = gradient(*wide, rl=rl)
    assert largest_difference(a, b) < 1e-5
    assert all(np.allclose(metrics[name], same[name], rtol=1e-4, atol=1e-5) for name in metrics)


@pytest.mark.parametrize("rl", [False, True])
def test_components_are_normalised_by_their_own_global_count(rl):
    """A batch with every row twice has twice the counts and the same gradient; so has one of which one half is longer."""
    real, imagined = real_rows(), imagined_rows() if rl else None
    twice = [d if d is None else take(d, np.repeat(np.arange(B), 2)) for d in (real, imagined)]
    a, metrics = gradient(real, imagined, rl=rl)
    b, double = gradient(*twice, rl=rl)
    assert largest_difference(a, b) < 1e-5
    for name in (name for name in metrics if name.startswith("loss/")):
        np.testing.assert_allclose(double[name], 2 * metrics[name], rtol=1e-4, atol=1e-4)
    if rl:
        # Imagined rows count among themselves.
        c, d = (gradient(x, imagined, {"policy_imagined": 1.0})[0] for x in (real, twice[0]))
        assert largest_difference(c, d) < 1e-5


def test_counts_are_those_of_the_dialogues():
    w = learner_world()
    rows = ["bos a >u b c >a d >u e >a f >u stop", "bos a >a b >u c"]
    real = dialogue(w.protocol, rows, T=T, reward=[[1.0, 2.0], [3.0]])
    _, metrics = gradient(real, None, rl=False)
    counts = {name: float(pair[1]) for name, pair in metrics.items() if name.startswith("loss/")}
    expected = {"user": 7, "user_heads": 7, "outcome": 0, "assistant": 6, "value_real": 2, "reward": 2, "end": 2}
    assert counts == {f"loss/{name}": count for name, count in expected.items()}
    nll = -jax.nn.log_softmax(w.net.forward(w.params, real.token_BT).logits_BTV)[:, :-1]
    nll_BT = np.take_along_axis(np.asarray(nll), real.token_BT[:, 1:, None], axis=-1)[..., 0]
    for name, role in (("user", pr.USER), ("assistant", pr.ASSISTANT)):
        np.testing.assert_allclose(metrics[f"loss/{name}"][0], nll_BT[real.author_BT[:, 1:] == role].sum(), rtol=1e-5)


def test_weights_scale_each_component_once():
    real, imagined = real_rows(), imagined_rows()
    names = [name for name in RETURN if name not in ("outcome", "trust")]  # there is none of either
    parts = [gradient(real, imagined, {name: 1.0}, loss__distil=1.0)[0] for name in names]
    weights = {name: 0.5 + 0.25 * i for i, name in enumerate(names)}
    expected = jax.tree.map(lambda *x: sum(w * y for w, y in zip(weights.values(), x, strict=True)), *parts)
    assert largest_difference(gradient(real, imagined, weights, loss__distil=1.0)[0], expected) < 1e-4
    assert all(norm(part) > 1e-3 for part in parts)


def at_update(n, state=None, **values):
    """A config, and a state before its update by return of number n."""
    w, cfg = learner_world(), config_of(**values)
    state = state or learner.init_state(w.net, optax.sgd(1.0), jax.random.key(0), cfg.turns)
    return cfg, state.replace(step=jnp.int32(cfg.train.supervised_steps + n))


def test_weights_are_those_of_the_config():
    values = {"loss__policy": 3.0, "loss__assistant": 0.2, "loss__kl": 0.7, "loss__end": 0.05, "loss__value": 0.4}
    cfg, state = at_update(0, **values, imagine__share=(0.25, 0.25))
    both = {"user": 1.0, "user_heads": 1.0, "outcome": 1.0, "value_real": 0.5, "reward": 0.5, "end": 0.05}
    assert learner.likelihood_weights(cfg) == both | {"assistant": 1.0}
    policy = {"policy_real": 2.25, "kl": 0.7, "entropy": 0.0}
    imagined = {"policy_imagined": 0.75, "value": 0.4}
    assert learner.weights(cfg, state, True) == both | {"assistant": 0.2} | policy | imagined
    assert learner.weights(cfg, state, False) == both | {"assistant": 0.2} | policy | {"policy_real": 3.0}
    asked = {"loss__slow_value": 0.3, "loss__trust": 0.4, "loss__distil": 0.6, "guard__discriminator": 0.1}
    more = learner.weights(config_of(**values, **asked, imagine__share=(0.25, 0.25)), state, True)
    assert more == both | {"assistant": 0.2} | policy | imagined | {
        "slow_value": 0.3,
        "trust": 0.4,
        "distil": 0.6,
        "real_reply": 1.0,
        "imagined_reply": 1.0,
    }
    assert "user_heads" not in learner.likelihood_weights(config_of(model__user_heads=0))


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_share_of_imagination_moves_from_the_first_to_the_last(epochs):
    values = {"loss__policy": 2.0, "imagine__share": (0.1, 0.9), "train__rl_steps": 100, "train__rl_epochs": epochs}
    for n, share in ((0, 0.1), (50, 0.5), (99, 0.892), (100, 0.9)):
        weights = learner.weights(*at_update(n * epochs, **values), True)
        assert float(weights["policy_imagined"]) == pytest.approx(2 * share)
        assert float(weights["policy_real"]) == pytest.approx(2 * (1 - share))


def test_the_share_of_imagination_reaches_the_update():
    w, key = learner_world(), jax.random.key(0)
    fresh = learner.init_state(w.net._replace(init=lambda key: w.params), optax.sgd(1.0), key, w.cfg.turns)
    moved = {}
    for share in ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0)):
        cfg = config_of(model__layers=1, model__tied=False, imagine__share=share, train__rl_steps=2)
        update = jax.jit(learner.make_update(w.net, w.protocol, cfg, optax.sgd(1.0), rl=True))
        state = fresh.replace(step=jnp.int32(cfg.train.supervised_steps + (share == (0.0, 1.0))))
        after, _ = update(state, real_rows(), imagined_rows(), key)
        moved[share] = jax.tree.map(lambda a, b: a - b, after.params, state.params)
    half = jax.tree.map(lambda a, b: (a + b) / 2, moved[0.0, 0.0], moved[1.0, 1.0])
    assert largest_difference(moved[0.0, 1.0], half) < 1e-5  # the second of two updates
    assert largest_difference(moved[0.0, 0.0], half) > 1e-3


def test_the_world_models_weight_falls_as_the_return_rises():
    values = {"loss__user": 0.8, "returns__best": 0.5}
    cfg, state = at_update(0, world_model__adaptive=True, **values)
    for mean, weight in ((0.0, 0.8), (0.125, 0.6), (0.5, 0.0), (0.7, 0.0), (-0.3, 0.8)):
        state = state.replace(real_mean=jnp.float32(mean))
        assert float(learner.weights(cfg, state, True)["user"]) == pytest.approx(weight)
        assert learner.weights(config_of(**values), state, True)["user"] == learner.likelihood_weights(cfg)["user"] == 0.8


@pytest.mark.parametrize("rl", [False, True])
def test_every_component_has_a_loss_and_a_mask(rl):
    w, real = learner_world(), real_rows()
    masks = targets.masks(w.protocol, real, find_turns(w.protocol, real), jnp.zeros(B, bool), rl)
    assert set(masks) == {*(RETURN if rl else LIKELIHOOD), "belief"}
    turns = find_turns(w.protocol, real)
    belief_BUZ = jnp.zeros((*real.reward_BU.shape, w.cfg.model.belief))
    batch = targets.Batch(real, turns, masks, real.reward_BU, real.reward_BU, jnp.zeros((B, T)), real.token_BT, belief_BUZ)
    reference = w.params if rl else None
    losses = jax.eval_shape(lambda p: learner.losses(w.net, w.protocol, w.cfg, p, reference, None, batch, None), w.params)
    assert {name: x.shape for name, x in losses.items()} == {name: x.shape for name, x in masks.items()}
    asked = {"loss__slow_value": 1.0, "loss__trust": 1.0, "loss__distil": 1.0, "guard__discriminator": 0.1}
    asked |= {"model__belief": 3, "world_model__goals": 3}
    _, state = at_update(0)
    weights = learner.weights(config_of(**asked), state, True) if rl else learner.likelihood_weights(config_of(**asked))
    assert set(weights) == set(masks)


def test_masked_sum_ignores_whatever_stands_outside_the_mask():
    assert targets.masked_sum(jnp.array([1.0, jnp.nan, jnp.inf, 4.0]), jnp.array([True, False, False, True])) == 5
    with pytest.raises(AssertionError):
        targets.masked_sum(jnp.ones((2, 1)), jnp.ones((2, 3), bool))


def test_begin_rl_freezes_copies_of_the_policy():
    w = learner_world()
    state = learner.init_state(w.net, optax.adam(1e-2), jax.random.key(0)).replace(params=w.params)
    assert largest_difference(state.reference, w.params) > 0.1 and largest_difference(state.target, w.params) > 0.1
    begun = learner.begin_rl(state)
    for tree in (begun.params, begun.target, begun.reference):
        assert largest_difference(tree, w.params) == 0
    leaves = jax.tree.leaves((begun.params, begun.target, begun.reference))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)  # a donated state must not hold an array twice
    assert begun.step == state.step and largest_difference(begun.opt_state, state.opt_state) == 0


def test_a_likelihood_phase_may_end_with_its_average():
    w = learner_world()
    state = learner.init_state(w.net, optax.adam(1e-2), jax.random.key(0)).replace(params=w.params)
    settled = learner.settle(state)
    assert largest_difference(settled.params, state.target) == 0 and largest_difference(settled.params, w.params) > 0.1
    leaves = jax.tree.leaves((settled.params, settled.target))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)  # a donated state must not hold an array twice


def test_the_trust_region_is_around_the_slow_parameters():
    w, key = learner_world(), jax.random.key(0)
    state = learner.init_state(w.net._replace(init=lambda key: w.params), optax.sgd(1.0), key, w.cfg.turns)
    moved = state.replace(params=jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), w.params))
    nothing = {f"loss__{name}": 0.0 for name in ("policy", "user", "outcome", "value", "value_real", "reward", "end", "kl")}
    cfg = config_of(model__layers=1, model__tied=False, loss__trust=1.0, **nothing)
    update = jax.jit(learner.make_update(w.net, w.protocol, cfg, optax.sgd(0.1), rl=True))

    def divergence(state):
        after, metrics = update(state, real_rows(), imagined_rows(), key)
        return float(metrics["loss/trust"][0]), after

    none, stays = divergence(state)
    some, goes_back = divergence(moved)
    assert abs(none) < 1e-4 and largest_difference(stays.params["embed_VD"], state.params["embed_VD"]) < 1e-4
    assert some > 0.1 and divergence(goes_back.replace(target=state.target))[0] < some


def test_the_target_follows_and_the_reference_stays():
    w = learner_world()
    update = jax.jit(learner.make_update(w.net, w.protocol, w.cfg, optax.sgd(0.1), rl=True))
    state = learner.init_state(w.net._replace(init=lambda key: w.params), optax.sgd(0.1), jax.random.key(0), w.cfg.turns)
    after, _ = update(state, real_rows(), imagined_rows(), jax.random.key(0))
    decay = w.cfg.returns.target_decay
    expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, w.params, after.params)
    assert largest_difference(after.target, expected) < 1e-6 and largest_difference(after.params, w.params) > 1e-3
    assert largest_difference(after.reference, w.params) == 0 and after.step == 1


def test_golden_first_step():
    stored = json.loads(golden.FILE.read_text())
    found = golden.first_steps()
    assert stored.keys() == found.keys(), golden.MESSAGE
    wrong = {k: (stored[k], found[k]) for k in stored if not np.isclose(stored[k], found[k], rtol=1e-4, atol=1e-4)}
    assert not wrong, f"{golden.MESSAGE}\n(stored, found): {wrong}"


def test_which_user_tokens_are_learnt():
    w, real = learner_world(), real_rows()
    turns = find_turns(w.protocol, real)
    nobody_B = jnp.zeros(B, bool)
    parts = {x: targets.masks(w.protocol, real, turns, nobody_B, False, x)["user"] for x in ("all", "words", "closing")}
    assert (parts["words"] | parts["closing"] == parts["all"]).all() and not (parts["words"] & parts["closing"]).any()
    assert (np.asarray(real.token_BT)[np.asarray(parts["words"])] >= pr.FIRST_PIECE).all()
    assert np.isin(np.asarray(real.token_BT)[np.asarray(parts["closing"])], [pr.TO_ASSISTANT, pr.STOP, pr.LEAVE]).all()


def test_two_epochs_are_two_steps_on_the_same_dialogues():
    """The targets of an update are computed once: the second step sees the advantages of the first."""
    w = learner_world()
    start = learner.init_state(w.net._replace(init=lambda key: w.params), optax.sgd(0.1), jax.random.key(0), w.cfg.turns)
    real, imagined = real_rows(), imagined_rows()
    steps = {}
    for n in (1, 2):
        cfg = config_of(model__layers=1, model__tied=False, train__rl_epochs=n)
        steps[n] = jax.jit(learner.make_update(w.net, w.protocol, cfg, optax.sgd(0.1), rl=True))
    first, shown = steps[1](start, real, imagined, jax.random.key(0))
    both, metrics = steps[2](start, real, imagined, jax.random.key(0))
    assert int(both.step) == 2 and int(first.step) == 1
    np.testing.assert_allclose(metrics["loss/policy_real"], shown["loss/policy_real"], rtol=1e-5)
    moved = largest_difference(both.params, first.params)
    assert 0.2 * largest_difference(first.params, start.params) < moved < 2 * largest_difference(first.params, start.params)


def test_who_speaks_for_the_imagined_user():
    w = learner_world()
    net = w.net._replace(init=lambda key: w.params)
    init = functools.partial(learner.init_state, net, optax.sgd(0.1), jax.random.key(0))
    state = learner.begin_rl(init(population=3).replace(params=noisy(w.params, 1)))
    others = [noisy(w.params, seed) for seed in (2, 3)]
    for place, params in enumerate(others):
        state = learner.remember(state.replace(params=params), jnp.int32(place))
    members = [*others, noisy(w.params, 1)]  # the last place still holds who was there when RL began

    def user(name, seed=0):
        cfg = config_of(imagine__user=name, imagine__population=3).imagine
        return learner.imagined_user(cfg, state, jax.random.key(seed))

    def off(seed):
        return [largest_difference(user("population", seed), member) for member in members]

    assert user("live") is None and largest_difference(user("frozen"), members[2]) == 0
    assert {int(np.argmin(off(seed))) for seed in range(20)} == {0, 1, 2} and min(off(0)) == 0
    assert init().population is None and learner.begin_rl(init()).population is None
