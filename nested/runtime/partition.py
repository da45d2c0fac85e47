"""Where arrays live: a ('data', 'fsdp') mesh, parameters split by size, batches split by rows.

Fully sharded data parallelism (Rajbhandari et al. 2020, ZeRO stage 3; Zhao et al. 2023) follows one rule here instead
of annotations for each layer: a leaf of at least `min_bytes` is split along its largest dimension that the 'fsdp' axis
divides; every other leaf is replicated. A batch is split over both axes, so that every device has its own rows. The
compiler inserts the collectives: axis types are Auto.

The rule reads shapes only, so that it serves parameters, EMA and optimizer moments alike, and equal shapes get equal
shardings. Process p holds rows [p n, (p + 1) n) of a global batch.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = Any
AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int) -> Mesh:
    """The mesh of all devices of all processes, with axes ('data', 'fsdp').

    data, fsdp: the size of each axis; one of them may be -1, which takes the devices that the other leaves.
    Raises ValueError if data * fsdp is not the number of devices.
    """
    devices = jax.device_count()
    shape = [data, fsdp]
    if shape.count(-1) == 1:
        known = shape[1] if shape[0] == -1 else shape[0]
        if known > 0 and devices % known == 0:
            shape[shape.index(-1)] = devices // known
    if min(shape) < 1 or math.prod(shape) != devices:
        raise ValueError(
            f"mesh: data={data}, fsdp={fsdp} do not multiply to the {devices} device(s) found; "
            f"give divisors of {devices}, or -1 for one of them (the rest)"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def local_devices(*axes: str) -> NamedSharding:
    """A sharding over this process's devices, for work that the processes do not share.

    local_devices() puts a whole array on each of them; local_devices("rows") splits its rows."""
    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    return NamedSharding(mesh, PartitionSpec(*axes))


def shardings(tree: Tree, mesh: Mesh, min_bytes: int) -> Tree:
    """A NamedSharding for every leaf of a tree, by the rule of the module's docstring.

    tree: arrays or jax.ShapeDtypeStruct. min_bytes: smaller leaves are replicated, because splitting them costs more
    latency than it saves.
    """
    size = mesh.shape["fsdp"]

    def place(leaf):
        dims = [d for d, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not dims or math.prod(leaf.shape) * leaf.dtype.itemsize < min_bytes:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(dims, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(place, tree)


def abstract(tree: Tree, placement: Tree) -> Tree:
    """A tree as jax.ShapeDtypeStruct with the shardings of `placement`, a tree of the same structure.

    This is what a checkpoint restores."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placement)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits rows (dimension 0) over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Turns a numpy array that every process has whole into a global array split by rows."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])


def to_global(batch: Tree, mesh: Mesh) -> Tree:
    """Joins the rows of all processes to global arrays [rows * processes, ...], split by rows.

    batch: this process's rows, a tree of numpy arrays [rows, ...].
    Raises ValueError if the rows cannot be shared out equally among this process's devices.
    """
    sharding = batch_sharding(mesh)
    local, total = jax.local_device_count(), mesh.size

    def place(path, x):
        if np.ndim(x) == 0 or x.shape[0] % local:
            rows = x.shape[0] * (total // local) if np.ndim(x) else "no"
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)}: {rows} rows do not divide by the {total} devices of the mesh; "
                f"give a batch size that is a multiple of {total}"
            )
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree_util.tree_map_with_path(place, batch)
