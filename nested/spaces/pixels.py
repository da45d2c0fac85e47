"""Pixels as a variable: one image or clip in [-1, 1], or the same at several resolutions."""

import dataclasses

import jax
import jax.numpy as jnp


def normalise(images):
    """uint8 images -> float32 in [-1, 1]: x / 127.5 - 1. Floats are in that range already (augmented) and stay."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def to_images(x):
    """Inverse of normalise: rounded, clipped to 0..255, uint8."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """z_1 = the image in [-1, 1]."""

    def encode(self, images):
        return normalise(images)

    def decode(self, z_BHWC):
        return to_images(z_BHWC)


DOWNSAMPLINGS = ("average", "bilinear")


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """One image or clip in [-1, 1] at several resolutions, coarse to fine (Matryoshka, 2310.15111, Sec. 3.1 and 4.1).

    shapes: (h, w, c) or (frames, h, w, c) each, a tuple of them or a single one; every h and w divides the image's.
    A shape without frames is the clip's first one. downsampling: 'average' over blocks of pixels (the public code), or
    'bilinear' (the paper's word) without antialiasing, which looks at the four pixels in the middle of a block.
    """

    shapes: tuple
    downsampling: str = "average"

    def __post_init__(self):
        if self.downsampling not in DOWNSAMPLINGS:
            raise ValueError(f"downsampling {self.downsampling!r} is not known: use one of {DOWNSAMPLINGS}")

    def encode(self, images):
        x = normalise(images)
        if isinstance(self.shapes[0], int):
            return self._resized(x, self.shapes)
        return tuple(self._resized(x, shape) for shape in self.shapes)

    def _resized(self, x, shape):
        x = x[:, 0] if x.ndim > len(shape) + 1 else x
        (*frames, height, width, channels), (h, w) = x.shape[:-1] + shape[-1:], shape[-3:-1]
        if (height, width) == (h, w):
            return x
        if self.downsampling == "bilinear":
            return jax.image.resize(x, (*frames, h, w, channels), "bilinear", antialias=False)
        return x.reshape(*frames, h, height // h, w, width // w, channels).mean((-4, -2))

    def decode(self, variable):
        """The finest resolution as uint8 images or clips."""
        return to_images(variable if isinstance(self.shapes[0], int) else variable[-1])
