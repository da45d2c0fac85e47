"""Encoder features as a variable: a stored grid after pooling, truncation and standardisation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from nested.encoders.grids import pooling_matrix
from nested.spaces.svd import standardisation

STANDARDIZE = ("channel", "sample", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class LevelTransform:
    """A stored projected grid [B, h, w, K] -> the level variable [B, h', w', d], float32. Made by fit_level.

    rows [h', h], columns [w', w]: pooling; mean, std [d]: all float64. per_sample: each image's variable is brought to
    mean 0 and (unbiased) variance 1 by itself at the end; one that does not vary becomes 0.
    """

    rows: np.ndarray
    columns: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    per_sample: bool

    def encode(self, grid_BhwK):
        """[B, h, w, K], as stored -> [B, h', w', d]."""
        x = jnp.asarray(grid_BhwK)[..., : len(self.mean)].astype(jnp.float32)
        rows, columns = np.float32(self.rows), np.float32(self.columns)
        x = jnp.einsum("bhwk,ih,jw->bijk", x, rows, columns, precision=jax.lax.Precision.HIGHEST)
        x = (x - np.float32(self.mean)[None, None, None]) / np.float32(self.std)[None, None, None]
        if not self.per_sample:
            return x
        x = x - x.mean((1, 2, 3), keepdims=True)
        std = jnp.std(x, (1, 2, 3), keepdims=True, ddof=1)
        return x / jnp.where(std > 0, std, 1.0)


def fit_level(moments, grid, shape, standardize="channel"):
    """LevelTransform from a stored grid (h, w) to a level's shape (h', w', d), with h' <= h, w' <= w, d <= K.

    standardize: 'channel' (over images and positions) | 'sample' (over each image's own numbers) | 'none'.
    Raises ValueError in one line: another word, a channel that does not vary, 'sample' of a single number.
    """
    if standardize not in STANDARDIZE:
        raise ValueError(f"standardize {standardize!r} given; choose from {', '.join(map(repr, STANDARDIZE))}")
    if standardize == "sample" and math.prod(shape) == 1:
        raise ValueError("standardize 'sample' of a single number leaves nothing; use 'channel'")
    rows, columns = pooling_matrix(grid[0], shape[0]), pooling_matrix(grid[1], shape[1])
    mean, std = np.zeros(shape[2]), np.ones(shape[2])
    if standardize == "channel":
        mean, std = standardisation(moments, np.kron(rows, columns), shape[2])
    return LevelTransform(rows, columns, mean, std, standardize == "sample")
