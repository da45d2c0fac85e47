"""A part is one file and one line in nested/build/parts.py: toys of tests/helpers train, sample, are documented."""

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.toy_backbone import ToyBackbone
from helpers.toy_sampler import ToySampler
from helpers.toy_source import ToySource
from helpers.toy_space import Folded, ToySpace

from configs import common
from nested.build import parts
from nested.build.levels import build_levels
from nested.build.options import default_values
from nested.build.reference import option_reference
from nested.modes import sample, train


@pytest.fixture
def config(monkeypatch):
    """Two levels of the toy backbone: the 8x8 images of the toy source in the toy space, below their 4x4 pixels."""
    monkeypatch.setitem(parts.BACKBONES, "toy", ToyBackbone)
    monkeypatch.setitem(parts.SAMPLERS, "toy", ToySampler)
    monkeypatch.setitem(parts.SOURCES, "toy", ToySource)
    monkeypatch.setitem(parts.SPACES, "toy", ToySpace)
    config = common.default()
    config.data.update(source="toy", stripes=1, images=16, num_classes=2, holdout=4)
    config.codec.update(name="toy", fold=2)
    how = dict(backbone=dict(default_values(ToyBackbone), name="toy"), sampler=dict(name="toy", steps=3))
    config.levels = (
        common.level("low", "pixels", (4, 4, 1), None, **how),
        common.level("full", "toy", (4, 4, 4), None, guidance=0.5, **how),
    )
    config.hierarchy.label_levels = ("full",)
    config.train.update(batch_size=4, steps=2, log_every=1, threads=1)
    config.sample.update(num_samples=4, batch_size=4, columns=2)
    return config


def test_toys_train_two_steps_and_sample(config, tmp_path):
    train.run(config, str(tmp_path))
    sample.run(config, str(tmp_path), 4, str(tmp_path / "drawn.png"))
    drawn = np.load(tmp_path / "drawn.npz")["arr_0"]
    assert drawn.shape == (4, 8, 8, 3) and drawn.dtype == np.uint8 and (tmp_path / "drawn.png").exists()


def test_the_options_of_toys_are_checked(config):
    assert (config.data.stripes, config.data.images, config.codec.fold) == (1, 16, 2)
    coarse, fine = build_levels(config)
    assert (fine.backbone, fine.sampler) == (ToyBackbone(8, 2, (("low", None),), fine.backbone.dtype), ToySampler(3))
    assert coarse.backbone.conditions == () and fine.num_classes == 2
    config.levels[0].sampler.steps = 4
    assert build_levels(config)[0].sampler == ToySampler(4)
    with config.unlocked():
        config.levels[0].backbone.depth = 3
    refused(build_levels, config, match="config.levels[0].backbone: unknown option depth; choose from width")


def test_the_options_of_toys_are_documented(config):
    text, rows = option_reference(), "\n\n| option | default | what it does |\n|---|---|---|\n"
    assert "| `stripes` | `2` | stripes of an image. Read by toy |" in text
    assert "| `fold` | `2` | side of the blocks. Read by toy |" in text
    assert f"### toy{rows}| `width` | `8` | channels of the hidden layer |" in text
    assert f"### toy{rows}| `steps` | required | network evaluations |" in text


def test_the_toy_space_gives_its_images_back():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    space = Folded((4, 4, 12), 2)
    assert np.array_equal(space.decode(space.variable({"image": images}, None), {}), images)
