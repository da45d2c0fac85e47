"""DiT against the authors' code (golden), against the counts in HDiT's Table 1, and by algebra."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested.models import dit
from nested.models.dit import VARIANTS, DiT
from nested.modes import summary
from nested.weights import files as weights

TINY = DiT(patch_size=2, width=12, depth=2, num_heads=3, mlp_ratio=2, num_classes=4)


def init(model, x, t, cond):
    return model.init(jax.random.key(0), x, t, cond, train=False)["params"]


def shapes(model, *inputs):
    return jax.eval_shape(functools.partial(init, model), *inputs)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, x, t, cond):
    return model.apply({"params": params}, x, t, cond, train=False)


@functools.cache
def tiny_inputs():
    """A 4 x 6 image of 5 channels: 2 x 3 patches."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(3, 4, 6, 5)), jnp.float32)
    return x, jnp.asarray([1.0, 37.25, 999.5]), {"label": jnp.asarray([0, 4, 2])}


@functools.cache
def tiny_params():
    """Every parameter random, so that every path matters; positions as they are."""
    random = np.random.default_rng(1)
    template = jax.jit(functools.partial(init, TINY))(*tiny_inputs())
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.2, jnp.float32), template)
    return {**params, "pos_embed": template["pos_embed"]}


# ---- the authors' code


def nhwc(array):
    return array.transpose(0, 2, 3, 1)


def golden_case(data, dtype):
    config = json.loads(str(data["meta"]))["config"]
    model = DiT(
        patch_size=config["patch_size"], width=config["hidden_size"], depth=config["depth"],
        num_heads=config["num_heads"], num_classes=config["num_classes"], learn_variance=config["learn_sigma"],
    )  # fmt: skip
    inputs = (
        jnp.asarray(nhwc(data["in/x"]), dtype), jnp.asarray(data["in/t"], dtype),
        {"label": jnp.asarray(data["in/y"], jnp.int32)},
    )  # fmt: skip
    state = {name.removeprefix("w/"): array for name, array in data.items() if name.startswith("w/")}
    params = weights.from_torch(state, shapes(model, *inputs))
    return model, jax.tree.map(lambda array: jnp.asarray(array, dtype), params), inputs, state


def test_float32_output_and_names_of_the_authors_code(golden):
    data = golden("dit.npz")
    model, params, inputs, state = golden_case(data, jnp.float32)
    out = apply(model, params, *inputs)
    assert out.dtype == jnp.float32
    expected = nhwc(data["out_f32"])
    np.testing.assert_allclose(out[:2], expected[:2], rtol=0, atol=4e-6)
    # t = 999: one unit in the last place of such an angle is 6e-5, and the authors' own float32 is 2e-5 from float64.
    np.testing.assert_allclose(out[2], expected[2], rtol=0, atol=4e-5)
    exported = weights.to_torch(params)
    assert exported.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)
    np.testing.assert_array_equal(dit.position_embedding(4, 4, 24).astype(np.float32), state["pos_embed"])


def test_float64_output_loss_and_gradients_of_the_authors_code(golden, x64):
    data = golden("dit.npz")
    model, params, (x, t, cond), _ = golden_case(data, jnp.float64)

    def loss(params, x):
        out = model.apply({"params": params}, x, t, cond, train=True)
        return jnp.mean((out - nhwc(data["target"])) ** 2), out

    (value, out), (grads, grad_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(out, nhwc(data["out_f64"]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(value, data["loss"], rtol=1e-13)
    np.testing.assert_allclose(grad_x, nhwc(data["grad_x"]), rtol=0, atol=1e-14)
    grads = weights.to_torch(grads)
    assert not grads.pop("pos_embed").any()
    assert {f"grad/{key}" for key in grads} == {key for key in data if key.startswith("grad/")}
    for key, grad in grads.items():  # stored in float32
        np.testing.assert_allclose(grad, data[f"grad/{key}"], rtol=0, atol=1e-7 * np.abs(grad).max(), err_msg=key)


# ---- what the golden does not hold: rectangular grids, no label, one output per channel, the start


def test_positions_count_columns_and_then_rows_of_any_grid():
    table = dit.position_embedding(2, 3, 8)
    assert table.shape == (1, 6, 8) and table.dtype == np.float64
    row, column = 1, 2
    angles = [column, column / 100, row, row / 100]
    expected = [wave(angle) for pair in (angles[:2], angles[2:]) for wave in (math.sin, math.cos) for angle in pair]
    np.testing.assert_allclose(table[0, row * 3 + column], expected, rtol=0, atol=1e-15)
    held = tiny_params()["pos_embed"]
    np.testing.assert_array_equal(held, dit.position_embedding(2, 3, 12).astype(np.float32))


def test_a_patch_stays_in_its_place_on_a_rectangular_grid():
    """With attention's output off, a patch of the output depends on the same patch of the input only."""
    params = dict(tiny_params())
    for block in ("blocks_0", "blocks_1"):
        attention = {**params[block]["attn"], "proj": jax.tree.map(jnp.zeros_like, params[block]["attn"]["proj"])}
        params[block] = {**params[block], "attn": attention}
    x, t, cond = tiny_inputs()
    changed = apply(TINY, params, x.at[:, 2, 5].add(1), t, cond) - apply(TINY, params, x, t, cond)
    assert changed.shape == (3, 4, 6, 5)
    where = np.abs(changed).max((0, 3)) > 1e-4
    expected = np.zeros((4, 6), bool)
    expected[2:, 4:] = True
    np.testing.assert_array_equal(where, expected)


def test_time_and_label_are_seen_and_the_label_only_where_there_are_classes():
    x, t, cond = tiny_inputs()
    out = apply(TINY, tiny_params(), x, t, cond)
    assert np.abs(apply(TINY, tiny_params(), x, t + 1, cond) - out).max() > 1e-3
    assert np.abs(apply(TINY, tiny_params(), x, t, {"label": jnp.asarray([0, 1, 2])}) - out).max((1, 2, 3))[1] > 1e-3
    params = {name: leaf for name, leaf in tiny_params().items() if name != "y_embedder"}
    table = {"embedding": jnp.zeros((5, 12))}
    silent = apply(TINY, {**params, "y_embedder": {"embedding_table": table}}, x, t, cond)
    np.testing.assert_allclose(apply(TINY.clone(num_classes=0), params, x, t, {}), silent, rtol=0, atol=1e-6)


@pytest.mark.parametrize("empty", ["variable", "token"])
def test_coarser_vectors_are_added_to_the_time(empty):
    """RCG's pixel generator: c + W z + b, W e + b with its fake latent e; 'token' puts e in place of all of it."""
    x, t, cond = tiny_inputs()
    model = TINY.clone(conditions=(("z3", 1), ("z2", 2)), empty=empty)
    random = np.random.default_rng(2)
    z = {"z3": random.normal(size=(1, 1, 1, 5)), "z2": random.normal(size=(1, 1, 1, 4))}
    z = {name: jnp.asarray(value.repeat(3, 0), jnp.float32) for name, value in z.items()}
    keep = {"keep_z3": jnp.asarray([True, False, True]), "keep_z2": jnp.asarray([True, True, False])}
    template = shapes(model, x, t, cond | z)
    new = {name: template[name] for name in ("rep_z3", "rep_z2", "empty_z3", "empty_z2")}
    new = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), new)
    assert new["empty_z3"].shape == (1, 5 if empty == "variable" else 12)
    assert set(template) == {*tiny_params(), *new}
    out = apply(model, {**tiny_params(), **new}, x, t, cond | z | keep)
    for row in range(3):
        added = 0
        for name, value in z.items():
            kept, linear, empty_C = keep[f"keep_{name}"][row], new[f"rep_{name}"], new[f"empty_{name}"][0]
            vector = value[0, 0, 0] if kept else empty_C
            whole = vector @ linear["kernel"] + linear["bias"] if kept or empty == "variable" else empty_C
            added = added + whole
        time = tiny_params()["t_embedder"]
        time = {**time, "mlp_2": {**time["mlp_2"], "bias": time["mlp_2"]["bias"] + added}}
        expected = apply(TINY, {**tiny_params(), "t_embedder": time}, x, t, cond)
        np.testing.assert_allclose(out[row], expected[row], rtol=0, atol=2e-5)


def test_a_dropped_vector_cannot_be_seen():
    x, t, cond = tiny_inputs()
    model = TINY.clone(conditions=(("z2", 1),), depth=1)
    cond = cond | {"keep_z2": jnp.asarray([True, False, True])}
    new = {"rep_z2": {"kernel": jnp.ones((4, 12)), "bias": jnp.ones(12)}, "empty_z2": jnp.ones((1, 4))}
    params = {name: leaf for name, leaf in tiny_params().items() if name != "blocks_1"} | new

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def gradient(z):
        loss = lambda z: jnp.sum(model.apply({"params": params}, x, t, cond | {"z2": z}, train=True) ** 2)  # noqa: E731
        return jax.grad(loss)(z)

    grad = gradient(jnp.full((3, 1, 1, 4), 0.5))
    np.testing.assert_array_equal(np.abs(grad).max((1, 2, 3)) > 0, cond["keep_z2"])


def test_gelu_is_the_one_asked_for():
    """RCG's networks have the exact one; the two differ by 5e-4 at most."""
    exact = apply(TINY.clone(tanh_gelu=False), tiny_params(), *tiny_inputs())
    difference = np.abs(exact - apply(TINY, tiny_params(), *tiny_inputs())).max()
    assert 1e-6 < difference < 1e-2


def test_the_first_channels_are_the_prediction_where_the_variance_is_learned():
    x, t, cond = tiny_inputs()
    both = TINY.clone(learn_variance=True)
    template = shapes(both, x, t, cond)
    final = template["final_layer"]["linear"]
    assert final["kernel"].shape == (12, 2 * 2 * 10)
    plain = tiny_params()["final_layer"]
    linear = {
        name: jnp.concatenate([leaf.reshape(-1, 2, 2, 5), jnp.ones((leaf.size // 20, 2, 2, 5))], -1)
        for name, leaf in plain["linear"].items()
    }
    linear = {name: leaf.reshape(final[name].shape) for name, leaf in linear.items()}
    out = apply(both, {**tiny_params(), "final_layer": {**plain, "linear": linear}}, x, t, cond)
    assert out.shape == (3, 4, 6, 10)
    np.testing.assert_allclose(out[..., :5], apply(TINY, tiny_params(), x, t, cond), rtol=0, atol=1e-5)


def test_initial_values_are_the_authors_and_the_output_is_zero():
    model = DiT(
        patch_size=4, width=64, depth=2, num_heads=4, num_classes=200, conditions=(("z2", 1),), learn_variance=True
    )
    x, t = jnp.ones((1, 8, 8, 3)), jnp.full(1, 500.0)
    cond = {"label": jnp.zeros(1, jnp.int32), "z2": jnp.ones((1, 1, 1, 4000))}
    quickly = {"xla_backend_optimization_level": 0}
    params = jax.jit(functools.partial(init, model), compiler_options=quickly)(x, t, cond)
    assert not apply(model, params, x, t, cond).any()
    normal = r"t_embedder\.mlp\.[02]\.weight|y_embedder\.embedding_table\.weight|empty_z2"
    for name, array in weights.to_torch(params).items():
        if name == "pos_embed":
            continue
        if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert not array.any(), name
        elif re.fullmatch(normal, name):
            np.testing.assert_allclose(array.std(), 0.02, rtol=0.05, err_msg=name)
            assert np.abs(array).max() > 0.06, name  # not cut at two standard deviations
        else:  # Xavier uniform, of the convolution as a matrix
            fan_out, fan_in = array.reshape(len(array), -1).shape
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.97 * bound < np.abs(array).max() <= bound, name
            np.testing.assert_allclose(array.std(), bound / math.sqrt(3), rtol=0.05, err_msg=name)


# ---- numerics


def test_bfloat16_is_close_and_keeps_norms_softmax_and_conditioning_in_float32():
    x, t, cond = tiny_inputs()
    exact = apply(TINY, tiny_params(), x, t, cond)
    half = TINY.clone(dtype="bfloat16")
    out = apply(half, tiny_params(), x, t, cond)
    assert out.dtype == jnp.float32
    assert 1e-4 < np.abs(out - exact).max() / np.abs(exact).max() < 0.03
    assert apply(TINY, tiny_params(), x.astype(jnp.bfloat16), t, cond).dtype == jnp.bfloat16
    run = functools.partial(half.apply, train=False)
    jaxpr = jax.make_jaxpr(run)({"params": tiny_params()}, x, t, cond)
    found = {"dot_general": [], "exp": [], "rsqrt": [], "cos": []}
    rounded = 0  # times that something of the residual stream's shape goes from float32 to bfloat16
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name == "convert_element_type" and equation.outvars[0].aval.shape == (3, 6, 12):
            rounded += equation.outvars[0].aval.dtype == jnp.bfloat16
        if equation.primitive.name in found:
            found[equation.primitive.name].append(str(equation.invars[0].aval.dtype))
    assert found["dot_general"].count("float32") == 2 + 2 + 1  # time, the blocks' and the final layer's modulation
    assert found["dot_general"].count("bfloat16") == 2 * (4 + 2) + 1
    assert rounded == 2 * 4 + 1  # each modulated norm and each gated sum, once
    assert {dtype for name in ("exp", "rsqrt", "cos") for dtype in found[name]} == {"float32"}
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(half, x, t, cond))} == {jnp.dtype("float32")}


def equations(jaxpr):
    """All equations, those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in summary.sub_jaxprs(equation.params):
            yield from equations(inner)


def test_remat_changes_nothing_but_memory():
    x, t, cond = tiny_inputs()

    def gradients(model):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, x, t, cond, train=True) ** 2)

        names = [equation.primitive.name for equation in equations(jax.make_jaxpr(loss)(tiny_params()).jaxpr)]
        return jax.jit(jax.value_and_grad(loss))(tiny_params()), sum(n in ("remat2", "checkpoint") for n in names)

    (value, grads), none = gradients(TINY)
    (value_remat, grads_remat), blocks = gradients(TINY.clone(remat=True))
    assert (none, blocks) == (0, 2)
    np.testing.assert_allclose(value_remat, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), grads_remat, grads)


def test_attention_is_the_one_asked_for():
    with pytest.raises(ValueError, match="'cudnn' works in bfloat16 or float16, found float32; set dtype"):
        shapes(TINY.clone(attention="cudnn"), *tiny_inputs())


# ---- sizes


def published(variant, size, channels, patch_size, learn_variance=True):
    model = DiT(patch_size=patch_size, num_classes=1000, learn_variance=learn_variance, **VARIANTS[variant])
    inputs = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32), jnp.zeros(1), {"label": jnp.zeros(1, int)}
    return model, shapes(model, *inputs), inputs


def parameters(model, params):
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {"/".join(entry.key for entry in path): leaf.size for path, leaf in paths}
    return sum(size for name, size in names.items() if not any(re.search(b, name) for b in model.buffers))


@pytest.mark.parametrize("variant, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameters_of_the_papers_table(variant, millions):
    """DiT, Table 4: patches of 2 on 32 x 32 latents of 4 channels."""
    model, params, _ = published(variant, 32, 4, 2)
    assert round(parameters(model, params) / 1e6) == millions
    assert params["pos_embed"].shape == (1, 256, model.width) and model.num_tokens((32, 32, 4)) == 256


@pytest.mark.parametrize(
    "size, learn_variance, giga",
    [(128, False, 106.420), (256, False, 657.476), (512, False, 6340.624),
     (128, True, 106.458), (256, True, 657.627), (512, True, 6341.228)],
)  # fmt: skip
def test_multiply_accumulates_of_the_baseline_in_hdits_table_1(size, learn_variance, giga):
    """HDiT prints 106, 657 and 6,341 for DiT-B/4 in pixel space; the digits are those of the closed form."""
    model, params, inputs = published("B", size, 3, 4, learn_variance)
    assert parameters(model, params) == 130_352_688 + 36_912 * learn_variance
    run = functools.partial(model.apply, train=False)
    tokens, width, layer_norms = (size // 4) ** 2, 768, 25
    counted = summary.count_macs(run, {"params": params}, *inputs)
    counted -= layer_norms * summary.LAYER_NORM_MACS * tokens * width
    assert round(counted / 1e9, 3) == giga
    patches = tokens * width * 48 * (3 if learn_variance else 2)
    block = tokens * (12 * width**2 + 2 * tokens * width) + 6 * width**2
    assert counted == patches + 12 * block + 2 * width**2 + 256 * width + width**2


# ---- bad input

SEES, FINE = dict(conditions=(("z2", 1),)), {"label": jnp.zeros(3, int)}


@pytest.mark.parametrize(
    "changes, cond, words",
    [
        ({}, {}, r"DiT: cond has \[\], expected \['label'\] .*: missing \['label'\], unknown \[\]"),
        (dict(num_classes=0), {"label": jnp.zeros(3, int)}, r"DiT: cond has \['label'\], .* unknown \['label'\]"),
        ({}, {"label": jnp.zeros(3, int), "z2": jnp.zeros(3)}, r"cond has \['label', 'z2'\], .* unknown \['z2'\]"),
        (SEES, None, r"cond has \['label'\], expected \['label', 'z2'\] .*: missing \['z2'\]"),
        (SEES, FINE | {"z2": jnp.zeros((3, 2, 2, 4))}, r"z2 has shape \(3, 2, 2, 4\), expected one vector"),
        (SEES, FINE | {"z2": jnp.zeros((3, 4))}, r"z2 has shape \(3, 4\), expected one vector \(batch, 1, 1, c"),
        (SEES | dict(empty="zero"), FINE | {"z2": jnp.zeros((3, 1, 1, 4))}, "empty is 'zero', expected one of 'token'"),
        (dict(patch_size=4), None, r"input has shape \(3, 4, 6, 5\), .* divisible by patch_size 4"),
        (dict(num_heads=5), None, "width 12 must be divisible by 4 and by num_heads 5"),
        (dict(width=6), None, "width 6 must be divisible by 4 and by num_heads 3"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(changes, cond, words):
    x, t, fitting = tiny_inputs()
    with pytest.raises(ValueError, match="^DiT.*" + words.removeprefix("DiT")) as caught:
        shapes(TINY.clone(**changes), x, t, fitting if cond is None else cond)
    assert "\n" not in str(caught.value)


def test_a_variable_of_two_arrays_is_refused():
    x, t, cond = tiny_inputs()
    with pytest.raises(ValueError, match="DiT: its input has shape tuple, expected one array"):
        init(TINY, (x, x), t, cond)


def test_another_resolution_takes_other_positions():
    x, t, cond = tiny_inputs()
    larger = jnp.concatenate([x, x], axis=1)
    with pytest.raises(ValueError, match=r"a grid of \(4, 3\) patches needs 12 positions, pos_embed has 6; .*"
                                         r"position_embedding\(4, 3, 12\)"):  # fmt: skip
        apply(TINY, tiny_params(), larger, t, cond)
    positions = jnp.asarray(dit.position_embedding(4, 3, 12), jnp.float32)
    assert apply(TINY, {**tiny_params(), "pos_embed": positions}, larger, t, cond).shape == larger.shape
