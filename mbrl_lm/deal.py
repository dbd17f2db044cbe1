"""What the outcome of a negotiation is worth to both of its sides."""

from typing import NamedTuple

import jax.numpy as jnp

from mbrl_lm import outcome, reward
from mbrl_lm import protocol as pr
from mbrl_lm.config import Imagine
from mbrl_lm.types import Array, Dialogue


class Result(NamedTuple):
    """What finished negotiations are worth to either side."""

    score_a: Array  # i32 (B,), points, 0 without a deal
    score_b: Array
    agreed: Array  # bool (B,)
    waste: Array  # i32 (B,), the points that both together could have had besides, neither having less; 0 without a deal


def counts(side: Dialogue) -> Array:
    """i32 (B, 3): how many there are of each kind of item."""
    return side.token_BT[:, 1:6:2] - pr.NUMBER


def values(side: Dialogue) -> Array:
    """i32 (B, 3): what one of each kind is worth to this side."""
    return side.token_BT[:, 2:7:2] - pr.NUMBER


def result(ours: Dialogue, theirs: Dialogue, outcomes: int) -> Result:
    """Reads the outcomes of negotiations, each seen from both sides; `outcomes`: at least as many as one can have."""
    (share_a, wrote_a), (share_b, wrote_b) = (reward.outcome_share(side) for side in (ours, theirs))
    agreed_B = wrote_a & wrote_b & jnp.all(share_a + share_b == counts(ours), axis=1)
    return worth(counts(ours), values(ours), values(theirs), share_a, agreed_B, outcomes)


def result_for_both(ours: Dialogue, value_BI: Array, outcomes: int) -> Result:
    """The same where our outcome was read for both sides; `value_BI`: the values of the other one."""
    share_BI, wrote_B = reward.outcome_share(ours)
    agreed_B = wrote_B & jnp.all(share_BI <= counts(ours), axis=1)
    return worth(counts(ours), values(ours), value_BI, share_BI, agreed_B, outcomes)


def worth(count_BI: Array, value_a: Array, value_b: Array, share_BI: Array, agreed_B: Array, outcomes: int) -> Result:
    """Of deals by which side a gets `share_BI` of what there is."""
    other_BSI, possible_BS = (x[:, 1:] for x in outcome.slots(count_BI, outcomes))  # the first is no deal

    def points(share_BXI):
        a_BX = jnp.einsum("BXI,BI->BX", share_BXI, value_a)
        return a_BX, jnp.einsum("BXI,BI->BX", count_BI[:, None] - share_BXI, value_b)

    (a_B1, b_B1), (a_BS, b_BS) = points(share_BI[:, None]), points(other_BSI)
    no_worse_BS = possible_BS & (a_BS >= a_B1) & (b_BS >= b_B1)
    waste_B = jnp.max(jnp.where(no_worse_BS, a_BS + b_BS, 0), axis=1, initial=0) - (a_B1 + b_B1)[:, 0]
    score_a, score_b, waste_B = (jnp.where(agreed_B, x, 0) for x in (a_B1[:, 0], b_B1[:, 0], waste_B))
    return Result(score_a, score_b, agreed_B, waste_B)


def payoff(result: Result, terms: Imagine) -> Array:
    """f32 (B,): own points, with `generosity` for each of the other side's, less `waste` for each that neither has."""
    return result.score_a + terms.generosity * result.score_b - terms.waste * result.waste


def earned(dialogue: Dialogue, score_B: Array) -> Dialogue:
    """The points go to the last turn of the assistant, as in recorded dialogues."""
    opened_B = jnp.sum((dialogue.token_BT == pr.TO_ASSISTANT) & (dialogue.author_BT != pr.ASSISTANT), axis=1)
    last_BU = jnp.arange(dialogue.reward_BU.shape[1])[None] == jnp.maximum(opened_B - 1, 0)[:, None]
    return dialogue.replace(reward_BU=jnp.where(last_BU, score_B[:, None], 0).astype(jnp.float32))
