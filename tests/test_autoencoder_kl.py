"""nested/spaces/autoencoder_kl.py against diffusers' outputs; names, weights that do not fit, draws, memory."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested.runtime import partition
from nested.spaces import autoencoder_kl as kl
from nested.spaces.space import equal_slices
from nested.weights import files as weights

MOMENTS = jax.random.normal(jax.random.key(3), (6, 2, 3, 8))


@pytest.fixture(scope="module")
def recorded(golden):
    """(inputs and outputs as NHWC, tensors by diffusers' names, the same by CompVis' names)."""
    found = golden("enc_sd_vae.npz")
    tensors = {name[2:]: np.float32(x) for name, x in found.items() if name.startswith("w/")}
    arrays = {name: np.float32(x).transpose(0, 2, 3, 1) for name, x in found.items() if name[:3] in ("in/", "out")}
    renamed = json.loads(found["meta"].item())["diffusers_to_compvis_names"]
    as_convolution = {name: x[..., None, None] if x.ndim == 2 else x for name, x in tensors.items()}
    return arrays, tensors, {renamed[name]: x for name, x in as_convolution.items()}


def load(path, tensors, **options):
    np.savez(path / "weights.npz", **tensors)
    options = dict(prefix="", patch=2, channels=4, what="config.codec.weights") | options
    return kl.load_autoencoder(str(path / "weights.npz"), **options)


@pytest.fixture(scope="module")
def network(recorded, tmp_path_factory):
    return load(tmp_path_factory.mktemp("weights"), recorded[1])


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- the network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["diffusers", "compvis"])
def test_moments_latents_and_images_are_those_of_diffusers(recorded, tmp_path, names):
    arrays, tensors, compvis = recorded
    network = load(tmp_path, tensors if names == "diffusers" else compvis)
    mean, logvar = kl.moments(network.encoder, arrays["in/x"])
    close(np.concatenate([mean, logvar], -1), arrays["out/moments"])
    close(0.18215 * (mean + np.exp(logvar / 2) * arrays["in/eps"]), arrays["out/z"])
    close(kl.decode(network.decoder, arrays["in/z"] / 0.18215), arrays["out/decoded"])


def test_bfloat16_and_float64_are_near(recorded, network):
    arrays = recorded[0]
    rough = kl.decode(network.decoder, (arrays["in/z"] / 0.18215).astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    error = np.abs(np.float32(rough) - arrays["out/decoded"]).mean() / np.abs(arrays["out/decoded"]).mean()
    assert 1e-4 < error < 0.03
    with jax.enable_x64(True):
        exact = kl.decode(network.decoder, np.float64(arrays["in/z"]) / 0.18215)
        assert exact.dtype == np.float64
        np.testing.assert_allclose(exact, arrays["out/decoded"], rtol=0, atol=5e-6)


def test_the_log_variance_is_clamped(network, recorded):
    bias = network.params["quant_conv.bias"] + np.repeat([0, 50, -90], [4, 2, 2])
    _, logvar = kl.moments(network.encoder | {"quant_conv.bias": np.float32(bias)}, recorded[0]["in/x"])
    np.testing.assert_array_equal(logvar[..., :2], 20)
    np.testing.assert_array_equal(logvar[..., 2:], -30)


@pytest.mark.parametrize(
    "widths, channels, patch, parameters",
    [((128, 256, 512, 512), 4, 8, 83_653_863), ((128, 256, 512), 3, 4, 55_312_063)],
)
def test_the_published_autoencoders_have_their_size(widths, channels, patch, parameters):
    """f8 of Stable Diffusion, f4 of CompVis (kl-f4); shapes of what they make are traced."""
    layout = kl.Layout(widths, 2, channels, 3, ("quant_conv", "post_quant_conv"))
    assert layout.patch == patch and sum(map(math.prod, layout.shapes().values())) == parameters
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in layout.shapes().items()}
    mean, _ = jax.eval_shape(kl.moments, params, jax.ShapeDtypeStruct((2, 64, 96, 3), np.float32))
    assert mean.shape == (2, 64 // patch, 96 // patch, channels)
    assert jax.eval_shape(kl.decode, params, mean).shape == (2, 64, 96, 3)


# --- names and weights -------------------------------------------------------------------------------------------

OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("layout", ["older", "first_stage_model", "prefix", "loss", "folder"])
def test_files_as_they_are_released(recorded, network, tmp_path, layout):
    _, tensors, compvis = recorded
    options = {}
    if layout == "older":
        tensors = {re.sub("to_(q|k|v|out.0)(?=[.])", lambda m: OLDER[m[0]], name): x for name, x in tensors.items()}
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    elif layout == "first_stage_model":  # all of Stable Diffusion
        tensors = {f"state_dict.first_stage_model.{name}": x for name, x in compvis.items()}
        tensors["state_dict.model.diffusion_model.out.0.weight"] = np.zeros(3, np.float32)
    elif layout == "prefix":
        tensors = {f"{which}.{name}": x + (which == "b") for name, x in tensors.items() for which in "ab"}
        options = dict(prefix="a")
    elif layout == "loss":  # as it was trained
        tensors = compvis | {"loss.discriminator.main.0.weight": np.zeros(3), "model_ema.decay": np.zeros(())}
    found = load(tmp_path, tensors, **options)
    if layout == "folder":  # as diffusers saves it
        weights.write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors, {})
        found = kl.load_autoencoder(str(tmp_path), prefix="", patch=2, channels=4, what="config.codec.weights")
    assert found.layout == network.layout == kl.Layout((32, 64), 1, 4, 3, ("quant_conv", "post_quant_conv"))
    assert found.params.keys() == network.params.keys() and len(found.fingerprint) == 64
    for name, x in found.params.items():
        np.testing.assert_array_equal(x, network.params[name])


def test_the_convolutions_about_the_latents_may_be_absent(recorded, tmp_path):
    _, tensors, _ = recorded
    found = load(tmp_path, {name: x for name, x in tensors.items() if "quant" not in name})
    assert found.layout.quant == ()
    mean, logvar = kl.moments(found.params, np.zeros((1, 8, 8, 3), np.float32))
    assert mean.shape == logvar.shape == (1, 4, 4, 4) and kl.decode(found.params, mean).shape == (1, 8, 8, 3)


NORM = "decoder.up_blocks.1.resnets.0.norm1.weight"
REFUSED = [
    ({NORM: None}, {}, rf"config.codec.weights .*weights.npz: tensor '{NORM}' \(64,\) is missing"),
    ({NORM: np.zeros(32)}, {}, rf"tensor '{NORM}' has shape \(32,\), expected \(64,\)"),
    ({"encoder.down.0.attn.0.q.weight": np.zeros(3)}, {}, "tensor 'encoder.down.0.attn.0.q.weight' .* is unknown"),
    ({"encoder.conv_in.weight": None}, {}, "no tensor is called 'encoder.conv_in.weight'"),
    ({"decoder.conv_in.weight": None}, {}, "tensor 'decoder.conv_in.weight' of four axes is missing"),
    ({"encoder.down_blocks.1.resnets.0.conv1.weight": np.zeros((48, 32, 3, 3))}, {}, r"levels of \(32, 48\) channels"),
    ({}, dict(patch=8), "one position for 2x2 pixels; codec.patch is 8, codec.channels 4: set them to 2 and 4, or"),
    ({}, dict(channels=3), "latents of 4 channels, .* codec.channels 3: set them to 2 and 4"),
    ({}, dict(prefix="vae"), "no 'vae.encoder.conv_in.weight'"),
]


@pytest.mark.parametrize("changes, options, message", REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_weights_that_do_not_fit_are_refused(recorded, tmp_path, changes, options, message):
    tensors = {name: x for name, x in (recorded[1] | changes).items() if x is not None}
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, tensors, **options)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_there(tmp_path):
    options = dict(prefix="", patch=8, channels=4, what="config.codec.weights")
    with pytest.raises(ValueError, match="^config.codec.weights is '': sd_vae needs the autoencoder's weights; give"):
        kl.load_autoencoder("", **options)
    with pytest.raises(FileNotFoundError, match="no weight file in it"):
        kl.load_autoencoder(str(tmp_path), **options)


# --- the codec ---------------------------------------------------------------------------------------------------


def raw(moments):
    return {"sd_vae": moments}


def test_latents_are_drawn_from_their_moments():
    space = kl.LatentSpace((2, 3, 4), 0.5, 4, "float32", {})
    mean, logvar = np.split(np.asarray(MOMENTS), 2, axis=-1)
    std = np.exp(logvar / 2)
    z = jax.vmap(lambda key: space.variable(raw(MOMENTS), key))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose((z.mean(0) - 0.5 * mean) / std, 0, atol=0.04)
    np.testing.assert_allclose(z.std(0) / (0.5 * std), 1, atol=0.06)
    np.testing.assert_array_equal(space.variable(raw(MOMENTS.astype(np.float16)), None), 0.5 * mean.astype(np.float16))
    scores = (z - 0.5 * mean[None]) / (0.5 * std[None])
    correlation = np.corrcoef(scores.reshape(4000, -1)[:, ::7].T)  # of rows, positions and channels
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.08


def test_a_row_is_drawn_from_its_number_and_the_key():
    space, key = kl.LatentSpace((2, 3, 4), 0.5, 4, "float32", {}), jax.random.key(1)
    z = space.variable(raw(MOMENTS), key)
    np.testing.assert_array_equal(space.variable(raw(MOMENTS[:2]), key), z[:2])
    np.testing.assert_allclose(jax.jit(space.variable)(raw(MOMENTS), key), z, atol=1e-6)
    assert np.abs(space.variable(raw(MOMENTS), jax.random.key(2)) - z).min() > 0
    same = space.variable(raw(jnp.broadcast_to(MOMENTS[:1], MOMENTS.shape)), key)
    assert np.abs(same[0] - same[1]).max() > 0.1


@pytest.mark.parametrize(
    "rows, most, devices, sizes",
    [(12, 4, 1, [4] * 3), (12, 5, 1, [4] * 3), (12, 99, 1, [12]), (12, 2, 3, [6] * 2), (14, 5, 2, [2] * 7)],
)
def test_slices_are_equal_and_divide_by_the_devices(rows, most, devices, sizes):
    slices = equal_slices(rows, most, devices)
    assert [at.stop - at.start for at in slices] == sizes
    assert np.concatenate([np.arange(rows)[at] for at in slices]).tolist() == list(range(rows))


def test_images_become_moments_in_slices(network):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    mean, logvar = kl.moments(network.encoder, images / np.float32(127.5) - 1)
    found = kl.stored_moments(network.encoder, images, 2, partition.local_devices("rows"))
    np.testing.assert_allclose(found, np.concatenate([mean, logvar], -1), atol=1e-4)
