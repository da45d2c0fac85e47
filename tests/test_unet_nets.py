"""NestedUNet: memory and precision options, dropout, and what its nets, shapes and conditions must be."""

import dataclasses

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
    shapes,
    stirred,
    tiny,
    with_text,
)

from nested.build.options import construct
from nested.models.nested_unet import VARIANTS, NestedUNet
from nested.models.unet_nets import Net


def test_remat_and_bfloat16():
    model = with_text(INNER, OUTER)
    params = stirred(shapes(model, (LOW, HIGH), TEXT))

    def loss(params, model):
        outs = model.apply({"params": params}, (LOW, HIGH), C_NOISE, TEXT, train=True)
        return sum(jnp.mean(jnp.square(out)) for out in outs)

    again = model.clone(remat=True)
    recomputed = str(jax.make_jaxpr(lambda params: loss(params, again))(params)).count("remat2[")
    assert recomputed == (5 + 4) + 6  # ResNets and attention layers of the inner net, ResNets of the outer
    first, second = (jax.jit(jax.grad(loss), static_argnums=1)(params, m) for m in (model, again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), first, second)

    half = model.clone(dtype=jnp.bfloat16)
    outs, exact = (apply(m, params, (LOW, HIGH), C_NOISE, TEXT) for m in (half, model))
    for out, expected in zip(outs, exact, strict=True):
        assert out.dtype == jnp.float32 and 0 < np.std(out - expected) < 0.05 * np.std(expected)


def test_dropout_belongs_to_its_row_and_to_training():
    inner, clip = (dataclasses.replace(net, dropout=0.4) for net in (INNER, CLIP))
    model = tiny(inner, clip)
    assert model.has_dropout and not tiny().has_dropout
    params = stirred(shapes(model, (LOW, FRAMES), {}))
    run = jax.jit(lambda x, c, cond, train: model.apply({"params": params}, x, c, cond, train=train), static_argnums=3)
    cond = {"dropout": jax.random.split(jax.random.key(5), 4)}
    out = run((LOW, FRAMES), C_NOISE, cond, True)
    flipped = run((LOW[::-1], FRAMES[::-1]), C_NOISE[::-1], {"dropout": cond["dropout"][::-1]}, True)
    other = run((LOW, FRAMES), C_NOISE, {"dropout": cond["dropout"][::-1]}, True)
    for a, b, c in zip(out, flipped, other, strict=True):
        np.testing.assert_allclose(a, b[::-1], atol=1e-5)
        assert np.abs(a - c).max() > 1e-3
    still = run((LOW, FRAMES), C_NOISE, cond, False)
    for a, b in zip(still, apply(model, params, (LOW, FRAMES), C_NOISE, {}), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="training with dropout needs cond\\['dropout'\\], a key for each row"):
        model.apply({"params": params}, (LOW, FRAMES), C_NOISE, {}, train=True)


def test_every_resnet_drops_its_own(monkeypatch):
    indices = []
    drop = lambda x, rate, keys, index: indices.append(index) or x  # noqa: E731
    monkeypatch.setattr("nested.models.unet_blocks.dropout", drop)
    model = tiny(*(dataclasses.replace(net, dropout=0.1) for net in (INNER, OUTER)))
    cond = {"dropout": jax.random.split(jax.random.key(5), 4)}
    jax.eval_shape(lambda: model.init(jax.random.key(0), (LOW, HIGH), C_NOISE, cond, train=True))
    assert len(indices) == len(set(indices)) == 5 + 6


def test_nets_of_a_config():
    options = dict(channels=(32, 32), resnets=(1, 1), micro=(("scale", 8.0),), dropout=0.1)
    nets = construct("backbone", NestedUNet, dict(nets=[options, dict(channels=(16,), resnets=(1,))]), {}).nets
    assert nets == (Net((32, 32), (1, 1), micro=(("scale", 8.0),), dropout=0.1), Net((16,), (1,)))
    with pytest.raises(ValueError, match=r"^config.backbone.nets\[0\]: unknown option chanels; choose from channels"):
        construct("backbone", NestedUNet, dict(nets=[dict(chanels=(1,))]), {})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(channels=(), resnets=()), "channels (), resnets (), groups 32: expected 1 or more of each"),
        (dict(channels=(32, 0), resnets=(1, 1)), "expected 1 or more of each"),
        (dict(channels=(32, 32), resnets=(1,)), "resnets (1,) has 1 entries, expected 2 for channels (32, 32)"),
        (dict(channels=(32,), resnets=(1,), attention=(1, 1)), "attention (1, 1) has 2 entries, expected 1"),
        (dict(channels=(32,), resnets=(1,), resample=(True,)), "resample (True,) has 1 entries, expected 0"),
        (dict(channels=(32,), resnets=(1,), kind="time"), "kind 'time', expected one of spatial, temporal"),
        (dict(channels=(32,), resnets=(1,), temporal_attention=(1,)), "in a net of kind 'spatial': expected ()"),
        (dict(channels=(32,), resnets=(1,), rotary=True), "rotary is True but the net has no temporal_attention"),
        (dict(channels=(32,), resnets=(1,), dropout=1.0), "dropout 1.0, expected a rate in [0, 1)"),
        (dict(channels=(32,), resnets=(1,), micro=(("scale", 0.0),)), "'scale' is the largest it can be, expected abo"),
    ],
)
def test_nets_that_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        Net(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


IMAGE, PAIR, CLIPS = (4, 4, 3), ((4, 4, 3), (8, 8, 3)), ((4, 4, 3), (2, 4, 4, 3))
DEEP = Net((32, 32), (1, 1), groups=8)


@pytest.mark.parametrize(
    "model, shape, message",
    [
        (tiny(), IMAGE, "1 resolution(s) ((4, 4, 3),) for 2 nets; give one each"),
        (tiny(INNER), PAIR, "2 resolution(s)"),
        (tiny(), ((4, 4, 3), (16, 16, 3)), "nets[0], shape (4, 4, 3): nets[1] around it ends at (8, 8)"),
        (tiny(), ((4, 4, 3), (8, 10, 3)), "nets[1] around it ends at (4, 5)"),
        (tiny(), ((4, 4, 3), (9, 8, 3)), "nets[1], shape (9, 8, 3): (9, 8) does not halve"),
        (tiny(INNER), (4, 4), "nets[0], shape (4, 4): expected (height, width, channels), for kind 'spatial'"),
        (tiny(INNER), (2, 4, 4, 3), "expected (height, width, channels), for kind 'spatial' innermost"),
        (tiny(CLIP), (2, 4, 4, 3), "expected (height, width, channels), for kind 'temporal' innermost"),
        (tiny(INNER, CLIP), PAIR, "expected (frames, height, width, channels), for kind 'temporal'"),
        (tiny(), ((4, 4, 3), (8,)), "expected (height, width, channels) or (frames, height, width, channels)"),
        (tiny(), ((4, 4, 0), (8, 8, 3)), "nets[0], shape (4, 4, 0): expected (height"),
        (tiny(INNER, CLIP), ((4, 4, 3), (4, 4, 4, 3)), "frames end at 2, expected 1; give the net more or fewer"),
        (tiny(INNER, CLIP), ((4, 4, 3), (3, 4, 4, 3)), "(3, 4, 4) does not halve"),
        (tiny(INNER, CLIP), ((5, 4, 3), (2, 5, 4, 3)), "temporal attention halves height and width; expected even"),
        (tiny(INNER, CLIP, OUTER), ((4, 4, 3), (2, 4, 4, 3), (8, 8, 3)), "nets[2] around it ends at (4, 4)"),
        (tiny(DEEP, num_heads=5), IMAGE, "nets[0], shape (4, 4, 3): 32 channels do not divide by num_heads"),
        (tiny(Net((48,), (1,))), IMAGE, "48 channels do not divide by groups 32, the 32 groups of attention"),
        (tiny(INNER, Net((16, 32), (1, 1), (1, 0), groups=8)), PAIR, "16 channels do not divide by the 32 groups of"),
        (tiny(INNER, dataclasses.replace(CLIP, channels=(48, 32))), CLIPS, "temporal attention's heads of 32"),
        (tiny(INNER, dataclasses.replace(OUTER, attention_ffn=True)), PAIR, "attention_ffn is True but the net has no"),
        (tiny(time_width=36), PAIR, "time_width 36, expected a multiple of 8"),
        (tiny(text_proj=8), PAIR, "text_proj 8, lm_layers 0, masked_cross_attention True without text"),
        (tiny(masked_cross_attention=False), PAIR, "masked_cross_attention False without text"),
        (with_text(text_proj=18), PAIR, "text of width 18 does not divide into num_heads 4"),
        (with_text(text_width=18, text_proj=0), PAIR, "text of width 18 does not divide"),
        (tiny(INNER, low_res_inputs=False), IMAGE, "low_res_inputs is False but there is only one net"),
    ],
)
def test_shapes_that_are_refused(model, shape, message):
    with pytest.raises(ValueError) as error:
        model.check_shape(shape)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_shapes_of_the_published_models_fit():
    sides = {"s64": (64,), "s64s256s1024": (64, 256, 1024), "s64s128s256s512s1024": (64, 128, 256, 512, 1024)}
    for name, sizes in sides.items():
        for options in VARIANTS[name].values():
            model = NestedUNet(**(options | dict(nets=tuple(Net(**net) for net in options["nets"]))))
            model.check_shape(tuple((side, side, 3) for side in sizes))
    options = VARIANTS["s64t16s256"]["released"]
    clip = NestedUNet(**(options | dict(nets=tuple(Net(**net) for net in options["nets"]))))
    clip.check_shape(((64, 64, 3), (16, 64, 64, 3), (16, 256, 256, 3)))
    assert clip.num_tokens(((64, 64, 3), (16, 64, 64, 3), (16, 256, 256, 3))) == 64**2 + 16 * 64**2 + 16 * 256**2
    assert tiny(INNER).num_tokens(IMAGE) == 16


@pytest.mark.parametrize(
    "model, changes, message",
    [
        (with_text(INNER), {}, "cond has [], expected ['text'] (optional ['dropout', 'micro_scale', 'micro_score', 't"),
        (tiny(INNER, num_classes=3), {}, "missing ['label']"),
        (tiny(INNER, conditions=(("z", None),)), {}, "missing ['z']"),
        (tiny(INNER), {"text": TEXT["text"]}, "unknown ['text']; see num_classes, text_width"),
        (with_text(INNER), {"text": TEXT["text"][..., :3]}, "cond['text'] has shape (4, 5, 3), expected (4, 5, 16)"),
        (with_text(INNER), TEXT | {"text_mask": jnp.ones(4)}, "cond['text_mask'] has shape (4,), expected (4, 5)"),
        (tiny(INNER), {"micro_scale": jnp.ones(3)}, "cond['micro_scale'] has shape (3,), expected (4,)"),
        (tiny(INNER, conditions=(("z", None),)), {"z": jnp.ones(4)}, "expected (4, height, width, channels)"),
    ],
)
def test_conditions_that_are_refused(model, changes, message):
    with pytest.raises(ValueError) as error:
        model.init(jax.random.key(0), LOW, C_NOISE, changes, train=False)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("x, times", [((LOW, HIGH), 3), ((LOW[:2], HIGH), 2)])
def test_rows_that_are_refused(x, times):
    with pytest.raises(ValueError, match="expected as many of the first as times, and no more of a finer one"):
        tiny().init(jax.random.key(0), x, C_NOISE[:times], {}, train=False)
