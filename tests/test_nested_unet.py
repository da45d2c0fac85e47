"""NestedUNet against the authors' code (goldens), by algebra, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_nests import (
    C_NOISE,
    CLIP,
    FRAMES,
    HIGH,
    INNER,
    LOW,
    OUTER,
    TEXT,
    apply,
    close,
    shapes,
    stirred,
    tiny,
    with_text,
)

from nested.models import unet_blocks as blocks
from nested.models.nested_unet import NestedUNet
from nested.models.unet_nets import Net
from nested.ops.mixed_rows import take_rows
from nested.weights import files as weights

# ---- the authors' code


def recorded_net(config) -> Net:
    temporal = config["temporal_mode"] and not config["temporal_spatial_ds"]
    attention = [n if i in config["attention_levels"] else 0 for i, n in enumerate(config["num_attention_layers"])]
    micro = filter(None, (config["micro_conditioning"] or "").split(","))
    return Net(
        channels=tuple(config["resolution_channels"]),
        resnets=tuple(config["num_resnets_per_resolution"]),
        attention=tuple(attention),
        temporal_attention=tuple(config["num_temporal_attention_layers"] or ()),
        kind="temporal" if temporal else "spatial",
        normalize_input=not config.get("skip_normalization", True),
        attention_ffn=config["resnet_config"]["use_attention_ffn"],
        micro=tuple((entry.split(":")[0], float(entry.split(":")[1])) for entry in micro),
        groups=config["resnet_config"]["num_groups_norm"],
        rotary=config["temporal_positional_encoding"],
    )


class Golden:
    """A recorded model with its inputs in `dtype`, channels last."""

    def __init__(self, data, dtype=jnp.float32, kind=NestedUNet):
        self.data, self.dtype = data, dtype
        configs = [json.loads(str(data["config_json"]))]
        while "inner_config" in configs[-1]:
            configs.append(configs[-1]["inner_config"])
        inner = configs[-1]
        self.model = kind(
            nets=tuple(recorded_net(config) for config in reversed(configs)),
            time_width=inner["temporal_dim"],
            text_width=max(inner["conditioning_feature_dim"], 0),
            text_proj=max(inner["conditioning_feature_proj_dim"], 0),
            lm_layers=inner["num_lm_head_layers"],
            masked_cross_attention=bool(inner["masked_cross_attention"]),
        )
        self.c_noise = jnp.asarray(data["in/t"], dtype)
        self.cond = {name[3:]: jnp.asarray(data[name], dtype) for name in data if name.startswith("in/micro_")}
        if self.model.text_width:
            self.cond |= {"text": jnp.asarray(data["in/cond"], dtype), "text_mask": jnp.asarray(data["in/mask"], dtype)}
        self.tensors = {name[2:]: array for name, array in data.items() if name.startswith("w/")}

    def __getitem__(self, name):
        return jnp.asarray(np.moveaxis(self.data[name], -3, -1), self.dtype)

    def params(self, x):
        params = weights.from_torch(self.tensors, shapes(self.model, x, self.cond))
        return jax.tree.map(lambda array: jnp.asarray(array, self.dtype), params)

    def __call__(self, x, params=None, **cond):
        return apply(self.model, self.params(x) if params is None else params, x, self.c_noise, self.cond | cond)


def test_the_authors_unet(golden):
    case = Golden(golden("mdm_unet_notext.npz"))
    params = case.params(case["in/x"])
    close(case(case["in/x"], params), case["out/y"])
    del case.cond["micro_scale"]
    close(case(case["in/x"], params), case["out/y_default_micro"])
    back = weights.to_torch(params)
    assert set(back) == set(case.tensors)
    assert all(np.array_equal(back[name], tensor) for name, tensor in case.tensors.items())


def test_the_authors_nest_of_two_with_text(golden):
    """Also with normalised input, with two of three high resolutions, and with adapters of 0."""
    case = Golden(golden("mdm_nested2.npz"))
    x = (case["in/x16"], case["in/x32"])
    params = case.params(x)
    zeroed = params | {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("in_adapter", "out_adapter")}
    runs = {
        "": case(x, params),
        "_mixed2of3": case((x[0], take_rows(x[1], 2)), params),
        "_zero_adapters": case(x, zeroed),
    }
    outer = dataclasses.replace(case.model.nets[1], normalize_input=True)
    case.model = case.model.clone(nets=(case.model.nets[0], outer))
    runs["_normalized"] = case(x, params)
    for name, (low, high) in runs.items():
        close(low, case[f"out/y16{name}"])
        close(high, case[f"out/y32{name}"])


def test_the_authors_nest_in_float64(golden, x64):
    """Differs from float32 by float32's rounding alone, in either direction."""
    case = Golden(golden("mdm_nested2.npz"), jnp.float64)
    low, high = case((case["in/x16"], case["in/x32"]))
    assert low.dtype == high.dtype == jnp.float64
    close(low, case["out/y16"], 3e-6)
    close(high, case["out/y32"], 3e-6)


def frames_of(grid):
    """[B, T, H / n, W / n, C] of [B, H, W, C]: n x n = T = 4 pictures, rows first."""
    B, H, W, C = grid.shape
    return grid.reshape(B, 2, H // 2, 2, W // 2, C).swapaxes(2, 3).reshape(B, 4, H // 2, W // 2, C)


class GridAdapters(NestedUNet):
    """As ml-mdm computes clips: the adapters see the frames side by side, in one picture."""

    def adapter(self, name, features, x_RHWC):
        if self.nets[-1].kind == "temporal":
            return super().adapter(name, features, x_RHWC)
        R, H, W, C = x_RHWC.shape
        grid = x_RHWC.reshape(R // 4, 2, 2, H, W, C).swapaxes(2, 3).reshape(R // 4, 2 * H, 2 * W, C)
        return frames_of(super().adapter(name, features, grid)).reshape(R, H, W, features)


@pytest.mark.parametrize("kind, suffix", [(NestedUNet, "_framewise"), (GridAdapters, "")])
def test_the_authors_clip_nest(golden, kind, suffix):
    case = Golden(golden("mdm_video_t4s2.npz"), kind=kind)
    low, frames, high = case((case["in/x_low"], case["in/frames"], case["in/frames_hi"]))
    close(low, case[f"out/low{suffix}"])
    close(frames, frames_of(case[f"out/grid{suffix}"]))
    close(high, frames_of(case[f"out/grid_hi{suffix}"]))


# ---- a small nest


def test_all_outputs_and_adapters_start_at_zero_and_the_rest_as_torch_does():
    model = with_text(INNER, OUTER, num_classes=3, conditions=(("z", None),))
    cond = TEXT | {"label": jnp.arange(4), "z": LOW, "noise_step_z": C_NOISE}
    params = jax.jit(lambda: model.init(jax.random.key(0), (LOW, HIGH), C_NOISE, cond, train=False)["params"])()
    assert all(np.all(out == 0) for out in apply(model, params, (LOW, HIGH), C_NOISE, cond))
    zeros, state = set(), weights.to_torch(params)
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if tensor.ndim == 1 and f"{module}.weight" in state and state[f"{module}.weight"].ndim == 1:  # norms
            assert np.all(tensor == (leaf == "weight"))
        elif not tensor.any():
            zeros.add(module.removeprefix("inner_unet."))
        elif name != "inner_unet.class_emb.weight":
            bound = state[f"{module}.weight"][0].size ** -0.5
            assert 0.75 * bound < np.abs(tensor).max() <= bound, name
    ends = ("conv2", "proj_out", "ffn.3", "mlp.main.3", "conv_out", "in_adapter", "out_adapter", "scale.1", "score.1",
            "level_z.1")  # fmt: skip
    assert all(name.endswith(ends) for name in zeros) and all(any(n.endswith(end) for n in zeros) for end in ends)


def test_a_smaller_model_continues_unchanged_inside_new_nets():
    model, small = tiny(), tiny(INNER)
    params = stirred(shapes(model, (LOW, HIGH), {}))
    assert jax.tree.structure(params["inner_unet"]) == jax.tree.structure(shapes(small, LOW, {}))
    for name in ("in_adapter", "out_adapter"):
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    x = (LOW[:1], HIGH[:1])  # not compiled: a compiler orders the sums of two programs in two ways
    low, high = model.apply({"params": params}, x, C_NOISE[:1], {}, train=False)
    before = small.apply({"params": params["inner_unet"]}, x[0], C_NOISE[:1], {}, train=False)
    assert np.array_equal(low, before) and high.shape == x[1].shape
    (alone,) = apply(small, params["inner_unet"], x[:1], C_NOISE[:1], {})  # a tuple of one
    close(alone, before)


def test_rows_without_the_high_resolution_see_no_features():
    model = with_text(INNER, OUTER)
    params = stirred(shapes(model, (LOW, HIGH), TEXT))
    low, high = apply(model, params, (LOW, take_rows(HIGH, 2)), C_NOISE, TEXT)
    for row in range(4):
        cond = {name: value[row : row + 1] for name, value in TEXT.items()}
        if row % 2 == 0:
            x = (LOW[row : row + 1], HIGH[row : row + 1])
            alone, alone_high = apply(model, params, x, C_NOISE[row : row + 1], cond)
            close(high[row // 2], alone_high[0])
        else:
            inner = model.clone(nets=(INNER,))
            alone = apply(inner, params["inner_unet"], LOW[row : row + 1], C_NOISE[row : row + 1], cond)
        close(low[row], alone[0])


def test_the_outputs_of_inner_nets_without_their_inputs():
    model = tiny(low_res_inputs=False)
    params = stirred(shapes(model, (LOW, HIGH), {}))
    assert "conv_in" in params and "conv_in" not in params["inner_unet"]
    out = apply(model, params, (LOW, HIGH), C_NOISE, {})
    other = apply(model, params, (LOW + 1, HIGH), C_NOISE, {})
    assert out[0].shape == LOW.shape and all(np.array_equal(a, b) for a, b in zip(out, other, strict=True))
    assert np.abs(out[0] - apply(model, params, (LOW, HIGH + 1), C_NOISE, {})[0]).max() > 1e-3


def test_a_class_joins_the_time_at_every_net():
    model = tiny(num_classes=3)
    label = {"label": jnp.array([0, 1, 2, 3])}
    params = stirred(shapes(model, (LOW, HIGH), label))
    table = params["inner_unet"]["class_emb"]["embedding"]
    assert table.shape == (4, 32) and "class_emb" not in params and "kv_cond" not in str(params)
    out = apply(model, params, (LOW, HIGH), C_NOISE, label)
    for net in (params, params["inner_unet"]):  # a row of the table is a change of the time's bias
        net["temb_layer2"]["bias"] += table[3]
    params["inner_unet"]["class_emb"]["embedding"] = jnp.zeros_like(table)
    shifted = apply(model, params, (LOW, HIGH), C_NOISE, label)
    for a, b in zip(out, shifted, strict=True):
        close(a[3], b[3])
        assert np.abs(a[0] - b[0]).max() > 1e-3


def test_numbers_the_nets_are_told():
    model = tiny(INNER)
    params = stirred(shapes(model, LOW, {}))
    told = lambda **numbers: apply(  # noqa: E731
        model, params, LOW, C_NOISE, {f"micro_{name}": jnp.full(4, value) for name, value in numbers.items()}
    )
    out = told(scale=8.0, score=0.5)
    assert np.array_equal(out, apply(model, params, LOW, C_NOISE, {}))  # the defaults
    assert np.array_equal(out, told(scale=1e9, score=0.5)) and np.abs(out - told(scale=7.0, score=0.5)).max() > 1e-4
    layers = params["cond_layers"]  # with one embedding for both, a score counts a thousandfold
    params["cond_layers"] = {name: layers[name.replace("score", "scale")] for name in layers}
    close(told(scale=8.0, score=0.004), told(scale=4.0, score=0.008))


def test_padding_of_the_text():
    model = with_text(INNER)
    params = stirred(shapes(model, LOW, TEXT))
    run = lambda model, cond: apply(model, params, LOW, C_NOISE, cond)  # noqa: E731
    every = {"text": TEXT["text"], "text_mask": jnp.ones((4, 5))}
    no_mask = {"text": TEXT["text"]}
    padded = {"text": jnp.where(TEXT["text_mask"][..., None], TEXT["text"], 7.0), "text_mask": TEXT["text_mask"]}
    out = run(model, TEXT)
    close(out, run(model, padded), 1e-6)
    close(run(model, every), run(model, no_mask), 1e-6)
    close(out[0], run(model, no_mask)[0], 1e-6)  # row 0 has no padding
    assert np.abs(out - run(model, no_mask))[1:].min(0).max() > 1e-4
    seen = model.clone(masked_cross_attention=False)
    close(run(seen, TEXT), run(model, no_mask), 1e-6)  # with layers on the text, its mean is over all tokens too
    assert "cond_emb" in params and "lm_proj" in params


def test_the_mean_of_the_text_leaves_out_padding_that_is_attended_to():
    """masked_cross_attention False without layers on the text, as the released models."""
    model = with_text(INNER, lm_layers=0, masked_cross_attention=False)
    params = stirred(shapes(model, LOW, TEXT))
    padded = {"text": jnp.where(TEXT["text_mask"][..., None], TEXT["text"], 7.0), "text_mask": TEXT["text_mask"]}
    run = lambda params, cond: apply(model, params, LOW, C_NOISE, cond)  # noqa: E731
    assert np.abs(run(params, TEXT) - run(params, padded)).max() > 1e-3  # attention
    for block in ("down_blocks_0", "up_blocks_0", "mid_blocks_0"):
        for name in [name for name in params[block] if name.startswith("attn")]:
            params[block][name]["kv_cond"] = jax.tree.map(jnp.zeros_like, params[block][name]["kv_cond"])
    close(run(params, TEXT), run(params, padded), 1e-6)
    assert np.abs(run(params, TEXT) - run(params, {"text": TEXT["text"]})).max() > 1e-4  # the mean, of all tokens


def test_coarser_levels_are_seen_dropped_and_told_of():
    model = tiny(INNER, OUTER, conditions=(("z", None),))
    z = jax.random.normal(jax.random.key(5), (4, 4, 4, 2))
    cond = {"z": z, "keep_z": jnp.ones(4, bool), "noise_step_z": jnp.full(4, 600.0)}
    params = stirred(shapes(model, (LOW, HIGH), cond))
    assert params["conv_in"]["kernel"].shape == (3, 3, 5, 16) and "level_z_0" in params["cond_layers"]
    assert params["inner_unet"]["conv_in"]["kernel"].shape == (3, 3, 3, 32)
    run = lambda cond: apply(model, params, (LOW, HIGH), C_NOISE, cond)[1]  # noqa: E731
    out = run(cond)
    assert np.array_equal(out, run({name: cond[name] for name in ("z", "noise_step_z")}))
    dropped = cond | {"keep_z": jnp.array([True, False, False, False])}
    gone = run(dropped)
    assert np.array_equal(out[0], gone[0]) and np.abs(out[1] - gone[1]).max() > 1e-3
    close(run(dropped | {"z": 2 * z})[1], gone[1], 1e-6)
    assert np.abs(run(cond | {"noise_step_z": jnp.full(4, 100.0)}) - out).max() > 1e-4
    enlarged = jax.image.resize(z, (4, 8, 8, 2), "bilinear")
    close(run(cond | {"z": enlarged}), out)
    few = apply(model, params, (LOW, take_rows(HIGH, 2)), C_NOISE, cond)[1]
    close(few, out[::2])
    without = shapes(model, (LOW, HIGH), {"z": z})
    assert "cond_layers" not in without


def test_clips():
    """A temporal net alone, rows of a clip, and a spatial net around it whose text and condition are every frame's."""
    model = with_text(INNER, CLIP)
    params = stirred(shapes(model, (LOW, FRAMES), TEXT))
    low, frames = apply(model, params, (LOW, FRAMES), C_NOISE, TEXT)
    few = apply(model, params, (LOW, take_rows(FRAMES, 2)), C_NOISE, TEXT)
    close(few[0][::2], low[::2])
    close(few[1], frames[::2])
    high = jnp.repeat(jnp.repeat(FRAMES, 2, axis=2), 2, axis=3)
    around = Net((32, 32), (1, 1), attention=(0, 1), groups=8, normalize_input=True)
    model = with_text(INNER, CLIP, around, conditions=(("z", None),))
    cond = TEXT | {"z": LOW}
    params = stirred(shapes(model, (LOW, FRAMES, high), cond))
    out = apply(model, params, (LOW, FRAMES, high), C_NOISE, cond)
    assert [leaf.shape for leaf in out] == [LOW.shape, FRAMES.shape, high.shape]
    bright = high * jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1, 1)  # each frame is divided by its own deviation
    close(apply(model, params, (LOW, FRAMES, bright), C_NOISE, cond)[2], out[2])
    row = jax.tree.map(lambda value: value[3:], ((LOW, FRAMES, high), C_NOISE, cond))
    close(apply(model, params, *row)[2][0], out[2][3])


def test_rotary_positions_are_relative_and_tell_the_frames_apart():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
    x = jnp.broadcast_to(x[:, :1], x.shape)
    turned = blocks.RotaryPositions().apply({"params": {"freqs": 10000.0 ** (-jnp.arange(4) / 4)}}, x)
    dots = jnp.einsum("btnd,bsnd->nts", turned, turned)
    for shift in range(1, 6):
        close(dots[:, 0, shift], dots[:, 5 - shift, 5], 1e-6)
    first = np.asarray(x[0, 0, 0]) @ np.array([1, 1j] + [0] * 6)  # the pair (0, 1) is turned by t
    close(np.asarray(turned[0, 2, 0, :2]), np.array([(first * np.exp(2j)).real, (first * np.exp(2j)).imag]), 1e-6)

    rotary = tiny(INNER, dataclasses.replace(CLIP, rotary=True))
    params = stirred(shapes(rotary, (LOW, FRAMES), {}))
    assert weights.to_torch(params)["down_blocks.0.t_attn.0.attn.pos_emb.freqs"].shape == (16,)
    out = apply(rotary, params, (LOW, FRAMES), C_NOISE, {})[1]
    attentions = [params[block] for block in ("down_blocks_0", "up_blocks_1")]
    for block in attentions:
        for name in [name for name in block if name.startswith("t_attn")]:
            block[name]["attn"]["pos_emb"]["freqs"] *= 0
    still = apply(rotary, params, (LOW, FRAMES), C_NOISE, {})[1]
    assert np.abs(out - still).max() > 1e-5
    for block in attentions:
        for name in [name for name in block if name.startswith("t_attn")]:
            del block[name]["attn"]["pos_emb"]
    close(still, apply(tiny(INNER, CLIP), params, (LOW, FRAMES), C_NOISE, {})[1], 1e-6)


def test_a_resolution_that_is_not_halved():
    flat = Net((32, 32, 32), (1, 1, 1), resample=(False, True), groups=8)
    params = stirred(shapes(tiny(flat), LOW, {}))
    assert apply(tiny(flat), params, LOW, C_NOISE, {}).shape == LOW.shape
    halved = dataclasses.replace(flat, resample=())
    assert jax.tree.map(jnp.shape, shapes(tiny(halved), LOW, {})) == jax.tree.map(jnp.shape, params)
    changed = apply(tiny(halved), params, LOW, C_NOISE, {})
    assert np.abs(apply(tiny(flat), params, LOW, C_NOISE, {}) - changed).max() > 1e-3


def test_strided_convolutions_pad_both_sides():
    image = np.arange(16.0).reshape(4, 4)
    params = {"params": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
    out = blocks.Conv(1, stride=2).apply(params, image.reshape(1, 4, 4, 1))[0, :, :, 0]
    sums = [[image[:2, :2].sum(), image[:2, 1:].sum()], [image[1:, :2].sum(), image[1:, 1:].sum()]]
    assert np.array_equal(out, sums)
