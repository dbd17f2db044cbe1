"""What the user wants, by hand: contexts of one, two and three items, and a network whose user says what it wants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import config_of, dialogue, noisy, take, tokens, world, written

from mbrl_lm import goals, learner, rollout, targets
from mbrl_lm import protocol as pr
from mbrl_lm.nn import Net, make_net
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.scoring import score
from mbrl_lm.types import Heads

W = world()
CHAT = dataclasses.replace(W.protocol, separator=tokens("h")[0])  # h stands between items
V, KEY = CHAT.vocab_size, jax.random.key(0)
LISTS = [
    "bos a b h c d h e f h g >u a >a e >u c stop",  # three items of two words, and a word that is none
    "bos a b h c d h e >u a >a e >u c stop",  # two
    "bos a h b h c h d h >u a >a e >u b stop",  # four of one word: more than are asked for
    "bos a b >u a >a e >u c stop",  # nothing is listed
]


def told(likes):
    """A network without memory, but for the first word of the context: after that, `likes[word]` are its logits for all."""
    table_VV = np.zeros((V, V), np.float32)
    for word, logits in likes.items():
        for other, x in logits.items():
            table_VV[tokens(word)[0], tokens(other)[0]] = x

    def heads(params, x_BTD, role_BT=None):
        logits_BTV = jnp.asarray(table_VV)[x_BTD[..., 0]]
        zeros_BT = jnp.zeros(x_BTD.shape[:2])
        one_BT1 = zeros_BT[..., None]
        return Heads(logits_BTV, one_BT1[..., None], one_BT1, zeros_BT, one_BT1[..., None], zeros_BT, one_BT1)

    def trunk(params, token_BT, dropout_key=None):
        return jnp.broadcast_to(token_BT[:, 1:2, None], (*token_BT.shape, 1))

    return Net(lambda key: {}, None, trunk, heads, None, None)


def drawn_view(net, protocol, params, dialogue, most, key, prior_BZ=0.0):
    """The dialogues as users see them who want what is drawn given what they have said in them."""
    logp_BZ = goals.log_likelihoods(net, protocol, params, dialogue, most) + prior_BZ
    return goals.own_view(protocol, dialogue, goals.drawn(logp_BZ, key, dialogue.uid_B))


def test_the_items_of_a_context():
    found_BZ = np.asarray(goals.items(CHAT, dialogue(CHAT, LISTS), 3))
    assert found_BZ.tolist() == [[True, True, True], [True, True, False], [True, True, True], [True, False, False]]


def test_the_separator_of_a_context_is_none_where_somebody_says_it():
    assert np.asarray(goals.items(CHAT, dialogue(CHAT, ["bos a b >u c d h e f h >a e >u stop"]), 3))[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("row", "z", "expected"),
    [
        (0, 0, "1 a b 2 c d h e f h g >u a >a e >u c stop"),
        (0, 1, "1 c d 2 a b h e f h g >u a >a e >u c stop"),
        (0, 2, "1 e f 2 a b h c d h g >u a >a e >u c stop"),
        (2, 2, "1 c 2 a h b h d h >u a >a e >u b stop"),
        (3, 0, "bos a b >u a >a e >u c stop"),
    ],
)
def test_the_view_of_a_user(row, z, expected):
    seen = goals.own_view(CHAT, dialogue(CHAT, LISTS[row : row + 1]), jnp.array([z]))
    assert np.asarray(seen.token_BT)[0, : len(expected.split())].tolist() == tokens(expected)
    np.testing.assert_array_equal(seen.author_BT, dialogue(CHAT, LISTS[row : row + 1]).author_BT)


def test_what_is_wanted_follows_from_what_is_said_by_bayes_rule():
    """Who wants `a` says it with e^2 times the weight of any other token; all that the user says counts, in both turns."""
    net = told({"a": {"a": 2.0}, "c": {"c": 1.0}})
    logp_BZ = np.asarray(goals.log_likelihoods(net, CHAT, {}, dialogue(CHAT, LISTS[:2]), 3))
    size = {"a": np.log(V - 1 + np.exp(2.0)), "c": np.log(V - 1 + np.exp(1.0)), "e": np.log(V)}
    said = 4  # a, the hand-over, c, the end
    by_hand = [2.0 - said * size["a"], 1.0 - said * size["c"], -said * size["e"]]
    np.testing.assert_allclose(logp_BZ[0], by_hand, rtol=1e-5)
    np.testing.assert_allclose(logp_BZ[1], [*by_hand[:2], -np.inf], rtol=1e-5)
    evidence = goals.log_evidence(net, CHAT, {}, dialogue(CHAT, LISTS[:2]), 3)
    np.testing.assert_allclose(evidence, [np.log(np.mean(np.exp(by_hand))), np.log(np.mean(np.exp(by_hand[:2])))], rtol=1e-5)


def test_what_was_likely_so_far():
    net = told({"a": {"a": 2.0}, "c": {"c": 1.0}})
    rows = dialogue(CHAT, LISTS[:2])
    so_far_BZT = np.asarray(goals.log_likelihoods_so_far(net, CHAT, {}, rows, 3))
    T, first = so_far_BZT.shape[2], int(np.argmax(np.all(rows.author_BT != pr.CONTEXT, axis=0)))
    for t in range(first, T):
        prompts = rollout.prefix(CHAT, rows, jnp.full(2, t + 1))
        expected = goals.log_likelihoods(net, CHAT, {}, prompts, 3)
        np.testing.assert_allclose(so_far_BZT[:, :, t], expected, rtol=1e-5)
    assert len(np.unique(so_far_BZT[0, 0].round(3))) == 5, "four tokens of the user"
    belief_BTZ = np.asarray(goals.belief(jnp.log(jnp.array([[[0.5, 0.0], [0.125, 1.0], [0.375, 0.0]]])), 2))
    np.testing.assert_allclose(belief_BTZ, [[[0.5, 0.375], [1.0, 0.0]]], rtol=1e-6)


def test_goals_are_drawn_as_bayes_rule_has_them_whatever_the_batch():
    net, rows = told({"a": {"a": 2.0}, "c": {"c": 1.0}}), 2000
    many = dialogue(CHAT, LISTS[:1] * rows)
    seen = drawn_view(net, CHAT, {}, many, 3, KEY)
    logp_Z = np.asarray(goals.log_likelihoods(net, CHAT, {}, take(many, slice(1)), 3))[0]
    share = np.mean(np.asarray(seen.token_BT)[:, 1:2] == np.array([tokens("a"), tokens("c"), tokens("e")]).T, axis=0)
    np.testing.assert_allclose(share, np.exp(logp_Z) / np.exp(logp_Z).sum(), atol=0.04)
    some = drawn_view(net, CHAT, {}, take(many, slice(7, 12)), 3, KEY)
    np.testing.assert_array_equal(some.token_BT, np.asarray(seen.token_BT)[7:12])


def test_copies_share_out_among_them_what_is_likely():
    logp_BZ = jnp.log(jnp.tile(jnp.array([[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0]]), (100, 1)))
    uid_B = jnp.arange(200, dtype=jnp.uint32)
    z_BC = np.asarray(goals.drawn(logp_BZ, KEY, uid_B, copies=4)).reshape(200, 4)
    assert np.sort(z_BC[::2]).tolist() == [[0, 0, 1, 2]] * 100
    assert z_BC[1::2].tolist() == [[1, 1, 1, 1]] * 100
    np.testing.assert_array_equal(z_BC[:, 0], goals.drawn(logp_BZ, KEY, uid_B))


# ---- imagination ----

PROMPTS = dialogue(CHAT, ["bos a b h c d h e f h g >u a >a", "bos c d h a b h >u a >a e >u"] * 4, ended=[False] * 8)


def imagined(view=None, user=None):
    return rollout.imagine(W.net, CHAT, W.params, PROMPTS, KEY, tokens=24, turns=4, user=user, user_view=view)


def test_with_the_view_of_the_assistant_the_user_says_the_same():
    np.testing.assert_array_equal(imagined(PROMPTS).token_BT, imagined(user=W.params).token_BT)


def test_the_user_speaks_from_its_own_view_and_the_assistant_from_the_public_one():
    view, other = goals.own_view(CHAT, PROMPTS, jnp.array([2, 1] * 4)), noisy(W.params, 3)
    whole = imagined(view, other)
    np.testing.assert_array_equal(np.asarray(whole.token_BT)[:, :10], np.asarray(PROMPTS.token_BT)[:, :10])
    own = whole.replace(token_BT=jnp.where(PROMPTS.author_BT == pr.END, whole.token_BT, view.token_BT))
    for seen, params, role in ((whole, W.params, pr.ASSISTANT), (own, other, pr.USER)):
        said_BT = np.asarray(whole.sampled_BT & (whole.author_BT == role))
        assert said_BT.sum() > 8
        logp_BT = np.asarray(score(W.net, CHAT, params, seen).logp_BT)
        np.testing.assert_allclose(np.asarray(whole.logp_BT)[said_BT], logp_BT[said_BT], atol=1e-4)


def test_imagined_users_have_goals_where_they_are_asked_for():
    settings = {"tokens": 24, "turns": 4}
    for user in (None, noisy(W.params, 3)):
        drawn = drawn_view(W.net, CHAT, user or W.params, PROMPTS, 3, jax.random.fold_in(KEY, 1))
        whole = goals.imagine(3, W.net, CHAT, W.params, PROMPTS, KEY, user=user, **settings)
        np.testing.assert_array_equal(whole.token_BT, imagined(drawn, user).token_BT)
        without = goals.imagine(0, W.net, CHAT, W.params, PROMPTS, KEY, user=user, **settings)
        np.testing.assert_array_equal(without.token_BT, imagined(user=user).token_BT)


def test_every_copy_of_a_prompt_has_a_user_of_its_own():
    """What was said is known beforehand here: whatever the users said, each item is as likely."""
    settings, user, copies = {"tokens": 24, "turns": 4}, noisy(W.params, 3), 3
    even_BZ = jnp.zeros((8, 3))
    z_B = goals.drawn(even_BZ, jax.random.fold_in(KEY, 1), PROMPTS.uid_B, copies)
    assert np.sort(np.asarray(z_B).reshape(8, copies)).tolist() == [[0, 1, 2]] * 8
    some = goals.imagine(3, W.net, CHAT, W.params, PROMPTS, KEY, user=user, copies=copies, logp_BZ=even_BZ, **settings)
    each = rollout.copied(PROMPTS, copies).replace(uid_B=rollout.copy_uids(PROMPTS.uid_B, copies))
    view = goals.own_view(CHAT, each, z_B)
    alone = rollout.imagine(W.net, CHAT, W.params, each, KEY, user=user, user_view=view, **settings)
    np.testing.assert_array_equal(some.token_BT, alone.token_BT)


# ---- learning ----


def built(rl: bool, rows: int = 4, most: int = 3, **values):
    cfg = config_of(world_model__goals=most, turns=3, **values)
    state = learner.init_state(W.net._replace(init=lambda key: W.params), optax.sgd(1.0), KEY, 3)
    real = dialogue(CHAT, [LISTS[b % 3] for b in range(rows)], U=3)
    dreamt = written(dialogue(CHAT, LISTS[:2], U=3)) if rl else None
    return targets.make_targets(W.net, CHAT, cfg, lambda rows: 1, rl)(state, real, dreamt, KEY)


@pytest.mark.parametrize(("rl", "own", "dreamt"), [(False, 2, 0), (True, 4, 2)])
def test_views_of_users_are_learnt_from_by_the_words_of_users_alone(rl, own, dreamt):
    batch, _, metrics = built(rl)
    marked_B = np.asarray(batch.dialogue.token_BT)[:, 0] == pr.WANTED
    assert marked_B.tolist() == [False] * 4 + [True] * own + [False] * dreamt
    for name, mask in batch.masks.items():
        assert np.any(np.asarray(mask)[marked_B]) == (name == "user"), name
    user_BT = np.asarray(batch.masks["user"])
    np.testing.assert_array_equal(
        user_BT, (np.asarray(batch.dialogue.author_BT) == pr.USER) & (np.arange(len(marked_B)) < 4 + own)[:, None]
    )
    if rl:
        assert float(metrics["train/real_turns"][1]) == 4
        without = built(rl, most=0)[0]
        for name in ("return_BU", "advantage_BT"):
            both = (np.asarray(getattr(x, name)) for x in (batch, without))
            rows = [np.delete(x, np.flatnonzero(marked_B), axis=0) if len(x) > 6 else x for x in both]
            np.testing.assert_allclose(*rows, atol=1e-6)


def test_every_view_is_learnt_from_where_half_of_them_would_not_fill_the_devices():
    assert (np.asarray(built(False, rows=3)[0].dialogue.token_BT)[:, 0] == pr.WANTED).sum() == 3


def test_a_user_mentions_the_items_whose_words_it_says():
    """It says `a` and `c`; the assistant's words, hand-overs and separators are none, nor is a word said twice two."""
    rows = [LISTS[0], "bos a b h a c h b e h >u a a h >a e >u c >a b >u stop"]
    found_BZ = np.asarray(goals.mentions(CHAT, dialogue(CHAT, rows), 3))
    assert found_BZ.tolist() == [[1, 1, 0], [1, 2, 0]]


def test_a_hint_counts_the_words_of_an_item():
    net, rows = told({}), 2000
    many = dialogue(CHAT, ["bos a b h a c h b e h >u a >a e >u c stop"] * rows)
    hint_BZ = np.log(2.0) * goals.mentions(CHAT, many, 3)
    seen = np.asarray(drawn_view(net, CHAT, {}, many, 3, KEY, hint_BZ).token_BT)[:, 1:3]
    share = [np.mean(np.all(seen == tokens(item), axis=1)) for item in ("a b", "a c", "b e")]
    np.testing.assert_allclose(share, np.array([2, 4, 1]) / 7, atol=0.04)


def test_goals_are_found_in_dialogues_that_do_not_tell_them():
    """Users name the first word of the item that they want, and then its second. A view tells the first one, too."""
    rng, rows = np.random.default_rng(0), 2048
    item_BZ = [[rng.permutation(list("abcdef"))[:2] for _ in range(3)] for _ in range(rows)]
    z_B = rng.integers(3, size=rows)
    listed = [" h ".join(" ".join(item) for item in items) for items in item_BZ]
    said = [items[z] for items, z in zip(item_BZ, z_B, strict=True)]
    texts = [f"bos {all_} h g >u {one} >a g >u {two} stop" for all_, (one, two) in zip(listed, said, strict=True)]
    real = dialogue(CHAT, texts, T=20, U=3)
    small = {"model__width": 32, "model__match_taps": 4, "model__match_width": 16, "imagine__batch": 0, "turns": 3}
    learnt = {"train__batch": 32, "train__supervised_steps": 200, "train__learning_rate": 6e-3, "train__warmup": 20}
    cfg = config_of(world_model__goals=3, **small, **learnt)
    net, optimizer = make_net(cfg.model, V), make_optimizer(cfg.train)
    update = jax.jit(learner.make_update(net, CHAT, cfg, optimizer, rl=False))
    state = learner.init_state(net, optimizer, KEY, 3)
    for step in range(cfg.train.supervised_steps):
        state, _ = update(state, take(real, rng.integers(rows, size=32)), None, jax.random.fold_in(KEY, step))
    some = take(real, slice(256))
    logp_BZ = np.asarray(goals.log_likelihoods(net, CHAT, state.target, some, 3))
    assert np.mean(logp_BZ.argmax(axis=1) == z_B[:256]) > 0.85  # one in ten or so wants what two items have in common
    user_BT = np.asarray(some.author_BT) == pr.USER
    public = -np.mean(np.sum(np.asarray(score(net, CHAT, state.target, some).nll_BT) * user_BT, axis=1))
    assert np.mean(goals.log_evidence(net, CHAT, state.target, some, 3)) > public + 0.1
