"""Config -> data: the frozen encoder, latents, text, augmentation; the only reader of those parts beside
build_sources.py, where images come from.

Images that no encoder needs to see, where every level's variable is the image itself, are read as they are; all others
are encoded once, into the latents' directory.
"""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from input_pipeline import augment, captions, loader
from input_pipeline import latent_records as records
from input_pipeline.composition import Subset, select_fields
from input_pipeline.sources import ImageSource
from nested.build.levels import as_shape
from nested.build.options import check_unread, choose, construct, declared, declared_by_all
from nested.build.parts import SPACES
from nested.build.process import is_joint
from nested.build.sources import build_source, images, shard_window, source_kind
from nested.build.text import load_text_encoder
from nested.encoders import efficientnet, grids, vit
from nested.encoders.text_encoder import TextEncoder
from nested.latents import captions as text_store
from nested.latents import cost as encode_cost
from nested.latents import passes
from nested.latents.job import EncodingOptions, Job, plan_job
from nested.latents.store import Latents, format_report, latents_of_images, read_latents
from nested.runtime import partition
from nested.runtime.files import atomic_write
from nested.spaces.features import Feature
from nested.spaces.space import Codec, LevelSource, VariableSource
from nested.spaces.synthetic import Synthetic, SyntheticSpace

ENCODERS = {efficientnet.NAME: efficientnet.load_efficientnet}
ENCODERS |= {name: functools.partial(vit.load_vit, name) for name in vit.VARIANTS}
ENCODER_OPTIONS = ("name", "weights", "input_size", "map", "vector", "prefix", "dtype")


def encoder(config):
    """The frozen encoder of config.encoder, on every device, for those features that are not made of the codec's
    latents; None where there are none."""
    options = config.encoder
    load = choose("encoder.name", options.name, ENCODERS)
    features = tuple(name for name in options.features if not grids.of_codec(name))
    if not features:
        return None
    found = load(
        options.weights,
        input_size=options.input_size,
        map=options.map,
        vector=options.vector,
        features=features,
        prefix=options.prefix,
        dtype=options.dtype,
    )
    return dataclasses.replace(found, params=jax.device_put(found.params, partition.local_devices()))


def codec(config) -> Codec:
    """The finest level's space as configured."""
    kind = choose("codec.name", config.codec.name, SPACES)
    check_unread("codec", config.codec, config.codec.name, SPACES)
    unread = {"name", *declared_by_all(SPACES.values())} - set(declared(kind))
    return construct("codec", kind, {key: value for key, value in config.codec.items() if key not in unread}, {})


def score_encoder(config):
    """The extractor of FD-EffLite0: the package's own weights, at config.evaluate.input_size."""
    return efficientnet.load_efficientnet(
        "", input_size=config.evaluate.input_size, map="head", vector="pool", features=()
    )


def latents_dir(config, workdir: str) -> str:
    return os.path.expanduser(config.latents_dir) or os.path.join(workdir, "latents")


def level_sources(config) -> tuple[LevelSource, ...]:
    """Where every level's variable comes from."""
    own = codec(config)

    def source_of(name: str) -> VariableSource:
        if source_kind(config).synthetic:
            return Synthetic()
        if name == own.name:
            return own
        return SPACES[name]() if name in SPACES else Feature(name, own)

    downsampling = config.data.downsampling
    return tuple(
        LevelSource(level.name, source_of(level.source), as_shape(level.shape), downsampling, level.standardize)
        for level in config.levels
    )


def latents(config, workdir: str, text: TextEncoder | None = None):
    """(records, Latents): encodes the data first where that has not been done. text: the run's encoder of captions,
    where the config has one."""
    codec(config)  # its options are checked also where it has nothing to do
    shard_window(config)
    check_augmentation(config)
    if source_kind(config).synthetic:
        made = latents_of_images(level_sources(config), (None,))
        leaves = tuple(leaf for space in made.spaces if isinstance(space, SyntheticSpace) for leaf in space.leaves)
        tokens = (config.text.max_tokens, config.text.width) if config.text.encoder else ()
        return build_source(config, leaves, tokens).open(), made
    if images_only(config):
        logging.info("the variables are the images themselves: nothing is encoded")
        source = images(config)
        made = latents_of_images(level_sources(config), source.image_shape)
        check_once(config, source, workdir)
        if not config.text.encoder:
            return select_fields(source, ("label", "image")), made
        return with_text(config, source, ("label", "image"), text, workdir), made
    if config.text.encoder and config.data.max_bad_images:
        raise ValueError(
            f"config.data.max_bad_images {config.data.max_bad_images} with captions and encoded levels: the image that "
            "takes a bad one's place would keep the bad one's caption; set it to 0 and remove the files that it names"
        )
    if config.text.encoder:  # before all images are encoded: what is missing is said now
        text, of_images = text or load_text_encoder(config), captions.captions(images(config))
    result, directory = encoded(config, workdir)
    mirrored = [name + records.MIRRORED for name in result.fields if name != "image" and config.data.flip]
    fields = ("label", *result.fields, *mirrored)
    source = records.LatentRecords(directory, fields)
    if not config.text.encoder:
        return source, result
    captioned = captions.with_captions(source, of_images)
    return with_text(config, captioned, fields, text, workdir), result


def encoded(config, workdir: str):
    """(Latents, directory) of levels that are encoded, which is done first where it has not been."""
    directory = encode_images(config, workdir)
    result = read_latents(directory, level_sources(config))
    report = result.report({level.name: float(level.sigma) for level in config.levels[:-1]})
    logging.info("levels, coarse to fine:\n%s", format_report(report))
    if jax.process_index() == 0:
        atomic_write(os.path.join(workdir, "levels.json"), json.dumps(report, indent=2) + "\n")
    return result, directory


def check_once(config, source, workdir: str) -> None:
    """Reads every record of a run's images before its first step, where config.data.check says so: a folder's files
    that cannot serve are then all named at once, not one by one while it trains."""
    done = os.path.join(workdir, f"checked-{source.fingerprint}.txt")
    if config.data.check and jax.process_index() == 0 and not os.path.exists(done):
        source.check()
        atomic_write(done, source.describe() + "\n")


def decoder(config, workdir: str):
    """The Latents for sampling, which needs no data where the variables are the images themselves, or where an
    autoencoder decodes and config.codec.scale is given."""
    if source_kind(config).synthetic:
        return latents(config, workdir)[1]
    levels = level_sources(config)
    finest = codec(config).fit_without_data(levels[-1]) if levels[-1].source == codec(config) else None
    if finest is not None:
        return Latents(levels[-1:], (finest,), "no data")
    return encoded(config, workdir)[0]


def pictures(config, source):
    """The images that the records were made from, by the same numbers; the records where they hold them."""
    return source if "image" in source[0] else images(config)


def finest_shape(config) -> tuple[int, ...]:
    """The shape of what is decoded: of the finest level's finest resolution."""
    shape = as_shape(config.levels[-1].shape)
    return shape[-1] if is_joint(shape) else shape


def with_text(config, source, fields: tuple[str, ...], text: TextEncoder | None, workdir: str):
    """Those fields of the source and its text: features made once and stored below the latents' directory, or tokens to
    encode later. text: the run's encoder, loaded here where it is None."""
    encoder = text or load_text_encoder(config)
    # Before the first step: captions that are missing are counted and named.
    texts = captions.every_text(captions.captions(source))
    if config.text.stored:
        directory = os.path.join(latents_dir(config, workdir), "text")
        if jax.process_index() == 0:
            text_store.store(encoder, texts, directory, config.text.batch_size)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("text features stored")
        stored = captions.with_stored_text(source, directory, encoder.fingerprint)
        return select_fields(stored, (*fields, "text", "text_mask"))
    tokens = captions.tokenized(source, encoder.tokenize)
    return select_fields(tokens, (*fields, "text_ids", "text_mask"))


def some_captions(config, number: int) -> tuple[str, ...]:
    """The captions, of several of one image the first, of `number` images evenly spaced through the data, or of all."""
    found = captions.captions(images(config))
    chosen = np.linspace(0, len(found), min(len(found), max(number, 1)), endpoint=False)
    return tuple(captions.texts_of(found[int(i)])[0] for i in chosen)


def scored_config(config):
    """The config with config.evaluate.split, where it has one, for data.split."""
    other = config.copy_and_resolve_references()
    other.data.split = config.evaluate.split or config.data.split
    return other


def scored_against(config, source):
    """(config, source) of the images that samples are scored against: the run's, or those of config.evaluate.split."""
    if not config.evaluate.split:
        return config, source
    other = scored_config(config)
    try:
        return other, images(other)
    except (ValueError, OSError) as error:
        raise ValueError(f"config.evaluate.split {config.evaluate.split!r}: {error}") from error


def images_only(config) -> bool:
    """Whether nothing has to be encoded: every level's variable is computed from the image alone."""
    return not any(level.source.needs_encoding for level in level_sources(config))


def check_augmentation(config) -> None:
    """Encoded features describe the image as it was, or mirrored: only levels made from the image alone can see it
    warped; and warps are of square images."""
    height, width = finest_shape(config)[-3:-1]
    if config.data.augment_prob and images_only(config) and height != width:
        raise ValueError(
            f"config.data.augment_prob {config.data.augment_prob}: the augmentation is of square images, "
            f"{config.levels[-1].name} is {height}x{width}; set it to 0 or data.image_size to a side"
        )
    others = [level.name for level in level_sources(config) if not level.source.reads_images]
    if others and config.data.augment_prob:
        raise ValueError(
            f"config.data.augment_prob {config.data.augment_prob}: what is encoded for {', '.join(others)} is of "
            "unchanged images; set it to 0 (data.flip mirrors: both flips are encoded)"
        )


def augmentation(config):
    """The transform of training records, or None."""
    if not config.data.augment_prob and not config.data.flip:
        return None
    return construct("data", augment.Augmentation, dict(prob=config.data.augment_prob, flip=config.data.flip), {})


def encode_images(config, workdir: str) -> str:
    """Encodes config.data into the latents' directory, unless it is there; returns the directory."""
    directory = latents_dir(config, workdir)
    passes.encode(encoding_job(config, directory))
    return directory


def encoding_job(config, directory: str, source: ImageSource | None = None) -> Job:
    """What encoding images into a directory takes. source: of the images; config.data's where it is None."""
    frozen = encoder(config)  # before the data: one that is not available is said before anyone fetches a data set
    opened = codec(config).open()
    options = {key: value for key, value in config.encoder.items() if key not in ENCODER_OPTIONS}
    return plan_job(
        images(config) if source is None else source,
        frozen,
        construct("encoder", EncodingOptions, options, {}),
        opened,
        directory,
        flip=config.data.flip,
        check=config.data.check,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def plan_encoding(config, workdir: str, out: str) -> None:
    """The mode `encode` with --plan: what it would cost, printed; as JSON to `out`, where it is not ''."""
    if images_only(config) or source_kind(config).synthetic:
        raise ValueError("--plan: this config encodes nothing, its variables are the images themselves or random")
    encode_cost.report_cost(encoding_job(config, latents_dir(config, workdir)), out)
    if config.text.encoder and config.text.stored and jax.process_index() == 0:
        number = len(set(captions.every_text(captions.captions(images(config)))))
        size = 2 * number * config.text.max_tokens * config.text.width
        print(
            f"text:    {number:,} captions, at most {encode_cost.format_bytes(size)} of features beside (text.stored)"
        )


def encode_data(config, workdir: str) -> None:
    """The mode `encode`: as latents(); prints the scale that an autoencoder's latents turned out to need."""
    latents(config, workdir)
    if source_kind(config).synthetic or images_only(config) or jax.process_index():
        return
    if said := codec(config).report(records.read_index(latents_dir(config, workdir))):
        print(said)


def held_out(config, number: int) -> np.ndarray:
    """Which of `number` records are not trained on: config.data.holdout of them, evenly spaced, as folders are sorted
    by class."""
    wanted = config.data.holdout
    if wanted >= number or wanted % jax.process_count():
        raise ValueError(
            f"config.data.holdout {wanted} of {number} records: keep it below that and a multiple of the "
            f"{jax.process_count()} process(es)"
        )
    return (2 * np.arange(wanted) + 1) * number // (2 * max(wanted, 1))


def split(config, source):
    """(records to train on, this process's rows of the held-out batch or None)."""
    chosen = held_out(config, len(source))
    if not len(chosen):
        return source, None
    training = Subset(source, np.setdiff1d(np.arange(len(source)), chosen))
    rows = np.split(chosen, jax.process_count())[jax.process_index()]
    return training, loader.collate([records.unflipped(source[int(i)]) for i in rows])
