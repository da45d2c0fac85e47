"""Config -> where the data come from. Nothing is read before the open() of what is built here."""

import dataclasses

from input_pipeline.options import DataOptions, ImageData, ImageSourceOptions, SourceOptions
from nested.build.options import Config, check_unread, choose, construct, declared
from nested.build.parts import SOURCES


def build_source(
    config: Config, levels: tuple[tuple[str, tuple[int, ...]], ...] = (), text: tuple[int, ...] = ()
) -> SourceOptions:
    """The source that config.data names, with its options.

    Args:
      levels: (name, shape) of each variable, which random latents need.
      text: (tokens, width) of the features of a text, or (), which random latents need.

    Raises: ValueError (one line) for an unknown source, an option that it does not read, and a value that it refuses.
    """
    data = config.data
    kind = source_kind(config)
    check_unread("data", data, data.source, SOURCES)
    decided = {
        "channels": data.channels or 3,
        "num_classes": data.num_classes,
        "window": data.shuffle_buffer,
        "levels": levels,
        "seed": config.seed,
        "text": text,
    }
    names = {field.name for field in dataclasses.fields(kind)}
    options = {name: data[name] for name in declared(kind)}
    return construct("data", kind, options, {name: value for name, value in decided.items() if name in names})


def source_kind(config: Config) -> type[SourceOptions]:
    """The class of the source that config.data names, which tells whether it has clips or random latents."""
    return choose("data.source", config.data.source, SOURCES)


def build_data_options(config: Config) -> DataOptions:
    """The options of config.data that apply to any source. Raises: ValueError (one line) for values not allowed."""
    return construct("data", DataOptions, {name: config.data[name] for name in declared(DataOptions)}, {})


def build_images(config: Config) -> ImageData:
    """The images of config.data, cropped and resized.

    Raises: as build_source and build_data_options; ValueError for a source without images.
    """
    options, source = build_data_options(config), build_source(config)
    if not isinstance(source, ImageSourceOptions):
        raise ValueError(f"config.data.source {config.data.source!r} has no images: choose a source of images")
    return ImageData(source, options)


def shard_window(config: Config) -> int:
    """The argument shard_window of the loader; 0 if config.data.shuffle is 'global'."""
    return build_data_options(config).shuffle_buffer
