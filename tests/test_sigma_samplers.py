"""Samplers of k-diffusion: its recorded runs, grids and steps, the exact denoiser under every process, independence."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exact import exact_errors, exact_moments, mixture_denoiser, padded, sampled_moments

from nested.diffusion.process import Process
from nested.diffusion.samplers import DDIM, DPMSolver
from nested.diffusion.samplers.k_diffusion import (
    DPM2,
    LMS,
    DPM2Ancestral,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2SAncestral,
    DPMpp3MSDE,
    DPMppSDE,
    Euler,
    EulerAncestral,
    Heun,
    lms_coefficients,
)
from nested.diffusion.samplers.noise_levels import ancestral, noise_levels
from nested.diffusion.samplers.table import CLEAN, run
from nested.diffusion.schedules import ExponentialVE, LinearVP, sd_scaled_linear

VE = ExponentialVE(0.002, 80.0)
EDM = Process((ExponentialVE(),), discrete_steps=0)
KARRAS = dict(grid="karras", sigma_min=0.002, sigma_max=80.0)
KEYS = jax.random.split(jax.random.key(5), 8)
ALL = (Euler, Heun, DPM2, LMS, DPMpp2M)
ALL_WITH_NOISE = (EulerAncestral, DPM2Ancestral, DPMpp2SAncestral, DPMppSDE, DPMpp2MSDE, DPMpp3MSDE)


# ----------------------------------------------------------------------------- recorded runs of k_diffusion/sampling.py

RECORDED = {
    "sample_euler": Euler,
    "sample_heun": Heun,
    "sample_dpm_2": DPM2,
    "sample_lms": LMS,
    "sample_dpmpp_2m": DPMpp2M,
    "sample_euler_ancestral": EulerAncestral,
    "sample_dpm_2_ancestral": DPM2Ancestral,
    "sample_dpmpp_2s_ancestral": DPMpp2SAncestral,
    "sample_dpmpp_sde": DPMppSDE,
    "sample_dpmpp_2m_sde": DPMpp2MSDE,
    "sample_dpmpp_3m_sde": DPMpp3MSDE,
}


def recorded_noise(case, noise, commit, rows):
    """noise[k] in the order of the public calls, as the noise of our rows; that before the first row comes last."""
    result, ends = np.zeros((rows + 1, *noise.shape[1:])), np.flatnonzero(commit)
    if case["noise"] == "randn_like":  # one at the start of every step
        result[rows], result[ends[:-1]] = noise[0], noise[1 : len(ends)]
    elif case["fn"] == "sample_dpmpp_sde":  # one after every evaluation but the last
        result[: len(commit) - 1] = noise[: len(commit) - 1]
    else:  # one at the end of every step but the last
        result[ends[:-1]] = noise[: len(ends) - 1]
    return jnp.asarray(result)


def test_every_recorded_run(golden, x64):
    """All 59 runs on fixed grids, 10 steps each, with the noise that the public code drew."""
    record = golden("hdit_samplers.npz")
    cases = {name: case for name, case in json.loads(str(record["meta"]))["cases"].items() if case["fn"] in RECORDED}
    assert len(cases) == 59
    x_T, denoise, rows = jnp.asarray(record["x_init"]), mixture_denoiser(record, EDM), 19

    @jax.jit
    def sample(table, noise):
        return run((table,), None, denoise, x_T, {}, draw=lambda k, leaf, x: noise[k])

    for name, case in cases.items():
        sampler = RECORDED[case["fn"]](10, case["sched"], 0.02, 40.0, **case["kw"])
        (table,) = sampler.tables(EDM, x_T)
        own, last = table.rows.noise, table.rows.last_noise
        if last is not None:  # the recorded noises are those of the two intervals, not of their independent parts
            table = table._replace(rows=table.rows._replace(noise=np.hypot(own, last), last_noise=None))
        noise = recorded_noise(case, record["noise"], table.rows.commit, rows)
        out = sample(padded(table, rows, depth=4), noise)
        np.testing.assert_allclose(out, record[f"{name}/out"], atol=1e-12, rtol=0, err_msg=name)
        assert sampler.nfe(EDM) == case["nfe"], name


@pytest.mark.parametrize("steps", [8, 9, 10])
def test_dpm_fast_without_noise_is_dpm_solver(golden, x64, steps):
    record = golden("hdit_samplers.npz")
    process = Process((ExponentialVE(0.02, 40.0),), discrete_steps=0)
    sampler = DPMSolver(steps, 3, "dpm_solver", "fast", "log_snr", "log_snr", t_end=0.0)
    out = sampler(None, mixture_denoiser(record, process), process, jnp.asarray(record["x_init"]), {})
    np.testing.assert_allclose(out, record[f"dpm_fast/n{steps}/eta0.0/out"], atol=1e-12, rtol=0)


def test_float32_and_another_process_give_the_recorded_samples(golden):
    """The ODE in x / alpha knows no alpha: LinearVP at the same levels, in float32, by the public call."""
    record, process = golden("hdit_samplers.npz"), Process((LinearVP(),))
    for name, sampler in ("heun", Heun), ("lms", LMS), ("dpm_2", DPM2), ("dpmpp_2m", DPMpp2M):
        sampler = sampler(10, "karras", 0.02, 40.0)
        alpha, _ = process.schedules[0](sampler.start(process))
        x_T = jnp.asarray(alpha * record["x_init"], jnp.float32)
        out = sampler(None, mixture_denoiser(record, process), process, x_T, {})
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, record[f"{name}/karras/out"], atol=2e-5)


def test_recorded_grids_and_steps(golden):
    record = golden("hdit_loss_sigma.npz")
    for steps in (1, 2, 10, 50):
        for key, options in {
            f"karras_n{steps}_1e-2_160_rho7": dict(grid="karras", sigma_min=1e-2, sigma_max=160.0),
            f"exponential_n{steps}_1e-2_160": dict(grid="exponential", sigma_min=1e-2, sigma_max=160.0),
            f"polyexponential_n{steps}_1e-2_160_rho1.5": dict(
                grid="polyexponential", sigma_min=1e-2, sigma_max=160.0, rho=1.5
            ),
            f"vp_n{steps}": dict(grid="vp"),
        }.items():
            levels = noise_levels(steps=steps, **options)
            np.testing.assert_allclose([*levels, 0.0], record[f"sched/{key}"], rtol=1e-12)
            nodes = Euler(steps, **options).nodes(EDM.schedules[0])
            np.testing.assert_allclose([s for _, s in nodes], record[f"sched/{key}"], rtol=1e-12)
            np.testing.assert_allclose([EDM.schedules[0](t)[1] for t, _ in nodes[:-1]], levels, rtol=1e-12)
            assert nodes[-1] == (CLEAN, 0.0)
    for key in (key for key in record if key.startswith("ancestral/")):
        np.testing.assert_allclose(ancestral(*map(float, key.split("/")[1].split("_"))), record[key], atol=1e-15)
    record = golden("hdit_samplers.npz")
    for k, expected in enumerate(record["lms/coeffs_karras_order4"]):
        levels, end = record["sigmas/karras"][max(0, k - 3) : k + 1][::-1], record["sigmas/karras"][k + 1]
        np.testing.assert_allclose(lms_coefficients(levels, end), expected[: k + 1], rtol=1e-10)


# ------------------------------------------------------------------------------------------------ the exact denoiser

DETERMINISTIC = {sampler.__name__: functools.partial(sampler, 500) for sampler in ALL} | {
    "DPMpp2MSDE heun, eta 0": functools.partial(DPMpp2MSDE, 500, eta=0.0, solver_type="heun"),
    "DPMpp3MSDE, eta 0": functools.partial(DPMpp3MSDE, 500, eta=0.0),
}
STOCHASTIC = {sampler.__name__: functools.partial(sampler, 500) for sampler in ALL_WITH_NOISE} | {
    f"{sampler.__name__}, churn": functools.partial(sampler, 500, s_churn=10.0) for sampler in (Euler, Heun, DPM2)
}
STOCHASTIC["DPMpp2MSDE heun"] = functools.partial(DPMpp2MSDE, 500, solver_type="heun")
STOCHASTIC["DPMppSDE, r 1"] = functools.partial(DPMppSDE, 500, r=1.0)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_exact_denoiser_under_every_process(name):
    """Data N(.7, .3^2) comes back: variance exploding, variance preserving, and both in one variable, on the time grid
    of either. Tolerance .005, with noise .01: 500 steps of first order (Euler's, and the other leaf's whose levels are
    not the grid's)."""
    make, tolerance = (DETERMINISTIC | STOCHASTIC)[name], 0.01 if name in STOCHASTIC else 0.005
    times = dict(s_tmax=10.0) if "churn" in name else {}  # no noise above t = 1
    cases = [((VE,), KARRAS), ((LinearVP(),), KARRAS), ((VE, LinearVP()), times), ((sd_scaled_linear(), VE), times)]
    for schedules, grid in cases:
        errors = exact_errors(schedules, make(**grid))
        assert np.max(errors) < tolerance, (schedules[0], grid, errors)


@pytest.mark.parametrize("sampler", [DPMppSDE(9, r=0.3), DPMpp3MSDE(9), Heun(9, s_churn=5.0, s_tmax=10.0), LMS(9)])
def test_the_moments_in_closed_form_are_those_of_samples(sampler):
    """So few steps that the moments are far from the data's; four standard errors of 8192 samples."""
    schedules = (sd_scaled_linear(), VE)
    found, expected = sampled_moments(schedules, sampler, KEYS), exact_moments(schedules, sampler)
    for (mean, std), (exact_mean, exact_std) in zip(found, expected, strict=True):
        assert abs(mean - exact_mean) < 4 * exact_std / 90 + 1e-5 and abs(std / exact_std - 1) < 4 / 128, (
            found,
            expected,
        )


# ----------------------------------------------------------------------------------------------- everything else


def wiggly(x_t, t, cond):
    """A nonlinear DenoiseFn of one leaf or two."""
    return jax.tree.map(lambda x: jnp.tanh(x + t[:, None]) * cond["scale"][:, None], x_t)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("schedule", [VE, LinearVP(), sd_scaled_linear()])
def test_euler_is_ddim(schedule):
    process = Process((schedule,))
    (ours,), (ddim,) = (
        sampler.tables(process, jnp.zeros(3)) for sampler in (Euler(7, t_end=0.01), DDIM(7, t_end=0.01))
    )
    for column, expected in zip(ours.rows[:-1], ddim.rows[:-1], strict=True):
        np.testing.assert_allclose(column, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sampler", [*ALL, *ALL_WITH_NOISE])
def test_one_step_is_the_denoiser(sampler):
    """One level and a step to 0 (the public 2M and 3M SDE stop with an error there)."""
    cond = {"scale": jnp.ones(8)}
    for process, grid in ((EDM, KARRAS), (Process((LinearVP(),)), {}), (Process((LinearVP(),)), dict(grid="vp"))):
        start = sampler(1, **grid).start(process)
        x_T = process.prior(normal(8, 3), start)
        out = sampler(1, **grid)(KEYS, wiggly, process, x_T, cond)
        np.testing.assert_allclose(out, wiggly(x_T, jnp.full(8, start), cond), rtol=1e-4, atol=1e-5)
        assert sampler(1, **grid).nfe(process) == 1


def test_churn_raises_the_levels_of_its_range():
    """gamma = min(s_churn / steps, sqrt 2 - 1) within [s_tmin, s_tmax], ends included; x_T is at the level before."""
    schedule = EDM.schedules[0]
    levels = noise_levels("karras", 5, 0.01, 80.0)
    for options, gamma in (
        (dict(s_churn=1.0), [0.2] * 5),
        (dict(s_churn=40.0), [np.sqrt(2) - 1] * 5),
        (dict(s_churn=1.0, s_tmax=50.0), [0, 0.2, 0.2, 0.2, 0.2]),
        (dict(s_churn=1.0, s_tmin=0.01, s_tmax=80.0), [0.2] * 5),
        (dict(s_churn=1.0, s_tmin=levels[3]), [0.2, 0.2, 0.2, 0.2, 0]),
    ):
        sampler = Heun(5, "karras", 0.01, 80.0, **options)
        starts = [times[0] for times in sampler.plan(schedule)]
        np.testing.assert_allclose(schedule(np.array(starts))[1], levels * (1 + np.array(gamma)), rtol=1e-12)
        np.testing.assert_allclose(schedule(sampler.start(EDM))[1], 80.0, rtol=1e-12)


def test_noise_before_the_first_evaluation(x64):
    """With D = 0 one step of churned Euler gives 0; before its evaluation x is at the raised level, noise n_K on it."""
    seen = []

    def denoise(x, t, cond):
        jax.debug.callback(lambda *values: seen.append(values), x, t)
        return 0 * x

    x_T, process = normal(8, 3), Process((LinearVP(),))
    sampler = Euler(1, "karras", 0.01, 80.0, s_churn=0.5, s_noise=1.1)
    sampler(KEYS, denoise, process, x_T, {})
    jax.effects_barrier()
    ((x, t),) = seen
    (alpha, sigma), (alpha_T, _) = process.schedules[0](t[0]), process.schedules[0](sampler.start(process))
    np.testing.assert_allclose(sigma / alpha, 80 * np.sqrt(2), rtol=1e-10)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (3,), x_T.dtype))(KEYS)
    np.testing.assert_allclose(x, alpha * (x_T / alpha_T + 1.1 * 80 * noise), rtol=1e-9)


def test_the_two_noises_of_dpmpp_sde_share_a_path():
    """With D = 0 and x_T = 0 the states after the two evaluations are the noises: of Brownian motion from s to m and
    from s to e. 40,000 pairs; and their deviations are `up` of the two intervals."""
    process, keys = Process((VE,)), jax.random.split(jax.random.key(0), 40)
    sampler = DPMppSDE(3, **KARRAS, r=0.3, s_noise=1.1)
    (table,) = sampler.tables(process, jnp.zeros(3))
    first, second = (
        run((table._replace(rows=jax.tree.map(lambda column: column[:rows], table.rows)),), keys, *arguments)  # noqa: B023
        for rows in (1, 2)
        for arguments in [(lambda x, t, cond: 0 * x, jnp.zeros((40, 1000)), {})]
    )
    (start, inner, end), *_ = sampler.plan(VE)
    s, m, e = (VE(t)[1] for t in (start, inner, end))
    np.testing.assert_allclose(np.corrcoef(first.ravel(), second.ravel())[0, 1], np.sqrt((s - m) / (s - e)), atol=0.01)
    np.testing.assert_allclose(first.std(), 1.1 * ancestral(s, m, 1.0)[1], rtol=0.02)
    np.testing.assert_allclose(second.std(), 1.1 * ancestral(s, e, 1.0)[1], rtol=0.02)


@pytest.mark.parametrize("sampler", [DPMppSDE(4), DPMpp3MSDE(4), Heun(4, s_churn=1.0, s_tmax=10.0)])
def test_a_sample_depends_on_its_own_row_only(sampler, x64):
    """Noise included: in another batch, at another place, the same sample. Two leaves get different noise."""
    process = Process((sd_scaled_linear(), VE))
    x_T, scale = normal(8, 3), jnp.linspace(0.5, 2, 8)
    whole = sampler(KEYS, wiggly, process, (x_T, x_T), {"scale": scale})
    rows = np.array([6, 1, 3])
    part = sampler(KEYS[rows], wiggly, process, (x_T[rows], x_T[rows]), {"scale": scale[rows]})
    for few, many in zip(part, whole, strict=True):
        np.testing.assert_allclose(few, many[rows], rtol=1e-9)
    again = sampler(KEYS, wiggly, process, (x_T, x_T), {"scale": scale})
    other = sampler(KEYS[::-1], wiggly, process, (x_T, x_T), {"scale": scale})
    for first, second, third in zip(whole, again, other, strict=True):
        np.testing.assert_array_equal(first, second)
        assert np.abs(first - third).max() > 1e-3
    alike = sampler(KEYS, wiggly, Process((sd_scaled_linear(),)), (x_T, x_T), {"scale": scale})
    assert np.abs(alike[0] - alike[1]).max() > 1e-3


@pytest.mark.parametrize("sampler", [Heun(4), LMS(5), DPMpp2M(5), DPMpp3MSDE(5, eta=0.0)])
def test_a_leaf_is_sampled_as_it_would_be_alone(sampler, x64):
    schedules, cond = (LinearVP(), VE), {"scale": jnp.ones(8)}
    x_T = (normal(8, 3), normal(8, 3, seed=1))
    together = sampler(None, wiggly, Process(schedules), x_T, cond)
    for leaf, schedule, x in zip(together, schedules, x_T, strict=True):
        np.testing.assert_allclose(leaf, sampler(None, wiggly, Process((schedule,)), x, cond), rtol=1e-9)


@pytest.mark.parametrize("sampler", [DPM2Ancestral, DPMpp2SAncestral])
def test_an_eta_that_leaves_nothing_but_noise(sampler):
    """up = e: an Euler step to x = D, one evaluation, then noise of the whole level."""
    sampler = sampler(4, **KARRAS, eta=30.0)
    (table,) = sampler.tables(EDM, jnp.zeros(3))
    assert sampler.nfe(EDM) == 4
    np.testing.assert_allclose(table.rows.noise, [*noise_levels("karras", 4, 0.002, 80.0)[1:], 0.0], rtol=1e-12)
    np.testing.assert_allclose(table.rows.history[:, 0], 1.0)
    np.testing.assert_allclose(table.rows.base, 0.0)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Euler(0), "sampler.steps = 0: expected at least 1"),
        (lambda: LMS(5, "linear"), "sampler.grid = 'linear' is not known: use one of 'time_uniform', 'karras', 'expo"),
        (lambda: Heun(5, "karras", 0.01), "sampler.sigma_max is missing: sampler.grid = 'karras' needs it"),
        (lambda: Heun(5, "vp", sigma_min=0.1), "sampler.sigma_min = 0.1: sampler.grid = 'vp' has none, leave it out"),
        (lambda: DPM2(5, rho=7.0), "sampler.rho = 7.0: sampler.grid = 'time_uniform' has none"),
        (lambda: DPM2(5, "exponential", 0.01, 80.0, 7.0), "sampler.rho = 7.0: sampler.grid = 'exponential' has none"),
        (lambda: DPM2(5, "karras", 0.01, 80.0, t_end=0.1), "sampler.t_end = 0.1: sampler.grid = 'karras' has none"),
        (lambda: Heun(5, "karras", 80.0, 0.01), "sigma_max = 0.01: expected 0 < sigma_min < sigma_max"),
        (lambda: Heun(5, "karras", 0.0, 80.0), "sampler.sigma_min = 0.0"),
        (lambda: Heun(5, "karras", 0.01, 80.0, 0.0), "sampler.rho = 0.0: expected a positive number"),
        (lambda: Heun(5, t_end=1.0), "sampler.t_end = 1.0: expected 0 <= t_end < 1"),
        (lambda: Heun(5, s_churn=-1.0), "sampler.s_churn = -1.0: expected 0 or more"),
        (lambda: Heun(5, s_noise=-1.0), "sampler.s_noise = -1.0: expected 0 or more"),
        (lambda: Heun(5, s_tmin=2.0, s_tmax=1.0), "s_tmin = 2.0, sampler.s_tmax = 1.0: expected 0 <= s_tmin <= s_tmax"),
        (lambda: EulerAncestral(5, eta=-1.0), "sampler.eta = -1.0: expected 0 or more"),
        (lambda: DPMpp2MSDE(5, eta=-1.0), "sampler.eta = -1.0"),
        (lambda: DPMpp2MSDE(5, solver_type="dpm_solver"), "sampler.solver_type = 'dpm_solver' is not known"),
        (lambda: DPMpp3MSDE(5, s_noise=-1.0), "sampler.s_noise = -1.0"),
        (lambda: DPMppSDE(5, r=1.5), "sampler.r = 1.5: expected 0 < r <= 1"),
        (lambda: LMS(5, order=0), "sampler.order = 0: expected at least 1"),
        (lambda: Heun(5, "karras", 0.01, 160.0).start(Process((LinearVP(),))), "level 160 is above 152.167, the sched"),
        (lambda: Heun(5, s_churn=1.0).nfe(Process((sd_scaled_linear(),))), "lower sigma_max, or s_tmax if churn rais"),
        (lambda: DPMpp2M(5, t_end=0.0).nfe(Process((LinearVP(),))), "the noise level is 0 at t_end.*raise sampler.t_e"),
        (
            lambda: Heun(5, **KARRAS).tables(Process((VE, LinearVP())), (jnp.ones(3),) * 2),
            "infinite coefficients.*or sigma_min",
        ),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
