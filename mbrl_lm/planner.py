"""Looking ahead at decode time: the assistant's next turn is chosen among candidates by what is imagined to follow them.

    rollouts  C candidates of the policy, M imagined futures of each; their mean return, less kappa spreads, decides
    mpc       again and again: new candidates begin like the best ones so far, in the manner of TD-MPC2 (Hansen et al. 2024)
    gumbel    a tree over turns: its actions are candidates, its model is the imagined reply; searched by Gumbel MuZero
              (Danihelka et al. 2022, mctx), candidates weighted as in Sampled MuZero (Hubert et al. 2021)

With one candidate, every one of them is the plain policy: the first candidate is what the policy would have said anyway.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import mctx

from mbrl_lm import config, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.lookahead import Lookahead
from mbrl_lm.nn import Net
from mbrl_lm.rollout import copy_uids
from mbrl_lm.turns import prompt_lengths
from mbrl_lm.types import Array, Dialogue

REPEATED = -1e9  # the logit of a candidate whose text stands before it


@flax.struct.dataclass
class Planned:
    """What a planner decided for each prompt."""

    dialogue: Dialogue  # the prompt with the turn that was chosen
    worth_B: Array  # f32, the return from here on that the planner expects of it; 0 without a planner
    tokens_B: Array  # i32, written in order to decide, the turn itself included


Planner = Callable[..., Planned]


def make_planner(cfg: config.Config, net: Net, protocol: pr.Protocol, narrow: bool = False) -> Planner:
    """Builds `plan(params, prompt, key, temperature, user=None) -> Planned`, to be compiled by `pjit`.

    Its arguments are those of `rollout.imagine`; a prompt ends where the assistant is about to speak, and one that has ended
    stays as it is. `user`: parameters that speak for the imagined user and read outcomes, if not the policy's; the heads are
    always the policy's.

    Args:
      cfg, net, protocol: of the run.
      narrow: the plain policy, too, writes on a cache no wider than it needs: faster, and longer to compile.
    """
    kinds = {"rollouts": _iterated, "mpc": _iterated, "gumbel": _searched}
    chooses = cfg.planner.candidates > 1
    ahead = Lookahead(cfg, net, protocol)
    return kinds[cfg.plan](ahead) if chooses and cfg.plan != "none" else _plain(ahead, narrow)


# ---- the plain policy ----


def _plain(ahead: Lookahead, narrow: bool) -> Planner:
    room = ahead.cfg.turn_tokens if narrow else 0

    def plan(params, prompt, key, temperature, user=None):
        written, tokens_B = ahead.write(params, prompt, key, temperature, None, room=room)
        return Planned(written, jnp.zeros_like(tokens_B, jnp.float32), tokens_B)

    return plan


# ---- roll-outs, and their iteration ----


def taken(tree: Any, index_BK: Array) -> Any:
    """Rows (B * C, ...), those of a prompt together -> those at `index_BK` of each prompt, (B * K, ...)."""
    B, K = index_BK.shape

    def take(x):
        x = x.reshape(B, -1, *x.shape[1:])
        picked = jnp.take_along_axis(x, index_BK.reshape(B, K, *(1,) * (x.ndim - 2)), axis=1)
        return picked.reshape(B * K, *x.shape[2:])

    return jax.tree.map(take, tree)


def joined(first: Any, second: Any, B: int) -> Any:
    """Rows of two trees, (B * C, ...) each, those of a prompt together."""

    def join(x, y):
        x, y = (a.reshape(B, -1, *a.shape[1:]) for a in (x, y))
        both = jnp.concatenate([x, y], axis=1)
        return both.reshape(-1, *both.shape[2:])

    return jax.tree.map(join, first, second)


def identical(dialogue: Dialogue, B: int) -> Array:
    """bool (B, C, C): which candidates of a prompt are the same text."""
    token_BCT = dialogue.token_BT.reshape(B, -1, dialogue.token_BT.shape[1])
    return jnp.all(token_BCT[:, :, None] == token_BCT[:, None], axis=-1)


def beginnings(protocol: pr.Protocol, elites: Dialogue, from_B: Array, key: Array) -> Dialogue:
    """Each turn that starts at `from_B`, cut off at a place drawn at random: new candidates begin like it."""
    length_B = prompt_lengths(elites)
    place_B = from_B + jax.random.randint(key, from_B.shape, 0, jnp.maximum(length_B - from_B, 1))
    return rollout.prefix(protocol, elites, place_B).replace(ended_B=elites.ended_B & (length_B <= from_B))


@flax.struct.dataclass
class Pool:
    """Candidates of each prompt, (B * C, ...), those of a prompt together."""

    dialogue: Dialogue
    worth_B: Array  # f32, the mean over all looks at it
    looks_B: Array  # f32, how often it was looked at


def _iterated(ahead: Lookahead) -> Planner:
    """`rollouts` and, with more than one round, `mpc`."""
    cfg, plan = ahead.cfg, ahead.plan
    C, M, E = plan.candidates, plan.futures if plan.depth else 1, min(plan.elites, plan.candidates)
    rounds = plan.iterations if cfg.plan == "mpc" else 1

    def decide(params, prompt, key, temperature, user=None):
        from_B, B = prompt_lengths(prompt), prompt.uid_B.shape[0]
        wanted_BZ = ahead.wanted(params if user is None else user, prompt)  # a candidate tells nothing new of it

        def written(base: Dialogue, copies: int, key: Array) -> tuple[Pool, Array]:
            """New candidates, nothing known of them, and the tokens that they took of each prompt."""
            room = cfg.turn_tokens
            dialogue, tokens_B = ahead.write(params, base, key, temperature, None, copies=copies, room=room)
            zeros_B = jnp.zeros(B * C)
            return Pool(dialogue, zeros_B, zeros_B), jnp.sum(tokens_B.reshape(B, C), axis=1)

        def looked_at(pool: Pool, key: Array) -> tuple[Pool, Array]:
            """Imagines M more futures of every candidate; the tokens that they took of each prompt."""
            rows = pool.worth_B.shape[0]
            future = pool.dialogue.replace(uid_B=copy_uids(prompt.uid_B, rows // B, salt=1))  # copied once more below
            tokens_B = jnp.zeros(rows, jnp.int32)
            if plan.depth:
                turns = 2 * plan.depth - 1
                room = plan.future_tokens
                logp_BZ = None if wanted_BZ is None else jnp.repeat(wanted_BZ, rows // B, axis=0)
                future, tokens_B = ahead.write(
                    params, future, key, temperature, user, turns=turns, copies=M, room=room, replies=True, logp_BZ=logp_BZ
                )
            look = ahead.look(params, future, jnp.repeat(from_B, rows // B * M))
            return_BM = look.return_B.reshape(rows, M)
            worth_B = jnp.mean(return_BM, axis=1) - plan.kappa * jnp.std(return_BM, axis=1)
            # Candidates of the same text are one: what followed any of them was said of all.
            same_BCC = identical(pool.dialogue, B)
            worth_B = jnp.einsum("BCX,BX->BC", same_BCC, worth_B.reshape(B, -1)) / jnp.sum(same_BCC, axis=-1)
            looks_B = pool.looks_B + 1
            worth_B = pool.worth_B + (worth_B.reshape(rows) - pool.worth_B) / looks_B
            return pool.replace(worth_B=worth_B, looks_B=looks_B), jnp.sum(tokens_B.reshape(B, -1), axis=1)

        def elites(pool: Pool) -> Pool:
            return taken(pool, jax.lax.top_k(pool.worth_B.reshape(B, -1), E)[1])

        def again(carry, key):
            best, tokens_B = carry
            base_key, cut_key, write_key, look_key = jax.random.split(key, 4)
            base = taken(best.dialogue, jax.random.randint(base_key, (B, C), 0, E))
            base = base.replace(uid_B=copy_uids(prompt.uid_B, C))
            base = beginnings(ahead.protocol, base, jnp.repeat(from_B, C), cut_key)
            new, written_B = written(base, 1, write_key)
            pool, looked_B = looked_at(joined(best, new, B), look_key)
            return (elites(pool), tokens_B + written_B + looked_B), None

        look_key, choice_key, rounds_key = (jax.random.fold_in(key, n) for n in range(1, 4))
        pool, written_B = written(prompt, C, key)  # the first one is what the policy would have said
        pool, looked_B = looked_at(pool, look_key)
        tokens_B = written_B + looked_B
        if rounds > 1:
            (pool, tokens_B), _ = jax.lax.scan(again, (elites(pool), tokens_B), jax.random.split(rounds_key, rounds - 1))
        worth_BC = pool.worth_B.reshape(B, -1)
        chosen_B = jnp.argmax(worth_BC, axis=1)
        if plan.temperature:
            chosen_B = jax.random.categorical(choice_key, worth_BC / plan.temperature)
        chosen = taken(pool, chosen_B[:, None])
        return Planned(chosen.dialogue.replace(uid_B=prompt.uid_B), chosen.worth_B, tokens_B)

    return decide


# ---- tree search ----


@flax.struct.dataclass
class Node:
    """A state of the tree in which the assistant is to speak."""

    candidate_BK: Dialogue  # its actions, (B, K, ...)
    from_B: Array  # i32, where they begin
    tokens_B: Array  # i32, written to make this node


def _searched(ahead: Lookahead) -> Planner:
    cfg, plan = ahead.cfg, ahead.plan
    K = plan.candidates

    def decide(params, prompt, key, temperature, user=None):
        B = prompt.uid_B.shape[0]

        def actions(state: Dialogue, key: Array, tokens_B: Array) -> tuple[Node, Array]:
            """Candidates drawn from the policy, and the log of the share that each text has of them."""
            written, own_B = ahead.write(params, state, key, temperature, None, copies=K)
            same_BKK = identical(written, B)
            repeated_BK = jnp.argmax(same_BKK, axis=-1) < jnp.arange(K)[None]
            share_BK = jnp.mean(same_BKK.astype(jnp.float32), axis=-1)
            candidates = jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), written)
            node = Node(candidates, prompt_lengths(state), tokens_B + jnp.sum(own_B.reshape(B, K), axis=1))
            return node, jnp.where(repeated_BK, REPEATED, jnp.log(share_BK))

        def said(node: Node, action_B: Array) -> Dialogue:
            """The dialogues of a node with the candidates that were chosen."""
            candidates = jax.tree.map(lambda x: x.reshape(B * K, *x.shape[2:]), node.candidate_BK)
            return taken(candidates, action_B[:, None]).replace(uid_B=prompt.uid_B)

        def step(params, key, action_B, node: Node):
            reply_key, write_key = jax.random.split(key)
            replied, tokens_B = ahead.write(params, said(node, action_B), reply_key, temperature, user, replies=True)
            look = ahead.look(params, replied, node.from_B)
            after, prior_BK = actions(replied, write_key, tokens_B)
            out = mctx.RecurrentFnOutput(
                reward=look.reward_B,
                discount=jnp.where(replied.ended_B, 0.0, cfg.returns.discount),
                prior_logits=prior_BK,
                value=look.value_B,
            )
            return out, after

        root, prior_BK = actions(prompt, key, jnp.zeros(B, jnp.int32))  # the first one is what the policy would have said
        value_B = ahead.open_value(params, prompt)
        found = mctx.gumbel_muzero_policy(
            params,
            jax.random.fold_in(key, 1),
            mctx.RootFnOutput(prior_logits=prior_BK, value=value_B, embedding=root),
            step,
            num_simulations=plan.simulations,
            invalid_actions=prior_BK <= REPEATED,
            max_depth=plan.depth or None,
            gumbel_scale=plan.temperature,
        )
        worth_BK = found.search_tree.qvalues(jnp.zeros(B, jnp.int32))
        worth_B = jnp.take_along_axis(worth_BK, found.action[:, None], axis=1)[:, 0]
        return Planned(said(root, found.action), worth_B, jnp.sum(found.search_tree.embeddings.tokens_B, axis=1))

    return decide
