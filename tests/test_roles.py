"""Weights of its own for each speaker: who learns what, and one function however it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import component_gradients, config_of, largest_difference, norm, random_dialogues, world, written

from mbrl_lm import learner, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.nn import make_net
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.scoring import score

KINDS = ("adapter", "separate")
ROWS, T = 6, 24
ACTS = {
    "policy_real",
    "policy_imagined",
    "assistant",
    "distil",
    "kl",
    "trust",
    "entropy",
    "value",
    "value_real",
    "slow_value",
}
USERS = {"user", "user_heads", "reward", "end", "real_reply", "imagined_reply"}  # what the world model's part learns


def roles_world(kind, **more):
    values = {"model__layers": 1, "model__roles": kind, "model__adapter_width": 5, "model__speakers": True}
    return world("chat", **values, loss__distil=1.0, **more)


def dialogues(w, seed=1):
    return random_dialogues(w.protocol, seed, ROWS, T)


@pytest.mark.parametrize("kind", KINDS)
def test_each_speaker_learns_its_own(kind):
    """No likelihood of the user reaches what is the assistant's alone, and no policy gradient what is the user's."""
    w = roles_world(kind, model__belief=3, world_model__goals=3)
    gradients = component_gradients(w, dialogues(w), written(dialogues(w, 2)))
    assert USERS < set(gradients)
    for name, gradient in gradients.items():
        own, other = ("user", "assistant") if name in USERS else ("assistant", "user")
        assert norm(gradient[other]) == 0, name
        watches = kind == "adapter" and name in ("user_heads", "real_reply", "imagined_reply")
        assert norm(gradient[own]) > 0 or name == "outcome" or watches, name
        assert kind == "separate" or norm(gradient["trunk"]) > 0 or name == "outcome", name


def test_adapters_start_as_nothing():
    cfg = config_of(model__layers=1, model__roles="adapter", model__adapter_width=5).model
    net, plain = make_net(cfg, 27), make_net(config_of(model__layers=1).model, 27)
    params = jax.jit(net.init)(jax.random.key(3))
    token_BT = dialogues(roles_world("adapter")).token_BT
    for role in (pr.ASSISTANT, pr.USER):
        heads = jax.jit(lambda p, role=role: net.heads(p, net.trunk(p, token_BT), jnp.full((ROWS, T), role)))(params)
        assert largest_difference(heads, jax.jit(plain.forward)(params["trunk"], token_BT)) < 1e-6
    assert all(norm(params[name]["down_DF"]) > 1 and norm(params[name]["up_FD"]) == 0 for name in ("assistant", "user"))
    assert largest_difference(params["assistant"]["down_DF"], params["user"]["down_DF"]) > 0.1


def test_two_networks_are_two_networks():
    w = roles_world("separate")
    plain, token_BT = world("chat", model__layers=1, model__speakers=True).net, dialogues(w).token_BT
    role_BT = np.random.default_rng(0).choice([pr.ASSISTANT, pr.USER, pr.OUTCOME], (ROWS, T))
    heads = jax.jit(lambda p: w.net.heads(p, w.net.trunk(p, token_BT), role_BT))(w.params)
    policy, user = (jax.jit(plain.forward)(w.params[name], token_BT) for name in ("assistant", "user"))
    logits_BTV = jnp.where((role_BT == pr.USER)[..., None], user.logits_BTV, policy.logits_BTV)
    expected = user.replace(logits_BTV=logits_BTV, value_BTEW=policy.value_BTEW)
    assert largest_difference(heads, expected) < 1e-5 and largest_difference(policy, user) > 0.1


# ---- what the policy is told of the user ----


@pytest.mark.parametrize("kind", ("shared", *KINDS))
def test_the_policy_and_the_value_are_told_how_sure_it_is_and_the_user_is_not(kind):
    values = {"model__layers": 1, "model__roles": kind, "model__speakers": True}
    plain, w = world("chat", **values), world("chat", **values, model__belief=3, world_model__goals=3)
    rows = dialogues(w)

    def heads(net, params, role):
        return jax.jit(lambda p: net.heads(p, net.trunk(p, rows.token_BT), jnp.full((ROWS, T), role)))(params)

    def part(params):
        return {"shared": params, "adapter": params.get("trunk"), "separate": params.get("assistant")}[kind]

    start = jax.jit(w.net.init)(jax.random.key(0))
    assert norm(part(start)["belief_FZ"]) == norm(part(start)["tell_FD"]) == 0 and norm(part(start)["tell_ZF"]) > 1
    told = [heads(w.net, w.params, role) for role in (pr.ASSISTANT, pr.USER)]
    part(w.params)["tell_FD"] = jnp.zeros_like(part(w.params)["tell_FD"])
    untold = [heads(w.net, w.params, role) for role in (pr.ASSISTANT, pr.USER)]
    assert told[0].belief_BTZ.shape == (ROWS, T, 3) and heads(plain.net, plain.params, pr.USER).belief_BTZ.size == 0
    assert largest_difference(told[0].logits_BTV, untold[0].logits_BTV) > 0.1
    assert largest_difference(told[0].value_BTEW, untold[0].value_BTEW) > 0.1
    assert largest_difference(told[1].logits_BTV, untold[1].logits_BTV) == 0
    for name in ("reward_BTW", "end_BT", "user_BTEV", "real_BT", "belief_BTZ"):
        assert largest_difference(getattr(told[0], name), getattr(untold[0], name)) == 0, name


def test_a_belief_is_learnt_from_what_was_inferred_alone():
    w = world("chat", model__layers=1, model__belief=3, world_model__goals=3, loss__distil=1.0)
    gradients = component_gradients(w, dialogues(w), written(dialogues(w, 2)))
    told = {"tell_DF", "tell_ZF", "tell_FD"}
    for name, gradient in gradients.items():
        touched = {key for key, part in gradient.items() if norm(part) > 0}
        if name == "belief":
            assert {"belief_DF", "belief_FZ", "embed_VD"} <= touched and not touched & told
        else:
            assert not touched & {"belief_DF", "belief_FZ"}, name
            assert touched & told == (told if name in ACTS else set()), name


@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_forward(kind):
    w = roles_world(kind)
    token_BT, prompt = dialogues(w).token_BT, 5
    role_BT = jnp.asarray(np.random.default_rng(1).choice([pr.ASSISTANT, pr.USER], (ROWS, T)))
    whole = jax.jit(lambda p: w.net.heads(p, w.net.trunk(p, token_BT), role_BT))(w.params)
    other = jax.jit(lambda p: w.net.heads(p, w.net.trunk(p, token_BT), pr.ASSISTANT + pr.USER - role_BT))(w.params)
    cache = jax.jit(w.net.prefill)(w.params, token_BT[:, :prompt], w.net.init_cache(ROWS, T))
    decode = jax.jit(w.net.decode_step)
    for t in range(prompt, 12):
        heads, cache = decode(w.params, token_BT[:, t], t, cache, role_BT[:, t])
        at = [jax.tree.map(lambda x, t=t: x[:, t], heads) for heads in (whole, other)]
        assert largest_difference(heads, at[0]) < 2e-5
        assert largest_difference(heads.logits_BTV, at[1].logits_BTV) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_writes_what_score_reads(kind):
    w = roles_world(kind)
    real = dialogues(w)

    @jax.jit
    def write(params, key):
        prompt = rollout.from_an_opening(w.protocol, real, key)
        return rollout.imagine(w.net, w.protocol, params, prompt, key, tokens=T, turns=9)

    own = write(w.params, jax.random.key(2))
    scores = jax.jit(lambda p: score(w.net, w.protocol, p, own))(w.params)
    for role in (pr.ASSISTANT, pr.USER):
        written_BT = own.sampled_BT & (own.author_BT == role)
        assert written_BT.sum() > 10
        np.testing.assert_allclose(scores.logp_BT[written_BT], own.logp_BT[written_BT], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_both_updates_move_both_speakers(kind):
    w = roles_world(kind)
    optimizer = make_optimizer(w.cfg.train)
    real, imagined = dialogues(w), written(dialogues(w, 2))
    state = learner.init_state(w.net._replace(init=lambda key: w.params), optimizer, jax.random.key(0), w.cfg.turns)
    for rl in (False, True):
        update = jax.jit(learner.make_update(w.net, w.protocol, w.cfg, optimizer, rl=rl))
        after = state
        for _ in range(2):  # the first step of the warm-up is of size 0
            after, metrics = update(after, real, imagined if rl else None, jax.random.key(0))
        for name in ("assistant", "user"):
            assert largest_difference(after.params[name], state.params[name]) > 1e-5
        assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves((after.params, metrics)))
