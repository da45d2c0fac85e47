"""ImageNet-1k 256x256, Nested Diffusion with U-ViT (CVPR 2025, Sec. 4, Tables 1, 2 and 6).

    python main.py --config=configs/imagenet_L3.py --workdir=/shared/runs/L3              unconditional (Table 1a)
    python main.py --config=configs/imagenet_L3.py:class --workdir=...                    class-conditional (Table 1b)
    python main.py --config=configs/imagenet_L5.py --mode=summary                         sizes and GMACs (Table 6)
    python main.py --config=configs/imagenet_L5.py:uncond,synthetic --workdir=...         random latents: speed only

Arguments: L1 ... L5, L1_wide (the paper's 1*: 17 blocks); uncond (default) or class; data (default) or synthetic.
Levels, coarse to fine: MoCo-v3 vectors of the image and of its 2x2 and 4x4 crops, the 14x14 feature map pooled to 8x8,
each SVD-compressed (256, 128, 64, 32 channels), then the SD autoencoder's 32x32x4 latent. Every level is the same
12-deep (13 blocks), 768-wide U-ViT with a time MLP. Batch 1024, 500k steps, AdamW 2e-4, betas (.99, .99), weight decay
.03, 5k warm-up steps, EMA .9999, SD's discrete schedule, DPM-Solver++ 'fast' 50 evaluations: U-ViT's H recipe, which
Table 2's 500k iterations and the 10 % drop point to. Both flips of every image are encoded, as there: the steps are 200
epochs of both. A record is 48 kB (of 21 vectors, the pooled map and the latent's moments, twice), all of them 62 GB;
--config.data.flip=False halves that.

Published FID-50k, guided: unconditional L1 - , L2 6.59, L3 6.34, L4 5.54, L5 5.03; class 13.75, 4.87, 4.46, 4.25, 3.97;
1* 7.18. Cost by arithmetic, not measured: L1 is 161 GFLOP per training image, L5 204.
The class label is a token at every level: it adds .8 M parameters and one token per level to Table 6, which has none.
A crop's vector is MoCo-v3's class token (encoder.vector): the paper does not say. The frozen networks' files are named
by encoder.weights (vit-b-300ep.pth.tar) and codec.weights; summary and synthetic latents work without them.
"""

from configs import common

SHAPES = {  # name: (source, shape, patch size, sigma unconditional, sigma class-conditional)
    "z1x1": ("crops1", (1, 1, 256), 1, 0.5, 0.5),
    "z2x2": ("crops2", (2, 2, 128), 1, 0.5, 0.5),
    "z4x4": ("crops4", (4, 4, 64), 2, 0.5, 1.0),
    "z8x8": ("map8", (8, 8, 32), 2, 1.0, 1.0),
}


def get_config(arg: str = "L3") -> common.Config:
    args = common.parse(arg, ("L3", "L1", "L2", "L4", "L5", "L1_wide"), ("uncond", "class"), ("data", "synthetic"))
    depth, conditional = int(args[0][1]), args[1] == "class"
    config = common.default()
    config.data.update(source="tfds", num_classes=1000, image_size=256, channels=3, holdout=1024, flip=True)
    config.encoder.update(
        name="mocov3_vitb16",
        input_size=224,
        map="last",
        vector="cls",
        features=("crops1", "crops2", "crops4", "map8"),
        components=(256, 128, 64, 32),
        fit_images=131_072,
    )
    config.codec.update(name="sd_vae", patch=8, channels=4, scale=0.18215)
    backbone = common.uvit("base", depth=16 if args[0] == "L1_wide" else 12)
    upper = common.uvit("base", final_conv=False)  # Table 6's 208 M at L = 2 has no output convolution up there
    names = list(SHAPES)[: depth - 1]
    config.levels = tuple(
        common.level(name, source, shape, patch, sigma=class_sigma if conditional else sigma, backbone=upper)
        for name, (source, shape, patch, sigma, class_sigma) in SHAPES.items()
        if name in names
    ) + (common.level("x", "sd_vae", (32, 32, 4), 2, backbone=backbone),)
    guidance = common.decaying_guidance(depth) if conditional else (0.0,) + (0.8,) * (depth - 1)
    common.use_preset(config, "cvpr")
    for level, weight in zip(config.levels, guidance, strict=True):
        level.guidance = weight
    config.hierarchy.label_levels = tuple(level.name for level in config.levels) if conditional else ()
    config.hierarchy.noise_gamma = 0.3
    config.train.update(
        batch_size=1024,
        steps=500_000,
        eval_every=10_000,
        sample_every=10_000,
        save_every=5000,
        log_every=100,
        dtype="bfloat16",
    )
    config.optimizer.update(learning_rate=2e-4, warmup_steps=5000, b1=0.99, b2=0.99, weight_decay=0.03)
    config.sample.batch_size = 1024
    config.evaluate.update(num_samples=50_000, num_reference=50_000)
    return common.synthetic(config, 100_000) if args[2] == "synthetic" else config
