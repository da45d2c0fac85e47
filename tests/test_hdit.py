"""HDiT against the authors' code (goldens), by algebra, and what it refuses."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested.diffusion.process import Process
from nested.diffusion.schedules import ExponentialVE
from nested.models import hdit_blocks as blocks
from nested.models.hdit import HDiT, merge_tokens, split_tokens
from nested.weights import files as weights

MODELS = ("l2_k7", "l2_na_cls", "l3_swin", "norope", "plain_gelu", "single_gray")
KINDS = {"global": "global", "neighborhood": "neighborhood", "shifted-window": "shifted_window", "none": "none"}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, x, c_noise, cond):
    return model.apply({"params": params}, x, c_noise, cond, train=False)


def shapes(model, x, cond):
    init = lambda: model.init(jax.random.key(0), x, jnp.zeros(len(x)), cond, train=False)["params"]  # noqa: E731
    return jax.eval_shape(init)


def stirred(template, dtype=jnp.float32):
    """Every parameter random, so that every path matters; gains are positive (attention takes their root)."""
    random = np.random.default_rng(1)

    def leaf(path, like):
        values = 0.3 * random.normal(size=like.shape) + 0.1
        return jnp.asarray(np.abs(values) if path[-1].key == "gain" else values, dtype)

    return jax.tree_util.tree_map_with_path(leaf, template)


# ---- the authors' code


@dataclasses.dataclass
class Golden:
    """A recorded model with its inputs in `dtype`."""

    data: dict
    dtype: type

    def __post_init__(self):
        meta = json.loads(str(self.data["meta"]))
        options, attention = meta["config"]["model"], meta["config"]["model"]["self_attns"]
        self.model = HDiT(
            patch_size=tuple(options["patch_size"]),
            depths=tuple(options["depths"]),
            widths=tuple(options["widths"]),
            attentions=tuple(KINDS[spec["type"]] for spec in attention),
            windows=tuple(spec.get("kernel_size", spec.get("window_size", 0)) for spec in attention),
            head_widths=tuple(spec.get("d_head", 64) for spec in attention),
            ff_widths=tuple(options["d_ffs"]),
            mapping_depth=options["mapping_depth"],
            mapping_width=options["mapping_width"],
            mapping_ff_width=options["mapping_d_ff"],
            mapping_cond_dim=options["mapping_cond_dim"],
            num_classes=meta["config"]["dataset"]["num_classes"],
            feed_forward="gelu" if "exact-GELU" in meta["note"] else "geglu",
        )
        self.process = Process(
            (ExponentialVE(),), "edm", "edm", "soft_min_snr", discrete_steps=0, time_scale=0.25,
            noise_input="log_sigma", sigma_data=options["sigma_data"],
        )  # fmt: skip
        self.sigma = jnp.asarray(self.data["in/sigma"], self.dtype)
        self.t = self.process.schedules[0].inverse_log_snr(-jnp.log(self.sigma))
        self.cond = {"augment": jnp.asarray(self.data["in/aug_cond"], self.dtype)}
        if "in/class_cond" in self.data:
            self.cond["label"] = jnp.asarray(self.data["in/class_cond"])
        if "in/mapping_cond" in self.data:
            self.cond["mapping"] = jnp.asarray(self.data["in/mapping_cond"], self.dtype)
        self.tensors = {name[2:]: array for name, array in self.data.items() if name.startswith("p/")}
        template = shapes(self.model, self["in/x"], self.cond)
        params = weights.from_torch(self.tensors, template)
        self.params = jax.tree.map(lambda array: jnp.asarray(array, self.dtype), params)

    def __getitem__(self, name):
        """An array of images, channels last."""
        return jnp.asarray(self.data[name].transpose(0, 2, 3, 1), self.dtype)

    def network(self, x, params=None):
        return apply(self.model, params or self.params, x, jnp.log(self.sigma) / 4, self.cond)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_the_authors_outputs_in_float64(golden, x64, name):
    case = Golden(golden(f"hdit_model_{name}.npz"), jnp.float64)
    x = case["in/x"]
    close(case.network(x), case["out/inner_f64"], 1e-12)
    x0 = case.process.to_x0(case.network(case.process.network_input(x, case.t)), x, case.t)
    close(x0, case["out/denoised_f64"], 1e-12)
    case.cond["augment"] = jnp.zeros_like(case.cond["augment"])
    close(case.network(x), case["out/inner_noaug_f64"], 1e-12)


def test_the_authors_outputs_in_float32_and_no_augmentation_is_one_of_zeros(golden):
    case = Golden(golden("hdit_model_l2_k7.npz"), jnp.float32)
    close(case.network(case["in/x"]), case["out/inner_f32"], 2e-4)
    del case.cond["augment"]
    close(case.network(case["in/x"]), case["out/inner_noaug_f64"], 2e-4)


@pytest.mark.parametrize("name", ["l2_k7", "l3_swin"])
def test_the_authors_losses_and_gradients(golden, x64, name):
    case = Golden(golden(f"hdit_model_{name}.npz"), jnp.float64)
    x0, noise = case["in/images"], case["in/noise"]
    x_t = case.process.corrupt(x0, noise, case.t)

    def soft_min_snr(params):
        raw = case.model.apply(
            {"params": params}, case.process.network_input(x_t, case.t), case.process.c_noise(case.t), case.cond,
            train=True,
        )  # fmt: skip
        return jnp.mean(case.process.loss(raw, x0, noise, x_t, case.t)), raw

    (_, raw), gradients = jax.jit(jax.value_and_grad(soft_min_snr, has_aux=True))(case.params)
    for weighting in ("soft_min_snr", "snr", "karras"):
        process = dataclasses.replace(case.process, weighting=weighting)
        loss = process.loss(raw, x0, noise, x_t, case.t)
        np.testing.assert_allclose(loss, case.data[f"loss/{weighting.replace('_', '-')}"], rtol=1e-12)
    ours = weights.to_torch(gradients)
    recorded = {name[5:]: array for name, array in case.data.items() if name.startswith("grad/")}
    for name, expected in recorded.items():  # stored in float32
        close(ours[name], expected, 1e-6 * max(np.abs(expected).max(), 1e-3))
    constants = set(ours) - set(recorded)
    assert constants == {name for name in ours if name.endswith(("freqs", "time_emb.weight", "aug_emb.weight"))}
    assert all(np.all(ours[name] == 0) for name in constants)


def test_state_dicts_come_back_as_they_were(golden):
    case = Golden(golden("hdit_model_l2_na_cls.npz"), jnp.float32)
    back = weights.to_torch(case.params)
    assert set(back) == set(case.tensors)
    assert all(np.array_equal(back[name], tensor) for name, tensor in case.tensors.items())


def test_positions_and_angles(golden, x64):
    data = golden("hdit_rope.npz")
    cases = json.loads(str(data["meta"]))["cases"]
    for i, case in enumerate(cases):
        close(blocks.rope_frequencies(case["n_heads"], case["d_head"]), data[f"c{i}/freqs"], 1e-13)
    for i in (3, 4):
        positions = blocks.axial_positions(cases[i]["h"], cases[i]["w"])
        close(positions, data[f"c{i}/pos"], 1e-15)
        close(blocks.halved(positions), data[f"c{i}/pos_down"], 1e-15)
        rope = blocks.AxialRoPE(cases[i]["n_heads"], cases[i]["d_head"])
        theta = rope.apply({"params": {"freqs": jnp.asarray(data[f"c{i}/freqs"])}}, positions)
        close(theta, data[f"c{i}/theta"], 1e-13)
        close(blocks.rotate(jnp.asarray(data[f"c{i}/x"]), theta), data[f"c{i}/y"], 1e-13)
    for name in (name for name in data if name.startswith("axial_pos/")):
        height, width = map(int, name.split("/")[1].split("x"))
        close(blocks.axial_positions(height, width), data[name], 1e-15)


# ---- algebra


def test_windows_follow_from_the_attentions():
    model = HDiT(2, depths=(1, 1, 1), widths=(8, 8, 8), attentions=("neighborhood", "shifted_window", "global"))
    assert [model.level_options(level).window for level in range(3)] == [7, 8, 0]
    assert model.clone(windows=(3, 4, 0)).level_options(1).window == 4


def tiny(**changes):
    options = dict(
        patch_size=2, depths=(1, 1), widths=(16, 24), attentions=("neighborhood", "global"), windows=(3, 0),
        head_widths=8, mapping_depth=1, mapping_width=16,
    )  # fmt: skip
    return HDiT(**options | changes)


IMAGES = jax.random.normal(jax.random.key(2), (2, 8, 12, 1))
C_NOISE = jnp.array([-0.3, 0.8])


def test_the_output_is_zero_at_the_start_and_buffers_are_named():
    model = tiny()
    params = jax.jit(lambda: model.init(jax.random.key(0), IMAGES, C_NOISE, {}, train=False)["params"])()
    assert not np.any(apply(model, params, IMAGES, C_NOISE, {}))
    assert params["splits_0"]["fac"] == 0.5 and np.all(params["mid_level_0"]["self_attn"]["gain"] == 10)
    bound = 1 / math.sqrt(16)
    assert 0.9 * bound < np.abs(params["down_levels_0_0"]["ff"]["up_proj"]["kernel"]).max() <= bound
    np.testing.assert_allclose(np.std(params["aug_emb"]["weight"]), 1, atol=0.3)
    close(params["mid_level_0"]["self_attn"]["pos_emb"]["freqs"], blocks.rope_frequencies(3, 8), 1e-5)


def test_merging_is_undone_by_splitting_and_rows_come_first():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    merged = merge_tokens(x, (2, 3))
    assert merged.shape == (2, 2, 2, 18) and np.array_equal(split_tokens(merged, (2, 3)), x)
    assert np.array_equal(merged[0, 0, 0].reshape(2, 3, 3), x[0, :2, :3])


@pytest.mark.parametrize("skip", ["lerp", "add", "concat"])
def test_skips(skip):
    """With a split that adds nothing, the last level cannot be seen; the skip goes through as its rule says."""
    model = tiny(skip=skip)
    params = stirred(shapes(model, IMAGES, {}))
    params["splits_0"]["proj"]["kernel"] = jnp.zeros_like(params["splits_0"]["proj"]["kernel"])
    if skip == "concat":
        kernel = jnp.concatenate([jnp.eye(16), 5 * jnp.eye(16)])
        params["splits_0"]["skip_proj"]["kernel"] = kernel
    elif skip == "lerp":
        params["splits_0"]["fac"] = jnp.zeros(1)  # f is the weight of the branch that comes up
    plain = apply(model, params, IMAGES, C_NOISE, {})
    params["mid_level_0"]["ff"]["up_proj"]["kernel"] += 1
    assert np.array_equal(apply(model, params, IMAGES, C_NOISE, {}), plain)
    if skip == "lerp":
        params["splits_0"]["fac"] = jnp.ones(1)
        half = apply(model, params, IMAGES, C_NOISE, {})
        assert not np.allclose(half, plain)
    one_level = tiny(depths=(2,), widths=(16,), attentions=("neighborhood",), windows=(3,))
    flat = {name: tree for name, tree in params.items() if not name.startswith(("mid_level", "merges", "splits"))}
    flat["mid_level_0"], flat["mid_level_1"] = flat.pop("down_levels_0_0"), flat.pop("up_levels_0_0")
    close(apply(one_level, flat, IMAGES, C_NOISE, {}), plain, 1e-5)


def test_additive_positions_break_the_symmetry_that_no_positions_have():
    model = tiny(position="additive", attentions=("global", "global"), windows=(0, 0))
    template = shapes(model, IMAGES, {})
    assert template["pos_embed"].shape == (1, 4, 6, 16) and "pos_emb" not in template["mid_level_0"]["self_attn"]
    params = stirred(template)
    mirror = lambda p: apply(model, p, IMAGES[:, :, ::-1], C_NOISE, {})[:, :, ::-1]  # noqa: E731
    flat = {**params, "pos_embed": jnp.ones_like(params["pos_embed"])}
    for name in ("patch_in", "patch_out", "merges_0", "splits_0"):  # mean over the pixels of a patch: no order in it
        kernel = flat[name]["proj"]["kernel"]
        flat[name] = {**flat[name], "proj": {"kernel": jnp.ones_like(kernel)}}
    close(mirror(flat), apply(model, flat, IMAGES, C_NOISE, {}), 1e-4)
    lifted = {**flat, "pos_embed": params["pos_embed"]}
    assert np.abs(mirror(lifted) - apply(model, lifted, IMAGES, C_NOISE, {})).max() > 1e-3


def test_every_kind_of_attention_sees_as_far_as_it_should():
    """One layer of 1 x 1 patches, 8 x 8: which outputs change when pixel (0, 0) does."""
    x = jax.random.normal(jax.random.key(3), (1, 8, 8, 1))
    moved = x.at[0, 0, 0].multiply(-1)  # the norm of one channel keeps the sign alone
    reach = {}
    for kind, window in (("global", 0), ("neighborhood", 5), ("shifted_window", 4), ("none", 0)):
        model = tiny(patch_size=1, depths=(1,), widths=(16,), attentions=(kind,), windows=(window,))
        params = stirred(shapes(model, x, {}))
        out, after = (apply(model, params, image, C_NOISE[:1], {}) for image in (x, moved))
        reach[kind] = np.abs(after - out)[0, :, :, 0] > 1e-7
    rows, columns = np.indices((8, 8))
    assert reach["global"].all()
    assert np.array_equal(reach["neighborhood"], (rows < 3) & (columns < 3))  # windows start at 0 for rows 0, 1, 2
    assert np.array_equal(reach["shifted_window"], (rows < 4) & (columns < 4))
    assert np.array_equal(reach["none"], (rows == 0) & (columns == 0))


def test_shifted_windows_separate_what_wrapped():
    q = k = jnp.zeros((1, 8, 8, 1, 8))
    cells = jnp.arange(64.0).reshape(1, 8, 8, 1, 1) * jnp.ones((1, 1, 1, 1, 8))
    out = blocks.shifted_window_attention(q, k, cells, 4, 2, "xla")[0, :, :, 0, 0]
    grid = np.arange(64.0).reshape(8, 8)
    assert out[0, 0] == grid[:2, :2].mean() and out[7, 7] == grid[6:, 6:].mean() and out[0, 7] == grid[:2, 6:].mean()
    assert out[3, 3] == grid[2:6, 2:6].mean()


def test_coarser_levels_are_seen_and_dropped():
    model = tiny(conditions=(("vector", 1), ("grid", 1)))
    variables = {"vector": jnp.ones((2, 1, 1, 3)), "grid": jax.random.normal(jax.random.key(1), (2, 2, 3, 4))}
    kept = {f"keep_{name}": jnp.ones(2, bool) for name in variables}
    cond = variables | kept
    template = shapes(model, IMAGES, cond)
    assert "cond_grid_proj_grid" in template and "cond_grid_proj_vector" not in template
    params = stirred(template)
    params["cond_in_proj_grid"]["kernel"] *= 0  # the grid through its place alone
    out = apply(model, params, IMAGES, C_NOISE, cond)
    assert np.array_equal(out, apply(model, params, IMAGES, C_NOISE, variables))
    for name in variables:
        changed = apply(model, params, IMAGES, C_NOISE, cond | {name: variables[name] * 2})
        assert np.abs(changed - out).max() > 1e-3
        dropped = cond | {f"keep_{name}": jnp.array([True, False])}
        gone = apply(model, params, IMAGES, C_NOISE, dropped)
        assert np.array_equal(gone[0], out[0]) and np.abs(gone[1] - out[1]).max() > 1e-3
        other = apply(model, params, IMAGES, C_NOISE, dropped | {name: variables[name] * 2})
        close(other[1], gone[1], 1e-6)


def test_dropout_belongs_to_its_row_and_to_training():
    model = tiny(dropouts=(0.5, 0.3), mapping_dropout=0.2)
    assert model.has_dropout and not tiny().has_dropout
    params = stirred(shapes(model, IMAGES, {}))
    cond = {"dropout": jax.random.split(jax.random.key(5), 2)}
    run = jax.jit(lambda x, c, cond, train: model.apply({"params": params}, x, c, cond, train=train), static_argnums=3)
    out = run(IMAGES, C_NOISE, cond, True)
    close(run(IMAGES[1:], C_NOISE[1:], {"dropout": cond["dropout"][1:]}, True)[0], out[1], 1e-5)
    assert np.abs(out - run(IMAGES, C_NOISE, {"dropout": cond["dropout"][::-1]}, True)).max() > 1e-3
    assert np.array_equal(run(IMAGES, C_NOISE, cond, False), run(IMAGES, C_NOISE, {}, False))
    x = jnp.ones((4, 5000))
    dropped = blocks.dropout(x, 0.3, jax.random.split(jax.random.key(6), 4), 0)
    np.testing.assert_allclose((dropped == 0).mean(), 0.3, atol=0.02)
    np.testing.assert_allclose(dropped.mean(), 1.0, atol=0.02)
    assert not np.array_equal(dropped, blocks.dropout(x, 0.3, jax.random.split(jax.random.key(6), 4), 1))


def test_remat_and_bfloat16():
    model = tiny(num_classes=3)
    cond = {"label": jnp.array([0, 3])}
    params = stirred(shapes(model, IMAGES, cond))

    def gradient(model):
        def loss(p):
            return jnp.sum(jnp.square(model.apply({"params": p}, IMAGES, C_NOISE, cond, train=True)))

        return jax.jit(jax.grad(loss))(params)

    plain, again = gradient(model), gradient(tiny(num_classes=3, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, again)
    half = tiny(num_classes=3, dtype=jnp.bfloat16)
    out, exact = (apply(m, params, IMAGES, C_NOISE, cond) for m in (half, model))
    assert out.dtype == jnp.float32 and 0 < np.std(out - exact) < 0.1 * np.std(exact)
    assert np.abs(apply(model, params, IMAGES, C_NOISE, {"label": jnp.array([1, 3])}) - exact)[0].max() > 1e-3


def test_state_dicts_without_attention_and_with_a_mapping_condition():
    """Names of models that no recorded file here has: a level of feed-forwards, oblong patches, a mapping vector."""
    model = tiny(patch_size=(2, 4), attentions=("none", "global"), windows=(0, 0), head_widths=(64, 8), depths=(2, 1),
                 mapping_cond_dim=5)  # fmt: skip
    x, cond = jnp.tile(IMAGES, (1, 1, 2, 1))[:, :, :16], {"mapping": jnp.ones((2, 5))}
    params = stirred(shapes(model, x, cond))
    names = weights.to_torch(params)
    assert names["mapping_cond_in_proj.weight"].shape == (16, 5) and names["patch_in.proj.weight"].shape == (16, 8)
    assert not any("self_attn" in name for name in names if name.startswith(("down_levels", "up_levels.0")))
    assert {"down_levels.0.1.ff.up_proj.weight", "mid_level.0.self_attn.pos_emb.freqs"} < set(names)
    out, other = (apply(model, params, x, C_NOISE, {"mapping": m * jnp.ones((2, 5))}) for m in (1.0, 2.0))
    assert out.shape == x.shape and np.abs(out - other).max() > 1e-4


def test_training_with_dropout_wants_its_keys():
    model = tiny(dropouts=0.1)
    params = stirred(shapes(model, IMAGES, {}))
    with pytest.raises(ValueError, match="training with dropout needs cond\\['dropout'\\]"):
        model.apply({"params": params}, IMAGES, C_NOISE, {}, train=True)


@pytest.mark.parametrize(
    "changes, cond, message",
    [
        (dict(windows=(7, 0)), {}, "HDiT: level 0 (4x6 tokens): kernel 7 must be at least 1 and at most the level's"),
        (dict(windows=((3, 7), 0)), {}, "level 0 (4x6 tokens): kernel (3, 7) must be"),
        (dict(attentions=("shifted_window", "global"), windows=(4, 0)), {}, "window 4 must be a number that divides"),
        (dict(windows=(3, 5)), {}, "level 1 (2x3 tokens): windows has 5, 'global' attention has none; set 0"),
        (dict(patch_size=(8, 4), windows=(1, 0)), {}, "level 0 has 1x3 tokens, which do not merge 2x2"),
        (dict(patch_size=5), {}, "height and width divisible by patch_size 5"),
        (dict(head_widths=4), {}, "head width 4 must be a multiple of 8 that divides the width 16"),
        (dict(head_widths=16), {}, "level 1 (2x3 tokens): head width 16 must be a multiple of 8 that divides"),
        (dict(depths=(1, 1, 1)), {}, "HDiT: widths (16, 24) has 2 entries, depths (1, 1, 1) 3"),
        (dict(mapping_width=15), {}, "mapping_width 15 is odd"),
        (dict(num_classes=3), {}, "cond has [], expected ['label'] (optional ['augment', 'dropout']): missing ['lab"),
        (dict(mapping_cond_dim=3), {}, "missing ['mapping']"),
        (dict(conditions=(("z", 1),)), {}, "missing ['z']"),
        ({}, {"label": jnp.zeros(2, int)}, "unknown ['label']"),
        (dict(skip="sum"), {}, "HDiT: skip 'sum', expected one of lerp, add, concat"),
        (dict(attentions=("local", "global")), {}, "attention 'local', expected one of global, neighborhood"),
        (dict(neighborhood="fast"), {}, "fast"),
        (dict(depths=(0, 1)), {}, "HDiT: depths (0, 1), widths (16, 24)"),
        (dict(head_widths=0), {}, "head_widths 0: expected 1 or more"),
        (dict(dropouts=(0.0, 1.0)), {}, "HDiT: dropouts (0.0, 1.0), mapping_dropout 0.0: expected rates in [0, 1)"),
        (dict(windows=((3,), 0)), {}, "window (3,), expected a number or (rows, columns)"),
        (dict(num_classes=3), {"label": jnp.zeros(1, int)}, "HDiT: cond['label'] has shape (1,), expected (2,)"),
        ({}, {"augment": jnp.zeros((1, 9))}, "HDiT: cond['augment'] has shape (1, 9), expected (2, 9)"),
        (dict(conditions=(("z", 1),)), {"z": jnp.zeros((2, 3))}, "the condition z must be one array (batch 2, height"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, cond, message):
    with pytest.raises(ValueError) as error:
        shapes(tiny(**changes), IMAGES, cond)
    assert message in str(error.value) and "\n" not in str(error.value)
