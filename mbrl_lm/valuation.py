"""What the other side of a negotiation values, as a hidden variable: imagined, it then bargains as somebody who knows it.

The counts of the items are known to both, and all of them are worth POINTS to either; so there are a few tens of valuations
v that the other side may have. In its *own view* of the dialogue it is the assistant, and v stands in the context. The
network has learnt from dialogues of people who knew their values; so it tells v by Bayes' rule, and nothing is fitted:

    p(v | said) ~ product over the other side's tokens of p(token | own view with v, tokens before it),   v uniform before

A future is imagined with a v that is drawn from this, and is worth what its outcome gives either side.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import deal, goals, outcome, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.config import Imagine
from mbrl_lm.nn import Net
from mbrl_lm.reward import outcome_share
from mbrl_lm.types import Array, Dialogue, Params

COUNTS = [c for c in itertools.product(range(1, 6), repeat=3) if 5 <= sum(c) <= 7]  # of the items of a negotiation
OUTCOMES = outcome.number_of(np.array(COUNTS))


@functools.cache
def table() -> np.ndarray:
    """i32 (11, 11, 11, Z, 3): for any counts the valuations that make them worth POINTS; -1 where there are no more."""
    found = {count: outcome.valuations(count) for count in COUNTS}
    most = max(map(len, found.values()))
    rows = np.full((*[pr.LARGEST_NUMBER + 1] * 3, most, 3), -1, np.int32)
    for count, valuations in found.items():
        rows[count][: len(valuations)] = valuations
    return rows


def valuations(dialogue: Dialogue) -> tuple[Array, Array]:
    """What the other side may value, i32 (B, Z, 3), and bool (B, Z), which of these: no item is worth nothing to both.

    Where there is none, of counts that do not occur, everything is worth 1.
    """
    count_BI = jnp.clip(deal.counts(dialogue), 0, pr.LARGEST_NUMBER)
    value_BZI = jnp.asarray(table())[tuple(count_BI.T)]
    there_BZ = jnp.all(value_BZI >= 0, axis=-1)
    there_BZ &= ~jnp.any((value_BZI == 0) & (deal.values(dialogue)[:, None] == 0), axis=-1)
    none_B1 = ~jnp.any(there_BZ, axis=1, keepdims=True)
    return jnp.where(none_B1[..., None], 1, value_BZI), there_BZ.at[:, :1].set(there_BZ[:, :1] | none_B1)


def own_view(protocol: pr.Protocol, dialogue: Dialogue, value_BI: Array) -> Dialogue:
    """The dialogues as the other side sees them that values items so; the outcome, which each writes alone, is cut off."""
    said_BT = jnp.where(dialogue.author_BT == pr.OUTCOME, pr.PAD, dialogue.token_BT)
    token_BT = jnp.asarray(protocol.mirror_V)[said_BT].at[:, 2:7:2].set(pr.NUMBER + value_BI)
    return pr.attributed(protocol, dialogue.replace(token_BT=token_BT))


def log_likelihoods(net: Net, protocol: pr.Protocol, params: Params, dialogue: Dialogue) -> Array:
    """f32 (B, Z): log p(all that the other side says | own view with v), nats; -inf where there is no such v."""
    value_BZI, there_BZ = valuations(dialogue)
    B, Z = there_BZ.shape
    views = own_view(protocol, rollout.copied(dialogue, Z), jnp.maximum(value_BZI, 0).reshape(B * Z, -1))
    return jnp.where(there_BZ, goals.said(net, protocol, params, views, pr.ASSISTANT).reshape(B, Z), -jnp.inf)


def imagine(
    net: Net,
    protocol: pr.Protocol,
    params: Params,
    prompt: Dialogue,
    key: Array,
    *,
    terms: Imagine,
    sure: bool,
    tokens: int,
    turns: int,
    temperature: Array | float,
    user: Params | None = None,
    copies: int = 1,
    logp_BZ: Array | None = None,
) -> Dialogue:
    """`rollout.imagine`, whose other arguments it takes, of negotiations with others whose values are drawn for every copy.

    Args:
      terms: what a deal is worth, besides own points: `generosity`, `waste`.
      sure: worth that times how likely both sides find the outcome, the geometric mean.
      logp_BZ: the log-likelihoods of what was said, if they are known.

    Returns:
      the dialogues as the policy sees them, with that reward.
    """
    other = params if user is None else user
    if logp_BZ is None:
        logp_BZ = log_likelihoods(net, protocol, other, prompt)
    z_B = goals.drawn(logp_BZ, jax.random.fold_in(key, 1), prompt.uid_B, copies)
    prompts = rollout.copied(prompt, copies)
    value_BI = jnp.take_along_axis(valuations(prompts)[0], z_B[:, None, None], axis=1)[:, 0]
    views = rollout.View(net, params, prompt), rollout.View(net, other, own_view(protocol, prompts, value_BI))
    ours, _ = rollout.converse(protocol, *views, key, tokens=tokens, turns=turns, temperature=temperature, copies=copies)
    return priced(net, protocol, params, other, ours, value_BI, terms, sure)


def priced(
    net: Net,
    protocol: pr.Protocol,
    params: Params,
    other: Params,
    ours: Dialogue,
    value_BI: Array,
    terms: Imagine,
    sure: bool,
) -> Dialogue:
    """The dialogues with what their outcomes, as written by us, are worth if the other side values items so."""
    reward_B = deal.payoff(deal.result_for_both(ours, value_BI, OUTCOMES), terms)
    if sure:
        seats = (params, ours), (other, with_outcome(protocol, own_view(protocol, ours, value_BI), ours))
        logp_B, other_logp_B = (goals.said(net, protocol, p, seat, pr.OUTCOME) for p, seat in seats)
        reward_B *= jnp.exp((logp_B + other_logp_B) / 2)
    return deal.earned(ours, reward_B)


def with_outcome(protocol: pr.Protocol, theirs: Dialogue, ours: Dialogue) -> Dialogue:
    """Their view of dialogues with the outcome that goes with ours: what is left is theirs."""
    share_BI, agreed_B = outcome_share(ours)
    left_BI = jnp.clip(deal.counts(ours) - share_BI, 0, pr.LARGEST_NUMBER)
    outcome_BT = ours.author_BT == pr.OUTCOME
    place_BT = jnp.cumsum(outcome_BT, axis=1) - 1
    left_BT = pr.NUMBER + jnp.take_along_axis(left_BI, jnp.clip(place_BT, 0, 2), axis=1)
    left_BT = jnp.where((place_BT < 3) & agreed_B[:, None], left_BT, ours.token_BT)
    return pr.attributed(protocol, theirs.replace(token_BT=jnp.where(outcome_BT, left_BT, theirs.token_BT)))
