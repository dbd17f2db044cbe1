"""Real dialogues while learning by return: recorded ones, and new ones with the true user, every one counted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import config, guards, learner, nn
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import batches, join
from mbrl_lm.data.corpus import Corpus
from mbrl_lm.envs import negotiation
from mbrl_lm.envs.concierge import ORACLE_UIDS, TRAIN_UIDS
from mbrl_lm.envs.true_user import TrueUser
from mbrl_lm.judge import Imagination
from mbrl_lm.replay import Replay
from mbrl_lm.types import Array, Dialogue, TrainState

ANCHORS_DECAY = 0.9  # of the quantiles, per collection


class Experience:
    """Half of a batch of real dialogues is recorded, half is of the newest ones with the true user, where there is one.

    Args:
      cfg, net, corpus: of the run.
      mesh: the device mesh.

    Attributes:
      replay: the dialogues with the true user; saved with every checkpoint.
      scenarios: what is negotiated over in imagination where the user, too, has values; else none.
    """

    def __init__(self, cfg: config.Config, net: nn.Net, corpus: Corpus, mesh):
        self._cfg, self._logs = cfg, len(corpus.train.uid_B)
        self.replay = Replay(max(cfg.collect.capacity, 1), cfg.tokens, cfg.turns)
        recorded = corpus.renamed if cfg.train.renamed == 1 else corpus.train
        self._batch_at = self._mixture(recorded, cfg.train.rl_batch or cfg.train.batch, 0)
        prompts = cfg.imagine.batch // cfg.imagine.candidates
        both = cfg.imagine.sides == 2
        self._protocol, self.scenarios = corpus.protocol, negotiation.scenarios(corpus.train_records) if both else []
        self._prompts_at = self._mixture(recorded, prompts, 1) if prompts else None

        def true_user(rows):
            return TrueUser(cfg, net, corpus.protocol, corpus.tokenizer, mesh, rows, cfg.signal)

        self._user = true_user(cfg.collect.batch) if cfg.collect.every else None
        self._oracle = true_user(cfg.imagine.batch) if cfg.imagine.user == "oracle" else None
        self._imagination = Imagination(cfg, net, corpus.protocol, mesh, cfg.collect.batch) if cfg.guard.anchors else None

    def collect(self, state: TrainState, key: Array) -> TrainState:
        """Talks to `collect.batch` new users; with anchors, imagines the same openings and compares the returns."""
        first, temperature = self.replay.collected, self._cfg.imagine.temperature
        uids = TRAIN_UIDS[first : first + self._cfg.collect.batch]
        dialogues, _ = self._user.play(state.params, key, uids, "train", temperature)
        self.replay.add(dialogues)
        if not self._imagination:
            return state
        temperature_R = pr.temperatures(assistant=temperature, user=self._cfg.imagine.user_temperature)
        openings = self._user.openings(uids, "train")
        user = learner.imagined_user(self._cfg.imagine, state, jax.random.fold_in(key, 2))
        imagined, _ = self._imagination.imagined(state.params, openings, temperature_R, jax.random.fold_in(key, 1), user)
        anchor_XW = guards.anchors(imagined, dialogues.reward_BU.sum(axis=1))
        if first:
            anchor_XW = ANCHORS_DECAY * np.asarray(state.anchor_XW) + (1 - ANCHORS_DECAY) * anchor_XW
        return state.replace(anchor_XW=jnp.asarray(anchor_XW))

    def _mixture(self, recorded: Dialogue, rows: int, stream: int) -> Callable[[int], Dialogue]:
        """step -> `rows` real dialogues; streams of different numbers have nothing to do with each other."""
        online, seed = rows // 2 if self._cfg.collect.every else 0, self._cfg.seed + stream * 1_000_003
        logged_at = batches(recorded, seed, rows - online)

        def at(step: int) -> Dialogue:
            if not online:
                return logged_at(step)
            return join([logged_at(step), self.replay.sample(seed, step, online)])

        return at

    def batch(self, step: int) -> Dialogue:
        """The real dialogues of a step."""
        return self._batch_at(step)

    def prompts(self, step: int) -> Dialogue:
        """The real dialogues of a step whose assistant points are imagined from: others than those of `batch`."""
        return self._prompts_at(step)

    def openings(self, step: int) -> tuple[Dialogue, Dialogue]:
        """The prompts of a step's imagined negotiations, as the policy and as the other side see them."""
        rng = np.random.default_rng((self._cfg.seed, step, len(self.scenarios)))
        index = rng.integers(4 * len(self.scenarios), size=self._cfg.imagine.batch // self._cfg.imagine.candidates)
        return negotiation.openings(self._cfg, self._protocol, self.scenarios, index)

    def with_oracle(self, state: TrainState, key: Array, step: int) -> Dialogue:
        """`imagine.batch` dialogues with the true user in the imagined one's place: an upper bound, and not counted."""
        rows = self._cfg.imagine.batch
        uids = ORACLE_UIDS[step * rows : (step + 1) * rows]
        return self._oracle.play(state.params, key, uids, "train", self._cfg.imagine.temperature)[0]

    def counts(self, state: TrainState) -> dict[str, int]:
        """What has been used so far: every real dialogue, tokens that were imagined, steps of the optimiser."""
        return {
            "real_dialogues": self._logs + self.replay.collected,
            "generated_tokens": int(state.imagined_tokens),
            "gradient_steps": int(state.step),
        }
