"""Stand-ins for what scores samples: an encoder of random linear features, a generator that returns the data."""

import dataclasses

import numpy as np

from configs import common
from nested.build.levels import build_levels
from nested.sampling import generator as sampling

CLASSES = 3


def tiny_config(batch_size=4):
    """Two levels of U-ViT, width 16, two steps of DDPM (so that the samplers' own noise is part of the test)."""
    config = common.default()
    net = common.uvit(width=16, depth=2, num_heads=2)
    ddpm = dict(name="ddpm", steps=2, t_end=1e-3)
    config.data.num_classes = CLASSES
    config.levels = (
        common.level("top", "map", (1, 1, 4), 1, sigma=0.5, guidance=0.5, backbone=net, sampler=ddpm),
        common.level("x", "pixels", (4, 4, 1), 2, guidance=0.3, backbone=net, sampler=ddpm),
    )
    config.hierarchy.update(label_levels=("top", "x"), noise_gamma=0.3)
    config.sample.update(num_samples=6, batch_size=batch_size, columns=3, scale=1)
    config.evaluate.update(num_samples=6, num_reference=6)
    config.encoder.batch_size = 4
    return config


class Pooler:
    """A stand-in for EfficientNet: 5 random linear features; remembers the batch sizes that it saw."""

    fingerprint, input_size = "0123456789abcdef", 32

    def __init__(self):
        self.sizes = []

    def pooled(self, images):
        self.sizes.append(len(images))
        weights = np.random.default_rng(0).normal(size=(images[0].size, 5))
        return (images.reshape(len(images), -1) / 255) @ weights


def fake_scoring(number, guidance=(0.5, 0.3), unguided=True):
    """(config, generator, source): the guided generator draws the data, the unguided one brighter images."""
    config = tiny_config()
    config.data.num_classes = number
    config.evaluate.update(num_samples=number, num_reference=number, unguided=unguided)
    images = np.random.default_rng(2).integers(0, 200, (number, 4, 4, 1), dtype=np.uint8)
    levels = tuple(
        dataclasses.replace(level, guidance=w) for level, w in zip(build_levels(tiny_config()), guidance, strict=True)
    )

    class Fake(sampling.Generator):
        def with_guidance(self, weights):
            unguided = [dataclasses.replace(level, guidance=w) for level, w in zip(levels, weights, strict=True)]
            return dataclasses.replace(self, levels=tuple(unguided), decode=lambda z: self.decode(z) + np.uint8(50))

    class Images(list):
        fingerprint = "fedcba9876543210"

    source = Images({"image": image} for image in images)

    def draw_variables(params, indices, context, fixed):
        return {levels[-1].name: images[context["label"]]}

    batch_size = config.sample.batch_size
    generator = Fake(levels, None, None, config.seed, batch_size, number, draw_variables, lambda z: z)
    return config, generator, source
