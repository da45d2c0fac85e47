"""Pixels as a space: the variable is the image or clip in [-1, 1], or the same at several resolutions.

The resolutions are Matryoshka's (2310.15111, Sec. 3.1 and 4.1), coarse to fine.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nested.spaces.space import (
    IMAGE,
    IMAGES_AS_SOURCE,
    Arrays,
    DecodableSpace,
    Encoded,
    ImageCodec,
    ImageSpace,
    LevelSource,
    Params,
    Shape,
    Tree,
    finest_shape,
    format_shape,
    is_joint,
)

DOWNSAMPLINGS = ("average", "bilinear")


def normalise(images: ArrayLike) -> jax.Array:
    """uint8 images -> float32 in [-1, 1]: x / 127.5 - 1. Floats are in that range already (augmented) and stay."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def to_images(x: jax.Array) -> jax.Array:
    """The inverse of normalise: rounded, clipped to 0..255, uint8."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Pixels(ImageCodec):
    """The codec `pixels`: nothing is encoded unless other levels need it."""

    name = IMAGES_AS_SOURCE
    is_image = True

    def fit(self, level: LevelSource, encoded: Encoded) -> DecodableSpace:
        """The images themselves, or smaller ones; ValueError if the images cannot be brought to the level's shapes."""
        if IMAGE not in encoded.fields:
            level.refuse_absent_source(encoded)
        level.require_standardize_channel()
        image_shape = tuple(encoded.index["image_shape"])
        if None in image_shape:
            raise ValueError("the images differ in size: set config.data.image_size to the finest level's side")
        *frames, height, width, channels = image_shape
        for shape in level.shape if is_joint(level.shape) else (level.shape,):
            *some, h, w, c = shape
            if some not in ([], frames) or c != channels or height % h or width % w or height // h != width // w:
                raise ValueError(
                    f"level {level.name}: shape {format_shape(shape)} given, but images of {format_shape(image_shape)} "
                    "are only averaged over square blocks, and clips have all their frames or the first one; change "
                    "the level's shape or config.data.image_size"
                )
        if is_joint(level.shape) or finest_shape(level.shape) != image_shape:
            return Pyramid(tuple(level.shape), level.downsampling)
        return Images(tuple(level.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Images(ImageSpace):
    """z = the image in [-1, 1]."""

    def variable(self, raw: Arrays, key: jax.Array | None) -> jax.Array:
        return normalise(raw[IMAGE])

    def decode(self, z: jax.Array, params: Params) -> jax.Array:
        return to_images(z)


@dataclasses.dataclass(frozen=True, eq=False)
class Pyramid(ImageSpace):
    """One image or clip in [-1, 1] at another resolution, or at several.

    shape: (h, w, c) or (frames, h, w, c), or a tuple of these, coarse to fine; every h and w divides the image's. A
    shape without frames is the clip's first one. downsampling: 'average' over blocks of pixels (the public code), or
    'bilinear' (the paper's word) without antialiasing, which looks at the four pixels in the middle of a block.
    """

    downsampling: Literal["average", "bilinear"] | str = "average"

    def __post_init__(self):
        if self.downsampling not in DOWNSAMPLINGS:
            raise ValueError(f"downsampling {self.downsampling!r} is not known: use one of {DOWNSAMPLINGS}")

    def variable(self, raw: Arrays, key: jax.Array | None) -> Tree:
        x = normalise(raw[IMAGE])
        if is_joint(self.shape):
            return tuple(self._resized(x, shape) for shape in self.shape)
        return self._resized(x, self.shape)

    def _resized(self, x: jax.Array, shape: Shape) -> jax.Array:
        x = x[:, 0] if x.ndim > len(shape) + 1 else x
        (*frames, height, width, channels), (h, w) = x.shape[:-1] + shape[-1:], shape[-3:-1]
        if (height, width) == (h, w):
            return x
        if self.downsampling == "bilinear":
            return jax.image.resize(x, (*frames, h, w, channels), "bilinear", antialias=False)
        return x.reshape(*frames, h, height // h, w, width // w, channels).mean((-4, -2))

    def decode(self, z: Tree, params: Params) -> jax.Array:
        """The finest resolution as uint8 images or clips."""
        return to_images(z[-1] if is_joint(self.shape) else z)

    def resolutions(self, z: Tree, params: Params) -> tuple[jax.Array, ...]:
        return tuple(map(to_images, z if is_joint(self.shape) else (z,)))
