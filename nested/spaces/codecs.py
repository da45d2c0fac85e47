"""config.codec: the finest level's space, which has a way back to images.

pixels      the image itself, in [-1, 1]; records hold the image
patch_pca   coefficients of image patches, fitted to the data (compress.PatchPCA); records hold the image
sd_vae      latents of a frozen autoencoder (encoders/autoencoder_kl.py), drawn anew in every step; records hold
            their moments in place of the image
"""

import dataclasses

CODECS = ("pixels", "patch_pca", "sd_vae")
DTYPES = ("float32", "bfloat16")
# Of sd_vae alone: option -> its value in configs/common.py, where it says nothing.
UNSET = dict(weights="", prefix="", scale=0.0, decoder_weights="", batch_size=16, dtype="float32")


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """config.codec. name: 'pixels' | 'patch_pca' | 'sd_vae'.

    patch: pixels per side that one position stands for, and channels: of patch_pca (kept of patch^2 C) and of sd_vae.
    Of sd_vae alone: weights, a file or a folder, and prefix, what stands before its names ('': found); scale, which
    multiplies the latents (0: 1 / their standard deviation in these data); decoder_weights, another file to decode with
    ('': weights); batch_size, images at a time on each device; dtype, of decoding."""

    name: str
    patch: int
    channels: int
    weights: str
    prefix: str
    scale: float
    decoder_weights: str
    batch_size: int
    dtype: str


def check_codec(codec: CodecConfig) -> None:
    """ValueError for a value that an option does not have, and for an option of sd_vae with another codec."""
    for key, allowed in (("name", CODECS), ("dtype", DTYPES)):
        if getattr(codec, key) not in allowed:
            raise ValueError(f"codec.{key}: {getattr(codec, key)!r} given; choose from {', '.join(map(repr, allowed))}")
    if codec.name == "sd_vae":
        if codec.scale < 0 or codec.batch_size < 1:
            raise ValueError(
                f"codec.scale {codec.scale}, codec.batch_size {codec.batch_size} given; the scale is positive, or 0 to "
                "measure it, and at least one image is decoded at a time"
            )
        return
    for key, value in UNSET.items():
        if getattr(codec, key) != value:
            raise ValueError(
                f"codec.{key}: {getattr(codec, key)!r} given, but codec.name {codec.name!r} has no weights; leave it "
                f"{value!r}, or set codec.name to 'sd_vae'"
            )
