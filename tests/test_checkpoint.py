"""Checkpoints: exact, atomic, on any mesh, and clear about what went wrong."""

import errno
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl_lm.checkpoint import CheckpointError, Checkpoints, saved_steps
from mbrl_lm.types import TrainState

_TX = optax.adam(1e-3)


def make_state(width: int = 4, step: int = 0, fill: float = 0.0) -> TrainState:
    params = {
        "embed": {"table_VD": jnp.full((8, width), fill, jnp.float32)},
        "scale_D": jnp.arange(width, dtype=jnp.bfloat16),
    }
    target, reference = (jax.tree.map(jnp.copy, params) for _ in range(2))  # buffers of their own: tests donate them
    statistics = [jnp.zeros(shape) for shape in [()] * 4 + [4, 4, (4, 4)]]
    state = params, _TX.init(params), target, reference, None
    return TrainState(jnp.int32(step), *state, *statistics, jnp.int32(0))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ARRAYS = {"token_BT": np.arange(6, dtype=np.int32).reshape(2, 3), "full_B": np.array([True, False])}


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_what_is_restored_is_what_was_saved(tmp_path):
    state = make_state(step=7, fill=0.5)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(7, state, ARRAYS, {"data": "abc", "n": 3})
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() == 7
        step, restored, arrays, meta = checkpoints.restore(abstract(state), ARRAYS)
    assert step == 7 and meta == {"data": "abc", "n": 3}
    assert_same(restored, state)
    assert_same(arrays, ARRAYS)
    arrays["token_BT"][0, 0] = 9  # a replay buffer goes on being written


def test_a_save_holds_what_was_there_when_it_began(tmp_path):
    """The next step donates the state and overwrites the host's arrays while the save is in flight."""
    state, arrays = make_state(width=200_000, fill=1.0), {"x_B": np.zeros(1_000_000)}
    before = jax.device_get(state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    jax.block_until_ready(update(make_state(width=200_000)))  # compiled before, so that nothing waits
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        template = abstract(state)
        checkpoints.save(1, state, arrays, {})
        arrays["x_B"][:] = 1
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
        _, restored, read, _ = checkpoints.restore(template, arrays)
    assert_same(restored, before)
    assert not read["x_B"].any()


def test_the_newest_are_kept_and_any_of_them_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("relative", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(fill=step), {}, {})
        checkpoints.save(3, make_state(fill=3), {}, {})  # once more: nothing happens
        checkpoints.wait()
        assert saved_steps("relative") == [2, 3]
        step, restored, arrays, _ = checkpoints.restore(abstract(make_state()), {}, step=2)
        assert step == 2 and arrays == {} and restored.params["embed"]["table_VD"][0, 0] == 2
        with pytest.raises(CheckpointError, match="no checkpoint of step 1"):
            checkpoints.restore(abstract(make_state()), {}, step=1)
        with pytest.raises(CheckpointError, match="already holds step 3"):
            checkpoints.save(2, make_state(), {}, {})


def test_another_model_is_refused_by_the_names_of_its_leaves(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            checkpoints.restore(abstract(make_state()), {})
        checkpoints.save(5, make_state(width=4), ARRAYS, {})
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(abstract(make_state(width=6)), ARRAYS)
        message = str(caught.value)
        assert "state/params/embed/table_VD: saved float32(8, 4), expected float32(8, 6)" in message
        assert re.search(r"and \d+ more\. Give the flags that this run was started with, or another --workdir", message)
        with pytest.raises(CheckpointError, match=r"arrays/full_B: saved bool\(2\), expected nothing"):
            checkpoints.restore(abstract(make_state()), {"token_BT": ARRAYS["token_BT"]})
        _, restored, _, _ = checkpoints.restore(abstract(make_state()), ARRAYS)  # and it is still there
    assert_same(restored, make_state())


def test_a_damaged_checkpoint_names_itself(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(), {}, {})
        checkpoints.save(2, make_state(), {}, {})
    for path in (tmp_path / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match=f"checkpoint 2 could not be read.*remove {tmp_path / '2'}"):
            checkpoints.restore(abstract(make_state()), {})
        assert checkpoints.restore(abstract(make_state()), {}, step=1)[0] == 1


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not permitted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_told_and_costs_nothing_that_was_saved(small_disk):
    with Checkpoints(small_disk / "c", keep=2) as checkpoints:
        checkpoints.save(1, make_state(), ARRAYS, {})
        big = {"x_B": np.random.default_rng(0).random(1_000_000)}
        with pytest.raises(CheckpointError, match="disk is full; the checkpoints of steps 1 are intact; free some space"):
            checkpoints.save(2, make_state(), big, {})
            checkpoints.wait()
        assert os.listdir(small_disk / "c") == ["1"]  # the space is free again
        checkpoints.save(3, make_state(fill=3), ARRAYS, {})
    with Checkpoints(small_disk / "c", keep=2) as checkpoints:
        assert saved_steps(small_disk / "c") == [1, 3]
        assert_same(checkpoints.restore(abstract(make_state()), ARRAYS)[1], make_state(fill=3))


def test_an_error_in_the_background_surfaces_at_the_next_save(tmp_path, monkeypatch):
    def no_space(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(), {}, {})
    checkpoints.wait()
    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "rename", no_space)
        patched.setattr(os, "rename", no_space)  # the last thing that a save does, in its thread
        checkpoints.save(2, make_state(), {}, {})
        with pytest.raises(CheckpointError, match="disk is full; the checkpoints of steps 1 are intact"):
            checkpoints.save(3, make_state(), {}, {})
    checkpoints.close()
    assert saved_steps(tmp_path) == [1]


# ---- processes ----


def start(code: str, *args, **env) -> subprocess.Popen:
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path} | env
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, stdout=subprocess.PIPE, text=True)


KILLED = """
import sys, numpy as np
from test_checkpoint import Checkpoints, make_state
checkpoints, step = Checkpoints(sys.argv[1], keep=2), 0
while True:
    step += 1
    checkpoints.save(step, make_state(200_000, step, step), {"x_B": np.full(3_000_000, step)}, {"step": step})
    print(step, flush=True)
"""


def test_kill_9_during_a_save_loses_nothing_that_was_saved(tmp_path):
    process = start(KILLED, tmp_path)
    for line in process.stdout:
        if int(line) == 3:
            break
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("*tmp*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = saved_steps(tmp_path)
    assert list(tmp_path.glob("*tmp*")), "the kill missed the save"
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert not list(tmp_path.glob("*tmp*"))
        assert checkpoints.latest() == steps[-1] >= 2
        step, state, arrays, meta = checkpoints.restore(abstract(make_state(200_000)), {"x_B": np.zeros(3_000_000, int)})
        assert_same(state, make_state(200_000, step, step))
        assert (arrays["x_B"] == step).all() and meta["step"] == step
        checkpoints.save(step + 1, state, arrays, meta)  # the step whose save was killed
    assert saved_steps(tmp_path)[-1] == step + 1


MESH = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_checkpoint import Checkpoints, assert_same, make_state
def place(sizes):
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    return lambda x: NamedSharding(mesh, P("fsdp", "tensor") if x.ndim == 2 else P())
state = make_state(8, fill=3)
first, second = place((4, 2)), place((2, 4))
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    checkpoints.save(1, jax.tree.map(lambda x: jax.device_put(x, first(x)), state), {}, {})
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=second(x)), state)
    restored = checkpoints.restore(wanted, {})[1]
assert_same(restored, state)
assert all(jax.tree.leaves(jax.tree.map(lambda x, w: x.sharding == w.sharding, restored, wanted)))
assert len(restored.opt_state[0].mu["embed"]["table_VD"].sharding.device_set) == 8
print("same")
"""


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
    out, _ = start(MESH, tmp_path, JAX_NUM_CPU_DEVICES="8").communicate(timeout=120)
    assert out.strip() == "same"
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # and onto one device
        assert_same(checkpoints.restore(abstract(make_state(8)), {})[1], make_state(8, fill=3))
