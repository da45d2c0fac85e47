"""nested/runtime/partition.py on one device, and on four fake ones in a process of its own."""

import numpy as np
import pytest
from helpers.processes import run_python
from jax.sharding import AxisType, PartitionSpec

from nested.runtime import partition


def test_mesh_of_one_device():
    for shape in ((1, 1), (-1, 1), (1, -1)):
        mesh = partition.make_mesh(*shape)
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1}
        assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)  # Explicit breaks linen with sharded weights


@pytest.mark.parametrize("shape", [(2, 1), (-1, 2), (-1, -1), (0, 1), (-1, 0), (-2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    message = rf"mesh: data={shape[0]}, fsdp={shape[1]} do not multiply to the 1 device\(s\) found; give divisors of 1"
    with pytest.raises(ValueError, match=message):
        partition.make_mesh(*shape)


def test_one_device_replicates_everything():
    placed = partition.shardings({"w": np.zeros((8, 8))}, partition.make_mesh(1, 1), min_bytes=0)
    assert placed["w"].spec == PartitionSpec()


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"batch\['step'\]: no rows do not divide by the 1 devices of the mesh"):
        partition.to_global({"step": np.float32(3)}, partition.make_mesh(1, 1))


FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from nested.runtime import partition

mesh = partition.make_mesh(2, -1)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2}
assert dict(partition.make_mesh(-1, 4).shape) == {"data": 1, "fsdp": 4}
shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
cases = {                                     # at least 64 bytes: 16 float32 values
    "largest": (shape(4, 8, 6), P(None, "fsdp")),
    "first of equals": (shape(8, 8), P("fsdp")),
    "largest that divides": (shape(6, 9), P("fsdp")),
    "none divides": (shape(5, 9), P()),
    "15 values": (shape(15), P()),
    "16 values": (shape(16), P("fsdp")),
    "16 halves are 32 bytes": (shape(16, dtype=jnp.bfloat16), P()),
    "empty": (shape(0, 100), P()),
    "number": (shape(), P()),
}
found = partition.shardings({k: v[0] for k, v in cases.items()}, mesh, min_bytes=64)
for name, (_, spec) in cases.items():
    assert found[name].spec == spec, (name, found[name].spec, spec)
    assert found[name].mesh == mesh

abstract = partition.abstract(cases["largest"][0], found["largest"])
assert abstract.shape == (4, 8, 6) and abstract.sharding == found["largest"] and abstract.dtype == jnp.float32

rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
batch = partition.to_global({"x": rows, "label": np.arange(8)}, mesh)
np.testing.assert_array_equal(batch["x"], rows)
assert batch["x"].sharding == partition.batch_sharding(mesh) and batch["label"].shape == (8,)
for shard in batch["x"].addressable_shards:
    assert shard.data.shape == (2, 3), shard      # every device has its own rows, over both axes
assert len({str(s.index) for s in batch["x"].addressable_shards}) == 4
whole = jax.device_put(rows, partition.replicated(mesh))
assert all(s.data.shape == (8, 3) for s in whole.addressable_shards)

for tree, message in (
    ({"x": rows[:6]}, "batch['x']: 6 rows do not divide by the 4 devices of the mesh; give a batch size that is a"),
    (rows[:3], "batch: 3 rows do not divide by the 4 devices of the mesh; give a batch size that is a multiple of 4"),
):
    try:
        partition.to_global(tree, mesh)
    except ValueError as error:
        assert message in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError("accepted")
try:
    partition.make_mesh(3, -1)
except ValueError as error:
    assert "data=3, fsdp=-1 do not multiply to the 4 device(s) found" in str(error)
else:
    raise AssertionError("accepted")

# the rule changes where numbers live, not what they are, and a sharded matmul needs no annotation
w = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
sharded = jax.device_put(w, partition.shardings(w, mesh, min_bytes=0))
assert len({str(s.index) for s in sharded.addressable_shards}) == 2
np.testing.assert_allclose(jax.jit(jnp.matmul)(batch["x"], sharded), rows @ w, rtol=1e-5, atol=1e-5)
print("passed")
"""


def test_four_devices():
    assert run_python(FOUR_DEVICES, devices=4).strip() == "passed"
