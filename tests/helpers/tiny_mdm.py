"""Matryoshka made tiny, as a config file for main.py: --config=tests/helpers/tiny_mdm.py:KIND.

Digits at 2, 4 and 8 pixels with their labels; nets of 32 channels with one ResNet per resolution; batches of 8, two
steps of training, two of DDIM. Compiling a net takes seconds: few are.
"""

from configs import common

SIDES = (2, 4, 8)


def get_config(arg=""):
    """nest: 2 + 4 px in mixed batches. progressive: 2 px, then two phases of the nest. deep: 2 + 4 + 8 px. cascade:
    2 px, then 4 px."""
    (kind,) = common.parse(arg, ("nest", "progressive", "deep", "cascade"))
    config = common.default()
    config.data.update(source="digits", num_classes=10, holdout=8, check=False)
    config.levels = (nest(3 if kind == "deep" else 2),)
    if kind == "cascade":
        config.levels = (level("x2", (2, 2, 1), net(1)), level("x4", (4, 4, 1), net(1)))
        config.hierarchy.update(cond_noise="diffused", cond_noise_step=100)
    if kind == "progressive":
        config.phases = (dict(name="s2", levels=(nest(1),)), dict(name="s4", train=dict(steps=3)))
    config.hierarchy.label_levels = tuple(level.name for level in config.levels)
    config.train.update(batch_size=8, steps=2, log_every=1, save_every=100, threads=1)
    config.optimizer.update(learning_rate=1e-2, weight_decay=0.0, clip_norm=2.0, ema_decay=0.5)
    config.sample.update(num_samples=0, batch_size=8, columns=4)
    config.evaluate.update(num_samples=0, num_reference=32, input_size=32, unguided=False)
    return config


def nest(depth, sampler=None):
    """The level of the `depth` coarsest resolutions."""
    shapes = tuple((side, side, 1) for side in SIDES[:depth])
    made = level("x", shapes if depth > 1 else shapes[0], net(1), *[net(2)] * (depth - 1), sampler=sampler)
    made.mixed = ((), (2, 1), (4, 2, 1))[depth - 1]
    return made


def net(resolutions):
    return common.net((32,) * resolutions, (1,) * resolutions, groups=8)


def level(name, shape, *nets, sampler=None):
    return common.level(
        name, "pixels", shape, None, guidance=0.5, backbone=common.nested_unet(nets=nets, time_width=32, num_heads=2),
        process=common.mdm_process(), sampler=sampler or common.mdm_sampler("ddim", 2, eta=0.0), threshold="static",
    )  # fmt: skip
