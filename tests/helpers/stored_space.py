"""A space from outside of nested/ that is encoded: records hold averages of 2x2 pixels in place of the image."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from input_pipeline.latent_records import Field
from nested.spaces.pixels import normalise, to_images
from nested.spaces.space import ImageCodec, ImageSpace


@dataclasses.dataclass(frozen=True)
class Averaged(ImageCodec):
    name, needs_encoding, reads_images, is_image, stores_images = "averaged", True, False, False, False

    def fields(self, image_shape):
        return (Field("averages", "float16", (image_shape[0] // 2, image_shape[1] // 2, image_shape[2])),)

    def encode(self, images, rows):
        batch, height, width, channels = images.shape
        x = normalise(images).reshape(batch, height // 2, 2, width // 2, 2, channels)
        return {"averages": x.mean((2, 4))}

    def fit(self, level, encoded):
        level.require_shape(next(f["shape"] for f in encoded.index["fields"] if f["name"] == "averages"), "averages")
        return AveragedSpace(level.shape)


class AveragedSpace(ImageSpace):
    fields = ("averages",)

    def variable(self, raw, key):
        return jnp.asarray(raw["averages"], np.float32)

    def decode(self, z, params):
        return to_images(z.repeat(2, axis=1).repeat(2, axis=2))
