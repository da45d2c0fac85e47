"""Encoding a data set once: raw features after the SVD, the images themselves, and every statistic, on disk.

Two passes (raw 14x14x768 features of ImageNet would be 385 GB):
    1  covariance of every feature             statistics/covariance-00003-of-00012.npz, one per shard
       merged in the shards' order -> SVD      statistics/bases.npz
    2  leading components, float16             latents-00003-of-00012.array_record
       second moments between positions        statistics/moments-00003-of-00012.npz
       merged                                  statistics.npz, latents.json

Shards are the unit of work: shard i belongs to process i % process_count; a finished file is kept, a half-written one
never has its final name (input_pipeline/latents.py, nested/files.py); what a shard holds depends on the shard alone.
So a killed run resumes, and any number of processes writes the same bytes. encoding.json, written first, says what the
files are made from; a run that differs in anything is refused. statistics/ serves resuming only.
"""

import collections
import concurrent.futures
import functools
import hashlib
import json
import math

import jax
import numpy as np
from absl import logging

from input_pipeline import latents as records
from nested import encoding
from nested.encoders import compress
from nested.files import atomic_write, check_writable
from nested.writers import Progress

FEATURE_CACHE_BYTES = 1 << 29  # raw features of pass 1 kept for pass 2, so that small data are encoded once
READ_THREADS = 8
BITS_AT = (0.5, 1.0)


def encode(source, encoder, config, codec, latents_dir, *, process_index=0, process_count=1, timeout_s=3600.0):
    """Encodes `source` into `latents_dir`; returns the content of latents.json (see _finish). Safe to repeat: finished
    work is kept, and a complete directory returns at once.

    source: len, [i] -> {"image": uint8 [H, W, C], "label": int}, .fingerprint, .num_classes (0: no labels), .check().
    timeout_s: how long to wait for the other processes without any progress of theirs.
    Raises, each in one line: ValueError (empty data; images of unequal shape; a label outside [0, num_classes); NaN or
    infinity in a feature; latents_dir made from something else), OSError (not writable), TimeoutError.
    """
    directory = check_writable(latents_dir)
    job = encoding.plan(source, encoder, config, codec, directory, process_index, process_count, timeout_s)
    encoding.claim(job)
    if encoding.complete(job):
        return json.loads(job.index.read_text())
    source.check()  # a folder's unreadable files are all found, named and counted before the work begins
    cache = {}
    if not job.bases.exists():
        _covariances(job, cache)
        if process_index == 0:
            _fit_bases(job)
        encoding.wait(job, [job.bases], "the SVD bases (process 0)")
    _project(job, encoding.load(job.bases, compress.Basis), cache)
    if process_index == 0:
        encoding.wait(job, [job.sidecar("moments", i) for i in range(job.num_shards)], "every shard")
        _finish(job)
    encoding.wait(job, [job.index], "latents.json (process 0)")
    return json.loads(job.index.read_text())


# --- pass 1 ------------------------------------------------------------------------------------------------------


def _covariances(job, cache):
    """The sums of this process's shards. Raw features stay in `cache` {shard: [features of a batch]} while they fit."""
    shards = [i for i in job.mine if i < job.fit_shards and not job.sidecar("covariance", i).exists()]
    done, progress = 0, Progress("images, statistics", sum(job.span(i)[1] - job.span(i)[0] for i in shards))
    bytes_per_image = 4 * sum(math.prod(job.grids[name]) for name in job.stored)
    room = FEATURE_CACHE_BYTES
    for shard in shards:
        start, stop = job.span(shard)
        room -= bytes_per_image * (stop - start)
        streams, kept = collections.defaultdict(compress.CovarianceStream), []
        for first, images, labels in _batches(job, shard):
            features = _features(job, images)
            fitted = min(len(labels), job.fit_images - first)
            for name, x in features.items() if fitted > 0 else ():
                _refuse(~streams[name].add(x, fitted), first, f"NaN or infinity in feature {name!r}")
            if room >= 0:
                kept.append({name: np.asarray(features[name]) for name in job.stored})
            done += len(labels)
            progress.update(done)
        encoding.save(job.sidecar("covariance", shard), {name: stream.result() for name, stream in streams.items()})
        if room >= 0:
            cache[shard] = kept


def _fit_bases(job):
    """Process 0: merges the shards' covariances in order, and writes the bases."""
    paths = [job.sidecar("covariance", i) for i in range(job.fit_shards)]
    encoding.wait(job, paths, "the statistics of all shards")
    components = {name: shape[2] for name, shape in job.stored.items()} | {"patches": job.codec.channels}
    totals = encoding.merged(paths, compress.Covariance)
    bases = {name: compress.fit_basis(total, components[name]) for name, total in totals.items()}
    for name, basis in bases.items():
        share = 100 * basis.explained_variance()[-1]
        logging.info("%s: %d of %d channels explain %.1f %%", name, components[name], len(basis.mean), share)
    encoding.save(job.bases, bases)


# --- pass 2 ------------------------------------------------------------------------------------------------------


def _project(job, bases, cache):
    """Writes this process's shards and their moments."""
    shards = [i for i in job.mine if not (job.shard(i).exists() and job.sidecar("moments", i).exists())]
    progress = Progress("images, encoding", sum(job.span(i)[1] - job.span(i)[0] for i in shards))
    done = 0
    for shard in shards:
        moments = {}
        kept = cache.pop(shard, None)
        records.write_shard(job.shard(shard), _records(job, shard, bases, kept, moments, done, progress))
        encoding.save(job.sidecar("moments", shard), moments)
        done += job.span(shard)[1] - job.span(shard)[0]


def _records(job, shard, bases, kept, moments, done, progress):
    """Yields the shard's records, and adds what is stored (after rounding to float16) to `moments`."""
    for batch, (first, images, labels) in enumerate(_batches(job, shard)):
        features = _features(job, images) if kept is None else kept[batch]
        grids = {}
        for name in job.stored:
            basis = bases[name]
            z = compress.project(features[name], np.float32(basis.mean), np.float32(basis.vectors))
            z = np.asarray(z)[: len(labels)]
            with np.errstate(over="ignore"):  # what overflows float16 is refused on the next line
                grids[name] = z.astype(np.float16)
            bad = ~np.isfinite(grids[name]).all((1, 2, 3))
            _refuse(bad, first, f"NaN, infinity or a value beyond float16 in feature {name!r}")
            part = compress.Moments.of(grids[name])
            moments[name] = moments[name].merge(part) if name in moments else part
        for row, label in enumerate(labels):
            record = {name: grid[row] for name, grid in grids.items()}
            yield records.pack(record | {"label": label, "image": images[row]}, job.fields)
        done += len(labels)
        progress.update(done)


def _finish(job):
    """Process 0: merges the moments; writes statistics.npz, then latents.json, which says that all is there."""
    bases = encoding.load(job.bases, compress.Basis)
    made = json.loads((job.directory / encoding.CLAIM_FILE).read_text())
    paths = [job.sidecar("moments", i) for i in range(job.num_shards)]
    moments = encoding.merged(paths, compress.Moments)
    parts = {f"basis/{name}": basis for name, basis in bases.items()}
    encoding.save(job.statistics, parts | {f"moments/{name}": part for name, part in moments.items()})
    features = {name: _feature_summary(job.grids[name], basis) for name, basis in bases.items()}
    shards = [
        {"file": job.shard(i).name, "records": job.span(i)[1] - job.span(i)[0], "bytes": job.shard(i).stat().st_size}
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
        "statistics_sha256": hashlib.sha256(job.statistics.read_bytes()).hexdigest(),
        "shards": shards,
    }
    atomic_write(job.index, json.dumps(index, indent=1))


def _feature_summary(grid, basis):
    channels = basis.vectors.shape[1]
    return {
        "grid": list(grid[:2]),
        "channels": grid[2],
        "components": channels,
        "explained_variance": [round(float(share), 6) for share in basis.explained_variance()],
        "bits_per_image_at_sigma": {
            str(sigma): compress.information_bits(grid[0] * grid[1] * channels, sigma) for sigma in BITS_AT
        },
        "basis_sha256": basis.sha256(),
    }


# --- batches -----------------------------------------------------------------------------------------------------


def _features(job, images):
    """Every grid of the statistics: the encoder's, and the codec's patches."""
    features = job.encoder.features(images) if job.config.features else {}
    grids = {name: features[name] for name in job.config.features}
    if job.codec.name == "patch_pca":
        grids["patches"] = _patches(images, job.codec.patch)
    return grids


@functools.partial(jax.jit, static_argnames=("patch",))
def _patches(images, patch):
    return compress.patchify(compress.normalise(images), patch)


def _batches(job, shard):
    """Yields (index of the first image, uint8 images [batch_size, H, W, C], int32 labels [n]) of a shard in order; the
    last batch is filled up with copies of its last image. The next batch is read while one is encoded."""
    start, stop = job.span(shard)
    size = job.config.batch_size
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:

        def submit(first):
            return [pool.submit(_read, job, i) for i in range(first, min(first + size, stop))]

        coming = submit(start)
        for first in range(start, stop, size):
            now, coming = coming, submit(first + size)
            try:
                images, labels = zip(*(future.result() for future in now), strict=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            yield first, np.stack(images + images[-1:] * (size - len(images))), np.array(labels, np.int32)


def _read(job, i):
    """Image and label i, checked."""
    example, classes = job.source[i], job.source.num_classes
    image, label = example["image"], int(example["label"]) if classes else 0
    if image.shape != job.image_shape or image.dtype != np.uint8:
        raise ValueError(
            f"image {i}: {image.dtype} {image.shape}, image 0 is uint8 {job.image_shape}; give all images one size "
            "(config.data)"
        )
    if classes and not 0 <= label < classes:
        raise ValueError(f"image {i}: label {label} is outside 0 to {classes - 1}; mend the data")
    return image, label


def _refuse(bad, first, what):
    """Raises ValueError naming the image where bad [n] is true; `first` is the index of row 0."""
    if bad.any():
        where = first + int(np.flatnonzero(bad)[0])
        raise ValueError(f"image {where}: {what} ({int(bad.sum())} image(s) of its batch); check the image and encoder")
