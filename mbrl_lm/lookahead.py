"""What a planner sees: candidates written by the policy, what is imagined to follow them, and what that is worth."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl_lm import config, goals, valuation, value
from mbrl_lm import protocol as pr
from mbrl_lm.micro_batches import mapped, parts_of, rows_at_once
from mbrl_lm.nn import Net
from mbrl_lm.reward import REWARDS
from mbrl_lm.rollout import last_of
from mbrl_lm.turns import find_turns, gather, prompt_lengths
from mbrl_lm.types import Array, Dialogue, Heads, Params

WIDTHS = (0.5, 1.0)  # parts of a dialogue's tokens; what is short is written on the first of them that holds it
READ_WIDTHS = (0.25, 0.375, 0.5, 0.75, 1.0)  # the same for reading, which is compiled sooner
NARROWEST = 16  # tokens of any width: rewards read numbers at fixed places of the context


class Outlook(NamedTuple):
    """What imagined dialogues are worth from a decision on."""

    return_B: Array  # f32, discounted
    reward_B: Array  # f32, of the decided turn alone
    value_B: Array  # f32, where the assistant's next turn opens; 0 after an end


def affordable(cfg: config.Config) -> config.Planner:
    """The settings with as many futures, or simulations, as fit into `planner.budget`, were every turn as long as it may be.

    Raises:
      ConfigError: not even one does.
    """
    plan, turn = cfg.planner, cfg.turn_tokens
    if not plan.budget or cfg.plan == "none":
        return plan
    candidates = plan.candidates * turn
    if cfg.plan == "gumbel":
        most = (plan.budget - candidates) // (turn + candidates)
        name, least = "simulations", candidates + turn + candidates
    else:
        rounds = plan.iterations if cfg.plan == "mpc" else 1
        kept = plan.elites if rounds > 1 else 0
        one = (rounds * plan.candidates + (rounds - 1) * kept) * max(2 * plan.depth - 1, 0) * turn
        most = (plan.budget - rounds * candidates) // max(one, 1)
        name, least = "futures", rounds * candidates + one
    if most < 1:
        raise config.ConfigError(f"planner.budget={plan.budget} is too small: one of {name} takes up to {least} tokens")
    return dataclasses.replace(plan, **{name: min(getattr(plan, name), most)})


def of_tokens(path: Any) -> bool:
    """Whether a member of a dialogue has one element for each token."""
    return path[-1].name.endswith("_BT")


class Lookahead:
    """How a planner writes candidates, imagines what follows, and what it makes of that.

    Args:
      cfg, net, protocol: of the run.
    """

    def __init__(self, cfg: config.Config, net: Net, protocol: pr.Protocol):
        self.cfg, self.plan, self.net, self.protocol = cfg, affordable(cfg), net, protocol
        self.widths, self.read_widths = (
            sorted({min(max(round(cfg.tokens * part), NARROWEST), cfg.tokens) for part in parts})
            for parts in (WIDTHS, READ_WIDTHS)
        )
        self._reward = self.plan.reward or cfg.imagine.reward
        self._centres_W = value.bin_centres(cfg.model.bins, cfg.model.bin_limit)

    def write(
        self,
        params: Params,
        prompt: Dialogue,
        key: Array,
        temperature,
        user,
        *,
        turns: int = 1,
        copies: int = 1,
        room: int = 0,
        replies: bool = False,
        logp_BZ: Array | None = None,
    ):
        """`goals.imagine`, and the tokens written in each row. `replies`: users speak, who may have goals or values.

        With `room`, on no wider a cache than leaves every row that many tokens: dialogues that need more are cut there.
        """
        imagine = self._of_users() if replies else functools.partial(goals.imagine, 0)
        settings = {"turns": turns, "temperature": temperature, "user": user, "copies": copies, "logp_BZ": logp_BZ}

        def at(width: int, prompt: Dialogue) -> Dialogue:
            narrow = jax.tree_util.tree_map_with_path(lambda path, x: x[:, :width] if of_tokens(path) else x, prompt)
            return self._widened(imagine(self.net, self.protocol, params, narrow, key, tokens=width, **settings))

        length_B = prompt_lengths(prompt)
        widths = [width for width in self.widths if width > room] if room else self.widths[-1:]
        place = jnp.searchsorted(jnp.array(widths), jnp.max(length_B) + room)
        branches = [functools.partial(at, width) for width in widths]
        written = jax.lax.switch(jnp.minimum(place, len(widths) - 1), branches, prompt)
        return written, prompt_lengths(written) - jnp.repeat(length_B, copies)

    def _of_users(self) -> Callable[..., Dialogue]:
        """How dialogues are imagined in which users speak."""
        if self.plan.sides == 2:
            return functools.partial(valuation.imagine, terms=self.cfg.imagine, sure=self._reward == "sure_split")
        return functools.partial(goals.imagine, self.cfg.world_model.goals)

    def wanted(self, params: Params, prompt: Dialogue) -> Array | None:
        """How likely each goal, or each valuation, makes what users have said in prompts; None where they have neither."""
        most = self.cfg.world_model.goals
        if self.plan.sides == 2:
            return valuation.log_likelihoods(self.net, self.protocol, params, prompt)
        return goals.log_likelihoods(self.net, self.protocol, params, prompt, most) if most else None

    def _widened(self, dialogue: Dialogue) -> Dialogue:
        """The same with room for T tokens."""
        more = self.cfg.tokens - dialogue.token_BT.shape[1]

        def widen(path, x):
            return jnp.pad(x, ((0, 0), (0, more))) if of_tokens(path) else x

        if not more:
            return dialogue
        return pr.attributed(self.protocol, jax.tree_util.tree_map_with_path(widen, dialogue))

    def look(self, params: Params, dialogue: Dialogue, from_B: Array) -> Outlook:
        """What dialogues are worth from the assistant turn on that was written from position `from_B` on.

        A future that was cut before the user had replied is worth what the state was in which the turn opened: nothing was
        learnt of it. Futures are read a part at a time, however many there are.
        """
        parts = parts_of(from_B.shape[0], rows_at_once())
        return mapped(functools.partial(self._look, params), self.read_widths, (dialogue, from_B), parts)

    def _look(self, params: Params, rows: tuple[Dialogue, Array]) -> Outlook:
        (dialogue, from_B), cfg = rows, self.cfg
        turns = find_turns(self.protocol, dialogue, unanswered=self.plan.depth == 0 and cfg.plan != "gumbel")
        heads = self.net.forward(params, dialogue.token_BT)
        value_BT = self._values(heads)
        unanswered_BU = turns.reply_BU == turns.close_BU
        if self.plan.sides == 2:
            reward_BU = jnp.where(turns.mask_BU, dialogue.reward_BU, 0.0)
        else:
            reward_BU = REWARDS[self._reward](dialogue, turns, heads, self._centres_W, cfg.imagine.generosity)
        reward_BU = jnp.where(unanswered_BU & ~turns.last_BU, 0.0, reward_BU)
        acted_BU = turns.mask_BU & (turns.open_BU >= from_B[:, None] - 1)
        discount_BU = jnp.where(unanswered_BU, 1.0, cfg.returns.discount) * (1.0 - turns.last_BU)
        next_value_BU = gather(value_BT, turns.reply_BU)
        returns = jax.vmap(value.lambda_returns, (0, 0, 0, 0, None))
        return_BU = returns(reward_BU, next_value_BU, discount_BU, acted_BU, 1.0)
        first_B1 = jnp.argmax(acted_BU, axis=1)[:, None]
        open_value_B = jnp.take_along_axis(value_BT, from_B[:, None] - 1, axis=1)[:, 0]

        def decided(x_BU, otherwise_B):
            return jnp.where(jnp.any(acted_BU, axis=1), jnp.take_along_axis(x_BU, first_B1, axis=1)[:, 0], otherwise_B)

        zeros_B = jnp.zeros_like(open_value_B)
        next_B = decided(jnp.where(discount_BU > 0, next_value_BU, 0.0), open_value_B)
        return Outlook(decided(return_BU, open_value_B), decided(reward_BU, zeros_B), next_B)

    def open_value(self, params: Params, prompt: Dialogue) -> Array:
        """The value of the states in which prompts end."""
        return last_of(prompt, self._values(self.net.forward(params, prompt.token_BT)))

    def _values(self, heads: Heads) -> Array:
        """(B, T): the mean over the value heads, after each token."""
        return jnp.mean(value.mean(heads.value_BTEW, self._centres_W), axis=-1)
