"""Config -> data: image sources, the frozen encoder, latents, augmentation; the only reader of those parts.

Images that no encoder needs to see, where every level's variable is the image itself, are read as they are; all others
are encoded once, into the latents' directory.
"""

import json
import os

import jax
from absl import logging

from input_pipeline import augment, image_files, loader, sources, transforms
from input_pipeline import latents as records
from nested import encode, encoding
from nested import latents as latents_
from nested.build import choose, construct
from nested.encoders import efficientnet
from nested.files import atomic_write

ENCODERS = {"efficientnet_lite0": efficientnet.load}
PUBLISHED = ("mocov3_vitb16", "sd_vae")  # frozen networks of the papers, which come with the published weights


def digits(data):
    return sources.Digits()


def idx(data):
    return sources.Idx(data.path, data.split, num_classes=data.num_classes)


def image_folder(data):
    return image_files.ImageFolder(data.path, max_bad_images=data.max_bad_images, channels=data.channels or 3)


def tfds(data):
    return image_files.Tfds(data.path, data.split, channels=data.channels or 3)


SOURCES = {"digits": digits, "idx": idx, "image_folder": image_folder, "tfds": tfds}


def images(config):
    """The source of images that config.data describes, cropped and resized as it says."""
    data = config.data
    source = choose("data.source", data.source, SOURCES)(data)
    if source.num_classes != data.num_classes:
        raise ValueError(
            f"config.data.num_classes is {data.num_classes} but {source.describe()}; set it to {source.num_classes}"
        )
    if data.image_size:
        channels = data.channels or source.image_shape[2]
        source = transforms.Transformed(source, data.image_size, crop="center", channels=channels)
    elif data.channels not in (0, source.image_shape[2]):
        raise ValueError(
            f"config.data.channels is {data.channels} but {source.describe()}; set data.image_size as well to convert "
            "the images, or data.channels to 0"
        )
    return source


def encoder(config):
    """The frozen encoder of config.encoder."""
    options = config.encoder
    for part in (options.name, config.codec.name):
        if part in PUBLISHED:
            raise ValueError(
                f"config: {part!r} comes with the published weights, not part of this version; --mode=summary and "
                "training on synthetic latents (configs/imagenet_L3.py:synthetic) work, efficientnet_lite0 encodes"
            )
    load = choose("encoder.name", options.name, ENCODERS)
    return load(
        options.weights, input_size=options.input_size, map=options.map, vector="pool", features=tuple(options.features)
    )


def score_encoder(config):
    """The extractor of FD-EffLite0: the package's own weights, at config.evaluate.input_size."""
    return efficientnet.load("", input_size=config.evaluate.input_size, map="head", vector="pool", features=())


def latents_dir(config, workdir: str) -> str:
    return os.path.expanduser(config.latents_dir) or os.path.join(workdir, "latents")


def wanted(config) -> tuple[latents_.LevelSource, ...]:
    """Where every level's variable comes from."""
    return tuple(latents_.LevelSource(level.name, level.source, tuple(level.shape)) for level in config.levels)


class SyntheticVariables:
    """The place of Latents where the data are random latents: the records are the variables."""

    def __init__(self, names):
        self.names = names

    def variables(self, raw, key):
        del key
        return {name: raw[name] for name in self.names}

    def decode(self, z):
        raise ValueError("synthetic latents have no images: there is nothing to sample or to score")


def latents(config, workdir: str):
    """(records, Latents): encodes the data first where that has not been done."""
    check_augmentation(config)
    if config.data.source == "synthetic":
        shapes = tuple((level.name, tuple(level.shape)) for level in config.levels)
        source = sources.SyntheticLatents(shapes, config.data.num_examples, config.data.num_classes, config.seed)
        return source, SyntheticVariables([name for name, _ in shapes])
    if images_only(config):
        logging.info("the variables are the images themselves: nothing is encoded")
        source = images(config)
        return sources.Fields(source, ("label", "image")), latents_.of_images(wanted(config), source.image_shape)
    directory = encode_images(config, workdir)
    result = latents_.read(directory, wanted(config))
    report = result.report({level.name: float(level.sigma) for level in config.levels[:-1]})
    logging.info("levels, coarse to fine:\n%s", latents_.format_report(report))
    if jax.process_index() == 0:
        atomic_write(os.path.join(workdir, "levels.json"), json.dumps(report, indent=2) + "\n")
    return records.LatentRecords(directory, ("label", *result.fields)), result


def decoder(config, workdir: str):
    """The Latents for sampling, which needs no data where the variables are the images themselves."""
    if config.data.source != "synthetic" and images_only(config):
        return latents_.of_images(wanted(config), tuple(config.levels[-1].shape))
    return latents(config, workdir)[1]


def images_only(config) -> bool:
    """Whether every level's variable is the image itself."""
    return all(level.source == "pixels" for level in config.levels)


def check_augmentation(config) -> None:
    """Encoded features describe the image as it was: only levels made from the image alone can see it changed; and
    warps are of square images."""
    height, width, _ = config.levels[-1].shape
    if config.data.augment_prob and images_only(config) and height != width:
        raise ValueError(
            f"config.data.augment_prob {config.data.augment_prob}: the augmentation is of square images, "
            f"{config.levels[-1].name} is {height}x{width}; set it to 0 or data.image_size to a side"
        )
    others = [level.name for level in config.levels if level.source not in latents_.CODECS]
    if others and (config.data.augment_prob or config.data.flip):
        raise ValueError(
            f"config.data.augment_prob {config.data.augment_prob}, data.flip {config.data.flip}: the features of "
            f"{', '.join(others)} are those of unchanged images; set them to 0 and False"
        )


def augmentation(config):
    """The transform of training records, or None."""
    if not config.data.augment_prob and not config.data.flip:
        return None
    return construct("data", augment.Augmentation, dict(prob=config.data.augment_prob, flip=config.data.flip), {})


def encode_images(config, workdir: str) -> str:
    """Encodes config.data into the latents' directory, unless it is there; returns the directory."""
    directory = latents_dir(config, workdir)
    frozen = encoder(config)  # before the data: one that is not available is said before anyone fetches a data set
    encode.encode(
        images(config),
        frozen,
        construct("encoder", encoding.EncoderConfig, dict(config.encoder), dict(vector="pool")),
        construct("codec", encoding.CodecConfig, dict(config.codec), {}),
        directory,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return directory


def split(config, source):
    """(records to train on, this process's rows of the held-out batch or None)."""
    held_out = config.data.holdout
    if not held_out:
        return source, None
    if held_out >= len(source) or held_out % jax.process_count():
        raise ValueError(
            f"config.data.holdout {held_out} of {len(source)} records: keep it below that and a multiple of the "
            f"{jax.process_count()} process(es)"
        )
    training = sources.Part(source, 0, len(source) - held_out)
    rows = held_out // jax.process_count()
    first = len(source) - held_out + rows * jax.process_index()
    return training, loader.collate([source[i] for i in range(first, first + rows)])
