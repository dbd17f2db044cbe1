"""The frame of a training run: where it resumes, what it writes and when, how it stops. What it learns is not its business.

with Loop(run, mesh, init_state, total, replay) as loop:
    for step in loop:
        loop.state, metrics = update(loop.state, ...)
        loop.learnt(metrics, real)
        if loop.evaluates:
            loop.write(figures, samples)
    if loop.finished:
        ...
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from mbrl_lm import app, sharding
from mbrl_lm.checkpoint import Checkpoints
from mbrl_lm.data.batches import lengths
from mbrl_lm.metrics import Delayed, Writer
from mbrl_lm.replay import Replay
from mbrl_lm.types import Array, Dialogue, TrainState

SHOWN = ("word_ppl/val", "user_nll/val", "true/return")  # on the progress line


class Loop:
    """Steps from the newest checkpoint to the last; metrics, evaluations and checkpoints at the config's intervals.

    Attributes:
      state: the train state; the experiment sets it.
      finished: whether the last step is done: not when the run was asked to stop.
    """

    def __init__(
        self,
        run: app.Run,
        mesh: jax.sharding.Mesh,
        init_state: Callable[[Array], TrainState],
        total: int,
        replay: Replay,
        take_over: Callable[[TrainState], tuple[TrainState, float]] | None = None,
    ):
        """A run of `total` steps.

        Args:
          run: its config and directory.
          mesh: the device mesh.
          init_state: key -> a fresh state, not compiled.
          total: steps of the whole run.
          replay: what is saved beside the state; filled on entry if there is a checkpoint.
          take_over: a fresh state -> that of another run to begin from, and the seconds that it took.
        """
        self._run, self._cfg, self._total, self._replay = run, run.config, total, replay
        self._mesh, self._init_state = mesh, init_state
        self._delayed, self._before_s, self._take_over = Delayed(), 0.0, take_over
        self.finished = False

    def __enter__(self) -> "Loop":
        """Opens the files of the run, and restores it from its newest checkpoint.

        Raises:
          CheckpointError: if that cannot be read.
        """
        with contextlib.ExitStack() as files:
            self._checkpoints = files.enter_context(Checkpoints(self._run.checkpoints, self._cfg.checkpoints))
            key, start = jax.random.key(self._cfg.seed), self._checkpoints.latest()
            if start is None:
                self.state = sharding.pjit(self._init_state, self._mesh)(key)
                if self._take_over:
                    self.state, self._before_s = self._take_over(self.state)
            else:
                shapes = sharding.abstract(jax.eval_shape(self._init_state, key), self._mesh)
                start, self.state, arrays, meta = self._checkpoints.restore(shapes, self._replay.arrays())
                self._replay.load(arrays)
                self._before_s = meta["wall_s"]
            app.write_params(self._run.workdir / "params.txt", self.state.params)
            self._done = int(self.state.step) if start is None else start
            self._writer = files.enter_context(Writer(self._run.workdir, self._total, start, SHOWN))
            self._files = files.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._files.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[int]:
        """Steps; after each one, saves where it is due, and ends early where the run is asked to stop."""
        for step in range(self._done, self._total):
            yield step
            stop = self._run.stop_requested()
            if stop or self._done % self._cfg.checkpoint_every == 0 or self._done == self._total:
                self._emit(self._delayed.flush())
                self._checkpoints.save(self._done, self.state, self._replay.arrays(), {"wall_s": self.wall_s})
            if stop:
                return
        self.finished = True

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation is due after the step that was just learnt; the last one is not the loop's."""
        switch, intervals = self._cfg.train.supervised_steps, self._cfg.eval
        every = intervals.rl_every or intervals.every if self._done > switch else intervals.every
        return self._done < self._total and (self._done % every == 0 or self._done == switch)

    @property
    def wall_s(self) -> float:
        """Seconds since the start, those before an interruption included."""
        return self._before_s + time.monotonic() - self._run.began_s

    def phase(self, name: str) -> None:
        """Names what the run is doing, on the progress line."""
        self._writer.phase(name)

    def learnt(self, metrics: Mapping[str, tuple[Array, Array]], real: Dialogue) -> None:
        """Counts a step; its metrics are written one step late."""
        self._done += 1
        self._writer.tick(self._done, int(lengths(real).sum()))
        if self._done % self._cfg.log_every == 0:
            self._emit(self._delayed.push(self._done, metrics))
        if self.evaluates:
            self._emit(self._delayed.flush())

    def write(self, figures: Mapping[str, float], samples: str) -> None:
        """Writes an evaluation of the present state, and dialogues to read."""
        self._writer.write(self._done, figures)
        self._writer.samples(self._done, samples)

    def _emit(self, line: tuple[int, dict[str, float]] | None) -> None:
        if line is not None:
            self._writer.write(*line)
