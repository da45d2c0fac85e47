"""Encoding a data set once: raw features after the SVD, the images or their latents, and every statistic, on disk.

Two passes (raw 14x14x768 features of ImageNet would be 385 GB):
    1  covariance of every feature             statistics/covariance-00003-of-00012.npz, one per shard
       merged in the shards' order -> SVD      statistics/bases.npz
    2  leading components, float16             latents-00003-of-00012.array_record
       second moments between positions        statistics/moments-00003-of-00012.npz
       merged                                  statistics.npz, latents.json

Pass 2 takes the raw features of pass 1 from memory if they fit (FEATURE_CACHE_BYTES). If they do not, the images that
the basis is fitted to go through the encoder twice; with encoder.fit_images at a few per cent of a large data set,
encoding runs at about the encoder's own rate. The device works on a batch while the host reads the next one and packs
and writes the one before.

The codec decides what it stores, beside the image or in its place (OpenCodec in nested/spaces/space.py). With flips
everything is stored for the mirrored image as well, in separate fields ('map.mirrored'), as U-ViT stores both; the
statistics then cover both, while the SVD basis is fitted to the images as they are.

Shards are the unit of work: shard i belongs to process i % process_count; a finished file is kept, a half-written one
never has its final name (input_pipeline/latent_records.py, nested/runtime/files.py); what a shard holds depends on
the shard alone. So a killed run resumes, and any number of processes writes the same bytes (of equally many devices
each, which share a batch: sums over more of them are rounded otherwise). encoding.json, written first, says what the
files are made from; a run that differs in anything is refused. statistics/ serves resuming only.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from input_pipeline import latent_records as records
from nested.encoders import grids
from nested.latents import job as jobs
from nested.latents.job import Job
from nested.runtime import partition
from nested.runtime.files import atomic_write, check_writable
from nested.runtime.writers import Progress
from nested.spaces.space import IMAGE, Grid
from nested.spaces.svd import (
    Basis,
    Covariance,
    CovarianceStream,
    Moments,
    fit_basis,
    identity_basis,
    information_bits,
    project,
)

FEATURE_CACHE_BYTES = 1 << 29  # raw features of pass 1 kept for pass 2, so that small data are encoded once
READ_THREADS, READ_AHEAD = 8, 2  # batches are read while the ones before them are encoded
BITS_AT = (0.5, 1.0)

Features = dict[str, Any]  # {name: [B, h, w, C]}, on the device or on the host
Cache = dict[int, list[Features]]  # {shard: raw features of each of its batches}
Batch = tuple[int, np.ndarray, np.ndarray]  # index of the first image, images, labels
Item = TypeVar("Item")
Begun = TypeVar("Begun")


def encode(job: Job) -> dict[str, Any]:
    """Encodes a data set into a directory; safe to repeat, as finished work is kept and a complete directory returns at
    once.

    Returns the content of latents.json (see _finish). Raises, each in one line: ValueError (images of unequal shape; a
    label outside [0, num_classes); NaN or infinity in a feature; a directory made from something else), OSError (not
    writable), TimeoutError.
    """
    check_writable(job.directory)
    jobs.claim_directory(job)
    if jobs.is_complete(job):
        return json.loads(job.index_path.read_text())
    if job.check and job.process_index == 0 and not job.checked_path.exists():
        job.source.check()  # a folder's unreadable files are all found, named and counted before the work begins
        atomic_write(job.checked_path, job.source.describe() + "\n")
    cache, began, seen = {}, time.monotonic(), 0
    if not job.bases_path.exists():
        seen = _covariances(job, cache)
        if job.process_index == 0:
            _fit_bases(job)
        jobs.wait_for(job, [job.bases_path], "the SVD bases (process 0)")
    written, again = _project(job, jobs.load_parts(job.bases_path, Basis), cache)
    _report_rate(written, seen + again if job.encoder_features else 0, job.flip, time.monotonic() - began)
    if job.process_index == 0:
        jobs.wait_for(job, [job.sidecar("moments", i) for i in range(job.num_shards)], "every shard")
        _finish(job)
    jobs.wait_for(job, [job.index_path], "latents.json (process 0)")
    return json.loads(job.index_path.read_text())


def _report_rate(written: int, seen: int, flip: bool, seconds: float) -> None:
    """Logs what this process has done, and what it could have saved. seen: images that went through the encoder, not
    counting mirror images."""
    if written:
        hint = "; a smaller encoder.fit_images saves time" if seen > 1.4 * written else ""
        times = f"each went through the encoder {seen / written:.2f} times{', and once mirrored' * flip}{hint}"
        logging.info("encoded %s images, %.1f images/s: %s", f"{written:,}", written / seconds, times)


# --- pass 1 ------------------------------------------------------------------------------------------------------


def _raw_bytes(job: Job) -> int:
    """The size of an image's raw features."""
    return 4 * sum(math.prod(shape) for shape in job.raw.values())


def images_seen_twice(job: Job) -> int:
    """How many images a fresh run sends through the networks in both passes, as their raw features are not kept."""
    sizes = {shard: job.span(shard)[1] - job.span(shard)[0] for shard in job.fit_shards}
    if not job.grids or _raw_bytes(job) * sum(sizes.values()) <= FEATURE_CACHE_BYTES * job.process_count:
        return 0
    return sum(job.fit_shards.values())


def _covariances(job: Job, cache: Cache) -> int:
    """The sums of this process's shards of the fit; returns how many images the encoder saw. Raw features stay in
    `cache` {shard: [features of a batch]} while they fit."""
    shards = [i for i in job.own_shards if i in job.fit_shards and not job.sidecar("covariance", i).exists()]
    bytes_per_image = _raw_bytes(job)
    room, spans = FEATURE_CACHE_BYTES, {}
    for shard in shards:
        start, stop = job.span(shard)
        stop = stop if job.grids else start  # no feature, no statistics: nothing is read
        room -= bytes_per_image * (stop - start)
        spans[shard] = (start, stop if room >= 0 else min(stop, start + job.fit_shards[shard]))
        if room >= 0:
            cache[shard] = []
    total = sum(stop - start for start, stop in spans.values())
    done, progress = 0, Progress("images, statistics", total)
    for shard, (start, stop) in spans.items():
        fit_stop = start + job.fit_shards[shard]
        streams = {name: CovarianceStream(job.per_position(name)) for name in job.grids}

        def begin(batch: Batch, fit_stop: int = fit_stop, streams: dict[str, CovarianceStream] = streams):
            first, images, labels = batch
            features = _raw_features(job, images)
            fitted = min(len(labels), fit_stop - first)
            finite = {name: stream.add(features[name], fitted) for name, stream in streams.items() if fitted > 0}
            return features, finite

        for (first, _, labels), (features, finite) in _one_ahead(batches(job, start, stop), begin):
            for name, images_finite in finite.items():
                _refuse(~np.asarray(images_finite), first, f"NaN or infinity in feature {name!r}")
            if shard in cache:
                cache[shard].append({name: np.asarray(features[name]) for name in job.raw})
            done += len(labels)
            progress.update(done)
        jobs.save_parts(job.sidecar("covariance", shard), {name: stream.result() for name, stream in streams.items()})
    return total


def _fit_bases(job: Job) -> None:
    """Process 0: merges the shards' covariances in order, and writes the bases."""
    paths = [job.sidecar("covariance", i) for i in job.fit_shards]
    jobs.wait_for(job, paths, "the statistics of all shards")
    totals = jobs.merge_parts(paths, Covariance)
    bases = job.codec.bases(totals)
    projection = job.codec.projection(bases) if job.codec_features else None
    for name in job.stored:
        if name in job.codec_features and projection is not None:
            basis = _fit_basis(job, name, totals[name].through(*projection))
            bases[name] = basis.after(*projection)
        else:
            bases[name] = _fit_basis(job, name, totals[name])
    for name, basis in bases.items():
        share = 100 * basis.explained_variance()[-1]
        kept, channels = basis.components, basis.variances.shape[1]
        logging.info("%s: %d of %d channels explain %.1f %%", name, kept, channels, share)
    jobs.save_parts(job.bases_path, bases)


def _fit_basis(job: Job, name: str, covariance: Covariance) -> Basis:
    *_, components = job.stored[name]
    if job.options.svd == "none":
        return identity_basis(covariance)
    return fit_basis(covariance, components, job.options.center)


# --- pass 2 ------------------------------------------------------------------------------------------------------


def _project(job: Job, bases: Mapping[str, Basis], cache: Cache) -> tuple[int, int]:
    """Writes this process's shards and their moments; returns how many images, and how many the encoder saw for it."""
    shards = [i for i in job.own_shards if not (job.shard_path(i).exists() and job.sidecar("moments", i).exists())]
    sizes = {i: job.span(i)[1] - job.span(i)[0] for i in shards}
    seen = sum(size for i, size in sizes.items() if i not in cache)
    progress = Progress("images, encoding", sum(sizes.values()))
    done = 0
    for shard in shards:
        moments = {}
        kept = cache.pop(shard, None)
        records.write_shard(job.shard_path(shard), _records(job, shard, bases, kept, moments, done, progress))
        jobs.save_parts(job.sidecar("moments", shard), moments)
        done += sizes[shard]
    return done, seen


def _records(
    job: Job, shard: int, bases: Mapping[str, Basis], kept: list[Features] | None, moments: dict[str, Moments],
    done: int, progress: Progress,
) -> Iterator[bytes]:  # fmt: skip
    """Yields the shard's records, and adds what is stored (after rounding to float16) to `moments`."""
    arrays = {name: (np.float32(bases[name].mean), np.float32(bases[name].vectors)) for name in job.stored}
    remaining, fields = iter(kept or ()), job.fields
    of_codec = {field.name for field in job.codec.fields(job.image_shape)}

    def begin(batch: Batch) -> Features:
        encoded = _encoded(job, batch[1], arrays, next(remaining, None))
        if job.flip:
            mirrored = _encoded(job, batch[1][:, :, ::-1], arrays, None)
            encoded |= {name + records.MIRRORED: x for name, x in mirrored.items()}
        return encoded

    for (first, images, labels), encoded in _one_ahead(batches(job, *job.span(shard)), begin):
        stored = {name: np.asarray(grid)[: len(labels)] for name, grid in encoded.items()}
        for field, grid in stored.items():
            bad = np.asarray(~np.isfinite(grid).all((1, 2, 3)))
            _refuse(bad, first, f"NaN, infinity or a value beyond float16 in feature {field!r}")
            name = field.removesuffix(records.MIRRORED)
            part = job.codec.moments(name, grid) if name in of_codec else Moments.of_batch(grid)
            moments[name] = moments[name].merge(part) if name in moments else part
        for row, label in enumerate(labels):
            record = {name: grid[row] for name, grid in stored.items()}
            yield records.pack(record | {"label": label, IMAGE: images[row]}, fields)
        done += len(labels)
        progress.update(done)


def _encoded(job: Job, images: np.ndarray, bases: Mapping[str, tuple], features: Features | None) -> Features:
    """{field: float16 [B, h, w, K]} of a batch of images, whose raw features may be known."""
    features = _raw_features(job, images) if features is None else features
    found = {name: project(features[name], *basis) for name, basis in bases.items()}
    found |= _codec_fields(job, images, features)
    return {name: x.astype(np.float16) for name, x in found.items()}


def encode_images(job: Job, bases: Mapping[str, Basis]) -> dict[str, np.ndarray]:
    """{field: [N, ...]} of the records of all images of a job, without labels and mirror images; nothing is written.

    bases: those of a finished encoding, by the names of its features."""
    arrays = {name: (np.float32(bases[name].mean), np.float32(bases[name].vectors)) for name in job.stored}
    found = []
    for _, images, labels in batches(job, 0, len(job.source)):
        encoded = {name: np.asarray(x) for name, x in _encoded(job, images, arrays, None).items()}
        found.append({name: x[: len(labels)] for name, x in ({IMAGE: images} | encoded).items()})
    return {name: np.concatenate([some[name] for some in found]) for name in found[0]}


def _finish(job: Job) -> None:
    """Process 0: merges the moments; writes statistics.npz, then latents.json, which says that all is there."""
    bases = jobs.load_parts(job.bases_path, Basis)
    made = json.loads((job.directory / jobs.CLAIM_FILE).read_text())
    paths = [job.sidecar("moments", i) for i in range(job.num_shards)]
    moments = jobs.merge_parts(paths, Moments)
    parts = {f"basis/{name}": basis for name, basis in bases.items()}
    jobs.save_parts(job.statistics_path, parts | {f"moments/{name}": part for name, part in moments.items()})
    features = {name: _feature_summary(job.grids[name], basis) for name, basis in bases.items()}
    shards = [
        {
            "file": job.shard_path(i).name,
            "records": job.span(i)[1] - job.span(i)[0],
            "bytes": job.shard_path(i).stat().st_size,
        }
        for i in range(job.num_shards)
    ]
    index = {
        "made_from": made["made_from"],
        "fingerprint": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16],
        "num_records": len(job.source),
        "num_classes": job.source.num_classes,
        "image_shape": list(job.image_shape),
        "fields": made["fields"],
        "features": features,
        **job.codec.summary(job.image_shape, moments),
        "statistics_sha256": hashlib.sha256(job.statistics_path.read_bytes()).hexdigest(),
        "shards": shards,
    }
    atomic_write(job.index_path, json.dumps(index, indent=1))


def _feature_summary(grid: Grid, basis: Basis) -> dict[str, Any]:
    channels = basis.components
    return {
        "grid": list(grid[:2]),
        "channels": basis.variances.shape[1],
        "components": channels,
        "explained_variance": [round(float(share), 6) for share in basis.explained_variance()],
        "bits_per_image_at_sigma": {
            str(sigma): information_bits(grid[0] * grid[1] * channels, sigma) for sigma in BITS_AT
        },
        "basis_sha256": basis.sha256(),
    }


# --- batches -----------------------------------------------------------------------------------------------------


def run_networks(job: Job, images: np.ndarray) -> list[tuple[Features, Features]]:
    """What the networks make of a batch of images, and of its mirror images if they are stored: all work of the device
    but the products with the bases."""
    found = []
    for some in (images, images[:, :, ::-1])[: 1 + job.flip]:
        features = _raw_features(job, some)
        found.append((features, _codec_fields(job, some, features)))
    return found


def _raw_features(job: Job, images: np.ndarray) -> Features:
    """Every grid of the statistics: the encoder's, those that the codec needs statistics of, and what becomes the
    codec's features when it is projected (pooling and the codec's own projection may change places: both are linear),
    along with what the codec stores if it had to be computed."""
    features = {}
    if job.encoder is not None and job.encoder_features:
        made = job.encoder.features(jax.device_put(images, partition.local_devices("rows")))
        features = {name: made[name] for name in job.encoder_features}
    if job.codec_in_pass_1:
        features |= job.codec.encode(images, partition.local_devices("rows"))
        if job.codec_features:
            latents = job.codec.latents(features)
            features |= {name: grids.pool_feature(latents, name) for name in job.codec_features}
    return features


def _codec_fields(job: Job, images: np.ndarray, features: Features) -> Features:
    """What the codec stores of a batch of images; `features` may hold it already."""
    names = [field.name for field in job.codec.fields(job.image_shape)]
    if not names:
        return {}
    made = features if names[0] in features else job.codec.encode(images, partition.local_devices("rows"))
    return {name: made[name] for name in names}


def batches(job: Job, start: int, stop: int) -> Iterator[Batch]:
    """Yields (index of the first image, uint8 images [batch_size, H, W, C], int32 labels [n]) of a span in order; the
    last batch is filled up with copies of its last image."""
    size, starts = job.options.batch_size, range(start, stop, job.options.batch_size)
    part = -(-size // READ_THREADS)
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:

        def submit(first: int) -> list[concurrent.futures.Future]:
            indices = range(first, min(first + size, stop))
            return [pool.submit(_read, job, indices[i : i + part]) for i in range(0, len(indices), part)]

        unread = iter(starts)
        coming = collections.deque(map(submit, itertools.islice(unread, READ_AHEAD)))
        for first in starts:
            now = coming.popleft()
            coming.extend(map(submit, itertools.islice(unread, 1)))
            try:
                images, labels = zip(*(pair for future in now for pair in future.result()), strict=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            yield first, np.stack(images + images[-1:] * (size - len(images))), np.array(labels, np.int32)


def _one_ahead(items: Iterable[Item], begin: Callable[[Item], Begun]) -> Iterator[tuple[Item, Begun]]:
    """Yields (item, begin(item)) once the next item has begun as well: jax returns before its results are there, so
    the device has work while the host uses what came before."""
    begun = collections.deque()
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


def _read(job: Job, indices: Iterable[int]) -> list[tuple[np.ndarray, int]]:
    """Those images with their labels."""
    return [_read_one(job, i) for i in indices]


def _read_one(job: Job, i: int) -> tuple[np.ndarray, int]:
    """Image and label i, checked."""
    example, classes = job.source[i], job.source.num_classes
    image, label = example[IMAGE], int(example["label"]) if classes else 0
    if image.shape != job.image_shape or image.dtype != np.uint8:
        raise ValueError(
            f"image {i}: {image.dtype} {image.shape}, image 0 is uint8 {job.image_shape}; give all images one size "
            "(config.data)"
        )
    if classes and not 0 <= label < classes:
        raise ValueError(f"image {i}: label {label} is outside 0 to {classes - 1}; mend the data")
    return image, label


def _refuse(bad: np.ndarray, first: int, what: str) -> None:
    """Raises ValueError that names the first image where bad [n] is true; `first` is the index of row 0."""
    if bad.any():
        where = first + int(np.flatnonzero(bad)[0])
        raise ValueError(f"image {where}: {what} ({int(bad.sum())} image(s) of its batch); check the image and encoder")
