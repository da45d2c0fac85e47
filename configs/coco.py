"""MS-COCO 256x256, Nested Diffusion with text (CVPR 2025, Sec. 4, Tables 4 and 5; U-ViT's COCO recipe).

    python main.py --config=configs/coco.py:L2 --workdir=/shared/runs/coco_L2 --config.data.path=COCO
    python main.py --config=configs/coco.py:L3,dino --workdir=...                        encoders (Table 5)

Arguments: L2 (default), L1, L3; clip (default), mae, mocov3, dino: whose vectors of the image (1x256 after the SVD) and
of its 2x2 crops (4x128) are the semantic levels; data (default), synthetic. COCO is the folder of annotations/ and
train2014/. As in U-ViT one of an image's captions is drawn each time, the crop is the middle square, resized by
Lanczos' filter, and nothing is mirrored. Samples are scored against the images of val2014, with the first caption of
30,000 of them (evaluate.split).

CLIP ViT-L/14's 77 x 768 text features at every level, 10 % dropped with the coarser levels (which then are the caption
of nothing, ''), guidance 1 with SD's latents (scale .23010 there). Every level is the 12-deep, 768-wide U-ViT of
configs/imagenet.py. Batch 256, 1,000 epochs of 82,783 images (323k steps), AdamW 2e-4, betas (.9, .9), weight decay
.03, 5k warm-up steps, EMA .9999; all sigma .5. Text and coarser levels are dropped with one coin: the paper is silent.

Published FID-30k (captions of the validation set), guided: L1 (U-ViT-S) 5.42, L2 4.72, L3 5.92; without guidance 14.98,
8.15, and at L3 by encoder MAE 10.96, MoCo-v3 10.59, CLIP 6.97, DINO 6.78.
The vector of CLIP is the projected one (512 channels, Figure 4), of the others the class token: the paper says no more.
The frozen networks' files are named by encoder.weights, codec.weights and text.weights; `summary` and `synthetic` work
without them. Not trained by us; the same path was run on captioned emoji (configs/emoji64.py:text).
"""

from ml_collections import ConfigDict

from configs import common

ENCODERS = {"clip": "clip_vitb16", "mae": "mae_vitb16", "mocov3": "mocov3_vitb16", "dino": "dino_vitb16"}
SHAPES = {"z1x1": ("crops1", (1, 1, 256)), "z2x2": ("crops2", (2, 2, 128))}


def get_config(arg: str = "L2") -> common.Config:
    depth, encoder, source = common.parse(arg, ("L2", "L1", "L3"), tuple(ENCODERS), ("data", "synthetic"))
    depth = int(depth[1])
    config = common.default()
    text_training(config)
    config.encoder.update(
        name=ENCODERS[encoder], input_size=224, map="last", vector="projected" if encoder == "clip" else "cls",
        features=("crops1", "crops2"), components=(256, 128),
    )  # fmt: skip
    net = common.uvit("base")
    config.levels = tuple(
        common.level(name, features, shape, 1, sigma=0.5, backbone=dict(net, final_conv=False))
        for name, (features, shape) in list(SHAPES.items())[: depth - 1]
    ) + (common.level("x", "sd_vae", (32, 32, 4), 2, backbone=net),)
    common.use_preset(config, "cvpr")
    config.hierarchy.noise_gamma = 0.3
    for level in config.levels:
        level.guidance = 1.0
    config.hierarchy.text_levels = tuple(level.name for level in config.levels)
    return common.synthetic(config, 20_000) if source == "synthetic" else config


def text_training(config: ConfigDict) -> None:
    """Data, text, codec, optimiser and evaluation of U-ViT's COCO recipe."""
    config.data.update(source="coco", split="train2014", image_size=256, crop="center_lanczos", channels=3, check=False)
    config.text.update(encoder="clip_vitl14", max_tokens=77, width=768)
    config.codec.update(name="sd_vae", patch=8, channels=4, scale=0.23010)
    config.train.update(
        batch_size=256, steps=323_000, dtype="bfloat16", log_every=100, sample_every=10_000, save_every=5000
    )
    config.optimizer.update(learning_rate=2e-4, warmup_steps=5000, b1=0.9, b2=0.9, weight_decay=0.03)
    config.evaluate.update(num_samples=30_000, num_reference=40_504, split="val2014")
