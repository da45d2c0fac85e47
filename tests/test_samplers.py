"""Samplers: every recorded DPM-Solver case, the exact denoiser, independence of samples."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exact import exact_errors, padded

from nested.diffusion.denoiser import denoiser, thresholded
from nested.diffusion.process import Process
from nested.diffusion.samplers import DDIM, DDPM, DPMSolver, EulerInTime, EulerMaruyama
from nested.diffusion.samplers.table import CLEAN, run
from nested.diffusion.schedules import ExponentialVE, LinearVP, cosine, sd_scaled_linear

SCHEDULES = {"discrete": sd_scaled_linear(), "linear": LinearVP(), "cosine": cosine()}
KEYS = jax.random.split(jax.random.key(5), 8)


# ---------------------------------------------------------------------------------------------------- goldens


def recorded_sampler(case):
    if case["method"] == "euler_ode":
        return EulerInTime(case["steps"], case["eps"])
    if case["method"] == "old_fast":
        return DPMSolver(case["steps"], 3, "dpm_solver", "fast", "log_snr", "log_snr", t_end=case["eps"])
    return DPMSolver(
        steps=case["steps"],
        order=case["order"],
        algorithm="dpm_solver++" if case["predict_x0"] else "dpm_solver",
        method=case["method"],
        grid={"logSNR": "log_snr", "time_uniform": "time_uniform"}[case["skip_type"]],
        intermediate="log_snr" if case["method"] == "singlestep" else "grid",
        solver_type=case["solver_type"],
        t_end=case["eps"],
    )


def recorded_denoiser(record, schedule, dynamic):
    """The two models of the record, a Gaussian and a mixture of 5, as the DenoiseFn of a variable of two leaves."""
    record = {key: jnp.asarray(value) for key, value in record.items() if key.startswith(("gauss/", "gmm/"))}

    def eps(x, t, cond):
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in schedule(t))
        gauss = sigma * (x[0] - alpha * record["gauss/mu"]) / (alpha**2 * record["gauss/s2"] + sigma**2)
        alpha, sigma, x_B1D = alpha[..., 0], sigma[..., 0], x[1].reshape(x[1].shape[0], 1, -1)
        variance = alpha**2 * record["gmm/var"] + sigma**2
        offset = x_B1D - alpha * record["gmm/centres"][None]
        exponent = record["gmm/logw"][None] - jnp.sum(offset**2, axis=-1) / (2 * variance[..., 0])
        weights = jax.nn.softmax(exponent, axis=1)[..., None]
        return gauss, (sigma * jnp.sum(weights * offset, axis=1, keepdims=True) / variance).reshape(x[1].shape)

    denoise = denoiser(eps, Process((schedule,), time_scale=1.0))
    return thresholded(denoise, 0.995) if dynamic else denoise


def test_every_recorded_case(golden, x64):
    """All 124 float64 cases of U-ViT's two solvers and its Euler ODE; the two recorded models are the leaves."""
    record = golden("uvit_dpm_solver.npz")
    cases = {case["name"]: case for case in json.loads(str(record["meta/cases"]))}
    assert len(cases) == 124

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def sample(name, dynamic, tables, x_T):
        return run(tables, None, recorded_denoiser(record, SCHEDULES[name], dynamic), (x_T, x_T), {})

    for name in (name.removeprefix("gauss/") for name in cases if name.startswith("gauss/")):
        case = cases["gauss/" + name]
        process, sampler = Process((SCHEDULES[case["schedule"]],)), recorded_sampler(case)
        x_T = jnp.asarray(record["x_T"] * case.get("x_T_scale", 1.0))
        (table,) = sampler.tables(process, x_T)
        out = sample(case["schedule"], case.get("thresholding", False), (padded(table),) * 2, x_T)
        for model, leaf in zip(("gauss", "gmm"), out, strict=True):
            np.testing.assert_allclose(leaf, record[f"out/{model}/{name}"], atol=2e-12, rtol=0, err_msg=name)
            times = record.get(f"model_times/{model}/{name}", table.rows.t)
            np.testing.assert_allclose(table.rows.t, times, atol=1e-15)
        assert sampler.nfe(process) == len(table.rows.t) == case.get("nfe", case["steps"])


def test_recorded_float32_call(golden):
    """The public call as it is used, in float32."""
    record = golden("uvit_dpm_solver.npz")
    schedule, x_T = SCHEDULES["discrete"], jnp.asarray(record["x_T"], jnp.float32)
    denoise = recorded_denoiser(record, schedule, False)
    out, _ = DPMSolver(50)(None, denoise, Process((schedule,)), (x_T, x_T), {})
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, record["out_f32/gauss/discrete/fast3/px0_1/steps50"], atol=2e-5)


@pytest.mark.parametrize("method, order", [("singlestep", 1), ("singlestep", 2), ("singlestep", 3), ("multistep", 2)])
@pytest.mark.parametrize("algorithm", ["dpm_solver", "dpm_solver++"])
def test_order_of_convergence(golden, x64, algorithm, method, order):
    """Against the recorded closed form of the probability-flow ODE: twice the steps, 1 / 2^order of the error."""
    record = golden("uvit_dpm_solver.npz")
    process, x_T = Process((LinearVP(),)), jnp.asarray(record["x_T"])
    denoise = recorded_denoiser(record, LinearVP(), False)
    inner = "log_snr" if method == "singlestep" else "grid"
    errors = []
    for steps in (96, 192):
        out, _ = DPMSolver(steps, order, algorithm, method, "log_snr", inner, "taylor")(
            None, denoise, process, (x_T, x_T), {}
        )
        errors.append(np.abs(out - record["exact/gauss/linear/t0.001"]).max())
    assert 2 ** (order - 0.3) < errors[0] / errors[1] < 2 ** (order + 0.7), errors


def test_recorded_grids_and_orders(golden):
    record = golden("uvit_dpm_solver.npz")
    for name in ("time_uniform", "logSNR"):
        sampler = DPMSolver(12, method="multistep", grid={"logSNR": "log_snr"}.get(name, name))
        plan = sampler.plan(SCHEDULES["discrete"])
        np.testing.assert_allclose([1.0, *(end for _, end in plan)], record[f"timesteps/{name}"], atol=1e-13)
    for key in (key for key in record if key.startswith("fast_orders/")):
        order, steps = map(int, key.removeprefix("fast_orders/").split("_"))
        plan = DPMSolver(steps, order).plan(SCHEDULES["discrete"])
        assert [len(times) - 1 for times in plan] == record[key].tolist()


def test_ddpm_step_is_the_posterior(golden):
    """q(x_s | x_t, x0) of the discrete chain, n = 500 to 10, from the recorded alpha and beta of the jump."""
    record = golden("uvit_training.npz")
    (row,) = DDPM(1).rows(SCHEDULES["discrete"], [(0.5, 0.01)])
    skip_alpha, skip_beta = record["skip_alpha/10_500"], record["skip_beta/10_500"]
    beta_s, beta_t, alpha_s = record["cum_betas"][10], record["cum_betas"][500], record["cum_alphas"][10]
    np.testing.assert_allclose(row.noise**2, record["tilde_beta/10_500"], rtol=1e-12)
    np.testing.assert_allclose(row.base, skip_alpha**0.5 * beta_s / beta_t, rtol=1e-12)
    np.testing.assert_allclose(row.history, [alpha_s**0.5 * skip_beta / beta_t], rtol=1e-12)
    assert DDPM(1000).plan(None)[-1] == (0.001, CLEAN) and len(DDPM(1000).plan(None)) == 1000


# ------------------------------------------------------------------------------------------- the exact denoiser

DPM_METHODS = [
    ("singlestep", 1, "dpm_solver"), ("singlestep", 2, "dpm_solver"), ("singlestep", 2, "taylor"),
    ("singlestep", 3, "dpm_solver"), ("singlestep", 3, "taylor"), ("fast", 2, "dpm_solver"), ("fast", 3, "dpm_solver"),
    ("multistep", 2, "dpm_solver"), ("multistep", 2, "taylor"), ("multistep", 3, "taylor"),
]  # fmt: skip
DPM_SOLVERS = {
    f"{algorithm} {method} {order} {kind}": DPMSolver(960, order, algorithm, method, solver_type=kind)
    for algorithm in ("dpm_solver", "dpm_solver++")
    for method, order, kind in DPM_METHODS
}
LOG_SNR_SOLVERS = {
    f"{algorithm} {method} log_snr": DPMSolver(960, 3, algorithm, method, "log_snr", intermediate)
    for algorithm in ("dpm_solver", "dpm_solver++")
    for method, intermediate in [("fast", "log_snr"), ("singlestep", "grid"), ("multistep", "grid")]
}
TO_CLEAN = {"ddim": DDIM(1000)}
STOCHASTIC = {"ddpm": DDPM(1000), "ddim eta 0.5": DDIM(1000, eta=0.5)}
IN_TIME = {"euler in time": EulerInTime(1000), "euler-maruyama": EulerMaruyama(1000)}


@pytest.mark.parametrize("name", [*DPM_SOLVERS, *LOG_SNR_SOLVERS, *TO_CLEAN, *STOCHASTIC, *IN_TIME])
def test_exact_denoiser_under_every_schedule(name):
    """Data N(.7, .3^2) comes back; an alpha_t for alpha_s slip gives a mean near .45.

    Tolerance .005, with noise .01: 1000 steps of first order, and the noise left at t_end, .0014 for SD betas.
    """
    schedules = (SCHEDULES["linear"], SCHEDULES["discrete"], SCHEDULES["cosine"])
    if name in STOCHASTIC or name in TO_CLEAN:  # these do not ask for alpha^2 + sigma^2 = 1
        schedules += (ExponentialVE(0.002, 80.0),)
    if name in IN_TIME:  # the last beta of the cosine, 0.999 in one step of 1000, is beyond a first-order step
        schedules = schedules[:2]
    everything = DPM_SOLVERS | LOG_SNR_SOLVERS | TO_CLEAN | STOCHASTIC | IN_TIME
    errors = exact_errors(schedules, everything[name])
    assert np.max(errors) < (0.01 if name in STOCHASTIC else 0.005), errors


# -------------------------------------------------------------------------------------------- everything else


def wiggly(x_t, t, cond):
    """A nonlinear DenoiseFn of one leaf or two."""
    return jax.tree.map(lambda x: jnp.tanh(x + t[:, None]) * cond["scale"][:, None], x_t)


def test_a_leaf_is_sampled_as_it_would_be_alone():
    schedules = (SCHEDULES["linear"], SCHEDULES["cosine"])
    x_T = tuple(jnp.asarray(np.random.default_rng(i).normal(size=(8, 3))) for i in (0, 1))
    cond = {"scale": jnp.ones(8)}
    for sampler in (DDIM(5), DPMSolver(6), DPMSolver(6, method="multistep")):
        together = sampler(KEYS, wiggly, Process(schedules), x_T, cond)
        for leaf, schedule, x in zip(together, schedules, x_T, strict=True):
            np.testing.assert_allclose(leaf, sampler(KEYS, wiggly, Process((schedule,)), x, cond), rtol=2e-5, atol=1e-6)


def test_a_sample_depends_on_its_own_row_only():
    """Noise included: in another batch, at another place, the same sample. Two leaves get different noise."""
    process, sampler = Process((SCHEDULES["discrete"],)), DDPM(6)
    x_T, scale = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3))), jnp.linspace(0.5, 2, 8)
    whole = sampler(KEYS, wiggly, process, (x_T, x_T), {"scale": scale})
    rows = np.array([6, 1, 3])
    part = sampler(KEYS[rows], wiggly, process, (x_T[rows], x_T[rows]), {"scale": scale[rows]})
    for few, many in zip(part, whole, strict=True):
        np.testing.assert_allclose(few, many[rows], rtol=1e-5, atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 0.1
    other = sampler(KEYS[::-1], wiggly, process, (x_T, x_T), {"scale": scale})
    assert np.abs(other[0] - whole[0]).max() > 0.1


def test_noise_is_drawn_from_the_key_of_the_sample_and_the_row():
    """DDPM(2) with x0 = 0 throughout, by hand."""
    process = Process((SCHEDULES["discrete"],))
    (table,) = DDPM(2).tables(process, jnp.zeros((8, 3)))
    out = run(jax.tree.map(lambda column: column[:1], (table,)), KEYS, lambda x, t, cond: 0 * x, jnp.ones((8, 3)), {})
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (3,)))(KEYS)
    np.testing.assert_allclose(out, table.rows.base[0] + table.rows.noise[0] * noise, rtol=1e-6)


def test_euler_maruyama_steps_are_those_of_the_reverse_sde():
    """U-ViT's sde.py with beta(t) = .1 + 19.9 t: x + (beta/2 x - beta eps / sigma) dt + sqrt(beta dt) n from t = 1 to
    .001 in 999 steps, then one to 0 without noise."""
    (table,) = EulerMaruyama(1000).tables(Process((LinearVP(),)), jnp.ones(3))
    rows, (alpha, sigma) = table.rows, LinearVP()(1.0)
    dt, beta = 0.999 / 999, 20.0
    assert len(rows.t) == 1000 and rows.t[0] == 1 and rows.t[-1] == pytest.approx(1e-3) and rows.noise[-1] == 0
    np.testing.assert_allclose(rows.output[0], (1 / sigma, -alpha / sigma))  # eps
    np.testing.assert_allclose(rows.base[0], 1 + beta / 2 * dt)
    np.testing.assert_allclose(rows.history[0], [-beta / sigma * dt])
    np.testing.assert_allclose(rows.noise[0], np.sqrt(beta * dt))
    np.testing.assert_allclose(rows.base[-1], 1 + (0.1 + 19.9e-3) / 2 * 1e-3)


def test_bfloat16_state_is_cast_up():
    x_T = jnp.ones((8, 3), jnp.bfloat16)
    out = DDIM(2)(KEYS, wiggly, Process((SCHEDULES["discrete"],)), x_T, {"scale": jnp.ones(8, jnp.bfloat16)})
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: DDIM(0), "sampler.steps = 0, sampler.t_end = 0.001: expected steps >= 1"),
        (lambda: EulerInTime(5, 1.0), "0 <= t_end < 1"),
        (lambda: DDPM(-1), "sampler.steps = -1"),
        (lambda: DDIM(5, eta=1.5), "sampler.eta = 1.5: expected a number from 0 to 1"),
        (lambda: EulerInTime(5).tables(Process((ExponentialVE(),)), jnp.ones(3)), "has no beta.*use Euler, in sigma"),
        (lambda: EulerMaruyama(5).tables(Process((ExponentialVE(),)), jnp.ones(3)), "sampler EulerMaruyama: .*no beta"),
        (lambda: DPMSolver(10, 4), "sampler.order = 4 is not known: use one of 1, 2, 3"),
        (lambda: DPMSolver(10, algorithm="unipc"), "sampler.algorithm = 'unipc'"),
        (lambda: DPMSolver(10, method="adaptive"), "sampler.method = 'adaptive'"),
        (lambda: DPMSolver(10, grid="quadratic"), "sampler.grid = 'quadratic'"),
        (lambda: DPMSolver(10, intermediate="time"), "sampler.intermediate = 'time'"),
        (lambda: DPMSolver(10, solver_type="heun"), "sampler.solver_type = 'heun'"),
        (lambda: DPMSolver(10, method="singlestep"), "steps = 10 is not divisible by sampler.order = 3"),
        (lambda: DPMSolver(10, 1), "method 'fast' mixes orders"),
        (lambda: DPMSolver(10, method="multistep", intermediate="log_snr"), "'multistep' has none"),
        (lambda: DDIM(5, t_end=0.0).tables(Process((LinearVP(),)), jnp.ones(3)), "infinite coefficients.*raise t_end"),
        (lambda: DPMSolver(6, t_end=0.0, grid="log_snr").tables(Process((LinearVP(),)), jnp.ones(3)), "raise t_end"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
