"""nested/build/data.py: images, encoder and latents of a config, and one line for each thing that it refuses."""

import gzip
import json

import numpy as np
import pytest
from helpers import tiny
from helpers.data_sets import open_images, source_kind
from helpers.refusals import refused
from helpers.run_data import latents_of, split_of
from helpers.text_encoders import Lengths
from helpers.tiny import with_changes
from helpers.toy_encoding import Source, Toy, encoder_kind

from configs import common, imagenet
from nested.build.data import build_data
from nested.build.options import declared_by_all
from nested.build.parts import ENCODERS, SOURCES, SPACES
from nested.build.text import Text
from nested.build.training import check_images_exist
from nested.encoders import vit


def test_frozen_networks_ask_for_their_files_before_the_data_are_asked_for(tmp_path):
    config = imagenet.get_config("L3,class")
    for name in vit.VARIANTS:
        config.encoder.name = name
        refused(latents_of, config, str(tmp_path), match=f"{name} comes in no package: give its weight file")
    config.encoder.update(name="efficientnet_lite0", map="stage4", vector="pool")
    refused(latents_of, config, str(tmp_path), match="sd_vae needs the autoencoder's weights")


@pytest.mark.parametrize(
    "changes, message",
    [
        ([("data.source", "mnist")], "config.data.source: 'mnist' given; choose from 'digits', 'idx', 'image_folder'"),
        (
            [("data.num_classes", 5)],
            "config.data.num_classes is 5 but digits of scikit-learn: 1797 images 8x8x1, 10 classes; set it to 10",
        ),
        ([("data.channels", 3)], "config.data.channels is 3 but digits of scikit-learn: 1797 images 8x8x1"),
    ],
)
def test_images_refuse(changes, message):
    refused(open_images, with_changes(*changes), match=message)


def test_images_are_cropped_and_converted_as_the_config_says():
    source = open_images(with_changes(("data.image_size", 6), ("data.channels", 3)))
    assert source.image_shape == source[0]["image"].shape == (6, 6, 3)
    assert open_images(with_changes(("data.image_size", 6)))[0]["image"].shape == (6, 6, 1)
    assert open_images(with_changes(("data.channels", 1))).image_shape == (8, 8, 1)


def write_idx(path, array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()))


def test_idx_files(tmp_path):
    config = with_changes(("data.source", "idx"), ("data.path", str(tmp_path)), ("data.num_classes", 4))
    refused(open_images, config, match="`apt-get install dataset-fashion-mnist` puts Fashion-MNIST in")
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((3, 5, 5), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([0, 3, 1], np.uint8))
    source = open_images(config)
    assert source.image_shape == (5, 5, 1) and source[1]["label"] == 3
    config.data.num_classes = 3
    message = "label 3 of example 1 is out of range 0..2 (1 such labels): set num_classes"
    refused(open_images, config, match=message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ([("encoder.name", "vgg")], "config.encoder.name: 'vgg' given; choose from 'efficientnet_lite0'"),
        ([("encoder.map", "stage9")], "encoder.map: 'stage9' given; efficientnet_lite0 takes 'stage4'"),
        ([("encoder.features", ("crops3",))], "encoder.features: 'crops3' given; choose from 'crops1'"),
        (
            [("encoder.vector", "cls")],
            "config.encoder.vector is 'cls', but 'efficientnet_lite0' does not",
        ),
        (
            [("encoder.prefix", "module.")],
            "config.encoder.prefix is 'module.', but 'efficientnet_lite0' does not",
        ),
        (
            [("encoder.dtype", "bfloat16")],
            "config.encoder.dtype is 'bfloat16', but 'efficientnet_lite0' does not",
        ),
        ([("encoder.name", "mae_vitb16"), ("encoder.map", "last")], "mae_vitb16 comes in no package: give its weight"),
        ([("encoder.input_size", 40)], "encoder.input_size: 40 given; efficientnet_lite0 takes positive multiples"),
        ([("encoder.weights", "absent.pth")], "absent.pth"),
    ],
)
def test_encoder_refuses(changes, message):
    refused(lambda config: build_data(config).open_encoder(), with_changes(*changes), match=message)


class Colours(Source):
    image_shape = (8, 8, 3)

    def describe(self):
        return "random colours"


@pytest.fixture
def toy(monkeypatch):
    """config.encoder 'toy' on 44 colour images of 8 x 8 in 4 classes: a config that encodes in a moment."""
    made = dict(source=Colours(), encoder=Toy())
    monkeypatch.setitem(SOURCES, "toy", source_kind(lambda: made["source"]))
    monkeypatch.setitem(ENCODERS, "toy", encoder_kind(lambda features: made["encoder"]))
    config = with_changes(
        ("data.source", "toy"), ("data.num_classes", 4), ("encoder.name", "toy"), ("encoder.components", (4,)),
        ("encoder.batch_size", 44), ("levels[2].shape", (8, 8, 3)),
    )  # fmt: skip
    return config, made


def test_latents_are_encoded_once_and_split(toy, tmp_path):
    config, made = toy
    records, latents = latents_of(config, str(tmp_path))
    assert len(records) == 44 and [level.name for level in latents.levels] == list(tiny.LEVELS)
    report = json.loads((tmp_path / "levels.json").read_text())
    assert [row["name"] for row in report] == list(tiny.LEVELS) and "bits_per_image" in report[0]
    made["source"].reads.clear()
    latents_of(config, str(tmp_path))
    assert set(made["source"].reads) == {0}  # its shape is looked at, nothing is encoded again
    training, held_out = split_of(config, records)
    assert len(training) == 36 and held_out["label"].shape == (8,)
    chosen = [2, 8, 13, 19, 24, 30, 35, 41]  # of 44, evenly spaced: a folder is sorted by class
    np.testing.assert_array_equal(held_out["image"], made["source"].images[chosen])
    seen = [training[i]["image"] for i in range(36)]
    np.testing.assert_array_equal(seen, np.delete(made["source"].images, chosen, axis=0))
    config.data.holdout = 0
    assert split_of(config, records) == (records, None)
    config.data.holdout = 44
    refused(split_of, config, records, match="config.data.holdout 44 of 44 records: keep it below that")


@pytest.mark.parametrize("stored", [True, False])
def test_encoded_latents_have_the_text_of_their_images(toy, tmp_path, monkeypatch, stored):
    config, made = toy
    config.text.update(encoder="minilm", stored=stored, max_tokens=3, width=2)
    made["source"].captions = tuple("a" * (i + 1) for i in range(44))
    monkeypatch.setattr(Text, "open", lambda self: Lengths())
    records, latents = latents_of(config, str(tmp_path))
    for i in (0, 43, 7):
        found = records[i]
        said = found["text"][:, 0] if stored else found["text_ids"]
        np.testing.assert_array_equal(said, [i + 1, 0, 0])
        np.testing.assert_array_equal(found["image"], made["source"].images[i])
    assert set(latents.fields) < set(records[0])
    made["source"].captions = made["source"].captions[:-1]
    refused(latents_of, config, str(tmp_path), match="43 captions for 44 records (44 encoded images")
    made["source"].captions = ("",) * 44
    refused(latents_of, config, str(tmp_path), match="44 of 44 examples have no caption or an empty one")
    config.data.max_bad_images = 1
    refused(latents_of, config, str(tmp_path), match="config.data.max_bad_images 1 with captions and encoded l")


def test_latents_of_another_encoder_or_another_config_are_refused(toy, tmp_path):
    config, made = toy
    latents_of(config, str(tmp_path))
    made["encoder"] = Toy(fingerprint="beef")
    message = "were made with encoder.weights_sha256 cafe, config says beef: use another latents_dir or delete it"
    refused(latents_of, config, str(tmp_path), match=message)
    made["encoder"] = Toy()
    config.encoder.components = (3,)
    refused(latents_of, config, str(tmp_path), match="encoder.components [4], config says [3]")
    config.latents_dir = str(tmp_path / "another")
    message = "level z1x1: shape 1x1x4 cannot come from 'map', which stores"
    refused(latents_of, config, str(tmp_path), match=message)


@pytest.mark.parametrize(
    "damage, encoder, message",
    [
        (dict(count=0), Toy(), "the data set is empty: nothing to encode; check config.data"),
        (dict(damage={7: {"label": 4}}), Toy(), "image 7: label 4 is outside 0 to 3"),
        (dict(damage={9: {"image": np.zeros((8, 8, 3), np.uint8)}}), Toy(nan_at=0), "image 9: NaN or infinity"),
    ],
)
def test_bad_data_are_refused_while_encoding(toy, tmp_path, damage, encoder, message):
    config, made = toy
    made.update(source=Colours(**damage), encoder=encoder)
    made["source"].images[made["source"].images[:, 0, 0, 0] == 0] = 1  # only the damaged image begins with 0
    refused(latents_of, config, str(tmp_path), match=message)


def test_options_that_encoding_does_not_take(toy, tmp_path):
    config, _ = toy
    with config.unlocked():
        config.encoder.crop = 3
    refused(latents_of, config, str(tmp_path), match="config.encoder: unknown option crop")
    with config.unlocked():
        del config.encoder.crop
        config.codec.rate = 3
    refused(latents_of, config, str(tmp_path), match="config.codec: unknown option rate")


def test_where_latents_are():
    for given, expected in (("", "run/latents"), ("/data/latents", "/data/latents")):
        assert build_data(with_changes(("latents_dir", given))).latents_dir("run") == expected


def test_synthetic_latents_are_the_variables(tmp_path):
    config = tiny.get_config("synthetic")
    records, latents = latents_of(config, str(tmp_path))
    assert len(records) == config.data.num_examples and list(tmp_path.iterdir()) == []
    variables = latents.variables(records[3], None)
    assert {name: z.shape for name, z in variables.items()} == {level.name: level.shape for level in config.levels}
    np.testing.assert_array_equal(variables["x"], records[3]["x"])
    refused(latents.decode, variables["x"], match="synthetic latents have no images")
    config.data.num_examples = 0
    refused(latents_of, config, "", match="synthetic latents: num_examples must be at least 1, found 0")


def test_synthetic_latents_cannot_be_drawn_and_this_is_said_at_the_start():
    config = with_changes(("data.source", "synthetic"))
    refused(check_images_exist, config, match="'synthetic', whose latents have no images")
    config.sample.num_samples = config.evaluate.num_samples = 0
    check_images_exist(config)


def test_codecs_declare_the_defaults_of_their_section():
    default = common.default().codec.to_dict()
    assert {"name": "pixels"} | {name: o.default for name, o in declared_by_all(SPACES.values()).items()} == default
