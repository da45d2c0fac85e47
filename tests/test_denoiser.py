"""Denoisers, classifier-free guidance and thresholding: closed forms, U-ViT's recorded guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested.diffusion.denoiser import denoiser, thresholded
from nested.diffusion.guidance import guided, interleave
from nested.diffusion.process import Process
from nested.diffusion.schedules import LinearVP, cosine, sd_scaled_linear

SPACES = ("eps", "v", "x0")
T = np.asarray([0.1, 0.6, 0.9])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def two_leaf_network(x, c_noise, cond):
    """Mixes its leaves, its time and its conditions, row by row."""
    scale = (cond["a"] + jnp.sin(c_noise) + cond["label"])[:, None]
    return jnp.tanh(x[0] * scale + x[1][:, :1, 0]), x[1] * scale[:, :, None] + x[0][:, :1, None]


def inputs():
    x = (normal(0, 3, 4), normal(1, 3, 2, 5))
    return x, {"a": normal(2, 3), "label": jnp.asarray([1, 0, 2])}


def without_a(cond):
    return {**cond, "a": jnp.zeros_like(cond["a"])}


@pytest.mark.parametrize("space", SPACES)
def test_a_perfect_network_denoises(space, x64):
    process = Process((sd_scaled_linear(),), parameterization=space, time_scale=999.0)
    x0, noise = normal(0, 3, 4, 4, 2), normal(1, 3, 4, 4, 2)
    seen = []

    def network(x_t, c_noise, cond):
        seen.append((x_t, c_noise, cond))
        return process.target(x0, noise, T, space)

    x_t = process.corrupt(x0, noise, T)
    np.testing.assert_allclose(denoiser(network, process)(x_t, jnp.asarray(T), {"label": 7}), x0, atol=1e-11)
    ((x_seen, c_noise, cond),) = seen
    np.testing.assert_array_equal(x_seen, x_t)
    np.testing.assert_allclose(c_noise, T * 999)
    assert cond == {"label": 7}


def test_guidance_is_uvits(golden, x64):
    record = golden("uvit_training.npz")
    process = Process((sd_scaled_linear(),))
    x_t, t = normal(3, *record["cfg/cond"].shape), jnp.asarray([0.3, 0.8])
    unconditional = jnp.asarray(record["cfg/uncond"])
    denoise = denoiser(lambda x, c_noise, cond: cond["prediction"], process)
    guide = guided(denoise, lambda cond: {"prediction": unconditional}, float(record["cfg/w"]))
    x0 = guide(x_t, t, {"prediction": jnp.asarray(record["cfg/cond"])})
    np.testing.assert_allclose(process.convert(x0, x_t, t, "x0", "eps"), record["cfg/out"], atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_guidance_of_a_tree_is_two_forwards(space, x64):
    process = Process((cosine(), LinearVP()), parameterization=space)
    denoise = denoiser(two_leaf_network, process)
    x, cond = inputs()
    rows = []

    def counted(x_t, t, cond):
        rows.append(t.shape[0])
        return denoise(x_t, t, cond)

    out = guided(counted, without_a, 0.4)(x, T, cond)
    with_condition, with_null = denoise(x, T, cond), denoise(x, T, without_a(cond))
    for leaf, c, n in zip(out, with_condition, with_null, strict=True):
        np.testing.assert_allclose(leaf, 1.4 * c - 0.4 * n, atol=1e-11)
        assert np.abs(np.asarray(c - n)).max() > 0.01  # the condition matters
    assert rows == [6]  # one forward


def test_guidance_that_changes_nothing():
    denoise = denoiser(two_leaf_network, Process((cosine(), LinearVP())))
    x, cond = inputs()
    assert guided(denoise, without_a, 0.0) is denoise
    for leaf, unguided in zip(guided(denoise, dict, 2.5)(x, T, cond), denoise(x, T, cond), strict=True):
        np.testing.assert_allclose(leaf, unguided, rtol=1e-6)


def test_rows_are_interleaved_and_never_concatenated():
    x, cond = inputs()
    both = interleave(cond, without_a(cond))
    np.testing.assert_array_equal(both["label"], [1, 1, 0, 0, 2, 2])
    np.testing.assert_array_equal(both["a"][0::2], cond["a"])
    np.testing.assert_array_equal(both["a"][1::2], 0)
    guide = guided(denoiser(two_leaf_network, Process((cosine(),))), without_a, 1.0)
    text = str(jax.make_jaxpr(guide)(x, T, cond))
    assert "stack[axis=1]" in text or "concatenate[dimension=1]" in text  # by jax version
    assert "stack[axis=0]" not in text and "concatenate[dimension=0]" not in text


def test_guidance_refuses_other_keys():
    guide = guided(denoiser(two_leaf_network, Process((cosine(),))), lambda cond: {"label": cond["label"]}, 1.0)
    x, cond = inputs()
    with pytest.raises(ValueError, match=r"returned the keys \['label'\]: expected the condition's, \['a', 'label'\]$"):
        guide(x, T, cond)


def test_clip():
    x = jnp.asarray([[-3.0, -1.0, 0.25, 1.5]])
    clipped = thresholded(lambda x_t, t, cond: (x_t, 2 * x_t), None)(x, T[:1], {})
    np.testing.assert_array_equal(clipped[0], [[-1, -1, 0.25, 1]])
    np.testing.assert_array_equal(clipped[1], [[-1, -1, 0.5, 1]])


def test_dynamic_threshold():
    """Quantile by linear interpolation, per sample; a sample within [-1, 1] is left alone."""
    x = jnp.asarray([[-4.0, 1.0, 2.0, 3.0, 0.0], [0.1, -0.2, 0.3, 0.9, -1.0], [2.0, 2.0, 2.0, 2.0, -2.0]])
    out = thresholded(lambda x_t, t, cond: x_t, 0.6)(x, T, {})
    s = 2.4  # |x| sorted 0 1 2 3 4, position .6 * 4 = 2.4
    np.testing.assert_allclose(out[0], np.clip(x[0], -s, s) / s, rtol=1e-6)
    np.testing.assert_array_equal(out[1], x[1])
    np.testing.assert_array_equal(out[2], [1, 1, 1, 1, -1])


@pytest.mark.parametrize("percentile", [0.0, 1.0, 99.5])
def test_bad_percentile(percentile):
    with pytest.raises(ValueError, match=rf"percentile = {percentile}: give a number in \(0, 1\), or None to clip$"):
        thresholded(lambda x_t, t, cond: x_t, percentile)
