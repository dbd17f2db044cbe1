"""The jitted update: the joint objective on real and imagined dialogues.

    L = (1 - s) policy(real) + s policy(imagined) + distil
        + user + belief + outcome + assistant + value + reward + end + beta KL

Each component is a per-element array with a mask, normalised by its own count over the whole batch and weighted once. What
must not be learnt from is out of a mask: the user likelihood sees real user tokens only, the policy gradient assistant
tokens only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mbrl_lm import config, guards, micro_batches, policy, value, world_model
from mbrl_lm import protocol as pr
from mbrl_lm.micro_batches import by_length, narrowed, split_rows
from mbrl_lm.nn import Net
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.scoring import score
from mbrl_lm.sharding import pjit
from mbrl_lm.targets import Batch, make_targets, masked_sum
from mbrl_lm.turns import gather
from mbrl_lm.types import Array, Dialogue, TrainState


def init_state(
    net: Net, optimizer: optax.GradientTransformation, key: Array, turns: int = 1, population: int = 0
) -> TrainState:
    """A fresh state of U turns: step 0; the target, the reference and a population of P members equal the parameters."""
    params = net.init(key)
    copy = jax.tree.map(jnp.copy, params)
    reference = jax.tree.map(jnp.copy, params)
    users = _stacked(params, population) if population else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        target=copy,
        reference=reference,
        population=users,
        return_low=jnp.zeros(()),
        return_high=jnp.zeros(()),
        real_mean=jnp.zeros(()),
        imagined_mean=jnp.zeros(()),
        doubt_U=jnp.zeros(turns),
        doubt_square_U=jnp.zeros(turns),
        anchor_XW=jnp.zeros((2, guards.QUANTILES)),
        imagined_tokens=jnp.zeros((), jnp.int32),
    )


def initialiser(cfg: config.Config, net: Net) -> Callable[[Array], TrainState]:
    """key -> the state that a run starts from."""
    population = cfg.imagine.population if cfg.train.rl_steps and cfg.imagine.user == "population" else 0
    return functools.partial(init_state, net, make_optimizer(cfg.train), turns=cfg.turns, population=population)


def settle(state: TrainState) -> TrainState:
    """Goes on from the average of the latest parameters, which predicts better than the last (Polyak & Juditsky 1992)."""
    return state.replace(params=jax.tree.map(jnp.copy, state.target))


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
    """Whose parameters speak for the user in imagination: None for the policy's own, a member drawn from the population.

    Where the true user speaks in its place, what the policy itself would imagine.
    """
    if cfg.user in ("live", "oracle"):
        return None
    if cfg.user == "frozen":
        return state.reference
    place = jax.random.randint(key, (), 0, cfg.population)
    return jax.tree.map(lambda x: x[place], state.population)


def judged_user(cfg: config.Config, state: TrainState) -> Any:
    """Whose parameters speak for the user where a run's policy is judged in imagination: as in RL; None before that."""
    began = int(state.step) > cfg.train.supervised_steps
    return imagined_user(cfg.imagine, state, jax.random.key(cfg.seed)) if began else None


def likelihood_weights(cfg: config.Config) -> dict[str, Any]:
    """The weight of each component while both speakers are learnt by likelihood alone."""
    loss = cfg.loss
    learnt = {"user": loss.user, "outcome": loss.outcome, "assistant": 1.0}
    learnt |= {"value_real": loss.value_real, "reward": loss.reward, "end": loss.end}
    if cfg.model.belief and loss.user:
        learnt["belief"] = loss.belief
    return learnt | ({"user_heads": 1.0} if cfg.model.user_heads else {})


def weights(cfg: config.Config, state: TrainState, imagines: bool) -> dict[str, Any]:
    """The weight of each component once RL has begun; what is not asked for has none, and is not computed."""
    loss, (first, last) = cfg.loss, cfg.imagine.share
    done = (state.step - cfg.train.supervised_steps) / (cfg.train.rl_steps * cfg.train.rl_epochs)
    share = first + (last - first) * done if imagines else 0.0
    learnt = likelihood_weights(cfg) | {
        "assistant": loss.assistant,
        "policy_real": loss.policy * (1.0 - share),
        "kl": loss.kl,
        "entropy": loss.entropy,
    }
    if loss.trust:
        learnt["trust"] = loss.trust
    if cfg.world_model.adaptive:  # PaW (2026)
        learnt["user"] *= 1.0 - jnp.clip(state.real_mean / cfg.returns.best, 0.0, 1.0)
    if loss.slow_value:
        learnt["slow_value"] = loss.slow_value
    if imagines:
        learnt |= {"policy_imagined": loss.policy * share, "value": loss.value}
        if loss.distil:
            learnt["distil"] = loss.distil
        if cfg.guard.discriminator:
            learnt |= {"real_reply": 1.0, "imagined_reply": 1.0}
    return learnt


def bootstrap(uid_B: Array, members: int) -> Array:
    """f32 (B, E): which rows each member of an ensemble learns from, about half of them, twice as much; one member, all.

    A function of the row's uid alone (Osband et al. 2016).
    """
    if members < 2:
        return jnp.ones((uid_B.shape[0], members))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(members), uid_B)
    return 2.0 * jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (members,)))(keys)


def losses(
    net: Net, protocol: pr.Protocol, cfg: config.Config, params, reference, slow, batch: Batch, dropout_key
) -> dict[str, Array]:
    """Every component per element, keys as in `masks`. No `reference`: the likelihood phase. No `slow`: no trust region."""
    dialogue, turns, centres_W = batch.dialogue, batch.turns, value.bin_centres(cfg.model.bins, cfg.model.bin_limit)
    scores = score(
        net,
        protocol,
        params,
        dialogue,
        temperature=cfg.imagine.temperature,
        reference=reference,
        slow=slow,
        dropout_key=dropout_key,
        target_BT=batch.target_BT,
    )
    heads = scores.heads
    user_BT = scores.nll_BT
    if cfg.world_model.loss == "mae":
        user_BT = world_model.clipped_mae(user_BT, cfg.world_model.threshold)

    def value_loss(position_BU, target_BU):
        loss_BUE = value.cross_entropy(gather(heads.value_BTEW, position_BU), target_BU[..., None], centres_W)
        return jnp.mean(loss_BUE * bootstrap(dialogue.uid_B, cfg.model.value_heads)[:, None], axis=-1)

    value_BU = value_real_BU = value_loss(turns.open_BU, batch.return_BU)
    if reference is not None and cfg.imagine.replies == 0:  # its bootstrap is read where the assistant has spoken
        value_real_BU = value_BU + value_loss(turns.close_BU, batch.return_BU)
    out = {
        "user": user_BT,
        "user_heads": jnp.sum(scores.user_heads_nll_BTE * bootstrap(dialogue.uid_B, cfg.model.user_heads)[:, None], axis=-1),
        "outcome": scores.nll_BT,
        "assistant": scores.nll_BT,
        "value_real": value_real_BU,
        "reward": value.cross_entropy(gather(heads.reward_BTW, turns.reply_BU), dialogue.reward_BU, centres_W),
        "belief": -jnp.sum(batch.belief_BUZ * jax.nn.log_softmax(gather(heads.belief_BTZ, turns.open_BU)), axis=-1),
        "end": world_model.end_loss(gather(heads.end_BT, turns.close_BU), turns.last_BU),
    }
    if reference is None:
        return out
    behaviour_BT = policy.behaviour(dialogue, scores.reference_logp_BT)
    loss_BT = policy.LOSSES[cfg.policy.loss](scores.logp_BT, behaviour_BT, batch.advantage_BT, cfg.policy)
    gradient_BT = jnp.where(scores.allowed_BT, loss_BT, 0.0)
    return out | {
        "value": value_BU,
        "slow_value": value_loss(turns.open_BU, batch.slow_value_BU),
        "policy_real": gradient_BT,
        "policy_imagined": gradient_BT,
        "distil": jnp.where(scores.allowed_BT, -scores.logp_BT, 0.0),
        "kl": scores.kl_BT,
        "trust": scores.slow_kl_BT,
        "entropy": -scores.entropy_BT,
        "real_reply": -jax.nn.log_sigmoid(gather(heads.real_BT, turns.reply_BU)),
        "imagined_reply": -jax.nn.log_sigmoid(-gather(heads.real_BT, turns.reply_BU)),
    }


def make_update(
    net: Net,
    protocol: pr.Protocol,
    cfg: config.Config,
    optimizer: optax.GradientTransformation,
    *,
    rl: bool,
    dropout: bool = True,
) -> Callable[..., tuple[TrainState, dict[str, tuple[Array, Array]]]]:
    """Builds `update(state, real, imagined, key) -> state, metrics`, to be compiled by `pjit`.

    Args:
      net, protocol, cfg, optimizer: what the run is made of.
      rl: False while both speakers are learnt by likelihood; `imagined` then is ignored and may be None.
      dropout: as the model has it, while both speakers are learnt by likelihood; RL goes without.

    Returns:
      The update. It accumulates gradients over `train.micro_batch` rows of each device; its metrics are (sum, weight) pairs.
    """

    def parts_of(rows: int) -> int:
        return micro_batches.parts_of(rows, cfg.train.micro_batch) if cfg.train.micro_batch else 1

    targets = make_targets(net, protocol, cfg, parts_of, rl)
    widths = cfg.widths if rl else ()  # batches to learn by likelihood from come in dialogues of like length

    def update(state: TrainState, real: Dialogue, imagined: Dialogue | None, key: Array):
        targets_key, key = jax.random.split(key)
        imagined = imagined.check() if rl and imagined is not None else None
        batch, state, metrics = targets(state, real.check(), imagined, targets_key)
        weight = weights(cfg, state, imagined is not None) if rl else likelihood_weights(cfg)
        count = {name: jnp.sum(batch.masks[name], dtype=jnp.float32) for name in weight}
        reference, slow = state.reference if rl else None, state.target if rl and cfg.loss.trust else None

        def loss(params, part: Batch, part_key):
            per_element = losses(net, protocol, cfg, params, reference, slow, part, None if rl or not dropout else part_key)
            total = {name: masked_sum(per_element[name], part.masks[name]) for name in weight}
            return sum(weight[name] * total[name] / jnp.maximum(count[name], 1.0) for name in weight), total

        def improve(state: TrainState, key: Array):
            """One step of the optimiser."""

            def gradient_of(x):
                (_, total), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, *x)
                return gradient, total

            def accumulate(carry, x):
                return jax.tree.map(jnp.add, carry, narrowed(gradient_of, widths, x[0].dialogue, x)), None

            parts = parts_of(batch.return_BU.shape[0])
            ordered = batch
            if min(widths, default=cfg.tokens) < batch.dialogue.token_BT.shape[1]:
                order_B = by_length(batch.dialogue, parts)
                ordered = jax.tree.map(lambda x: x[order_B], batch)
            start = (jax.tree.map(jnp.zeros_like, state.params), {name: jnp.zeros(()) for name in weight})
            xs = split_rows(ordered, parts), jax.random.split(key, parts)
            (gradient, total), _ = jax.lax.scan(accumulate, start, xs)
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


def compile_update(net: Net, protocol: pr.Protocol, cfg: config.Config, optimizer, mesh: jax.sharding.Mesh, **kind: bool):
    """The jitted update on a mesh, `kind` as in `make_update`; the old state's memory is reused."""
    return pjit(make_update(net, protocol, cfg, optimizer, **kind), mesh, donate=(0,))
