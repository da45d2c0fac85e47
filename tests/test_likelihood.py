"""Likelihoods by the probability-flow ODE: recorded values of k_diffusion/sampling.py, closed forms, row keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exact import mixture_denoiser

from nested.diffusion import likelihood
from nested.diffusion.likelihood import log_likelihood
from nested.diffusion.process import Process
from nested.diffusion.schedules import ExponentialVE, LinearVP

VE, VP = Process((ExponentialVE(),), discrete_steps=0), Process((LinearVP(),))
KEYS = jax.random.split(jax.random.key(3), 5)
RANGE = dict(sigma_min=0.01, sigma_max=40.0)


def gaussian_denoiser(process, std=0.5):
    """Data N(0, std^2), leaf by leaf."""

    def denoise(x_t, t, cond):
        alpha_B1, sigma_B1 = (value[:, None] for value in process.schedules[0](t))
        gain_B1 = alpha_B1 * std**2 / (alpha_B1**2 * std**2 + sigma_B1**2)
        return jax.tree.map(lambda leaf: gain_B1 * leaf, x_t)

    return denoise


@pytest.mark.parametrize("process", [VE, VP])
def test_recorded_gaussian(golden, x64, process):
    """One probe is exact here. The record is dopri5's, to its tolerance; VP is the same density, reached through x."""
    record = golden("hdit_samplers.npz")
    value = log_likelihood(
        gaussian_denoiser(process), process, jnp.asarray(record["ll/x"]), {}, KEYS, **RANGE, steps=200
    )
    np.testing.assert_allclose(value, record["ll_gauss/value"], atol=3e-6)
    np.testing.assert_allclose(
        value, record["ll_gauss/exact_at_sigma_min"], atol=1e-3
    )  # the prior has no data variance


def test_recorded_mixture(golden, x64, monkeypatch):
    """With the recorded probe."""
    record = golden("hdit_samplers.npz")
    monkeypatch.setattr(likelihood, "_rademacher", lambda keys, index, leaf: jnp.asarray(record["ll/v"]))
    x = jnp.asarray(record["ll/x"])
    value = log_likelihood(mixture_denoiser(record, VE), VE, x, {}, KEYS, **RANGE, steps=200)
    np.testing.assert_allclose(value, record["ll/value"], atol=1e-4)


def test_two_leaves_are_added_and_rows_are_their_own(golden):
    """A leaf's dimensions add up; a row's value depends on its own key; float32 in, float32 out."""
    x = jnp.asarray(golden("hdit_samplers.npz")["ll/x"], jnp.float32)
    denoise, options = gaussian_denoiser(VE), dict(RANGE, steps=50)
    whole = log_likelihood(denoise, VE, x, {}, KEYS, **options)
    assert whole.dtype == jnp.float32
    split = log_likelihood(denoise, VE, (x[:, :1], x[:, 1:]), {}, KEYS, **options)
    np.testing.assert_allclose(split, whole, rtol=1e-4)
    coupled = lambda x_t, t, cond: jnp.tanh(x_t[:, ::-1] + x_t)  # noqa: E731  trace estimates differ by probe
    rows = np.array([4, 1])
    few, many = (log_likelihood(coupled, VE, x[i], {}, KEYS[i], **options) for i in (rows, np.arange(5)))
    np.testing.assert_allclose(few, many[rows], rtol=1e-4)
    assert np.abs(log_likelihood(coupled, VE, x, {}, KEYS[::-1], **options) - many).max() > 0.01


@pytest.mark.parametrize(
    "process, options, message",
    [
        (VE, dict(sigma_min=1.0, sigma_max=0.1), "sigma_min = 1.0, sigma_max = 0.1.*expected 0 < sigma_min < sigma_m"),
        (VE, dict(RANGE, steps=0), "steps = 0"),
        (Process((LinearVP(), LinearVP())), RANGE, "has 2 schedules: give a process of one"),
        (VP, dict(sigma_min=0.01, sigma_max=160.0), "the noise level 160 is above 152.167"),
    ],
)
def test_bad_options(process, options, message):
    with pytest.raises(ValueError, match=message) as error:
        log_likelihood(gaussian_denoiser(VE), process, jnp.zeros((5, 4)), {}, KEYS, **options)
    assert "\n" not in str(error.value)
