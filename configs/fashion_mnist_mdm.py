"""Matryoshka on Fashion-MNIST, 7 + 14 + 28 pixels, grey, ten classes, and its baselines: two CPU cores, 15 minutes.

    apt-get install dataset-fashion-mnist          (or --config.data.path=FOLDER with the four idx.gz files)
    python main.py --config=configs/fashion_mnist_mdm.py --workdir=runs/fashion_mdm
    python main.py --config=configs/fashion_mnist_mdm.py:cascade --workdir=runs/fashion_cascade

Arguments: progressive (default: 7 px, then 7 + 14, then 7 + 14 + 28, each from the EMA of the one before), nest (all
three from the start), simple (one UNet at 28 px with the nest's layers), cascade (14 px, then 28 px given a noised
14 px image).
All four are meant to train for the same 9 minutes (12 to 15 in all), the question of the paper's Figure 4 at this size;
README.md "Matryoshka" has the scores and pictures of those that were measured. The schedule is the cosine one, shifted
by the side ratio; v predicted, loss in eps.
"""

from configs import common

SIDES = (7, 14, 28)


def get_config(arg: str = "progressive") -> common.Config:
    (kind,) = common.parse(arg, ("progressive", "nest", "simple", "cascade"))
    config = common.default()
    config.data.update(
        source="idx", path="/usr/share/datasets/fashion-mnist", split="train", num_classes=10, holdout=256
    )
    config.train.update(batch_size=32, eval_every=500, save_every=500, log_every=100)
    config.optimizer.update(
        learning_rate=1e-3, warmup_steps=100, decay="cosine", b2=0.99, weight_decay=0.0, clip_norm=2.0,
        ema_decay=0.995, ema_power=0.75,
    )  # fmt: skip
    config.levels = levels(kind)
    config.hierarchy.label_levels = tuple(level.name for level in config.levels)
    config.train.steps = STEPS[kind]
    if kind == "progressive":
        config.phases = tuple(
            dict(name=f"s{SIDES[depth - 1]}", levels=(nest(depth),), train=dict(steps=steps),
                 sample=dict(steps_shown=0), evaluate=dict(num_samples=0))
            for depth, steps in ((1, 230), (2, 277))
        )  # fmt: skip
    if kind == "cascade":
        config.hierarchy.update(cond_noise="diffused", cond_noise_step=100)
    config.sample.update(num_samples=100, batch_size=100, columns=10, scale=2, steps_shown=8)
    config.evaluate.update(num_samples=500, num_reference=10000)
    return config


STEPS = dict(progressive=446, nest=713, simple=950, cascade=640)  # with the phases before, 9 minutes of training each


def levels(kind: str) -> tuple:
    if kind == "simple":
        net = common.net((16, 48, 96), (1, 1, 2), (0, 0, 1), attention_ffn=True, groups=8)
        return (level("x", (28, 28, 1), net),)
    if kind == "cascade":
        low = common.net((48, 96), (1, 2), (0, 1), attention_ffn=True, groups=8)
        high = common.net((16, 48, 96), (1, 1, 2), (0, 0, 1), attention_ffn=True, groups=8)
        return (level("x14", (14, 14, 1), low), level("x28", (28, 28, 1), high))
    return (nest(3),)


def nest(depth: int) -> common.Config:
    """The nest of the `depth` coarsest resolutions."""
    nets = (
        common.net((96,), (2,), (1,), attention_ffn=True, groups=8),
        common.net((48, 96), (1, 1), groups=8),
        common.net((16, 48), (1, 1), groups=8),
    )
    shapes = tuple((side, side, 1) for side in SIDES[:depth])
    return level("x", shapes if depth > 1 else shapes[0], *nets[:depth])


def level(name: str, shape: tuple, *nets: dict) -> common.Config:
    return common.level(
        name, "pixels", shape, None, guidance=0.5, backbone=common.nested_unet(nets=nets, time_width=128, num_heads=4),
        process=common.mdm_process(), sampler=common.mdm_sampler("ddim", 25, eta=0.0), threshold="static",
    )  # fmt: skip
