"""Real dialogues with the true user: the transcript, its rewards and its end are those of the environment in text."""

import functools

import jax
import numpy as np
import pytest
from fakes import follows, one_device, table_net
from tiny import noisy, take

from mbrl_lm import config, presets, tokenizer
from mbrl_lm import protocol as pr
from mbrl_lm.envs.concierge import TEST_UIDS, TRAIN_UIDS, Concierge, vocabulary
from mbrl_lm.envs.concierge.words import FILLERS
from mbrl_lm.envs.true_user import TrueUser
from mbrl_lm.nn import make_net
from mbrl_lm.scoring import score

SIZES = {"seed": 7, "tokens": 120, "turns": 4, "turn_tokens": 14, "model.width": 16, "model.mlp_width": 24}
KEY, TEMPERATURE, ROWS = jax.random.key(2), 0.7, 4
UIDS = list(TEST_UIDS[:6])
HAND_OVER = {"end": pr.STOP, "leave": pr.LEAVE}


def config_of(**values):
    return config.override(presets.preset("concierge", "tiny"), SIZES | values)


@functools.cache
def words():
    """A word model of all the environment says, but for one word."""
    known = [word for word in vocabulary() if word != "please"]
    return tokenizer.Tokenizer(tokenizer.train([" ".join(known)], config.Tokenizer()))


@functools.cache
def protocol():
    return pr.make_protocol("chat", words().vocab_size, words().unknown, SIZES["turn_tokens"])


@functools.cache
def policy():
    net = make_net(config_of().model, words().vocab_size)
    return net, noisy(jax.jit(net.init)(jax.random.key(0)))


@functools.cache
def true_user():
    return TrueUser(config_of(), policy()[0], protocol(), words(), one_device(), ROWS)


def play(uids=UIDS, split="test"):
    return true_user().play(policy()[1], KEY, uids, split, TEMPERATURE)


@pytest.fixture(scope="module")
def played():
    """Six dialogues in two chunks, the second filled up: (dialogues, outcomes)."""
    return play()


def spoken(dialogues, b):
    """[(role, token ids)] of the turns of a row."""
    author_T, turn_T, token_T = (x[b] for x in (dialogues.author_BT, dialogues.turn_BT, dialogues.token_BT))
    turns = [np.flatnonzero((turn_T == u) & (author_T != pr.END)) for u in range(turn_T.max() + 1)]
    return [(int(author_T[at[0]]), token_T[at].tolist()) for at in turns if len(at)]


def test_who_speaks_is_what_the_parser_reads(played):
    dialogues, _ = played
    dialogues.check()
    author_BT, turn_BT = map(np.asarray, pr.parse(protocol(), dialogues.token_BT))
    assert (dialogues.author_BT == author_BT).all() and (dialogues.turn_BT == turn_BT).all()
    assert dialogues.uid_B.tolist() == UIDS
    assert ((dialogues.author_BT == pr.ASSISTANT) == dialogues.sampled_BT).all()  # the user is not ours


def replayed(dialogues, b):
    """What the environment alone makes of a row's text: (rewards, their components' sums, outcome, why it was over)."""
    env = Concierge(SIZES["seed"], [UIDS[b]], "test")
    (_, context), (_, opening), *rest = spoken(dialogues, b)
    assert context == [pr.BOS, *words().encode(env.contexts[0]), pr.TO_USER]
    assert opening == [*words().encode(env.openings[0]), pr.TO_ASSISTANT]
    rewards, totals, length = [], {}, len(context) + len(opening)
    answers = [tokens for _, tokens in rest[1::2]] + [[]]
    for (_, said), answer in zip(rest[::2], answers, strict=False):
        length += len(said)
        if said[-1] != pr.TO_USER:
            return rewards, totals, env.outcome(0), "unsaid"
        (reply,) = env.step([words().decode(said)])
        rewards.append(sum(reply.reward.values()))
        totals = {name: totals.get(name, 0) + x for name, x in reply.reward.items()}
        whole = [*words().encode(reply.text), HAND_OVER.get(reply.ended, pr.TO_ASSISTANT)]
        assert answer == whole[: SIZES["tokens"] - length]
        length += len(answer)
        if answer != whole or reply.ended:
            return rewards, totals, env.outcome(0), reply.ended if answer == whole else "tokens"
    assert len(rewards) == SIZES["turns"]
    return rewards, totals, env.outcome(0), "turns"


def test_users_may_be_noisy(played):
    user = TrueUser(config_of(noise=0.4), policy()[0], protocol(), words(), one_device(), ROWS)
    fillers = [words().encode(word)[0] for word in FILLERS]
    for dialogues, some in ((user.openings(UIDS, "test"), True), (played[0], False)):
        said_BT = dialogues.author_BT == pr.USER
        assert np.isin(dialogues.token_BT[said_BT], fillers).any() == some


def test_the_signal_may_be_the_rating(played):
    rated = TrueUser(config_of(), policy()[0], protocol(), words(), one_device(), ROWS, "rating")
    dialogues, outcomes = rated.play(policy()[1], KEY, UIDS, "test", TEMPERATURE)
    assert (dialogues.token_BT == played[0].token_BT).all() and outcomes == played[1]
    assert dialogues.reward_BU.min() >= 0 and dialogues.reward_BU.max() > 0 and played[0].reward_BU.min() < 0


def test_replaying_the_text_by_hand_gives_the_same_user_the_same_rewards_and_the_same_end(played):
    dialogues, outcomes = played
    reasons = set()
    for b in range(len(UIDS)):
        rewards, totals, outcome, reason = replayed(dialogues, b)
        assert dialogues.reward_BU[b].tolist() == pytest.approx(rewards + [0] * (SIZES["turns"] - len(rewards)))
        assert {name: outcomes[b][name] for name in totals} == pytest.approx(totals)
        assert {name: outcomes[b][name] for name in outcome if name not in totals} == {
            name: x for name, x in outcome.items() if name not in totals
        }
        ended = reason in ("end", "leave")
        assert (dialogues.ended_B[b], dialogues.cut_B[b]) == (ended, not ended)
        assert (spoken(dialogues, b)[-1][1][-1] in HAND_OVER.values()) == ended
        reasons.add(reason)
    assert "leave" in reasons and reasons & {"turns", "tokens", "unsaid"}  # both kinds of end were seen


def test_nothing_follows_an_end(played):
    dialogues, _ = played
    length_B = (dialogues.token_BT != pr.PAD).sum(axis=1)
    for b, n in enumerate(length_B):
        assert not dialogues.token_BT[b, n:].any() and (dialogues.author_BT[b, n:] == pr.END).all()
        assert not np.isin(dialogues.token_BT[b, : n - 1], [pr.STOP, pr.LEAVE]).any()
    assert length_B.min() < length_B.max()


def test_log_probabilities_are_those_of_teacher_forcing(played):
    dialogues, _ = played
    net, params = policy()
    scores = jax.jit(lambda params, d: score(net, protocol(), params, d, temperature=TEMPERATURE))(params, dialogues)
    mine = dialogues.sampled_BT
    np.testing.assert_allclose(dialogues.logp_BT[mine], np.asarray(scores.logp_BT)[mine], atol=2e-5)
    assert not dialogues.logp_BT[~mine].any() and mine.sum() > 50


def test_a_dialogue_does_not_depend_on_the_others_of_its_batch(played):
    dialogues, outcomes = played
    for rows in ([4], [3, 5, 1]):
        some, told = play([UIDS[b] for b in rows])
        for name, x in take(dialogues, np.array(rows)).__dict__.items():
            np.testing.assert_allclose(getattr(some, name), x, atol=1e-5, err_msg=name)
        assert told == [outcomes[b] for b in rows]


def test_the_uid_decides_the_opening(played):
    dialogues, _ = played
    openings = true_user().openings(UIDS, "test")
    openings.check()
    for b in range(len(UIDS)):
        given = [token for _, turn in spoken(dialogues, b)[:2] for token in turn]
        assert openings.token_BT[b].tolist() == given + [pr.PAD] * (SIZES["tokens"] - len(given))
    backwards = true_user().openings(UIDS[::-1], "test")
    assert (backwards.token_BT[::-1] == openings.token_BT).all() and (backwards.uid_B[::-1] == UIDS).all()
    assert len({row.tobytes() for row in openings.token_BT}) == len(UIDS)
    assert not (true_user().openings(TRAIN_UIDS[:2], "train").token_BT == openings.token_BT[:2]).all(axis=1).any()


def test_a_user_who_is_content_ends_the_dialogue():
    goodbye = words().encode("goodbye")[0]
    params = follows(words().vocab_size, {pr.TO_ASSISTANT: goodbye, goodbye: pr.TO_USER})
    user = TrueUser(config_of(), table_net(), protocol(), words(), one_device(), 2)
    dialogues, outcomes = user.play(params, KEY, TRAIN_UIDS[:2], "train", 0.1)
    assert dialogues.ended_B.all() and not dialogues.cut_B.any() and [o["ended"] for o in outcomes] == ["end"] * 2
    for b in range(2):
        assert spoken(dialogues, b)[2] == (pr.ASSISTANT, [goodbye, pr.TO_USER])
        assert spoken(dialogues, b)[-1][1][-1] == pr.STOP and len(spoken(dialogues, b)) == 4
    assert dialogues.reward_BU[:, 0].tolist() == pytest.approx([o["turn_cost"] + o["outcome"] for o in outcomes])
    assert not dialogues.reward_BU[:, 1:].any()


def test_a_reply_that_runs_out_of_tokens_is_cut_and_ends_nothing():
    goodbye = words().encode("goodbye")[0]
    params = follows(words().vocab_size, {pr.TO_ASSISTANT: goodbye, goodbye: pr.TO_USER})
    opening = (true_user().openings(TRAIN_UIDS[:1], "train").token_BT != pr.PAD).sum()
    user = TrueUser(config_of(tokens=int(opening) + 3), table_net(), protocol(), words(), one_device(), 1)
    dialogues, outcomes = user.play(params, KEY, TRAIN_UIDS[:1], "train", 0.1)
    assert [len(said) for _, said in spoken(dialogues, 0)[2:]] == [2, 1] and outcomes[0]["ended"] == "end"
    assert dialogues.cut_B[0] and not dialogues.ended_B[0]


def test_a_dialogue_is_cut_after_the_most_turns_that_it_may_have():
    hello = words().encode("hello")[0]
    params = follows(words().vocab_size, {pr.TO_ASSISTANT: hello, hello: pr.TO_USER})
    user = TrueUser(config_of(turns=1, tokens=150), table_net(), protocol(), words(), one_device(), 4)
    dialogues, outcomes = user.play(params, KEY, TRAIN_UIDS[:8], "train", 0.1)
    assert [outcome["turns"] for outcome in outcomes] == [1] * 8 and dialogues.reward_BU.shape == (8, 1)
    stays = [b for b in range(8) if not outcomes[b]["ended"]]
    assert stays and all(dialogues.cut_B[b] and spoken(dialogues, b)[-1][1][-1] == pr.TO_ASSISTANT for b in stays)


def test_a_turn_that_runs_out_of_tokens_is_not_said():
    hello = words().encode("hello")[0]
    params = follows(words().vocab_size, {pr.TO_ASSISTANT: hello, hello: hello})
    opening = (true_user().openings(TRAIN_UIDS[:2], "train").token_BT != pr.PAD).sum(axis=1)
    cfg = config_of(tokens=int(opening.max()) + 5)  # the budget of a turn is 14
    user = TrueUser(cfg, table_net(), protocol(), words(), one_device(), 2)
    dialogues, outcomes = user.play(params, KEY, TRAIN_UIDS[:2], "train", 0.1)
    longest = int(np.argmax(opening))
    assert spoken(dialogues, longest)[2:] == [(pr.ASSISTANT, [hello] * 5)]
    assert dialogues.cut_B[longest] and not dialogues.ended_B[longest] and not dialogues.reward_BU[longest].any()
    assert outcomes[longest]["turns"] == 0 and outcomes[longest]["return"] == 0
    with pytest.raises(config.ConfigError, match="raise --config.tokens"):
        TrueUser(config_of(tokens=16), table_net(), protocol(), words(), one_device(), 2).openings(TRAIN_UIDS[:2], "train")
