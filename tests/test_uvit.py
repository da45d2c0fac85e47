"""U-ViT against the authors' code (goldens), against a second implementation in numpy, and by algebra."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_uvit import numpy_uvit

from nested.models import layers
from nested.models.uvit import VARIANTS, UViT, resize_position_embedding
from nested.ops.attention import ATTENTION, attention
from nested.weights import files as weights

KEY = jax.random.key(0)


def init(model, x, t, cond):
    return model.init(KEY, x, t, cond, train=False)["params"]


def shapes(model, *inputs):
    return jax.eval_shape(functools.partial(init, model), *inputs)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, x, t, cond):
    return model.apply({"params": params}, x, t, cond, train=False)


def random_params(template, dtype=jnp.float32, scale=0.15):
    """Every parameter random, so that every path matters."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * scale, dtype), template)


# ---- the authors' code


def golden_case(data, dtype):
    """(model, params, inputs) of a golden file; num_classes there counts the null class."""
    config = json.loads(str(data["meta/config"]))
    model = UViT(
        patch_size=config["patch_size"], width=config["embed_dim"], depth=config["depth"],
        num_heads=config["num_heads"], mlp_ratio=config["mlp_ratio"], qkv_bias=config["qkv_bias"],
        num_classes=max(config.get("num_classes", 0) - 1, 0), text_dim=config.get("clip_dim", 0),
        text_tokens=config.get("num_clip_token", 0), time_mlp=config["mlp_time_embed"],
        skip=config.get("skip", True), final_conv=config["conv"],
    )  # fmt: skip
    cond = {}
    if "in/y" in data:
        cond["label"] = jnp.asarray(data["in/y"], jnp.int32)
    if "in/context" in data:
        cond["text"] = jnp.asarray(data["in/context"], dtype)
    inputs = jnp.asarray(nhwc(data["in/x"]), dtype), jnp.asarray(data["in/timesteps"], dtype), cond
    state = {name[2:]: array for name, array in data.items() if name.startswith("w/")}
    params = weights.from_torch(state, shapes(model, *inputs))
    return model, jax.tree.map(lambda array: jnp.asarray(array, dtype), params), inputs


def nhwc(array):
    return array.transpose(0, 2, 3, 1)


GOLDENS = ["uncond", "cond", "noskip", "t2i"]


@pytest.mark.parametrize("name", GOLDENS)
def test_float32_output_of_the_authors_code(name, golden):
    data = golden(f"uvit_{name}.npz")
    model, params, inputs = golden_case(data, jnp.float32)
    out = apply(model, params, *inputs)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, nhwc(data["out_f32"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GOLDENS)
def test_float64_output_loss_and_gradients_of_the_authors_code(name, golden, x64):
    data = golden(f"uvit_{name}.npz")
    model, params, (x, t, cond) = golden_case(data, jnp.float64)

    def loss(params, x):
        out = model.apply({"params": params}, x, t, cond, train=True)
        return jnp.mean((out - nhwc(data["target"])) ** 2), out

    (value, out), (grads, grad_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(out, nhwc(data["out_f64"]), rtol=0, atol=1e-11)
    np.testing.assert_allclose(value, data["loss"], rtol=1e-12)
    np.testing.assert_allclose(grad_x, nhwc(data["grad_x"]), rtol=0, atol=1e-14)
    grads = weights.to_torch(grads)
    assert {f"grad/{key}" for key in grads} == {key for key in data if key.startswith("grad/")}
    for key, grad in grads.items():  # stored in float32
        np.testing.assert_allclose(grad, data[f"grad/{key}"], rtol=0, atol=1e-7 * np.abs(grad).max(), err_msg=key)


def test_time_embedding(golden, x64):
    data = golden("uvit_time_embed.npz")
    for width in (768, 7):
        t = jnp.asarray(data["t"])
        single = layers.timestep_embedding(t, width)
        double = layers.timestep_embedding(t.astype(jnp.float64), width)
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(double, data[f"e64_{width}"], rtol=0, atol=1e-12)
        # one unit in the last place of an angle of 1000 is 6e-5
        np.testing.assert_allclose(single, data[f"e32_{width}"], rtol=0, atol=1e-4)
        assert layers.timestep_embedding(t.astype(jnp.bfloat16), width).dtype == jnp.float32


def test_unpatchify_has_channels_fastest(golden):
    data = golden("uvit_patchify.npz")
    np.testing.assert_array_equal(layers.unpatchify(jnp.asarray(data["tokens"]), (3, 3), 2), nhwc(data["x"]))
    tokens = jnp.arange(2 * 6 * 8.0).reshape(2, 6, 8)
    x = layers.unpatchify(tokens, (2, 3), 2)
    assert x.shape == (2, 4, 6, 2)
    np.testing.assert_array_equal(x[1, 2:4, 4:6].reshape(-1), tokens[1, 5])


# ---- what the goldens do not hold: every kind of token, odd depth, rectangular grids


COARSER = (("z3", 1), ("z2", 2))


def full_case(dtype, **changes):
    """A model with every kind of token, a 4 x 6 input, and inputs; final_conv off, as the H variant has it."""
    config = dict(patch_size=2, width=12, depth=5, num_heads=3, mlp_ratio=2, qkv_bias=True, num_classes=4, text_dim=5,
                  text_tokens=2, conditions=COARSER, final_conv=False)  # fmt: skip
    model = UViT(**(config | changes))
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    x, t = normal(3, 4, 6, 5), jnp.asarray([1.0, 37.0, 999.5], dtype)
    cond = {
        "label": jnp.asarray([0, 4, 2]), "text": normal(3, 2, 5), "z3": normal(3, 1, 2, 6), "z2": normal(3, 2, 4, 3),
        "keep_z3": jnp.asarray([True, False, False]), "keep_z2": jnp.asarray([True, True, False]),
    }  # fmt: skip
    cond = {key: value for key, value in cond.items() if key in model_keys(model)}
    return model, random_params(shapes(model, x, t, cond), dtype), (x, t, cond)


@functools.cache
def small_case():
    return full_case(jnp.float32, depth=2)


def model_keys(model):
    names = [name for name, _ in model.conditions]
    keys = names + [f"keep_{name}" for name in names]
    return keys + ["label"] * bool(model.num_classes) + ["text"] * bool(model.text_tokens)


@pytest.mark.parametrize("changes", [{}, dict(patch_size=1, depth=2, num_classes=0, qkv_bias=False)], ids=str)
def test_all_tokens_odd_depth_and_rectangular_grids_as_the_equations_say(changes, x64):
    model, params, inputs = full_case(jnp.float64, **changes)
    blocks = [name for name in params if "block" in name]
    assert len(blocks) == 2 * (model.depth // 2) + 1
    np.testing.assert_allclose(apply(model, params, *inputs), numpy_uvit(model, params, *inputs), rtol=0, atol=1e-11)


def test_final_conv_is_the_last_thing(x64):
    """A 3 x 3 kernel that is the identity at its centre gives the net without it; shifted, a shifted image."""
    model, params, inputs = full_case(jnp.float64, depth=2)
    plain = apply(model, params, *inputs)
    identity = np.zeros((3, 3, 5, 5))
    identity[1, 1] = np.eye(5)
    for kernel, expected in [
        (identity, plain),
        (np.roll(identity, 1, 0), jnp.pad(plain[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))),
    ]:
        with_conv = {**params, "final_layer": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(5)}}
        out = apply(model.clone(final_conv=True), with_conv, *inputs)
        np.testing.assert_allclose(out, expected + 1, rtol=0, atol=1e-12)


# ---- conditions


def test_a_dropped_condition_cannot_be_seen():
    model, params, (x, t, cond) = small_case()
    out = apply(model, params, x, t, cond)
    for name in ("z3", "z2"):
        changed = apply(model, params, x, t, cond | {name: cond[name] + 1})
        difference = np.abs(changed - out).max((1, 2, 3))
        np.testing.assert_array_equal(difference > 1e-4, cond[f"keep_{name}"])
        np.testing.assert_array_equal(difference[~cond[f"keep_{name}"]], 0)
        kept = apply(model, params, x, t, cond | {f"keep_{name}": jnp.ones(3, bool)})
        assert (np.abs(kept - out).max((1, 2, 3)) > 1e-4).tolist() == (~cond[f"keep_{name}"]).tolist()
        without = {key: value for key, value in cond.items() if key != f"keep_{name}"}
        np.testing.assert_allclose(apply(model, params, x, t, without), kept, atol=1e-6)


def test_gradients_reach_the_empty_token_only_when_it_is_used():
    model, params, (x, t, cond) = small_case()

    @jax.jit
    def grad(cond):
        return jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x, t, cond, train=True) ** 2))(params)

    grads = grad(cond)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    grads = grad(cond | {"keep_z3": jnp.ones(3, bool)})
    assert np.abs(grads["empty_z3"]).max() == 0 and np.abs(grads["empty_z2"]).max() > 0


def test_order_of_conditions_is_the_order_of_their_positions():
    model, params, inputs = small_case()
    pos_embed = params["pos_embed"]
    end = model.num_extra_tokens + 6
    z3, z2 = pos_embed[:, end : end + 2], pos_embed[:, end + 2 :]
    swapped = {**params, "pos_embed": jnp.concatenate([pos_embed[:, :end], z2, z3], 1)}
    out = apply(model, params, *inputs)
    other = model.clone(conditions=COARSER[::-1])
    np.testing.assert_allclose(apply(other, swapped, *inputs), out, atol=1e-5)
    assert np.abs(apply(other, params, *inputs) - out).max() > 1e-4


# ---- numerics


def test_bfloat16_is_close_and_keeps_norms_and_softmax_in_float32():
    model, params, inputs = small_case()
    exact = apply(model, params, *inputs)
    for dtype in ("bfloat16", jnp.bfloat16):
        half = apply(model.clone(dtype=dtype), params, *inputs)
        assert half.dtype == jnp.float32
        assert 1e-4 < np.abs(half - exact).max() / np.abs(exact).max() < 0.03
    run = functools.partial(model.clone(dtype=jnp.bfloat16).apply, train=False)
    jaxpr = jax.make_jaxpr(run)({"params": params}, *inputs)
    found = {"dot_general": set(), "exp": set(), "rsqrt": set(), "cos": set()}
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in found:
            found[equation.primitive.name].add(str(equation.invars[0].aval.dtype))
    assert found == {"dot_general": {"bfloat16"}, "exp": {"float32"}, "rsqrt": {"float32"}, "cos": {"float32"}}
    template = shapes(model.clone(dtype=jnp.bfloat16), *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(template)} == {jnp.dtype("float32")}


def equations(jaxpr):
    """All equations, those inside jitted and rematerialised functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def test_remat_changes_nothing_but_memory():
    model, params, (x, t, cond) = full_case(jnp.float32, depth=2, conditions=(), num_classes=0)

    def gradients(model):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, x, t, cond, train=True) ** 2)

        names = [equation.primitive.name for equation in equations(jax.make_jaxpr(loss)(params).jaxpr)]
        return jax.jit(jax.value_and_grad(loss))(params), sum(name in ("remat2", "checkpoint") for name in names)

    (value, grads), none = gradients(model)
    (value_remat, grads_remat), blocks = gradients(model.clone(remat=True))
    assert (none, blocks) == (0, 3)
    np.testing.assert_allclose(value_remat, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), grads_remat, grads)


def test_cudnn_attention_is_asked_for_and_only_in_half_precision(monkeypatch):
    """The fused kernel needs a GPU; here jax's plain form of the same call takes its place."""
    asked, plain = [], jax.nn.dot_product_attention

    def stand_in(q, k, v, implementation, **options):
        asked.append(implementation)
        return plain(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v = jax.random.normal(KEY, (3, 2, 7, 3, 8), jnp.bfloat16)
    fused, ours = (attention(q, k, v, implementation).astype(float) for implementation in ATTENTION)
    np.testing.assert_allclose(fused, ours, rtol=0, atol=0.02)
    mask = jax.random.bernoulli(KEY, 0.5, (2, 1, 7, 7)) | jnp.eye(7, dtype=bool)[None, None]
    pair = [attention(q, k, v, name, scale=2.0, mask_BHLM=mask).astype(float) for name in ATTENTION]
    np.testing.assert_allclose(*pair, rtol=0, atol=0.03)
    assert np.abs(pair[1] - ours).max() > 0.1 and asked == ["cudnn"] * 2
    model, _, inputs = small_case()
    assert shapes(model.clone(attention="cudnn", dtype="bfloat16"), *inputs) == shapes(model, *inputs)
    with pytest.raises(ValueError, match="'cudnn' works in bfloat16 or float16, found float32; set dtype"):
        shapes(model.clone(attention="cudnn"), *inputs)
    with pytest.raises(ValueError, match="unknown implementation 'flash', expected one of"):
        shapes(model.clone(attention="flash"), *inputs)


def test_initial_values_are_the_authors():
    model = UViT(patch_size=2, width=64, depth=2, num_heads=4, num_classes=200, conditions=(("z2", 1),), time_mlp=True)
    cond = {"label": jnp.zeros(1, jnp.int32), "z2": jnp.zeros((1, 16, 16, 8))}
    params = jax.jit(functools.partial(init, model))(jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), cond)
    flat = weights.to_torch(params)
    uniform = {"patch_embed.proj": 12, "cond_embed_z2.proj": 8, "final_layer": 27}
    for name, array in flat.items():
        module, leaf = name.rsplit(".", 1) if "." in name else ("", name)
        if module in uniform:
            bound = uniform[module] ** -0.5
            assert np.abs(array).max() <= bound
            if array.size > 30:
                np.testing.assert_allclose(array.std(), bound / math.sqrt(3), rtol=0.15, err_msg=name)
            assert np.abs(array).max() > 0.4 * bound
        elif leaf == "bias":
            assert not array.any(), name
        elif "norm" in name:
            assert (array == 1).all(), name
        else:
            scale = 1.0 if name == "label_emb.weight" else 0.02
            np.testing.assert_allclose(array.std(), scale, rtol=0.2 if array.size < 1000 else 0.05, err_msg=name)
            if array.size > 10000:
                assert np.abs(array).max() > 3 * scale, name  # not cut at two standard deviations


# ---- sizes


@pytest.mark.parametrize(
    "variant, changes, channels, millions",
    [
        ("base", {}, 4, 104.14),
        ("base", dict(depth=16), 4, 134.84),
        ("S", {}, 3, 44.26),
        ("S", dict(num_classes=1000), 4, 44.77),
        ("S_deep", dict(num_classes=1000), 4, 58.43),
        ("M", dict(num_classes=1000), 4, 130.89),
        ("L", dict(num_classes=1000), 4, 286.76),
        ("H", dict(num_classes=1000), 4, 500.83),
        ("S", dict(text_dim=768, text_tokens=77), 4, 44.69),
    ],
)
def test_parameters_of_the_published_nets(variant, changes, channels, millions):
    model = UViT(patch_size=2, **{**VARIANTS[variant], **changes})
    cond = {"label": jnp.zeros(1, jnp.int32)} if model.num_classes else {}
    cond |= {"text": jnp.zeros((1, 77, 768))} if model.text_tokens else {}
    params = shapes(model, jnp.zeros((1, 32, 32, channels)), jnp.zeros(1), cond)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 2) == millions
    assert ("final_layer" in params) == (variant != "H")


def test_position_embedding_for_another_resolution():
    model, params, (x, t, cond) = small_case()
    extras = model.num_extra_tokens
    assert extras == 4
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        resize_position_embedding(params, (2, 3), (2, 3), extras), params,
    )  # fmt: skip
    rows = jnp.broadcast_to(jnp.asarray([1.0, 3.0])[:, None, None], (2, 3, 12)).reshape(1, 6, 12)
    old = jnp.concatenate([params["pos_embed"][:, :extras], rows, params["pos_embed"][:, extras + 6 :]], 1)
    larger = resize_position_embedding({**params, "pos_embed": old}, (2, 3), (4, 5), extras)
    new = larger["pos_embed"]
    np.testing.assert_array_equal(new[:, :extras], old[:, :extras])
    np.testing.assert_array_equal(new[:, extras + 20 :], old[:, extras + 6 :])
    grid = np.asarray(new[0, extras : extras + 20]).reshape(4, 5, 12)
    np.testing.assert_allclose(grid, np.broadcast_to(grid[:, :1, :1], grid.shape), atol=1e-5)  # columns were equal
    assert (np.diff(grid[:, 0, 0]) > 0).all() and abs(grid[:, 0, 0].mean() - 2) < 1e-5
    x_larger = jax.image.resize(x, (3, 8, 10, 5), "bilinear")
    assert apply(model, larger, x_larger, t, cond).shape == (3, 8, 10, 5)
    with pytest.raises(ValueError, match=r"shape \(8, 10, 5\) .* makes 28 tokens, pos_embed has 14; .*resize_position"):
        apply(model, params, x_larger, t, cond)
    with pytest.raises(ValueError, match="pos_embed has 14 tokens, expected at least 29"):
        resize_position_embedding(params, (5, 5), (2, 2), extras)


# ---- bad input


@pytest.mark.parametrize(
    "changes, cond_changes, words",
    [
        (dict(num_heads=5), {}, "width 12 is not divisible by num_heads 5"),
        (dict(text_tokens=0), {}, "text_dim 5 and text_tokens 0 go together"),
        ({}, {"label": None}, r"missing \['label'\], unknown \[\]; see num_classes"),
        ({}, {"z2": None}, r"missing \['z2'\]"),
        ({}, {"z4": jnp.zeros(3)}, r"missing \[\], unknown \['z4'\]"),
        ({}, {"text": jnp.zeros((3, 7, 5))}, r"text has shape \(3, 7, 5\), expected \(batch, 2, 5\)"),
        ({}, {"z2": jnp.zeros((3, 3, 4, 3))}, r"z2 has shape \(3, 3, 4, 3\), .* divisible by the patch size 2"),
        ({}, {"z2": jnp.zeros((3, 4, 3, 3))}, r"z2 has shape \(3, 4, 3, 3\), .* divisible by the patch size 2"),
        ({}, {"z3": jnp.zeros((3, 6))}, r"z3 has shape \(3, 6\), expected one array \(batch, height, width"),
        (dict(patch_size=4), {}, r"its input has shape \(3, 4, 6, 5\), .* divisible by the patch size 4"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(changes, cond_changes, words):
    model, _, (x, t, cond) = small_case()
    cond = {key: value for key, value in (cond | cond_changes).items() if value is not None}
    with pytest.raises(ValueError, match="^U-ViT: .*" + words) as caught:
        shapes(model.clone(**changes), x, t, cond)
    assert "\n" not in str(caught.value)


def test_a_variable_of_two_arrays_is_refused():
    model, _, (x, t, cond) = small_case()
    with pytest.raises(ValueError, match="U-ViT: its input has shape tuple, expected one array"):
        init(model, (x, x), t, cond)
