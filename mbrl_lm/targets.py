"""What an update learns towards, computed once before the gradient: imagined rewards, guards, returns, advantages, masks."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from mbrl_lm import config, goals, guards, policy, value, world_model
from mbrl_lm import protocol as pr
from mbrl_lm.advantage import advantages
from mbrl_lm.micro_batches import mapped, merge_rows, split_rows
from mbrl_lm.nn import Net
from mbrl_lm.reward import REWARDS
from mbrl_lm.scoring import score
from mbrl_lm.sharding import row_shards
from mbrl_lm.turns import find_turns, gather, spread, total
from mbrl_lm.types import Array, Dialogue, Heads, Params, TrainState, Turns

# How goals are inferred in the first and in the first two thirds of the likelihood phase, see `goals`.
HINT = 3.0  # nats for each word of an item that the user says
SHARPNESS = 20.0


@flax.struct.dataclass
class Batch:
    """Rows of one update with everything that is fixed while their loss is differentiated."""

    dialogue: Dialogue
    turns: Turns
    masks: dict[str, Array]  # per component: bool, (B, T) or (B, U)
    return_BU: Array  # f32, what values are learnt towards: lambda-returns, V-trace
    slow_value_BU: Array  # f32, what the slow critic says
    advantage_BT: Array  # f32, of the turn that each assistant token belongs to
    target_BT: Array  # i32, the tokens that the user's likelihood is asked of
    belief_BUZ: Array  # f32, how likely the user's likeliest goals are where a turn opens; Z may be 0


class Seen(NamedTuple):
    """What the slow critic's parameters say of some dialogues, (B, U) each."""

    open_value: Array  # where the turn opens, the mean over the value heads
    next_value: Array  # where it has been replied to, the smaller one of two random heads
    reward: Array  # the imagined one
    disagreement: Array  # of the user heads, on the reply
    real: Array  # logit that the reply is real


def masked_sum(x: Array, mask: Array) -> Array:
    """The one masked reduction: elements outside the mask count nothing, whatever they hold."""
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x, 0.0))


def masks(
    protocol: pr.Protocol,
    dialogue: Dialogue,
    turns: Turns,
    imagined_B: Array,
    rl: bool,
    user_tokens: str = "all",
    planned_BU: Array | None = None,
    own_B: Array | None = None,
    told_B: Array | None = None,
) -> dict[str, Array]:
    """Which elements each component is made of.

    `planned_BU`: turns that a planner chose, which the policy is to imitate. `own_B`: real dialogues as their users see
    them; the user's words alone are learnt from these. `told_B`: those in which it was inferred what their users want.
    """
    imagined_B1 = imagined_B[:, None]
    own_B1, told_B1 = (jnp.zeros_like(imagined_B1) if x is None else x[:, None] for x in (own_B, told_B))
    user_BT = world_model.user_tokens(dialogue) & ~imagined_B1
    if user_tokens != "all":
        closing_BT = world_model.closing_tokens(protocol, dialogue)
        user_BT &= closing_BT if user_tokens == "closing" else ~closing_BT
    real_B1 = ~imagined_B1 & ~own_B1
    real_turn_BU = turns.mask_BU & real_B1
    learnt = {
        "user": user_BT,
        "user_heads": user_BT & ~own_B1,
        "outcome": world_model.real_tokens(dialogue, pr.OUTCOME) & real_B1,
        "assistant": world_model.real_tokens(dialogue, pr.ASSISTANT) & real_B1,
        "value_real": real_turn_BU if rl else real_turn_BU & dialogue.ended_B[:, None],
        "reward": real_turn_BU,
        "end": real_turn_BU,
        "belief": real_turn_BU & told_B1,
    }
    if not rl:
        return learnt
    action_BT = spread(protocol, dialogue, turns.mask_BU)
    planned_BT = jnp.zeros_like(action_BT) if planned_BU is None else spread(protocol, dialogue, planned_BU)
    return learnt | {
        "value": turns.mask_BU & imagined_B1,
        "slow_value": turns.mask_BU,
        "policy_real": action_BT & ~imagined_B1,
        "policy_imagined": action_BT & imagined_B1 & ~planned_BT,
        "distil": planned_BT,
        "kl": action_BT,
        "trust": action_BT,
        "entropy": action_BT,
        "real_reply": real_turn_BU,
        "imagined_reply": turns.mask_BU & imagined_B1,
    }


def make_targets(net: Net, protocol: pr.Protocol, cfg: config.Config, parts_of: Callable[[int], int], rl: bool):
    """Builds `targets(state, real, imagined, key) -> batch, state, metrics`; nothing of it is differentiated.

    Args:
      net, protocol, cfg: what the run is made of.
      parts_of: rows -> into how many parts they are divided for a forward pass.
      rl: False while both speakers are learnt by likelihood.
    """
    centres_W = value.bin_centres(cfg.model.bins, cfg.model.bin_limit)
    true_reward = cfg.imagine.user == "oracle" or cfg.imagine.sides == 2

    def see(params: Params, dialogue: Dialogue, turns: Turns, key: Array) -> Seen:
        pair_2 = jax.random.choice(key, cfg.model.value_heads, (min(cfg.model.value_heads, 2),), replace=False)

        def one(x):
            dialogue, turns = x
            heads: Heads = net.forward(params, dialogue.token_BT)  # XLA drops what nothing reads
            value_BTE = value.mean(heads.value_BTEW, centres_W)
            reward_BU = doubt_BU = jnp.zeros_like(dialogue.reward_BU)
            if cfg.imagine.reward and not true_reward:
                reward_BU = REWARDS[cfg.imagine.reward](dialogue, turns, heads, centres_W)
            if cfg.model.user_heads:
                doubt_BT = jnp.roll(guards.disagreement(heads.user_BTEV), 1, axis=1)  # of the token that stands at t
                doubt_BU = total(protocol, dialogue, doubt_BT, turns.mask_BU.shape[1])
            return Seen(
                gather(jnp.mean(value_BTE, axis=-1), turns.open_BU),
                gather(jnp.min(value_BTE[..., pair_2], axis=-1), turns.reply_BU),
                reward_BU,
                doubt_BU,
                gather(heads.real_BT, turns.reply_BU),
            )

        return mapped(one, cfg.widths, (dialogue, turns), parts_of(dialogue.token_BT.shape[0]))

    def followed(state: TrainState, real: Dialogue) -> Array:
        """min(1, pi / b) of each turn of real dialogues, b as in `policy.behaviour`."""

        def one(dialogue):
            scores = score(
                net, protocol, state.params, dialogue, temperature=cfg.imagine.temperature, reference=state.reference
            )
            behaviour_BT = policy.behaviour(dialogue, scores.reference_logp_BT)
            more_BT = jnp.where(scores.allowed_BT, scores.logp_BT - behaviour_BT, 0.0)
            more_BU = total(protocol, dialogue, more_BT, dialogue.reward_BU.shape[1], pr.ASSISTANT)
            return jnp.exp(jnp.minimum(more_BU, 0.0))

        return merge_rows(jax.lax.map(one, split_rows(real, parts_of(real.token_BT.shape[0]))))

    def earned(rows: Dialogue, turns: Turns, seen: Seen, doubt_BU: Array, imagined_B1: Array) -> Array:
        """Rewards: real ones as they are, imagined ones as predicted, less the penalty for doubtful replies."""
        reward_BU = rows.reward_BU if true_reward else seen.reward
        reward_BU = reward_BU - cfg.guard.penalty * jnp.maximum(doubt_BU, 0.0)
        if cfg.control == "predictability":
            said_BT = (rows.author_BT == pr.USER).astype(jnp.float32)
            nats_BU, tokens_BU = (total(protocol, rows, x, doubt_BU.shape[1]) for x in (rows.logp_BT * said_BT, said_BT))
            reward_BU = reward_BU + nats_BU / jnp.maximum(tokens_BU, 1.0)
        unanswered_BU = turns.reply_BU == turns.close_BU
        return jnp.where(imagined_B1, jnp.where(unanswered_BU, 0.0, reward_BU), rows.reward_BU)

    def guarded(state: TrainState, turns: Turns, seen: Seen, imagined_B1: Array):
        """The doubt about each reply, and the turns that are left where imagined dialogues are cut."""
        doubt_BU = guards.doubt(seen.disagreement, state) if cfg.model.user_heads else jnp.zeros_like(seen.reward)
        stop_BU = jnp.zeros_like(turns.mask_BU)
        if cfg.guard.truncation:
            stop_BU |= doubt_BU > cfg.guard.truncation
        if cfg.guard.discriminator:
            stop_BU |= jax.nn.sigmoid(seen.real) < cfg.guard.discriminator
        kept_BU = turns.mask_BU & (guards.before_first(stop_BU & turns.mask_BU) | ~imagined_B1)
        return doubt_BU, turns.replace(mask_BU=kept_BU, last_BU=turns.last_BU & kept_BU)

    def owners_views(state: TrainState, real: Dialogue, key: Array) -> tuple[Dialogue, Array]:
        """Real dialogues as their users see them, whose goals the slow parameters infer, and the belief after each token.

        One dialogue in two while there are many.
        """
        most, every = cfg.world_model.goals, 1 if rl or real.token_BT.shape[0] % (2 * row_shards()) else 2
        some, uid_B = jax.tree.map(lambda x: x[::every], real), real.uid_B[::every]
        logp_BZT = goals.log_likelihoods_so_far(net, protocol, state.target, some, most)
        logp_BZ, belief_BTZ = logp_BZT[..., -1], goals.belief(logp_BZT, cfg.model.belief)
        if not rl:
            thirds = 3 * state.step // cfg.train.supervised_steps
            logp_BZ += jnp.where(thirds < 1, HINT, 0.0) * goals.mentions(protocol, some, most)
            logp_BZ *= jnp.where(thirds < 2, SHARPNESS, 1.0)
        return goals.own_view(protocol, some, goals.drawn(logp_BZ, key, uid_B)), belief_BTZ

    def targets(state: TrainState, real: Dialogue, imagined: Dialogue | None, key: Array):
        own, belief_BTZ = None, None
        if cfg.world_model.goals and not (rl and (cfg.world_model.shuffled or not cfg.loss.user)):
            own, belief_BTZ = owners_views(state, real, jax.random.fold_in(key, 1))
        kinds = [rows for rows in (real, own, imagined) if rows is not None]
        rows = jax.tree.map(lambda *x: jnp.concatenate(x), *kinds)
        target_BT = rows.token_BT
        if rl and cfg.world_model.shuffled:
            target_BT = target_BT.at[: real.token_BT.shape[0]].set(world_model.shuffled_targets(real))
        real_rows, seen_rows = real.token_BT.shape[0], sum(x.token_BT.shape[0] for x in (real, own) if x is not None)
        place_B = jnp.arange(rows.token_BT.shape[0])
        imagined_B, own_B = place_B >= seen_rows, (place_B >= real_rows) & (place_B < seen_rows)
        imagined_B1 = imagined_B[:, None]
        turns = find_turns(protocol, rows, unanswered=rl and cfg.imagine.replies == 0)
        written_BU = gather(rows.sampled_BT, turns.close_BU)
        mask_BU = turns.mask_BU & (written_BU | ~imagined_B1) & ~own_B[:, None]  # a prompt's turns are no actions
        turns = turns.replace(mask_BU=mask_BU, last_BU=turns.last_BU & mask_BU)
        metrics: dict[str, tuple[Array, Array]] = {}
        zeros_BU = jnp.zeros_like(rows.reward_BU)
        seen = Seen(*[zeros_BU] * 5)
        if rl:
            seen = see(state.target, rows, turns, key)
            if cfg.model.user_heads:
                # Recorded replies may be known by heart: beside them every other one is doubtful.
                real_BU = turns.mask_BU & ~imagined_B1
                online_BU = real_BU & written_BU
                watched_BU = jnp.where(jnp.any(online_BU), online_BU, real_BU)
                state = guards.watch_disagreement(state, seen.disagreement, watched_BU, cfg.returns.scale_decay)
            before_BU = turns.mask_BU & imagined_B1
            doubt_BU, turns = guarded(state, turns, seen, imagined_B1)
            rows = rows.replace(reward_BU=earned(rows, turns, seen, doubt_BU, imagined_B1))
            count = jnp.sum(before_BU, dtype=jnp.float32)
            metrics["train/doubt"] = masked_sum(doubt_BU, before_BU), count
            metrics["train/kept"] = masked_sum(turns.mask_BU.astype(jnp.float32), before_BU), count
        unanswered_BU = turns.reply_BU == turns.close_BU
        discount_BU = jnp.where(unanswered_BU, 1.0, cfg.returns.discount) * (1.0 - turns.last_BU)
        ratio_BU = jnp.ones_like(rows.reward_BU)
        if rl and cfg.returns.vtrace:
            ratio_BU = ratio_BU.at[: real.token_BT.shape[0]].set(followed(state, real))
        returns = jax.vmap(value.lambda_returns, (0, 0, 0, 0, None, 0))
        lambda_ = cfg.returns.lambda_ if rl else 1.0
        return_BU = returns(rows.reward_BU, seen.next_value, discount_BU, turns.mask_BU, lambda_, ratio_BU)
        if rl and cfg.guard.anchors:
            anchored_BU = guards.to_real(return_BU, state.anchor_XW)
            return_BU = jnp.where(imagined_B1 & turns.mask_BU, anchored_BU, return_BU)

        advantage_BU = zeros_BU
        if rl:
            since = state.step - cfg.train.supervised_steps
            state = watch_returns(cfg.returns, state, return_BU, turns.mask_BU, imagined_B, since)
            advantage_BU = advantages(cfg, state, return_BU, seen.open_value, turns.mask_BU, seen_rows)
            kinds_of = {"real": ~imagined_B & ~own_B, "imagined": imagined_B}
            metrics |= figures(rows, turns, return_BU, seen.open_value, kinds_of)
            metrics["train/return_range"] = state.return_high - state.return_low, jnp.ones(())
            written = jnp.sum(rows.sampled_BT & imagined_B1, dtype=jnp.int32)
            state = state.replace(imagined_tokens=state.imagined_tokens + written)
        advantage_BT = spread(protocol, rows, advantage_BU)
        if cfg.returns.token_discount < 1:
            advantage_BT *= cfg.returns.token_discount ** tokens_after(rows)
        planned_BU = None
        if rl and cfg.loss.distil:  # the first turn of an imagined dialogue
            planned_BU = turns.mask_BU & imagined_B1 & (jnp.cumsum(turns.mask_BU, axis=1) == 1)
        belief_BUZ, told_B = jnp.zeros((*zeros_BU.shape, cfg.model.belief)), jnp.zeros_like(own_B)
        if belief_BTZ is not None:
            told_R = jnp.arange(0, real_rows, real_rows // belief_BTZ.shape[0])
            belief_BUZ = belief_BUZ.at[told_R].set(gather(belief_BTZ, turns.open_BU[told_R]))
            told_B = told_B.at[told_R].set(True)
        learnt = masks(protocol, rows, turns, imagined_B, rl, cfg.world_model.tokens, planned_BU, own_B, told_B)
        if rl and cfg.control == "user_gradient":  # a negative control: rule 2 broken on purpose
            advantage_BT += spread(protocol, rows, advantage_BU, pr.USER)
            learnt["policy_imagined"] |= spread(protocol, rows, turns.mask_BU, pr.USER) & imagined_B1
        if rl and cfg.returns.vtrace:
            return_BU = jnp.where(turns.mask_BU, value.vtrace(return_BU, seen.open_value, ratio_BU), 0.0)
        batch = Batch(rows, turns, learnt, return_BU, seen.open_value, advantage_BT, target_BT, belief_BUZ)
        return jax.lax.stop_gradient(batch), state, metrics

    return targets


def tokens_after(dialogue: Dialogue) -> Array:
    """f32 (B, T): how many tokens of the dialogue follow each one."""
    said_BT = (dialogue.author_BT != pr.END).astype(jnp.float32)
    return jnp.maximum(jnp.sum(said_BT, axis=1, keepdims=True) - jnp.cumsum(said_BT, axis=1), 0.0)


def watch_returns(
    cfg: config.Returns, state: TrainState, return_BU: Array, mask_BU: Array, imagined_B: Array, since: Array
) -> TrainState:
    """Moves the running range of the returns, and their running means, on by one batch, `since` so many steps of RL.

    The range begins at 0, below the floor; the means, with which returns are compared, begin as plain averages.
    """

    def moved(old, new, decay=cfg.scale_decay):
        return decay * old + (1 - decay) * new

    def mean_of(rows_B, old):
        chosen_BU = mask_BU & rows_B[:, None]
        count = jnp.sum(chosen_BU)
        decay = jnp.minimum(cfg.scale_decay, since / (since + 1))
        return jnp.where(count > 0, moved(old, masked_sum(return_BU, chosen_BU) / jnp.maximum(count, 1), decay), old)

    low, high = value.return_range(return_BU, mask_BU)
    return state.replace(
        return_low=moved(state.return_low, low),
        return_high=moved(state.return_high, high),
        real_mean=mean_of(~imagined_B, state.real_mean),
        imagined_mean=mean_of(imagined_B, state.imagined_mean),
    )


def figures(rows: Dialogue, turns: Turns, return_BU: Array, value_BU: Array, kinds: dict[str, Array]):
    """Metrics of the turns of each kind of rows, by its name, as (sum, weight)."""
    metrics = {}
    for name, rows_B in kinds.items():
        chosen_BU = turns.mask_BU & rows_B[:, None]
        turn_count, row_count = jnp.sum(chosen_BU, dtype=jnp.float32), jnp.sum(rows_B, dtype=jnp.float32)
        metrics[f"train/{name}_return"] = masked_sum(return_BU, chosen_BU), turn_count
        metrics[f"train/{name}_reward"] = masked_sum(rows.reward_BU, chosen_BU), row_count
        metrics[f"train/{name}_value_error"] = masked_sum((return_BU - value_BU) ** 2, chosen_BU), turn_count
        metrics[f"train/{name}_turns"] = turn_count, row_count
    return metrics
