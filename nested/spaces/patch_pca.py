"""Image patches in their principal components, as a variable with a decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nested.spaces.pixels import normalise, to_images
from nested.spaces.svd import project


def patchify(x_BHWC, patch):
    """[B, H, W, C] -> [B, H/f, W/f, f f C] for patches of f x f pixels, a patch's rows first, channels last."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, patch * patch * channels)


def unpatchify(x_BhwC, patch):
    """Inverse of patchify."""
    batch, height, width, channels = x_BhwC.shape
    x = x_BhwC.reshape(batch, height, width, patch, patch, channels // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * patch, width * patch, channels // patch**2)


@dataclasses.dataclass(frozen=True, eq=False)
class PatchPCA:
    """z_1 = the leading coefficients of f x f image patches in their orthonormal basis; decoding is the transpose.

    One global scale makes the variance over all channels 1, the convention of latent diffusion (Rombach et al. 2022,
    0.18215 for its autoencoder): the channels keep their relative sizes, so unit noise hides the fine ones first,
    and the error of a unit of z is the same in every channel.
    mean [f f C], vectors [f f C, K]: float32; scale: 1 / std.
    """

    patch: int
    mean: np.ndarray
    vectors: np.ndarray
    scale: float

    @classmethod
    def from_basis(cls, basis, patch, channels):
        variance = basis.variances[:, :channels].mean()
        if variance <= 0:
            raise ValueError("codec.patch_pca: the images do not vary: nothing to encode; check the data")
        vectors = basis.vectors[0, :, :channels].astype(np.float32)
        return cls(patch, basis.mean[0].astype(np.float32), vectors, float(1.0 / np.sqrt(variance)))

    def encode(self, images):
        """uint8 [B, H, W, C] -> float32 [B, H/f, W/f, K]."""
        return project(patchify(normalise(images), self.patch), self.mean[None], self.vectors[None]) * self.scale

    def decode(self, z_BhwK):
        """[B, H/f, W/f, K] -> uint8 [B, H, W, C]."""
        z = z_BhwK.astype(jnp.float32) / self.scale
        x = jnp.einsum("bhwk,ck->bhwc", z, self.vectors, precision=jax.lax.Precision.HIGHEST)
        return to_images(unpatchify(x + self.mean[None, None, None], self.patch))
