"""Samplers against data whose denoiser is known in closed form: N(MEAN, STD^2), with the posterior mean as D."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nested.diffusion.process import Process
from nested.diffusion.samplers.table import Row, run

MEAN, STD = 0.7, 0.3
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # not as in conftest.py


def padded(table, rows=50, depth=3):
    """The table with rows that keep the state, so that one compilation serves every sampler."""
    old = table.rows
    more = rows - len(old.t)
    new = Row(
        t=np.pad(old.t, (0, more), constant_values=1.0),
        output=np.pad(old.output, ((0, more), (0, 0))),
        base=np.pad(old.base, (0, more), constant_values=1.0),
        history=np.pad(old.history, ((0, more), (0, depth - old.history.shape[1]))),
        noise=np.pad(old.noise, (0, more)),
        commit=np.pad(old.commit, (0, more), constant_values=True),
        last_noise=None if old.last_noise is None else np.pad(old.last_noise, (0, more)),
    )
    return table._replace(rows=new)


@functools.partial(jax.jit, static_argnums=0, compiler_options=OPTIMIZED)  # thousands of evaluations, compiled once
def run_exact(schedules, tables, keys, x_T):
    """One leaf per schedule, each with the posterior mean of its own process."""

    def posterior_mean(x_t, t, cond):
        x0 = []
        for schedule, x in zip(schedules, x_t, strict=True):
            alpha, sigma = (value.reshape(-1, 1) for value in schedule(t))
            x0.append(MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN))
        return tuple(x0)

    return run(tables, keys, posterior_mean, x_T, {})


def exact_errors(schedules, sampler, keys=None, rows=1000, depth=3):
    """|error| of the mean and of the standard deviation of 8192 samples, for each schedule.

    x_T is drawn from the exact marginal at the sampler's start and set to its mean and deviation, so that x_T, which is
    carried linearly, adds no sampling error.
    """
    unit = np.random.default_rng(0).normal(size=(8, 1024))
    unit = (unit - unit.mean()) / unit.std()
    process = Process(schedules)
    starts = [schedule(sampler.start(process)) for schedule in schedules]
    x_T = tuple(jnp.asarray(alpha * MEAN + np.hypot(alpha * STD, sigma) * unit) for alpha, sigma in starts)
    tables = tuple(padded(table, rows, depth) for table in sampler.tables(process, x_T))
    samples = run_exact(schedules, tables, keys, x_T)
    return [(abs(float(x.mean()) - MEAN), abs(float(x.std()) - STD)) for x in samples]


def mixture_denoiser(record, process):
    """The posterior mean of the record's mixture of 3 Gaussians in 4 dimensions."""
    mean_MD, std_M, weight_M = (jnp.asarray(record[f"gmm/{name}"]) for name in ("mu", "s", "w"))

    def denoise(x_BD, t, cond):
        alpha_B11, sigma_B11 = (value.reshape(-1, 1, 1) for value in process.schedules[0](t))
        variance_BM1 = alpha_B11**2 * std_M.reshape(1, -1, 1) ** 2 + sigma_B11**2
        offset_BMD = x_BD[:, None] - alpha_B11 * mean_MD[None]
        exponent_BM = -0.5 * jnp.sum(offset_BMD**2 / variance_BM1 + jnp.log(variance_BM1), axis=-1)
        share_BM1 = jax.nn.softmax(jnp.log(weight_M)[None] + exponent_BM, axis=1)[..., None]
        gain_BM1 = alpha_B11 * std_M.reshape(1, -1, 1) ** 2 / variance_BM1
        return jnp.sum(share_BM1 * (mean_MD[None] + gain_BM1 * offset_BMD), axis=1)

    return denoise
