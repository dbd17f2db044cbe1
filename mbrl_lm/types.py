"""The alphabet and the few pytrees that everything flows through.

Every array's name ends in its axes; the same letters are its einsum operand and its sharding axes:

    B rows (dialogues)   T tokens      S cached tokens   U assistant turns   R roles   V vocabulary   L layers
    D width              N query heads K key/value heads G = N / K           H head size               F MLP width
    C candidates         E ensemble members              W bins of a two-hot head          X taps of a convolution
    Z items of a context, one of which the user wants

`U` counts the *assistant's* turns of a dialogue: they are the actions. Turn `u` is opened by the token that hands the floor
to the assistant; its reward is everything that is earned until the next one opens, or until the dialogue ends.
"""

from typing import Any

import chex
import flax.struct
import jax

Array = jax.Array
Params = Any  # a pytree of arrays whose names end in their axes


@flax.struct.dataclass
class Dialogue:
    """Dialogues, real or imagined: the only thing that losses, rewards and planners ever see.

    Token `t` was written by `author_BT[:, t]` (a role of `protocol.py`); a hand-over token belongs to the speaker who gives
    the floor away. Positions after the end hold PAD and the author END. `reward_BU` is in the environment's own units.
    """

    token_BT: Array  # i32
    author_BT: Array  # i8, a role; derived from the tokens by `protocol.parse`
    turn_BT: Array  # i16, 0 for the context, then 1, 2, ... over both speakers
    sampled_BT: Array  # bool, written by our own policy or world model (not read from data)
    logp_BT: Array  # f32, log-probability under the behaviour policy; 0 where not sampled
    reward_BU: Array  # f32, per assistant turn
    ended_B: Array  # bool, a true end: nothing follows, discount 0
    cut_B: Array  # bool, a truncation: the bootstrap value follows
    uid_B: Array  # u32, names the row; its random numbers depend on it, never on its place in the batch

    def check(self) -> "Dialogue":
        chex.assert_rank([self.token_BT, self.reward_BU, self.ended_B], [2, 2, 1])
        chex.assert_equal_shape([self.token_BT, self.author_BT, self.turn_BT, self.sampled_BT, self.logp_BT])
        chex.assert_equal_shape([self.ended_B, self.cut_B, self.uid_B])
        chex.assert_equal_shape_prefix([self.token_BT, self.reward_BU, self.ended_B], 1)
        names = ("int32", "int8", "int16", "bool", "float32", "float32", "bool", "bool", "uint32")
        for name, array in zip(names, self.__dict__.values(), strict=True):
            chex.assert_type(array, name)
        return self


@flax.struct.dataclass
class KVCache:
    """What each layer keeps of the tokens read: one array over the layers when they are scanned, else a tuple of L arrays.

    Heads stand before positions, (K, S, H): attention over the cache is then one contiguous product per head, which halves
    the time of a decode step on a CPU.
    """

    k_LBKSH: Any
    v_LBKSH: Any
    x_LBSD: Any  # inputs of the causal convolution, `taps - 1` positions of zeros first
    code_BSC: Any  # codes of the tokens, for comparing them; likewise
    spoken_BS: Any  # i32, the mark that the turn of each token began with
    said_BSNC: Any  # the codes of what the user has said so far, summed; this and the next only where the user is tracked
    told_BSNC: Any  # the same of the assistant's latest turn


@flax.struct.dataclass
class Heads:
    """What the network says after reading token `t` (without a T axis: after the one token of a decode step)."""

    logits_BTV: Array  # f32, of the next token
    value_BTEW: Array  # f32, logits over the return bins; read where the assistant is about to speak
    reward_BTW: Array  # f32, logits over the reward bins; read where the user has replied
    end_BT: Array  # f32, logit that the user's coming reply ends the dialogue; read where the assistant has spoken
    user_BTEV: Array  # f32, logits of the next token by each of the user heads, which learn nothing else; E may be 0
    real_BT: Array  # f32, logit that the user's reply is a real one; read where the user has replied
    belief_BTZ: Array  # f32, logits of how likely the likeliest goals of the user are, in that order; Z may be 0


@flax.struct.dataclass
class Turns:
    """Token positions of the assistant's turns. Slots that are not `mask_BU` hold position 0."""

    open_BU: Array  # i32, the token that hands the floor to the assistant: the state in which it acts
    close_BU: Array  # i32, the token by which the assistant gives the floor away
    reply_BU: Array  # i32, the last token before the assistant's next turn, or of the dialogue
    mask_BU: Array  # bool, a whole transition: the next turn was reached, or a true end
    last_BU: Array  # bool, the transition ends in a true end (discount 0)


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes. Keys and data are functions of (seed, step) and are not in it."""

    step: Array  # i32
    params: Params
    opt_state: Any
    target: Params  # exponential moving average of params, for the slow critic
    reference: Params  # the policy that KL is measured against, frozen when RL starts
    population: Params  # past parameters, P of each stacked, that speak for imagined users; None if nobody asks for them
    return_low: Array  # f32, running percentiles of the lambda-returns
    return_high: Array
    real_mean: Array  # f32, running mean of the returns of real turns
    imagined_mean: Array  # f32, the same of imagined ones
    doubt_U: Array  # f32, running mean of the user heads' disagreement on the replies to turns of that number
    doubt_square_U: Array  # f32, the same of its square
    anchor_XW: Array  # f32, W quantiles of imagined returns (first row), and where they come to: see guards.anchors
    imagined_tokens: Array  # i32, written in imagination so far
