"""From records to level variables and back: what the jitted train step and the sampler see of the encoding.

Records hold the image and each feature's leading components (nested/encode.py); pooling, truncation, standardisation
and the level-1 codec run here, inside the jitted step. So the number of levels and their shapes are free, as long as a
level's grid and channels are not larger than what is stored. The statistics are small constants of the step.
"""

import dataclasses
import hashlib
import math
import pathlib

from input_pipeline import latents as records
from nested import encoding
from nested.encoders import compress

CODECS = ("pixels", "patch_pca")


@dataclasses.dataclass(frozen=True)
class LevelSource:
    """Where a level's variable comes from. name: 'z3'; source: 'pixels' | 'patch_pca' | a stored feature by its name in
    nested/encoders/grids.py; shape: (h, w, c) of the variable, for pixels also with frames before it or a tuple of
    resolutions, made by `downsampling` (compress.Pyramid); standardize: of features (compress.fit_level)."""

    name: str
    source: str
    shape: tuple
    downsampling: str = "average"
    standardize: str = "channel"


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """The levels' variables of encoded images. Made by read().

    levels: LevelSource, coarse to fine; transforms: one per level, with encode (and decode, where it is a codec);
    explained: the share of the variance that each level's channels keep; fingerprint: of the encoding.
    """

    levels: tuple
    transforms: tuple
    explained: tuple
    fingerprint: str

    @property
    def fields(self):
        """The record fields that variables() reads, for LatentRecords."""
        return tuple(dict.fromkeys(_field(level.source) for level in self.levels))

    def variables(self, raw, key):
        """raw: batch of records {field: [B, ...]} -> {level: float32 [B, h, w, c]}, standardised. Traceable by jit.

        key: for codecs that sample their latent; the codecs of this version are deterministic and do not use it.
        """
        del key
        pairs = zip(self.levels, self.transforms, strict=True)
        return {level.name: transform.encode(raw[_field(level.source)]) for level, transform in pairs}

    def decode(self, z_BhwC):
        """The finest level's variable -> uint8 images [B, H, W, C] or clips [B, T, H, W, C]. Traceable by jit."""
        return self.transforms[-1].decode(z_BhwC)

    def resolutions(self, z):
        """Every resolution of the finest level's variable as uint8 images or clips, coarse to fine; for jit too."""
        return tuple(map(compress.to_images, z)) if isinstance(z, tuple) else (self.decode(z),)

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
                    row["bits_per_image"] = compress.information_bits(size, sigmas[level.name])
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
    """Latents of levels whose variables are the images themselves, of this shape, or smaller ones: nothing is encoded.
    """
    transforms = tuple(_pixels(level, image_shape) for level in levels)
    return Latents(tuple(levels), transforms, (1.0,) * len(levels), "images")


def read(directory, levels):
    """Latents from a finished latents directory (latents.json, statistics.npz).

    levels: LevelSource, coarse to fine; the last one's source must be a codec.
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
    bases = encoding.load(path, compress.Basis, "basis/")
    moments = encoding.load(path, compress.Moments, "moments/")
    made = [_transform(level, index, bases, moments) for level in levels]
    if levels[-1].source not in CODECS:
        raise ValueError(
            f"level {levels[-1].name}: source {levels[-1].source!r} has no decoder; the finest level's source must be "
            f"one of {', '.join(map(repr, CODECS))}"
        )
    transforms, explained = zip(*made, strict=True)
    return Latents(tuple(levels), transforms, explained, index["fingerprint"])


def _field(source):
    return "image" if source in CODECS else source


def _transform(level, index, bases, moments):
    """(transform, explained variance) of one level."""
    if level.source == "pixels":
        return _pixels(level, index["image_shape"]), 1.0
    feature = "patches" if level.source == "patch_pca" else level.source
    if feature not in bases:
        known = ["pixels"] + ["patch_pca" if name == "patches" else name for name in bases]
        raise ValueError(
            f"level {level.name}: source {level.source!r} is not in these latents, only {', '.join(known)}; "
            "add it to config.encoder.features (or config.codec) and encode into another latents_dir"
        )
    basis, stored = bases[feature], index["features"][feature]
    channels = level.shape[2]
    if level.source == "patch_pca":
        _must_be_standard(level)
        _must_equal(level, [*stored["grid"], min(channels, stored["components"])], "the patches")
        return compress.PatchPCA.from_basis(basis, index["made_from"]["codec.patch"], channels), _share(basis, channels)
    limit = (*stored["grid"], stored["components"])
    if any(not 1 <= size <= most for size, most in zip(level.shape, limit, strict=True)):
        raise ValueError(
            f"level {level.name}: shape {_x(level.shape)} cannot come from {level.source!r}, which stores {_x(limit)}; "
            "pooling and truncation only make it smaller"
        )
    _must_keep(level, limit, index["made_from"]["encoder.svd"])
    try:
        transform = compress.fit_level(moments[feature], stored["grid"], level.shape, level.standardize)
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
        return compress.Pyramid(tuple(level.shape), level.downsampling)
    return compress.Pixels()


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
