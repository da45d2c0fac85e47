"""Log-likelihoods by the probability-flow ODE (arXiv 2011.13456, Sec. 4.3; k_diffusion/sampling.py:301-321).

In x / alpha against u = log(sigma / alpha) the ODE is dx/du = x - D with D = denoise(x), and along its solution

    log p_min(x) = log p_max(x_max) + integral over u of trace(d(x - D) / dx).

The trace is estimated with one fixed Rademacher vector v per sample, v^T (d(x - D) / dx) v (Hutchinson), and p_max is
N(0, sigma_max^2), without the data's own variance. Departure from the authors' code, which integrates with dopri5:
Runge-Kutta 4 with fixed steps, uniform in u, so that a sample's value does not depend on the batch it is in.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from nested.diffusion.denoiser import Cond, DenoiseFn
from nested.diffusion.process import Process, Tree
from nested.diffusion.samplers.noise_levels import time_of


def log_likelihood(
    denoise: DenoiseFn,
    process: Process,
    x: Tree,
    cond: Cond,
    keys: jax.Array,
    *,
    sigma_min: float,
    sigma_max: float,
    steps: int = 100,
) -> jax.Array:
    """Return the log density [B], in nats, of clean data x with noise of deviation sigma_min added to it.

    Args:
        denoise: the estimate of x0.
        process: the diffusion of x.
        x: the data, a tree of [B, ...].
        cond: the conditions, [B, ...] each.
        keys: [B] typed keys of v.
        sigma_min, sigma_max: the range of sigma / alpha that the ODE is integrated over.
        steps: Runge-Kutta steps, of four evaluations and their derivatives each.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and steps >= 1; for a process of several schedules; for a sigma_max
            above the largest sigma / alpha of a variance preserving schedule.
    """
    if not 0 < sigma_min < sigma_max < math.inf or steps < 1:
        raise ValueError(
            f"log_likelihood: sigma_min = {sigma_min}, sigma_max = {sigma_max}, steps = {steps}: "
            "expected 0 < sigma_min < sigma_max and steps >= 1"
        )
    if len(process.schedules) != 1:
        raise ValueError(
            f"log_likelihood: the process has {len(process.schedules)} schedules: give a process of one, whose leaves "
            "have the same noise level at every time"
        )
    leaves, structure = jax.tree.flatten(x)
    leaves = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    x, dtype = jax.tree.unflatten(structure, leaves), leaves[0].dtype
    v = jax.tree.unflatten(structure, [_rademacher(keys, j, leaf) for j, leaf in enumerate(leaves)])

    def slope(x: Tree, at: tuple[jax.Array, jax.Array]) -> tuple[Tree, jax.Array]:
        """(x - D, the product [B] of its directional derivative with v) at one of the scanned times."""
        t, alpha = at

        def flow(x: Tree) -> Tree:
            D = denoise(jax.tree.map(lambda leaf: alpha * leaf, x), jnp.full(leaves[0].shape[:1], t), cond)
            return jax.tree.map(jnp.subtract, x, D)

        value, derivative = jax.jvp(flow, (x,), (v,))
        return value, _row_sum(jax.tree.map(jnp.multiply, v, derivative))

    h = math.log(sigma_max / sigma_min) / steps

    def step(state: Tree, scanned: Tree) -> tuple[Tree, None]:
        start, middle, end = zip(*scanned, strict=True)
        first = slope(state[0], start)
        second = slope(_add(state[0], h / 2, first[0]), middle)
        third = slope(_add(state[0], h / 2, second[0]), middle)
        fourth = slope(_add(state[0], h, third[0]), end)
        rise = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, first, second, third, fourth)
        return _add(state, h, rise), None

    time_of(process.schedules[0], sigma_max)
    log_s = np.log(sigma_min) + h * (np.arange(steps)[:, None] + np.array([[0.0, 0.5, 1.0]]))
    t = process.schedules[0].inverse_log_snr(-log_s)
    alpha, _ = process.schedules[0](t)
    scanned = tuple(tuple(jnp.asarray(column, dtype) for column in values.T) for values in (t, alpha))
    (x, change), _ = jax.lax.scan(step, (x, jnp.zeros(leaves[0].shape[0], dtype)), scanned)
    prior = jax.tree.map(lambda leaf: -0.5 * (leaf / sigma_max) ** 2 - 0.5 * math.log(2 * math.pi * sigma_max**2), x)
    return change + _row_sum(prior)


def _rademacher(keys: jax.Array, index: int, leaf: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.rademacher(jax.random.fold_in(key, index), leaf.shape[1:], leaf.dtype))(keys)


def _add(tree: Tree, h: float, slope: Tree) -> Tree:
    return jax.tree.map(lambda leaf, rise: leaf + h * rise, tree, slope)


def _row_sum(tree: Tree) -> jax.Array:
    """Sum over all leaves and all axes but the first: [B]."""
    return functools.reduce(operator.add, (leaf.reshape(leaf.shape[0], -1).sum(1) for leaf in jax.tree.leaves(tree)))
