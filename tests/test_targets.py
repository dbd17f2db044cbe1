"""What an update learns towards, by hand: a network that says known things of each token, and dialogues of three turns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import config_of, dialogue, take, tokens, written

from mbrl_lm import learner, targets, value
from mbrl_lm import protocol as pr
from mbrl_lm.nn import Net
from mbrl_lm.scoring import score
from mbrl_lm.turns import find_turns, total
from mbrl_lm.types import Heads

V = pr.FIRST_PIECE + 8
CHAT = pr.make_protocol("chat", V, turn_tokens=4)
CENTRES = value.bin_centres(11, 3.0)
KEY = jax.random.key(0)
G = 0.9  # the discount
#        0   1 2  3 4  5 6  7 8  9 10 11 12 13 14
THREE = "bos e >a a >u b >a c >u h >a d >u b stop"
OPENS, SAYS, STOPS = (tokens(x)[0] for x in (">a", ">u", "stop"))
LN2 = np.log(2)


def told_net(values=({},), rewards=None, doubtful=(), real=None) -> Net:
    """A network without memory that knows, by the token just read: each head's value, the reward, and how real it sounds.

    After a token of `doubtful` its two user heads are certain of different words; otherwise they agree.
    """
    E = len(values)
    table_VE, reward_V, real_V = np.zeros((V, E), np.float32), np.zeros(V, np.float32), np.zeros(V, np.float32)
    for e, head in enumerate(values):
        for token, x in head.items():
            table_VE[token, e] = x
    reward_V[list(rewards or {})], real_V[list(real or {})] = list((rewards or {}).values()), list((real or {}).values())
    user_VEV = np.zeros((V, 2, V), np.float32)
    for token in doubtful:
        user_VEV[token, 0, 20] = user_VEV[token, 1, 21] = 60.0

    def bins(x):
        return jnp.log(value.two_hot(jnp.asarray(x), CENTRES) + 1e-30)

    def init(key):
        parts = {"value_VEW": bins(table_VE), "reward_VW": bins(reward_V), "logits_VV": jnp.zeros((V, V))}
        return parts | {"user_VEV": jnp.asarray(user_VEV), "real_V": jnp.asarray(real_V)}

    def heads(params, x_BTD, role_BT=None):
        read = {name: table[x_BTD[..., 0]] for name, table in params.items()}
        end_BT = jnp.zeros(x_BTD.shape[:2])
        named = {"value_BTEW": read["value_VEW"], "reward_BTW": read["reward_VW"], "user_BTEV": read["user_VEV"]}
        return Heads(
            logits_BTV=read["logits_VV"], end_BT=end_BT, real_BT=read["real_V"], belief_BTZ=end_BT[..., None], **named
        )

    return Net(init, None, lambda params, token_BT, dropout_key=None: jnp.asarray(token_BT)[..., None], heads, None, None)


def rows(text=THREE, reward=(0.0, 0.25, 0.5), copies=1):
    return dialogue(CHAT, [text] * copies, T=16, U=3, reward=[list(reward)] * copies)


def built(net, imagined=None, real=None, rl=True, moments=(0.0, 0.04), key=KEY, anchors=None, **values):
    """The targets of a real and an imagined dialogue, the same text by default: batch, state, metrics."""
    values = {"returns__lambda_": 1.0, "returns__discount": G, "returns__scale_decay": 1.0, "turns": 3} | values
    cfg, real = config_of(**values), rows() if real is None else real
    state = learner.init_state(net, optax.sgd(1.0), KEY, 3)
    state = state.replace(doubt_U=jnp.full(3, moments[0]), doubt_square_U=jnp.full(3, moments[1]))
    if anchors is not None:
        state = state.replace(anchor_XW=jnp.array(anchors, jnp.float32))
    imagined = written(rows()) if imagined is None else imagined
    return targets.make_targets(net, CHAT, cfg, lambda rows: 1, rl)(state, real, imagined if rl else None, key)


KNOWS = {"values": ({OPENS: 2.0},), "rewards": {OPENS: 0.25, STOPS: 1.0}}
REAL = [G * (0.25 + G * 0.5), 0.25 + G * 0.5, 0.5]  # of its rewards 0, 1/4 and 1/2
WHOLE = [0.25 + G * (0.25 + G * 1.0), 0.25 + G * 1.0, 1.0]


def returns(batch):
    return np.asarray(batch.return_BU).round(5).tolist()


def mask(batch, name):
    return np.flatnonzero(np.asarray(batch.masks[name])[1]).tolist()


def test_returns_of_real_and_of_imagined_dialogues():
    batch, _, metrics = built(told_net(**KNOWS))
    np.testing.assert_allclose(batch.return_BU, [REAL, WHOLE], rtol=1e-5)
    np.testing.assert_allclose(batch.slow_value_BU, np.full((2, 3), 2.0), rtol=1e-5)
    assert [int(x) for x in metrics["train/kept"]] == [3, 3]
    assert mask(batch, "policy_imagined") == [3, 4, 7, 8, 11, 12]


def test_what_followed_in_real_dialogues_counts_as_far_as_the_policy_would_have_followed():
    """Who wrote the second turn was twice as sure of it as the policy is, and half as sure of the third."""
    net = told_net(**KNOWS)
    sure = written(rows()).replace(reward_BU=rows().reward_BU)
    behaviour = score(net, CHAT, net.init(KEY), sure).logp_BT
    behaviour_BT = behaviour.at[:, 7].add(LN2).at[:, 11].add(-LN2)
    batch, _, _ = built(net, real=sure.replace(logp_BT=behaviour_BT), returns__vtrace=True)
    third = 0.5
    second = 0.25 + G * third
    first = G * (2.0 + 0.5 * (second - 2.0))  # the second turn was twice as likely as under the policy
    towards = [first, 2.0 + 0.5 * (second - 2.0), third]  # values: all turns open at 2
    np.testing.assert_allclose(batch.return_BU, [towards, WHOLE], rtol=1e-5)
    same, _, _ = built(net, real=sure.replace(logp_BT=behaviour), returns__vtrace=True)
    np.testing.assert_allclose(same.return_BU, [REAL, WHOLE], rtol=1e-5)


# ---- guards ----


def test_an_imagined_dialogue_is_cut_where_its_reply_is_doubtful():
    """The reply to the second turn is "h >a", and after "h" the user heads are of two minds: ln 2, of deviations of 0.2."""
    net = told_net(**KNOWS, doubtful=tokens("h"))
    batch, _, metrics = built(net, guard__truncation=3.4)
    assert batch.turns.mask_BU.tolist() == [[True] * 3, [True, False, False]]
    np.testing.assert_allclose(batch.return_BU, [REAL, [0.25 + G * 2.0, 0, 0]], rtol=1e-5)  # its bootstrap stays
    assert mask(batch, "policy_imagined") == [3, 4] and mask(batch, "value") == [0]
    assert not batch.turns.last_BU[1].any() and batch.turns.last_BU[0].tolist() == [False, False, True]
    assert [float(x) for x in metrics["train/kept"]] == [1, 3]
    np.testing.assert_allclose(metrics["train/doubt"], [LN2 / 0.2, 3], rtol=1e-4)
    assert returns(built(net, guard__truncation=3.5)[0]) == returns(built(net)[0])  # 3.466 deviations are not enough


def test_real_replies_calibrate_the_doubt():
    net = told_net(**KNOWS, doubtful=tokens("h"))
    _, state, _ = built(net, returns__scale_decay=0.5)
    np.testing.assert_allclose(state.doubt_U, [0, LN2 / 2, 0], atol=1e-6)
    np.testing.assert_allclose(state.doubt_square_U, [0.02, 0.02 + LN2**2 / 2, 0.02], rtol=1e-5)
    calm = written(rows(THREE.replace("h", "b"), copies=4))
    doubted = built(net, imagined=calm, returns__scale_decay=0.5)[1]
    np.testing.assert_allclose(doubted.doubt_U, state.doubt_U, atol=1e-6, err_msg="imagined replies do not")


def test_replies_to_the_policy_itself_calibrate_the_doubt_where_there_are_any():
    """Recorded dialogues, which the model may know by heart, have no doubt about "b", and the policy's have it about "h"."""
    net, known = told_net(**KNOWS, doubtful=tokens("h")), rows(THREE.replace("h", "b"), copies=3)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), known, written(rows()))
    state = built(net, real=both, returns__scale_decay=0.5)[1]
    np.testing.assert_allclose(state.doubt_U, [0, LN2 / 2, 0], atol=1e-6)


def test_doubt_is_paid_for_in_imagination():
    net = told_net(**KNOWS, doubtful=tokens("h"))
    batch, _, _ = built(net, guard__penalty=0.1)
    second = 0.25 - 0.1 * LN2 / 0.2 + G * 1.0
    np.testing.assert_allclose(batch.return_BU, [REAL, [0.25 + G * second, second, 1]], rtol=1e-4)
    calm, _, _ = built(told_net(**KNOWS), moments=(1.0, 1.04), guard__penalty=0.1)
    np.testing.assert_allclose(
        calm.return_BU, [REAL, WHOLE], rtol=1e-5, err_msg="less doubt than of real replies earns none"
    )


def test_an_imagined_dialogue_is_cut_where_its_reply_sounds_unreal():
    net = told_net(**KNOWS, real={OPENS: 2.0, STOPS: -3.0})  # a chance of 0.047 to be real
    batch, _, _ = built(net, guard__discriminator=0.1)
    assert batch.turns.mask_BU.tolist() == [[True] * 3, [True, True, False]]
    np.testing.assert_allclose(batch.return_BU, [REAL, [0.25 + G * (0.25 + G * 2), 0.25 + G * 2, 0]], rtol=1e-5)
    assert returns(built(net, guard__discriminator=0.04)[0]) == returns(built(net)[0])
    # The discriminator itself learns from the turns that it leaves.
    assert mask(batch, "imagined_reply") == [0, 1] and np.asarray(batch.masks["real_reply"]).tolist() == [
        [True] * 3,
        [False] * 3,
    ]


def test_anchors_map_imagined_returns_only():
    batch, _, _ = built(told_net(**KNOWS), guard__anchors=True, anchors=[[0, 2], [1, 7]])  # 3 x + 1 - x
    np.testing.assert_allclose(batch.return_BU, [REAL, 3 * np.array(WHOLE) + 1], rtol=1e-5)
    cut, _, _ = built(
        told_net(**KNOWS, doubtful=tokens("h")), guard__anchors=True, anchors=[[0, 2], [1, 7]], guard__truncation=3
    )
    np.testing.assert_allclose(cut.return_BU[1], [1 + 3 * 2 + 0.25 + G * 2 - 2 + 0, 0, 0], rtol=1e-5)


def test_the_oracle_earns_what_the_environment_gives():
    heard = written(rows()).replace(reward_BU=rows().reward_BU)
    batch, _, _ = built(told_net(**KNOWS), imagined=heard, imagine__user="oracle")
    np.testing.assert_allclose(batch.return_BU, [REAL, REAL], rtol=1e-5)


# ---- values ----


def test_a_target_is_the_smaller_of_two_values():
    short = rows("bos e >a a >u b >a", reward=[0.5])
    imagined = take(written(short), [0])
    two = told_net(values=({OPENS: 2.0}, {OPENS: -1.0}), rewards={OPENS: 0.25})
    batch, _, _ = built(two, imagined, short, model__value_heads=2)
    np.testing.assert_allclose(batch.return_BU[:, 0], [0.5 - G, 0.25 - G], rtol=1e-5)
    np.testing.assert_allclose(batch.slow_value_BU[:, 0], [0.5, 0.5], rtol=1e-5)  # of an advantage, their mean
    three = told_net(values=({OPENS: 2.0}, {OPENS: -1.0}, {OPENS: 1.0}))
    seen = {
        round(float(built(three, imagined, short, key=jax.random.key(n), model__value_heads=3)[0].return_BU[0, 0] - 0.5), 4)
        for n in range(12)
    }
    assert seen == {round(-G, 4), round(G, 4)}  # -1 of two pairs, 1 of the third
    one = built(told_net(values=({OPENS: 2.0},)), imagined, short)[0]
    np.testing.assert_allclose(one.return_BU[0, 0], 0.5 + G * 2, rtol=1e-5)


def test_which_rows_a_member_learns_from_hangs_on_the_rows_uid_alone():
    uid_B = jnp.arange(1000, dtype=jnp.uint32) * 7
    rows_BE = learner.bootstrap(uid_B, 3)
    assert set(np.unique(rows_BE)) == {0.0, 2.0}
    np.testing.assert_allclose(rows_BE.mean(axis=0), [1, 1, 1], atol=0.1)
    assert abs(np.corrcoef(rows_BE.T)[0, 1]) < 0.1
    order = np.random.default_rng(0).permutation(1000)[:50]
    assert (learner.bootstrap(uid_B[order], 3) == rows_BE[order]).all()
    assert (learner.bootstrap(uid_B, 1) == 1).all() and learner.bootstrap(uid_B, 0).shape == (1000, 0)


def component(net, batch, name, params=None, **values):
    """A component of the loss, (B, T) or (B, U)."""
    cfg, params = config_of(turns=3, **values), net.init(KEY) if params is None else params
    return np.asarray(learner.losses(net, CHAT, cfg, params, net.init(KEY), None, batch, None)[name])


def test_each_value_learns_from_its_own_rows():
    net, uids = told_net(values=({OPENS: 2.0}, {OPENS: -1.0})), np.arange(40, dtype=np.uint32)
    real = rows(copies=40).replace(uid_B=uids)
    batch, _, _ = built(net, imagined=written(real), real=real, model__value_heads=2)
    sure = net.init(KEY)["value_VEW"][OPENS]  # (E, W), log-probabilities
    loss_EBU = [value.cross_entropy(sure[e][None, None], batch.return_BU, CENTRES) for e in (0, 1)]
    which_BE = learner.bootstrap(jnp.concatenate([uids, uids]), 2)
    expected = sum(which_BE[:, e, None] * loss_EBU[e] for e in (0, 1)) / 2
    for name in ("value", "value_real"):
        np.testing.assert_allclose(component(net, batch, name, model__value_heads=2), expected, rtol=1e-4)
    assert len(np.unique(np.asarray(which_BE), axis=0)) == 4


def test_the_slow_value_pulls_to_what_the_slow_critic_says():
    slow, present = told_net(values=({OPENS: 2.0},)), told_net(values=({OPENS: 0.5},)).init(KEY)
    batch, _, _ = built(slow)
    loss_BU = component(slow, batch, "slow_value", present)
    expected = value.cross_entropy(present["value_VEW"][OPENS, 0], jnp.float32(2.0), CENTRES)
    np.testing.assert_allclose(loss_BU, np.full((2, 3), expected), rtol=1e-4)
    assert (np.asarray(batch.masks["slow_value"]) == np.asarray(batch.turns.mask_BU)).all()
    gradient = jax.grad(
        lambda p: learner.losses(slow, CHAT, config_of(turns=3), p, p, None, batch, None)["slow_value"].sum()
    )
    assert np.abs(gradient(present)["value_VEW"]).max() > 1 > 1e-3 > np.abs(gradient(slow.init(KEY))["value_VEW"]).max()


# ---- imagination without a reply ----

SPOKEN = "bos e >a a >u b >a c >u"


def test_an_unanswered_turn_counts_where_it_is_asked_for():
    cases = {SPOKEN: [(2, 4, 6, False), (6, 8, 8, False)], THREE: [(2, 4, 6, False), (6, 8, 10, False), (10, 12, 14, True)]}
    cases |= {SPOKEN + " b": [(2, 4, 6, False)], "bos e >a a >u b >a c": [(2, 4, 6, False)]}
    for text, expected in cases.items():
        found = find_turns(CHAT, rows(text), unanswered=True)
        columns = (found.open_BU, found.close_BU, found.reply_BU, found.last_BU)
        kept = found.mask_BU[0].tolist()
        assert [
            row for row, keep in zip(zip(*(x[0].tolist() for x in columns), strict=True), kept, strict=True) if keep
        ] == expected
        answered = find_turns(CHAT, rows(text))
        unlike = np.flatnonzero(np.asarray(found.mask_BU != answered.mask_BU)[0])
        assert unlike.tolist() == ([1] if text == SPOKEN else [])


def test_without_replies_a_turn_is_worth_the_value_where_it_closes():
    net = told_net(values=({OPENS: 2.0, SAYS: 0.75},), rewards={OPENS: 0.25, SAYS: 9.0, STOPS: 9.0})
    own = written(rows("bos e >a a >u", reward=()))
    batch, _, _ = built(net, own, imagine__replies=0)
    np.testing.assert_allclose(batch.return_BU, [REAL, [0.75, 0, 0]], rtol=1e-4)  # not discounted, and no reward yet
    np.testing.assert_allclose(batch.slow_value_BU[1, 0], 2.0, rtol=1e-5)
    assert mask(batch, "policy_imagined") == [3, 4] and mask(batch, "value") == [0]
    assert not built(net, own, imagine__replies=1)[0].turns.mask_BU[1].any()
    penalised, _, _ = built(
        told_net(values=({SAYS: 0.75},), doubtful=tokens("a")), own, imagine__replies=0, guard__penalty=1.0
    )
    np.testing.assert_allclose(penalised.return_BU[1, 0], 0.75, rtol=1e-4)  # nobody has replied who could be doubted


def test_without_replies_real_values_are_learnt_where_turns_close_too():
    net = told_net(values=({OPENS: 2.0, SAYS: 0.75},))
    own, params = written(rows("bos e >a a >u", reward=())), net.init(KEY)
    at = {}
    for replies in (0, 4):
        batch, _, _ = built(net, own, imagine__replies=replies)
        for name in ("value", "value_real"):

            def loss(params, batch=batch, name=name, replies=replies):
                cfg = config_of(turns=3, imagine__replies=replies)
                found = learner.losses(net, CHAT, cfg, params, params, None, batch, None)[name]
                return targets.masked_sum(found, batch.masks[name])

            gradient_V = np.abs(jax.grad(loss)(params)["value_VEW"]).max(axis=(1, 2))
            at[replies, name] = set(np.flatnonzero(gradient_V > 1e-3).tolist())
    assert at == {(0, "value"): {OPENS}, (0, "value_real"): {OPENS, SAYS}, (4, "value"): set(), (4, "value_real"): {OPENS}}


# ---- negative controls ----


def test_predictability_is_a_reward_only_as_a_control():
    net, own = told_net(**KNOWS), written(rows())
    nats_BU = total(CHAT, own, jnp.asarray(own.logp_BT), 3)[0] / jnp.array([2.0, 2.0, 2.0])
    by_hand = [own.logp_BT[0, a : b + 1].mean() for a, b in ((5, 6), (9, 10), (13, 14))]
    np.testing.assert_allclose(nats_BU, by_hand, rtol=1e-5)
    batch, _, _ = built(net, own, control="predictability")
    third = 1.0 + by_hand[2]
    second = 0.25 + by_hand[1] + G * third
    np.testing.assert_allclose(batch.return_BU, [REAL, [0.25 + by_hand[0] + G * second, second, third]], rtol=1e-4)
    np.testing.assert_allclose(built(net, own)[0].return_BU, [REAL, WHOLE], rtol=1e-5)


def test_the_policy_gradient_reaches_imagined_user_turns_only_as_a_control():
    net = told_net(values=({OPENS: 2.0},), rewards={OPENS: 0.25, STOPS: 1.0})
    batch, _, _ = built(net, control="user_gradient")
    advantage_U = np.asarray(batch.return_BU - batch.slow_value_BU)
    assert mask(batch, "policy_imagined") == list(range(3, 15))
    for places, u in (((3, 4, 5, 6), 0), ((7, 8, 9, 10), 1), ((11, 12, 13, 14), 2)):
        np.testing.assert_allclose(batch.advantage_BT[1, jnp.array(places)], np.full(4, advantage_U[1, u]), rtol=1e-5)
    assert not batch.masks["policy_imagined"][0].any()
    plain, _, _ = built(net)
    for name in set(batch.masks) - {"policy_imagined"}:
        assert (batch.masks[name] == plain.masks[name]).all(), name
    assert mask(plain, "policy_imagined") == [3, 4, 7, 8, 11, 12]
    assert not np.asarray(plain.advantage_BT)[plain.dialogue.author_BT == pr.USER].any()


def test_a_shuffled_world_model_learns_other_users_replies_in_real_dialogues_only():
    other = "bos e >u d >a a >u f f >a c >u h leave"
    real = dialogue(CHAT, [THREE, other], T=16, U=3)
    batch, _, _ = built(told_net(), imagined=written(real), real=real, world_model__shuffled=True)
    changed_BT = np.asarray(batch.target_BT != batch.dialogue.token_BT)
    assert changed_BT[0].sum() > 1 and changed_BT[1].sum() > 1 and not changed_BT[2:].any()
    assert not (changed_BT & (np.asarray(batch.dialogue.author_BT) != pr.USER)).any()
    for values in ({"rl": False, "world_model__shuffled": True}, {}):
        plain, _, _ = built(told_net(), imagined=written(real), real=real, **values)
        assert (plain.target_BT == plain.dialogue.token_BT).all()
    # The update's user loss is the likelihood of these; everything else is as it was.
    net, params = told_net(), told_net().init(KEY)
    params["logits_VV"] = jnp.asarray(np.random.default_rng(0).normal(size=(V, V)), jnp.float32)
    nll_BT = component(net, batch, "user", params)
    logp = jax.nn.log_softmax(params["logits_VV"])
    for b, t in zip(*np.nonzero(changed_BT), strict=True):
        np.testing.assert_allclose(nll_BT[b, t], -logp[batch.dialogue.token_BT[b, t - 1], batch.target_BT[b, t]], rtol=1e-4)
    assert (component(net, batch, "policy_real", params) == component(net, plain, "policy_real", params)).all()


@pytest.mark.parametrize(
    "values, views",
    [({"rl": False}, 1), ({}, 1), ({"loss__user": 0.0}, 0), ({"world_model__shuffled": True}, 0)]
    + [({"rl": False, "world_model__shuffled": True}, 1)],
)
def test_users_see_dialogues_from_their_own_view_where_their_own_words_are_learnt(values, views):
    batch, _, _ = built(told_net(), world_model__goals=2, train__supervised_steps=6, **values)
    assert len(batch.dialogue.token_BT) == 1 + views + values.get("rl", True)


@pytest.mark.parametrize("rl", [False, True])
def test_imagined_tokens_are_counted(rl):
    own = written(rows())
    own = own.replace(sampled_BT=own.sampled_BT & (own.turn_BT > 1))
    _, state, _ = built(told_net(), own, rl=rl)
    assert int(state.imagined_tokens) == (10 if rl else 0)


def test_an_advantage_fades_by_every_token_that_follows():
    """Lewis et al. (2017): of a dialogue of fifteen tokens the last own one, with three after it, keeps G'^3."""
    plain, _, _ = built(told_net(), policy__baseline="mean")
    faded, _, _ = built(told_net(), policy__baseline="mean", returns__token_discount=0.5)
    ratio_BT = np.asarray(faded.advantage_BT) / np.where(plain.advantage_BT == 0, 1, plain.advantage_BT)
    own = np.flatnonzero(np.asarray(plain.advantage_BT)[0])
    length = len(THREE.split())
    np.testing.assert_allclose(ratio_BT[0, own], 0.5 ** (length - 1 - own), rtol=1e-6)
    assert length - 1 - own[-1] == 2  # b, stop
