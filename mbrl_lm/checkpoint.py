"""Checkpoints: saved in the background, complete or absent, restored onto any mesh. The only importer of orbax.

A checkpoint of step k holds the train state, the host's own arrays (a replay buffer) and a little JSON. It is written beside
the earlier ones under a temporary name and renamed when it is whole, so a kill at any moment leaves the earlier ones as they
were.
"""

import contextlib
import errno
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mbrl_lm.types import TrainState

_SHOWN = 3  # differing leaves that an error names
_TEMPORARY = "*.orbax-checkpoint-tmp*"


class CheckpointError(RuntimeError):
    """A save or a restore that did not work; the message says what is intact and what to do."""


def saved_steps(directory: str | pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints in a directory, ascending; [] where there is none."""
    path = pathlib.Path(directory)
    return sorted(int(child.name) for child in path.iterdir() if child.name.isdigit()) if path.is_dir() else []


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the save in flight."""

    def __init__(self, directory: str | pathlib.Path, keep: int | None):
        """Opens or makes a directory and removes what an interrupted save left there.

        Args:
          directory: of the checkpoints; nothing else may be in it.
          keep: how many of the newest checkpoints stay; None only reads, and leaves a save in flight alone.

        Raises:
          CheckpointError: the directory cannot be made.
        """
        self._directory = pathlib.Path(directory).absolute()  # orbax fails late, in the background, on a relative path
        with self._explained("cannot open the checkpoints"):
            self._directory.mkdir(parents=True, exist_ok=True)
            if keep is not None:
                self._remove_leftovers()
            options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.LatestN(keep))
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None:  # the error that ends the block is the one worth telling
                raise

    def latest(self) -> int | None:
        """The newest step that is saved or being saved; None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Starts a save in the background; all arguments may be donated or changed as soon as this returns.

        Saving the newest step again does nothing.

        Args:
          step: of the state; the next step to run after a restore is `step`.
          state: a pytree of arrays, on any mesh.
          arrays: of the host, by name.
          meta: JSON.

        Raises:
          CheckpointError: this save, or the one before it in the background, failed.
        """
        latest = self.latest()
        if latest == step:
            return self._raise_background_error()
        if latest is not None and step < latest:
            raise CheckpointError(
                f"step {step} cannot be saved in {self._directory}, which already holds step {latest}: remove the later "
                "checkpoints or use another --workdir"
            )
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        items = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave({"leaves": _leaves(state, arrays), "meta": dict(meta)}),
        }
        if arrays:  # orbax refuses an empty tree
            items["arrays"] = ocp.args.StandardSave(arrays)
        with self._explained("a checkpoint could not be saved"):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(
        self, abstract_state: TrainState, arrays_template: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, TrainState, dict[str, np.ndarray], dict[str, Any]]:
        """Reads one checkpoint.

        Args:
          abstract_state: a pytree of `jax.ShapeDtypeStruct` with the shardings wanted; the mesh may be another one than at
            the save.
          arrays_template: name -> anything with the shape and dtype that is expected of the host's arrays.
          step: which one; the newest by default.

        Returns:
          Its step, the state on its shardings, the host's arrays (numpy, writable) and the JSON.

        Raises:
          CheckpointError: there is none, it cannot be read, or its leaves have other names, shapes or dtypes.
        """
        self.wait()
        step = self.latest() if step is None else step
        if step not in saved_steps(self._directory):
            raise CheckpointError(f"there is no checkpoint{'' if step is None else f' of step {step}'} in {self._directory}")
        advice = f"remove {self._directory / str(step)} to go on from an earlier one, or use another --workdir"
        with self._explained(f"checkpoint {step} could not be read", advice):
            saved = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        self._compare(step, saved["leaves"], _leaves(abstract_state, arrays_template))
        items = {"state": ocp.args.StandardRestore(abstract_state)}
        if arrays_template:
            empty = {name: np.empty(array.shape, array.dtype) for name, array in arrays_template.items()}
            items["arrays"] = ocp.args.StandardRestore(empty)
        with self._explained(f"checkpoint {step} could not be read", advice):
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
        arrays = {name: np.array(array) for name, array in (read.arrays if arrays_template else {}).items()}
        return step, read.state, arrays, saved["meta"]

    def wait(self) -> None:
        """Returns when the save in flight is on disk.

        Raises:
          CheckpointError: it failed.
        """
        with self._explained("a checkpoint could not be saved"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and releases the background threads even when that fails."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # the failure is told by `wait`
                self._manager.close()

    def _raise_background_error(self) -> None:
        with self._explained("a checkpoint could not be saved"):
            self._manager.check_for_errors()

    def _remove_leftovers(self) -> None:
        if jax.process_index() == 0:
            for _ in range(50):  # the threads of a save that failed may still be writing other files of it
                leftovers = list(self._directory.glob(_TEMPORARY))
                if not leftovers:
                    return
                for path in leftovers:
                    shutil.rmtree(path, ignore_errors=True)
                time.sleep(0.1)

    def _compare(self, step: int, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Raises an error that names the first leaves that differ."""
        names = [name for name in {**expected, **saved} if saved.get(name) != expected.get(name)]
        if not names:
            return
        lines = [f"{name}: saved {_describe(saved.get(name))}, expected {_describe(expected.get(name))}" for name in names]
        more = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise CheckpointError(
            f"checkpoint {step} in {self._directory} is of another model: {', '.join(lines[:_SHOWN])}{more}. Give the "
            "flags that this run was started with, or another --workdir"
        )

    @contextlib.contextmanager
    def _explained(self, what: str, advice: str = "") -> Iterator[None]:
        """Turns whatever the storage raises into a CheckpointError that says what is left and what to do."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # orbax and tensorstore pass on errors of many types
            full = is_full_disk(error)
            reason = "the disk is full" if full else f"{type(error).__name__}: {_first_line(error)}"
            message = f"{what} in {self._directory}: {reason}"
            if not advice:
                self._remove_leftovers()  # a half-written checkpoint would keep a full disk full
                steps = saved_steps(self._directory)
                kept = f"the checkpoints of steps {', '.join(map(str, steps))} are intact" if steps else "none was saved yet"
                advice = f"{kept}; {'free some space' if full else 'correct this'} and give the same command, which resumes"
            raise CheckpointError(f"{message}; {advice}") from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the disk (or the user's quota) is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True  # tensorstore raises a ValueError with the system's words in it
        error = error.__cause__ or error.__context__
    return False


def _leaves(state: Any, arrays: Mapping[str, Any]) -> dict[str, list]:
    """Path -> [shape, dtype] of every array: what a checkpoint is compared by before orbax reads it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path({"state": state, "arrays": dict(arrays)})
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(np.shape(leaf)), str(leaf.dtype)]
        for path, leaf in leaves
    }


def _describe(leaf: list | None) -> str:
    return "nothing" if leaf is None else f"{leaf[1]}({', '.join(map(str, leaf[0]))})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
