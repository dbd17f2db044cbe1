"""What a policy is judged by: held-out recordings, and someone that nothing was trained on."""

import pathlib

import jax
import numpy as np

from mbrl_lm import config, nn, rollout
from mbrl_lm.data.batches import take
from mbrl_lm.data.corpus import Corpus
from mbrl_lm.heldout import Heldout
from mbrl_lm.judge import make_judge
from mbrl_lm.sharding import pjit
from mbrl_lm.types import Array, Params

RETOLD_TURNS = 4


class Evaluation:
    """Figures by name, and dialogues to read.

    Args:
      cfg, net, corpus: of the run.
      mesh: the device mesh.
      workdir: the run directory; the partner of a negotiation is kept there.
    """

    def __init__(self, cfg: config.Config, net: nn.Net, corpus: Corpus, mesh, workdir: pathlib.Path):
        self._cfg, self._corpus = cfg, corpus
        self._heldout = Heldout(net, corpus.protocol, corpus.tokenizer, mesh, corpus.val)
        self._judge = make_judge(cfg, net, corpus, mesh, workdir)

        def retell(params, real, key):
            opening = rollout.from_an_opening(corpus.protocol, real, key)
            return rollout.imagine(net, corpus.protocol, params, opening, key, tokens=cfg.tokens, turns=RETOLD_TURNS)

        self._retell = pjit(retell, mesh)

    def interim(self, params: Params, key: Array) -> tuple[dict[str, float], str]:
        """While training: `eval.dialogues` with the judge."""
        return self._evaluate(params, key, self._cfg.eval.dialogues)

    def final(self, params: Params, key: Array) -> tuple[dict[str, float], str]:
        """At the end: `eval.final_dialogues` with the judge, and the open-loop figures."""
        figures, samples = self._evaluate(params, key, self._cfg.eval.final_dialogues)
        return figures | self._heldout.open_loop(params, key), samples

    def _evaluate(self, params: Params, key: Array, dialogues: int) -> tuple[dict[str, float], str]:
        figures = self._heldout.closed_loop(params)
        if self._judge and dialogues:
            verdict = self._judge.evaluate(params, key, dialogues)
            figures, told = figures | verdict.figures, verdict.dialogues
        else:  # nobody to talk to: recordings, continued
            rows = np.arange(self._cfg.train.batch) % len(self._corpus.val.uid_B)
            told = jax.device_get(self._retell(params, take(self._corpus.val, rows), key))
        return figures, "\n".join(
            self._corpus.tokenizer.render(row) for row in told.token_BT[: self._cfg.eval.samples].tolist()
        )
