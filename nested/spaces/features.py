"""Features as a space: a stored grid of a frozen encoder, or of the codec, pooled, truncated and standardised.

There is no way back to images: features are the variables of the levels above the finest one. What is stored is the
projection of the raw features to their leading principal components (nested/spaces/svd.py).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from nested.encoders import grids
from nested.spaces.space import Arrays, Codec, Encoded, Grid, LevelSource, Shape, format_shape
from nested.spaces.svd import Moments, standardisation

STANDARDIZE = ("channel", "sample", "none")


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature by its name in nested/encoders/grids.py, and the codec that `codec` and `codecN` are made of."""

    name: str
    codec: Codec
    needs_encoding = True
    reads_images = False
    is_image = False

    def fit(self, level: LevelSource, encoded: Encoded) -> "FeatureSpace":
        """The space of a level. Raises ValueError, in one line that names the level, if the feature is not stored, if
        its grid or channels are smaller than the level's shape, or if the SVD does not allow the shape."""
        if self.name not in encoded.bases or self.name not in encoded.fields:
            level.refuse_absent_source(encoded)
        stored = encoded.index["features"][self.name]
        limit = (*stored["grid"], stored["components"])
        if any(not 1 <= size <= most for size, most in zip(level.shape, limit, strict=True)):
            raise ValueError(
                f"level {level.name}: shape {format_shape(level.shape)} cannot come from {self.name!r}, which stores "
                f"{format_shape(limit)}; pooling and truncation only make it smaller"
            )
        _check_svd_allows(level, limit, encoded.index["made_from"]["encoder.svd"])
        share = encoded.bases[self.name].share(level.shape[2])
        try:
            space = fit_features(
                encoded.moments[self.name], stored["grid"], level.shape, level.standardize, self.name, share
            )
        except ValueError as error:
            raise ValueError(f"level {level.name} ({self.name}): {error}") from error
        if grids.is_codec_feature(self.name) and level.standardize == "none":  # made of latents without scale
            return dataclasses.replace(space, std=space.std / self.codec.latent_scale(encoded))
        return space


def _check_svd_allows(level: LevelSource, stored: Grid, svd: str) -> None:
    """Positions with bases of their own cannot be averaged, and channels without order cannot be cut off."""
    if svd == "per_position" and tuple(level.shape[:2]) != tuple(stored[:2]):
        raise ValueError(
            f"level {level.name}: shape {format_shape(level.shape)} given, but with encoder.svd 'per_position' "
            f"{level.source.name!r} is not pooled: give {format_shape(stored[:2])} positions, or store it pooled "
            "('mapN' in encoder.features)"
        )
    if svd == "none" and level.shape[2] != stored[2]:
        raise ValueError(
            f"level {level.name}: shape {format_shape(level.shape)} given, but with encoder.svd 'none' the channels of "
            f"{level.source.name!r} have no order to cut them by: give all {stored[2]}, or encode with 'shared'"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSpace:
    """A stored projected grid [B, h, w, K] -> the level's variable [B, h', w', d], float32. Made by fit_features.

    field: of the records. rows [h', h], columns [w', w]: pooling; mean, std [d]: all float64. standardize: 'sample'
    brings each image's variable to mean 0 and (unbiased) variance 1 by itself at the end; one that does not vary
    becomes 0.
    """

    field: str
    shape: Shape
    rows: np.ndarray
    columns: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    standardize: str
    explained_variance: float

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @property
    def standardised(self) -> bool:
        return self.standardize != "none"

    def variable(self, raw: Arrays, key: jax.Array | None) -> jax.Array:
        """{field: [B, h, w, K], as stored} -> [B, h', w', d]."""
        x = jnp.asarray(raw[self.field])[..., : len(self.mean)].astype(jnp.float32)
        rows, columns = self.rows.astype(np.float32), self.columns.astype(np.float32)
        x = jnp.einsum("bhwk,ih,jw->bijk", x, rows, columns, precision=jax.lax.Precision.HIGHEST)
        mean, std = self.mean.astype(np.float32), self.std.astype(np.float32)
        x = (x - mean[None, None, None]) / std[None, None, None]
        if self.standardize != "sample":
            return x
        x = x - x.mean((1, 2, 3), keepdims=True)
        deviation = jnp.std(x, (1, 2, 3), keepdims=True, ddof=1)
        return x / jnp.where(deviation > 0, deviation, 1.0)


def fit_features(
    moments: Moments, grid: tuple[int, ...], shape: Shape, standardize: str = "channel", field: str = "",
    explained_variance: float = 1.0,
) -> FeatureSpace:  # fmt: skip
    """The space of a level of shape (h', w', d) made of a stored grid (h, w), with h' <= h, w' <= w and d <= K.

    Args:
      moments: of the stored grid, over the data set.
      standardize: 'channel' (over images and positions) | 'sample' (over each image's own numbers) | 'none'.
      field: the record field of the grid.
      explained_variance: of its first d channels.

    Raises ValueError, in one line, for another standardisation, for a channel that does not vary, and for 'sample' of a
    single number.
    """
    if standardize not in STANDARDIZE:
        raise ValueError(f"standardize {standardize!r} given; choose from {', '.join(map(repr, STANDARDIZE))}")
    if standardize == "sample" and math.prod(shape) == 1:
        raise ValueError("standardize 'sample' of a single number leaves nothing; use 'channel'")
    rows, columns = grids.pooling_matrix(grid[0], shape[0]), grids.pooling_matrix(grid[1], shape[1])
    mean, std = np.zeros(shape[2]), np.ones(shape[2])
    if standardize == "channel":
        mean, std = standardisation(moments, np.kron(rows, columns), shape[2])
    return FeatureSpace(field, tuple(shape), rows, columns, mean, std, standardize, explained_variance)
