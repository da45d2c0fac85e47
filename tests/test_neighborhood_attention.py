"""Neighborhood attention: recorded cases, tiles against the masked form, borders, memory, devices."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processes import run_python

from benchmarks import neighborhood_attention as benchmark
from nested.ops import neighborhood_attention as module
from nested.ops.neighborhood_attention import neighborhood_attention

BOTH = ("reference", "blocked")


def normal(shape, dtype=jnp.float32, count=4):
    """q, k, v and a cotangent."""
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i in range(count)]


def with_gradients(implementation, kernel, scale=None):
    """(q, k, v, cotangent) -> (out, dq, dk, dv), compiled."""

    def run(q, k, v, cotangent):
        out, vjp = jax.vjp(lambda *qkv: neighborhood_attention(*qkv, kernel, scale, implementation), q, k, v)
        return out, *vjp(cotangent)

    return jax.jit(run)


# -------------------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("case", range(11))
def test_recorded_cases(golden, x64, case, implementation):
    """k-diffusion's scale 1 and NATTEN's windows: kernels 2 to 13, even ones, (3, 5), the whole image."""
    record = golden("hdit_na.npz")
    kernel = json.loads(str(record["meta"]))["cases"][case]["kernel"]
    kernel = tuple(kernel) if isinstance(kernel, list) else kernel
    inputs = [jnp.asarray(record[f"c{case:02d}/{name}"]) for name in ("q", "k", "v", "ct")]
    results = with_gradients(implementation, kernel, 1.0)(*inputs)
    for name, found in zip(("out", "gq", "gk", "gv"), results, strict=True):
        np.testing.assert_allclose(found, record[f"c{case:02d}/{name}"], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "height, width, kernel",
    [(13, 21, (3, 5)), (18, 35, 13), (6, 25, 6), (3, 33, (2, 9)), (21, 17, (7, 17)), (9, 18, 1)],
)
def test_blocked_is_the_reference(x64, height, width, kernel):
    """Grids that no tile divides, tiles with one real column, kernels wider than a tile or as large as the grid."""
    inputs = normal((2, height, width, 2, 4), jnp.float64)
    expected, found = (with_gradients(implementation, kernel)(*inputs) for implementation in BOTH)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", BOTH)
def test_a_kernel_of_the_whole_grid_is_global_attention(implementation):
    q, k, v = normal((2, 9, 20, 2, 8), count=3)
    found = neighborhood_attention(q, k, v, (9, 20), None, implementation)
    expected = jax.nn.dot_product_attention(*(x.reshape(2, 180, 2, 8) for x in (q, k, v)))  # scale D ** -0.5
    np.testing.assert_allclose(found, expected.reshape(q.shape), atol=2e-6)


def test_moving_the_image_moves_the_interior():
    q, k, v = normal((1, 24, 32, 1, 8), count=3)
    attend = jax.jit(functools.partial(neighborhood_attention, kernel_size=5, implementation="blocked"))
    found = attend(*(jnp.roll(x, (3, 5), (1, 2)) for x in (q, k, v)))
    expected = jnp.roll(attend(q, k, v), (3, 5), (1, 2))
    np.testing.assert_allclose(found[:, 5:-2, 7:-2], expected[:, 5:-2, 7:-2], atol=1e-6)
    assert jnp.max(jnp.abs(found - expected)) > 0.1  # at the borders the windows differ


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("scale", [1.0, 1e6, -1e6])
def test_everything_is_finite(implementation, scale):
    """With a scale of a million the softmax picks one key, which must be one inside the window."""
    q, k, v, cotangent = normal((1, 10, 19, 1, 8))
    v = jnp.ones_like(v)
    out, *gradients = with_gradients(implementation, 7, scale)(q, k, v, cotangent)
    np.testing.assert_allclose(out, v, atol=1e-6)  # the weights sum to 1; keys beyond the grid would add zeros
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("implementation", BOTH)
def test_bfloat16_has_logits_in_float32(implementation):
    """Large logits that bfloat16 would round to steps of 1: the output is the float32 one, rounded at the end."""
    q, k, v = normal((1, 16, 20, 2, 32), jnp.bfloat16, count=3)
    found = neighborhood_attention(q, k, v, 7, 4.0, implementation)
    exact = neighborhood_attention(*(x.astype(jnp.float32) for x in (q, k, v)), 7, 4.0, "reference")
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.03)


def test_transformations(x64):
    """vmap, forward mode and a checkpoint around it are those of the reference."""
    primals, tangents = ([jax.random.normal(jax.random.key(i), (2, 1, 8, 18, 1, 4)) for i in range(j, j + 3)]
                         for j in (0, 3))  # fmt: skip

    def run(implementation):
        attend = jax.checkpoint(lambda *qkv: neighborhood_attention(*qkv, 5, 1.0, implementation))
        loss = jax.vmap(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv))))
        gradients = jax.grad(lambda *qkv: jnp.sum(loss(*qkv)), argnums=(0, 1, 2))(*primals)
        return *jax.jvp(loss, primals, tangents), *gradients

    expected, found = (jax.jit(run, static_argnums=0)(implementation) for implementation in BOTH)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------- choices and mistakes


@pytest.mark.parametrize("grid, chosen", [((14, 14), "reference"), ((14, 15), "blocked"), ((1, 256), "blocked")])
def test_auto_takes_the_reference_on_small_grids(monkeypatch, grid, chosen):
    calls = {name: lambda *arguments, name=name: name for name in BOTH}
    monkeypatch.setattr(module, "IMPLEMENTATIONS", calls)
    x = jnp.zeros((1, *grid, 1, 1))
    assert neighborhood_attention(x, x, x, 1) == chosen
    assert neighborhood_attention(x, x, x, 1, implementation="reference") == "reference"


@pytest.mark.parametrize("kernel", [9, 0, (7, 11), (3, 3, 3)])
def test_a_kernel_that_does_not_fit_is_refused(kernel):
    x = jnp.zeros((1, 8, 10, 1, 4))
    with pytest.raises(ValueError, match=r"kernel_size \(.*\) on a grid of \(8, 10\).*a smaller kernel"):
        neighborhood_attention(x, x, x, kernel)


def test_other_mistakes_are_refused():
    x = jnp.zeros((1, 8, 10, 1, 4))
    with pytest.raises(ValueError, match=r"unknown implementation 'cuda', expected 'auto' or one of \['reference', 'b"):
        neighborhood_attention(x, x, x, 3, implementation="cuda")
    with pytest.raises(ValueError, match=r"q, k, v have shapes \(1, 8, 10, 1, 4\), \(1, 8, 9, 1, 4\), \(1, 8, 10, 1, "):
        neighborhood_attention(x, x[:, :, :9], x, 3)
    with pytest.raises(ValueError, match=r"expected one shape \(batch, height, width, heads, head width\)"):
        neighborhood_attention(x[0], x[0], x[0], 3)


# ----------------------------------------------------------------------------------------------------- memory, devices


@pytest.mark.parametrize("side, forward, both", [(64, 16, 30), (256, 130, 300)])
def test_memory_is_linear_in_the_tokens(side, forward, both):
    """Megabytes of temporaries for 6 heads of 64, kernel 7, float32; the inputs are 6.3 MB each at 64 x 64."""
    shapes = [jax.ShapeDtypeStruct((1, side, side, 6, 64), jnp.float32)] * 4
    attend = jax.jit(lambda q, k, v: neighborhood_attention(q, k, v, 7, 1.0))
    assert benchmark.temporary_bytes(attend.lower(*shapes[:3])) <= forward * 1e6
    assert benchmark.temporary_bytes(with_gradients("auto", 7, 1.0).lower(*shapes)) <= both * 1e6


def test_the_count_of_temporaries_sees_what_dense_attention_holds():
    """Its logits, 6 x 4096 x 4096 in float32, are 403 MB; inside a fusion XLA does not count them."""
    shapes = [jax.ShapeDtypeStruct((1, 64, 64, 6, 64), jnp.float32)] * 3
    attend = jax.jit(lambda q, k, v: neighborhood_attention(q, k, v, 7, 1.0, "reference"))
    assert benchmark.temporary_bytes(attend.lower(*shapes)) > 400e6


FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from nested.runtime import partition
from nested.ops.neighborhood_attention import neighborhood_attention

def run(q, k, v, cotangent):
    out, vjp = jax.vjp(lambda *qkv: neighborhood_attention(*qkv, 7, 1.0, "blocked"), q, k, v)
    return out, *vjp(cotangent)

mesh = partition.make_mesh(4, 1)
split = NamedSharding(mesh, PartitionSpec("data"))
inputs = [jax.random.normal(jax.random.key(i), (8, 18, 20, 2, 8)) for i in range(4)]
alone = jax.jit(run)(*inputs)
inputs = jax.device_put(inputs, split)
compiled = jax.jit(run).lower(*inputs).compile()
text = compiled.as_text()
for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
    assert name not in text, name
for one, other in zip(compiled(*inputs), alone, strict=True):
    assert one.sharding.is_equivalent_to(split, one.ndim), one.sharding
    np.testing.assert_allclose(one, other, atol=1e-5)
print("same")
"""


def test_a_batch_split_over_devices_needs_no_communication():
    assert run_python(FOUR_DEVICES, devices=4) == "same\n"


# ----------------------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_times_every_form_that_fits():
    """Forward and backward of a grid of 8 x 16: all forms give the same; what does not fit is left out."""
    inputs, shape = normal((1, 8, 16, 1, 4), count=3), (1, 8, 16, 1, 4)
    expected, *others = (attend(*inputs) for attend in benchmark.jax_forms(5).values())
    for other in others:
        np.testing.assert_allclose(other, expected, atol=1e-6)
    figures = benchmark.measure(shape, 5, "float32", True, 1, 1e9)
    assert list(figures) == ["blocked", "gather", "reference"]
    assert all(form["milliseconds"] > 0 and form["temporaries_mb"] > 0 for form in figures.values())
    room = benchmark.least_bytes("reference", (1, 32, 32, 1, 4), 5) - 1
    assert list(benchmark.compiled_forms((1, 32, 32, 1, 4), 5, "float32", False, room)[0]) == ["blocked", "gather"]
    assert benchmark.compiled_forms(shape, 5, "float32", False, max_bytes=0) == ({}, {})
