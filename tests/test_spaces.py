"""A space of a file of the tests' own is encoded, trained and decoded; and sampling never encodes."""

import numpy as np
import pytest
from helpers import tiny
from helpers.data_sets import source_kind
from helpers.refusals import refused
from helpers.run_data import decoder_of, latents_of
from helpers.stored_space import Averaged
from helpers.toy_encoding import Source, Toy, encoder_kind

from input_pipeline import latent_records as records
from input_pipeline import loader
from nested.build.data import Data, build_data
from nested.build.parts import ENCODERS, SOURCES, SPACES
from nested.modes import encode, sample, train


class Colours(Source):
    image_shape = (8, 8, 3)


@pytest.fixture
def config(monkeypatch):
    """z1x1 of the toy encoder's map above averages of random 8x8 images; both flips."""
    monkeypatch.setitem(SOURCES, "toy", source_kind(Colours))
    monkeypatch.setitem(ENCODERS, "toy", encoder_kind(lambda features: Toy(feature_names=features)))
    monkeypatch.setitem(SPACES, Averaged.name, Averaged)
    config = tiny.get_config("digits,L2")
    config.data.update(source="toy", num_classes=4, holdout=0, flip=True)
    config.encoder.update(name="toy", components=(4,), batch_size=22)
    config.codec.name = config.levels[1].source = Averaged.name
    config.levels[1].shape = (4, 4, 3)
    config.train.update(steps=2, eval_every=0)
    config.evaluate.num_samples = 0
    return config


def test_a_space_that_stores_something_in_place_of_the_image(config, tmp_path):
    source, latents = latents_of(config, tmp_path)
    batch = loader.collate([source[i] for i in range(len(source))])
    assert set(batch) == {"label", "map", "averages", "map.mirrored", "averages.mirrored"}
    pixels = Colours().images
    expected = (pixels / 127.5 - 1).reshape(-1, 4, 2, 4, 2, 3).mean((2, 4))
    z = latents.variables(batch, None)["x"]
    np.testing.assert_allclose(z, expected, atol=1e-3)
    np.testing.assert_allclose(batch["averages.mirrored"], expected[:, :, ::-1], atol=1e-3)
    decoded = np.asarray(latents.decode(z), np.int32)
    assert decoded.shape == pixels.shape
    np.testing.assert_allclose(decoded[:, ::2, 1::2], (expected + 1) * 127.5, atol=1)
    index = records.read_index(tmp_path / "latents")
    assert index["made_from"]["codec.name"] == "averaged" and set(index["features"]) == {"map"}


def test_it_trains_two_steps_and_samples(config, tmp_path):
    config.sample.update(num_samples=4, batch_size=4)
    train.run(config, str(tmp_path))
    sample.run(config, str(tmp_path), 4, str(tmp_path / "drawn"))
    with np.load(tmp_path / "drawn.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[:, ::2], images[:, 1::2])


def test_levels_say_what_such_latents_hold(config, tmp_path):
    latents_of(config, tmp_path)
    config.levels[1].update(source="pixels", shape=(8, 8, 3))
    refused(latents_of, config, tmp_path, match="level x: source 'pixels' is not in these latents, only averaged, map")
    config.levels[1].update(source="averaged", shape=(2, 2, 3))
    refused(latents_of, config, tmp_path, match="level x: shape 2x2x3 given; 'averaged' of averages here is 4x4x3")


def test_sampling_does_not_encode(config, tmp_path, monkeypatch):
    """It reads a finished encoding, and asks for neither data nor encoder."""
    refused(decoder_of, config, tmp_path, match="latents.json: not found: these latents were not (completely) encoded")
    assert not (tmp_path / "latents").exists()
    latents_of(config, tmp_path)
    monkeypatch.setattr(Data, "open_images", None)
    monkeypatch.setattr(encode, "encode_images", None)
    assert decoder_of(config, tmp_path).decode(np.zeros((1, 4, 4, 3), np.float32)).shape == (1, 8, 8, 3)


def test_building_data_opens_nothing(config, monkeypatch):
    monkeypatch.setattr(Data, "open_images", None)
    monkeypatch.setattr(Averaged, "open", None)
    config.latents_dir, config.encoder.weights = "/nowhere", "/nowhere/weights.pth"
    data = build_data(config)
    assert data.needs_encoding and data.decoded_shape == (4, 4, 3) and data.latents_dir("run") == "/nowhere"
    assert [level.source.name for level in data.levels] == ["map", "averaged"]
