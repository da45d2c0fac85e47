"""nested/evaluation/memorization.py: distances and shares by definition, what is drawn, and what is refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from helpers.toy_encoding import level as level_source
from PIL import Image

from configs import common
from input_pipeline.in_memory import ImagesInMemory
from nested.build.data import Data
from nested.evaluation import memorization
from nested.latents.store import latents_of_images
from nested.modes import encode, evaluate
from nested.runtime import partition

HOLDOUT, SAMPLES = 20, 12


@dataclasses.dataclass(frozen=True)
class Generator:
    """Stands for sample.Generator: `made` are its samples."""

    config: Any
    latents: Any
    made: np.ndarray
    prompts: tuple = ()
    mesh = partition.make_mesh(1, 1)

    def images(self, params, number, what):
        assert params == "ema" and not self.config.text.encoder or len(self.prompts) == number
        return self.made[:number]


def make_config(shape=(4, 4, 1)):
    config = common.default()
    config.data.holdout = HOLDOUT
    backbone = common.uvit(width=16, depth=1, num_heads=2)
    config.levels = (common.level("x", "pixels", shape, 1, backbone=backbone),)
    config.evaluate.update(num_samples=SAMPLES, memorization=SAMPLES)
    return config


@pytest.fixture
def images(monkeypatch):
    """70 images of 4x4x1 in batches of 16; the first 50 are trained on, 3 and 4 of them equal."""
    monkeypatch.setattr(memorization, "BATCH", 16)
    made = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 1), dtype=np.uint8)
    made[4] = made[3]
    return made


def features(images):
    """Three random features of images in 0..255."""
    return (images.reshape(len(images), -1) @ np.random.default_rng(1).normal(size=(16, 3))).astype(np.float32)


def report(images, samples, config, made, tmp_path):
    """Of records among which the last HOLDOUT of `images` are those held out."""
    order = encode.held_out_records(config.data.holdout, len(images))
    order = np.concatenate([np.setdiff1d(np.arange(len(images)), order), order])
    source = ImagesInMemory(images[order.argsort()], np.zeros(len(images), np.int32), 0, (), "toy")
    generator = Generator(config, made, samples)
    lines = evaluate.compare_with_training_images(generator, "ema", config, source, features, 7, str(tmp_path))
    return lines, json.loads((tmp_path / "memorization.json").read_text())


def two_nearest(x, training, own=None):
    """Distances to the nearest and second-nearest rows, float64."""
    x, training = (np.asarray(array, np.float64).reshape(len(array), -1) for array in (x, training))
    distances = np.sqrt(np.square(x[:, None] - training[None]).sum(2))
    if own is not None:
        distances[np.arange(len(x)), own] = np.inf
    return np.sort(distances, axis=1)[:, :2]


def test_the_report_is_the_definition(images, tmp_path):
    """Samples 0 to 2 are training images, 3 is one of the two that are equal, 4 is almost one; the others are noise."""
    samples = np.random.default_rng(2).integers(0, 256, (SAMPLES, 4, 4, 1), dtype=np.uint8)
    samples[:4], samples[4] = images[[10, 20, 49, 3]], images[30] ^ 1
    made = latents_of_images((level_source("x", "pixels", (4, 4, 1)),), (4, 4, 1))
    lines, content = report(images, samples, make_config(), made, tmp_path)
    counts = ("step", "num_compared_with", "num_samples", "num_held_out", "num_training")
    assert [content[name] for name in counts] == [7, 50, SAMPLES, HOLDOUT, SAMPLES]
    own = np.linspace(0, 50, SAMPLES, endpoint=False).astype(int)
    for kind, of, scale in (("pixels", lambda x: x, 4.0), ("features", features, 1.0)):
        said, training = content[kind], of(images[:50])
        two = {
            "samples": two_nearest(of(samples), training) / scale,
            "held_out": two_nearest(of(images[50:]), training) / scale,
            "training": two_nearest(of(images[own]), training, own) / scale,
        }
        for name, values in two.items():
            ratio = np.where(values[:, 1] > 0, values[:, 0] / np.maximum(values[:, 1], 1e-30), 1.0)
            for percent in (1, 5, 25, 50, 75, 95, 99):
                key, q = f"{percent}%", percent / 100
                assert said["quantiles"][name][key] == pytest.approx(np.quantile(values[:, 0], q), rel=1e-4, abs=1e-4)
                assert said["ratio_quantiles"][name][key] == pytest.approx(np.quantile(ratio, q), rel=1e-4, abs=1e-4)
            assert said["ratio_below_third"][name] == (ratio < 1 / 3).mean()
        for name in ("held_out", "training"):
            for key, q in (("1%", 0.01), ("5%", 0.05)):
                share = (two["samples"][:, 0] < np.quantile(two[name][:, 0], q)).mean()
                assert said["samples_nearer_than"][name][key] == share
    assert content["pixels"]["samples_nearer_than"]["held_out"]["1%"] == 5 / SAMPLES
    assert content["pixels"]["ratio_below_third"]["samples"] == 4 / SAMPLES  # not the one that has two originals
    assert [line.split(":")[0] for line in lines[:2]] == ["memorization, pixels", "memorization, features"]
    assert lines[2:] == [f"memorization: {tmp_path}/memorization.{kind}" for kind in ("json", "png")]
    assert "nearer than 1 % of held-out images 41.7 % of samples" in lines[0] and "d1/d2 < 1/3 33.3 %" in lines[0]
    assert np.asarray(Image.open(tmp_path / "memorization.png")).std() > 10


def test_images_are_compared_as_the_samples_are_made(images):
    """A level of 2x2 pixels: training images are averaged to that; a sample that is one of them is at distance 0."""
    averages = np.round(images.reshape(70, 2, 2, 2, 2, 1).mean((2, 4))).astype(np.uint8)
    made = latents_of_images((level_source("x", "pixels", (2, 2, 1)),), (4, 4, 1))
    seen = memorization.make_decoder(made.finest, made, Generator.mesh)(images)
    assert seen.shape == (70, 2, 2, 1) and np.abs(seen.astype(int) - averages).max() <= 1  # halves round either way
    found = memorization.compare_groups(
        {"samples": seen[5:8], "held_out": seen[50:], "training": seen[:2]}, np.arange(2), [seen[:30], seen[30:50]],
        lambda x: x.reshape(len(x), -1),
    )  # fmt: skip
    for of_groups in found.values():
        assert not of_groups["samples"].two[:, 0].any() and of_groups["held_out"].two[:, 0].all()
        np.testing.assert_array_equal(of_groups["samples"].nearest, [5, 6, 7])
    np.testing.assert_allclose(found["features"]["held_out"].two, 2 * found["pixels"]["held_out"].two, rtol=1e-6)


def test_the_most_suspicious_are_drawn_beside_their_originals(images, monkeypatch, tmp_path):
    samples = np.random.default_rng(3).integers(0, 256, (SAMPLES, 4, 4, 1), dtype=np.uint8)
    samples[8], samples[5] = images[40], images[41] ^ 1
    drawn = []
    monkeypatch.setattr(memorization, "draw_nearest_pairs", lambda *arguments: drawn.extend(arguments))
    made = latents_of_images((level_source("x", "pixels", (4, 4, 1)),), (4, 4, 1))
    report(images, samples, make_config(), made, tmp_path)
    shown, partners, apart, _, path = drawn
    assert len(shown) == SAMPLES and path == str(tmp_path / "memorization.png")
    np.testing.assert_array_equal(shown[:2], samples[[8, 5]])
    np.testing.assert_array_equal(partners[:2], images[[40, 41]])
    np.testing.assert_allclose(apart, np.sort(two_nearest(features(samples), features(images[:50]))[:, 0]), rtol=1e-4)


def test_samples_with_text_have_the_captions_of_the_data(images, monkeypatch, tmp_path):
    config = make_config()
    config.text.encoder = "minilm"
    monkeypatch.setattr(Data, "some_captions", lambda self, number: ("a",) * number)
    made = latents_of_images((level_source("x", "pixels", (4, 4, 1)),), (4, 4, 1))
    _, content = report(images, images[:SAMPLES], config, made, tmp_path)
    assert content["pixels"]["quantiles"]["samples"]["99%"] == 0


def test_reports_that_cannot_be_made_are_refused():
    config = make_config()
    evaluate.check_memorization(config)
    config.data.holdout = 0
    with pytest.raises(ValueError, match="^config.evaluate.memorization 12: needs images that are not trained on"):
        evaluate.check_memorization(config)
    config = make_config()
    config.evaluate.num_samples = 0
    with pytest.raises(ValueError, match="^config.evaluate.memorization 12: comes with the scores, and config.eval"):
        evaluate.check_memorization(config)
    with pytest.raises(ValueError, match="^config.evaluate.memorization 12: it compares still images, not clips"):
        evaluate.check_memorization(make_config(shape=(2, 4, 4, 1)))
    config.evaluate.memorization = 0
    evaluate.check_memorization(config)
