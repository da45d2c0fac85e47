"""Parameters and FLOPs of Matryoshka's models (App. A, D, E) with 128 text tokens, by shapes alone, against what
ml-mdm's code at de8cde2 counts. A multiply-accumulate is 2 FLOPs; norms do not count."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from nested.models.nested_unet import VARIANTS, NestedUNet
from nested.models.unet_nets import Net
from nested.modes import summary

SIDES = {
    "s64": (64,),
    "s64s256": (64, 256),
    "s64s128s256": (64, 128, 256),
    "s64s256s1024": (64, 256, 1024),
    "s64s128s256s512s1024": (64, 128, 256, 512, 1024),
}
IMAGES = {  # name: (million parameters, GFLOPs) of released, paper
    "s64": ((461.359, 385.4), (435.891, 379.7)),
    "s64s256": ((476.614, 610.6), (449.833, 604.8)),
    "s64s128s256": ((481.577, 661.3), (453.484, 655.5)),
    "s64s256s1024": ((480.970, 1040.1), (452.877, 1034.3)),
    "s64s128s256s512s1024": ((488.855, 1142.2), (458.136, 1136.4)),
}


def model_of(name, preset, **changes):
    options = VARIANTS[name][preset]
    return NestedUNet(**(options | dict(nets=tuple(Net(**net) for net in options["nets"])) | changes))


def inner(model, **changes):
    """The model with another innermost net."""
    return model.clone(nets=(dataclasses.replace(model.nets[0], **changes), *model.nets[1:]))


def costs(model, shape, **cond):
    """(million parameters, GFLOPs) of one sample."""
    model.check_shape(shape)
    struct = lambda shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)  # noqa: E731
    x = struct(shape) if isinstance(shape[0], int) else tuple(map(struct, shape))
    if model.text_width:
        cond |= dict(text=struct((128, model.text_width)), text_mask=struct((128,)))
    arguments = (x, struct(()), cond)
    parameters = norms = 0

    def forward(*given):
        nonlocal parameters, norms
        with nn.intercept_methods(count):
            out, variables = model.init_with_output(jax.random.key(0), *given, train=False)
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
        return out

    def count(next_function, args, kwargs, context):
        nonlocal norms
        if isinstance(context.module, nn.LayerNorm) and context.method_name == "__call__":
            norms += summary.LAYER_NORM_MACS * args[0].size
        return next_function(*args, **kwargs)

    macs = summary.count_macs(forward, *arguments) - norms
    return parameters / 1e6, 2 * macs / 1e9


def images(sides):
    return tuple((side, side, 3) for side in sides) if len(sides) > 1 else (sides[0], sides[0], 3)


LARGE = ("s64s128s256", "s64s256s1024", "s64s128s256s512s1024")  # of the nets that the two smaller ones have, and more


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in IMAGES])
def test_image_models(name):
    for preset, expected in zip(("released", "paper"), IMAGES[name], strict=True):
        assert costs(model_of(name, preset), images(SIDES[name])) == pytest.approx(expected, rel=1e-3)


def test_without_the_feed_forward_of_attention():
    """Which the paper does not state: its models are of the published size with it."""
    for name, expected in (("s64", (302.564, 295.4)), ("s64s256", (316.506, 520.5))):
        plain = inner(model_of(name, "paper"), attention_ffn=False)
        assert costs(plain, images(SIDES[name])) == pytest.approx(expected, rel=1e-3)


def test_clip_models():
    low, frames, high = (64, 64, 3), (16, 64, 64, 3), (16, 256, 256, 3)
    assert costs(model_of("s64t16", "released"), (low, frames)) == pytest.approx((554.2, 3641), rel=1e-3)
    assert costs(model_of("s64t16s256", "released"), (low, frames, high)) == pytest.approx((568.1, 7243), rel=1e-3)


def test_class_conditional_model_has_no_cross_attention():
    model = model_of("s64", "paper", text_width=0, text_proj=0, lm_layers=0, num_classes=1000)
    label, table = jax.ShapeDtypeStruct((1,), jnp.int32), 1001 * 1024 / 1e6
    plain = inner(model, attention_ffn=False)
    for some, expected in ((model, (361.3, 356.8)), (plain, (228.0, 272.5))):
        parameters, flops = costs(some, images((64,)), label=label)
        assert (parameters - table, flops) == pytest.approx(expected, rel=1e-3)


def test_baselines():
    """One UNet at 256 pixels as large as the nest, the cascade's second stage, the latent models."""
    released = model_of("s64", "released")
    wide = dict(channels=(64, 128, 256, 512, 768), attention=(0, 0, 0, 1, 5), micro=())
    unet = inner(released, resnets=(2, 2, 2, 2, 2), **wide)
    assert costs(unet, images((256,))) == pytest.approx((464.9, 560.0), rel=1e-3)
    assert costs(inner(released, resnets=(2, 2, 1, 2, 2), **wide), images((256,))) == pytest.approx(
        (460.8, 534.7), rel=1e-3
    )
    upsampler = unet.clone(conditions=(("x64", None),))
    low = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    assert costs(upsampler, images((256,)), x64=low) == pytest.approx((464.9, 560.2), rel=1e-3)
    flat = inner(released, resample=(False, True))
    assert costs(flat, (32, 32, 4)) == pytest.approx((461.4, 317.3), rel=1e-3)
    assert costs(released, (32, 32, 4))[1] == pytest.approx(111.9, rel=1e-3)
