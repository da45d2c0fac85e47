"""Fashion-MNIST in pixel space, 28x28 grey, ten classes: HDiT beside U-ViT in the same EDM process, two CPU cores.

    apt-get install dataset-fashion-mnist          (or --config.data.path=FOLDER with the four idx.gz files)
    python main.py --config=configs/fashion_mnist_hdit.py --workdir=runs/fashion_hdit
    python main.py --config=configs/fashion_mnist_hdit.py:uvit --workdir=runs/fashion_uvit

Arguments: hdit (default), uvit. HDiT: 14 x 14 tokens of 2 x 2 pixels with neighborhoods of 7, then 7 x 7 tokens with
global attention. U-ViT: the same 196 tokens, all attending. Process, optimizer and sampler (25 steps of DPM++ 2M) are
the same, the numbers of steps give equal time. Expect: README.md "HDiT" has the measured scores and pictures.
"""

from typing import Any

from configs import common

SIGMA_DATA = 0.7  # standard deviation of the pixels in [-1, 1]


def get_config(arg: str = "hdit") -> common.Config:
    (kind,) = common.parse(arg, ("hdit", "uvit"))
    config = common.default()
    config.data.update(
        source="idx", path="/usr/share/datasets/fashion-mnist", split="train", num_classes=10, holdout=256
    )
    how: dict[str, Any] = dict(process=common.edm_process(28, sigma_data=SIGMA_DATA), sampler=sampler())
    if kind == "uvit":
        how["process"]["time_scale"] = 250.0  # U-ViT's sinusoids want times of hundreds
    backbone = hdit() if kind == "hdit" else common.uvit(width=64, depth=4, num_heads=2, time_mlp=True)
    config.levels = (common.level("x", "pixels", (28, 28, 1), 2, guidance=0.5, backbone=backbone, **how),)
    config.hierarchy.label_levels = ("x",)
    steps = 2400 if kind == "hdit" else 1450
    config.train.update(batch_size=32, steps=steps, eval_every=500, save_every=500, log_every=100)
    config.optimizer.update(
        learning_rate=1e-3, warmup_steps=100, decay="cosine", b2=0.95, weight_decay=0.01, clip_norm=1.0,
        ema_decay=0.995, ema_power=0.75,
    )  # fmt: skip
    if kind == "hdit":
        config.optimizer.groups = common.hdit_groups()
    config.sample.update(num_samples=100, batch_size=100, columns=10, scale=2)
    config.evaluate.update(num_samples=1000, num_reference=10000)
    return config


def hdit() -> dict:
    return common.hdit(
        depths=(1, 3), widths=(64, 128), attentions=("neighborhood", "global"), head_widths=32,
        mapping_depth=1, mapping_width=128,
    )  # fmt: skip


def sampler() -> dict:
    return common.sigma_sampler("dpmpp_2m", 25, sigma_min=0.01, sigma_max=80.0)
