"""Encoding: what is written, resuming, several processes, refusals."""

import concurrent.futures
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers.toy_encoding import (
    CODEC,
    CONFIG,
    IMAGES,
    LEVELS,
    PIXELS,
    Killed,
    Source,
    Toy,
    batch,
    content,
    one_line,
    run,
)
from helpers.toy_encoding import level as level_source

from input_pipeline import latent_records as records
from nested.encoders import efficientnet, grids
from nested.latents import job as jobs
from nested.latents import passes
from nested.latents.job import load_parts, plan_job
from nested.latents.store import read_latents
from nested.spaces.svd import Basis, CovarianceStream, fit_basis, project


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("latents")
    run(directory)
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


# --- what is written ---------------------------------------------------------------------------------------------


def test_records_hold_images_labels_and_leading_components(finished):
    source, raw = Source(), batch(finished)
    np.testing.assert_array_equal(raw["image"], source.images)
    np.testing.assert_array_equal(raw["label"], source.labels)
    assert raw["label"].dtype == np.int32
    x = np.asarray(Toy().features(source.images)["map"], np.float64)
    rows = x.reshape(-1, 9)
    _, singular, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    z = (rows - rows.mean(0)) @ right[:5].T
    assert raw["map"].shape == (IMAGES, 4, 4, 5) and raw["map"].dtype == np.float16
    np.testing.assert_allclose(np.abs(raw["map"].reshape(-1, 5)), np.abs(z), atol=5e-3)
    share = json.loads((finished / "latents.json").read_text())["features"]["map"]["explained_variance"]
    np.testing.assert_allclose(share, (np.cumsum(singular**2) / np.sum(singular**2))[:5], atol=2e-6)


def test_json_says_what_made_it(finished):
    index = json.loads((finished / "latents.json").read_text())
    assert index["made_from"]["encoder.weights_sha256"] == "cafe"
    assert index["made_from"]["data.fingerprint"] == "a1b2"
    assert [shard["records"] for shard in index["shards"]] == [16, 16, 12]
    assert [field["name"] for field in index["fields"]] == ["label", "crops1", "map", "image"]
    assert index["features"]["crops1"]["bits_per_image_at_sigma"]["1.0"] == pytest.approx(2.5 / np.log(2))
    assert index["fields"] == json.loads((finished / "encoding.json").read_text())["fields"]


def test_fit_images_limits_the_basis_not_the_statistics(tmp_path, finished):
    run(tmp_path, config=dataclasses.replace(CONFIG, fit_images=20, shard_images=11))
    basis = load_parts(tmp_path / "statistics.npz", Basis, "basis/")["map"]
    fitted = np.r_[:11, 22:31]  # all of shard 0, a part of shard 2 of 4
    rows = np.asarray(Toy().features(Source().images[fitted])["map"], np.float64).reshape(-1, 9)
    np.testing.assert_allclose(basis.mean[0], rows.mean(0), atol=1e-6)
    z = read_latents(tmp_path, LEVELS).variables(batch(tmp_path), jax.random.key(0))["z2"]
    np.testing.assert_allclose(np.std(z, (0, 1, 2)), 1.0, atol=1e-5)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("svd", ["shared", "per_position"])
def test_pooled_maps_are_pooled_before_their_svd(tmp_path, svd, center):
    """As in the ICLR version, 3.3; 4 x 4 positions into 3 x 3 overlap."""
    config = dataclasses.replace(CONFIG, features=("map3", "map"), components=(4,), svd=svd, center=center)
    run(tmp_path, config=config)
    pool = grids.pooling_matrix(4, 3)
    x = np.einsum("bhwc,ih,jw->bijc", np.asarray(Toy().features(Source().images)["map"], np.float64), pool, pool)
    for rows, found in zip(*(per_basis(grid, svd) for grid in (x, batch(tmp_path)["map3"])), strict=True):
        rows = rows - rows.mean(0) * center
        right = np.linalg.svd(rows, full_matrices=False)[2]
        np.testing.assert_allclose(np.abs(found), np.abs(rows @ right[:4].T), atol=5e-3)


def per_basis(x_BhwC, svd):
    """The rows that share a basis: all, or those of each position."""
    rows = x_BhwC.reshape(len(x_BhwC), -1, x_BhwC.shape[-1])
    return [rows.reshape(-1, rows.shape[-1])] if svd == "shared" else list(rows.swapaxes(0, 1))


@pytest.mark.parametrize("svd, center", [("shared", True), ("shared", False), ("per_position", True), ("none", True)])
def test_features_of_the_codec_are_made_of_its_latents(tmp_path, caplog, svd, center):
    """Equal to encoding with the codec first, then pooling, then the SVD. No encoder is asked."""
    codec = dataclasses.replace(CODEC, channels=6)
    config = dataclasses.replace(CONFIG, features=("codec", "codec3"), components=(9,), svd=svd, center=center)
    caplog.set_level("INFO")
    run(tmp_path, encoder=Deaf(), config=config, codec=codec)
    assert "each went through the encoder 0.00 times" in caplog.text
    raw = batch(tmp_path)
    assert raw["codec"].shape == (IMAGES, 4, 4, 6) and raw["codec3"].shape == (IMAGES, 3, 3, 6)
    finest = read_latents(tmp_path, (level_source("z1", "patch_pca", (4, 4, 6)),))
    z = finest.variables(raw, jax.random.key(0))["z1"]
    for name, grid in (("codec", z), ("codec3", grids.adaptive_pool(z, 3))):
        sums = CovarianceStream(svd == "per_position")
        sums.add(grid, IMAGES)
        if svd == "none":
            expected = grid
        else:
            basis = fit_basis(sums.result(), 6, center)
            expected = project(grid, np.float32(basis.mean), np.float32(basis.vectors))
        np.testing.assert_allclose(np.abs(raw[name]), np.abs(expected), atol=5e-3)
    summary = json.loads((tmp_path / "latents.json").read_text())["features"]["codec3"]
    assert (summary["channels"], summary["components"]) == (6, 6)
    assert summary["explained_variance"][-1] == pytest.approx(1.0)


class Deaf:
    name, fingerprint = "deaf", "f00d"


def test_the_rate_is_said_and_what_would_save_time(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    run(tmp_path / "cached")
    assert "encoded 44 images" in caplog.text and "each went through the encoder 1.00 times\n" in caplog.text
    monkeypatch.setattr(passes, "FEATURE_CACHE_BYTES", 0)
    run(tmp_path / "twice")
    assert "each went through the encoder 2.00 times; a smaller encoder.fit_images saves time" in caplog.text
    run(tmp_path / "part", config=dataclasses.replace(CONFIG, fit_images=10))
    assert f"each went through the encoder {54 / 44:.2f} times\n" in caplog.text
    caplog.clear()
    run(tmp_path / "part", config=dataclasses.replace(CONFIG, fit_images=10))
    assert "encoded" not in caplog.text


def test_shards_of_the_fit_are_spread_over_the_data():
    """Folders of images are sorted by class: the first ones are not what all look like."""

    def shards(fit_images, count=44, size=4):
        config = dataclasses.replace(CONFIG, fit_images=fit_images, shard_images=size)
        return plan_job(Source(count), Toy(), config, CODEC, "").fit_shards

    assert shards(0) == shards(44) == shards(99) == dict.fromkeys(range(11), 4)
    assert shards(0, count=42) == dict.fromkeys(range(10), 4) | {10: 2}
    assert shards(10) == {0: 4, 3: 4, 7: 2}
    assert shards(1) == {0: 1}


def test_real_encoder(tmp_path):
    config = dataclasses.replace(CONFIG, components=(8,), batch_size=8, shard_images=24)
    encoder = efficientnet.load_efficientnet("", input_size=32, map="stage4", features=("crops1", "map"))
    run(tmp_path, Source(24), encoder, config)
    levels = (level_source("z2", "map", (1, 1, 8)), *LEVELS[2:])
    z = read_latents(tmp_path, levels).variables(batch(tmp_path), jax.random.key(0))
    np.testing.assert_allclose(np.std(z["z2"], (0, 1, 2)), 1.0, atol=1e-5)


# --- resuming and processes --------------------------------------------------------------------------------------


def test_complete_directory_returns_at_once(finished):
    source, before = Source(), content(finished)
    index = run(finished, source)
    assert index["num_records"] == IMAGES and source.reads == [0]
    assert content(finished) == before


@pytest.mark.parametrize("killed_at, svd", [(3, "shared"), (20, "shared"), (43, "shared"), (20, "per_position")])
def test_killed_run_resumes_to_the_same_bytes(tmp_path_factory, finished, killed_at, svd, monkeypatch):
    """Killed in pass 1, then in pass 2, then let finish; finished shards are not done again."""
    tmp_path, whole = tmp_path_factory.mktemp("killed"), finished
    config = CONFIG
    if svd != "shared":
        config = dataclasses.replace(CONFIG, svd=svd, features=("map", "codec2"))
        run(whole := tmp_path_factory.mktemp("whole"), config=config)
    monkeypatch.setattr(passes, "FEATURE_CACHE_BYTES", 0)
    shard = killed_at // 16
    with pytest.raises(Killed):
        run(tmp_path, Source(killed_at={killed_at: 1}), config=config)
    assert len(list(tmp_path.glob("statistics/covariance-*.npz"))) == shard
    source = Source(killed_at={killed_at: 2})
    with pytest.raises(Killed):
        run(tmp_path, source, config=config)
    assert min(source.reads[1 : IMAGES - 16 * shard]) == 16 * shard  # index 0 is first looked at for the image shape
    assert len(list(tmp_path.glob("*.array_record"))) == shard
    (tmp_path / f"latents-{shard:05d}-of-00003.array_record.tmp").write_bytes(b"half a shard")
    source = Source()
    run(tmp_path, source, config=config)
    assert min(source.reads[1:]) == 16 * shard
    assert content(tmp_path) == content(whole)


def test_lost_or_cut_shard_is_made_again(copy, finished):
    """From the bases that are there: the statistics that led to them are not needed any more."""
    (copy / "latents-00001-of-00003.array_record").unlink()
    cut = copy / "latents-00002-of-00003.array_record"
    cut.write_bytes(cut.read_bytes()[:-100])
    for path in copy.glob("statistics/covariance-*.npz"):
        path.unlink()
    with pytest.raises(ValueError, match=r"00001-of-00003.array_record: shard is missing; run --mode=encode"):
        records.LatentRecords(copy)
    (copy / "latents-00001-of-00003.array_record").touch()
    with pytest.raises(ValueError, match=r"00001-of-00003.array_record: shard has 0 bytes, \d+ were written"):
        records.LatentRecords(copy)
    source = Source()
    run(copy, source)
    assert sorted(set(source.reads[1:])) == list(range(16, IMAGES))
    assert content(copy) == {name: data for name, data in content(finished).items() if "covariance" not in name}


def test_two_processes_equal_one(tmp_path, finished):
    sources = [Source(), Source()]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run, tmp_path, sources[i], process_index=i, process_count=2, timeout_s=60.0) for i in range(2)
        ]
        indices = [job.result() for job in jobs]
    assert indices[0] == indices[1]
    assert set(sources[1].reads[1:]) == set(range(16, 32))
    assert content(tmp_path) == content(finished)


def test_feature_cache_changes_nothing(tmp_path, finished, monkeypatch):
    calls = []

    class Counting(Toy):
        def features(self, images):
            calls.append(len(images))
            return super().features(images)

    monkeypatch.setattr(passes, "FEATURE_CACHE_BYTES", 4 * (9 + 16 * 9) * 32)  # two of the three shards
    run(tmp_path, encoder=Counting())
    assert len(calls) == 1 + 8 + 2  # the shapes; pass 1; pass 2 of the third shard
    assert content(tmp_path) == content(finished)


def test_waiting_ends(tmp_path):
    with pytest.raises(TimeoutError, match=r"process 1: waited 0 s for encoding.json.*are all 2 enc") as error:
        run(tmp_path, process_index=1, process_count=2, timeout_s=0.3)
    assert one_line(error)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder": Toy(input_size=64)}, "encoder.input_size 32, config says 64: use"),
        ({"config": dataclasses.replace(CONFIG, components=(4,))}, "encoder.components \\[5\\], config says \\[4\\]"),
        ({"config": dataclasses.replace(CONFIG, svd="per_position")}, "encoder.svd shared, config says per_position"),
        ({"config": dataclasses.replace(CONFIG, center=False)}, "encoder.center True, config says False"),
        ({"encoder": Toy(fingerprint="beef")}, "encoder.weights_sha256 cafe, config says beef"),
        ({"source": Source(40)}, "data.num_images 44, config says 40"),
        ({"source": Source(size=4)}, r"data.image_shape \[8, 8, 3\], config says \[4, 4, 3\]"),
        ({"codec": dataclasses.replace(CODEC, channels=3)}, "codec.channels 12, config says 3"),
        (
            {"codec": PIXELS},
            "codec.channels 12, config says None; codec.name patch_pca, config says pixels; codec.patch 2",
        ),
    ],
)
def test_refuses_latents_made_from_something_else(finished, change, message):
    before = content(finished)
    with pytest.raises(ValueError, match=message) as error:
        run(finished, **change)
    assert one_line(error) and "use another latents_dir or delete it" in str(error.value)
    assert content(finished) == before


def test_batch_size_does_not_matter(finished):
    run(finished, config=dataclasses.replace(CONFIG, batch_size=9))


def test_refuses_shards_of_unknown_origin(copy):
    (copy / "encoding.json").unlink()
    with pytest.raises(ValueError, match="no encoding.json that says what made it"):
        run(copy)


def test_refuses_a_damaged_claim(copy):
    (copy / "encoding.json").write_text("{")
    with pytest.raises(ValueError, match="encoding.json: damaged"):
        run(copy)


IMAGE = Source().images
BAD_DATA = [
    ({"source": Source(0)}, "the data set is empty"),
    ({"source": Source(damage={17: {"label": 4}})}, "image 17: label 4 is outside 0 to 3"),
    ({"source": Source(damage={17: {"label": -1}})}, "image 17: label -1 is outside 0 to 3"),
    ({"source": Source(damage={9: {"image": IMAGE[9, :6]}})}, r"image 9: uint8 \(6, 8, 3\), image 0 is uint8 \(8, 8"),
    ({"source": Source(damage={9: {"image": IMAGE[9] / 255.0}})}, r"image 9: float64 \(8, 8, 3\)"),
    ({"source": Source(damage={0: {"image": IMAGE[0, 0]}})}, r"image 0: shape \(8, 3\); images must be \[H, W"),
    ({"encoder": Toy(nan_at=int(IMAGE[21, 0, 0, 0]))}, "image 21: NaN or infinity in feature 'crops1'"),
    ({"config": dataclasses.replace(CONFIG, shard_images=0)}, "encoder.shard_images: 0 given"),
    ({"config": dataclasses.replace(CONFIG, fit_images=-1)}, "encoder.fit_images: -1 given"),
    ({"config": dataclasses.replace(CONFIG, svd="pca")}, "encoder.svd: 'pca' given; choose from 'shared', 'per_posi"),
    ({"config": dataclasses.replace(CONFIG, svd="none")}, "encoder.components: 5 given, but 'crops1' has 9 channels"),
    (
        {"config": dataclasses.replace(CONFIG, svd="none", center=False)},
        "encoder.center: False given, but with encoder.svd 'none' nothing is centred",
    ),
    (
        {"config": dataclasses.replace(CONFIG, svd="none", components=(11,), features=("codec",))},
        "encoder.components: 11 given, but 'codec' has 12 channels",
    ),
    (
        {"config": dataclasses.replace(CONFIG, features=("map5",))},
        "encoder.features: 'map5' asks for 5x5 of a grid of 4x4, and pooling only makes it smaller; name 'map4' or l",
    ),
    ({"config": dataclasses.replace(CONFIG, features=("codec5",))}, "'codec5' asks for 5x5 of a grid of 4x4"),
    ({"config": dataclasses.replace(CONFIG, features=("codec0",))}, "encoder.features: 'codec0' given; choose from"),
    (
        {"config": dataclasses.replace(CONFIG, features=("codec",)), "codec": PIXELS},
        "encoder.features: 'codec' given, but codec.name 'pixels' has no latents",
    ),
    ({"codec": dataclasses.replace(CODEC, patch=3)}, "codec.patch: 3 does not divide the images' 8x8"),
    ({"codec": dataclasses.replace(CODEC, channels=13)}, "codec.channels: 13 given; a 2x2 patch .* has 1 to 12"),
]


def test_refuses_covariances_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "COVARIANCE_BYTES", 8 * 16 * 81)
    config = dataclasses.replace(CONFIG, svd="per_position")
    run(tmp_path, config=config)
    monkeypatch.setattr(jobs, "COVARIANCE_BYTES", 8 * 16 * 81 - 1)
    with pytest.raises(ValueError, match="'per_position' given, but 'map' has 4x4 positions of 9 channels") as error:
        run(tmp_path, config=config)
    assert one_line(error) and "name it pooled ('mapN', 'codecN')" in str(error.value)


@pytest.mark.parametrize("change, message", BAD_DATA, ids=[message[:24] for _, message in BAD_DATA])
def test_refuses_bad_data_and_options(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path, **change)
    assert one_line(error)
    assert not (tmp_path / "latents.json").exists()


def test_refuses_values_beyond_float16(tmp_path):
    """Finite features whose components float16 cannot hold are found in pass 2; the shard is not left behind."""
    source = Source()
    source.images[:, 0, 0, 0] = 1
    source.images[21, 0, 0, 0] = 0
    with pytest.raises(ValueError, match=r"image 21: NaN, infinity or a value beyond float16 in feature"):
        run(tmp_path, source, Toy(huge_at=0))
    assert [path.name for path in tmp_path.glob("latents*")] == ["latents-00000-of-00003.array_record"]


def test_unlabelled_data_get_label_zero(tmp_path):
    source = Source(6, damage={2: {"label": 99}})
    source.num_classes = 0
    run(tmp_path, source)
    np.testing.assert_array_equal(batch(tmp_path)["label"], np.zeros(6))


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not writable") as error:
        run(tmp_path / "file" / "latents")
    assert one_line(error)


def test_a_shard_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"shard not written: open\(\) failed") as error:
        records.write_shard(tmp_path / "absent" / "shard", [b"x"])
    assert one_line(error)


def test_all_images_are_read_before_the_first_is_encoded_once_and_by_one_process(tmp_path):
    class Checked(Source):
        checks = 0

        def check(self):
            Checked.checks += 1

    for i, check in ((0, False), (1, True), (0, True), (0, True)):  # the second process leaves it to the first
        with pytest.raises(TimeoutError):
            run(tmp_path, Checked(), check=check, process_index=i, process_count=2, timeout_s=0.0)
        assert Checked.checks == (check and i == 0)
        assert (tmp_path / "checked.txt").exists() == bool(Checked.checks)
