"""What a space is: how a level's variable follows from stored records, and the way back to images.

    Codec, Feature   configured, before anything is fitted or any weights are read
      | fit(level, encoded)
    Space            of one level, fitted: what the jitted train step and the sampler see

A Codec is the finest level's space and has a way back to images: pixels, patch PCA, an autoencoder. A Feature is what a
frozen encoder, or the codec, makes of images and has none. Encoding asks a codec, once it is opened, what to store in
place of the image or beside it (OpenCodec).

A new space is one file with a Codec and a Space, and one line in SPACES of nested/build/parts.py. A space that is
computed from the stored image in every step inherits from ImageCodec and ImageSpace, and only says what differs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, Protocol, runtime_checkable

import jax
import numpy as np

from input_pipeline import latent_records as records
from nested.spaces.svd import Basis, Covariance, Moments

Tree = Any
Params = Mapping[str, Any]
Grid = tuple[int, int, int]  # height, width, channels
Shape = tuple[Any, ...]  # (height, width, channels), with frames before it for clips, or a tuple of such shapes
Arrays = Mapping[str, Any]  # record fields, {name: [B, ...]}

IMAGE = "image"  # the record field of the image itself


def is_joint(shape: Shape) -> bool:
    """Whether a shape is a tuple of shapes: resolutions that are diffused together."""
    return not isinstance(shape[0], int)


def finest_shape(shape: Shape) -> tuple[int, ...]:
    """The shape of the finest resolution."""
    return tuple(shape[-1] if is_joint(shape) else shape)


def format_shape(shape: Shape) -> str:
    """'4x4x12', and of several resolutions '7x7x1 + 14x14x1'."""
    return " + ".join(map(format_shape, shape)) if is_joint(shape) else "x".join(map(str, shape))


def equal_slices(rows: int, most: int, devices: int = 1) -> list[slice]:
    """Equal slices of `rows` rows, with at most `most` rows for each of the devices that divide a slice among them.

    The memory that decoding takes then does not grow with the rows. The loop over the slices is Python's, not one in
    the program: XLA's convolutions in loops take 10 times as long on a CPU.
    """
    if rows < 1 or rows % devices:
        raise ValueError(f"{rows} images at a time do not divide by {devices} devices; use a multiple")
    each = rows // devices
    size = devices * max(number for number in range(1, min(most, each) + 1) if each % number == 0)
    return [slice(start, start + size) for start in range(0, rows, size)]


# --- a level's space ---------------------------------------------------------------------------------------------


@runtime_checkable
class Space(Protocol):
    """A level's variable as a function of stored records."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The record fields that variable() reads."""
        ...

    @property
    def shape(self) -> Shape:
        """The shape of the variable, or the shapes of its resolutions."""
        ...

    @property
    def explained_variance(self) -> float:
        """The share of the variance of what was encoded that the variable keeps."""
        ...

    @property
    def standardised(self) -> bool:
        """Whether the variable has about unit variance, so that sigma tells how much information passes."""
        ...

    def variable(self, raw: Arrays, key: jax.Array | None) -> Tree:
        """A batch of records -> the variable, float32. Traceable by jit.

        key: of what is drawn anew in every step, for row i from (key, i); None for the mean.
        """
        ...


@runtime_checkable
class DecodableSpace(Space, Protocol):
    """A space with a way back to images."""

    @property
    def params(self) -> Params:
        """The parameters of decode(), an argument of programs; {} if there are none."""
        ...

    @property
    def rows_at_once(self) -> int | None:
        """How many rows each device decodes at a time; None for all of them."""
        ...

    def decode(self, z: Tree, params: Params) -> jax.Array:
        """The variable -> uint8 images [B, H, W, C] or clips [B, T, H, W, C]. Traceable by jit."""
        ...

    def resolutions(self, z: Tree, params: Params) -> tuple[jax.Array, ...]:
        """Every resolution of the variable as uint8 images or clips, coarse to fine. Traceable by jit."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSpace:
    """The base of a DecodableSpace that is computed from the stored image: subclasses add variable() and decode()."""

    shape: Shape

    @property
    def fields(self) -> tuple[str, ...]:
        return (IMAGE,)

    @property
    def explained_variance(self) -> float:
        return 1.0

    @property
    def standardised(self) -> bool:
        return True

    @property
    def params(self) -> Params:
        return {}

    @property
    def rows_at_once(self) -> int | None:
        return None

    def variable(self, raw: Arrays, key: jax.Array | None) -> Tree:
        raise NotImplementedError

    def decode(self, z: Tree, params: Params) -> jax.Array:
        raise NotImplementedError

    def resolutions(self, z: Tree, params: Params) -> tuple[jax.Array, ...]:
        return (self.decode(z, params),)


# --- where a level's variable comes from -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """What a finished encoding tells: latents.json, and the arrays of statistics.npz by the names of its features."""

    index: Mapping[str, Any]
    bases: Mapping[str, Basis] = dataclasses.field(default_factory=dict)
    moments: Mapping[str, Moments] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_images(cls, image_shape: tuple[int | None, ...]) -> "Encoded":
        """Records that are images of this shape; nothing is encoded."""
        return cls({"fields": [{"name": IMAGE}], "features": {}, "image_shape": list(image_shape), "made_from": {}})

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the records."""
        return tuple(field["name"] for field in self.index["fields"])

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of what levels can be made of: the images, the codec, the stored features."""
        images = (IMAGES_AS_SOURCE,) if IMAGE in self.fields else ()
        features = (name for name in self.index["features"] if name in self.fields)
        return tuple(dict.fromkeys((*images, self.index["made_from"].get("codec.name", *images), *features)))


IMAGES_AS_SOURCE = "pixels"  # the source of a level that is the image itself


class VariableSource(Protocol):
    """Where a level's variable comes from, before anything is fitted."""

    @property
    def name(self) -> str:
        """The word of config.levels[i].source."""
        ...

    @property
    def needs_encoding(self) -> bool:
        """Whether data have to be encoded before the variable can be computed."""
        ...

    @property
    def reads_images(self) -> bool:
        """Whether the variable is computed from the image in every step, so that it sees how the image is augmented."""
        ...

    @property
    def is_image(self) -> bool:
        """Whether the variable is the image itself in [-1, 1], so that its density is one of pixels."""
        ...

    def fit(self, level: "LevelSource", encoded: Encoded) -> Space:
        """The space of a level. Raises ValueError, in one line that names the level, if its shape or standardisation
        cannot be had from these records."""
        ...


@dataclasses.dataclass(frozen=True)
class LevelSource:
    """A level as its space sees it.

    name: 'z3'. source: a Codec or a Feature. shape: of the variable. downsampling: how coarser resolutions of pixels
    are made, 'average' | 'bilinear'. standardize: of features, 'channel' | 'sample' | 'none'.
    """

    name: str
    source: VariableSource
    shape: Shape
    downsampling: str = "average"
    standardize: str = "channel"

    def refuse_absent_source(self, encoded: Encoded) -> NoReturn:
        """Raises the ValueError of a source that these records were not made for."""
        raise ValueError(
            f"level {self.name}: source {self.source.name!r} is not in these latents, only "
            f"{', '.join(encoded.sources)}; add it to config.encoder.features (or config.codec) and encode into "
            "another latents_dir"
        )

    def require_standardize_channel(self) -> None:
        """Raises ValueError if the level asks a space with a scale of its own for another standardisation."""
        if self.standardize != "channel":
            raise ValueError(
                f"level {self.name}: standardize {self.standardize!r} given; {self.source.name!r} has a scale of its "
                "own: leave it 'channel'"
            )

    def require_shape(self, shape: Shape, what: str) -> None:
        """Raises ValueError if the level does not have this shape, the one that `what` gives."""
        if tuple(self.shape) != tuple(shape):
            raise ValueError(
                f"level {self.name}: shape {format_shape(self.shape)} given; {self.source.name!r} of {what} here is "
                f"{format_shape(shape)}"
            )


# --- codecs ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LatentGrid:
    """The grid that features of a codec are pooled from, and how many channels its latents have at each position."""

    shape: Grid
    channels: int


class OpenCodec(Protocol):
    """What encoding a data set asks of a codec, whose weights are read. Grids are float32 [B, h, w, C]."""

    @property
    def name(self) -> str: ...

    @property
    def stores_images(self) -> bool:
        """Whether records hold the image."""
        ...

    @property
    def made_from(self) -> dict[str, Any]:
        """The options and weights that what is stored depends on, by their names in the config."""
        ...

    def latent_grid(self, image_shape: Grid) -> LatentGrid | None:
        """The grid of latents(), None if no features can be made of this codec. Raises ValueError if images of this
        shape cannot be encoded."""
        ...

    def statistics(self, image_shape: Grid) -> dict[str, Grid]:
        """The grids of encode() whose covariance over the data bases() needs."""
        ...

    def fields(self, image_shape: Grid) -> tuple[records.Field, ...]:
        """The grids of encode() that records hold."""
        ...

    def encode(self, images: np.ndarray, rows: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
        """uint8 images [B, H, W, C], which devices share by `rows`, -> the grids of statistics() and fields()."""
        ...

    def latents(self, encoded: Mapping[str, jax.Array]) -> jax.Array:
        """What encode() gave -> the grid that features of the codec are pooled from."""
        ...

    def bases(self, covariances: Mapping[str, Covariance]) -> dict[str, Basis]:
        """The codec's own bases, from the covariances of the grids of statistics()."""
        ...

    def projection(self, bases: Mapping[str, Basis]) -> tuple[np.ndarray, np.ndarray] | None:
        """(mean [C], vectors [C, K]) that bring the grid of latents() to the latents; None if it holds them."""
        ...

    def moments(self, field: str, stored: np.ndarray) -> Moments:
        """The moments of a batch of a field of fields(), as stored."""
        ...

    def summary(self, image_shape: Grid, moments: Mapping[str, Moments]) -> dict[str, Any]:
        """What latents.json says of the latents, given the moments of the whole data set."""
        ...


class Codec(VariableSource, Protocol):
    """The finest level's space as configured: a frozen dataclass whose annotated fields are the options."""

    def open(self) -> OpenCodec:
        """Reads the weights that encoding needs."""
        ...

    def fit(self, level: LevelSource, encoded: Encoded) -> DecodableSpace: ...

    def fit_without_data(self, level: LevelSource) -> DecodableSpace | None:
        """The space of a level where nothing has to be known of the data, else None."""
        ...

    def latent_scale(self, encoded: Encoded) -> float:
        """What brings the grid that features were made of to the scale of the latents."""
        ...

    def report(self, index: Mapping[str, Any]) -> str:
        """What the mode `encode` prints of a finished encoding (latents.json); '' for nothing."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageCodec:
    """The base of a codec that is computed from the stored image: it stores nothing else and has no weights.

    Subclasses give a name and fit(); those that encoding has to measure something for override more.
    """

    name = ""
    needs_encoding = False
    reads_images = True
    is_image = False
    stores_images = True

    def open(self) -> OpenCodec:
        return self

    def fit(self, level: LevelSource, encoded: Encoded) -> DecodableSpace:
        raise NotImplementedError

    def fit_without_data(self, level: LevelSource) -> DecodableSpace | None:
        return None if self.needs_encoding else self.fit(level, Encoded.of_images(finest_shape(level.shape)))

    def latent_scale(self, encoded: Encoded) -> float:
        return 1.0

    def report(self, index: Mapping[str, Any]) -> str:
        return ""

    @property
    def made_from(self) -> dict[str, Any]:
        return {}

    def latent_grid(self, image_shape: Grid) -> LatentGrid | None:
        return None

    def statistics(self, image_shape: Grid) -> dict[str, Grid]:
        return {}

    def fields(self, image_shape: Grid) -> tuple[records.Field, ...]:
        return ()

    def encode(self, images: np.ndarray, rows: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
        return {}

    def latents(self, encoded: Mapping[str, jax.Array]) -> jax.Array:
        raise ValueError(f"codec {self.name!r} has no latents")

    def bases(self, covariances: Mapping[str, Covariance]) -> dict[str, Basis]:
        return {}

    def projection(self, bases: Mapping[str, Basis]) -> tuple[np.ndarray, np.ndarray] | None:
        return None

    def moments(self, field: str, stored: np.ndarray) -> Moments:
        return Moments.of_batch(stored)

    def summary(self, image_shape: Grid, moments: Mapping[str, Moments]) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class PatchOptions(ImageCodec):
    """The base of codecs with one position for a square patch of the image."""

    patch: Annotated[int, "pixels per side of a position (Stable Diffusion's autoencoder: 8)"] = 2
    channels: Annotated[int, "channels of a position"] = 4
