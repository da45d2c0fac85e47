"""ImageNet-100 and ImageNet-1k 256x256 as in Nested Diffusion's anonymous draft (ICLR version, Tables 1b, 2 and 4).

    python main.py --config=configs/imagenet100.py:L4 --workdir=/shared/runs/in100_L4           unconditional (Table 1b)
    python main.py --config=configs/imagenet100.py:L3,class --workdir=...                       classes (Table 2)
    python main.py --config=configs/imagenet100.py:L3,vae --workdir=...                         VAE features (Table 4)
    python main.py --config=configs/imagenet100.py:L2,class,imagenet1k --workdir=...            U-ViT-L (its 3.8 -> 3.2)

Arguments: L4 (default), L1, L2, L3; uncond (default), class; semantic (default), vae; imagenet100 (default),
imagenet1k; data (default), synthetic. The preset iclr: one MoCo-v3 feature map (14x14x768) pooled to 6x6 at L2, to 4x4
above it at L3, to 2x2 above that at L4, SVD to 32, 24 and 16 channels; a level sees the next coarser one, through a
transposed convolution onto its own grid and two layers every two blocks; half of the training rows lose it; one
guidance weight, U-ViT's .4, at all levels that something conditions. U-ViT-M at every level, U-ViT-L for ImageNet-1k;
sigma 1, the best of Table 1b from L = 2 on.

`vae` builds the levels from the autoencoder's own latents by the same compression; they have four channels, so that
their SVD keeps at most four: the draft does not say how it kept 16 to 32.
Not in the draft, ours: SD's discrete schedule and DPM-Solver++ as in configs/imagenet.py, where U-ViT's M and L configs
have VPSDE and the older solver; patches of one token above the latent, whose finer grid the transposed convolution
needs; batch 1024; steps for 1,000 epochs of 50,000 images ("all 50K training images") counted with both flips, as U-ViT
counts.

Published FID-50k, unconditional, sigma 1: L1 44.40, L2 15.31, L3 11.12, L4 11.21; ImageNet-1k, class, L2: 3.2.
The frozen networks' files are named by encoder.weights and codec.weights; `summary` and `synthetic` work without them.
Not trained by us.
"""

from configs import common

SHAPES = ((2, 2, 16), (4, 4, 24), (6, 6, 32))  # coarse to fine
VAE_CHANNELS = 4


def get_config(arg: str = "L4") -> common.Config:
    words = (("L4", "L1", "L2", "L3"), ("uncond", "class"), ("semantic", "vae"), ("imagenet100", "imagenet1k"))
    depth, kind, features, data, source = common.parse(arg, *words, ("data", "synthetic"))
    depth, large, conditional = int(depth[1]), data == "imagenet1k", kind == "class"
    if large and depth > 2:
        raise ValueError(f"config argument 'L{depth}' with imagenet1k: the draft trained L1 and L2 there; give one")
    config = common.default()
    config.data.update(source="tfds", num_classes=1000 if large else 100, image_size=256, channels=3, holdout=1024)
    config.data.flip = True
    shapes = SHAPES[len(SHAPES) + 1 - depth :]  # the draft adds levels on top
    if features == "vae":
        shapes = tuple((side, side, min(channels, VAE_CHANNELS)) for side, _, channels in shapes)
    prefix = "codec" if features == "vae" else "map"
    config.encoder.update(
        name="mocov3_vitb16", input_size=224, map="last", vector="cls", components=(32,),
        features=tuple(f"{prefix}{side}" for side, *_ in shapes),
    )  # fmt: skip
    config.codec.update(name="sd_vae", patch=8, channels=VAE_CHANNELS, scale=0.18215)
    net = common.uvit("L" if large else "M")
    finest = common.level("x", "sd_vae", (32, 32, 4), 2, backbone=net)
    config.levels = (*common.pooled_levels(shapes, dict(net, final_conv=False), 1.0, prefix), finest)
    common.use_preset(config, "iclr")
    for i, level in enumerate(config.levels):
        level.guidance = 0.4 if conditional or i else 0.0
    config.hierarchy.label_levels = tuple(level.name for level in config.levels) if conditional else ()
    config.train.update(
        batch_size=1024, steps=300_000 if large else 97_656, dtype="bfloat16", log_every=100, eval_every=5000,
        sample_every=10_000, save_every=5000,
    )  # fmt: skip
    config.optimizer.update(learning_rate=2e-4, warmup_steps=5000, b1=0.99, b2=0.99, weight_decay=0.03)
    config.sample.batch_size = 1024
    config.evaluate.update(num_samples=50_000, num_reference=50_000)
    return common.synthetic(config, 100_000) if source == "synthetic" else config
