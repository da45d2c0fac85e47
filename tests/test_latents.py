"""The way back from records: level variables, images, the report; and the records as a data source."""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import time

import jax
import numpy as np
import pytest
from helpers.toy_encoding import CONFIG, IMAGES, LEVELS, PIXELS, Source, Toy, batch, one_line, run
from helpers.toy_encoding import level as level_source

from input_pipeline import latent_records as records
from nested.latents.store import format_report, latents_of_images, read_latents


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("latents")
    run(directory)
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


def test_variables_are_standardised_and_decode(finished):
    levels = read_latents(finished, LEVELS)
    assert levels.fields == ("crops1", "map", "image")
    raw = batch(finished, levels.fields)
    assert set(raw) == set(levels.fields)
    z = jax.jit(levels.variables)(raw, jax.random.key(0))
    assert {name: x.shape[1:] for name, x in z.items()} == {level.name: level.shape for level in LEVELS}
    for name in ("z3", "z2"):
        np.testing.assert_allclose(np.mean(z[name], (0, 1, 2)), 0.0, atol=1e-5)
        np.testing.assert_allclose(np.std(z[name], (0, 1, 2)), 1.0, atol=1e-5)
    assert np.mean(np.square(z["z1"])) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_array_equal(jax.jit(levels.decode)(z["z1"]), Source().images)


def test_pixels_need_no_encoder(tmp_path):
    config = dataclasses.replace(CONFIG, features=())
    run(tmp_path, config=config, codec=PIXELS)
    levels = read_latents(tmp_path, [level_source("z1", "pixels", (8, 8, 3))])
    z = levels.variables(batch(tmp_path), jax.random.key(0))
    np.testing.assert_allclose(z["z1"], Source().images / 127.5 - 1.0, atol=1e-6)
    np.testing.assert_array_equal(levels.decode(z["z1"]), Source().images)


def test_report(finished):
    rows = read_latents(finished, LEVELS).report({"z3": 1.0, "z2": 0})
    assert [row["name"] for row in rows] == ["z3", "z2", "z1"]
    assert rows[0]["bits_per_image"] == pytest.approx(2 / np.log(2))
    assert rows[2]["explained_variance"] == pytest.approx(1.0) and "sigma" not in rows[2]
    text = format_report(rows).splitlines()
    assert "2.9 bits per image at sigma 1" in text[0] and "unlimited information at sigma 0" in text[1]


@pytest.mark.parametrize(
    "level, message",
    [
        (("z2", "map", (5, 4, 5)), r"level z2: shape 5x4x5 cannot come from 'map', which stores 4x4x5"),
        (("z2", "map", (4, 4, 6)), r"shape 4x4x6 cannot come from 'map'"),
        (("z2", "map", (0, 4, 5)), r"shape 0x4x5 cannot come from 'map'"),
        (("z2", "crops4", (4, 4, 5)), r"source 'crops4' is not in these latents, only pixels, patch_pca, crops1, map"),
        (("z2", "pixels", (3, 3, 3)), r"level z2: shape 3x3x3 given, but images of 8x8x3 are only averaged"),
        (("z2", "patch_pca", (4, 4, 13)), r"shape 4x4x13 given; 'patch_pca' of the patches here is 4x4x12"),
    ],
)
def test_refuses_levels_that_do_not_fit(finished, level, message):
    with pytest.raises(ValueError, match=message) as error:
        read_latents(finished, (level_source(*level), *LEVELS[2:]))
    assert one_line(error)


def test_levels_of_a_basis_per_position_are_not_pooled(tmp_path):
    run(tmp_path, config=dataclasses.replace(CONFIG, svd="per_position"))
    z = read_latents(tmp_path, (LEVELS[0], level_source("z2", "map", (4, 4, 3)), LEVELS[2]))
    z = z.variables(batch(tmp_path), jax.random.key(0))["z2"]
    np.testing.assert_allclose(np.std(z, (0, 1, 2)), 1.0, atol=1e-5)
    message = r"level z2: shape 2x3x3 given, but with encoder.svd 'per_position' 'map' is not pooled: give 4x4 pos"
    with pytest.raises(ValueError, match=message) as error:
        read_latents(tmp_path, LEVELS)
    assert one_line(error)


def test_levels_without_an_svd_are_the_features_and_may_be_standardised_by_image(tmp_path):
    """The per-image mean and variance are those of RCG, rdm/models/diffusion/ddpm.py:573-581 (torch.std: unbiased)."""
    run(tmp_path, config=dataclasses.replace(CONFIG, svd="none", components=(9,)))
    raw = batch(tmp_path)
    features = Toy().features(Source().images)
    levels = [
        level_source("z3", "crops1", (1, 1, 9), standardize="none"),
        level_source("z2", "map", (2, 2, 9), standardize="sample"),
        LEVELS[2],
    ]
    made = read_latents(tmp_path, levels)
    z = jax.jit(made.variables)(raw, jax.random.key(0))
    np.testing.assert_array_equal(z["z3"], features["crops1"].astype(np.float16))
    x = np.asarray(features["map"], np.float64).reshape(IMAGES, 2, 2, 2, 2, 9).mean((2, 4))
    expected = (x - x.mean((1, 2, 3), keepdims=True)) / x.std((1, 2, 3), keepdims=True, ddof=1)
    np.testing.assert_allclose(z["z2"], expected, atol=2e-3)  # stored in float16
    np.testing.assert_allclose(np.mean(z["z2"], (1, 2, 3)), 0.0, atol=1e-6)
    np.testing.assert_allclose(np.var(z["z2"], (1, 2, 3), ddof=1), 1.0, atol=1e-5)
    rows = made.report({"z3": 1.0, "z2": 1.0})
    assert "bits_per_image" not in rows[0] and rows[1]["bits_per_image"] == pytest.approx(18 / np.log(2))
    assert format_report(rows).startswith("z3: 1x1x9 from crops1, 100.0 % of the variance\n")
    levels[1] = dataclasses.replace(levels[1], shape=(2, 2, 8))
    with pytest.raises(ValueError, match="'none' the channels of 'map' have no order to cut them by") as error:
        read_latents(tmp_path, levels)
    assert one_line(error)


def test_an_image_that_does_not_vary_becomes_zero(finished):
    level = level_source("z2", "map", (2, 3, 3), standardize="sample")
    space = read_latents(finished, (level, LEVELS[2])).spaces[0]
    z = space.variable({"map": np.full((2, 4, 4, 5), 3.0, np.float16)}, None)
    np.testing.assert_array_equal(z, np.zeros((2, 2, 3, 3)))


@pytest.mark.parametrize(
    "level, message",
    [
        (("map", (1, 1, 3), "image"), r"level z2 \(map\): standardize 'image' given; choose from 'channel', 's"),
        (("map", (1, 1, 1), "sample"), r"level z2 \(map\): standardize 'sample' of a single number leaves nothing"),
        (("pixels", (8, 8, 3), "none"), r"level z2: standardize 'none' given; 'pixels' has a scale of its own: leave"),
        (("patch_pca", (4, 4, 12), "sample"), r"level z2: standardize 'sample' given; 'patch_pca' has a scale of its"),
    ],
)
def test_refuses_standardisations(finished, level, message):
    source, shape, standardize = level
    with pytest.raises(ValueError, match=message) as error:
        read_latents(finished, (level_source("z2", source, shape, standardize=standardize), LEVELS[2]))
    assert one_line(error)


def test_the_finest_level_needs_a_decoder(finished):
    with pytest.raises(
        ValueError, match=r"level z2: source 'map' has no decoder; the finest level's source must be that"
    ):
        read_latents(finished, LEVELS[:2])


def test_a_dead_channel_names_the_level(tmp_path):
    """3 images span 2 dimensions of crops1: the third channel is empty."""
    run(tmp_path, Source(3))
    with pytest.raises(ValueError, match=r"level z3 \(crops1\): channel 2 of 4 has no variance left.*at most 2 ch"):
        read_latents(tmp_path, LEVELS)


def test_reading_refuses_unfinished_and_damaged_directories(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"latents.json: not found: .* run --mode=encode"):
        read_latents(tmp_path / "nowhere", LEVELS)
    (copy / "statistics.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="statistics.npz: damaged, or of another encoding"):
        read_latents(copy, LEVELS)
    (copy / "statistics.npz").unlink()
    with pytest.raises(FileNotFoundError, match="statistics.npz: not found"):
        read_latents(copy, LEVELS)
    (copy / "latents.json").write_text("{")
    with pytest.raises(ValueError, match="latents.json: not valid JSON"):
        records.LatentRecords(copy)


def test_latent_records_are_a_source(finished):
    source = pickle.loads(pickle.dumps(records.LatentRecords(finished)))
    assert len(source) == IMAGES and source.num_classes == 4 and source.image_shape == (8, 8, 3)
    assert "44 encoded images in 3 shard(s)" in source.describe()
    np.testing.assert_array_equal(source[40]["image"], Source().images[40])
    again = pickle.loads(pickle.dumps(source))  # with open readers
    np.testing.assert_array_equal(again[15]["image"], Source().images[15])
    for index in (-1, IMAGES):
        with pytest.raises(IndexError):
            source[index]
    with pytest.raises(ValueError, match="no field 'depth' in these latents, only label, crops1, map, image"):
        records.LatentRecords(finished, ("depth",))


def test_pack_checks_shapes():
    fields = (records.Field("label", "int32", ()), records.Field("x", "float16", (2, 3)))
    record = {"label": 7, "x": np.arange(6).reshape(2, 3)}
    found = records.unpack(records.pack(record, fields), fields)
    assert found["label"] == 7 and found["x"].dtype == np.float16
    np.testing.assert_array_equal(found["x"], record["x"])
    with pytest.raises(ValueError, match=r"record field 'x': shape \(3, 2\), the layout says \(2, 3\)"):
        records.pack(record | {"x": np.zeros((3, 2))}, fields)


# --- levels of the images themselves ---------------------------------------------------------------------------------


def of_images(shape, image_shape=(8, 8, 3), **options):
    return latents_of_images((level_source("x", "pixels", shape, **options),), image_shape)


def test_levels_of_images_are_averaged_by_the_configs_word():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    made = of_images(((2, 2, 3), (8, 8, 3)), downsampling="bilinear")
    coarse, fine = made.variables({"image": images}, None)["x"]
    middle = (images / 127.5 - 1)[:, 1:3, 5:7].mean((1, 2))
    np.testing.assert_allclose(coarse[:, 0, 1], middle, atol=1e-6)
    np.testing.assert_array_equal(made.decode((coarse, fine)), images)
    low, high = made.resolutions((coarse, fine))
    np.testing.assert_array_equal(high, images)
    assert low.shape == (2, 2, 2, 3) and low.dtype == np.uint8
    (only,) = of_images((8, 8, 3)).resolutions(fine)
    np.testing.assert_array_equal(only, images)


def test_the_report_of_joint_levels_counts_all_resolutions():
    (row,) = of_images(((1, 1, 3), (2, 2, 3))).report({"x": 1.0})
    assert row["shape"] == [(1, 1, 3), (2, 2, 3)] and row["bits_per_image"] == pytest.approx(7.5 / np.log(2))
    assert format_report([row]).startswith("x: 1x1x3 + 2x2x3 from pixels, 100.0 %")


@pytest.mark.parametrize(
    "shape, image_shape, message",
    [
        (((3, 3, 3), (8, 8, 3)), (8, 8, 3), "level x: shape 3x3x3 given, but images of 8x8x3 are only averaged over s"),
        (((4, 2, 3), (8, 8, 3)), (8, 8, 3), "level x: shape 4x2x3 given"),
        (((4, 4, 1), (8, 8, 1)), (8, 8, 3), "level x: shape 4x4x1 given"),
        ((16, 16, 3), (8, 8, 3), "level x: shape 16x16x3 given"),
        ((2, 8, 8, 3), (8, 8, 3), "level x: shape 2x8x8x3 given, but images of 8x8x3"),
        ((2, 8, 8, 3), (4, 8, 8, 3), "level x: shape 2x8x8x3 given, but images of 4x8x8x3"),
        ((8, 8, 3), (None, None, 3), "the images differ in size: set config.data.image_size to the finest level's sid"),
    ],
)
def test_images_that_do_not_give_a_shape(shape, image_shape, message):
    with pytest.raises(ValueError) as error:
        of_images(shape, image_shape)
    assert str(error.value).startswith(message) and one_line(error)


def test_as_many_records_as_imagenet_has_are_opened_at_once(tmp_path):
    """Opening reads an index of shards, no shard. The shards are links to one."""
    fields, count = (records.Field("label", "int32", ()), records.Field("map", "float16", (2, 2, 4))), 313
    (tmp_path / "latents").mkdir()
    one = tmp_path / "one"
    empty = np.zeros((2, 2, 4))
    records.write_shard(one, (records.pack({"label": i, "map": empty}, fields) for i in range(4096)))
    shards = []
    for i in range(count):
        name = f"latents-{i:05d}-of-{count:05d}.array_record"
        os.link(one, tmp_path / "latents" / name)
        shards.append({"file": name, "records": 4096, "bytes": one.stat().st_size})
    index = {"fingerprint": "f", "num_classes": 4096, "image_shape": [8, 8, 3], "shards": shards}
    index["fields"] = [field.to_json() for field in fields]
    (tmp_path / "latents" / records.INDEX_FILE).write_text(json.dumps(index))
    began = time.monotonic()
    source = records.LatentRecords(tmp_path / "latents")
    assert len(source) == 1_282_048 and time.monotonic() - began < 5
    for i in (0, 4095, 4096, 700_000, len(source) - 1):
        assert source[i]["label"] == i % 4096
