"""Denoisers: functions DenoiseFn(x_t, t, cond) that estimate the clean x0, and the limits set on that estimate.

Samplers, guidance and likelihoods see nothing but this signature. What the network itself predicts (eps, v, x0) is
known to the Process only.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from nested.diffusion.process import Process, Tree

Cond = Mapping[str, Any]  # a level's conditions by name: arrays [B, ...], or tuples of them for a coarser variable
NetworkFn = Callable[[Tree, jax.Array, Cond], Tree]  # (network input like x_t, c_noise [B], cond) -> raw output


class DenoiseFn(Protocol):
    """The estimate of x0 at x_t."""

    def __call__(self, x_t: Tree, t: jax.Array, cond: Cond, /) -> Tree:
        """Return the estimate of x0, a tree like x_t.

        Args:
            x_t: the noisy variable, leaves [B, ...].
            t: times [B] in [0, 1], where 1 is noise.
            cond: conditions by name, [B, ...] each.
        """
        ...


def denoiser(network: NetworkFn, process: Process) -> DenoiseFn:
    """Return the DenoiseFn of a network whose input and output follow `process`."""

    def denoise(x_t: Tree, t: jax.Array, cond: Cond) -> Tree:
        return process.to_x0(network(process.network_input(x_t, t), process.c_noise(t), cond), x_t, t)

    return denoise


def thresholded(
    denoise: DenoiseFn, percentile: float | None, maximum: float = math.inf, scales: tuple[float, ...] = ()
) -> DenoiseFn:
    """Keep the estimate of x0 within [-1, 1], the range of pixels.

    Args:
        denoise: the function whose estimate is limited.
        percentile: None clips. A number in (0, 1) is dynamic thresholding (Imagen, arXiv 2205.11487; dpm_solver_pp.py
            with .995): for each sample and leaf, s is that quantile of |x0|, at least 1 and at most `maximum`; x0 is
            clipped to [-s, s] and divided by s.
        maximum: the largest s (ml-mdm: .995 with 100, DeepFloyd: .95 with 1.5).
        scales: for each leaf, the number that its pixels were divided by; () if they were not divided.

    Raises:
        ValueError: for another percentile, for a maximum below 1, or for the wrong number of scales.
    """
    if percentile is not None and not 0 < percentile < 1:
        raise ValueError(f"thresholded: percentile = {percentile}: give a number in (0, 1), or None to clip")
    if maximum < 1 or (percentile is None and not math.isinf(maximum)):
        raise ValueError(f"thresholded: maximum = {maximum}: give at least 1, or leave it out with percentile None")

    def threshold(x0: jax.Array) -> jax.Array:
        if percentile is None:
            return jnp.clip(x0, -1, 1)
        s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=1)
        s = jnp.clip(s, 1, maximum).reshape((-1,) + (1,) * (x0.ndim - 1))
        return jnp.clip(x0, -s, s) / s

    def thresholded_denoise(x_t: Tree, t: jax.Array, cond: Cond) -> Tree:
        leaves, structure = jax.tree.flatten(denoise(x_t, t, cond))
        if not scales:
            return structure.unflatten(map(threshold, leaves))
        if len(scales) != len(leaves):
            raise ValueError(f"thresholded: {len(scales)} scales for {len(leaves)} leaves: give one per leaf, or ()")
        return structure.unflatten(threshold(x0 * s) / s for x0, s in zip(leaves, scales, strict=True))

    return thresholded_denoise
