"""What the model of the user is trained on."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import dialogue, tokens

from mbrl_lm import protocol as pr
from mbrl_lm import world_model

CHAT = pr.make_protocol("chat", pr.FIRST_PIECE + 8)
DEAL = pr.make_protocol("negotiation", pr.FIRST_PIECE + 8)


def test_user_tokens_are_the_users_real_words_handovers_and_ends():
    d = dialogue(CHAT, ["bos a >u b c >a d >u stop", "bos a >u b c >a d >u leave"], T=10)
    own_BT = np.zeros((2, 10), bool)
    own_BT[1, 5:] = True
    mask = world_model.user_tokens(d.replace(sampled_BT=own_BT))
    assert mask[0].tolist() == [x == "u" for x in "cccuuuaau."]
    assert mask[1].tolist() == [x == "u" for x in "cccuu.aa.."]


def test_real_tokens_of_an_outcome():
    d = dialogue(DEAL, ["bos >a b >o 1 2 3 stop"], T=10)
    assert world_model.real_tokens(d, pr.OUTCOME)[0].tolist() == [4 <= t < 8 for t in range(10)]


def test_end_loss_by_hand():
    logit = jnp.array([[0.0, 2.0, 2.0, -3.0]])
    loss = world_model.end_loss(logit, jnp.array([[True, True, False, False]]))
    p = 1 / (1 + np.exp(-np.array([0.0, 2.0, 2.0, -3.0])))
    np.testing.assert_allclose(loss, -np.log([[p[0], p[1], 1 - p[2], 1 - p[3]]]), rtol=1e-5)


def test_clipped_mae_by_hand():
    """Nothing is asked of a token that is likely enough; what is asked of the others is linear in their probability."""
    nll = -jnp.log(jnp.array([[0.05, 0.2, 0.21, 1.0]]))
    np.testing.assert_allclose(world_model.clipped_mae(nll, 0.2), [[0.95, 0.8, 0, 0]], rtol=1e-5)
    gradient = jax.grad(lambda x: world_model.clipped_mae(x, 0.2).sum())(nll)
    np.testing.assert_allclose(gradient, [[0.05, 0.2, 0, 0]], rtol=1e-5)  # p, where cross-entropy has 1


def test_closing_tokens():
    d = dialogue(CHAT, ["bos a >u b c >a d >u stop", "bos a >u b c >a d >u leave"], T=10)
    assert world_model.closing_tokens(CHAT, d)[0].tolist() == [t in (5, 8) for t in range(10)]
    assert world_model.closing_tokens(CHAT, d)[1].tolist() == [t in (5, 8) for t in range(10)]


def test_shuffled_targets_are_what_the_user_of_another_row_said_at_the_same_place():
    """Turn by turn, and nothing where the other one's turn is shorter, or was never said."""
    rows = ["bos a >u b c >a d >u stop", "bos a >u e >a f >u g h stop", "bos a >u a b >a f >u b >a f >u leave"]
    d = dialogue(CHAT, rows, T=14)
    found = world_model.shuffled_targets(d)
    expected = ["bos a >u a b >a d >u b", "bos a >u b c f >u stop _ _", "bos a >u e >a _ f >u g h f >u _"]
    assert found.tolist() == [tokens(row) + [pr.PAD] * (14 - len(row.split())) for row in expected]
    assert (found == d.token_BT)[d.author_BT != pr.USER].all()
