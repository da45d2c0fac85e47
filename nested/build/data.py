"""Config -> the data of a run: where images come from, every level's space, the encoders, the text.

Nothing here reads a file or touches a device: the objects do when they are opened (Data.open_...), and encoding is the
business of nested/modes/encode.py.
"""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from input_pipeline import captions
from input_pipeline.augment import Augmentation
from input_pipeline.options import DataOptions, ImageData, SourceOptions
from input_pipeline.sources import ImageSource
from nested.build.levels import as_shape
from nested.build.options import Config, check_unread, choose, construct, declared, declared_by_all
from nested.build.parts import ENCODERS, SPACES
from nested.build.sources import build_data_options, build_images, build_source, source_kind
from nested.build.text import Text, build_text
from nested.encoders import grids
from nested.encoders.encoder import Encoder, EncoderOptions
from nested.encoders.text_encoder import TextEncoder
from nested.latents.job import EncodingOptions
from nested.latents.store import Latents, latents_of_images, read_latents
from nested.spaces.features import Feature
from nested.spaces.space import Codec, LevelSource, VariableSource, finest_shape
from nested.spaces.synthetic import Synthetic, random_fields


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run, before anything is opened.

    levels: coarse to fine. sigmas: {level: sigma} of the levels that condition finer ones. latents_option: where
    encoded data are kept, '' for a folder of the workdir. augmentation: of training records, None for none.
    """

    source: ImageData | SourceOptions
    options: DataOptions
    codec: Codec
    encoder: EncoderOptions
    encoding: EncodingOptions
    levels: tuple[LevelSource, ...]
    sigmas: Mapping[str, float]
    text: Text | None
    latents_option: str
    augmentation: Augmentation | None

    @property
    def synthetic(self) -> bool:
        """Whether records are random variables, without images."""
        return not isinstance(self.source, ImageData)

    @property
    def needs_encoding(self) -> bool:
        """Whether data have to be encoded: some level's variable is not computed from the image alone."""
        return any(level.source.needs_encoding for level in self.levels)

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape of what is decoded: of the finest level's finest resolution."""
        return finest_shape(self.levels[-1].shape)

    @property
    def has_clips(self) -> bool:
        """Whether what is decoded has a time axis."""
        return len(self.decoded_shape) > 3

    def latents_dir(self, workdir: str) -> str:
        """Where encoded data, and what else is computed once, are kept."""
        return os.path.expanduser(self.latents_option) or os.path.join(workdir, "latents")

    def open_images(self) -> ImageSource:
        """The images. Raises ValueError for random data; as the source."""
        if not isinstance(self.source, ImageData):
            raise ValueError("synthetic data have no images: choose another config.data.source")
        return self.source.open()

    def open_encoder(self) -> Encoder | None:
        """The frozen encoder, on every device; None if all features are made of the codec's latents."""
        features = tuple(name for name in self.encoding.features if not grids.is_codec_feature(name))
        return self.encoder.open(features) if features else None

    def open_text_encoder(self) -> TextEncoder | None:
        """The text encoder; None if no level sees text, and for random data."""
        return None if self.text is None or self.synthetic else self.text.open()

    def open_decoder(self, workdir: str) -> Latents:
        """The finest level's space, to sample with; nothing is encoded for it.

        Raises FileNotFoundError / ValueError, in one line, if it has to be fitted to data that are not encoded.
        """
        finest = self.levels[-1]
        if self.synthetic:
            return latents_of_images((finest,), ())
        space = self.codec.fit_without_data(finest) if finest.source == self.codec else None
        if space is not None:
            return Latents((finest,), (space,), "no data")
        return read_latents(self.latents_dir(workdir), (finest,))

    def some_captions(self, number: int) -> tuple[str, ...]:
        """The captions of `number` images evenly spaced through the data, or of all; of several of an image the
        first."""
        found = captions.captions(self.open_images())
        chosen = np.linspace(0, len(found), min(len(found), max(number, 1)), endpoint=False)
        return tuple(captions.texts_of(found[int(i)])[0] for i in chosen)


def build_data(config: Config) -> Data:
    """The data of a config.

    Raises ValueError, in one line that names the option, for what does not exist, does not apply or does not fit.
    """
    options, codec, text = build_data_options(config), build_codec(config), build_text(config)
    levels = tuple(
        LevelSource(
            level.name, build_variable_source(config, level.source, codec), as_shape(level.shape), options.downsampling,
            level.standardize,
        )
        for level in config.levels
    )  # fmt: skip
    if text and config.data.max_bad_images and any(level.source.needs_encoding for level in levels):
        raise ValueError(
            f"config.data.max_bad_images {config.data.max_bad_images} with captions and encoded levels: the image that "
            "takes a bad one's place would keep the bad one's caption; set it to 0 and remove the files that it names"
        )
    if source_kind(config).synthetic:
        tokens = (text.options.max_tokens, text.options.width) if text else ()
        source = build_source(config, tuple(field for level in levels for field in random_fields(level)), tokens)
    else:
        source = build_images(config)
    data = Data(
        source=source,
        options=options,
        codec=codec,
        encoder=build_encoder(config),
        encoding=build_encoding(config),
        levels=levels,
        sigmas={level.name: float(level.sigma) for level in config.levels[:-1]},
        text=text,
        latents_option=config.latents_dir,
        augmentation=build_augmentation(options),
    )
    _check_augmentation(data)
    return data


def build_codec(config: Config) -> Codec:
    """The finest level's space as configured."""
    kind = choose("codec.name", config.codec.name, SPACES)
    check_unread("codec", config.codec, config.codec.name, SPACES)
    unread = {"name", *declared_by_all(SPACES.values())} - set(declared(kind))
    return construct("codec", kind, {key: value for key, value in config.codec.items() if key not in unread}, {})


def build_variable_source(config: Config, name: str, codec: Codec) -> VariableSource:
    """What config.levels[i].source names: the codec of the config, another codec with its defaults, or a feature."""
    if source_kind(config).synthetic:
        return Synthetic()
    if name == codec.name:
        return codec
    return SPACES[name]() if name in SPACES else Feature(name, codec)


def build_encoder(config: Config) -> EncoderOptions:
    """The frozen encoder of images, before its weights are read."""
    name = config.encoder.name
    kind = choose("encoder.name", name, ENCODERS)
    check_unread("encoder", config.encoder, name, ENCODERS)
    return construct("encoder", kind, {key: config.encoder[key] for key in declared(kind)}, {"name": name})


def build_encoding(config: Config) -> EncodingOptions:
    """What is stored of the features, and how encoding runs."""
    of_encoders = {"name", *declared_by_all(ENCODERS.values())}
    options = {key: value for key, value in config.encoder.items() if key not in of_encoders}
    return construct("encoder", EncodingOptions, options, {})


def build_augmentation(options: DataOptions) -> Augmentation | None:
    """The transform of training records, or None."""
    if not options.augment_prob and not options.flip:
        return None
    return construct("data", Augmentation, {"prob": options.augment_prob, "flip": options.flip}, {})


def _check_augmentation(data: Data) -> None:
    """Encoded features describe the image as it was, or mirrored: only levels made from the image alone can see it
    warped; and warps are of square images."""
    probability = data.options.augment_prob
    height, width = data.decoded_shape[-3:-1]
    if probability and not data.needs_encoding and height != width:
        raise ValueError(
            f"config.data.augment_prob {probability}: the augmentation is of square images, {data.levels[-1].name} is "
            f"{height}x{width}; set it to 0 or data.image_size to a side"
        )
    others = [level.name for level in data.levels if not level.source.reads_images]
    if others and probability:
        raise ValueError(
            f"config.data.augment_prob {probability}: what is encoded for {', '.join(others)} is of unchanged images; "
            "set it to 0 (data.flip mirrors: both flips are encoded)"
        )
