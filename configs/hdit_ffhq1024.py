"""HDiT on FFHQ at 1024 pixels (arXiv 2401.11605, Table 3): 85,079,300 parameters, 206.08 GMACs, in pixel space.

    python main.py --config=configs/hdit_ffhq1024.py --workdir=runs/ffhq1024 --config.data.path=FFHQ/images1024x1024

The images must lie in one folder: the public archive's 70 folders would be read as 70 classes. Five levels of two
layers, 256 x 256 tokens of 4 x 4 pixels at the top; neighborhoods of 7 at the first three, global attention at 32 x
32 and 16 x 16. Table 6 prints four depths and a mapping width of 768: with five and 256 the paper's parameters and
multiply-accumulates come out. 1M steps of 256 took the authors 5 days on 64 A100: FID 5.23 (50k). `:synthetic` trains
on random images, to measure. Memory: batch 1 in bfloat16 with remat fits 24 GiB by XLA's count. Nothing has been
trained with this config yet.
"""

from configs import common


def get_config(arg: str = "") -> common.Config:
    (data,) = common.parse(arg, ("ffhq", "synthetic"))
    config = common.default()
    if data == "ffhq":
        config.data.update(source="image_folder", path="", image_size=1024, channels=3, augment_prob=0.12)
    else:
        config.data.update(source="synthetic", num_examples=64)
        config.sample.num_samples = 0
    config.levels = (
        common.level(
            "x", "pixels", (1024, 1024, 3), 4, backbone=common.hdit("ffhq1024"), process=common.edm_process(1024),
            sampler=common.sigma_sampler("dpmpp_3m_sde", 50),
        ),
    )  # fmt: skip
    config.train.update(
        batch_size=256, steps=1_000_000, dtype="bfloat16", remat=True, log_every=100, save_every=5000, workers=8
    )
    config.optimizer.update(common.hdit_optimizer())
    config.sample.update(num_samples=16 if data == "ffhq" else 0, batch_size=8, columns=4)
    return config
