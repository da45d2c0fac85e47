"""HDiT on ImageNet at 256 pixels (arXiv 2401.11605, Table 4): 557,416,522 parameters, 197.59 GMACs, in pixel space.

    python main.py --config=configs/hdit_imagenet256.py --workdir=runs/hdit_in256 --config.data.path=IMAGENET/train

Three levels, 64 x 64 tokens of 4 x 4 pixels at the top; neighborhoods of 7 at the first two, global attention at the
last, 16 x 16. Table 6 prints a mapping width of 768: with 256 the paper's parameters and multiply-accumulates come
out. 2M steps of 256, then 50k of 512, 100k of 1024 and 50k of 2048 (train.batch_growth). Published: FID 6.92, IS
135.2 without guidance; 3.21, 220.6 at a guidance scale of 1.3, which is `--config.levels[0].guidance=0.3` here. Crops
are ADM's, not k-diffusion's. `:synthetic` trains on random images, to measure. Nothing has been trained with this
config yet.
"""

from configs import common


def get_config(arg: str = "") -> common.Config:
    (data,) = common.parse(arg, ("imagenet", "synthetic"))
    config = common.default()
    if data == "imagenet":
        config.data.update(source="image_folder", path="", num_classes=1000, image_size=256, channels=3)
    else:
        config.data.update(source="synthetic", num_classes=1000, num_examples=512)
    config.levels = (
        common.level(
            "x", "pixels", (256, 256, 3), 4, backbone=common.hdit("imagenet256"), process=common.edm_process(256),
            sampler=common.sigma_sampler("dpmpp_3m_sde", 50),
        ),
    )  # fmt: skip
    config.hierarchy.label_levels = ("x",)
    config.train.update(
        batch_size=256, steps=2_200_000, dtype="bfloat16", remat=True, log_every=100, save_every=5000, workers=8,
        batch_growth=((2_000_000, 512), (2_050_000, 1024), (2_150_000, 2048)),
    )  # fmt: skip
    config.optimizer.update(common.hdit_optimizer())
    config.sample.update(num_samples=64 if data == "imagenet" else 0, batch_size=16)
    return config
