"""The outcome of a negotiation as one side reads it off the dialogue: the likeliest split that is possible, or no deal.

Token by token a reader may begin a share that no split ends; so whole outcomes are compared (Lewis et al. 2017). What a side
would like is not what was said: so the dialogue is read from both seats, with values that who sits there might have. Nor
does a split hang on what the kinds of item are called: so it is read under every naming of them, and mistakes cancel out.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import protocol as pr
from mbrl_lm.nn import Net
from mbrl_lm.reward import POINTS
from mbrl_lm.rollout import copied, picked
from mbrl_lm.scoring import policy_logits
from mbrl_lm.types import Array, Dialogue, Params

SUPPOSED = 3  # values that are tried out in either seat
NO_DEAL_SURE = 0.98  # of no deal, to read it: in half of the dialogues recorded as such a split had been talked out
WIDTHS = (0.25, 0.5, 1.0)  # parts of a dialogue's tokens; what is short is read on the first of them that holds it


def number_of(count_BI: np.ndarray) -> int:
    """The most outcomes that there are with any of these counts of three kinds of item, no deal being one."""
    return 1 + int(np.max(np.prod(np.asarray(count_BI) + 1, axis=1)))


def slots(count_BI: Array, outcomes: int) -> tuple[Array, Array]:
    """The own share in each outcome, (B, S, 3), S = `outcomes`, and bool (B, S), which are used; the first is no deal."""
    slot_S = jnp.arange(outcomes)[None] - 1
    first_BS, second_BS = (count_BI[:, i : i + 1] + 1 for i in (0, 1))
    share_BSI = jnp.stack([slot_S % first_BS, slot_S // first_BS % second_BS, slot_S // (first_BS * second_BS)], axis=-1)
    return jnp.maximum(share_BSI, 0), slot_S < jnp.prod(count_BI + 1, axis=1)[:, None]


def slot_of(share_BSI: Array, count_BI: Array) -> Array:
    """i32 (B, S): where a share stands among the outcomes; B may be several axes."""
    first_BS, second_BS = (count_BI[..., i : i + 1] + 1 for i in (0, 1))
    return 1 + share_BSI[..., 0] + first_BS * (share_BSI[..., 1] + second_BS * share_BSI[..., 2])


def valuations(count: Sequence[int]) -> list[tuple[int, ...]]:
    """What one item of each kind may be worth to a side, where there are so many: all together are worth POINTS."""
    return [v for v in itertools.product(range(POINTS + 1), repeat=len(count)) if np.dot(count, v) == POINTS]


@functools.cache
def supposed_values() -> np.ndarray:
    """i32 (11, 11, 11, K, 3): for any counts a few values that make them worth POINTS, far from each other."""
    most = pr.LARGEST_NUMBER + 1
    table = np.ones((most, most, most, SUPPOSED, 3), np.int32)
    for count in itertools.product(range(1, 7), repeat=3):
        if values := valuations(count):
            table[count] = [values[i] for i in np.linspace(0, len(values) - 1, SUPPOSED).round().astype(int)]
    return table


def log_probabilities(
    net: Net, protocol: pr.Protocol, params: Params, token_BT: Array, start_B: Array, outcomes: int
) -> Array:
    """f32 (B, S): of each outcome that begins at `start_B`, -inf in slots that are not used; there is one item of each kind.

    Each dialogue is read once, and what its outcomes begin with in common is written once.
    """
    T = token_BT.shape[1]
    count_BI = token_BT[:, 1:6:2] - pr.NUMBER
    share_BSI, used_BS = slots(count_BI, outcomes)
    firsts, pairs = pr.LARGEST_NUMBER + 1, max((outcomes - 1) // 2, 1)

    def at(width, x) -> Array:
        token_T, start, count_I, share_SI, used_S = x
        token_T = token_T[:width]

        def after(cache, token_R, place):
            """Log-probabilities, (R, V), of what follows a token that is written in each row before `place`."""
            role_R = jnp.full(token_R.shape[0], pr.OUTCOME)
            heads, cache = net.decode_step(params, token_R, start - 1 + place, cache, role_R)
            logits_RV = policy_logits(protocol, heads.logits_BTV, role_R, jnp.full(token_R.shape[0], place), 1.0)
            return cache, jax.nn.log_softmax(logits_RV)

        cache = net.prefill(params, token_T[None], net.init_cache(1, width))  # from `start` on it is written over
        cache, begins_1V = after(cache, token_T[None, start - 1], 0)
        # The first share and, in the last row, no deal; then the first two shares. After three only the end may follow.
        first_R = jnp.append(pr.NUMBER + jnp.arange(firsts), pr.NO_DEAL)
        cache, second_RV = after(copied(cache, firsts + 1), first_R, 1)
        pair_R = jnp.arange(pairs)
        begun = picked(cache, jnp.minimum(pair_R % (count_I[0] + 1), firsts - 1))
        _, third_RV = after(begun, pr.NUMBER + jnp.minimum(pair_R // (count_I[0] + 1), pr.LARGEST_NUMBER), 2)
        one_S, two_S, three_S = share_SI.T
        pair_S = jnp.minimum(one_S + (count_I[0] + 1) * two_S, pairs - 1)
        logp_S = (
            begins_1V[0, pr.NUMBER + one_S] + second_RV[one_S, pr.NUMBER + two_S] + third_RV[pair_S, pr.NUMBER + three_S]
        )
        none = begins_1V[0, pr.NO_DEAL] + second_RV[-1, pr.STOP]
        return jnp.where(used_S, logp_S.at[0].set(none), -jnp.inf)

    widths = [round(T * part) for part in WIDTHS]
    branches = [functools.partial(at, width) for width in widths]

    def weigh(x) -> Array:
        place = jnp.searchsorted(jnp.array(widths), x[1] + pr.OUTCOME_TOKENS)
        return jax.lax.switch(jnp.minimum(place, len(widths) - 1), branches, x)

    return jax.lax.map(weigh, (token_BT, start_B, count_BI, share_BSI, used_BS))


def read(
    net: Net, protocol: pr.Protocol, params: Params, dialogue: Dialogue, outcomes: int, readings: int | None = None
) -> Dialogue:
    """The dialogues with the likeliest outcome in the place of the one that was written, where one was called for.

    How likely an outcome is, is the geometric mean of what readings from both seats say, each under another naming of the
    kinds of item and with supposed values. No deal is read where they are sure of it. Two sides that read by one network
    therefore read alike.

    Args:
      net, params: whoever reads.
      protocol: of a negotiation.
      dialogue: (B, T), the context first: `count value` of three kinds of item.
      outcomes: at least `number_of` their counts.
      readings: N, from either seat, to which the time is proportional; None: every naming and every supposed value once.
    """
    B, T = dialogue.token_BT.shape
    called_BT = (dialogue.token_BT == pr.TO_OUTCOME) & (dialogue.author_BT != pr.END)
    called_B = jnp.any(called_BT, axis=1)
    start_B = jnp.argmax(called_BT, axis=1).astype(jnp.int32) + 1
    called_B &= start_B + pr.OUTCOME_TOKENS <= T
    at_B = jnp.where(called_B, start_B, 1)
    count_BI = jnp.clip(dialogue.token_BT[:, 1:6:2] - pr.NUMBER, 0, pr.LARGEST_NUMBER)
    share_BSI, used_BS = slots(count_BI, outcomes)

    namings = len(protocol.naming_XV)
    reading_N = np.arange(readings or max(namings, SUPPOSED))
    naming_N, supposed_N = reading_N % namings, (reading_N + SUPPOSED // 2) % SUPPOSED  # the middle values come first
    N = len(reading_N)
    order_NI = protocol.order_XI[naming_N]
    count_BNI = count_BI[:, order_NI]
    value_BNI = jnp.asarray(supposed_values())[(*jnp.moveaxis(count_BNI, -1, 0), supposed_N)]
    token_BNT = jnp.asarray(protocol.naming_XV)[naming_N[None, :, None], dialogue.token_BT[:, None]]
    token_BNT = token_BNT.at[..., 1:6:2].set(pr.NUMBER + count_BNI).at[..., 2:7:2].set(pr.NUMBER + value_BNI)
    seat_BXNT = jnp.stack([token_BNT, jnp.asarray(protocol.mirror_V)[token_BNT]], axis=1)
    logp_RS = log_probabilities(net, protocol, params, seat_BXNT.reshape(-1, T), jnp.repeat(at_B, 2 * N), outcomes)
    logp_BXNS = jax.nn.log_softmax(logp_RS).reshape(B, 2, N, outcomes)

    # Where each outcome stands in either seat, under each naming.
    share_BNSI = jnp.moveaxis(share_BSI[..., order_NI], 2, 1)
    share_BXNSI = jnp.stack([share_BNSI, count_BNI[:, :, None] - share_BNSI], axis=1)
    slot_BXNS = jnp.clip(slot_of(share_BXNSI, count_BNI[:, None]), 0, outcomes - 1).at[..., 0].set(0)
    logp_BS = jnp.mean(jnp.take_along_axis(logp_BXNS, slot_BXNS, axis=-1), axis=(1, 2))
    best_B = jnp.argmax(jnp.where(used_BS, logp_BS, -jnp.inf)[:, 1:], axis=1) + 1
    none_B1 = (logp_BS[:, 0] > jnp.log(NO_DEAL_SURE))[:, None]

    split_B3 = jnp.take_along_axis(share_BSI, best_B[:, None, None], axis=1)[:, 0]
    split_B4 = jnp.pad(pr.NUMBER + split_B3, ((0, 0), (0, 1)), constant_values=pr.STOP)
    chosen_B4 = jnp.where(none_B1, jnp.array([[pr.NO_DEAL, pr.STOP, pr.PAD, pr.PAD]]), split_B4).astype(jnp.int32)
    place_BT = jnp.arange(T)[None] - start_B[:, None]
    written_BT = jnp.take_along_axis(chosen_B4, jnp.clip(place_BT, 0, pr.OUTCOME_TOKENS - 1), axis=1)
    written_BT = jnp.where(place_BT < pr.OUTCOME_TOKENS, written_BT, pr.PAD)
    token_BT = jnp.where((place_BT >= 0) & called_B[:, None], written_BT, dialogue.token_BT)
    ended_B = dialogue.ended_B | called_B
    return pr.attributed(protocol, dialogue.replace(token_BT=token_BT, ended_B=ended_B, cut_B=~ended_B))
