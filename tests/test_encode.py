"""Encoding: what is written, resuming, several processes, refusals."""

import concurrent.futures
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from toy_encoding import CODEC, CONFIG, IMAGES, LEVELS, Killed, Source, Toy, batch, content, one_line, run

from input_pipeline import latents as records
from nested import encode, encoding, latents
from nested.encoders import compress, efficientnet


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
    run(tmp_path, config=dataclasses.replace(CONFIG, fit_images=20))
    basis = encoding.load(tmp_path / "statistics.npz", compress.Basis, "basis/")["map"]
    rows = np.asarray(Toy().features(Source().images[:20])["map"], np.float64).reshape(-1, 9)
    np.testing.assert_allclose(basis.mean, rows.mean(0), atol=1e-6)
    z = latents.read(tmp_path, LEVELS).variables(batch(tmp_path), jax.random.key(0))["z2"]
    np.testing.assert_allclose(np.std(z, (0, 1, 2)), 1.0, atol=1e-5)


def test_real_encoder(tmp_path):
    config = dataclasses.replace(CONFIG, name=efficientnet.NAME, components=8, batch_size=8, shard_images=24)
    encoder = efficientnet.load("", input_size=32, map="stage4", vector="pool", features=("crops1", "map"))
    run(tmp_path, Source(24), encoder, config)
    levels = (latents.LevelSource("z2", "map", (1, 1, 8)), *LEVELS[2:])
    z = latents.read(tmp_path, levels).variables(batch(tmp_path), jax.random.key(0))
    np.testing.assert_allclose(np.std(z["z2"], (0, 1, 2)), 1.0, atol=1e-5)


# --- resuming and processes --------------------------------------------------------------------------------------


def test_complete_directory_returns_at_once(finished):
    source, before = Source(), content(finished)
    index = run(finished, source)
    assert index["num_records"] == IMAGES and source.reads == [0]
    assert content(finished) == before


@pytest.mark.parametrize("killed_at", [3, 20, 43])
def test_killed_run_resumes_to_the_same_bytes(tmp_path, finished, killed_at, monkeypatch):
    """Killed in pass 1, then in pass 2, then let finish; finished shards are not done again."""
    monkeypatch.setattr(encode, "FEATURE_CACHE_BYTES", 0)
    shard = killed_at // 16
    with pytest.raises(Killed):
        run(tmp_path, Source(killed_at={killed_at: 1}))
    assert len(list(tmp_path.glob("statistics/covariance-*.npz"))) == shard
    source = Source(killed_at={killed_at: 2})
    with pytest.raises(Killed):
        run(tmp_path, source)
    assert min(source.reads[1 : IMAGES - 16 * shard]) == 16 * shard  # index 0 is first looked at for the image shape
    assert len(list(tmp_path.glob("*.array_record"))) == shard
    (tmp_path / f"latents-{shard:05d}-of-00003.array_record.tmp").write_bytes(b"half a shard")
    source = Source()
    run(tmp_path, source)
    assert min(source.reads[1:]) == 16 * shard
    assert content(tmp_path) == content(finished)


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

    monkeypatch.setattr(encode, "FEATURE_CACHE_BYTES", 4 * (9 + 16 * 9) * 32)  # two of the three shards
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
        ({"config": dataclasses.replace(CONFIG, input_size=64)}, "encoder.input_size 32, config says 64: use"),
        ({"config": dataclasses.replace(CONFIG, components=4)}, "encoder.components 5, config says 4"),
        ({"encoder": Toy(fingerprint="beef")}, "encoder.weights_sha256 cafe, config says beef"),
        ({"source": Source(40)}, "data.num_images 44, config says 40"),
        ({"source": Source(size=4)}, r"data.image_shape \[8, 8, 3\], config says \[4, 4, 3\]"),
        ({"codec": dataclasses.replace(CODEC, channels=3)}, "codec.channels 12, config says 3"),
        (
            {"codec": encoding.CodecConfig("pixels", 0, 0)},
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


def test_batch_size_and_weights_path_do_not_matter(finished):
    run(finished, config=dataclasses.replace(CONFIG, batch_size=9, weights="elsewhere.pth"))


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
    ({"codec": dataclasses.replace(CODEC, name="jpeg")}, "codec.name: 'jpeg' given; choose from 'pixels', 'patch_pca'"),
    ({"codec": dataclasses.replace(CODEC, patch=3)}, "codec.patch: 3 does not divide the images' 8x8"),
    ({"codec": dataclasses.replace(CODEC, channels=13)}, "codec.channels: 13 given; a 2x2 patch .* has 1 to 12"),
]


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
