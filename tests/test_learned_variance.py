"""The variational bound of a learned variance: DiT's training losses, and what the bound is the optimum of."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processes import run_python

from nested.diffusion.process import Process
from nested.diffusion.schedules import ExponentialVE, LinearVP, ddpm_linear
from nested.diffusion.variational_bound import variational_bound

DIT = Process((ddpm_linear(),), learned_variance=True)


def recorded_step(golden, dtype):
    """(record, ours): loss, squared error, variational bound, and the loss's gradient, of the recorded outputs."""
    data = golden("dit_diffusion.npz")
    x0, noise, output = (jnp.asarray(data[f"in/{name}"], dtype) for name in ("x0", "noise", "output"))
    t = jnp.asarray((data["in/t"] + 1) / 1000, dtype)
    x_t = DIT.corrupt(x0, noise, t)
    plain = dataclasses.replace(DIT, learned_variance=False)
    x0_hat = DIT.to_x0(output, x_t, t)
    return data, dict(
        loss=DIT.loss(output, x0, noise, x_t, t),
        mse=plain.loss(output[..., :3], x0, noise, x_t, t),
        vb=variational_bound(DIT.schedules[0], 1000, x0, x0_hat, t, output[..., 3:]),
        gradient=jax.grad(lambda output: DIT.loss(output, x0, noise, x_t, t).sum())(output),
    )


def test_loss_of_dit(golden, x64):
    """1e-9: their betas come from a ratio of products, which costs 1e-16 of 1e-4."""
    data, ours = recorded_step(golden, jnp.float64)
    for name, value in ours.items():
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, data[f"f64/{name}"], rtol=1e-9, atol=1e-12, err_msg=name)


IN_FLOAT32 = """
import sys
sys.path.insert(0, "tests")
import conftest, numpy, test_learned_variance
test_learned_variance.check_loss_in_float32(lambda name: numpy.load(conftest.GOLDEN / name))
"""


def test_loss_of_dit_in_float32():
    """As their code runs: with the usual code of XLA, as the last digits of what compiles fastest are others."""
    run_python(IN_FLOAT32, devices=1, env={"XLA_FLAGS": ""})


def check_loss_in_float32(golden):
    """At n = 1 the gradient is that of a small difference, rounded there and here alike."""
    data, ours = recorded_step(golden, jnp.float32)
    for name, value in ours.items():
        assert value.dtype == jnp.float32
        if name != "gradient":
            np.testing.assert_allclose(value, data[f"f32/{name}"], rtol=1e-5, err_msg=name)
    for row, (gradient, theirs) in enumerate(zip(ours["gradient"], data["f32/gradient"], strict=True)):
        tolerance = 1e-5 if data["in/t"][row] else 5e-3
        np.testing.assert_allclose(gradient, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_bfloat16_is_cast_up():
    x0, values, t = jnp.ones((2, 4, 1)), jnp.full((2, 4, 1), 0.1, jnp.bfloat16), jnp.asarray([0.001, 0.5])
    bound = variational_bound(DIT.schedules[0], 1000, x0, 0.9 * x0, t, values)
    assert bound.dtype == jnp.float32
    single = variational_bound(DIT.schedules[0], 1000, x0, 0.9 * x0, t, values.astype(jnp.float32))
    np.testing.assert_array_equal(bound, single)


@pytest.mark.parametrize("schedule, steps", [(ddpm_linear(), 1000), (LinearVP(), 50)], ids=["chain", "continuous"])
@pytest.mark.parametrize("data, optimum", [("known", -1.0), ("normal", 1.0)])
def test_the_bound_moves_the_variance_to_the_true_one(x64, schedule, steps, data, optimum):
    """Its minimum is the variance of x_{n-1} given x_n: beta~_n where x0 is known, beta_n where x0 ~ N(0, 1)."""
    t = jnp.asarray([2, 3, 10, steps]) / steps
    _, sigma = schedule(t)  # of N(0, 1), given x_n: x0 has mean alpha x_n and deviation sigma
    error = (jnp.zeros_like(sigma) if data == "known" else sigma)[:, None] * jnp.asarray([[1.0, -1.0]])

    def slope(value):
        bound = jax.grad(lambda v: variational_bound(schedule, steps, error, 0 * error, t, v).sum())
        return np.asarray(bound(jnp.full((4, 2), value)))

    assert (slope(optimum + 0.5) > 0).all() and (slope(optimum - 0.5) < 0).all()
    np.testing.assert_allclose(slope(optimum) / slope(optimum + 0.5), 0, atol=1e-8)


def test_probabilities_of_the_256_values_sum_to_1(x64):
    x0 = jnp.asarray(np.arange(256.0)[:, None] / 127.5 - 1)
    t = jnp.full(256, 0.001)
    for mean, value in ((0.0, 0.3), (-1.0, 0.0), (0.97, 2.0)):
        bits = variational_bound(DIT.schedules[0], 1000, x0, jnp.full((256, 1), mean), t, jnp.full((256, 1), value))
        np.testing.assert_allclose(jnp.sum(2**-bits), 1, atol=1e-9)  # 1e-9: the floor of 1e-12 at 256 values
        assert abs(int(jnp.argmin(bits)) - (mean + 1) * 127.5) <= 1


def test_a_variable_of_two_leaves():
    """Each leaf's bound is that of its own schedule, times its weight; the weighting of the error leaves it alone."""
    rng, t = np.random.default_rng(0), jnp.asarray([0.02, 0.5, 1.0])
    shapes, weights, schedules = ((3, 4, 4, 2), (3, 5)), (2.0, 0.5), (ddpm_linear(), LinearVP())
    x0, noise = (tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes) for _ in range(2))
    raw = tuple(jnp.asarray(rng.normal(size=(*shape[:-1], 2 * shape[-1]))) for shape in shapes)
    process = Process(schedules, learned_variance=True, discrete_steps=50, weighting="snr")
    plain = dataclasses.replace(process, learned_variance=False)
    x_t = process.corrupt(x0, noise, t)
    first = tuple(leaf[..., : leaf.shape[-1] // 2] for leaf in raw)
    x0_hat = plain.to_x0(first, x_t, t)
    for ours, theirs in zip(process.to_x0(raw, x_t, t), x0_hat, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    expected = plain.loss(first, x0, noise, x_t, t, weights)
    for i, weight in enumerate(weights):
        values = raw[i][..., raw[i].shape[-1] // 2 :]
        expected += weight * variational_bound(schedules[i], 50, x0[i], x0_hat[i], t, values)
    np.testing.assert_allclose(process.loss(raw, x0, noise, x_t, t, weights), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options, found",
    [
        (dict(parameterization="v"), "parameterization 'v'"),
        (dict(discrete_steps=0), "discrete_steps = 0"),
        (dict(discrete_steps=1), "discrete_steps = 1,"),
        (dict(schedules=(LinearVP(), ExponentialVE())), "schedules ['LinearVP', 'ExponentialVE']"),
    ],
)
def test_options_without_a_bound(options, found):
    with pytest.raises(ValueError, match="process.learned_variance = True .*" + re.escape(found)) as error:
        dataclasses.replace(DIT, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("learned, channels, factor", [(True, 1, 2), (False, 2, 1)])
def test_an_output_of_other_channels_is_refused(learned, channels, factor):
    """With one channel, two would broadcast."""
    process = dataclasses.replace(DIT, learned_variance=learned)
    x, raw, t = jnp.ones((2, 4, 4, 1)), jnp.ones((2, 4, 4, channels)), jnp.asarray([0.1, 0.2])
    for call in (lambda: process.loss(raw, x, x, x, t), lambda: process.to_x0(raw, x, t)):
        with pytest.raises(ValueError, match=rf"= {learned}.*\(2, 4, 4, {channels}\).*expected {factor} times its cha"):
            call()


def test_large_errors_leave_the_gradient_finite():
    """Of the likelihood and the divergence, the one that a step does not use does not spoil the other."""
    x0, t = jnp.zeros((3, 4)), jnp.asarray([0.001, 0.5, 1.0])
    x0_hat = jnp.full((3, 4), 1e3)
    bound, gradient = jax.value_and_grad(
        lambda values: variational_bound(DIT.schedules[0], 1000, x0, x0_hat, t, values).sum()
    )(jnp.zeros((3, 4)))
    assert math.isfinite(bound) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], 0)  # beyond the floor of the likelihood
    assert (gradient[1:] < 0).all()
