"""RCG's network for representations: against numpy with the authors' names (latentmlp.py of LTH14/rcg), and counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested.models.res_mlp import VARIANTS, ResMLP
from nested.modes import summary
from nested.weights import files as weights

QUICKLY = {"xla_backend_optimization_level": 0}
TINY = ResMLP(width=7, depth=2, time_width=4, mid_width=6, num_classes=3, label_width=5)


def shapes(model, *inputs):
    init = lambda *inputs: model.init(jax.random.key(0), *inputs, train=False)["params"]  # noqa: E731
    return jax.eval_shape(init, *inputs)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def apply(model, params, x, t, cond):
    return model.apply({"params": params}, x, t, cond, train=False)


def case(dtype=jnp.float32):
    """(state dict, x, t, cond) of TINY, all random; torch's names and layouts as the authors' modules give them."""
    random = np.random.default_rng(0)
    linear = {"input_proj": (7, 3), "time_embed.0": (4, 7), "time_embed.2": (4, 4), "out.2": (3, 7)}
    norms = {"out.0": 7}
    for i in range(2):
        block = {"in_layers.2": (6, 7), "emb_layers.1": (6, 4), "context_layers.1": (6, 5), "out_layers.3": (7, 6)}
        linear |= {f"res_blocks.{i}.{name}": shape for name, shape in block.items()}
        norms |= {f"res_blocks.{i}.in_layers.0": 7, f"res_blocks.{i}.out_layers.0": 6}
    sizes = {"label_emb.weight": (4, 5)}
    for name, shape in [*linear.items(), *((name, (size,)) for name, size in norms.items())]:
        sizes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = {name: np.float64(np.float32(random.normal(size=shape) * 0.5)) for name, shape in sizes.items()}
    x, t = jnp.asarray(random.normal(size=(3, 1, 1, 3)), dtype), jnp.asarray([0.0, 37.0, 999.0], dtype)
    return state, x, t, {"label": jnp.asarray([0, 3, 2])}


def filled(model, state, dtype, *inputs):
    """The state dict as the model's parameters."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights.from_torch(state, shapes(model, *inputs)))


def numpy_res_mlp(state, x, t, label):
    """SimpleMLP's forward pass: what its modules do, in their order."""

    def linear(name, y):
        return y @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, y, eps):
        y = y - y.mean(-1, keepdims=True)
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def silu(y):
        return y / (1 + np.exp(-y))

    angles = t[:, None] * 10000.0 ** (-np.arange(3) / 3)
    sinusoids = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((len(t), 1))], 1)
    e = linear("time_embed.2", silu(linear("time_embed.0", sinusoids)))
    y = linear("input_proj", x)
    for block in ("res_blocks.0.", "res_blocks.1."):
        h = linear(block + "in_layers.2", silu(norm(block + "in_layers.0", y, 1e-5)))
        h = h + linear(block + "emb_layers.1", silu(e))
        if label is not None:
            h = h + linear(block + "context_layers.1", silu(state["label_emb.weight"][label]))
        y = y + linear(block + "out_layers.3", silu(norm(block + "out_layers.0", h, 1e-5)))
    return linear("out.2", silu(norm("out.0", y, 1e-6)))


@pytest.mark.parametrize("classes", [3, 0])
def test_it_is_what_the_equations_say_with_the_authors_names(classes, x64):
    state, x, t, cond = case(jnp.float64)
    model, label = TINY.clone(num_classes=classes), np.asarray(cond["label"]) if classes else None
    if not classes:
        cond = {}
        state = {name: leaf for name, leaf in state.items() if "context" not in name and "label" not in name}
    params = filled(model, state, jnp.float64, x, t, cond)
    expected = numpy_res_mlp(state, np.asarray(x)[:, 0, 0], np.asarray(t), label)
    out = apply(model, params, x, t, cond)
    np.testing.assert_allclose(out[:, 0, 0], expected, rtol=0, atol=1e-12)
    exported = weights.to_torch(params)
    assert exported.keys() == state.keys()


def published(**changes):
    model = ResMLP(**VARIANTS["l12_w1536"], **changes)
    cond = {"label": jnp.zeros(1, jnp.int32)} if model.num_classes else {}
    inputs = jax.ShapeDtypeStruct((1, 1, 1, 256), jnp.float32), jnp.zeros(1), cond
    return model, shapes(model, *inputs), inputs


def test_parameters_and_multiply_accumulates_of_the_published_networks():
    """config/rdm/*l12_w1536.yaml: 12 blocks, 1536 wide, time 256; *_classcond.yaml with classes of 512 numbers."""
    linear = lambda fan_in, fan_out: fan_in * fan_out + fan_out  # noqa: E731
    block = 2 * 2 * 1536 + 2 * linear(1536, 1536) + linear(256, 1536)
    ends = linear(1536, 256) + linear(256, 256) + linear(256, 1536) + 2 * 1536 + linear(1536, 256)
    model, params, inputs = published()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 12 * block + ends == 62_721_280
    with_classes = published(num_classes=1000)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(with_classes)) == 62_721_280 + 12 * linear(512, 1536) + 1001 * 512
    macs = summary.count_macs(functools.partial(model.apply, train=False), {"params": params}, *inputs)
    products = 12 * (2 * 1536**2 + 256 * 1536) + 1536 * 256 + 256**2 + 2 * 256 * 1536
    assert macs == products + 25 * summary.LAYER_NORM_MACS * 1536
    assert model.num_tokens((1, 1, 256)) == 1


def test_initial_values_are_the_authors_and_the_output_is_zero():
    model = ResMLP(width=64, depth=1, time_width=32, mid_width=48, num_classes=200, label_width=16)
    inputs = jnp.ones((1, 1, 1, 8)), jnp.full(1, 500.0), {"label": jnp.zeros(1, jnp.int32)}
    init = jax.jit(lambda: model.init(jax.random.key(0), *inputs, train=False)["params"], compiler_options=QUICKLY)
    params = init()
    assert not apply(model, params, *inputs).any()
    state = weights.to_torch(params)
    fan_in = {name.removesuffix(".weight"): leaf.shape[1] for name, leaf in state.items() if leaf.ndim == 2}
    for name, leaf in state.items():
        layer, kind = name.rsplit(".", 1)
        if layer == "label_emb":
            np.testing.assert_allclose(leaf.std(), 1.0, rtol=0.05)
        elif layer.endswith((".0.in_layers.0", "out_layers.0", "out.0")):
            assert (leaf == (kind == "weight")).all(), name
        elif layer.endswith(("out_layers.3", "out.2")):
            assert not leaf.any(), name
        else:
            bound = fan_in[layer] ** -0.5
            assert 0.85 * bound < np.abs(leaf).max() <= bound, name


def test_bfloat16_keeps_norms_in_float32_and_remat_covers_the_blocks():
    state, *inputs = case()
    model = TINY.clone(dtype=jnp.bfloat16, remat=True)
    params = filled(model, state, jnp.float32, *inputs)
    jaxpr = jax.make_jaxpr(functools.partial(model.apply, train=False))({"params": params}, *inputs)
    found = {"dot_general": set(), "rsqrt": set(), "cos": set(), "remat2": 0, "checkpoint": 0}
    for equation in jaxpr.eqns:
        inner = equation.params["jaxpr"].eqns if equation.primitive.name in ("remat2", "checkpoint") else [equation]
        found["checkpoint"] += inner != [equation]
        for one in inner:
            if one.primitive.name in ("dot_general", "rsqrt", "cos"):
                found[one.primitive.name].add(str(one.invars[0].aval.dtype))
    assert (found["dot_general"], found["rsqrt"], found["cos"]) == ({"bfloat16"}, {"float32"}, {"float32"})
    assert found["checkpoint"] == 2
    exact, half = apply(TINY, params, *inputs), apply(model, params, *inputs)
    assert half.dtype == jnp.float32 and 1e-4 < np.abs(half - exact).max() / np.abs(exact).max() < 0.05
    np.testing.assert_allclose(apply(TINY.clone(remat=True), params, *inputs), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, shape, cond, message",
    [
        ({}, (3, 2, 2, 3), None, r"ResMLP: found shape \(2, 2, 3\) and patch_size 1, expected \(1, 1, channels\)"),
        (dict(patch_size=2), (3, 2, 2, 3), None, r"ResMLP: found shape \(2, 2, 3\) and patch_size 2"),
        (dict(conditions=(("z", 1),)), (3, 1, 1, 3), None, r"ResMLP takes no coarser levels, conditions has \['z'\]"),
        ({}, (3, 3), None, r"ResMLP: its input has shape \(3, 3\), expected one array \(batch, 1, 1, channels\)"),
        ({}, (3, 1, 1, 3), {}, r"ResMLP: cond has \[\], expected \['label'\] with num_classes 3"),
        (dict(num_classes=0), (3, 1, 1, 3), None, r"ResMLP: cond has \['label'\], expected \[\] with num_classes 0"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(changes, shape, cond, message):
    _, _, t, fitting = case()
    model = TINY.clone(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        shapes(model, jnp.zeros(shape), t, fitting if cond is None else cond)
    assert "\n" not in str(caught.value)
