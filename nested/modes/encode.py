"""The mode `encode`, and the only place where data are encoded: the mode `train` calls open_latents() by name.

Images are read as they are if every level's variable is computed from them alone; all other data are encoded once, into
the latents' directory. Sampling never encodes (Data.open_decoder).
"""

import json
import os

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from input_pipeline import captions, loader
from input_pipeline import latent_records as records
from input_pipeline.composition import Subset, select_fields
from input_pipeline.options import ImageData
from input_pipeline.sources import ImageSource, Source
from nested.build.data import Data, build_data
from nested.build.options import Config
from nested.encoders.text_encoder import TextEncoder
from nested.latents import captions as text_store
from nested.latents import cost, passes
from nested.latents.job import Job, plan_job
from nested.latents.store import Latents, format_report, latents_of_images, read_latents
from nested.runtime.files import atomic_write


def run(config: Config, workdir: str) -> None:
    """The mode: encodes the data, and prints what the codec has measured."""
    data = build_data(config)
    open_latents(data, workdir)
    if data.synthetic or not data.needs_encoding or jax.process_index():
        return
    if said := data.codec.report(records.read_index(data.latents_dir(workdir))):
        print(said)


def plan_encoding(config: Config, workdir: str, out: str) -> None:
    """The mode with --plan: prints what encoding costs, and writes it as JSON to `out` unless that is ''."""
    data = build_data(config)
    if data.synthetic or not data.needs_encoding:
        raise ValueError("--plan: this config encodes nothing, its variables are the images themselves or random")
    cost.report_cost(encoding_job(data, data.latents_dir(workdir)), out)
    if data.text and data.text.options.stored and jax.process_index() == 0:
        number = len(set(captions.every_text(captions.captions(data.open_images()))))
        size = cost.format_bytes(2 * number * data.text.options.max_tokens * data.text.options.width)
        print(f"text:    {number:,} captions, at most {size} of features beside (text.stored)")


def open_latents(data: Data, workdir: str, text: TextEncoder | None = None) -> tuple[Source, Latents]:
    """The records of a run and its levels' spaces; encodes the data first if that has not been done.

    text: the run's text encoder, opened here if it is None and the data have text.
    """
    if not isinstance(data.source, ImageData):
        return data.source.open(), latents_of_images(data.levels, ())
    if not data.needs_encoding:
        logging.info("the variables are the images themselves: nothing is encoded")
        source = data.open_images()
        latents = latents_of_images(data.levels, source.image_shape)
        check_images_once(data, source, workdir)
        fields = ("label", "image")
        return (with_text(data, source, fields, text, workdir) if data.text else select_fields(source, fields)), latents
    of_images = None
    if data.text:  # before the images are encoded, so that missing captions are reported now
        text, of_images = text or data.open_text_encoder(), captions.captions(data.open_images())
    directory = encode_images(data, workdir)
    latents = read_latents(directory, data.levels)
    report_levels(data, latents, workdir)
    mirrored = [name + records.MIRRORED for name in latents.fields if name != "image" and data.options.flip]
    fields = ("label", *latents.fields, *mirrored)
    source = records.LatentRecords(directory, fields)
    if of_images is None:
        return source, latents
    return with_text(data, captions.with_captions(source, of_images), fields, text, workdir), latents


def encode_images(data: Data, workdir: str) -> str:
    """Encodes the data into the latents' directory, unless they are there; returns the directory."""
    directory = data.latents_dir(workdir)
    passes.encode(encoding_job(data, directory))
    return directory


def encoding_job(data: Data, directory: str, source: ImageSource | None = None) -> Job:
    """The job of encoding images into a directory. source: of the images, those of the data if it is None."""
    # Before the data, so that missing weights are reported before anyone fetches a data set.
    encoder = data.open_encoder()
    codec = data.codec.open()
    return plan_job(
        data.open_images() if source is None else source,
        encoder,
        data.encoding,
        codec,
        directory,
        flip=data.options.flip,
        check=data.options.check,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def report_levels(data: Data, latents: Latents, workdir: str) -> None:
    """Logs what the levels' variables keep of the data and what passes at their sigmas, and writes levels.json."""
    report = latents.report(data.sigmas)
    logging.info("levels, coarse to fine:\n%s", format_report(report))
    if jax.process_index() == 0:
        atomic_write(os.path.join(workdir, "levels.json"), json.dumps(report, indent=2) + "\n")


def check_images_once(data: Data, source: ImageSource, workdir: str) -> None:
    """Reads every record of a run's images before its first step, if config.data.check says so: all files of a folder
    that cannot serve are then named at once, not one by one during training."""
    done = os.path.join(workdir, f"checked-{source.fingerprint}.txt")
    if data.options.check and jax.process_index() == 0 and not os.path.exists(done):
        source.check()
        atomic_write(done, source.describe() + "\n")


def with_text(data: Data, source: Source, fields: tuple[str, ...], text: TextEncoder | None, workdir: str) -> Source:
    """Those fields of the source and its text: features made once and stored below the latents' directory, or tokens
    that are encoded in every step. text: the run's encoder, opened here if it is None."""
    if data.text is None:
        raise ValueError("config.text.encoder is '': there is no text to add to records")
    encoder = text or data.text.open()
    # Before the first step: captions that are missing are counted and named.
    texts = captions.every_text(captions.captions(source))
    if data.text.options.stored:
        directory = os.path.join(data.latents_dir(workdir), "text")
        if jax.process_index() == 0:
            text_store.store_captions(encoder, texts, directory, data.text.options.batch_size)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("text features stored")
        stored = captions.with_stored_text(source, directory, encoder.fingerprint)
        return select_fields(stored, (*fields, "text", "text_mask"))
    tokens = captions.tokenized(source, encoder.tokenize)
    return select_fields(tokens, (*fields, "text_ids", "text_mask"))


def image_source(data: Data, source: Source) -> Source:
    """The images that the records were made from, by the same numbers; the records if they hold them."""
    return source if "image" in source[0] else data.open_images()


def held_out_records(holdout: int, number: int) -> np.ndarray:
    """Which of `number` records are held out of training: `holdout` of them, evenly spaced, as folders are sorted by
    class."""
    if holdout >= number or holdout % jax.process_count():
        raise ValueError(
            f"config.data.holdout {holdout} of {number} records: keep it below that and a multiple of the "
            f"{jax.process_count()} process(es)"
        )
    return (2 * np.arange(holdout) + 1) * number // (2 * max(holdout, 1))


def split_records(data: Data, source: Source) -> tuple[Source, dict[str, np.ndarray] | None]:
    """(records to train on, this process's rows of the held-out batch or None)."""
    chosen = held_out_records(data.options.holdout, len(source))
    if not len(chosen):
        return source, None
    training = Subset(source, np.setdiff1d(np.arange(len(source)), chosen))
    rows = np.split(chosen, jax.process_count())[jax.process_index()]
    return training, loader.collate([records.unflipped(source[int(i)]) for i in rows])
