"""U-ViT's released models (Bao et al., CVPR 2023, arXiv 2209.12152), to sample from, go on with or train anew.

    python main.py --config=configs/uvit_release.py:imagenet256_huge --mode=sample --workdir=OUT \\
        --weights=imagenet256_uvit_huge.pth --config.codec.weights=autoencoder_kl_ema.pth
    python main.py --config=configs/uvit_release.py:coco_deep --mode=sample --workdir=OUT --config.text.weights=CLIP \\
        --weights=mscoco_uvit_small_deep.pth --config.codec.weights=autoencoder_kl.pth \\
        --config.sample.prompts="('a red bus', 'two cats')"

Argument: one of MODELS. Networks, processes and samplers are those of the repository's configs at ce551708:
    H and COCO: Stable Diffusion's 1,000 discrete steps, DPM-Solver++ 'fast' of order 3, 50 evaluations
    L: the VPSDE with beta from .1 to 20, time 0 to 999, DPM-Solver 'fast' of order 3 uniform in log SNR down to 1e-4
    CIFAR-10 and CelebA: that VPSDE, Euler-Maruyama in 1,000 steps, eps 1e-3
The latents are Stable Diffusion's, scaled by .18215, on COCO by .23010. The repository decodes H's with the EMA of the
autoencoder, the others' with the plain one. CLIP is the folder of openai/clip-vit-large-patch14; COCO's prompts are
captions of the data (config.data.path) where none are given.
Training is the repository's too: AdamW with weight decay .03, 5,000 warm-up steps (CIFAR-10 2,500), EMA .9999. Matrix
products are float32 here, float16 there: --config.train.dtype=bfloat16 is faster. CelebA's images are not: there they
are the 128x128 box at rows 57 to 185, columns 25 to 153 of the aligned 178x218, resized to 64; here the whole middle
square (data.crop), so that training on CelebA and scores against it are not the release's. Samples are.

Published FID-50k (COCO 30k): CIFAR-10 3.11, CelebA 2.87, ImageNet-256 L 3.40, H 2.29, ImageNet-512 L 4.67, H 4.05, COCO
5.95, deep 5.48. We did not have the files: networks and samplers are held to recordings of the authors' code, the way
from a file to images to random weights by the released names (tests/test_release.py).
"""

from ml_collections import ConfigDict

from configs import coco, common

MODELS = {  # name: (data, variant, image side, patch size, training steps)
    "imagenet256_large": ("imagenet", "L", 256, 2, 300_000),
    "imagenet256_huge": ("imagenet", "H", 256, 2, 500_000),
    "imagenet512_large": ("imagenet", "L", 512, 4, 500_000),
    "imagenet512_huge": ("imagenet", "H", 512, 4, 500_000),
    "coco_small": ("coco", "S", 256, 2, 1_000_000),
    "coco_deep": ("coco", "S_deep", 256, 2, 1_000_000),
    "cifar10": ("cifar10", "S", 32, 2, 500_000),
    "celeba64": ("celeba", "S", 64, 4, 500_000),
}


def get_config(arg: str = "imagenet256_huge") -> common.Config:
    (name,) = common.parse(arg, ("imagenet256_huge", *MODELS))
    data, variant, side, patch, steps = MODELS[name]
    config = common.default()
    dict(imagenet=imagenet_latents, coco=coco_latents, cifar10=cifar10, celeba=celeba)[data](config)
    config.data.update(image_size=side, channels=3, check=False)
    latents = config.codec.name == "sd_vae"
    shape = (side // 8, side // 8, 4) if latents else (side, side, 3)
    discrete = variant == "H" or data == "coco"
    guidance = {"coco": 1.0, "imagenet": 0.7 if side == 512 else 0.4}.get(data, 0.0)
    config.levels = (
        common.level(
            "x", config.codec.name, shape, patch, guidance=guidance,
            backbone=common.uvit(variant),
            process=common.sd_process() if discrete else vpsde(),
            sampler=common.dpm_solver() if discrete else vpsde_sampler(latents),
        ),
    )  # fmt: skip
    config.hierarchy.update(
        cond_drop=0.15 if variant == "L" else 0.1,
        label_levels=("x",) if data == "imagenet" else (),
        text_levels=("x",) if data == "coco" else (),
    )
    config.train.update(steps=steps, dtype="float32", log_every=100, save_every=5000)
    config.evaluate.num_samples = 30_000 if data == "coco" else 50_000
    return config


def recipe(config: ConfigDict, batch_size: int, warmup: int, b1: float, b2: float) -> None:
    """The training options that differ from the defaults."""
    config.train.batch_size = batch_size
    config.optimizer.update(learning_rate=2e-4, warmup_steps=warmup, b1=b1, b2=b2, weight_decay=0.03)


def imagenet_latents(config: ConfigDict) -> None:
    config.data.update(source="tfds", num_classes=1000, flip=True)
    config.codec.update(name="sd_vae", patch=8, channels=4, scale=0.18215)
    recipe(config, 1024, 5000, 0.99, 0.99)


def coco_latents(config: ConfigDict) -> None:
    coco.text_training(config)
    config.codec.scale = 0.23010
    recipe(config, 256, 5000, 0.9, 0.9)


def cifar10(config: ConfigDict) -> None:
    config.data.update(source="tfds", num_classes=10, flip=True)
    recipe(config, 128, 2500, 0.99, 0.999)


def celeba(config: ConfigDict) -> None:
    config.data.update(source="image_folder", flip=True)
    recipe(config, 128, 5000, 0.99, 0.99)


def vpsde() -> dict:
    """U-ViT's continuous process: t uniform in [0, 1], of which the network is told 999 t."""
    return common.sd_process() | dict(schedule="linear_vp", discrete_steps=0, time_scale=999.0)


def vpsde_sampler(latents: bool) -> dict:
    """Of latents and of pixels."""
    if not latents:
        return dict(name="euler_maruyama", steps=1000, t_end=1e-3)
    return common.dpm_solver() | dict(algorithm="dpm_solver", grid="log_snr", intermediate="log_snr", t_end=1e-4)
