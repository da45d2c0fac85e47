"""The codec sd_vae through the modes: encoding, training, sampling, scores, on 44 images of 16x16 and a tiny network;
and both flips of everything that is encoded."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from helpers import tiny, toy_encoding
from helpers.data_sets import source_kind
from helpers.refusals import refused
from helpers.run_data import decoder_of, latents_of, split_of
from helpers.scoring import Pooler
from helpers.text_encoders import Lengths
from helpers.toy_encoding import Source, Toy, encoder_kind

from configs import imagenet
from input_pipeline import loader
from nested.build.data import build_data
from nested.build.parts import ENCODERS, SOURCES
from nested.build.text import Text
from nested.evaluation import memorization
from nested.evaluation.features import reference_features
from nested.latents.job import Job
from nested.modes import encode, evaluate, neighbors, sample, train
from nested.runtime import partition
from nested.runtime.writers import read_metrics
from nested.spaces import autoencoder_kl as kl
from nested.spaces.pixels import to_images
from nested.spaces.svd import CovarianceStream, fit_basis

SIDE, COUNT = 16, 44
NAMES = ("map", "map.mirrored")


class Colours(Source):
    image_shape, describe = (SIDE, SIDE, 3), lambda self: "random colours"

    def __init__(self):
        super().__init__(COUNT, size=SIDE)


@pytest.fixture(scope="module")
def weights(golden, tmp_path_factory):
    """A weight file of the small autoencoder: levels of 32 and 64 channels, 2x2 pixels and 4 channels a position."""
    path = tmp_path_factory.mktemp("weights") / "vae.npz"
    found = golden("enc_sd_vae.npz")
    np.savez(path, **{name[2:]: x for name, x in found.items() if name.startswith("w/")})
    return str(path)


def make_config(path, features=("map",), **codec):
    """z1x1 of the toy encoder's map, x of the autoencoder's latents; both flips."""
    config = tiny.get_config("digits,L2")
    config.data.update(source="toy", num_classes=4, holdout=8, flip=True)
    config.encoder.update(name="toy", features=features, components=(4,), batch_size=22, shard_images=22)
    config.codec.update(dict(name="sd_vae", patch=2, channels=4, weights=path, batch_size=4) | codec)
    config.levels[1].update(source="sd_vae", shape=(8, 8, 4))
    config.train.update(steps=2, eval_every=2, eval_times=(0.5,))
    config.sample.num_samples = config.evaluate.num_samples = 0
    config.evaluate.update(num_reference=COUNT, unguided=False, neighbors=dict(queries=2, nearest=3, k=5))
    return config


@pytest.fixture(scope="module", autouse=True)
def toy():
    """The data set and the encoder of make_config, and a stand-in for the scores' features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "toy", source_kind(Colours))
        patch.setitem(ENCODERS, "toy", encoder_kind(lambda features: Toy(feature_names=features)))
        patch.setattr(evaluate, "load_score_encoder", lambda config: Pooler())
        yield


@pytest.fixture(scope="module")
def encoded(weights, tmp_path_factory):
    """(workdir, records, Latents) of make_config."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, *latents_of(make_config(weights), str(workdir))


@pytest.fixture(scope="module")
def network(weights):
    return kl.load_autoencoder(weights, prefix="", patch=2, channels=4, what="")


def batch_of(source, count=COUNT):
    return loader.collate([source[i] for i in range(count)])


def moments_of(network, images):
    return np.concatenate(kl.moments(network.encoder, images / np.float32(127.5) - 1), -1)


# --- what is stored ----------------------------------------------------------------------------------------------


def test_records_hold_the_moments_of_both_flips_and_no_image(encoded, network):
    workdir, source, _ = encoded
    batch, images = batch_of(source), Colours().images
    assert set(batch) == {"label", "map", "sd_vae", "map.mirrored", "sd_vae.mirrored"}
    assert batch["sd_vae"].shape == (COUNT, 8, 8, 8) and batch["sd_vae"].dtype == np.float16
    np.testing.assert_allclose(batch["sd_vae"], moments_of(network, images), atol=5e-3)
    np.testing.assert_allclose(batch["sd_vae.mirrored"], moments_of(network, images[:, :, ::-1]), atol=5e-3)
    index = json.loads((workdir / "latents" / "latents.json").read_text())
    assert index["sd_vae"]["grid"] == [8, 8] and index["made_from"]["data.flip"]
    assert index["made_from"]["codec.weights_sha256"] == network.fingerprint


def test_the_mirrored_fields_are_those_of_encoding_mirrored_images(encoded):
    """By the basis of the images as they are; the standardisation is over both flips."""
    _, source, latents = encoded
    batch = batch_of(source)
    x = np.asarray(Toy().features(Colours().images)["map"], np.float64)
    mirrored = np.asarray(Toy().features(Colours().images[:, :, ::-1])["map"], np.float64)
    covariance = CovarianceStream()
    covariance.add(x, COUNT)
    basis = fit_basis(covariance.result(), 4)
    for name, features in (("map", x), ("map.mirrored", mirrored)):
        expected = (features - basis.mean[0]) @ basis.vectors[0]
        np.testing.assert_allclose(batch[name], expected, atol=5e-3)
    both = np.concatenate([batch["map"], batch["map.mirrored"]])
    z = latents.variables({"map": both, "sd_vae": np.zeros((2 * COUNT, 8, 8, 8))}, None)["z1x1"]
    np.testing.assert_allclose(np.mean(z, (0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(z, (0, 1, 2)), 1, atol=1e-5)


def test_the_measured_scale_is_one_over_the_deviation_of_drawn_latents(encoded):
    workdir, source, latents = encoded
    batch = batch_of(source)
    both = np.concatenate([batch["sd_vae"], batch["sd_vae.mirrored"]])
    space = latents.finest
    z = np.asarray(jax.vmap(lambda key: space.variable({"sd_vae": both}, key))(jax.random.split(jax.random.key(0), 8)))
    assert z.std() == pytest.approx(1, abs=2e-3)
    measured = json.loads((workdir / "latents" / "latents.json").read_text())["sd_vae"]["measured_scale"]
    assert space.scale == measured


def test_a_scale_that_is_given_is_used(encoded, weights):
    workdir, source, latents = encoded
    given = latents_of(make_config(weights, scale=0.18215), str(workdir))[1]
    batch = batch_of(source, 4)
    z, key = given.variables(batch, jax.random.key(3))["x"], jax.random.key(3)
    ratio = 0.18215 / latents.finest.scale
    np.testing.assert_allclose(z, ratio * latents.variables(batch, key)["x"], atol=1e-5)
    np.testing.assert_array_equal(given.decode(z, given.params), latents.decode(z / ratio, latents.params))


def test_killed_encoding_resumes_to_the_same_bytes(weights, tmp_path):
    options = dict(
        config=dataclasses.replace(toy_encoding.CONFIG, features=("map", "codec2"), components=(4,)),
        codec=kl.AutoencoderKL(patch=2, channels=4, weights=weights).open(),
        flip=True,
    )
    toy_encoding.run(tmp_path / "whole", **options)
    with pytest.raises(toy_encoding.Killed):
        toy_encoding.run(tmp_path / "killed", Source(killed_at={20: 2}), **options)
    toy_encoding.run(tmp_path / "killed", **options)
    assert toy_encoding.content(tmp_path / "killed") == toy_encoding.content(tmp_path / "whole")


def test_the_mode_encode_says_the_scale(encoded, weights, capsys):
    workdir, _, latents = encoded
    encode.run(make_config(weights), str(workdir))
    scale = latents.finest.scale
    said = f"codec.scale: 1 / std of these latents is {scale:.5f}, the config has 0 (0: the measured one); --config.cod"
    assert capsys.readouterr().out.startswith(said)
    encode.run(tiny.get_config("synthetic"), str(workdir))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flip, kilobytes", [(True, 48), (False, 24)])
def test_records_of_imagenet_have_the_size_that_its_config_states(flip, kilobytes):
    config = imagenet.get_config("L5")
    grids = dict(crops1=(1, 1, 768), crops2=(2, 2, 768), crops4=(4, 4, 768), map8=(8, 8, 768))
    layout = kl.Layout((128, 256, 512, 512), 2, 4, 3, ())
    options = types.SimpleNamespace(features=config.encoder.features, components=config.encoder.components)
    codec = kl.OpenAutoencoder(kl.AutoencoderKL(patch=8), kl.Network({}, layout, ()))
    job = Job(None, None, options, codec, None, 0, 1, 0.0, (256, 256, 3), grids, None, flip, True)
    assert round(sum(field.nbytes for field in job.fields) / 1000) == kilobytes
    assert config.data.flip and sum(field.name.endswith(".mirrored") for field in job.fields) == 5 * flip


# --- flips -------------------------------------------------------------------------------------------------------


def test_training_draws_a_flip_of_all_fields_at_once(encoded, weights):
    source = encoded[1]
    config, plain = make_config(weights), batch_of(source)
    config.train.update(steps=12)
    training, held_out = split_of(config, source)
    assert set(held_out) == {"label", "map", "sd_vae"}
    first, again = (list(train.training_batches(config, training, start)) for start in (0, 4))
    for batch, same in zip(first[4:], again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, same)
    drawn = []
    for batch in first:
        assert set(batch) == {"label", "map", "sd_vae"}
        for row in range(8):
            where = [(name, np.flatnonzero((plain[name] == batch["map"][row]).all((1, 2, 3)))) for name in NAMES]
            ((name, (record,)),) = [(name, found) for name, found in where if len(found)]
            other = name.replace("map", "sd_vae")
            np.testing.assert_array_equal(batch["sd_vae"][row], plain[other][record])
            drawn.append(name == NAMES[1])
    assert 0.3 < np.mean(drawn) < 0.7


def test_flips_keep_the_text(encoded, weights, monkeypatch):
    monkeypatch.setattr(Colours, "captions", tuple("a" * (i + 1) for i in range(COUNT)), raising=False)
    monkeypatch.setattr(Text, "open", lambda self: Lengths())
    config = make_config(weights)
    config.text.update(encoder="minilm", stored=False, max_tokens=3, width=2)
    source, _ = latents_of(config, str(encoded[0]))
    batch, plain = next(train.training_batches(config, source, 0)), batch_of(encoded[1])
    assert set(batch) == {"label", "map", "sd_vae", "text_ids", "text_mask"}
    for row, length in enumerate(batch["text_ids"][:, 0]):
        both = [plain[name][length - 1] for name in NAMES]
        assert any((batch["map"][row] == x).all() for x in both)


def test_images_of_a_codec_of_images_are_flipped_with_their_features(weights, tmp_path):
    config = make_config(weights)
    config.codec.update(name="patch_pca", weights="", channels=6, batch_size=16)
    config.levels[1].update(source="patch_pca", shape=(8, 8, 6))
    source, _ = latents_of(config, str(tmp_path))
    plain = batch_of(source)
    assert set(plain) == {"label", "map", "map.mirrored", "image"}
    flip, drawn = build_data(config).augmentation, set()
    for seed in range(8):
        found = flip(source[3], np.random.default_rng(seed))
        mirrored = bool((found["image"] == plain["image"][3][:, ::-1]).all())
        np.testing.assert_array_equal(found["map"], plain[NAMES[mirrored]][3])
        drawn.add(mirrored)
    assert drawn == {True, False}


# --- the codec's own features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("svd, standardize", [("shared", "channel"), ("none", "none")])
def test_features_of_the_latents_are_of_their_scaled_means(weights, network, tmp_path, svd, standardize):
    config = make_config(weights, features=("codec2",), scale=0.25)
    config.encoder.svd = svd
    config.levels[0].update(source="codec2", shape=(2, 2, 4), standardize=standardize)
    source, latents = latents_of(config, str(tmp_path))
    mean = moments_of(network, Colours().images)[..., :4].reshape(COUNT, 2, 4, 2, 4, 4).mean((2, 4))
    z = latents.variables(batch_of(source), None)["z1x1"]
    if svd == "none":
        np.testing.assert_allclose(z, 0.25 * mean, atol=2e-3)
    else:
        rows = np.float64(mean).reshape(-1, 4)
        _, singular, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        stored = batch_of(source)["codec2"].reshape(-1, 4)
        np.testing.assert_allclose(np.abs(stored), np.abs((rows - rows.mean(0)) @ right.T), atol=1e-2)
        assert np.std(z) == pytest.approx(1, abs=0.1)  # over both flips it is 1


# --- the modes ---------------------------------------------------------------------------------------------------


def test_training_sampling_scores_and_pictures(encoded, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memorization, "BATCH", 16)
    config = make_config(weights, scale=0.2)
    config.latents_dir = str(encoded[0] / "latents")
    config.sample.num_samples, config.evaluate.num_samples, config.evaluate.memorization = 8, 8, 8
    train.run(config, str(tmp_path))
    printed = capsys.readouterr().out
    assert "picture: " in printed and "FD-EffLite0" in printed and "memorization.json" in printed
    metrics = {name: value for line in read_metrics(tmp_path) for name, value in line.items()}
    assert np.isfinite([metrics[name] for name in ("loss/z1x1", "loss/x", "validation/x/t0.5")]).all()
    found = json.loads((tmp_path / "memorization.json").read_text())
    assert found["num_compared_with"] == COUNT - 8 and found["pixels"]["quantiles"]["training"]["50%"] > 0
    sample.run(config, str(tmp_path), 8, str(tmp_path / "drawn"))
    with np.load(tmp_path / "drawn.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (8, SIDE, SIDE, 3) and images.std() > 10
    absent = make_config(weights, scale=0.2)  # neither data nor encoder are asked for
    absent.data.source, absent.encoder.name = "tfds", "mocov3_vitb16"
    sample.run(absent, str(tmp_path), 8, str(tmp_path / "again"))
    with np.load(tmp_path / "again.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], images)
    absent.codec.batch_size = 8  # in one slice, not in two
    gen, ema, _ = sample.restore_generator(absent, str(tmp_path))
    assert (len(gen.latents.slices(8, 1)), len(gen.latents.slices(16, 2)), len(gen.latents.slices(16, 1))) == (1, 1, 2)
    whole = gen.images(ema, 8, "tests")
    assert np.abs(np.int32(whole) - np.int32(images)).max() <= 1  # halves round either way
    neighbors.run(config, str(tmp_path))
    said = json.loads((tmp_path / "neighbors.json").read_text())["representations"]
    assert [entry["name"] for entry in said] == ["z1x1", "x", "pixels"]


def test_all_images_are_compared_as_decoded_from_their_means(encoded, network, monkeypatch):
    monkeypatch.setattr(memorization, "BATCH", 16)
    _, source, latents = encoded
    seen = memorization.make_decoder(latents.finest, latents, partition.make_mesh(1, 1))(batch_of(source)["sd_vae"])
    mean = moments_of(network, Colours().images)[..., :4]
    expected = to_images(kl.decode(network.decoder, mean))
    assert np.abs(np.int32(seen) - np.int32(expected)).max() <= 2  # the means are stored in float16


def test_references_are_read_from_the_data(encoded, weights):
    workdir, source, _ = encoded
    config = make_config(weights)
    pictured = encode.image_source(build_data(config), source)
    np.testing.assert_array_equal(pictured[5]["image"], Colours().images[5])
    reference = reference_features(pictured, Pooler(), config.evaluate.num_reference, 4, str(workdir))
    np.testing.assert_allclose(reference, Pooler().pooled(Colours().images), rtol=1e-6)
    assert encode.image_source(build_data(config), pictured) is pictured


def test_another_file_may_decode(encoded, weights, network, tmp_path):
    other = str(tmp_path / "average.npz")
    np.savez(other, **{f"model_ema.{name}": 1.1 * x for name, x in network.params.items()})
    config = make_config(weights, decoder_weights=other, scale=0.2)
    latents = latents_of(config, str(encoded[0]))[1]
    np.testing.assert_array_equal(latents.params["decoder.conv_in.bias"], 1.1 * network.params["decoder.conv_in.bias"])
    config.codec.decoder_weights = str(tmp_path / "absent.npz")
    refused(decoder_of, config, str(encoded[0]), match="absent.npz: no such weight file")


# --- refusals ----------------------------------------------------------------------------------------------------


def test_latents_of_other_weights_are_refused(encoded, network, weights, tmp_path):
    np.savez(tmp_path / "other.npz", **{name: x + np.float32(1e-3) for name, x in network.params.items()})
    config = make_config(str(tmp_path / "other.npz"))
    refused(latents_of, config, str(encoded[0]), match="made with codec.weights_sha256")
    config = make_config(weights)
    config.data.flip = False
    refused(latents_of, config, str(encoded[0]), match="made with data.flip True, config says None")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(path=""), "config.codec.weights is '': sd_vae needs the autoencoder's weights; give a file"),
        (dict(patch=8), "codec.patch is 8, codec.channels 4: set them to 2 and 4"),
        (dict(dtype="float16"), "codec.dtype: 'float16' given; choose from 'float32', 'bfloat16'"),
        (dict(scale=-1.0), "config.codec: scale -1.0, batch_size 4 given; the scale is positive, or 0 to measure it"),
        (dict(batch_size=0), "batch_size 0 given"),
        (dict(name="patch_pca"), "npz', but 'patch_pca' does not read it, only sd_vae; set it to ''"),
        (
            dict(name="pixels", path="", batch_size=16, scale=0.3),
            "config.codec.scale is 0.3, but 'pixels' does not",
        ),
        (dict(name="pixels", path="", batch_size=4), "config.codec.batch_size is 4, but 'pixels' does not read it"),
        (
            dict(name="pixels", path="", batch_size=16, patch=4),
            "config.codec.patch is 4, but 'pixels' does not",
        ),
        (dict(name="jpeg"), "codec.name: 'jpeg' given; choose from 'pixels', 'patch_pca', 'sd_vae'"),
    ],
)
def test_options_that_do_not_apply_are_refused(weights, tmp_path, change, message):
    refused(latents_of, make_config(**dict(path=weights) | change), str(tmp_path), match=message)


def test_levels_and_images_that_do_not_fit_are_refused(encoded, weights, tmp_path):
    workdir = str(encoded[0])
    for level, message in (
        (dict(shape=(4, 4, 4)), "level x: shape 4x4x4 given; 'sd_vae' of the autoencoder here is 8x8x4"),
        (dict(source="pixels", shape=(16, 16, 3)), "source 'pixels' is not in these latents, only sd_vae, map"),
        (dict(standardize="none"), "level x: standardize 'none' given; 'sd_vae' has a scale of its own"),
    ):
        config = make_config(weights)
        config.levels[1].update(level)
        refused(latents_of, config, workdir, match=message)
    for level, message in (
        (dict(shape=(8, 8, 3)), "level x: shape 8x8x3 given; 'sd_vae' of the autoencoder here is 8x8x4"),
        (dict(standardize="none"), "level x: standardize 'none' given; 'sd_vae' has a scale of its own"),
    ):
        config = make_config(weights, scale=0.2)
        config.levels[1].update(level)
        refused(decoder_of, config, workdir, match=message)
    for data, found in ((dict(image_size=15), "15x15x3"), (dict(image_size=16, channels=1), "16x16x1")):
        config = make_config(weights)
        config.data.update(data)
        message = f"images of 3 channel(s) and sides that 2 divides, found {found}; set data.image_size and data.ch"
        refused(latents_of, config, str(tmp_path), match=message)
