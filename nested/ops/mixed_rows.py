"""Mixed-resolution batches: which rows hold a finer resolution (Matryoshka, arXiv 2310.15111, Sec. 3.3).

Of every q consecutive rows the first p have it, where p / q is the share of rows in lowest terms. So a batch axis that
is split over devices in multiples of q stays where it is, and row i has the same resolutions on any number of devices.
With q = B these are the leading rows of the batch, as in the authors' code (diffusion.py:308-313).
"""

import math

import jax
import jax.numpy as jnp


def _groups(count: int, total: int) -> tuple[int, int]:
    """p and q of count rows of total."""
    if not 0 < count <= total:
        raise ValueError(f"mixed batch: {count} of {total} rows hold a resolution; expected 1 to {total}")
    common = math.gcd(count, total)
    return count // common, total // common


def take_rows(x: jax.Array, *counts: int) -> jax.Array:
    """Return the rows [counts[-1], ...] of x [B, ...] that have a finer resolution.

    They are chosen step by step: counts[0] of all rows, counts[1] of those, and so on.
    Raises ValueError for a count outside 1 to the number of rows left.
    """
    for count in counts:
        p, q = _groups(count, x.shape[0])
        if p < q:
            x = x.reshape(-1, q, *x.shape[1:])[:, :p].reshape(count, *x.shape[1:])
    return x


def fill_rows(x: jax.Array, *totals: int) -> jax.Array:
    """Return [totals[-1], ...]: the rows of x in the places that take_rows took them from, and zeros elsewhere.

    Raises ValueError for a total below the number of rows.
    """
    for total in totals:
        p, q = _groups(x.shape[0], total)
        if p < q:
            groups = x.reshape(-1, p, *x.shape[1:])
            x = jnp.pad(groups, [(0, 0), (0, q - p), *[(0, 0)] * (x.ndim - 1)]).reshape(total, *x.shape[1:])
    return x
