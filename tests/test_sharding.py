"""Letters to layouts; and in processes of their own with 8 devices, every mesh gives the numbers of one device."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import world

from mbrl_lm import config, sharding
from mbrl_lm.types import Dialogue, Heads

HERE = pathlib.Path(__file__).parent
ONE = (1, 1, 1)
# The mesh with all three axes stands for the others; they take a minute of compilation more.
MESHES = [(2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow), pytest.param((1, 4, 2), marks=pytest.mark.slow)]


def letters_of(tree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): sharding.letters(path, x.ndim) for path, x in leaves}


def test_letters_of_parameters():
    found = letters_of(world().params)
    assert found["['embed_VD']"] == "VD" and found["['end_D']"] == "D" and found["['value_EDW']"] == "EDW"
    assert found["['blocks_1']['attention']['wq_DNH']"] == "DNH" and found["['blocks_0']['conv']['tap_XD']"] == "XD"
    scanned = letters_of(world(model__scan_layers=True).params)
    assert scanned["['blocks']['attention']['wo_NHD']"] == "LNHD" and scanned["['blocks']['norm_mlp']['scale_D']"] == "LD"
    assert all(letters for letters in (found | scanned).values())


def test_letters_of_optimiser_moments_are_those_of_their_parameters():
    w = world()
    params = letters_of(w.params)
    found = letters_of(optax.adam(1e-3).init(w.params))
    moments = {path: x for path, x in found.items() if "mu" in path or "nu" in path}
    assert len(moments) == 2 * len(params)
    for path, letters in moments.items():
        assert letters == next(x for name, x in params.items() if path.endswith(name))
    assert [x for path, x in found.items() if "count" in path] == [""]


def test_letters_of_caches_and_dialogues():
    unrolled = letters_of(world().net.init_cache(2, 8))
    assert set(unrolled.values()) == {"BKSH", "BSD", "BSC", "BS", "BSNC"} and unrolled[".k_LBKSH[1]"] == "BKSH"
    scanned = letters_of(world(model__scan_layers=True).net.init_cache(2, 8))
    assert set(scanned.values()) == {"LBKSH", "LBSD", "BSC", "BS", "BSNC"}
    B1, BT = np.zeros(2), np.zeros((2, 3))
    dialogue = Dialogue(BT, BT, BT, BT, BT, BT, B1, B1, B1)
    assert list(letters_of(dialogue).values()) == ["BT"] * 5 + ["BU"] + ["B"] * 3
    step = Heads(BT, BT, BT, B1, BT, B1, BT)
    assert letters_of(step)[".end_BT"] == "T"  # without its T axis a name no longer fits: it only lays results out


def test_spec():
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 2})
    assert sharding.spec("VD", (6, 8), mesh) == P("tensor", "fsdp")
    assert sharding.spec("VD", (7, 8), mesh) == P(None, "fsdp")  # 2 does not divide 7
    assert sharding.spec("DNH", (8, 3, 4), mesh) == P("fsdp", None, None)
    assert sharding.spec("LDF", (3, 6, 4), mesh) == P(None, None, "tensor")
    assert sharding.spec("BT", (16, 5), mesh) == P(("data", "fsdp"), None)
    assert sharding.spec("BT", (12, 5), mesh) == P(None, None)
    assert sharding.spec("BTD", (8, 5, 8), mesh) == P(("data", "fsdp"), None, None)  # D of an activation stays whole
    assert sharding.spec("LBKSH", (1, 8, 2, 5, 4), mesh) == P(None, ("data", "fsdp"), "tensor", None, None)
    assert sharding.spec("", (), mesh) == P()


def test_make_mesh():
    devices = jax.devices()[:1]
    mesh = sharding.make_mesh(config.Mesh(), devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(config.ConfigError, match="only one"):
        sharding.make_mesh(config.Mesh(-1, -1, 1), devices)
    for sizes in ((2, 1, 1), (-1, 2, 1)):
        with pytest.raises(config.ConfigError, match="does not fit 1 devices"):
            sharding.make_mesh(config.Mesh(*sizes), devices)


def test_constrain_does_nothing_outside_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, "BT") is x


def test_pjit_takes_numpy_and_keeps_layouts():
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    f = sharding.pjit(lambda tree: {"y_BT": tree["x_BT"] + 1}, mesh)
    assert (f({"x_BT": np.ones((2, 3))})["y_BT"] == 2).all() and (f({"x_BT": np.ones((4, 3))})["y_BT"] == 2).all()


@functools.cache
def on_mesh(sizes: tuple[int, int, int]) -> dict:
    """What mesh_process.py finds on a mesh of 8 virtual devices."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, str(HERE / "mesh_process.py"), json.dumps(sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_numbers_of_one_device(sizes):
    one, other = on_mesh(ONE), on_mesh(sizes)
    assert one["tokens"] == other["tokens"] and sum(map(len, one["tokens"])) > 0
    assert one["numbers"].keys() == other["numbers"].keys() and len(one["numbers"]) > 40
    wrong = {k: (a, other["numbers"][k]) for k, a in one["numbers"].items()}
    wrong = {k: pair for k, pair in wrong.items() if not np.allclose(*pair, rtol=2e-5, atol=2e-5)}
    assert not wrong


@pytest.mark.parametrize("sizes", [ONE, *MESHES])
def test_parameters_and_moments_are_really_sharded(sizes):
    data, fsdp, tensor = sizes
    parts = on_mesh(sizes)["parts"]
    for tree in ("params", "mu", "target", "reference"):
        assert parts[f"{tree}/mlp/up_DF"] == fsdp * tensor, tree
        assert parts[f"{tree}/attention/wq_DNH"] == fsdp * tensor, tree
    assert parts["token_BT"] == data * fsdp


@pytest.mark.parametrize("sizes", [ONE, *MESHES])
def test_update_and_imagination_are_traced_once(sizes):
    assert on_mesh(sizes)["traces"] == {"imagine": 1, "likelihood": 1, "return": 1}
