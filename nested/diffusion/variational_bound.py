"""The variational bound that trains a learned variance (Nichol & Dhariwal, arXiv 2102.09672, Sec. 3.1; ADM, DiT).

On the chain of N steps with abar_n = alpha(n / N)^2 and beta_n = 1 - abar_n / abar_{n-1}, the posterior is

    q(x_{n-1} | x_n, x0) = N(m(x0), beta~_n),  beta~_n = beta_n (1 - abar_{n-1}) / (1 - abar_n),
    m(x0) = c_n x0 + (a multiple of x_n),      c_n = beta_n sqrt(abar_{n-1}) / (1 - abar_n).

The network's distribution is N(m(x0_hat), v), where `values` in [-1, 1] place v between beta~_n and beta_n:

    log v = f log beta_n + (1 - f) log beta~_n,  f = (values + 1) / 2,  with beta~_2 for beta~_1 = 0.

    n > 1:  KL(q || network) = (log v - log beta~_n - 1 + (beta~_n + c_n^2 (x0 - x0_hat)^2) / v) / 2
    n = 1:  -log of the network's probability of the 8-bit value x0

x_n is not needed: its multiple cancels in the divergence and is 0 at n = 1, where c_1 = 1. Values and gradients are
those of the authors' code (facebookresearch/DiT, diffusion/gaussian_diffusion.py and diffusion_utils.py).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nested.diffusion.schedules import Schedule


def variational_bound(
    schedule: Schedule, steps: int, x0: jax.Array, x0_hat: jax.Array, t: jax.Array, values: jax.Array
) -> jax.Array:
    """Return the bound's term of each sample [B], in bits per element; its gradient reaches `values` alone.

    Args:
        schedule: a variance preserving one (with log_alpha).
        steps: N >= 2.
        x0: clean data [B, ...], read as 8-bit values k / 127.5 - 1 at n = 1.
        x0_hat: the network's estimate of x0.
        t: times [B], n / N with n in 1..N.
        values: where the log variance lies between the bounds, from -1 to 1, like x0.
    """
    dtype = jnp.result_type(x0, x0_hat, values, jnp.float32)
    x0, x0_hat, values = (jnp.asarray(leaf, dtype) for leaf in (x0, jax.lax.stop_gradient(x0_hat), values))
    shape = (-1,) + (1,) * (x0.ndim - 1)
    n = jnp.round(t * steps).astype(jnp.int32).reshape(shape)
    log_beta, log_posterior, c = (jnp.asarray(column, dtype)[n - 1] for column in _chain(schedule, steps))

    fraction = (values + 1) / 2
    log_v = fraction * log_beta + (1 - fraction) * log_posterior
    rise = log_v - log_posterior
    divergence = (rise - 1 + jnp.exp(-rise) + jnp.square(c * (x0 - x0_hat)) * jnp.exp(-log_v)) / 2
    nats = jnp.where(n == 1, -_log_probability(x0, x0_hat, log_v), divergence)
    return jnp.mean(nats, axis=tuple(range(1, nats.ndim))) / math.log(2)


def _chain(schedule: Any, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log beta_n, log beta~_n (of n = 2 for n = 1) and c_n at n = 1..N: float64 on the host."""
    log_abar = 2 * schedule.log_alpha(np.arange(steps + 1) / steps)
    noise = -np.expm1(log_abar)  # 1 - abar, from n = 0
    beta = -np.expm1(np.diff(log_abar))
    posterior = beta * noise[:-1] / noise[1:]
    posterior[0] = posterior[1]
    return np.log(beta), np.log(posterior), beta * np.exp(log_abar[:-1] / 2) / noise[1:]


def _log_probability(x: jax.Array, mean: jax.Array, log_v: jax.Array) -> jax.Array:
    """Log of the probability that N(mean, v) gives to the bin of each 8-bit value x; the outermost bins are open."""
    scale = jnp.exp(-log_v / 2)
    below, above = (_normal_cdf(scale * (x - mean + side)) for side in (-1 / 255, 1 / 255))
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The standard normal's distribution function, approximated by tanh."""
    return (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
