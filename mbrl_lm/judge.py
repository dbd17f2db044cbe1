"""Who a policy is judged by: the embedded environment's true user, or a partner that shares no scenario with it.

A judge plays real dialogues and imagines others from the same openings, which gives the exploitation table:

    gap = G(u^, r^) - G(u*, r*)  =  user-model part [G(u^, r^) - G(u*, r^)]  +  reward-model part [G(u*, r^) - G(u*, r*)]

u^ is the imagined user, u* the true one, r^ the reward that imagination is trained on, r* the true one. The fourth return,
G(u^, r*), needs to know what an imagined user truly wants: of the embedded environment, the exact filter does.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import config, goals, learner, nn, value
from mbrl_lm import protocol as pr
from mbrl_lm.checkpoint import Checkpoints
from mbrl_lm.data.batches import chunks, join, lengths, rows_for, text_batches
from mbrl_lm.data.corpus import Corpus
from mbrl_lm.data.encode import decode
from mbrl_lm.data.records import Record
from mbrl_lm.envs import negotiation
from mbrl_lm.envs.concierge import HELD_OUT_TYPES, TEST_UIDS, bayes, mean_interval
from mbrl_lm.envs.haggler import Haggler, Listener
from mbrl_lm.envs.negotiation import Table, plan_cost, summary
from mbrl_lm.envs.true_user import TrueUser
from mbrl_lm.metrics import Progress
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.reward import REWARDS
from mbrl_lm.sharding import abstract, pjit
from mbrl_lm.turns import find_turns
from mbrl_lm.types import Array, Dialogue, Params, TrainState


class Verdict(NamedTuple):
    """Figures by name, and real dialogues as the policy saw them."""

    figures: dict[str, float]
    dialogues: Dialogue


class Judge(Protocol):
    """Scores a policy against someone nothing was trained on."""

    def evaluate(self, params: Params, key: Array, dialogues: int, user: Params | None = None) -> Verdict:
        """`user`: parameters that speak for the imagined user; None: those of the policy."""


def make_judge(
    cfg: config.Config, net: nn.Net, corpus: Corpus, mesh, workdir: pathlib.Path, imagined_user: Params | None = None
) -> Judge | None:
    """The judge of a data set; None where there is nobody to talk to, only recordings.

    Args:
      cfg, net, corpus, mesh, workdir: of the run.
      imagined_user: parameters that speak for the user where `cfg.plan` looks ahead; None: those of the policy.
    """
    judges: dict[str, Callable[..., Judge]] = {"concierge": ConciergeJudge, "deal_or_no_deal": PartnerJudge}
    if cfg.data not in judges:
        return None
    return judges[cfg.data](cfg, net, corpus, mesh, workdir, imagined_user)


class Imagination:
    """Returns under the learned reward: of dialogues imagined from given openings, and of real ones."""

    def __init__(self, cfg: config.Config, net: nn.Net, protocol: pr.Protocol, mesh, rows: int):
        centres_W = value.bin_centres(cfg.model.bins, cfg.model.bin_limit)

        def learned_return(params, dialogue):
            turns = find_turns(protocol, dialogue)
            heads = net.forward(params, dialogue.token_BT)
            return jnp.sum(REWARDS[cfg.imagine.reward](dialogue, turns, heads, centres_W), axis=1)

        def imagine(params, opening, temperature_R, key, user):
            whole = goals.imagine(
                cfg.world_model.goals, net, protocol, params, opening, key, tokens=cfg.tokens, turns=2 * cfg.turns,
                temperature=temperature_R, user=user,
            )  # fmt: skip
            return learned_return(params, whole), whole

        self._imagine, self._learned, self._rows = pjit(imagine, mesh), pjit(learned_return, mesh), rows

    def imagined(
        self, params: Params, openings: Dialogue, temperature_R: np.ndarray, key: Array, user: Params | None = None
    ) -> tuple[np.ndarray, Dialogue]:
        """G(u^, r^) of each opening, and the dialogues, numpy; `user` has the parameters that speak for u^, if others."""
        rows = chunks(openings, self._rows)
        parts = [(self._imagine(params, part, temperature_R, key, user), mask) for part, mask in rows]
        parts = [jax.tree.map(lambda x, kept=mask: np.asarray(x)[kept], part) for part, mask in parts]
        return np.concatenate([returns for returns, _ in parts]), join([whole for _, whole in parts])

    def learned(self, params: Params, dialogues: Dialogue) -> np.ndarray:
        """G(u*, r^) of each real dialogue."""
        parts = [(self._learned(params, part), mask) for part, mask in chunks(dialogues, self._rows)]
        return np.concatenate([np.asarray(x)[mask] for x, mask in parts])


def interval(name: str, values: np.ndarray) -> dict[str, float]:
    """A mean and its 95 % interval, as three figures."""
    mean, low, high = mean_interval(values.tolist())
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def gap(
    true: np.ndarray, real_learned: np.ndarray, imagined: np.ndarray, groups: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """The exploitation gap and its two parts, from returns that are paired by their openings; the gap of groups of them.

    Args:
      true, real_learned, imagined: G(u*, r*), G(u*, r^) and G(u^, r^) of each opening.
      groups: name -> whether an opening belongs to it.
    """
    figures = {
        **interval("true/return", true),
        "true/learned_return": float(real_learned.mean()),
        "imagined/return": float(imagined.mean()),
        **interval("gap/total", imagined - true),
        **interval("gap/user_model", imagined - real_learned),
        **interval("gap/reward_model", real_learned - true),
    }
    for name, of in (groups or {}).items():
        figures |= interval(f"gap/total/{name}", (imagined - true)[of]) if of.any() else {}
    return figures


def temperatures(cfg: config.Config) -> np.ndarray:
    """Of each role where the policy is judged in imagination: the imagined user is as in training."""
    return pr.temperatures(assistant=cfg.eval.temperature, user=cfg.imagine.user_temperature)


def judged_at_once(cfg: config.Config) -> int:
    """How many dialogues a judge computes together: no more than it is ever asked for."""
    return rows_for(max(cfg.eval.dialogues, cfg.eval.final_dialogues))


class ConciergeJudge:
    """The embedded environment's true user, all types, those held out of training included."""

    def __init__(self, cfg, net, corpus: Corpus, mesh, workdir: pathlib.Path, imagined_user: Params | None = None):
        self._cfg, self._tokenizer, rows = cfg, corpus.tokenizer, judged_at_once(cfg)
        self._user = TrueUser(cfg, net, corpus.protocol, corpus.tokenizer, mesh, rows, imagined_user=imagined_user)
        self._imagination = Imagination(cfg, net, corpus.protocol, mesh, rows) if cfg.imagine.reward else None

    def evaluate(self, params: Params, key: Array, dialogues: int, user: Params | None = None) -> Verdict:
        """Success, return and its components, per user type, with 95 % intervals; the four returns and the gap."""
        uids, temperature = TEST_UIDS[:dialogues], self._cfg.eval.temperature
        real, outcomes = self._user.play(params, key, uids, "test", temperature)
        told = ("left", "hallucinated", "injected", "turns", "asked")
        components = ("outcome", "turn_cost", "hallucination", "injection")  # none where the first turn ran out of tokens
        names = ("success", "type", *told, *components)
        column = {name: np.array([outcome.get(name, 0.0) for outcome in outcomes]) for name in names}
        figures = interval("true/success", column["success"].astype(np.float64))
        held_out = np.isin(column["type"], HELD_OUT_TYPES)
        in_training = {"seen": ~held_out, "held_out": held_out}
        groups = in_training | {kind: column["type"] == kind for kind in set(column["type"])}
        for name, of in sorted(groups.items()):
            figures |= interval(f"true/success/{name}", column["success"][of].astype(np.float64)) if of.any() else {}
        for name in told + components:
            figures |= interval(f"true/{name}", column[name].astype(np.float64))
        if self._cfg.plan != "none":
            figures |= self._of_plans(real, outcomes)
        if self._imagination:
            openings = self._user.openings(uids, "test")
            imagined, told_B = self._imagination.imagined(params, openings, temperatures(self._cfg), key, user)
            figures |= gap(real.reward_BU.sum(axis=1), self._imagination.learned(params, real), imagined, in_training)
            records = decode(told_B, self._tokenizer)
            figures["imagined/true_return"] = np.mean([true_return(r, "test", self._cfg.noise) for r in records])
        return Verdict({name: float(x) for name, x in figures.items()}, real)

    def _of_plans(self, real: Dialogue, outcomes: list[dict[str, float]]) -> dict[str, float]:
        """What planning a turn cost, and by how much its worth was overrated when the first one was chosen."""
        tokens, turns = (sum(outcome.get(name, 0) for outcome in outcomes) for name in ("plan_tokens", "turns"))
        returns = real.reward_BU @ (self._cfg.returns.discount ** np.arange(real.reward_BU.shape[1]))
        worth = np.array([outcome.get("plan_worth", np.nan) for outcome in outcomes])
        known = ~np.isnan(worth)
        cost = {"plan/tokens_a_turn": tokens / max(turns, 1)}
        cost["plan/seconds_a_turn"] = float(np.median(self._user.seconds)) / self._user.rows
        return cost | interval("plan/overrated", (worth - returns)[known])


def true_return(record: Record, split: str, noise: float = 0.0) -> float:
    """G(u^, r*) of an imagined dialogue: what it would truly be worth to a user who wants what this one seems to want."""
    return sum(bayes.read(record.context, record.spoken, record.ended, split, noise).reward.values())


class Opposite(NamedTuple):
    """Who sits opposite: a network or a script, its parameters, and who reads outcomes for it, if not itself."""

    partner: nn.Net | Haggler
    params: Params | None = None
    listener: Listener | None = None


class PartnerJudge:
    """A partner of another architecture and seed, trained on scenarios that are disjoint from the learner's.

    It is still a model, fitted to people, and no person: see the known gaps in BUILD_NOTES.md.
    """

    def __init__(self, cfg, net, corpus: Corpus, mesh, workdir: pathlib.Path, imagined_user: Params | None = None):
        self._cfg, rows = cfg, judged_at_once(cfg)
        opposite = held_out_partner(cfg, corpus, mesh, workdir)
        self._partner, scenarios = opposite.params, negotiation.scenarios(corpus.val_records)
        self._table = Table(
            cfg, corpus.protocol, net, opposite.partner, mesh, scenarios, rows, imagined_user, opposite.listener
        )
        self._imagination = Imagination(cfg, net, corpus.protocol, mesh, rows)

    def evaluate(self, params: Params, key: Array, dialogues: int, user: Params | None = None) -> Verdict:
        """Both sides' points, agreement and Pareto efficiency over held-out scenarios; the gap, in points."""
        temperature = self._cfg.eval.temperature
        results, real = self._table.play(params, self._partner, key, dialogues, temperature)
        openings, _ = self._table.openings(np.arange(dialogues))
        imagined, _ = self._imagination.imagined(params, openings, negotiation.temperatures(temperature), key, user)
        figures = {f"partner/{name}": x for name, x in summary(results).items()} | plan_cost(results)
        figures |= gap(results["score_a"].astype(np.float64), self._imagination.learned(params, real), imagined)
        return Verdict(figures, real)


def held_out_partner(cfg: config.Config, corpus: Corpus, mesh, workdir: pathlib.Path) -> Opposite:
    """The partner of a run. Its scenarios are too few to learn to read outcomes from, which rules do for it.

    Args:
      cfg, corpus, mesh, workdir: of the run.
    """
    net = nn.make_net(cfg.partner.model, corpus.protocol.vocab_size)
    params = fit_partner(cfg, net, corpus, mesh, partner_directory(cfg, workdir))
    return Opposite(net, params, Listener(corpus.tokenizer, corpus.protocol))


def partner_directory(cfg: config.Config, workdir: pathlib.Path) -> pathlib.Path:
    """Where a run's partner is kept: with the run whose likelihood phase it begins with, for all of them."""
    return (pathlib.Path(cfg.start) if cfg.start else workdir) / "partner"


def fit_partner(cfg: config.Config, net: nn.Net, corpus: Corpus, mesh, directory: pathlib.Path) -> Params:
    """A model of both speakers, fitted to `corpus.others` by likelihood alone, with a seed of its own; kept in `directory`.

    A function of the config: fitted again after an interruption, it is the same to the bit.
    """
    train = dataclasses.replace(cfg.train, supervised_steps=cfg.partner.steps)
    own = dataclasses.replace(cfg, model=cfg.partner.model, train=train)
    optimizer = make_optimizer(train)
    key = jax.random.fold_in(jax.random.key(cfg.seed), np.uint32(2**31))
    init = functools.partial(learner.init_state, net, optimizer)
    with Checkpoints(directory, keep=1) as kept:
        if kept.latest() is not None:
            return kept.restore(abstract(jax.eval_shape(init, key), mesh), {})[1].params
        state = _fit(own, net, corpus, mesh, optimizer, pjit(init, mesh)(key), key)
        kept.save(cfg.partner.steps, state, {}, {})
    return state.params


def _fit(cfg: config.Config, net: nn.Net, corpus: Corpus, mesh, optimizer, state: TrainState, key: Array) -> TrainState:
    update = learner.compile_update(net, corpus.protocol, cfg, optimizer, mesh, rl=False)
    batch_at = text_batches(cfg, cfg.seed + 1, corpus.others, corpus.others_renamed)
    with Progress(cfg.train.supervised_steps) as progress:  # minutes in which nothing else is to be seen
        progress.phase("the partner's likelihood")
        for step in range(cfg.train.supervised_steps):
            batch = batch_at(step)
            state, _ = update(state, batch, None, jax.random.fold_in(key, step))
            progress.tick(step + 1, int(lengths(batch).sum()))
    return state
