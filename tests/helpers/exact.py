"""Samplers against data whose denoiser is known in closed form: N(MEAN, STD^2), with the posterior mean as D."""

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


def posterior_mean(schedule, t):
    """(gain, offset) of the denoiser of one leaf at time t: x0 = gain x + offset."""
    alpha, sigma = schedule(t)
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return gain, MEAN - gain * alpha * MEAN


def exact_moments(schedules, sampler):
    """(mean, standard deviation) of the samples, for each of the schedules, one leaf each, in closed form.

    The sampler and the denoiser are affine, so the mean and the covariance of the loop's state, which is
    (x, x_base, m_{-1}, ..., m_{-depth}, n_{k-1}), follow from row to row of the table. x_T is the exact marginal.
    """
    process = Process(schedules)
    tables = sampler.tables(process, (np.zeros(1),) * len(schedules))
    return [_moments(schedule, sampler.start(process), table, tables[0].rows.t)
            for schedule, table in zip(schedules, tables, strict=True)]  # fmt: skip


def _moments(schedule, start, table, times):
    alpha, sigma = schedule(start)
    mean_x, variance_x = alpha * MEAN, (alpha * STD) ** 2 + sigma**2
    if table.opening is not None:
        scale, noise = table.opening
        mean_x, variance_x = scale * mean_x, scale**2 * variance_x + noise**2
    rows, depth = table.rows, table.rows.history.shape[1]
    mean, covariance = np.zeros(depth + 3), np.zeros((depth + 3, depth + 3))
    mean[:2], covariance[:2, :2] = mean_x, variance_x
    for k, t in enumerate(times):
        gain, offset = posterior_mean(schedule, t)
        first, second = rows.output[k]
        step, shift, drive = np.zeros_like(covariance), np.zeros_like(mean), np.zeros_like(mean)
        step[2, 0], shift[2] = first + second * gain, second * offset  # the evaluation, m_{-0}
        step[3 : depth + 2] = np.eye(depth + 3)[2 : depth + 1]  # m_{-j} becomes m_{-j-1}
        step[0] = rows.history[k] @ step[2 : depth + 2]
        step[0, 1] += rows.base[k]
        step[0, -1] += 0.0 if rows.last_noise is None else rows.last_noise[k]
        shift[0], drive[0], drive[-1] = rows.history[k, 0] * shift[2], rows.noise[k], 1.0
        if rows.commit[k]:
            step[1], shift[1], drive[1] = step[0], shift[0], drive[0]
        else:
            step[1, 1] = 1.0
        mean, covariance = step @ mean + shift, step @ covariance @ step.T + np.outer(drive, drive)
    return mean[0], np.sqrt(covariance[0, 0])


def exact_errors(schedules, sampler):
    """|error| of the mean and of the standard deviation, for each of the schedules."""
    return [(abs(mean - MEAN), abs(std - STD)) for mean, std in exact_moments(schedules, sampler)]


def sampled_moments(schedules, sampler, keys):
    """(mean, standard deviation) of 8192 samples that run() draws, for each of the schedules."""
    unit = np.random.default_rng(0).normal(size=(8, 1024))
    unit = (unit - unit.mean()) / unit.std()  # x_T, which is carried linearly, adds no sampling error
    process = Process(schedules)
    starts = [schedule(sampler.start(process)) for schedule in schedules]
    x_T = tuple(jnp.asarray(alpha * MEAN + np.hypot(alpha * STD, sigma) * unit) for alpha, sigma in starts)

    def denoise(x_t, t, cond):
        means = [tuple(v.reshape(-1, 1) for v in posterior_mean(schedule, t)) for schedule in schedules]
        return tuple(gain * x + offset for (gain, offset), x in zip(means, x_t, strict=True))

    samples = jax.jit(lambda x_T: run(sampler.tables(process, x_T), keys, denoise, x_T, {}))(x_T)
    return [(float(x.mean()), float(x.std())) for x in samples]


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
