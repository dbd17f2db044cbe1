"""Where the reward of an imagined dialogue comes from: `REWARDS` maps a name to `Dialogue, ... -> reward_BU`.

To add a reward, write a jittable function here and name it in REWARDS. Predictability of the user must never enter one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import protocol as pr
from mbrl_lm import value
from mbrl_lm.turns import gather
from mbrl_lm.types import Array, Dialogue, Heads, Turns

POINTS = 10  # that all items of a negotiation together are worth to either side


def learned(dialogue: Dialogue, turns: Turns, heads: Heads, centres_W: np.ndarray, generosity: float = 0.0) -> Array:
    """The reward head's mean where the user has replied; it was fitted to the rewards of real dialogues."""
    reward_BU = value.mean(gather(heads.reward_BTW, turns.reply_BU), centres_W)
    return jnp.where(turns.mask_BU, reward_BU, 0.0)


def split(dialogue: Dialogue, turns: Turns, heads: Heads, centres_W: np.ndarray, generosity: float = 0.0) -> Array:
    """Points of the own share in a negotiation: sum of count x own value, 0 without a deal or with an impossible one.

    The context opens with `count value` of three kinds of item; the outcome is `share share share`. The points, at
    most 10, go to the last assistant turn. With `generosity` what is left to the other side counts so much as well: its
    values are not known, and each kind of item is worth a third of its points on average.
    """
    numbers_BT = dialogue.token_BT - pr.NUMBER
    share_BI, agreed_B = outcome_share(dialogue)
    count_BI, value_BI = numbers_BT[:, 1:6:2], numbers_BT[:, 2:7:2]
    possible_B = agreed_B & jnp.all(share_BI <= count_BI, axis=1)
    left_B = POINTS * jnp.mean(1.0 - share_BI / jnp.maximum(count_BI, 1), axis=1)
    points_B = jnp.where(possible_B, jnp.sum(share_BI * value_BI, axis=1) + generosity * left_B, 0.0)
    return jnp.where(turns.last_BU, points_B[:, None], 0.0).astype(jnp.float32)


def sure_split(dialogue: Dialogue, turns: Turns, heads: Heads, centres_W: np.ndarray, generosity: float = 0.0) -> Array:
    """`split` times how likely the model finds the outcome: what is not yet clear is not yet earned (Lewis et al. 2017)."""
    outcome_BT = dialogue.author_BT == pr.OUTCOME
    logp_BTV = jax.nn.log_softmax(heads.logits_BTV)
    at_BT = jnp.take_along_axis(logp_BTV[:, :-1], dialogue.token_BT[:, 1:, None], axis=-1)[..., 0]
    logp_B = jnp.sum(jnp.where(outcome_BT[:, 1:], at_BT, 0.0), axis=1)
    return split(dialogue, turns, heads, centres_W, generosity) * jnp.exp(logp_B)[:, None]


def outcome_share(dialogue: Dialogue) -> tuple[Array, Array]:
    """The shares (B, 3) written in the outcome, and bool (B,) whether it is three numbers and an end."""
    T = dialogue.token_BT.shape[1]
    outcome_BT = dialogue.author_BT == pr.OUTCOME
    first_B = jnp.argmax(outcome_BT, axis=1)
    place = jnp.minimum(first_B[:, None] + jnp.arange(4)[None], T - 1)
    token_B4 = jnp.take_along_axis(dialogue.token_BT, place, axis=1)
    share_BI = token_B4[:, :3] - pr.NUMBER
    numbers = (share_BI >= 0) & (share_BI <= pr.LARGEST_NUMBER)
    whole_B = jnp.any(outcome_BT, axis=1) & jnp.all(numbers, axis=1) & (token_B4[:, 3] == pr.STOP)
    return share_BI, whole_B


REWARDS = {"learned": learned, "split": split, "sure_split": sure_split}
