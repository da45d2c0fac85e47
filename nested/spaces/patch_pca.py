"""Patch PCA as a space: the leading coefficients of image patches in their principal components.

    z = (patches - mean) V / s,   patches = s z V^T + mean

V are the leading right singular vectors of the data's patches of f x f pixels, about their mean. One global s makes the
variance over all channels 1, the convention of latent diffusion (Rombach et al. 2022, 0.18215 for its autoencoder): the
channels keep their relative sizes, so unit noise hides the fine ones first, and the error of a unit of z is the same in
every channel.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nested.spaces.pixels import normalise, to_images
from nested.spaces.space import (
    IMAGE,
    Arrays,
    Encoded,
    Grid,
    ImageSpace,
    LatentGrid,
    LevelSource,
    Params,
    PatchOptions,
)
from nested.spaces.svd import Basis, Covariance, fit_basis, project

STATISTIC = "patches"  # the name of the patches' grid in statistics.npz and latents.json


def patchify(x_BHWC: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, H/f, W/f, f f C] for patches of f x f pixels, a patch's rows first, channels last."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, patch * patch * channels)


def unpatchify(x_BhwC: jax.Array, patch: int) -> jax.Array:
    """The inverse of patchify."""
    batch, height, width, channels = x_BhwC.shape
    x = x_BhwC.reshape(batch, height, width, patch, patch, channels // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * patch, width * patch, channels // patch**2)


@functools.partial(jax.jit, static_argnames=("patch",))
def _patches(images: jax.Array, patch: int) -> jax.Array:
    return patchify(normalise(images), patch)


@dataclasses.dataclass(frozen=True)
class PatchPCA(PatchOptions):
    """The codec `patch_pca`: records hold the image, pass 1 the covariance of its patches."""

    name = "patch_pca"
    needs_encoding = True

    def fit(self, level: LevelSource, encoded: Encoded) -> "PatchSpace":
        if STATISTIC not in encoded.bases:
            level.refuse_absent_source(encoded)
        level.require_standardize_channel()
        stored, channels = encoded.index["features"][STATISTIC], level.shape[2]
        level.require_shape((*stored["grid"], min(channels, stored["components"])), "the patches")
        patch = encoded.index["made_from"]["codec.patch"]
        return PatchSpace.from_basis(encoded.bases[STATISTIC], patch, tuple(level.shape))

    @property
    def made_from(self) -> dict[str, Any]:
        return {"codec.patch": self.patch, "codec.channels": self.channels}

    def latent_grid(self, image_shape: Grid) -> LatentGrid:
        """The grid of the patches, whose projection to the latents changes places with the pooling of features."""
        height, width, channels = image_shape
        if self.patch < 1 or height % self.patch or width % self.patch:
            raise ValueError(f"codec.patch: {self.patch} does not divide the images' {height}x{width}; give a divisor")
        full = self.patch**2 * channels
        if not 1 <= self.channels <= full:
            raise ValueError(
                f"codec.channels: {self.channels} given; a {self.patch}x{self.patch} patch of {channels} channel(s) "
                f"has 1 to {full}"
            )
        return LatentGrid((height // self.patch, width // self.patch, full), self.channels)

    def statistics(self, image_shape: Grid) -> dict[str, Grid]:
        return {STATISTIC: self.latent_grid(image_shape).shape}

    def encode(self, images: np.ndarray, rows: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
        return {STATISTIC: _patches(jax.device_put(images, rows), self.patch)}

    def latents(self, encoded: Mapping[str, jax.Array]) -> jax.Array:
        return encoded[STATISTIC]

    def bases(self, covariances: Mapping[str, Covariance]) -> dict[str, Basis]:
        return {STATISTIC: fit_basis(covariances[STATISTIC], self.channels)}

    def projection(self, bases: Mapping[str, Basis]) -> tuple[np.ndarray, np.ndarray]:
        space = PatchSpace.from_basis(bases[STATISTIC], self.patch, (1, 1, self.channels))
        return space.mean.astype(np.float64), space.vectors.astype(np.float64) * space.scale


@dataclasses.dataclass(frozen=True, eq=False)
class PatchSpace(ImageSpace):
    """The fitted space. mean [f f C], vectors [f f C, K]: float32; scale: 1 / s; share: of the variance that K channels
    keep."""

    patch: int
    mean: np.ndarray
    vectors: np.ndarray
    scale: float
    share: float

    @classmethod
    def from_basis(cls, basis: Basis, patch: int, shape: Grid) -> "PatchSpace":
        """The space of a level of this shape, whose channels are the leading ones. Raises ValueError if the patches do
        not vary."""
        channels = shape[2]
        variance = basis.variances[:, :channels].mean()
        if variance <= 0:
            raise ValueError("codec.patch_pca: the images do not vary: nothing to encode; check the data")
        mean, vectors = basis.mean[0].astype(np.float32), basis.vectors[0, :, :channels].astype(np.float32)
        return cls(shape, patch, mean, vectors, float(1.0 / np.sqrt(variance)), basis.share(channels))

    @property
    def explained_variance(self) -> float:
        return self.share

    def variable(self, raw: Arrays, key: jax.Array | None) -> jax.Array:
        """uint8 [B, H, W, C] -> float32 [B, H/f, W/f, K]."""
        patches = patchify(normalise(raw[IMAGE]), self.patch)
        return project(patches, self.mean[None], self.vectors[None]) * self.scale

    def decode(self, z: jax.Array, params: Params) -> jax.Array:
        """[B, H/f, W/f, K] -> uint8 [B, H, W, C]."""
        z_BhwK = z.astype(jnp.float32) / self.scale
        x = jnp.einsum("bhwk,ck->bhwc", z_BhwK, self.vectors, precision=jax.lax.Precision.HIGHEST)
        return to_images(unpatchify(x + self.mean[None, None, None], self.patch))
