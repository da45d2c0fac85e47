"""Where arrays live: a ('data', 'fsdp') mesh, parameters split by size, batches split by rows.

Fully sharded data parallelism (Rajbhandari et al. 2020, ZeRO stage 3; Zhao et al. 2023) by one rule in place of
per-layer annotations: a leaf of at least `min_bytes` is split along its largest dimension that the 'fsdp' axis
divides; every other leaf is replicated. A batch is split over both axes, so every device has its own rows. The
compiler inserts the collectives: axis types are Auto.

The rule reads shapes only, so one call serves parameters, EMA and optimizer moments alike, and equal shapes get
equal shardings. Rows of a global batch: process p holds rows [p n, (p + 1) n).
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(data, fsdp):
    """Mesh of all devices of all processes with axes ('data', 'fsdp'); -1 for one of them: the devices that remain.

    Raises ValueError where data * fsdp is not the number of devices.
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


def local_devices(*axes):
    """Over this process's devices, for work that processes do not share: local_devices() is an array on each of them,
    local_devices("rows") one that is split by rows."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("rows",))
    return NamedSharding(mesh, PartitionSpec(*axes))


def shardings(tree, mesh, min_bytes):
    """NamedSharding for every leaf of `tree` (arrays or jax.ShapeDtypeStruct), by the rule above.

    min_bytes: leaves smaller than this many bytes are replicated (splitting them costs more latency than it saves).
    """
    size = mesh.shape["fsdp"]

    def place(leaf):
        dims = [d for d, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not dims or math.prod(leaf.shape) * leaf.dtype.itemsize < min_bytes:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(dims, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(place, tree)


def abstract(tree, placement):
    """`tree` as jax.ShapeDtypeStruct with the shardings of `placement` (same structure): what a checkpoint restores."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placement)


def batch_sharding(mesh):
    """Rows (dimension 0) over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh):
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(rows, mesh):
    """A numpy array that every process has whole, as a global array split by rows."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])


def to_global(batch, mesh):
    """This process's rows (tree of numpy arrays [rows, ...]) -> global arrays [rows * processes, ...], split by rows.

    Raises ValueError where the rows cannot be shared out equally among this process's devices.
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
