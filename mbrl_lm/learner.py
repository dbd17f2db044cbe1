"""The jitted update: the joint objective on real and imagined dialogues.

    L = policy(real) + eta policy(imagined) + user + outcome + assistant + value + reward + end + beta KL

Each component is a per-element array with a mask, normalised by its own count over the whole batch and weighted once. What
must not be learnt from is out of a mask: the user likelihood sees real user tokens only, the policy gradient assistant
tokens only.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mbrl_lm import config, policy, value, world_model
from mbrl_lm import protocol as pr
from mbrl_lm.advantage import advantages
from mbrl_lm.nn import Net
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.reward import REWARDS
from mbrl_lm.scoring import score
from mbrl_lm.sharding import constrain, pjit
from mbrl_lm.turns import find_turns, gather, spread
from mbrl_lm.types import Array, Dialogue, Heads, TrainState, Turns


@flax.struct.dataclass
class Batch:
    """Rows of one update with everything that is fixed while their loss is differentiated."""

    dialogue: Dialogue
    turns: Turns
    masks: dict[str, Array]  # per component: bool, (B, T) or (B, U)
    return_BU: Array  # f32, lambda-returns
    advantage_BT: Array  # f32, of the turn that each assistant token belongs to


def init_state(net: Net, optimizer: optax.GradientTransformation, key: Array, population: int = 0) -> TrainState:
    """A fresh state: step 0, and the target, the reference and a population of P members equal to the parameters."""
    params = net.init(key)
    copy = jax.tree.map(jnp.copy, params)
    reference = jax.tree.map(jnp.copy, params)
    users = _stacked(params, population) if population else None
    step, zero = jnp.zeros((), jnp.int32), jnp.zeros(())
    return TrainState(step, params, optimizer.init(params), copy, reference, users, zero, zero, zero, zero)


def initialiser(cfg: config.Config, net: Net) -> Callable[[Array], TrainState]:
    """key -> the state that a run starts from."""
    population = cfg.imagine.population if cfg.train.rl_steps and cfg.imagine.user == "population" else 0
    return functools.partial(init_state, net, make_optimizer(cfg.train), population=population)


def begin_rl(state: TrainState) -> TrainState:
    """Freezes the present policy as the reference of the KL term, and starts the slow critic and the population from it."""
    copy, reference = (jax.tree.map(jnp.copy, state.params) for _ in range(2))
    users = state.population
    if users is not None:
        users = _stacked(state.params, jax.tree.leaves(users)[0].shape[0])
    return state.replace(target=copy, reference=reference, population=users)


def _stacked(params: Any, population: int) -> Any:
    return jax.tree.map(lambda x: jnp.repeat(x[None], population, axis=0), params)


def remember(state: TrainState, place: Array) -> TrainState:
    """Puts the present parameters in the place of one member of the population."""
    users = jax.tree.map(lambda past, now: past.at[place].set(now), state.population, state.params)
    return state.replace(population=users)


def imagined_user(cfg: config.Imagine, state: TrainState, key: Array) -> Any:
    """Whose parameters speak for the user in imagination: None for the policy's own, a member drawn from the population."""
    if cfg.user == "live":
        return None
    if cfg.user == "frozen":
        return state.reference
    place = jax.random.randint(key, (), 0, cfg.population)
    return jax.tree.map(lambda x: x[place], state.population)


def masked_sum(x: Array, mask: Array) -> Array:
    """The one masked reduction: elements outside the mask count nothing, whatever they hold."""
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x, 0.0))


def weights(cfg: config.Loss, rl: bool) -> dict[str, float]:
    """The weight of each component; before RL begins both speakers are learnt by likelihood alone."""
    both = {"user": cfg.user, "outcome": cfg.outcome, "value": cfg.value, "reward": cfg.reward, "end": cfg.end}
    if not rl:
        return both | {"assistant": 1.0}
    return both | {
        "assistant": cfg.assistant,
        "policy_real": cfg.policy_real,
        "policy_imagined": cfg.policy_imagined,
        "kl": cfg.kl,
        "entropy": cfg.entropy,
    }


def masks(
    protocol: pr.Protocol, dialogue: Dialogue, turns: Turns, imagined_B: Array, rl: bool, user_tokens: str = "all"
) -> dict[str, Array]:
    """Which elements each component is made of."""
    imagined_B1 = imagined_B[:, None]
    user_BT = world_model.user_tokens(dialogue) & ~imagined_B1
    if user_tokens != "all":
        closing_BT = world_model.closing_tokens(protocol, dialogue)
        user_BT &= closing_BT if user_tokens == "closing" else ~closing_BT
    real_turn_BU = turns.mask_BU & ~imagined_B1
    learnt = {
        "user": user_BT,
        "outcome": world_model.real_tokens(dialogue, pr.OUTCOME) & ~imagined_B1,
        "assistant": world_model.real_tokens(dialogue, pr.ASSISTANT) & ~imagined_B1,
        "value": turns.mask_BU if rl else turns.mask_BU & dialogue.ended_B[:, None],
        "reward": real_turn_BU,
        "end": real_turn_BU,
    }
    if not rl:
        return learnt
    action_BT = spread(protocol, dialogue, turns.mask_BU)
    return learnt | {
        "policy_real": action_BT & ~imagined_B1,
        "policy_imagined": action_BT & imagined_B1,
        "kl": action_BT,
        "entropy": action_BT,
    }


def losses(
    net: Net, protocol: pr.Protocol, cfg: config.Config, params, reference, batch: Batch, dropout_key
) -> dict[str, Array]:
    """Every component per element, keys as in `masks`. `reference` None: the likelihood phase."""
    dialogue, turns, centres_W = batch.dialogue, batch.turns, value.bin_centres(cfg.model.bins, cfg.model.bin_limit)
    scores = score(
        net, protocol, params, dialogue, temperature=cfg.imagine.temperature, reference=reference, dropout_key=dropout_key
    )
    user_BT = scores.nll_BT
    if cfg.world_model.loss == "mae":
        user_BT = world_model.clipped_mae(user_BT, cfg.world_model.threshold)
    out = {
        "user": user_BT,
        "outcome": scores.nll_BT,
        "assistant": scores.nll_BT,
        "value": value.cross_entropy(gather(scores.value_BTW, turns.open_BU), batch.return_BU, centres_W),
        "reward": value.cross_entropy(gather(scores.reward_BTW, turns.reply_BU), dialogue.reward_BU, centres_W),
        "end": world_model.end_loss(gather(scores.end_BT, turns.close_BU), turns.last_BU),
    }
    if reference is None:
        return out
    # A logged token has no recorded probability: the reference, fitted to the logs, stands in for who wrote it.
    behaviour_BT = jnp.where(dialogue.sampled_BT, dialogue.logp_BT, scores.reference_logp_BT)
    loss_BT = policy.LOSSES[cfg.policy.loss](scores.logp_BT, behaviour_BT, batch.advantage_BT, cfg.policy)
    gradient_BT = jnp.where(scores.allowed_BT, loss_BT, 0.0)
    return out | {
        "policy_real": gradient_BT,
        "policy_imagined": gradient_BT,
        "kl": scores.kl_BT,
        "entropy": -scores.entropy_BT,
    }


def watch_returns(cfg: config.Returns, state: TrainState, return_BU: Array, mask_BU: Array, imagined_B: Array) -> TrainState:
    """Moves the running range of the returns, and their running means, on by one batch."""

    def moved(old, new):
        return cfg.scale_decay * old + (1 - cfg.scale_decay) * new

    def mean_of(rows_B, old):
        chosen_BU = mask_BU & rows_B[:, None]
        count = jnp.sum(chosen_BU)
        return jnp.where(count > 0, moved(old, masked_sum(return_BU, chosen_BU) / jnp.maximum(count, 1)), old)

    low, high = value.return_range(return_BU, mask_BU)
    return state.replace(
        return_low=moved(state.return_low, low),
        return_high=moved(state.return_high, high),
        real_mean=mean_of(~imagined_B, state.real_mean),
        imagined_mean=mean_of(imagined_B, state.imagined_mean),
    )


def split_rows(tree: Any, parts: int) -> Any:
    """(B, ...) -> (parts, B / parts, ...), every part spread over all devices as the whole was."""

    def split(x):
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, "LB" + "_" * (x.ndim - 2))

    return jax.tree.map(split, tree)


def merge_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def make_update(
    net: Net,
    protocol: pr.Protocol,
    cfg: config.Config,
    optimizer: optax.GradientTransformation,
    *,
    rl: bool,
    shards: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, tuple[Array, Array]]]]:
    """Builds `update(state, real, imagined, key) -> state, metrics`, to be compiled by `pjit`.

    Args:
      net, protocol, cfg, optimizer: what the run is made of.
      rl: False while both speakers are learnt by likelihood; `imagined` then is ignored and may be None.
      shards: over how many devices rows are spread; gradients are accumulated over `train.micro_batch` rows of each.

    Returns:
      The update; its metrics are (sum, weight) pairs.
    """
    weight = weights(cfg.loss, rl)
    centres_W = value.bin_centres(cfg.model.bins, cfg.model.bin_limit)

    def parts_of(rows: int) -> int:
        return rows // math.gcd(rows, cfg.train.micro_batch * shards) if cfg.train.micro_batch else 1

    def head_values(params, dialogue, turns, parts) -> tuple[Array, Array, Array]:
        """Values where turns open and where they are answered, and the imagined reward; a few rows at a time."""

        def one(x):
            dialogue, turns = x
            heads: Heads = net.forward(params, dialogue.token_BT)  # XLA drops the logits, which nothing reads
            value_BT = value.mean(heads.value_BTW, centres_W)
            reward_BU = jnp.zeros_like(dialogue.reward_BU)
            if cfg.imagine.reward:
                reward_BU = REWARDS[cfg.imagine.reward](dialogue, turns, heads, centres_W)
            return gather(value_BT, turns.open_BU), gather(value_BT, turns.reply_BU), reward_BU

        return merge_rows(jax.lax.map(one, split_rows((dialogue, turns), parts)))

    def prepare(state: TrainState, real: Dialogue, imagined: Dialogue | None) -> tuple[Batch, TrainState, dict]:
        """Targets of the update: rewards of imagined dialogues, lambda-returns, advantages, masks."""
        rows = real if imagined is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), real, imagined)
        B = rows.token_BT.shape[0]
        imagined_B = jnp.arange(B) >= real.token_BT.shape[0]
        turns = find_turns(protocol, rows)
        written_BU = gather(rows.sampled_BT, turns.close_BU)
        mask_BU = turns.mask_BU & (written_BU | ~imagined_B[:, None])  # a prompt's turns are no actions
        turns = turns.replace(mask_BU=mask_BU, last_BU=turns.last_BU & mask_BU)
        open_v_BU = next_v_BU = jnp.zeros_like(rows.reward_BU)
        if rl:
            open_v_BU, next_v_BU, reward_BU = head_values(state.target, rows, turns, parts_of(B))
            rows = rows.replace(reward_BU=jnp.where(imagined_B[:, None], reward_BU, rows.reward_BU))
        discount_BU = cfg.returns.discount * (1.0 - turns.last_BU)
        lambda_ = cfg.returns.lambda_ if rl else 1.0
        returns = jax.vmap(value.lambda_returns, (0, 0, 0, 0, None))
        return_BU = returns(rows.reward_BU, next_v_BU, discount_BU, mask_BU, lambda_)

        metrics = {}
        advantage_BU = jnp.zeros_like(return_BU)
        if rl:
            state = watch_returns(cfg.returns, state, return_BU, mask_BU, imagined_B)
            advantage_BU = advantages(cfg, state, return_BU, open_v_BU, mask_BU, real.token_BT.shape[0])
            for name, rows_B in (("real", ~imagined_B), ("imagined", imagined_B)):
                chosen_BU = mask_BU & rows_B[:, None]
                count = jnp.sum(chosen_BU, dtype=jnp.float32)
                metrics[f"train/{name}_return"] = masked_sum(return_BU, chosen_BU), count
                metrics[f"train/{name}_reward"] = masked_sum(rows.reward_BU, chosen_BU), jnp.sum(rows_B, dtype=jnp.float32)
                metrics[f"train/{name}_value_error"] = masked_sum((return_BU - open_v_BU) ** 2, chosen_BU), count
                metrics[f"train/{name}_turns"] = count, jnp.sum(rows_B, dtype=jnp.float32)
            metrics["train/return_range"] = state.return_high - state.return_low, jnp.ones(())
        batch = Batch(
            dialogue=rows,
            turns=turns,
            masks=masks(protocol, rows, turns, imagined_B, rl, cfg.world_model.tokens),
            return_BU=return_BU,
            advantage_BT=spread(protocol, rows, advantage_BU),
        )
        return jax.lax.stop_gradient(batch), state, metrics

    def update(state: TrainState, real: Dialogue, imagined: Dialogue | None, key: Array):
        batch, state, metrics = prepare(state, real.check(), imagined.check() if rl and imagined is not None else None)
        count = {name: jnp.sum(mask, dtype=jnp.float32) for name, mask in batch.masks.items()}
        assert set(count) == set(weight), f"losses {set(count)} and weights {set(weight)} do not match"
        reference = state.reference if rl else None

        def loss(params, part: Batch, part_key):
            dropout_key = part_key if cfg.model.dropout and not rl else None
            per_element = losses(net, protocol, cfg, params, reference, part, dropout_key)
            total = {name: masked_sum(per_element[name], part.masks[name]) for name in weight}
            return sum(weight[name] * total[name] / jnp.maximum(count[name], 1.0) for name in weight), total

        def improve(state: TrainState, key: Array):
            """One step of the optimiser."""

            def accumulate(carry, x):
                (_, total), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, *x)
                return jax.tree.map(jnp.add, carry, (gradient, total)), None

            parts = parts_of(batch.return_BU.shape[0])
            start = (jax.tree.map(jnp.zeros_like, state.params), {name: jnp.zeros(()) for name in weight})
            (gradient, total), _ = jax.lax.scan(accumulate, start, (split_rows(batch, parts), jax.random.split(key, parts)))
            step, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, step)
            target = optax.incremental_update(params, state.target, 1 - cfg.returns.target_decay)
            state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, target=target)
            found = {f"loss/{name}": (total[name], count[name]) for name in weight}
            return state, found | {"gradient_norm": (optax.tree.norm(gradient), jnp.ones(()))}

        epochs = cfg.train.rl_epochs if rl else 1
        if epochs == 1:
            state, found = improve(state, key)
        else:  # the figures of the first one are those of the batch as it was drawn
            state, found = jax.lax.scan(improve, state, jax.random.split(key, epochs))
            found = jax.tree.map(lambda x: x[0], found)
        return state, metrics | found

    return update


def compile_update(net: Net, protocol: pr.Protocol, cfg: config.Config, optimizer, mesh: jax.sharding.Mesh, *, rl: bool):
    """The jitted update on a mesh; the old state's memory is reused."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return pjit(make_update(net, protocol, cfg, optimizer, rl=rl, shards=shards), mesh, donate=(0,))
