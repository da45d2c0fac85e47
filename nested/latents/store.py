"""From records to level variables and back: what the jitted train step and the sampler see of the encoding.

Records hold the image, or its latents' moments, and each feature's leading components (nested/latents/passes.py);
pooling, truncation, standardisation and the level-1 codec run here, inside the jitted step. So the number of levels
and their shapes are free, as long as a level's grid and channels are not larger than what is stored. The statistics
are small constants of the step; the parameters of an autoencoder are an argument of decode(), not constants of a
program.
"""

import dataclasses
import hashlib
import math
import pathlib
from typing import Any

from absl import logging

from input_pipeline import latent_records as records
from nested.encoders import grids
from nested.latents import job as encoding
from nested.spaces import autoencoder_kl, svd
from nested.spaces.codecs import CODECS
from nested.spaces.features import fit_level
from nested.spaces.patch_pca import PatchPCA
from nested.spaces.pixels import Pixels, Pyramid, to_images

OF_IMAGES = ("pixels", "patch_pca")  # sources that need the image itself


@dataclasses.dataclass(frozen=True)
class LevelSource:
    """Where a level's variable comes from. name: 'z3'; source: 'pixels' | 'patch_pca' | 'sd_vae' | a stored feature by
    its name in nested/encoders/grids.py; shape: (h, w, c) of the variable, for pixels also with frames before it or a
    tuple of resolutions, made by `downsampling` (Pyramid); standardize: of features (fit_level)."""

    name: str
    source: str
    shape: tuple
    downsampling: str = "average"
    standardize: str = "channel"


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """The levels' variables of encoded images. Made by read().

    levels: LevelSource, coarse to fine; transforms: one per level, with encode (and decode, where it is a codec);
    explained: the share of the variance that each level's channels keep; fingerprint: of the encoding; params: those of
    the finest level's decoder, {} where it has none.
    """

    levels: tuple
    transforms: tuple
    explained: tuple
    fingerprint: str
    params: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fields(self):
        """The record fields that variables() reads, for LatentRecords."""
        return tuple(dict.fromkeys(_field(level.source) for level in self.levels))

    @property
    def codec_field(self):
        """The record field that the finest level's variable is made of."""
        return _field(self.levels[-1].source)

    def variables(self, raw, key):
        """raw: batch of records {field: [B, ...]} -> {level: float32 [B, h, w, c]}, standardised. Traceable by jit.

        key: of the draw of an autoencoder's latents, for row i from (key, i); None for their means.
        """
        found = {}
        for level, transform in zip(self.levels, self.transforms, strict=True):
            drawn = (key,) if level.source == "sd_vae" else ()
            found[level.name] = transform.encode(raw[_field(level.source)], *drawn)
        return found

    def decode(self, z_BhwC, params=None):
        """The finest level's variable -> uint8 images [B, H, W, C] or clips [B, T, H, W, C]. Traceable by jit.

        params: self.params, for codecs that have some; such decode few rows at a time, see slices()."""
        codec = self.transforms[-1]
        return codec.decode(z_BhwC, params) if params else codec.decode(z_BhwC)

    def slices(self, rows, devices):
        """Equal slices of that many rows, which are to be decoded one after the other on the devices."""
        most = self.transforms[-1].batch_size if self.params else rows
        return autoencoder_kl.slices_of(rows, most, devices)

    def resolutions(self, z, params=None):
        """Every resolution of the finest level's variable as uint8 images or clips, coarse to fine; for jit too."""
        return tuple(map(to_images, z)) if isinstance(z, tuple) else (self.decode(z, params),)

    def report(self, sigmas):
        """One dict per level, coarse to fine: name, source, shape, explained_variance, and for sigmas[name] (a level
        without one is nobody's condition): sigma, bits_per_image that pass at it (inf = unlimited; not of variables
        that are not standardised)."""
        rows = []
        for level, explained in zip(self.levels, self.explained, strict=True):
            row = {"name": level.name, "source": level.source, "shape": list(level.shape)}
            row["explained_variance"] = explained
            if level.name in sigmas:
                row["sigma"] = sigmas[level.name]
                size = sum(map(math.prod, level.shape)) if _joint(level.shape) else math.prod(level.shape)
                if level.standardize != "none":
                    row["bits_per_image"] = svd.information_bits(size, sigmas[level.name])
            rows.append(row)
        return rows


def format_report(rows):
    """Latents.report as lines of text."""
    lines = []
    for row in rows:
        share = 100 * row["explained_variance"]
        line = f"{row['name']}: {_x(row['shape'])} from {row['source']}, {share:.1f} % of the variance"
        if "bits_per_image" in row:
            bits = row["bits_per_image"]
            through = "unlimited information" if math.isinf(bits) else f"{bits:,.1f} bits per image"
            line += f"; {through} at sigma {row['sigma']:g}"
        lines.append(line)
    return "\n".join(lines)


def of_images(levels, image_shape):
    """Latents of levels whose variables are the images themselves, of this shape or smaller: nothing is encoded."""
    transforms = tuple(_pixels(level, image_shape) for level in levels)
    return Latents(tuple(levels), transforms, (1.0,) * len(levels), "images")


def of_codec(level, codec, params):
    """Latents that only decode: of the finest level, by an autoencoder whose scale is given. Needs no data.

    Raises ValueError in one line for another number of channels, or another standardisation."""
    _must_be_standard(level)
    channels = params["decoder.conv_in.weight"].shape[1]
    _must_equal(level, (*level.shape[:2], channels), "the autoencoder")
    return Latents((level,), (codec,), (1.0,), "codec", params)


def read(directory, levels, codec=None, params=None):
    """Latents from a finished latents directory (latents.json, statistics.npz).

    levels: LevelSource, coarse to fine; the last one's source must be a codec. codec, params: autoencoder_kl.Codec, of
    scale 0 where it is to be the measured one, and the decoder's parameters, for the source 'sd_vae'.
    Raises ValueError / FileNotFoundError in one line: not finished, statistics missing or not the ones of latents.json,
    an unknown source, a shape that the source cannot give.
    """
    directory = pathlib.Path(directory).expanduser()
    index = records.read_index(directory)
    path = directory / encoding.STATISTICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; delete {directory} and run --mode=encode")
    if hashlib.sha256(path.read_bytes()).hexdigest() != index["statistics_sha256"]:
        raise ValueError(f"{path}: damaged, or of another encoding; delete {directory} and run --mode=encode")
    bases = encoding.load(path, svd.Basis, "basis/")
    moments = encoding.load(path, svd.Moments, "moments/")
    if codec and not codec.scale:
        codec = dataclasses.replace(codec, scale=index["sd_vae"]["measured_scale"])
        logging.info("codec.scale 0: the measured one, %.5f", codec.scale)
    made = [_transform(level, index, bases, moments, codec) for level in levels]
    if levels[-1].source not in CODECS:
        raise ValueError(
            f"level {levels[-1].name}: source {levels[-1].source!r} has no decoder; the finest level's source must be "
            f"one of {', '.join(map(repr, CODECS))}"
        )
    transforms, explained = zip(*made, strict=True)
    return Latents(tuple(levels), transforms, explained, index["fingerprint"], params or {})


def _field(source):
    return "image" if source in OF_IMAGES else source


def _transform(level, index, bases, moments, codec):
    """(transform, explained variance) of one level."""
    fields = [field["name"] for field in index["fields"]]
    if level.source == "pixels" and "image" in fields:
        return _pixels(level, index["image_shape"]), 1.0
    if level.source == "sd_vae" and "sd_vae" in fields:
        _must_be_standard(level)
        shape = [*index["sd_vae"]["grid"], index["sd_vae"]["channels"]]
        _must_equal(level, shape, "the autoencoder")
        return codec, 1.0
    feature = "patches" if level.source == "patch_pca" else level.source
    if feature not in bases:
        known = ["pixels" if "image" in fields else "sd_vae"]
        known += ["patch_pca" if name == "patches" else name for name in bases]
        raise ValueError(
            f"level {level.name}: source {level.source!r} is not in these latents, only {', '.join(known)}; "
            "add it to config.encoder.features (or config.codec) and encode into another latents_dir"
        )
    basis, stored = bases[feature], index["features"][feature]
    channels = level.shape[2]
    if level.source == "patch_pca":
        _must_be_standard(level)
        _must_equal(level, [*stored["grid"], min(channels, stored["components"])], "the patches")
        return PatchPCA.from_basis(basis, index["made_from"]["codec.patch"], channels), _share(basis, channels)
    limit = (*stored["grid"], stored["components"])
    if any(not 1 <= size <= most for size, most in zip(level.shape, limit, strict=True)):
        raise ValueError(
            f"level {level.name}: shape {_x(level.shape)} cannot come from {level.source!r}, which stores {_x(limit)}; "
            "pooling and truncation only make it smaller"
        )
    _must_keep(level, limit, index["made_from"]["encoder.svd"])
    try:
        transform = fit_level(moments[feature], stored["grid"], level.shape, level.standardize)
        if codec and grids.of_codec(feature) and level.standardize == "none":  # stored of means that are not scaled
            transform = dataclasses.replace(transform, std=transform.std / codec.scale)
        return transform, _share(basis, channels)
    except ValueError as error:
        raise ValueError(f"level {level.name} ({level.source}): {error}") from error


def _pixels(level, image_shape):
    """The transform of a level of pixels; ValueError where the images cannot be brought to its shapes."""
    _must_be_standard(level)
    if None in image_shape:
        raise ValueError("the images differ in size: set config.data.image_size to the finest level's side")
    *frames, height, width, channels = image_shape
    for shape in level.shape if _joint(level.shape) else [level.shape]:
        *some, h, w, c = shape
        if some not in ([], frames) or c != channels or height % h or width % w or height // h != width // w:
            raise ValueError(
                f"level {level.name}: shape {_x(shape)} given, but images of {_x(image_shape)} are only averaged over "
                "square blocks, and clips have all their frames or the first one; change the level's shape or "
                "config.data.image_size"
            )
    finest = level.shape[-1] if _joint(level.shape) else level.shape
    if _joint(level.shape) or tuple(finest) != tuple(image_shape):
        return Pyramid(tuple(level.shape), level.downsampling)
    return Pixels()


def _joint(shape):
    return not isinstance(shape[0], int)


def _share(basis, channels):
    return float(basis.explained_variance()[channels - 1])


def _must_keep(level, stored, svd):
    """What the SVD does not allow: positions with bases of their own cannot be averaged, and channels without order
    cannot be cut off."""
    if svd == "per_position" and tuple(level.shape[:2]) != tuple(stored[:2]):
        raise ValueError(
            f"level {level.name}: shape {_x(level.shape)} given, but with encoder.svd 'per_position' {level.source!r} "
            f"is not pooled: give {_x(stored[:2])} positions, or store it pooled ('mapN' in encoder.features)"
        )
    if svd == "none" and level.shape[2] != stored[2]:
        raise ValueError(
            f"level {level.name}: shape {_x(level.shape)} given, but with encoder.svd 'none' the channels of "
            f"{level.source!r} have no order to cut them by: give all {stored[2]}, or encode with 'shared'"
        )


def _must_be_standard(level):
    if level.standardize != "channel":
        raise ValueError(
            f"level {level.name}: standardize {level.standardize!r} given; {level.source!r} has a scale of its own: "
            "leave it 'channel'"
        )


def _must_equal(level, shape, what):
    if tuple(level.shape) != tuple(shape):
        raise ValueError(
            f"level {level.name}: shape {_x(level.shape)} given; {level.source!r} of {what} here is {_x(shape)}"
        )


def _x(shape):
    return " + ".join(map(_x, shape)) if _joint(shape) else "x".join(map(str, shape))
