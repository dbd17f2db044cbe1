"""It learns: one batch by heart, a toy on the real path, a toy through imagination alone, to look things up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import config_of, dialogue, random_dialogues, tokens, world

from mbrl_lm import config, learner, nn, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.scoring import policy_logits

# The toy: the assistant says one word; the user answers `f` (good) to the word `a` and `g` (bad) to any other, and stops.
ROWS, T, U = 32, 8, 2
SIZES = {"tokens": T, "turns": U, "turn_tokens": 2, "model__layers": 1, "train__rl_learning_rate": 1e-2}
START, GOOD, BAD = "bos e >a", *tokens("f g")
RIGHT = tokens("a")[0]


def toy_world(**values):
    return world("chat", 1, pr.FIRST_PIECE + 8, **SIZES, **values)


def start_state(w, optimizer, seed):
    return jax.jit(lambda key: learner.init_state(w.net, optimizer, key))(jax.random.key(seed))


@functools.cache
def chance_of_the_right_word(**values):
    w = toy_world(**values)

    def chance(params):
        logits_BV = w.net.forward(params, jnp.array([tokens(START)])).logits_BTV[:, -1]
        role_B, place_B = jnp.array([pr.ASSISTANT]), jnp.array([0])
        return jax.nn.softmax(policy_logits(w.protocol, logits_BV, role_B, place_B, 1.0))[0, RIGHT]

    return jax.jit(chance)


def answered(w, words, replies=None):
    """Real dialogues in which the user answers these words; the reward is 1 where the reply is good."""
    replies = np.where(np.asarray(words) == RIGHT, GOOD, BAD) if replies is None else replies
    rows = [[*tokens(START), int(a), pr.TO_USER, int(b), pr.STOP] for a, b in zip(words, replies, strict=True)]
    return dialogue(w.protocol, rows, T, U, reward=[[float(b == GOOD)] for b in replies])


def prompts(w):
    return dialogue(w.protocol, [START] * ROWS, T, U)


def test_one_batch_is_learnt_by_heart():
    w = world("chat", model__layers=2, model__width=32, train__supervised_steps=150, train__learning_rate=1e-2)
    optimizer = learner.make_optimizer(config_of(train__supervised_steps=150, train__learning_rate=1e-2).train)
    update = jax.jit(learner.make_update(w.net, w.protocol, w.cfg, optimizer, rl=False))
    real, state = random_dialogues(w.protocol, 1, 4), start_state(w, optimizer, 0)
    losses = []
    for _ in range(150):
        state, metrics = update(state, real, None, jax.random.key(0))
        losses.append({k: float(a / jnp.maximum(b, 1)) for k, (a, b) in metrics.items()})
    assert losses[0]["loss/user"] > 2 and losses[0]["loss/assistant"] > 2
    for name in ("user", "assistant", "end"):
        assert losses[-1][f"loss/{name}"] < 0.03, name


def test_a_rewarded_word_becomes_likelier_on_the_real_path():
    w, values = toy_world(train__supervised_steps=0, loss__kl=0.0), {"train__supervised_steps": 0, "loss__kl": 0.0}
    optimizer = learner.make_optimizer(w.cfg.train)
    update = jax.jit(learner.make_update(w.net, w.protocol, w.cfg, optimizer, rl=True))
    speak = jax.jit(lambda p, d, k: rollout.imagine(w.net, w.protocol, p, d, k, tokens=T, turns=1))
    state, chance = start_state(w, optimizer, 0), chance_of_the_right_word(**values)
    before = float(chance(state.params))
    for step in range(40):
        said = jax.device_get(speak(state.params, prompts(w), jax.random.key(step)))
        token_BT = said.token_BT.copy()
        place_B = (said.author_BT != pr.END).sum(axis=1)
        token_BT[np.arange(ROWS), place_B] = np.where(said.token_BT[:, 3] == RIGHT, GOOD, BAD)
        token_BT[np.arange(ROWS), place_B + 1] = pr.STOP
        heard = dialogue(w.protocol, token_BT, T, U, ended=[True] * ROWS)
        heard.reward_BU[:, 0] = said.token_BT[:, 3] == RIGHT
        heard = heard.replace(sampled_BT=said.sampled_BT, logp_BT=said.logp_BT)
        state, _ = update(state, heard, None, jax.random.key(0))
    assert before < 0.3 and float(chance(state.params)) > 0.9


@functools.cache
def through_imagination(useful: bool, seed: int) -> tuple[float, float, float]:
    """P(right word) when RL begins and at its end, and the world model's loss; RL sees imagined rows only.

    Where the world model is useless, the very same replies stand in the recordings, but shuffled: they answer nothing.
    """
    values = {"train__supervised_steps": 150, "loss__policy_real": 0.0, "train__learning_rate": 1e-2}
    w = toy_world(**values)
    optimizer = learner.make_optimizer(w.cfg.train)
    by_likelihood, by_return = (
        jax.jit(learner.make_update(w.net, w.protocol, w.cfg, optimizer, rl=rl)) for rl in (False, True)
    )
    dream = jax.jit(lambda p, d, k: rollout.imagine(w.net, w.protocol, p, d, k, tokens=T, turns=2))
    state, chance = start_state(w, optimizer, seed), chance_of_the_right_word(**values)

    rng = np.random.default_rng(seed)
    words = rng.permutation(np.resize(tokens("a b c d"), 40 * ROWS))
    replies = np.where(words == RIGHT, GOOD, BAD)
    if not useful:
        rng.shuffle(replies)
    recorded = [answered(w, words[i::40], replies[i::40]) for i in range(40)]
    for step in range(150):
        state, metrics = by_likelihood(state, recorded[step % 40], None, jax.random.key(0))
    nll, before = float(metrics["loss/user"][0] / metrics["loss/user"][1]), float(chance(state.params))
    state = learner.begin_rl(state)
    for step in range(60):
        imagined = dream(state.params, prompts(w), jax.random.key(step))
        state, _ = by_return(state, recorded[step % 40], imagined, jax.random.key(0))
    return before, float(chance(state.params)), nll


@pytest.mark.parametrize("seed", [0, 1])
def test_the_policy_improves_through_imagination_alone(seed):
    before, after, nll = through_imagination(True, seed)
    assert nll < 0.02 and 0.15 < before < 0.35
    assert after > 0.85


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_learnt_from_imagination_when_the_world_model_is_useless(seed):
    before, after, nll = through_imagination(False, seed)
    assert after < 0.5
    assert nll > 0.2 and 0.15 < before < 0.35


# ---- looking things up: a list of things with properties, then what was said of one of them ----

THINGS, PROPERTIES, VALUES = 10, 3, 4  # tokens: a separator, things, then the values of each property


def lists_and_questions(rng, rows):
    """Token rows `thing value value value sep ...`, then `thing value sep ...` with the right value of a random property."""
    token_BT = np.zeros((rows, 50), np.int32)
    for row in token_BT:
        things = 1 + rng.permutation(THINGS)[:5]
        values = 1 + THINGS + VALUES * np.arange(PROPERTIES) + rng.integers(VALUES, size=(5, PROPERTIES))
        asked, which = rng.integers(5, size=10), rng.integers(PROPERTIES, size=10)
        told = [[things[i], *values[i], 0] for i in range(5)]
        said = [[things[i], values[i, k], 0] for i, k in zip(asked, which, strict=True)]
        row[:] = np.concatenate(told + said)[:50]
    return token_BT


@pytest.mark.slow
def test_looking_things_up_is_learnt_in_a_few_hundred_updates():
    cfg = config_of(train__supervised_steps=400, train__rl_steps=0, train__learning_rate=3e-3, train__warmup=50)
    net = nn.make_net(
        config.Model(layers=2, width=128, heads=2, kv_heads=2, mlp_width=256), 1 + THINGS + PROPERTIES * VALUES
    )
    optimizer, rng = learner.make_optimizer(cfg.train), np.random.default_rng(0)
    params = jax.jit(net.init)(jax.random.key(0))
    answer_T = np.arange(26, 50, 3) - 1  # what is predicted from these positions is an answer

    def loss(params, token_BT):
        logp_BTV = jax.nn.log_softmax(net.forward(params, token_BT[:, :-1]).logits_BTV)
        logp_BT = jnp.take_along_axis(logp_BTV, token_BT[:, 1:, None], axis=-1)[..., 0]
        kind_V = (jnp.arange(logp_BTV.shape[-1]) - 1 - THINGS) // VALUES
        same_BTV = kind_V[None, None] == kind_V[token_BT[:, 1:]][..., None]
        right_BT = jnp.argmax(jnp.where(same_BTV, logp_BTV, -jnp.inf), axis=-1) == token_BT[:, 1:]
        return -jnp.mean(logp_BT), jnp.mean(right_BT[:, answer_T], dtype=jnp.float32)

    @jax.jit
    def update(params, opt_state, token_BT):
        (_, right), gradient = jax.value_and_grad(loss, has_aux=True)(params, token_BT)
        step, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, step), opt_state, right

    opt_state, right = optimizer.init(params), []
    for _ in range(400):
        params, opt_state, share = update(params, opt_state, lists_and_questions(rng, 16))
        right.append(float(share))
    assert np.mean(right[:20]) < 0.4 and np.mean(right[-20:]) > 0.8
