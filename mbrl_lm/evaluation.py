"""What a policy is judged by: held-out recordings, and someone that nothing was trained on."""

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from mbrl_lm import config, goals, nn, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import take
from mbrl_lm.data.corpus import Corpus
from mbrl_lm.data.encode import decode
from mbrl_lm.envs.concierge import bayes
from mbrl_lm.heldout import Heldout
from mbrl_lm.judge import make_judge
from mbrl_lm.sharding import pjit
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.types import Array, Dialogue, Params

RETOLD_TURNS = 4


class Findings(NamedTuple):
    """Figures by name, dialogues to read, and all dialogues of the policy as it saw them."""

    figures: dict[str, float]
    samples: str
    dialogues: Dialogue


class Evaluation:
    """What a policy and its world model are worth.

    Args:
      cfg, net, corpus: of the run.
      mesh: the device mesh.
      workdir: the run directory; the partner of a negotiation is kept there.
    """

    def __init__(self, cfg: config.Config, net: nn.Net, corpus: Corpus, mesh, workdir: pathlib.Path):
        self._cfg, self._corpus = cfg, corpus
        most = cfg.world_model.goals
        self._heldout = Heldout(net, corpus.protocol, corpus.tokenizer, mesh, corpus.val, most=most)
        asked = cfg.eval.dialogues or cfg.eval.final_dialogues  # else no partner need be fitted
        self._judge = make_judge(cfg, net, corpus, mesh, workdir) if asked else None

        def retell(params, real, key):
            opening = rollout.from_an_opening(corpus.protocol, real, key)
            return goals.imagine(most, net, corpus.protocol, params, opening, key, tokens=cfg.tokens, turns=RETOLD_TURNS)

        self._retell = pjit(retell, mesh)

    def interim(self, params: Params, key: Array, user: Params | None = None) -> Findings:
        """While training: `eval.dialogues` with the judge. `user`: whose words users have in imagination, if others."""
        return self._evaluate(params, key, self._cfg.eval.dialogues, user)

    def final(self, params: Params, key: Array, user: Params | None = None) -> Findings:
        """At the end: `eval.final_dialogues` with the judge, the open-loop figures, and the floors where they are known."""
        found = self._evaluate(params, key, self._cfg.eval.final_dialogues, user)
        figures = found.figures | self._heldout.open_loop(params, key) | self._heldout.outcomes(params)
        if self._cfg.data == "concierge":
            corpus, noise = self._corpus, self._cfg.noise
            figures["user_nll_floor/val"] = user_nll_floor(corpus.val, corpus.tokenizer, "train", noise)
            if self._judge and self._cfg.eval.final_dialogues:  # what the policy makes users say
                figures["user_nll/policy"] = self._heldout.closed_loop(params, found.dialogues)["user_nll/val"]
                figures["user_nll_floor/policy"] = user_nll_floor(found.dialogues, corpus.tokenizer, "test", noise)
        return found._replace(figures=figures)

    def _evaluate(self, params: Params, key: Array, dialogues: int, user: Params | None) -> Findings:
        figures = self._heldout.closed_loop(params)
        if self._judge and dialogues:
            verdict = self._judge.evaluate(params, key, dialogues, user)
            figures, told = figures | verdict.figures, verdict.dialogues
        else:  # nobody to talk to: recordings, continued
            rows = np.arange(self._cfg.train.batch) % len(self._corpus.val.uid_B)
            told = jax.device_get(self._retell(params, take(self._corpus.val, rows), key))
        render = self._corpus.tokenizer.render
        return Findings(figures, "\n".join(map(render, told.token_BT[: self._cfg.eval.samples].tolist())), told)


def user_nll_floor(dialogues: Dialogue, tokenizer: Tokenizer, split: str, noise: float = 0.0) -> float:
    """Nats per token that the exact filter needs for the users' turns of `concierge`: nobody can do with less."""
    nats = 0.0
    for record in decode(dialogues, tokenizer):
        nats -= sum(bayes.read(record.context, record.spoken, record.ended, split, noise).log_prob_U)
    return nats / int(np.sum(dialogues.author_BT == pr.USER))


def language_drift(
    net: nn.Net, corpus: Corpus, mesh, params: Params, reference: Params, dialogues: Dialogue
) -> dict[str, float]:
    """How far the policy's language is from the recordings', as perplexities per word of assistant turns.

    Args:
      net, corpus, mesh: of the run.
      params, reference: of the policy, and of the frozen model of recorded text that it started from.
      dialogues: written by the policy.
    """

    def word_ppl(params, dialogues):
        heldout = Heldout(net, corpus.protocol, corpus.tokenizer, mesh, dialogues)
        return heldout.closed_loop(params)["assistant_word_ppl/val"]

    return {
        "drift/policy_under_reference": word_ppl(reference, dialogues),
        "drift/recorded_under_reference": word_ppl(reference, corpus.val),
        "drift/recorded_under_policy": word_ppl(params, corpus.val),
    }
