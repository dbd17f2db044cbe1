"""Planning: one candidate is the plain policy; what is imagined to follow decides; identical texts are one candidate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TURN_TOKENS, VOCAB, config_of, dialogue, tokens, world

from mbrl_lm import config, lookahead, planner, rollout, value
from mbrl_lm import protocol as pr
from mbrl_lm.nn import Net
from mbrl_lm.types import Heads

T, DISCOUNT = 32, 0.9
KINDS = ("rollouts", "mpc", "gumbel")
TEMPERATURE = np.ones(len(pr.ROLES), np.float32)
PROTOCOL = pr.make_protocol("chat", VOCAB, turn_tokens=TURN_TOKENS)
A, B, C, D, GOOD, BAD = (tokens(letter)[0] for letter in "abcdgh")


def settings(plan: str, **values) -> config.Config:
    values = {f"planner__{name}": x for name, x in values.items()}
    return config_of(tokens=T, plan=plan, returns__discount=DISCOUNT, **values)


# ---- a world that is known ----


def remembering_net() -> Net:
    """Logits are `next_VV` at the last token plus `since_VV` for each earlier token; reward and value sum over tokens."""
    cfg = config_of().model
    centres_W = value.bin_centres(cfg.bins, cfg.bin_limit)

    def exactly(x):
        return jnp.log(value.two_hot(x, centres_W) + 1e-9)

    def read(params, token_BT, said_BTV):
        return jnp.concatenate([params["next_VV"][token_BT] + said_BTV @ params["since_VV"], said_BTV], axis=-1)

    def trunk(params, token_BT, dropout_key=None):
        return read(params, token_BT, jnp.cumsum(jax.nn.one_hot(token_BT, VOCAB), axis=1))

    def heads(params, x_BTD, role_BT=None):
        logits_BTV, said_BTV = jnp.split(x_BTD, 2, axis=-1)
        nothing_BT = jnp.zeros(said_BTV.shape[:2])
        return Heads(
            logits_BTV=logits_BTV,
            value_BTEW=exactly(said_BTV @ params["value_V"])[:, :, None],
            reward_BTW=exactly(said_BTV @ params["reward_V"]),
            end_BT=nothing_BT,
            user_BTEV=jnp.zeros((*nothing_BT.shape, 0, VOCAB)),
            real_BT=nothing_BT,
            belief_BTZ=nothing_BT[..., None],
        )

    def prefill(params, token_BT, cache):
        return {"said_BSV": cache["said_BSV"].at[:, : token_BT.shape[1]].set(jax.nn.one_hot(token_BT, VOCAB))}

    def step(params, token_B, index, cache):
        said_BSV = cache["said_BSV"].at[:, index].set(jax.nn.one_hot(token_B, VOCAB))
        before_S = (jnp.arange(said_BSV.shape[1]) <= index)[None, :, None]
        return read(params, token_B[:, None], jnp.sum(said_BSV * before_S, axis=1, keepdims=True)), {"said_BSV": said_BSV}

    def init_cache(B, S):
        return {"said_BSV": jnp.zeros((B, S, VOCAB))}

    return Net(init=None, init_cache=init_cache, trunk=trunk, heads=heads, prefill=prefill, step=step)


def knowledge(says, since=(), reward=(), values=()) -> dict[str, np.ndarray]:
    """Parameters: `says` maps a token to the probabilities of the next one; `since` (earlier, next) to how many nats."""
    next_VV, since_VV = np.full((VOCAB, VOCAB), -50.0, np.float32), np.zeros((VOCAB, VOCAB), np.float32)
    for token, likely in says.items():
        for after, p in likely.items():
            next_VV[token, after] = np.log(p)
    for (earlier, after), nats in dict(since).items():
        since_VV[earlier, after] = nats
    worths = {"reward_V": dict(reward), "value_V": dict(values)}
    return {"next_VV": next_VV, "since_VV": since_VV} | {
        name: np.array([of.get(token, 0.0) for token in range(VOCAB)], np.float32) for name, of in worths.items()
    }


def choice(a: float = 0.5, **more) -> dict[str, np.ndarray]:
    """The assistant says a or b, and hands over; the user is happy (g) after b, unhappy (h) after a, and goes."""
    says = {
        pr.TO_ASSISTANT: {A: a, B: 1 - a},
        A: {pr.TO_USER: 1.0},
        B: {pr.TO_USER: 1.0},
        pr.TO_USER: {GOOD: 0.5, BAD: 0.5},
        GOOD: {pr.STOP: 1.0},
        BAD: {pr.STOP: 1.0},
    }
    since = {(A, BAD): 20.0, (B, GOOD): 20.0}
    return knowledge(says, **({"since": since, "reward": {GOOD: 1.0, BAD: -1.0}} | more))


@functools.cache
def compiled(plan: str, **values):
    return jax.jit(planner.make_planner(settings(plan, **values), remembering_net(), PROTOCOL))


def prompts(rows: int = 16):
    return dialogue(PROTOCOL, ["bos e >a"] * rows, T=T)


def said(planned) -> np.ndarray:
    """The first word of each chosen turn."""
    return np.asarray(planned.dialogue.token_BT)[:, 3]


# ---- exactness ----


@functools.cache
def network(plan: str, **values):
    w = world("chat", seed=3, model__layers=1)
    return w, jax.jit(planner.make_planner(settings(plan, **values), w.net, w.protocol))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("plan", KINDS)
def test_one_candidate_is_the_plain_policy_exactly(plan, depth):
    w, decide = network(plan, candidates=1, depth=depth, iterations=1, simulations=2)
    rows = ["bos b >u a >a", "bos a >u c d >a c >u b >a", "bos d >u b stop"]
    key, prompt = jax.random.key(4), dialogue(w.protocol, rows, T=T)
    written = rollout.imagine(w.net, w.protocol, w.params, prompt, key, tokens=T, turns=1, temperature=TEMPERATURE)
    planned = decide(w.params, prompt, key, TEMPERATURE)
    for name in ("token_BT", "author_BT", "turn_BT", "sampled_BT", "ended_B", "uid_B"):
        np.testing.assert_array_equal(getattr(planned.dialogue, name), getattr(written, name), err_msg=name)
    np.testing.assert_allclose(planned.dialogue.logp_BT, written.logp_BT, atol=1e-5)


def test_on_a_cache_no_wider_than_needed_the_policy_says_the_same():
    w = world("chat", seed=3, model__layers=1)
    decide = jax.jit(planner.make_planner(settings("none"), w.net, w.protocol, narrow=True))
    for rows in (
        ["bos b >u a >a", "bos d >u b stop"],
        ["bos b >u a >a", "bos a >u c d >a c >u b >a a a a >u b c d a a a a a a >a"],
    ):
        key, prompt = jax.random.key(4), dialogue(w.protocol, rows, T=T)
        written = rollout.imagine(w.net, w.protocol, w.params, prompt, key, tokens=T, turns=1, temperature=TEMPERATURE)
        planned = decide(w.params, prompt, key, TEMPERATURE)
        for name in ("token_BT", "author_BT", "turn_BT", "sampled_BT", "ended_B", "cut_B"):
            np.testing.assert_array_equal(getattr(planned.dialogue, name), getattr(written, name), err_msg=name)
        length_B = rollout.prompt_lengths(written) - rollout.prompt_lengths(prompt)
        np.testing.assert_array_equal(planned.tokens_B, length_B)


def test_without_a_planner_it_is_the_plain_policy():
    planned = compiled("none")(choice(a=0.25), prompts(400), jax.random.key(0), TEMPERATURE)
    assert abs(np.mean(said(planned) == A) - 0.25) < 0.07
    np.testing.assert_array_equal(planned.tokens_B, 2)


def test_copies_of_a_prompt_are_written_apart_and_the_first_as_if_alone():
    w, _ = network("none")
    prompt, key = dialogue(w.protocol, ["bos b >u a >a", "bos a >u c >a"], T=T), jax.random.key(1)
    write = functools.partial(rollout.imagine, w.net, w.protocol, w.params, prompt, key, tokens=T, turns=99)
    alone, copies = write(), write(copies=5)
    np.testing.assert_array_equal(copies.token_BT[::5], alone.token_BT)
    np.testing.assert_array_equal(copies.uid_B[::5], alone.uid_B)
    np.testing.assert_allclose(copies.logp_BT[::5], alone.logp_BT, atol=1e-5)
    texts = {tuple(row) for row in np.asarray(copies.token_BT).tolist()}
    assert len(texts) == len(set(np.asarray(copies.uid_B).tolist())) == 10
    twice = rollout.copy_uids(rollout.copy_uids(np.arange(50, dtype=np.uint32), 8, salt=1), 8)
    assert len(set(np.asarray(twice).tolist())) == 50 * 8 * 8  # copies of copies are nobody's namesakes


# ---- what decides ----


@pytest.mark.parametrize("plan", KINDS)
def test_what_is_imagined_to_follow_decides(plan):
    decide = compiled(plan, candidates=16, futures=2, depth=1, iterations=2, elites=2, simulations=16)
    planned = decide(choice(), prompts(), jax.random.key(0), TEMPERATURE)
    assert (said(planned) == B).all()
    np.testing.assert_allclose(planned.worth_B, 1.0, atol=1e-3)
    assert planned.dialogue.token_BT.shape == (16, T)
    np.testing.assert_array_equal(planned.dialogue.token_BT[0, 3:6], [B, pr.TO_USER, pr.PAD])  # nothing imagined is said


@pytest.mark.parametrize("plan", KINDS)
def test_others_may_speak_for_the_imagined_user(plan):
    decide = compiled(plan, candidates=16, futures=2, depth=1, iterations=2, elites=2, simulations=16)
    contrary = choice(since={(A, GOOD): 20.0, (B, BAD): 20.0})
    planned = decide(choice(), prompts(), jax.random.key(0), TEMPERATURE, contrary)
    assert (said(planned) == A).all()


def happy_for_ever():
    """Reward: 1 for each of the user's words so far; the value is .25 for each of them. What a prompt has earned is past."""
    says = {
        pr.TO_ASSISTANT: {A: 1.0},
        A: {pr.TO_USER: 1.0},
        pr.TO_USER: {GOOD: 1.0},
        GOOD: {pr.TO_ASSISTANT: 1.0},
    }
    params = knowledge(says, reward={GOOD: 1.0}, values={GOOD: 0.25})
    return params, dialogue(PROTOCOL, ["bos e >a", "bos e >a a >u g >a"], T=T)


def test_a_worth_is_the_discounted_return_and_the_value_where_it_is_cut():
    """Reward: 1 for each of the user's words so far; two replies, then the value, .25 for each of them."""
    params, rows = happy_for_ever()
    planned = compiled("rollouts", candidates=2, futures=3, depth=2)(params, rows, jax.random.key(0), TEMPERATURE)
    expected = [1 + DISCOUNT * 2 + DISCOUNT**2 * 0.5, 2 + DISCOUNT * 3 + DISCOUNT**2 * 0.75]
    np.testing.assert_allclose(planned.worth_B, expected, rtol=1e-3)
    # each candidate: 2 tokens of its own; each future: two replies of 2 and a turn of 2
    np.testing.assert_array_equal(planned.tokens_B, 2 * 2 + 2 * 3 * 6)


def test_without_depth_the_value_is_read_where_the_assistant_has_spoken():
    params = choice(values={A: 0.5, B: 0.25})
    planned = compiled("rollouts", candidates=16, depth=0)(params, prompts(), jax.random.key(0), TEMPERATURE)
    assert (said(planned) == A).all()
    np.testing.assert_allclose(planned.worth_B, 0.5, atol=1e-3)
    np.testing.assert_array_equal(planned.tokens_B, 16 * 2)


def test_a_generous_planner_counts_what_is_left_to_the_other_side():
    """Of one, three and two items worth 4, 1 and 0 nothing but the last two is taken: two thirds of ten points are left."""
    cfg = config_of(tokens=T, plan="rollouts", imagine__reward="split", imagine__generosity=0.3)
    w = world("negotiation", seed=3, model__layers=1)
    rows = dialogue(w.protocol, ["bos 1 4 3 1 2 0 >a a >u b >o 0 0 2 stop"], T=T)
    outlook = lookahead.Lookahead(cfg, w.net, w.protocol).look(w.params, rows, jnp.array([8]))
    np.testing.assert_allclose(outlook.return_B, 0.3 * 20 / 3, rtol=1e-5)


def test_a_planner_that_imagines_values_of_the_other_side_counts_what_the_deal_was_worth_there():
    cfg = config_of(tokens=T, plan="rollouts", imagine__reward="split", planner__sides=2)
    w = world("negotiation", seed=3, model__layers=1)
    row = "bos 1 4 3 1 2 0 >a a >u b >o 0 0 2 stop"
    rows = dialogue(w.protocol, [row, row[:-6]], T=T, reward=[[2.5], [2.5]])
    outlook = lookahead.Lookahead(cfg, w.net, w.protocol).look(w.params, rows, jnp.array([8, 8]))
    assert outlook.return_B[0] == 2.5 != outlook.return_B[1]  # what was cut is worth the value of its state


def test_spread_is_paid_for():
    """After a the user is either happy or not; after b it is always a little unhappy."""
    reward = {GOOD: 1.0, BAD: -1.0, C: -0.25}
    params = choice(since={(B, C): 20.0}, reward=reward)
    params["next_VV"][pr.TO_USER, C] = -5.0
    params["next_VV"][C, pr.STOP] = 0.0
    for kappa, word in ((0.0, A), (1.0, B)):
        decide = compiled("rollouts", candidates=8, futures=64, depth=1, kappa=kappa)
        planned = decide(params, prompts(), jax.random.key(0), TEMPERATURE)
        assert np.mean(said(planned) == word) > 0.9


def test_a_temperature_weighs_candidates_by_their_worth():
    decide = compiled("rollouts", candidates=8, futures=1, depth=1, temperature=2.0)
    planned = decide(choice(), prompts(800), jax.random.key(0), TEMPERATURE)
    # Of n candidates b, the chance that one of them is chosen: n e^(1/2) / (n e^(1/2) + (8 - n) e^(-1/2)).
    n = np.random.default_rng(0).binomial(8, 0.5, 100_000)
    expected = np.mean(n * np.e / (n * np.e + 8 - n))
    assert abs(np.mean(said(planned) == B) - expected) < 0.06


def test_the_same_text_is_one_candidate():
    """Among copies of a and b, luck must not decide: what followed any copy counts for all."""
    params = choice(since={(A, GOOD): np.log(0.5), (B, GOOD): np.log(0.65), (A, BAD): np.log(0.5), (B, BAD): np.log(0.35)})
    right = {}
    for candidates in (2, 32):
        decide = compiled("rollouts", candidates=candidates, futures=8, depth=1)
        found = said(decide(params, prompts(64), jax.random.key(0), TEMPERATURE))
        right[candidates] = np.mean(found == B)
    assert right[32] > 0.95 > right[2] + 0.1  # of 32 that were each looked at alone, the luckiest would win
    both = dialogue(PROTOCOL, ["bos e >a a", "bos e >a a", "bos e >a b", "bos e >a b"], T=T)
    np.testing.assert_array_equal(planner.identical(both, 2), [[[1, 1], [1, 1]]] * 2)
    np.testing.assert_array_equal(planner.identical(both, 1)[0, 0], [1, 1, 0, 0])


def test_rounds_build_on_what_was_found():
    """Each c is worth one more, and one word in twenty is c. Beginnings that were worth something are gone on from."""
    likely = {A: 0.475, B: 0.475, C: 0.05}
    says = {pr.TO_ASSISTANT: likely, A: likely, B: likely, C: likely, pr.TO_USER: {GOOD: 1.0}, GOOD: {pr.STOP: 1.0}}
    params, worth = knowledge(says, reward={C: 1.0}), {}
    for plan, values in (("rollouts", {"candidates": 96}), ("mpc", {"candidates": 16, "iterations": 6, "elites": 2})):
        decide = compiled(plan, futures=1, depth=1, **values)
        worth[plan] = float(np.mean(decide(params, prompts(64), jax.random.key(0), TEMPERATURE).worth_B))
    assert worth["mpc"] > worth["rollouts"] + 0.15, worth  # as many candidates
    single = compiled("mpc", candidates=6, futures=1, depth=1, iterations=1)
    ours, theirs = (decide(params, prompts(), jax.random.key(0), TEMPERATURE)
                    for decide in (single, compiled("rollouts", candidates=6, futures=1, depth=1)))  # fmt: skip
    np.testing.assert_array_equal(ours.dialogue.token_BT, theirs.dialogue.token_BT)


def test_new_candidates_begin_like_an_elite():
    elite = dialogue(PROTOCOL, ["bos e >a a b c >u"] * 200, T=T)
    begun = planner.beginnings(PROTOCOL, elite, jnp.full(200, 3), jax.random.key(0))
    lengths = np.asarray(rollout.prompt_lengths(begun))
    assert set(lengths.tolist()) == {3, 4, 5, 6}  # never the whole turn, which would be nothing new
    for row, length in zip(np.asarray(begun.token_BT), lengths, strict=True):
        np.testing.assert_array_equal(row[:length], elite.token_BT[0, :length])


def test_dialogues_that_have_ended_stay_as_they_are():
    rows = dialogue(PROTOCOL, ["bos e >u g stop", "bos e >a"], T=T)
    for plan in KINDS:
        planned = compiled(plan, candidates=4, futures=2, depth=1, iterations=2, elites=2, simulations=4)(
            choice(), rows, jax.random.key(0), TEMPERATURE
        )
        np.testing.assert_array_equal(planned.dialogue.token_BT[0], rows.token_BT[0])
        assert planned.dialogue.ended_B[0] and int(planned.tokens_B[0]) == 0
        assert int(planned.tokens_B[1]) > 0


def test_the_tree_sees_further_than_one_reply():
    """Only what the assistant says after a pays: c, later. The value knows nothing of it."""
    says = {
        pr.TO_ASSISTANT: {A: 0.5, B: 0.5},
        **dict.fromkeys((A, B, C), {pr.TO_USER: 1.0}),
        pr.TO_USER: {D: 1.0},
        D: {pr.TO_ASSISTANT: 1.0},
    }
    params = knowledge(says, since={(D, C): 48.0, (D, A): -20.0, (D, B): -20.0, (B, C): -48.0, (B, B): 20.0},
                       reward={C: 1.0})  # fmt: skip
    for depth, better in ((1, False), (2, True)):
        decide = compiled("gumbel", candidates=4, depth=depth, simulations=16)
        planned = decide(params, prompts(32), jax.random.key(0), TEMPERATURE)
        assert (np.mean(said(planned) == A) > 0.9) == better


# ---- the budget ----


def test_a_budget_buys_futures_or_simulations():
    def bought(plan, budget, **values):
        return lookahead.affordable(settings(plan, budget=budget, **values))

    turn, many = TURN_TOKENS, {"candidates": 3, "futures": 9, "depth": 2, "simulations": 9}
    own, future = 3 * turn, 3 * 3 * turn  # a future of two replies is three turns, of each of three candidates
    assert bought("rollouts", 0, **many).futures == 9
    assert bought("rollouts", own + 2 * future, **many).futures == 2
    assert bought("rollouts", own + 3 * future - 1, **many).futures == 2
    assert bought("rollouts", 10**6, **many).futures == 9
    rounds = 2 * own + (3 + 3 + 1) * 3 * turn  # the second round looks at the elite again
    assert bought("mpc", rounds, iterations=2, elites=1, **many).futures == 1
    assert bought("gumbel", own + 2 * (turn + own), **many).simulations == 2
    for plan, budget in (("rollouts", own + future - 1), ("mpc", rounds - 1), ("gumbel", own + turn)):
        with pytest.raises(config.ConfigError, match="too small"):
            bought(plan, budget, iterations=2, elites=1, **many)


def test_a_future_that_needs_more_tokens_is_cut_and_worth_its_value():
    """The user goes on being happy for ever; each reply earns 1, and a state is worth a quarter of the replies so far."""
    params, rows = happy_for_ever()
    limited = {"candidates": 2, "futures": 1, "depth": 9, "future_tokens": 6}
    planned = compiled("rollouts", **limited)(params, rows, jax.random.key(0), TEMPERATURE)
    # The longer prompt and its turn have 9 tokens, and 6 more make 15: caches of 16 tokens hold them. In the first row
    # that leaves room for replies that earn 1, 2, 3, and the value of 3; in the other one for such that earn 2 and 3.
    first = 1 + DISCOUNT * 2 + DISCOUNT**2 * 3 + DISCOUNT**3 * 0.75
    second = 2 + DISCOUNT * 3 + DISCOUNT**2 * 0.75
    assert planned.dialogue.token_BT.shape == (2, T) and (planned.dialogue.author_BT[:, 12:] == pr.END).all()
    np.testing.assert_allclose(planned.worth_B, [first, second], rtol=1e-3)
