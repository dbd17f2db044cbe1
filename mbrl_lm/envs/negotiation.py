"""Deal or No Deal between two sides: each sees its own values, both must name the same split.

The protocol is that of Lewis et al. (2017): random first speaker, low temperature, the dialogue ends when either side calls
for the outcome; each side then writes its own share, and a deal needs both shares to add up to what is on the table.
"""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import config, deal, outcome, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import join, put, take
from mbrl_lm.data.records import Record
from mbrl_lm.envs.haggler import Haggler, Listener
from mbrl_lm.nn import Net
from mbrl_lm.planner import make_planner
from mbrl_lm.replay import empty_dialogues
from mbrl_lm.sharding import pjit
from mbrl_lm.turns import prompt_lengths
from mbrl_lm.types import Array, Dialogue, Params

Scenario = tuple[Sequence[int], Sequence[int]]  # the contexts of the two sides, `count value` of three kinds of item
FEWEST_ROWS = 8  # that are computed together
PLANNED_ROWS = 32  # a planned dialogue has as many rows as futures are imagined of its candidates
GREEDY = 1e-3  # temperature of the outcome, which is read off the dialogue and not negotiated


def scenarios(records: Sequence[Record]) -> list[Scenario]:
    """What was negotiated over: each pair of contexts once, whichever sides of it were recorded."""
    known = {record.scenario: (record.numbers, record.partner_numbers) for record in records}
    return [known[name] for name in sorted(known)]


def prompts(contexts: Sequence[Sequence[int]], first_speaker: Sequence[int], tokens: int, turns: int) -> Dialogue:
    """The openings of negotiations.

    Args:
      contexts: `count value` of the three kinds of item, as one side sees them.
      first_speaker: ASSISTANT or USER, per context.
      tokens, turns: T and U.
    """
    opening = {pr.ASSISTANT: pr.TO_ASSISTANT, pr.USER: pr.TO_USER}
    width = 2 + 2 * pr.ITEMS
    dialogue = empty_dialogues(len(contexts), width, turns)
    for b, (context, first) in enumerate(zip(contexts, first_speaker, strict=True)):
        dialogue.token_BT[b] = [pr.BOS, *(pr.NUMBER + n for n in context), opening[first]]
    if width > tokens:
        raise config.ConfigError(f"a negotiation opens with {width} tokens: raise --config.tokens={tokens}")
    dialogue.uid_B[:] = np.arange(len(contexts))
    return dialogue


def outcomes(scenarios: Sequence[Scenario]) -> int:
    """The most outcomes that a negotiation over any of them can have."""
    return outcome.number_of([pair[0][::2] for pair in scenarios]) if scenarios else 1


def settle(ours: Dialogue, theirs: Dialogue, outcomes: int) -> dict[str, np.ndarray]:
    """Reads the result of finished negotiations, each seen from both sides.

    Returns:
      score_a, score_b: points of either side, 0 without a deal; agreed; pareto: agreed, and no other split is at least as
      good for both and better for one.
    """
    score_a, score_b, agreed, waste = jax.device_get(deal.result(ours, theirs, outcomes))
    return {"score_a": score_a, "score_b": score_b, "agreed": agreed, "pareto": agreed & (waste == 0)}


def has_floor(protocol: pr.Protocol, dialogue: Dialogue) -> Array:
    """bool (B,): the next token is this side's to write, a turn or the outcome as it sees it."""
    return jnp.isin(rollout.next_role(protocol, dialogue), jnp.array([pr.ASSISTANT, pr.OUTCOME]))


def can_go_on(protocol: pr.Protocol, dialogue: Dialogue) -> Array:
    """bool (B,): this side has the floor, and there is room for a token."""
    return has_floor(protocol, dialogue) & (prompt_lengths(dialogue) < dialogue.token_BT.shape[1])


def hear(protocol: pr.Protocol, listener: Dialogue, speaker: Dialogue) -> Dialogue:
    """The dialogue as one side sees it, with what the other side has said since; outcomes are nobody else's."""
    said_BT = jnp.isin(speaker.author_BT, jnp.array([pr.ASSISTANT, pr.USER], jnp.int8)) & (listener.author_BT == pr.END)
    token_BT = jnp.where(said_BT, jnp.asarray(protocol.mirror_V)[speaker.token_BT], listener.token_BT)
    heard = pr.attributed(protocol, listener.replace(token_BT=token_BT))
    ended_B = rollout.next_role(protocol, heard) == pr.END  # not where it only waited for the other side
    return heard.replace(
        ended_B=ended_B,
        cut_B=~ended_B,
        sampled_BT=listener.sampled_BT | said_BT,
        logp_BT=jnp.where(said_BT, speaker.logp_BT, listener.logp_BT),
    )


def temperatures(temperature: float) -> np.ndarray:
    """Of the words, per role; the outcome is read off the dialogue, and not negotiated."""
    return pr.temperatures(assistant=temperature, user=temperature, outcome=GREEDY)


def openings(cfg: config.Config, protocol: pr.Protocol, scenarios: Sequence[Scenario], index: np.ndarray):
    """The prompts of negotiations as either side sees them, numpy.

    Args:
      cfg, protocol: of the run.
      scenarios: pairs of contexts.
      index: of each negotiation; every scenario gives four, from either seat and with either first speaker.
    """
    n = len(scenarios)
    seat, first = (index // n) % 2, (index // (2 * n) + index) % 2
    pairs = [scenarios[i % n][::-1] if s else scenarios[i % n] for i, s in zip(index, seat, strict=True)]
    speakers = np.where(first, pr.ASSISTANT, pr.USER)
    sides = []
    for side, speaker in ((0, speakers), (1, pr.ASSISTANT + pr.USER - speakers)):
        dialogue = prompts([pair[side] for pair in pairs], speaker.tolist(), cfg.tokens, cfg.turns)
        sides.append(pr.attributed_on_host(protocol, dialogue.replace(uid_B=index.astype(np.uint32))))
    return sides[0], sides[1]


class Table:
    """Where the policy negotiates with a partner; `rows` dialogues at a time, PLANNED_ROWS at most where it plans its turns.

    Args:
      cfg, protocol: of the run.
      net: of the policy.
      partner: the other side, a network or a scripted partner.
      mesh: the device mesh.
      scenarios: pairs of contexts, one for each side.
      rows: dialogues at a time.
      imagined_user: parameters that speak for the other side where `cfg.plan` looks ahead; None: those of the policy.
      listener: who reads the outcome for the partner; None: itself.
    """

    def __init__(
        self,
        cfg: config.Config,
        protocol: pr.Protocol,
        net: Net,
        partner: Net | Haggler,
        mesh,
        scenarios: Sequence[Scenario],
        rows: int,
        imagined_user: Params | None = None,
        listener: Listener | None = None,
    ):
        self.cfg, self.scenarios, self._protocol = cfg, scenarios, protocol
        self.rows = rows if cfg.plan == "none" else min(rows, PLANNED_ROWS)
        self._imagined_user = imagined_user
        scripted = isinstance(partner, Haggler)
        plan = make_planner(cfg, net, protocol, narrow=True)
        most = self._outcomes = outcomes(scenarios)

        def talk(params, partner_params, ours, theirs, temperature_R, key):
            views = rollout.View(net, params, ours), rollout.View(partner, partner_params, theirs)
            return rollout.converse(protocol, *views, key, tokens=cfg.tokens, turns=2 * cfg.turns, temperature=temperature_R)

        def speak(params, ours, theirs, temperature_R, key, user):
            """A turn of ours where it has the floor, heard by the partner; what it took in tokens; whose turn it is then."""
            waits_B = ~has_floor(protocol, ours)
            planned = plan(params, ours.replace(ended_B=waits_B), key, temperature_R, user)
            theirs = hear(protocol, theirs, planned.dialogue)
            return planned.dialogue, theirs, jnp.where(waits_B, 0, planned.tokens_B), has_floor(protocol, theirs)

        def answer(partner_params, theirs, floor_B, temperature_R, key):
            return rollout.imagine(
                partner, protocol, partner_params, theirs.replace(ended_B=~floor_B), key, tokens=cfg.tokens, turns=1,
                temperature=temperature_R,
            )  # fmt: skip

        def answer_by_script(partner_params, theirs, floor_B, temperature_R, key):
            return partner.answer(*jax.device_get((theirs, floor_B)))

        def reads(reader):
            """Each side's outcome: the likeliest possible one as it sees the dialogue."""
            return pjit(lambda params, side: outcome.read(reader, protocol, params, side, most), mesh)

        listener = partner if scripted else listener

        def read_by_rules(partner_params, theirs):
            return listener.settle(jax.device_get(theirs))

        self._talk = None if scripted else pjit(talk, mesh)  # else turn by turn
        self._speak, self._hear = pjit(speak, mesh), pjit(lambda own, other: hear(protocol, own, other), mesh)
        self._going = jax.jit(lambda ours, theirs: can_go_on(protocol, ours) | can_go_on(protocol, theirs))
        self._answer = answer_by_script if scripted else pjit(answer, mesh)
        self._read_ours, self._read_theirs = reads(net), read_by_rules if listener else reads(partner)

    def play(self, params: Params, partner_params: Params, key: Array, dialogues: int, temperature: float):
        """Plays scenarios in order, from either seat and with either first speaker in turn.

        Args:
          params, partner_params: of the two sides.
          key: of their samples.
          dialogues: how many; every scenario gives four before one comes again.
          temperature: of the words; outcomes are the likeliest ones that are possible.

        Returns:
          figures: arrays of `settle` and the length of each dialogue in turns.
          dialogues: as the policy saw them, numpy, with its points.
        """
        temperature_R = temperatures(temperature)
        results, seen = [], []
        for start in range(0, dialogues, self.rows):
            index = np.arange(start, start + self.rows)
            ours, theirs = self.openings(index)
            sides, more = (params, partner_params), {}
            if self._talk and self.cfg.plan == "none":
                ours, theirs = self._talk(*sides, ours, theirs, temperature_R, key)
            else:
                ours, theirs, more = self._turn_by_turn(*sides, ours, theirs, temperature_R, key)
            ours, theirs = self._read(*sides, ours, theirs)
            figures = settle(ours, theirs, self._outcomes) | more
            ours = jax.device_get(deal.earned(ours, figures["score_a"]))
            spoken_BT = np.isin(ours.author_BT, (pr.ASSISTANT, pr.USER))  # the outcome is no turn
            figures["turns"] = ours.turn_BT.max(axis=1, where=spoken_BT, initial=0)
            kept = index < dialogues
            results.append({name: x[kept] for name, x in figures.items()})
            seen.append(jax.tree.map(lambda x, k=kept: x[k], ours))
        figures = {name: np.concatenate([r[name] for r in results]) for name in results[0]}
        return figures, join(seen)

    def openings(self, index: np.ndarray) -> tuple[Dialogue, Dialogue]:
        """The prompts of the given dialogues, seen from our side and from the partner's."""
        return openings(self.cfg, self._protocol, self.scenarios, index)

    def _read(self, params, partner_params, ours: Dialogue, theirs: Dialogue) -> tuple[Dialogue, Dialogue]:
        return jax.device_get((self._read_ours(params, ours), self._read_theirs(partner_params, theirs)))

    def _turn_by_turn(self, params, partner_params, ours: Dialogue, theirs: Dialogue, temperature_R, key: Array):
        """The dialogues of both sides when ours plans its turns or the partner is scripted, and what planning took.

        Fewer and fewer rows are computed as dialogues end; what a row says does not depend on the others.
        """
        sides = [jax.tree.map(np.array, self._widened(side)) for side in (ours, theirs)]
        tokens_B, turns_B = np.zeros(self.rows, int), np.zeros(self.rows, int)
        since = time.monotonic()
        for turn in range(self.cfg.turns + 1):  # in the first one some partners have the floor alone
            live = np.flatnonzero(self._going(*sides))
            if not len(live):
                break
            size = self.rows
            while size // 4 >= max(len(live), FEWEST_ROWS):  # each size is compiled apart
                size //= 4
            ours, theirs = (take(side, np.resize(live, size)) for side in sides)
            own_key, partner_key = (jax.random.fold_in(jax.random.fold_in(key, turn), side) for side in range(2))
            spoken, theirs, planned_B, floor_B = self._speak(
                params, ours, theirs, temperature_R, own_key, self._imagined_user
            )
            theirs = self._answer(partner_params, theirs, floor_B, temperature_R, partner_key)
            ours, theirs, planned_B = jax.device_get((self._hear(spoken, theirs), theirs, planned_B))
            for side, now in zip(sides, (ours, theirs), strict=True):
                put(side, live, now)
            tokens_B[live] += planned_B[: len(live)]
            turns_B[live] += planned_B[: len(live)] > 0
        if self.cfg.plan == "none":
            return *sides, {}
        seconds = np.full(self.rows, (time.monotonic() - since) / self.rows)
        return *sides, {"plan_tokens": tokens_B, "plan_turns": turns_B, "plan_seconds": seconds}

    def _widened(self, prompt: Dialogue) -> Dialogue:
        token_BT = np.pad(prompt.token_BT, ((0, 0), (0, self.cfg.tokens - prompt.token_BT.shape[1])))
        empty = empty_dialogues(self.rows, self.cfg.tokens, self.cfg.turns)
        return pr.attributed_on_host(self._protocol, empty.replace(token_BT=token_BT, uid_B=prompt.uid_B))


def plan_cost(figures: dict[str, np.ndarray]) -> dict[str, float]:
    """What a planned turn took; {} without a planner."""
    if "plan_turns" not in figures:
        return {}
    turns = max(figures["plan_turns"].sum(), 1)
    return {f"plan/{name}_a_turn": float(figures[f"plan_{name}"].sum() / turns) for name in ("tokens", "seconds")}


def summary(figures: dict[str, np.ndarray]) -> dict[str, float]:
    """Means of what `Table.play` gives; percentages as 0-100."""
    agreed = figures["agreed"]
    some = max(agreed.sum(), 1)
    return {
        "score_a": float(figures["score_a"].mean()),
        "score_b": float(figures["score_b"].mean()),
        "score_a_agreed": float(figures["score_a"][agreed].sum() / some),
        "score_b_agreed": float(figures["score_b"][agreed].sum() / some),
        "agreed": 100 * float(agreed.mean()),
        "pareto": 100 * float(figures["pareto"].sum() / some),
        "turns": float(figures["turns"].mean()),
    }
