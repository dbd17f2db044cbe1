"""The learned user from the host: its texts and probabilities are those of the token loop and of `score`."""

import dataclasses

import jax
import numpy as np
import pytest
from fakes import follows, one_device, table_net
from tiny import config_of, noisy

from mbrl_lm import config, goals, nn, tokenizer
from mbrl_lm import protocol as pr
from mbrl_lm.envs.learned_user import LearnedUser, UserTurn
from mbrl_lm.scoring import score

PIECES = tokenizer.Tokenizer(tokenizer.train(["a b c d e"], config.Tokenizer()))
PROTOCOL = pr.make_protocol("chat", PIECES.vocab_size, PIECES.unknown, 4)
A, B = PIECES.encode("a b")
CFG = config_of(tokens=32, turns=3, turn_tokens=4, model__layers=1)
PROMPT = [pr.BOS, *PIECES.encode("e e"), pr.TO_USER, A, pr.TO_ASSISTANT, B, pr.TO_USER]


def user_of(net, rows=2) -> LearnedUser:
    return LearnedUser(CFG, net, PROTOCOL, PIECES, one_device(), rows)


def test_prompts_and_turns_as_tokens():
    user = user_of(table_net())
    assert user.prompt("e e", [("user", "a"), ("assistant", "b")]) == PROMPT
    assert user.go_on(PROMPT, [("user", "c")]) == [*PROMPT, *PIECES.encode("c"), pr.TO_ASSISTANT]
    assert user.prompt("e e", []) == PROMPT[:4]
    turns = {UserTurn("a b", ""): pr.TO_ASSISTANT, UserTurn("a b", "end"): pr.STOP, UserTurn("a b", "leave"): pr.LEAVE}
    assert all(user.turn_tokens(turn) == [A, B, token] for turn, token in turns.items())
    assert user.turn_tokens(UserTurn("<end>", ""))[0] == PIECES.unknown[0], "text writes no special token"
    assert user.leaves_room([0] * 28) and not user.leaves_room([0] * 29)


@pytest.mark.parametrize("closing, ended", [(pr.TO_ASSISTANT, ""), (pr.STOP, "end"), (pr.LEAVE, "leave")])
def test_it_says_what_the_network_says(closing, ended):
    params = follows(PIECES.vocab_size, {pr.TO_USER: A, A: B, B: closing})
    turns = user_of(table_net()).write(params, [PROMPT, PROMPT[:4], PROMPT], [0, 1, 2], jax.random.key(0))
    assert turns == [UserTurn("a b", ended)] * 3


def test_a_turn_that_runs_out_of_tokens_is_cut():
    params = follows(PIECES.vocab_size, {pr.TO_USER: A, A: A})
    user = user_of(table_net())
    long = user.prompt("e e e e e", [("user", "a"), ("assistant", "b")] * 6)
    assert len(long) == 31 and user.write(params, [long], [0], jax.random.key(0)) == [UserTurn("a", "cut")]


def test_probabilities_are_those_of_score():
    net = nn.make_net(CFG.model, PIECES.vocab_size)
    params = jax.tree.map(lambda x: 3 * x, net.init(jax.random.key(1)))
    user, turns = user_of(net), [UserTurn("c d", ""), UserTurn("", "leave"), UserTurn("a", "end")]
    rows = [user.turn_tokens(turn) for turn in turns]
    got = user.log_prob(params, [PROMPT, PROMPT, PROMPT[:4]], rows)
    for value, prompt, row in zip(got, (PROMPT, PROMPT, PROMPT[:4]), rows, strict=True):
        dialogue = user._dialogue([[*prompt, *row]], [0])
        nll_T = np.asarray(score(net, PROTOCOL, params, dialogue).nll_BT)[0]
        assert value == pytest.approx(-nll_T[len(prompt) : len(prompt) + len(row)].sum(), rel=1e-5)
    assert len(set(np.round(got, 4))) == 3


def test_a_prompt_with_many_turns_is_read_once(monkeypatch):
    user, read = user_of(table_net()), []
    weigh = user._weigh
    monkeypatch.setattr(user, "_weigh", lambda params, part: read.append(len(part.uid_B)) or weigh(params, part))
    turns = [user.turn_tokens(UserTurn(text, "end")) for text in "abcd"]
    params = follows(PIECES.vocab_size, {pr.TO_USER: A, A: pr.STOP})
    assert np.argmax(user.log_prob(params, [PROMPT] * 4, turns)) == 0
    assert sum(read) == 2 + 4, "two rows at a time: the prompt and one that fills up, and four with their turns"


def test_what_does_not_fit_is_explained():
    with pytest.raises(config.ConfigError, match="raise --config.tokens"):
        user_of(table_net()).log_prob(None, [[A] * 30], [[A] * 3])


def test_with_goals_a_turn_follows_from_what_the_user_may_want_after_what_it_has_said():
    """By hand: sum over z of p(z | said before) p(turn | own view of z)."""
    protocol = dataclasses.replace(PROTOCOL, separator=PIECES.encode("e")[0])
    cfg = dataclasses.replace(CFG, world_model=config.WorldModel(goals=3))
    net = nn.make_net(cfg.model, PIECES.vocab_size)
    params = noisy(net.init(jax.random.key(1)))
    user = LearnedUser(cfg, net, protocol, PIECES, one_device(), 2)
    prompt = user.prompt("a b e c d e c", [("user", "a"), ("assistant", "b")])
    row = user.turn_tokens(UserTurn("d", "end"))
    logp_CZ = np.zeros((2, 2))  # of what was said before, and of the turn; of both items
    for z in range(2):
        view = goals.own_view(protocol, user._dialogue([[*prompt, *row]], [0]), np.array([z]))
        said_T = -np.asarray(score(net, protocol, params, view).nll_BT)[0] * (np.asarray(view.author_BT)[0] == pr.USER)
        logp_CZ[:, z] = said_T[: len(prompt)].sum(), said_T[len(prompt) :].sum()
    before_Z, turn_Z = np.exp(logp_CZ)
    assert user.log_prob(params, [prompt], [row])[0] == pytest.approx(np.log(before_Z @ turn_Z / before_Z.sum()), abs=1e-4)
    assert abs(turn_Z[0] - turn_Z[1]) > 0.01 * turn_Z.max()
    texts = {turn.text for turn in user.write(params, [prompt] * 8, range(8), jax.random.key(0))}
    assert len(texts) > 1
