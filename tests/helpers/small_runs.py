"""Hierarchies of pixels alone, for tests that make whole runs: nothing is encoded, a run takes a second or two."""

from configs import common


def config_of(depth=3, **changes):
    """Digits at 2, 4 and 8 pixels, `depth` of them with the 8 always there; U-ViTs of width 16; one step of training.

    changes: of the config's flattened options, a dot written as two underscores."""
    config = common.default()
    config.data.update(source="digits", num_classes=10, holdout=8, check=False)
    ddim = dict(name="ddim", steps=2, eta=0.0, t_end=1e-3)
    net = common.uvit(width=16, depth=1, num_heads=2, final_conv=False)
    sizes = (("x2", 2, 1), ("x4", 4, 2), ("x8", 8, 4))
    config.levels = tuple(
        common.level(name, "pixels", (size, size, 1), patch, sigma=0.25, guidance=guidance, backbone=net, sampler=ddim)
        for (name, size, patch), guidance in zip((*sizes[: depth - 1], sizes[-1]), (0.5, 0.4, 0.3), strict=False)
    )
    config.hierarchy.update(label_levels=tuple(level.name for level in config.levels), noise_gamma=0.3)
    config.train.update(batch_size=8, steps=1, log_every=1, save_every=100, threads=1)
    config.optimizer.update(learning_rate=1e-2, ema_decay=0.5)
    config.sample.update(num_samples=0, batch_size=8, columns=4)
    config.evaluate.update(num_samples=8, num_reference=8, input_size=32, unguided=False)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config
