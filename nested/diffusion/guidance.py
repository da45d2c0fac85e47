"""Guidance: functions Guider(denoise) -> denoise that change the estimate of x0 that a sampler sees.

Classifier-free guidance is written as U-ViT writes it (eval_ldm_discrete.py), out = cond + w (cond - null): w is one
less than the scale of Ho & Salimans (arXiv 2207.12598), and w = 0 is no guidance. At fixed (x_t, t) the predictions
eps, v and x0 are affine in one another and the weights 1 + w and -w sum to 1, so guiding x0 here is guiding eps there.
Departure from the authors' code: one forward of 2B rows instead of two of B rows. Condition and null are interleaved
(rows 2i and 2i + 1), which leaves a sharded batch where it is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nested.diffusion.denoiser import Cond, DenoiseFn
from nested.diffusion.process import Tree

Guider = Callable[[DenoiseFn], DenoiseFn]


def guided(denoise: DenoiseFn, null_cond_fn: Callable[[Cond], Cond], w: float) -> DenoiseFn:
    """Return classifier-free guidance, x0(cond) + w (x0(cond) - x0(null)), in one forward of twice the rows.

    Args:
        denoise: the function to guide.
        null_cond_fn: maps cond to the null conditions, of the same keys and shapes.
        w: the weight, a Python number; with 0 `denoise` itself is returned.

    Raises:
        ValueError: when it is called, if the null conditions have other keys than cond.
    """
    if w == 0:
        return denoise

    def guided_denoise(x_t: Tree, t: jax.Array, cond: Cond) -> Tree:
        null = null_cond_fn(cond)
        if set(null) != set(cond):
            raise ValueError(
                f"guided: null_cond_fn returned the keys {sorted(null)}: expected the condition's, {sorted(cond)}"
            )
        x0 = denoise(interleave(x_t, x_t), interleave(t, t), interleave(cond, null))
        return jax.tree.map(lambda both: _guide(both.reshape((-1, 2) + both.shape[1:]), w), x0)

    return guided_denoise


def interleave(first: Tree, second: Tree) -> Tree:
    """Merge two trees of [B, ...] into one of [2B, ...], with the rows first[0], second[0], first[1], second[1], ..."""
    return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape((-1,) + a.shape[1:]), first, second)


def _guide(pairs: jax.Array, w: float) -> jax.Array:
    return pairs[:, 0] + w * (pairs[:, 0] - pairs[:, 1])
