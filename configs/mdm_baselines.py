"""Matryoshka's baselines (ICLR 2024, Sec. 4.2, Fig. 4): ImageNet 256x256 with classes; latent_f8: CC12M with text.

    python main.py --config=configs/mdm_baselines.py:cascaded --workdir=/shared/runs/cascaded

simple          one UNet at 256 px, as large as the nest: channels 64 to 768, attention at 32 and 16
simple_nested   S64S256 with the loss at 256 px alone; the inner net sees features only (low_res_inputs False), as its
                own outputs are not trained: the paper does not say what its inputs were
cascaded        S64, then that UNet given the 64 px image, enlarged, noised at a random level of the same schedule and
                told which (Saharia 2022): two levels of a hierarchy. --config.hierarchy.cond_noise_step is the level in
                sampling; the paper's comparison (500 to 700 were best) is --mode=evaluate
                --config.evaluate.sweep='(("hierarchy.cond_noise_step", (1, 100, 500, 700, 1000)),)'
latent_f4       S64 on the 64x64x3 latents of an f4 autoencoder
latent_f8       S64 on 32x32x4 latents, whose first resampling does not halve (resolutions 32, 32, 16), FLAN-T5 text

Optimizer, schedule, v-prediction and EMA are those of configs/mdm.py. Batch 256, 500k steps where the paper gives none.
The autoencoder's file is named by codec.weights, its scale is measured (1 / std of the data's latents); without it the
latent ones count (--mode=summary) and train on random latents (the word synthetic). Nothing here has been trained by us
on ImageNet; fashion_mnist_mdm.py is the small version.
"""

from typing import Any

from configs import common, mdm

KINDS = ("simple", "simple_nested", "cascaded", "latent_f4", "latent_f8")


def get_config(arg: str = "simple") -> common.Config:
    kind, data = common.parse(arg, KINDS, ("data", "synthetic"))
    config = mdm.get_config("imagenet256" if kind != "latent_f8" else "cc12m256")
    config.phases = ()
    config.train.update(batch_size=256, steps=500_000)
    how: dict[str, Any] = dict(
        process=common.mdm_process(), sampler=common.mdm_sampler("ddpm", 250), threshold="dynamic_100"
    )
    low = mdm.level("s64", "paper", classes=True)
    if kind == "simple":
        config.levels = (common.level("x", "pixels", (256, 256, 3), None, guidance=0.2, backbone=unet256(), **how),)
    elif kind == "simple_nested":
        nest = mdm.level("s64s256", "paper", classes=True, low_res_inputs=False)
        nest.leaf_weights = (0.0, 1.0)
        config.levels = (nest,)
    elif kind == "cascaded":
        low.name = "x64"
        config.levels = (
            low, common.level("x256", "pixels", (256, 256, 3), None, guidance=0.2, backbone=unet256(), **how)
        )  # fmt: skip
        config.hierarchy.update(label_levels=("x64", "x256"), cond_noise="diffused", cond_noise_step=600)
    else:
        config.levels = (latent_level(kind),)
        config.codec.update(name="sd_vae", patch=int(kind[-1]), channels=3 if kind == "latent_f4" else 4)
        config.encoder.features = ()
        config.data.flip = False
    if data == "synthetic":
        config.data.update(source="synthetic", num_examples=10_000)
        config.train.sample_every = config.sample.num_samples = config.evaluate.num_samples = 0
    return config


def unet256() -> dict:
    """The plain UNet of the nest's size."""
    net = common.net((64, 128, 256, 512, 768), (2, 2, 2, 2, 2), (0, 0, 0, 1, 5), attention_ffn=True)
    return common.nested_unet(nets=(net,))


def latent_level(kind: str) -> common.Config:
    """S64 on the latents of an autoencoder; no limit on their size while sampling."""
    classes = kind == "latent_f4"
    level = mdm.level("s64", "paper", classes=classes)
    level.update(source="sd_vae", shape=(64, 64, 3) if classes else (32, 32, 4), threshold="none")
    if not classes:
        level.backbone.nets = (dict(level.backbone.nets[0], resample=(False, True)),)
    return level
