"""Augmentation against the authors' code, and against plain statements of what it does."""

import json
import pickle

import numpy as np
import pytest

from input_pipeline.augment import Augmentation, augment, describe_warp, draw_warp, warp, warp_matrix

CASES = range(7)


class Scripted:
    """A generator that answers with the draws recorded from the authors' code; fails where another kind is asked for.

    Recorded as d* and r*: uniform; a0, a1: coins; the other a*: normal.
    """

    def __init__(self, case):
        self.left = list(case.items())

    def next(self, allowed):
        name, value = self.left.pop(0)
        assert name in allowed, f"the next draw there is {name}"
        return value

    def random(self):
        return self.next({"d1", "d2", "d3", "r3", "d4", "r4", "d5"})

    def integers(self, high):
        assert high == 2
        return self.next({"a0", "a1"})

    def standard_normal(self):
        return self.next({"a2", "a5", "a6", "a7"})


@pytest.fixture(scope="module")
def recorded(golden):
    """hdit_aug.npz, recorded from crowsonkb/k-diffusion at 4601bf08, k_diffusion/augmentation.py."""
    arrays = golden("hdit_aug.npz")
    return arrays, json.loads(str(arrays["meta"]))


def noise(size, channels=3):
    return np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors_code(recorded, case):
    arrays, meta = recorded
    script = Scripted(meta["cases"][case])
    a = draw_warp(script, meta["a_prob"])
    assert script.left == []
    np.testing.assert_allclose(warp_matrix(a, len(arrays["image"])), arrays[f"c{case}/matrix"], atol=4e-6)
    image, told = augment(arrays["image"], Scripted(meta["cases"][case]), meta["a_prob"])
    assert image.dtype == told.dtype == np.float32 and told.shape == (9,)
    np.testing.assert_allclose(told, arrays[f"c{case}/cond"], atol=4e-7)
    np.testing.assert_allclose(image, arrays[f"c{case}/image_aug"].transpose(1, 2, 0), atol=5e-6)


def test_values_are_not_clipped(recorded):
    arrays, meta = recorded
    assert augment(arrays["image"], Scripted(meta["cases"][6]), meta["a_prob"])[0].min() < -1.005


@pytest.mark.parametrize("size", [1, 7, 28])
@pytest.mark.parametrize("mirrors", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_mirrors_are_exact_and_equal_the_warp(size, mirrors):
    image, a = noise(size), np.array([*mirrors, 0, 0, 0, 0, 0, 0], dtype=np.float64)
    answers = {"a0": mirrors[0], "d1": 0.0, "a1": mirrors[1], "d2": 0.5, "a2": 1.0, "d3": 0.5, "r3": 0.1, "d4": 0.5}
    answers |= {"r4": 0.1, "a5": 1.0, "d5": 0.5, "a6": 1.0, "a7": 1.0}
    found, told = augment(image, Scripted(answers), prob=0.25)
    flipped = image[::-1] if mirrors[1] else image
    flipped = flipped[:, ::-1] if mirrors[0] else flipped
    np.testing.assert_array_equal(found, flipped.astype(np.float32) / 127.5 - 1)
    with np.errstate(all="raise"):
        warped = warp(image.astype(np.float32) / 127.5 - 1, warp_matrix(a, size))
    np.testing.assert_array_equal(found, warped)
    np.testing.assert_array_equal(told, [*mirrors, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("right, down", [(2, 0), (0, -3), (-1, 4), (23, -17)])
def test_whole_pixels_are_taken_from_the_reflected_image(right, down):
    size = 6
    image = noise(size, channels=1).astype(np.float32)
    a = np.array([0, 0, 0, 0, 0, 0, 8 * right / size, 8 * down / size])
    padded = np.pad(image, ((30, 30), (30, 30), (0, 0)), mode="reflect")
    expected = padded[30 - down : 30 - down + size, 30 - right : 30 - right + size]
    np.testing.assert_allclose(warp(image, warp_matrix(a, size)), expected, atol=1e-3)  # of 255


def test_laws_of_the_draws():
    generator, prob, count = np.random.default_rng(0), 0.3, 4000
    a = np.stack([draw_warp(generator, prob) for _ in range(count)])
    rates = (a != 0).mean(0)
    np.testing.assert_allclose(rates, [0.5, prob / 2] + [prob] * 6, atol=0.03)  # 4 sigma
    assert set(a[:, 0]) == set(a[:, 1]) == {0, 1}
    np.testing.assert_array_equal(a[:, 4] != 0, a[:, 5] != 0)
    np.testing.assert_array_equal(a[:, 6] != 0, a[:, 7] != 0)
    used = a[:, [2, 3, 4, 6]] != 0
    both = (used.T.astype(int) @ used) / count
    np.testing.assert_allclose(both, prob**2 + np.eye(4) * (prob - prob**2), atol=0.03)  # independent events
    for index in (2, 5, 6, 7):
        values = a[a[:, index] != 0, index]
        moments = [values.mean(), values.std(), (np.abs(values) < 1).mean()]
        np.testing.assert_allclose(moments, [0, 1, 0.683], atol=0.1)
    for index in (3, 4):
        values = a[a[:, index] != 0, index]
        quarters, _ = np.histogram(values, 4, (-np.pi, np.pi))
        assert quarters.sum() == len(values)  # none beyond
        np.testing.assert_allclose(quarters / len(values), 0.25, atol=0.05)


def test_the_probability_ends():
    always = np.stack([draw_warp(np.random.default_rng(seed), 1.0) for seed in range(20)])
    assert (always[:, 2:] != 0).all() and set(always[:, 1]) == {0, 1}
    never = np.stack([draw_warp(np.random.default_rng(seed), 0.0) for seed in range(20)])
    assert (never[:, 1:] == 0).all() and set(never[:, 0]) == {0, 1}  # Augmentation(0) also turns this one off


def test_no_warp_is_told_as_zeros():
    assert not describe_warp(np.zeros(8)).any()


def test_augmentation_of_a_record():
    record = {"image": noise(8), "label": np.int32(3), "caption": "a cat"}
    found = Augmentation(prob=0.9)(record, np.random.default_rng(0))
    assert found.keys() == {"image", "label", "caption", "augment"} and found["label"] == 3
    image, told = augment(record["image"], np.random.default_rng(0), 0.9)
    np.testing.assert_array_equal(found["image"], image)
    np.testing.assert_array_equal(found["augment"], told)
    other = Augmentation(prob=0.9)(record, np.random.default_rng(1))
    assert (other["augment"] != told).any() and (other["image"] != image).any()


def test_flip_alone_keeps_the_pixels_and_says_nothing():
    record = {"image": noise(8), "label": np.int32(3)}
    flip, count = Augmentation(flip=True), 0
    for seed in range(200):
        found = flip(record, np.random.default_rng(seed))
        mirrored = (found["image"] == record["image"][:, ::-1]).all()
        assert mirrored or (found["image"] == record["image"]).all()
        assert found["image"].dtype == np.uint8 and found.keys() == record.keys()
        count += mirrored
    assert 70 < count < 130


def test_probability_zero_leaves_records_alone():
    record = {"image": noise(8)}
    assert all(Augmentation()(record, np.random.default_rng(seed)) is record for seed in range(4))


def test_flip_is_for_images_of_any_shape():
    image = np.arange(12, dtype=np.uint8).reshape(2, 6, 1)
    found = [Augmentation(flip=True)({"image": image}, np.random.default_rng(seed))["image"] for seed in range(8)]
    assert {values.shape for values in found} == {(2, 6, 1)}


def test_clips_are_flipped_as_a_whole_and_never_warped():
    clip = np.stack([noise(4), 255 - noise(4)])
    found = [Augmentation(flip=True)({"image": clip}, np.random.default_rng(seed))["image"] for seed in range(8)]
    mirrored = [(values == clip[:, :, ::-1]).all() for values in found]
    assert {True, False} == set(mirrored)
    assert all(flip or (values == clip).all() for flip, values in zip(mirrored, found, strict=True))
    message = r"prob = 0.12 warps single images, found clips \(2, 4, 4, 3\): expected prob = 0 .flip = True mirrors"
    with pytest.raises(ValueError, match=message) as error:
        Augmentation(prob=0.12)({"image": clip}, np.random.default_rng(0))
    assert "\n" not in str(error.value)


def test_augmentation_travels_to_workers():
    assert pickle.loads(pickle.dumps(Augmentation(prob=0.12))) == Augmentation(prob=0.12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prob": 1.5}, "augmentation prob = 1.5: expected a number from 0 to 1"),
        ({"prob": -0.1}, "augmentation prob = -0.1: expected a number from 0 to 1"),
        ({"prob": 0.12, "flip": True}, "augmentation flip = True with prob = 0.12, .*: expected flip = False, or prob"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Augmentation(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"image": np.zeros((4, 6, 3), np.uint8)}, r"square images, uint8 \[H, H, C\], found uint8 \(4, 6, 3\)"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"found uint8 \(4, 4\)"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, r"found float32 \(4, 4, 3\)"),
        ({"z1": np.zeros(3), "label": 0}, r"records with an 'image', found \['label', 'z1'\]: set prob = 0 and flip"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(ValueError, match=message) as error:
        Augmentation(prob=0.12)(record, np.random.default_rng(0))
    assert "\n" not in str(error.value)
