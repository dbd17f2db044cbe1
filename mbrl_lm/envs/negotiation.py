"""Deal or No Deal between two models: each sees its own values, both must name the same split.

The protocol is that of Lewis et al. (2017): random first speaker, low temperature, the dialogue ends when either side calls
for the outcome; each side then writes its own share, and a deal needs both shares to add up to what is on the table.
"""

from collections.abc import Sequence

import jax
import numpy as np

from mbrl_lm import config, reward, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import join
from mbrl_lm.nn import Net
from mbrl_lm.replay import empty_dialogues
from mbrl_lm.sharding import pjit
from mbrl_lm.types import Array, Dialogue, Params

ITEMS = 3
GREEDY = 1e-3  # temperature of the outcome, which is read off the dialogue and not negotiated


def prompts(contexts: Sequence[Sequence[int]], first_speaker: Sequence[int], tokens: int, turns: int) -> Dialogue:
    """The openings of negotiations.

    Args:
      contexts: `count value` of the three kinds of item, as one side sees them.
      first_speaker: ASSISTANT or USER, per context.
      tokens, turns: T and U.
    """
    opening = {pr.ASSISTANT: pr.TO_ASSISTANT, pr.USER: pr.TO_USER}
    width = 2 + 2 * ITEMS
    dialogue = empty_dialogues(len(contexts), width, turns)
    for b, (context, first) in enumerate(zip(contexts, first_speaker, strict=True)):
        dialogue.token_BT[b] = [pr.BOS, *(pr.NUMBER + n for n in context), opening[first]]
    if width > tokens:
        raise config.ConfigError(f"a negotiation opens with {width} tokens: raise --config.tokens={tokens}")
    dialogue.uid_B[:] = np.arange(len(contexts))
    return dialogue


def settle(ours: Dialogue, theirs: Dialogue) -> dict[str, np.ndarray]:
    """Reads the result of finished negotiations, each seen from both sides.

    Returns:
      score_a, score_b: points of either side, 0 without a deal; agreed; pareto: agreed, and no other split is at least as
      good for both and better for one.
    """
    share_a, wrote_a = map(np.asarray, reward.outcome_share(ours))
    share_b, wrote_b = map(np.asarray, reward.outcome_share(theirs))
    numbers_a, numbers_b = (np.asarray(d.token_BT)[:, 1 : 1 + 2 * ITEMS] - pr.NUMBER for d in (ours, theirs))
    count, value_a, value_b = numbers_a[:, ::2], numbers_a[:, 1::2], numbers_b[:, 1::2]
    agreed = wrote_a & wrote_b & (share_a + share_b == count).all(axis=1)
    score_a = np.where(agreed, (share_a * value_a).sum(axis=1), 0)
    score_b = np.where(agreed, (share_b * value_b).sum(axis=1), 0)
    pareto = np.zeros(len(agreed), bool)
    for i in np.flatnonzero(agreed):
        splits = np.stack(np.meshgrid(*(np.arange(n + 1) for n in count[i]), indexing="ij"), -1).reshape(-1, ITEMS)
        a, b = splits @ value_a[i], (count[i] - splits) @ value_b[i]
        pareto[i] = not np.any((a >= score_a[i]) & (b >= score_b[i]) & ((a > score_a[i]) | (b > score_b[i])))
    return {"score_a": score_a, "score_b": score_b, "agreed": agreed, "pareto": pareto}


class Table:
    """Where the policy negotiates with a partner; `rows` dialogues at a time.

    Args:
      cfg, protocol: of the run.
      net: of the policy.
      partner_net: of the other side.
      mesh: the device mesh.
      scenarios: pairs of contexts, one for each side.
      rows: dialogues at a time.
    """

    def __init__(self, cfg, protocol, net: Net, partner_net: Net, mesh, scenarios, rows: int = 64):
        self.cfg, self.scenarios, self.rows = cfg, scenarios, rows

        def talk(params, partner_params, ours, theirs, temperature_R, key):
            views = rollout.View(net, params, ours), rollout.View(partner_net, partner_params, theirs)
            return rollout.converse(protocol, *views, key, tokens=cfg.tokens, temperature=temperature_R)

        self._talk = pjit(talk, mesh)
        self._parse = jax.jit(lambda token_BT: pr.parse(protocol, token_BT))

    def play(self, params: Params, partner_params: Params, key: Array, dialogues: int, temperature: float):
        """Plays scenarios in order, from either seat and with either first speaker in turn.

        Args:
          params, partner_params: of the two sides.
          key: of their samples.
          dialogues: how many; every scenario gives four before one comes again.
          temperature: of the words; outcomes are read greedily.

        Returns:
          figures: arrays of `settle` and the length of each dialogue in turns.
          dialogues: as the policy saw them, numpy.
        """
        temperature_R = np.full(len(pr.ROLES), temperature, np.float32)
        temperature_R[pr.OUTCOME] = GREEDY
        results, seen = [], []
        for start in range(0, dialogues, self.rows):
            index = np.arange(start, start + self.rows)
            ours, theirs = self.openings(index)
            ours, theirs = jax.device_get(self._talk(params, partner_params, ours, theirs, temperature_R, key))
            figures = settle(ours, theirs)
            spoken_BT = np.isin(ours.author_BT, (pr.ASSISTANT, pr.USER))  # the outcome is no turn
            figures["turns"] = ours.turn_BT.max(axis=1, where=spoken_BT, initial=0)
            kept = index < dialogues
            results.append({name: x[kept] for name, x in figures.items()})
            seen.append(jax.tree.map(lambda x, k=kept: x[k], ours))
        figures = {name: np.concatenate([r[name] for r in results]) for name in results[0]}
        return figures, join(seen)

    def openings(self, index: np.ndarray) -> tuple[Dialogue, Dialogue]:
        """The prompts of the given dialogues, seen from our side and from the partner's."""
        n = len(self.scenarios)
        seat, first = (index // n) % 2, (index // (2 * n) + index) % 2
        pairs = [self.scenarios[i % n][::-1] if s else self.scenarios[i % n] for i, s in zip(index, seat, strict=True)]
        speakers = np.where(first, pr.ASSISTANT, pr.USER)
        sides = []
        for side, speaker in ((0, speakers), (1, pr.ASSISTANT + pr.USER - speakers)):
            dialogue = prompts([pair[side] for pair in pairs], speaker.tolist(), self.cfg.tokens, self.cfg.turns)
            author_BT, turn_BT = map(np.asarray, self._parse(dialogue.token_BT))
            sides.append(dialogue.replace(author_BT=author_BT, turn_BT=turn_BT, uid_B=index.astype(np.uint32)))
        return sides[0], sides[1]


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
