"""Schedules and prediction spaces: closed forms, and goldens of U-ViT (train_ldm_discrete.py, sde.py)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested.diffusion import process as process_lib
from nested.diffusion.process import Process
from nested.diffusion.schedules import LinearVP, PiecewiseVP, cosine, sd_scaled_linear

SCHEDULES = {"sd": sd_scaled_linear(), "cosine": cosine(), "linear": LinearVP(), "three": PiecewiseVP((0.1, 0.3, 0.6))}
SPACES = ("eps", "v", "x0")
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@each_schedule
def test_schedule_on_host(schedule):
    t = np.linspace(1e-3, 1, 777)
    alpha, sigma = schedule(t)
    assert alpha.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-14)
    np.testing.assert_allclose(schedule.log_snr(t), np.log(alpha / sigma), atol=1e-12)
    assert (np.diff(schedule.log_snr(t)) < 0).all()
    np.testing.assert_allclose(schedule.inverse_log_snr(schedule.log_snr(t)), t, atol=1e-12)
    middle = t[:-1] + np.diff(t) * 0.3141  # beta = -2 d log alpha / dt, away from the nodes
    slope = (schedule.log_alpha(middle + 1e-7) - schedule.log_alpha(middle - 1e-7)) / 2e-7
    np.testing.assert_allclose(schedule.beta(middle), -2 * slope, rtol=1e-5)


@each_schedule
def test_schedule_at_the_ends(schedule):
    alpha, sigma = schedule(np.array([0.0, 1.0]))
    assert schedule.log_snr(1.0) < 0 and sigma[1] > alpha[1]
    assert (alpha[0], sigma[0]) == (1, 0)


@each_schedule
def test_schedule_traced_equals_host(schedule, x64):
    t = np.array([0.0005, 0.001, 0.01234, 0.5, 0.77, 1.0])
    for function in (lambda t: schedule(t)[0], lambda t: schedule(t)[1], schedule.log_snr, schedule.beta):
        double = jax.jit(function)(jnp.asarray(t))
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, function(t), rtol=1e-11)
    single = schedule(jnp.asarray(t, jnp.float32))
    assert single[0].dtype == jnp.float32
    np.testing.assert_allclose(single, schedule(t), rtol=3e-5)  # 3e-5: t itself is rounded


def test_discrete_chain(golden):
    record = golden("uvit_training.npz")
    schedule = sd_scaled_linear()
    np.testing.assert_allclose(schedule.betas, record["betas"], rtol=1e-14)
    n = np.arange(1, 1001)
    alpha, sigma = schedule(n / 1000)
    np.testing.assert_allclose(alpha**2, record["cum_alphas"][1:], rtol=1e-12)
    np.testing.assert_allclose(sigma**2, record["cum_betas"][1:], rtol=1e-12)
    np.testing.assert_allclose(np.exp(2 * schedule.log_snr(n / 1000)), record["snr"][1:], rtol=1e-12)


def test_linear_vpsde(golden):
    record = golden("uvit_training.npz")
    alpha, sigma = LinearVP()(record["vpsde/t"])
    np.testing.assert_allclose(alpha**2, record["vpsde/cum_alpha"], rtol=1e-13)
    np.testing.assert_allclose(sigma**2, record["vpsde/cum_beta"], rtol=1e-11)
    np.testing.assert_allclose(np.exp(2 * LinearVP().log_snr(record["vpsde/t"])), record["vpsde/snr"], rtol=1e-11)


def test_cosine_chain_telescopes_to_the_cosine(golden):
    record = golden("uvit_training.npz")
    on_the_chain = [1, 2, 3, 4]  # t = .001 .1 .5 .9: points of the chain, before the cap on beta acts
    alpha, _ = cosine()(record["vpsde/t"][on_the_chain])
    np.testing.assert_allclose(alpha**2, record["vpsde_cosine/cum_alpha"][on_the_chain], rtol=1e-11)
    assert max(cosine().betas) == 0.999 and np.isclose(cosine()(1.0)[0] ** 2, 2.43e-9, rtol=1e-2)


def test_dpm_solver_schedules(golden):
    record = golden("uvit_dpm_solver.npz")
    t = record["sched/t"]
    for name, schedule in {"sched": sd_scaled_linear(), "sched_linear": LinearVP()}.items():
        np.testing.assert_allclose(schedule.log_alpha(t), record[f"{name}/log_alpha"], atol=1e-13)
        np.testing.assert_allclose(schedule.log_snr(t), record[f"{name}/lambda"], atol=1e-12)
        np.testing.assert_allclose(
            schedule.inverse_log_snr(record[f"{name}/lambda"]), record[f"{name}/inv_lambda"], atol=1e-13
        )
    np.testing.assert_allclose(sd_scaled_linear()(t)[1], record["sched/std"], atol=1e-14)


def test_training_step_of_uvit(golden, x64):
    record = golden("uvit_training.npz")
    x0, noise, t = record["q/x0"], record["q/eps"], jnp.asarray(record["q/n"] / 1000)
    process = Process((sd_scaled_linear(),))
    x_t = process.corrupt(jnp.asarray(x0), jnp.asarray(noise), t)
    np.testing.assert_allclose(x_t, record["q/xn"], atol=1e-13)
    loss = process.loss(jnp.asarray(record["q/pred"]), x0, noise, x_t, t)
    np.testing.assert_allclose(loss, record["q/loss_per_sample"], rtol=1e-12)
    np.testing.assert_allclose(process.c_noise(t), record["q/n"], rtol=1e-12)


@each_schedule
def test_every_conversion(schedule, x64):
    x0, noise, t = normal(0, 5, 3, 2), normal(1, 5, 3, 2), jnp.asarray([0.001, 0.1, 0.5, 0.9, 0.95])
    process = Process((schedule,))
    x_t = process.corrupt(x0, noise, t)
    alpha, sigma = (np.asarray(value)[:, None, None] for value in schedule(np.asarray(t)))
    truth = {"eps": noise, "x0": x0, "v": alpha * np.asarray(noise) - sigma * np.asarray(x0)}
    for space in SPACES:
        np.testing.assert_allclose(process.target(x0, noise, t, space), truth[space], atol=1e-12)
    for a, b in itertools.product(SPACES, SPACES):
        np.testing.assert_allclose(process.convert(truth[a], x_t, t, a, b), truth[b], atol=1e-9)
        # a prediction with an error: there and back again
        wrong = normal(2, 5, 3, 2)
        there = process.convert(wrong, x_t, t, a, b)
        np.testing.assert_allclose(process.convert(there, x_t, t, b, a), wrong, atol=1e-9)
    for space in SPACES:
        raw = process.target(x0, noise, t, space)
        replaced = dataclasses.replace(process, parameterization=space)
        np.testing.assert_allclose(replaced.to_x0(raw, x_t, t), x0, atol=1e-9)


def test_loss_spaces_are_reweightings(x64):
    """eps-loss = alpha^2 v-loss = SNR x0-loss, for any prediction (VP)."""
    x0, noise, raw, t = normal(0, 4, 6), normal(1, 4, 6), normal(2, 4, 6), jnp.asarray([0.05, 0.4, 0.7, 0.9])
    schedule = sd_scaled_linear()
    alpha, sigma = schedule(np.asarray(t))
    for parameterization in SPACES:
        losses = {}
        for space in SPACES:
            process = Process((schedule,), parameterization=parameterization, loss_space=space)
            losses[space] = process.loss(raw, x0, noise, process.corrupt(x0, noise, t), t)
        np.testing.assert_allclose(losses["eps"], alpha**2 * losses["v"], rtol=1e-10)
        np.testing.assert_allclose(losses["eps"], (alpha / sigma) ** 2 * losses["x0"], rtol=1e-10)
        default = Process((schedule,), parameterization=parameterization)
        loss = default.loss(raw, x0, noise, default.corrupt(x0, noise, t), t)
        np.testing.assert_allclose(loss, losses[parameterization], rtol=1e-12)


def test_a_variable_of_two_leaves():
    """Each leaf has its own schedule and loss weight; one schedule serves both; other numbers are refused."""
    x0, noise, raw = ((normal(seed, 3, 4, 4, 2), normal(seed + 1, 3, 2, 5)) for seed in (0, 2, 4))
    t = jnp.asarray([0.2, 0.5, 0.9])
    schedules = (cosine(), LinearVP())
    process = Process(schedules, parameterization="v")
    single = [Process((schedule,), parameterization="v") for schedule in schedules]
    x_t = process.corrupt(x0, noise, t)
    loss = process.loss(raw, x0, noise, x_t, t, (2.0, 0.5))
    expected = 0
    for i, weight in enumerate((2.0, 0.5)):
        np.testing.assert_array_equal(x_t[i], single[i].corrupt(x0[i], noise[i], t))
        np.testing.assert_array_equal(process.to_x0(raw, x_t, t)[i], single[i].to_x0(raw[i], x_t[i], t))
        expected += weight * single[i].loss(raw[i], x0[i], noise[i], x_t[i], t)
    assert loss.shape == (3,)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    shared = Process((cosine(),)).corrupt(x0, noise, t)
    np.testing.assert_array_equal(shared[0], single[0].corrupt(x0[0], noise[0], t))
    with pytest.raises(ValueError, match="2 entries, the variable 1 leaves: give 1 or 1$"):
        process.corrupt(x0[0], noise[0], t)
    with pytest.raises(ValueError, match="leaf_weights has 1 entries, the variable 2 leaves"):
        process.loss(raw, x0, noise, x_t, t, (1.0,))


def test_bfloat16_is_cast_up():
    x0, noise, t = normal(0, 2, 8), normal(1, 2, 8), jnp.asarray([0.3, 0.6])
    process = Process((sd_scaled_linear(),))
    low = noise.astype(jnp.bfloat16)
    assert process.corrupt(x0.astype(jnp.bfloat16), low, t).dtype == jnp.float32
    x_t = process.corrupt(x0, low, t)
    loss = process.loss(low, x0, low, x_t, t)
    assert loss.dtype == process.to_x0(low, x_t, t).dtype == jnp.float32
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_allclose(process.to_x0(low, x_t, t), x0, atol=1e-6)
    assert process.convert(low, x_t, t, "eps", "eps").dtype == jnp.float32
    assert sd_scaled_linear()(t.astype(jnp.bfloat16))[1].dtype == jnp.float32


@pytest.mark.parametrize("space", SPACES)
def test_a_prediction_in_its_own_space_needs_no_division(space):
    """At t = 0, sigma = 0: an x0 prediction is still itself, and the loss finite."""
    x0, noise, t = normal(0, 2, 8), normal(1, 2, 8), jnp.zeros(2)
    process = Process((sd_scaled_linear(),), parameterization=space)
    raw = process.target(x0, noise, t, space)
    np.testing.assert_array_equal(process.loss(raw, x0, noise, process.corrupt(x0, noise, t), t), 0)


def test_sampled_times():
    keys = jax.random.split(jax.random.key(3), 1024)
    base = Process((sd_scaled_linear(),))
    n = np.asarray(base.sample_time(keys)) * 1000
    np.testing.assert_allclose(n, np.round(n), atol=1e-3)
    assert n.min() >= 1 and n.max() <= 1000 and 470 < n.mean() < 530
    np.testing.assert_array_equal(base.sample_time(keys[5:9]), base.sample_time(keys)[5:9])

    continuous = dataclasses.replace(base, discrete_steps=0, t_min=0.25)
    t = np.asarray(continuous.sample_time(keys))
    assert 0.25 <= t.min() < 0.26 and 0.99 < t.max() < 1

    stratified = dataclasses.replace(base, discrete_steps=0, time_sampling="stratified")
    t = np.asarray(stratified.sample_time(keys))
    np.testing.assert_array_equal(np.floor(t * 1024), np.arange(1024))
    assert np.std(t * 1024 - np.arange(1024)) > 0.25  # not the strata's corners
    quarters = dataclasses.replace(stratified, discrete_steps=4).sample_time(keys)
    np.testing.assert_array_equal(quarters, np.repeat([0.25, 0.5, 0.75, 1.0], 256))


def test_the_last_stratum_cannot_round_beyond_the_last_step(monkeypatch):
    largest = process_lib.TIME_SAMPLINGS["stratified"](jnp.full(4096, 1 - 2**-24, jnp.float32))[-1]
    assert largest == 1  # float32 rounds (B - 1 + u) / B up
    monkeypatch.setitem(process_lib.TIME_SAMPLINGS, "stratified", jnp.ones_like)
    process = Process((sd_scaled_linear(),), time_sampling="stratified")
    assert process.sample_time(jax.random.split(jax.random.key(0), 8)).max() == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parameterization": "score"}, "process.parameterization = 'score' is not known: use one of 'eps', 'x0', 'v'"),
        ({"loss_space": "F"}, "process.loss_space = 'F'"),
        ({"weighting": "sigma"}, "process.weighting = 'sigma' is not known: use one of 'uniform'"),
        ({"time_sampling": "sobol"}, "use one of 'uniform', 'stratified'"),
        ({"discrete_steps": -1}, "expected discrete_steps >= 0"),
        ({"discrete_steps": 0, "t_min": 1.0}, "0 <= t_min < 1"),
        ({"t_min": 0.1}, "has no effect with process.discrete_steps = 1000"),
        ({"schedules": ()}, "process.schedules is empty"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Process(**{"schedules": (LinearVP(),), **options})
    assert "\n" not in str(error.value)
