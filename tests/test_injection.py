"""nested/models/injection.py and how U-ViT uses it: against numpy, by what a dropped condition leaves, by counting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_uvit import deconvolve, numpy_uvit

from nested.models.injection import Deconvolution, Injection
from nested.models.uvit import UViT
from nested.modes import summary

QUICKLY = {"xla_backend_optimization_level": 0}
CONDITIONS = (("z3", 1), ("z2", 5))  # patch sizes that do not divide: deconv_concat makes no use of them
DRAFT = dict(injection="deconv_concat", inject_every=2, inject_layers=2)
APPENDED = dict(injection="append_tokens", inject_every=0, inject_layers=0)
TINY = UViT(
    patch_size=2, width=12, depth=4, num_heads=3, mlp_ratio=2, num_classes=4, conditions=CONDITIONS, final_conv=False,
    **DRAFT,
)  # fmt: skip


def shapes(model, x, t, cond):
    return jax.eval_shape(lambda *a: model.init(jax.random.key(0), *a, train=False)["params"], x, t, cond)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def apply(model, params, x, t, cond):
    return model.apply({"params": params}, x, t, cond, train=False)


def case(model, dtype=jnp.float32):
    """(params, x, t, cond), all random: an image of 6 x 8, 3 x 4 patches, that sees 1 x 2 and 2 x 3."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    x, t = normal(3, 6, 8, 5), jnp.asarray([1.0, 37.0, 999.5], dtype)
    cond = {
        "label": jnp.asarray([0, 4, 2]), "z3": normal(3, 1, 2, 6), "z2": normal(3, 2, 3, 4),
        "keep_z3": jnp.asarray([True, False, False]), "keep_z2": jnp.asarray([True, True, False]),
    }  # fmt: skip
    params = jax.tree.map(lambda leaf: normal(*leaf.shape) * 0.2, shapes(model, x, t, cond))
    return params, x, t, cond


# ---- the transposed convolution


PAIRS = [((6, 4), (8, 6)), ((6, 1), (16, 7)), ((4, 2), (4, 16)), ((3, 5), (11, 9))]


@pytest.mark.parametrize("size, grid", PAIRS, ids=str)
def test_deconvolution_is_a_scatter_add_that_fills_the_grid_exactly(size, grid, x64):
    random = np.random.default_rng(1)
    z, deconvolution = random.normal(size=(2, *size, 3)), Deconvolution(grid, 5, None)
    params = jax.eval_shape(deconvolution.init, jax.random.key(0), z)["params"]
    for (wanted, have), kernel in zip(zip(grid, size, strict=True), params["proj"]["kernel"].shape, strict=False):
        assert (have - 1) * (wanted // have) + kernel == wanted
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), params)
    out = deconvolution.apply({"params": params}, jnp.asarray(z))
    expected = [deconvolve(params["proj"], one, grid).reshape(-1, 5) for one in z]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size, grid", PAIRS, ids=str)
def test_deconvolution_is_counted_once_per_input(size, grid):
    """fvcore's rule for transposed convolutions."""
    z, deconvolution = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32), Deconvolution(grid, 5, None)
    params = jax.eval_shape(deconvolution.init, jax.random.key(0), z)
    window = [wanted - (have - 1) * (wanted // have) for wanted, have in zip(grid, size, strict=True)]
    macs = summary.count_macs(deconvolution.apply, params, z)
    assert macs == size[0] * size[1] * window[0] * window[1] * 3 * 5


# ---- the network


@pytest.mark.parametrize("empty", ["token", "variable"])
@pytest.mark.parametrize("changes", [{}, dict(APPENDED, conditions=(("z3", 1), ("z2", 1)))], ids=["deconv", "append"])
def test_the_network_is_what_the_equations_say(empty, changes, x64):
    """Two places among five blocks, grids that do not divide, a label and a time token that are not joined to."""
    model = TINY.clone(empty=empty, **changes)
    inputs = case(model, jnp.float64)
    np.testing.assert_allclose(apply(model, *inputs), numpy_uvit(model, *inputs), rtol=0, atol=1e-11)


def test_places_parameters_and_tokens():
    inputs = case(TINY)[1:]
    params = shapes(TINY.clone(depth=12), *inputs)  # 13 blocks: after 2, 4, ..., 12
    assert sorted(name for name in params if name.startswith("inject_")) == [f"inject_{i}" for i in range(6)]
    place = jax.tree.map(lambda leaf: leaf.shape, params["inject_5"])
    assert place == {"fc1": {"kernel": (36, 12), "bias": (12,)}, "fc2": {"kernel": (12, 12), "bias": (12,)}}
    assert params["pos_embed"].shape == (1, 2 + 12, 12)
    assert "cond_embed_z3" not in params and params["empty_z3"].shape == (1, 1, 12)
    other = shapes(TINY.clone(depth=2, empty="variable", inject_every=3, inject_layers=3), *inputs)
    assert other["empty_z3"].shape == (1, 1, 1, 6) and other["empty_z2"].shape == (1, 1, 1, 4)
    assert [name for name in other if name.startswith("inject_")] == ["inject_0"] and len(other["inject_0"]) == 3


def test_without_conditions_both_injections_are_the_same_network():
    _, x, t, cond = case(TINY)
    alone = TINY.clone(conditions=())
    appended = alone.clone(**APPENDED)
    cond = {"label": cond["label"]}
    assert shapes(alone, x, t, cond) == shapes(appended, x, t, cond)
    runs = [jax.make_jaxpr(functools.partial(model.apply, train=False)) for model in (alone, appended)]
    params = {"params": shapes(alone, x, t, cond)}
    assert str(runs[0](params, x, t, cond)) == str(runs[1](params, x, t, cond))


@pytest.mark.parametrize("empty", ["token", "variable"])
def test_a_dropped_condition_cannot_be_seen_and_a_kept_one_is_seen_at_every_place(empty):
    model = TINY.clone(empty=empty, depth=2, inject_every=1)  # three blocks, three places
    params, x, t, cond = case(model)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def output_and_gradients(params, z):
        def loss(params, z):
            out = model.apply({"params": params}, x, t, cond | z, train=True)
            return jnp.sum(out**2), out

        return jax.grad(loss, (0, 1), has_aux=True)(params, z)

    z = {name: cond[name] for name, _ in CONDITIONS}
    (of_params, of_z), out = output_and_gradients(params, z)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params))
    for name in z:
        kept = np.asarray(cond[f"keep_{name}"])
        np.testing.assert_array_equal(np.abs(of_z[name]).max((1, 2, 3)) > 0, kept)
        changed = output_and_gradients(params, z | {name: z[name] + 1})[1]
        np.testing.assert_array_equal(np.abs(changed - out).max((1, 2, 3)) > 0, kept)
    for place in ("inject_0", "inject_1", "inject_2"):
        others = [other for other in ("inject_0", "inject_1", "inject_2") if other != place]
        alone = params | {other: jax.tree.map(jnp.zeros_like, params[other]) for other in others}
        of_z = output_and_gradients(alone, z)[0][1]
        assert all(np.abs(grad).max() > 0 for grad in of_z.values())


def test_initial_values():
    """Linear layers as U-ViT's, transposed convolutions as torch leaves them: bound 1 / sqrt(width x window)."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def init(key):
        convolution = Deconvolution((3, 4), 48, None).init(key, jnp.zeros((1, 2, 3, 4)))
        return convolution["params"], Injection(2, None).init(key, *jnp.zeros((2, 1, 12, 48)))["params"]

    convolution, place = init(jax.random.key(0))
    for leaf in convolution["proj"].values():
        bound = (48 * 2 * 2) ** -0.5
        assert 0.9 * bound < np.abs(leaf).max() <= bound
    for layer in place.values():
        np.testing.assert_allclose(layer["kernel"].std(), 0.02, rtol=0.05)
        assert not layer["bias"].any()


def test_remat_covers_blocks_and_places_and_changes_no_value():
    params, x, t, cond = case(TINY)
    model = TINY.clone(remat=True)
    jaxpr = jax.make_jaxpr(functools.partial(model.apply, train=False))({"params": params}, x, t, cond)
    assert sum(equation.primitive.name in ("remat2", "checkpoint") for equation in jaxpr.eqns) == 5 + 2
    np.testing.assert_allclose(apply(model, params, x, t, cond), apply(TINY, params, x, t, cond), rtol=0, atol=1e-5)


def test_bfloat16_reaches_every_product():
    params, *inputs = case(TINY)
    half = TINY.clone(dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(functools.partial(half.apply, train=False))({"params": params}, *inputs)
    products = [e for e in jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert len(products) == 1 + 2 + 5 * 6 + 2 + 2 * 2 + 1  # patches, deconvolutions, blocks, skips, places, output
    assert {str(equation.invars[0].aval.dtype) for equation in products} == {"bfloat16"}


def test_the_mask_of_the_text_is_allowed_and_not_looked_at():
    """U-ViT attends to the padding too (uvit_t2i.py)."""
    model = UViT(patch_size=2, width=12, depth=0, num_heads=3, text_dim=5, text_tokens=3, final_conv=False)
    _, x, t, _ = case(TINY)
    text = jnp.ones((3, 3, 5))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), shapes(model, x, t, {"text": text}))
    plain = apply(model, params, x, t, {"text": text})
    masked = apply(model, params, x, t, {"text": text, "text_mask": jnp.asarray([[True, False, False]] * 3)})
    np.testing.assert_array_equal(masked, plain)
    with pytest.raises(ValueError, match=r"unknown \['text_mask'\]"):
        shapes(model.clone(text_dim=0, text_tokens=0), x, t, {"text_mask": jnp.ones((3, 3), bool)})


# ---- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(inject_every=0), r"inject_every and inject_layers are \(0, 2\) with injection 'deconv_concat': set them "
                               r"to at least 1 \(the draft: 2\)"),
        (dict(inject_layers=0), r"are \(2, 0\) with injection 'deconv_concat': set them to at least 1"),
        (dict(injection="append_tokens"), r"are \(2, 2\) with injection 'append_tokens': set them to 0"),
        (dict(APPENDED, inject_every=2), r"are \(2, 0\) with injection 'append_tokens': set them to 0"),
        (dict(injection="cross"), r"injection is 'cross', expected one of \('append_tokens', 'deconv_concat'\)"),
        (dict(empty="zero"), "empty is 'zero', expected one of 'token', 'variable'"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(changes, message):
    model, inputs = TINY.clone(**changes), case(TINY)[1:]
    with pytest.raises(ValueError, match=f"^U-ViT: .*{message}") as caught:
        shapes(model, *inputs)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^U-ViT: .*{message}"):  # already when the hierarchy is built
        model.check_shape((6, 8, 5))


@pytest.mark.parametrize("name, size", [("z3", (4, 4)), ("z2", (3, 5))])
def test_a_condition_of_a_finer_grid_is_refused(name, size):
    _, x, t, cond = case(TINY)
    message = rf"U-ViT: {name} has a grid of \({size[0]}, {size[1]}\), larger than the \(3, 4\) patches that .* smaller"
    with pytest.raises(ValueError, match=message) as caught:
        shapes(TINY, x, t, cond | {name: jnp.zeros((3, *size, 6))})
    assert "\n" not in str(caught.value)
