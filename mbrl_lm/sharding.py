"""The device mesh, the two rule tables, and `pjit`: jax.jit with the letters of array names resolved to shardings.

A leaf's letters are read from its name: `wq_DNH` in a layer's parameters, in an optimiser moment or in a gradient is sharded
alike, with nothing to annotate. An axis that a mesh axis does not divide is replicated.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mbrl_lm import config

PARAM_RULES = {"V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}
BATCH_RULES = {"B": ("data", "fsdp"), "V": "tensor", "N": "tensor", "K": "tensor", "F": "tensor"}


def make_mesh(cfg: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor) mesh over all devices; a size of -1 takes what the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1:
        raise config.ConfigError("only one of --config.mesh.data, .fsdp and .tensor may be -1")
    rest, left_over = divmod(len(devices), math.prod(s for s in sizes if s != -1))
    sizes = [rest if s == -1 else s for s in sizes]
    if left_over or math.prod(sizes) != len(devices):
        raise config.ConfigError(f"a mesh of data x fsdp x tensor = {sizes} does not fit {len(devices)} devices")
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def letters(path: Sequence[Any], ndim: int) -> str:
    """The axes of the leaf at `path`, from the last name on it that ends in capital letters; "" if there is none.

    A leaf with one axis more than its letters was stacked over the layers by a scan; one fewer, it is one layer of a tuple.
    """
    for entry in reversed(path):
        found = re.search(r"_([A-Z]+)$", str(getattr(entry, "name", getattr(entry, "key", ""))))
        if found:
            axes = found[1]
            return {len(axes): axes, len(axes) + 1: "L" + axes, len(axes) - 1: axes[1:]}.get(ndim, "")
    return ""


def spec(axes: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """How an array with these axes is laid out: by BATCH_RULES if it has rows, else by PARAM_RULES."""
    rules = BATCH_RULES if "B" in axes else PARAM_RULES
    parts = []
    for axis, size in zip(axes, shape, strict=False):
        names = rules.get(axis)
        names = (names,) if isinstance(names, str) else names
        fits = names and size % math.prod(mesh.shape[n] for n in names) == 0
        parts.append(names if fits else None)
    return PartitionSpec(*parts)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings for arrays (or their ShapeDtypeStructs), by the letters of their names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec(letters(path, x.ndim), x.shape, mesh)), tree
    )


def abstract(tree: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs of a tree of arrays, with the shardings they have on `mesh`."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh))


def row_shards() -> int:
    """Over how many devices rows are spread inside the present `pjit`; 1 outside one."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in BATCH_RULES["B"])


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Pins the layout of an intermediate value inside a `pjit`; does nothing outside one."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def pjit(fun: Callable, mesh: Mesh, *, donate: Sequence[int] = ()) -> Callable:
    """jax.jit of `fun`, arguments and results sharded by the letters of their names.

    Compiled once for each set of argument shapes. Numpy arguments are put on their devices.

    Args:
      fun: a function of pytrees of arrays; None is an empty tree.
      mesh: the device mesh.
      donate: positions of arguments whose memory the results may take.
    """
    compiled: dict[Any, Callable] = {}

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        shapes = tree, tuple((np.shape(x), jax.dtypes.result_type(x)) for x in leaves)
        with jax.set_mesh(mesh):
            if shapes not in compiled:
                abstracts = jax.tree.map(jax.typeof, args)
                compiled[shapes] = jax.jit(
                    fun,
                    in_shardings=shardings(abstracts, mesh),
                    out_shardings=shardings(jax.eval_shape(fun, *abstracts), mesh),
                    donate_argnums=tuple(donate),
                )
            return compiled[shapes](*args)

    return call
