"""Spaces: how a level's variable follows from images or stored records, and the way back to images.

space has the protocols; pixels, patch_pca, autoencoder_kl, features and synthetic are one space each; svd holds the
statistics that they share. Imports nested.encoders, weights and runtime, and input_pipeline.
"""

from nested.spaces.autoencoder_kl import AutoencoderKL
from nested.spaces.features import Feature
from nested.spaces.patch_pca import PatchPCA
from nested.spaces.pixels import Pixels, normalise, to_images
from nested.spaces.space import Codec, DecodableSpace, Encoded, ImageCodec, ImageSpace, LevelSource, OpenCodec, Space
from nested.spaces.synthetic import Synthetic

__all__ = [
    "AutoencoderKL",
    "Codec",
    "DecodableSpace",
    "Encoded",
    "Feature",
    "ImageCodec",
    "ImageSpace",
    "LevelSource",
    "OpenCodec",
    "PatchPCA",
    "Pixels",
    "Space",
    "Synthetic",
    "normalise",
    "to_images",
]
