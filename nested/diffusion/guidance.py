"""Denoisers: DenoiseFn = (x_t: Tree, t: [B], cond: dict[str, Array]) -> estimate of x0: Tree, and transforms of them.

Samplers and guidance see nothing but this signature; what the network predicts (eps, v, x0) is the Process's affair.

Classifier-free guidance is written as U-ViT writes it (eval_ldm_discrete.py), out = cond + w (cond - null): w is one
less than the scale of Ho & Salimans (arXiv 2207.12598), and w = 0 is no guidance. At fixed (x_t, t) the predictions
eps, v and x0 are affine in one another and the weights 1 + w and -w sum to 1, so guiding x0 here is guiding eps there.
Departure from the authors' code: one forward of 2B rows instead of two of B rows, condition and null interleaved (rows
2i and 2i + 1), which leaves a sharded batch where it is.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nested.diffusion.process import Process

DenoiseFn = Callable[..., object]


def denoiser(apply_fn, process: Process) -> DenoiseFn:
    """The DenoiseFn of a network: apply_fn(input like x_t, c_noise [B], cond) -> raw output, a tree like x_t."""

    def denoise(x_t, t, cond):
        return process.to_x0(apply_fn(process.network_input(x_t, t), process.c_noise(t), cond), x_t, t)

    return denoise


def guided(denoise: DenoiseFn, null_cond_fn, w: float) -> DenoiseFn:
    """Classifier-free guidance: x0(cond) + w (x0(cond) - x0(null_cond_fn(cond))), in one forward of twice the rows.

    w: a Python number; 0 returns `denoise` itself. null_cond_fn maps cond to a dict of the same keys and shapes
    ([B, ...] each); ValueError where its keys differ.
    """
    if w == 0:
        return denoise

    def guided_denoise(x_t, t, cond):
        null = null_cond_fn(cond)
        if set(null) != set(cond):
            raise ValueError(
                f"guided: null_cond_fn returned the keys {sorted(null)}: expected the condition's, {sorted(cond)}"
            )
        x0 = denoise(interleave(x_t, x_t), interleave(t, t), interleave(cond, null))
        return jax.tree.map(lambda both: _guide(both.reshape((-1, 2) + both.shape[1:]), w), x0)

    return guided_denoise


def thresholded(
    denoise: DenoiseFn, percentile: float | None, maximum: float = math.inf, scales: tuple[float, ...] = ()
) -> DenoiseFn:
    """Keep the estimate of x0 in [-1, 1], the range of pixels.

    percentile None: clip. A number in (0, 1): dynamic thresholding (Imagen, arXiv 2205.11487; dpm_solver_pp.py with
    .995): per sample and leaf, s = that quantile of |x0|, at least 1 and at most `maximum` (ml-mdm: .995 with 100,
    DeepFloyd .95 with 1.5); clip to [-s, s], divide by s. scales: leaf by leaf, for pixels divided by such a number.
    ValueError for another percentile or a maximum below 1.
    """
    if percentile is not None and not 0 < percentile < 1:
        raise ValueError(f"thresholded: percentile = {percentile}: give a number in (0, 1), or None to clip")
    if maximum < 1 or (percentile is None and not math.isinf(maximum)):
        raise ValueError(f"thresholded: maximum = {maximum}: give at least 1, or leave it out with percentile None")

    def threshold(x0):
        if percentile is None:
            return jnp.clip(x0, -1, 1)
        s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), percentile, axis=1)
        s = jnp.clip(s, 1, maximum).reshape((-1,) + (1,) * (x0.ndim - 1))
        return jnp.clip(x0, -s, s) / s

    def thresholded_denoise(x_t, t, cond):
        leaves, structure = jax.tree.flatten(denoise(x_t, t, cond))
        if not scales:
            return structure.unflatten(map(threshold, leaves))
        if len(scales) != len(leaves):
            raise ValueError(f"thresholded: {len(scales)} scales for {len(leaves)} leaves: give one per leaf, or ()")
        return structure.unflatten(threshold(x0 * s) / s for x0, s in zip(leaves, scales, strict=True))

    return thresholded_denoise


def interleave(first, second):
    """Two trees of [B, ...] as one of [2B, ...], rows first[0], second[0], first[1], ...: stacked on axis 1."""
    return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape((-1,) + a.shape[1:]), first, second)


def _guide(pairs, w):
    return pairs[:, 0] + w * (pairs[:, 0] - pairs[:, 1])
