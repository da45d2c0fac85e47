"""From records to level variables and back: what the jitted train step and the sampler see of the encoding.

Records hold the image, or what a codec stores in its place, and each feature's leading components
(nested/latents/passes.py); pooling, truncation, standardisation and the codec run here, inside the jitted step. So the
number of levels and their shapes are free, as long as a level's grid and channels are not larger than what is stored.
The statistics are small constants of the step; the parameters of a decoder are an argument of decode(), not constants
of a program.
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from input_pipeline import latent_records as records
from nested.latents.job import STATISTICS_FILE, load_parts
from nested.spaces.space import (
    Arrays,
    DecodableSpace,
    Encoded,
    LevelSource,
    Params,
    Space,
    Tree,
    equal_slices,
    format_shape,
    is_joint,
)
from nested.spaces.svd import Basis, Moments, information_bits


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """The spaces of a hierarchy's levels, coarse to fine.

    fingerprint: of the encoding. placed: the parameters of the decoder where with_params() has put them.
    """

    levels: tuple[LevelSource, ...]
    spaces: tuple[Space, ...]
    fingerprint: str
    placed: Params | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The record fields that variables() reads, for LatentRecords."""
        return tuple(dict.fromkeys(field for space in self.spaces for field in space.fields))

    @property
    def finest(self) -> DecodableSpace:
        """The space of the finest level."""
        space = self.spaces[-1]
        if not isinstance(space, DecodableSpace):
            level = self.levels[-1]
            raise ValueError(
                f"level {level.name}: source {level.source.name!r} has no decoder; the finest level's source must be "
                "that of a codec (config.codec.name)"
            )
        return space

    @property
    def params(self) -> Params:
        """The parameters of decode(), {} if there are none."""
        return self.finest.params if self.placed is None else self.placed

    def with_params(self, params: Params) -> "Latents":
        """The same with the decoder's parameters elsewhere, such as on devices."""
        return dataclasses.replace(self, placed=params)

    def variables(self, raw: Arrays, key: jax.Array | None) -> dict[str, Tree]:
        """A batch of records {field: [B, ...]} -> {level: its variable, float32, standardised}. Traceable by jit.

        key: of what is drawn anew in every step, for row i from (key, i); None for the means.
        """
        return {level.name: space.variable(raw, key) for level, space in zip(self.levels, self.spaces, strict=True)}

    def decode(self, z: Tree, params: Params | None = None) -> jax.Array:
        """The finest level's variable -> uint8 images [B, H, W, C] or clips [B, T, H, W, C]. Traceable by jit.

        params: self.params, given as an argument of a program; without them they become its constants. A decoder that
        has parameters takes few rows at a time: see slices().
        """
        return self.finest.decode(z, self.params if params is None else params)

    def slices(self, rows: int, devices: int) -> list[slice]:
        """Equal slices of that many rows, which are to be decoded one after the other on the devices."""
        return equal_slices(rows, self.finest.rows_at_once or rows, devices)

    def resolutions(self, z: Tree, params: Params | None = None) -> tuple[jax.Array, ...]:
        """Every resolution of the finest level's variable as uint8 images or clips, coarse to fine; for jit too."""
        return self.finest.resolutions(z, self.params if params is None else params)

    def report(self, sigmas: Mapping[str, float]) -> list[dict[str, Any]]:
        """One dict per level, coarse to fine: name, source, shape, explained_variance.

        A level with sigmas[name] (the others are nobody's condition) also has sigma, and bits_per_image, the
        information that passes at it (inf = unlimited), if its variable is standardised.
        """
        rows = []
        for level, space in zip(self.levels, self.spaces, strict=True):
            row = {"name": level.name, "source": level.source.name, "shape": list(level.shape)}
            row["explained_variance"] = space.explained_variance
            if level.name in sigmas:
                row["sigma"] = sigmas[level.name]
                size = sum(map(math.prod, level.shape)) if is_joint(level.shape) else math.prod(level.shape)
                if space.standardised:
                    row["bits_per_image"] = information_bits(size, sigmas[level.name])
            rows.append(row)
        return rows


def format_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Latents.report as lines of text."""
    lines = []
    for row in rows:
        share = 100 * row["explained_variance"]
        line = f"{row['name']}: {format_shape(row['shape'])} from {row['source']}, {share:.1f} % of the variance"
        if "bits_per_image" in row:
            bits = row["bits_per_image"]
            through = "unlimited information" if math.isinf(bits) else f"{bits:,.1f} bits per image"
            line += f"; {through} at sigma {row['sigma']:g}"
        lines.append(line)
    return "\n".join(lines)


def latents_of_images(levels: Sequence[LevelSource], image_shape: tuple[int | None, ...]) -> Latents:
    """Latents of levels that are computed from the images alone, whose shape this is: nothing is encoded."""
    encoded = Encoded.of_images(image_shape)
    return Latents(tuple(levels), tuple(level.source.fit(level, encoded) for level in levels), "images")


def read_latents(directory: str | pathlib.Path, levels: Sequence[LevelSource]) -> Latents:
    """Latents of levels, coarse to fine, from a finished latents directory (latents.json, statistics.npz).

    Raises ValueError / FileNotFoundError in one line: the encoding is not finished, the statistics are missing or not
    the ones of latents.json, a source or a shape that these records cannot give, a finest level without a decoder.
    """
    directory = pathlib.Path(directory).expanduser()
    index = records.read_index(directory)
    path = directory / STATISTICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; delete {directory} and run --mode=encode")
    if hashlib.sha256(path.read_bytes()).hexdigest() != index["statistics_sha256"]:
        raise ValueError(f"{path}: damaged, or of another encoding; delete {directory} and run --mode=encode")
    encoded = Encoded(index, load_parts(path, Basis, "basis/"), load_parts(path, Moments, "moments/"))
    spaces = tuple(level.source.fit(level, encoded) for level in levels)
    result = Latents(tuple(levels), spaces, index["fingerprint"])
    _ = result.finest  # refuses a level that cannot be decoded
    return result
