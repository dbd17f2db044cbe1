"""It learns: one batch by heart, a toy on the real path, a toy through imagination alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of, dialogue, random_dialogues, tokens, world

from mbrl_lm import learner, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.scoring import policy_logits

# The toy: the assistant says one word; the user answers `f` (good) to the word `a` and `g` (bad) to any other, and stops.
ROWS, T, U = 32, 8, 2
SIZES = {"tokens": T, "turns": U, "turn_tokens": 2, "model__layers": 1, "train__rl_learning_rate": 1e-2}
START, GOOD, BAD = "bos e >a", *tokens("f g")
RIGHT = tokens("a")[0]


def toy_world(**values):
    return world("chat", 1, pr.FIRST_PIECE + 8, **SIZES, **values)


def start_state(w, optimizer, seed):
    return jax.jit(lambda key: learner.init_state(w.net, optimizer, key, w.cfg.turns))(jax.random.key(seed))


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
    optimizer = make_optimizer(config_of(train__supervised_steps=150, train__learning_rate=1e-2).train)
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
    optimizer = make_optimizer(w.cfg.train)
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
    values = {
        "train__supervised_steps": 150,
        "loss__policy": 1.0,
        "imagine__share": (1.0, 1.0),
        "train__learning_rate": 1e-2,
    }
    w = toy_world(**values)
    optimizer = make_optimizer(w.cfg.train)
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
