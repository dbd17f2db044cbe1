"""The outcome of a negotiation as one side reads it off the dialogue: the likeliest split that is possible, or no deal.

Token by token a reader may begin a share that no split ends; so whole outcomes are compared (Lewis et al. 2017).
"""

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import protocol as pr
from mbrl_lm.nn import Net
from mbrl_lm.rollout import copied
from mbrl_lm.scoring import policy_logits
from mbrl_lm.types import Array, Dialogue, Params


def number_of(count_BI: np.ndarray) -> int:
    """The most outcomes that there are with any of these counts of three kinds of item, no deal being one."""
    return 1 + int(np.max(np.prod(np.asarray(count_BI) + 1, axis=1)))


def possible(count_BI: Array, outcomes: int) -> tuple[Array, Array]:
    """All outcomes as tokens (B, S, 4), S = `outcomes`, no deal the first; and bool (B, S), which of the slots are used."""
    slot_S = jnp.arange(outcomes)[None] - 1
    first_BS, second_BS = (count_BI[:, i : i + 1] + 1 for i in (0, 1))
    share_BSI = jnp.stack([slot_S % first_BS, slot_S // first_BS % second_BS, slot_S // (first_BS * second_BS)], axis=-1)
    token_BS4 = jnp.concatenate([pr.NUMBER + share_BSI, jnp.full_like(share_BSI[..., :1], pr.STOP)], axis=-1)
    none_4 = jnp.array([pr.NO_DEAL, pr.STOP, pr.PAD, pr.PAD])
    token_BS4 = jnp.where((slot_S < 0)[..., None], none_4[None, None], token_BS4).astype(jnp.int32)
    used_BS = slot_S < jnp.prod(count_BI + 1, axis=1)[:, None]
    return token_BS4, used_BS


def read(net: Net, protocol: pr.Protocol, params: Params, dialogue: Dialogue, outcomes: int) -> Dialogue:
    """The dialogues with the likeliest outcome in the place of the one that was written, where one was called for.

    Args:
      net, params: whoever reads.
      protocol: of a negotiation.
      dialogue: (B, T), the context first: `count value` of three kinds of item.
      outcomes: at least `number_of` their counts.
    """
    B, T = dialogue.token_BT.shape
    called_BT = (dialogue.token_BT == pr.TO_OUTCOME) & (dialogue.author_BT != pr.END)
    called_B = jnp.any(called_BT, axis=1)
    start_B = jnp.argmax(called_BT, axis=1).astype(jnp.int32) + 1
    called_B &= start_B + pr.OUTCOME_TOKENS <= T
    count_BI = dialogue.token_BT[:, 1:6:2] - pr.NUMBER
    token_BS4, used_BS = possible(count_BI, outcomes)

    def weigh(x) -> Array:
        """Log-probability of each outcome of one dialogue: it is read once, its outcomes side by side."""
        token_T, start, token_S4 = x
        token_1T = jnp.where(jnp.arange(T) < start, token_T, pr.PAD)[None]
        cache = copied(net.prefill(params, token_1T, net.init_cache(1, T)), outcomes)

        def step(carry, place):
            cache, last_S = carry
            role_S = jnp.full(outcomes, pr.OUTCOME)
            heads, cache = net.decode_step(params, last_S, start - 1 + place, cache, role_S)
            logits_SV = policy_logits(protocol, heads.logits_BTV, role_S, jnp.full(outcomes, place), 1.0)
            next_S = token_S4[:, place]
            logp_S = jnp.take_along_axis(jax.nn.log_softmax(logits_SV), next_S[:, None], axis=1)[:, 0]
            return (cache, next_S), jnp.where(next_S == pr.PAD, 0.0, logp_S)

        last_S = jnp.full(outcomes, token_T[start - 1])
        return jnp.sum(jax.lax.scan(step, (cache, last_S), jnp.arange(pr.OUTCOME_TOKENS))[1], axis=0)

    logp_BS = jax.lax.map(weigh, (dialogue.token_BT, jnp.where(called_B, start_B, 1), token_BS4))
    logp_BS = jnp.where(used_BS, logp_BS, -jnp.inf)
    best_B = jnp.argmax(logp_BS, axis=1)
    chosen_B4 = jnp.take_along_axis(token_BS4, best_B[:, None, None], axis=1)[:, 0]
    place_BT = jnp.arange(T)[None] - start_B[:, None]
    at_BT = (place_BT >= 0) & called_B[:, None]
    written_BT = jnp.take_along_axis(chosen_B4, jnp.clip(place_BT, 0, 3), axis=1)
    token_BT = jnp.where(at_BT, jnp.where(place_BT < pr.OUTCOME_TOKENS, written_BT, pr.PAD), dialogue.token_BT)
    author_BT, turn_BT = pr.parse(protocol, token_BT)
    ended_B = dialogue.ended_B | called_B
    return dialogue.replace(token_BT=token_BT, author_BT=author_BT, turn_BT=turn_BT, ended_B=ended_B, cut_B=~ended_B)
