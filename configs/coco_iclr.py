"""MS-COCO 256x256 as in Nested Diffusion's anonymous draft (ICLR version, Figure 4, Tables 1a and 2).

    python main.py --config=configs/coco_iclr.py:L5 --workdir=/shared/runs/coco_iclr_L5 --config.data.path=COCO
    python main.py --config=configs/coco_iclr.py:L2,text --workdir=...

Arguments: L5 (default), L1 ... L4; uncond (default), text; semantic (default), vae (the levels are the autoencoder's
own latents, of at most four channels: configs/imagenet100.py); data (default), synthetic. COCO as in configs/coco.py.
The preset iclr: CLIP ViT-B/16's 14x14x768 map pooled to 8x8 at L2, with 6x6, 4x4 and 2x2 above it at L3, L4 and L5,
SVD to 64, 56, 48 and 40 channels; a level sees the next coarser one through a transposed convolution; half of the
training rows lose it. U-ViT-S at every level, 1,000 epochs at batch 256. Guidance 1, U-ViT's for COCO, with the
generated levels in the place of the text. sigma .5 is CVPR's for COCO: the numbers of the draft's Table 1a are lost in
our copy of it.

The frozen networks' files are named by encoder.weights, codec.weights and text.weights; `summary` and `synthetic` work
without them. Not trained by us. The map is of CLIP's patch tokens through its last norm (nested/encoders/vit.py).
"""

from configs import coco, common
from configs.imagenet100 import VAE_CHANNELS

SHAPES = ((2, 2, 40), (4, 4, 48), (6, 6, 56), (8, 8, 64))  # coarse to fine


def get_config(arg: str = "L5") -> common.Config:
    words = (("L5", "L1", "L2", "L3", "L4"), ("uncond", "text"), ("semantic", "vae"), ("data", "synthetic"))
    depth, kind, features, source = common.parse(arg, *words)
    shapes = SHAPES[len(SHAPES) + 1 - int(depth[1]) :]  # the draft adds levels on top
    if features == "vae":
        shapes = tuple((side, side, min(channels, VAE_CHANNELS)) for side, _, channels in shapes)
    prefix = "codec" if features == "vae" else "map"
    config = common.default()
    coco.text_training(config)
    names = tuple(f"{prefix}{side}" for side, *_ in shapes)
    config.encoder.update(
        name="clip_vitb16", input_size=224, map="last", vector="cls", features=names, components=(64,)
    )
    net = common.uvit("S")
    finest = common.level("x", "sd_vae", (32, 32, 4), 2, backbone=net)
    config.levels = (*common.pooled_levels(shapes, dict(net, final_conv=False), 0.5, prefix), finest)
    common.use_preset(config, "iclr")
    for i, level in enumerate(config.levels):
        level.guidance = 1.0 if kind == "text" or i else 0.0
    if kind == "text":
        config.hierarchy.text_levels = tuple(level.name for level in config.levels)
    else:
        config.text.encoder = ""
    return common.synthetic(config, 20_000) if source == "synthetic" else config
