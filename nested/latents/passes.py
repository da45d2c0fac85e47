"""Encoding a data set once: raw features after the SVD, the images or their latents, and every statistic, on disk.

Two passes (raw 14x14x768 features of ImageNet would be 385 GB):
    1  covariance of every feature             statistics/covariance-00003-of-00012.npz, one per shard
       merged in the shards' order -> SVD      statistics/bases.npz
    2  leading components, float16             latents-00003-of-00012.array_record
       second moments between positions        statistics/moments-00003-of-00012.npz
       merged                                  statistics.npz, latents.json

Pass 2 reads raw features of pass 1 from memory while they fit (FEATURE_CACHE_BYTES); beyond that an image of the
basis' fit goes through the encoder twice, so for large data encoder.fit_images should be a few per cent of them, and
encoding runs at about the encoder's own rate. The device works on a batch while the host reads the next one and packs
and writes the one before.

Of the codec sd_vae the moments of the latents are stored in place of the image, means before log-variances (clamped),
float16 where U-ViT stores float32: a relative rounding of 5e-4. Their scale is measured beside:
1 / std of all numbers of all latents, whose variance is that of the means plus the mean of the variances.
With flips everything is stored of the mirrored image as well, in fields of their own ('map.mirrored'), as U-ViT stores
both; the statistics are then over both, the SVD basis is fitted to the images as they are.

Shards are the unit of work: shard i belongs to process i % process_count; a finished file is kept, a half-written one
never has its final name (input_pipeline/latent_records.py, nested/runtime/files.py); what a shard holds depends on
the shard alone. So a killed run resumes, and any number of processes writes the same bytes (of equally many devices
each, which share a batch: sums over more of them are rounded otherwise). encoding.json, written first, says what the
files are made from; a run that differs in anything is refused. statistics/ serves resuming only.
"""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import time

import jax
import numpy as np
from absl import logging

from input_pipeline import latent_records as records
from nested.encoders import grids
from nested.latents import job as encoding
from nested.runtime import partition
from nested.runtime.files import atomic_write, check_writable
from nested.runtime.writers import Progress
from nested.spaces import autoencoder_kl, svd
from nested.spaces.patch_pca import PatchPCA, patchify
from nested.spaces.pixels import normalise

FEATURE_CACHE_BYTES = 1 << 29  # raw features of pass 1 kept for pass 2, so that small data are encoded once
READ_THREADS, READ_AHEAD = 8, 2  # batches are read while the ones before them are encoded
BITS_AT = (0.5, 1.0)


def encode(job):
    """Does what an encoding.Job says; returns the content of latents.json (see _finish). Safe to repeat: finished work
    is kept, and a complete directory returns at once.

    Raises, each in one line: ValueError (images of unequal shape; a label outside [0, num_classes); NaN or infinity in
    a feature; a directory made from something else), OSError (not writable), TimeoutError.
    """
    check_writable(job.directory)
    encoding.claim(job)
    if encoding.complete(job):
        return json.loads(job.index.read_text())
    if job.check and job.process_index == 0 and not job.checked.exists():
        job.source.check()  # a folder's unreadable files are all found, named and counted before the work begins
        atomic_write(job.checked, job.source.describe() + "\n")
    cache, began, seen = {}, time.monotonic(), 0
    if not job.bases.exists():
        seen = _covariances(job, cache)
        if job.process_index == 0:
            _fit_bases(job)
        encoding.wait(job, [job.bases], "the SVD bases (process 0)")
    written, again = _project(job, encoding.load(job.bases, svd.Basis), cache)
    _say_rate(written, seen + again if job.asked else 0, job.flip, time.monotonic() - began)
    if job.process_index == 0:
        encoding.wait(job, [job.sidecar("moments", i) for i in range(job.num_shards)], "every shard")
        _finish(job)
    encoding.wait(job, [job.index], "latents.json (process 0)")
    return json.loads(job.index.read_text())


def _say_rate(written, seen, flip, seconds):
    """What this process has done, and what it could have saved. seen: images that went through the encoder, not
    mirrored."""
    if written:
        hint = "; a smaller encoder.fit_images saves time" if seen > 1.4 * written else ""
        times = f"each went through the encoder {seen / written:.2f} times{', and once mirrored' * flip}{hint}"
        logging.info("encoded %s images, %.1f images/s: %s", f"{written:,}", written / seconds, times)


# --- pass 1 ------------------------------------------------------------------------------------------------------


def _raw_bytes(job):
    """Of an image's raw features."""
    return 4 * sum(math.prod(shape) for shape in job.raw.values())


def seen_twice(job):
    """How many images the networks see in both passes, before anything is done, as raw features are not kept."""
    sizes = {shard: job.span(shard)[1] - job.span(shard)[0] for shard in job.fit_shards}
    if not job.grids or _raw_bytes(job) * sum(sizes.values()) <= FEATURE_CACHE_BYTES * job.process_count:
        return 0
    return sum(job.fit_shards.values())


def _covariances(job, cache):
    """The sums of this process's shards of the fit; returns how many images the encoder saw. Raw features stay in
    `cache` {shard: [features of a batch]} while they fit."""
    shards = [i for i in job.mine if i in job.fit_shards and not job.sidecar("covariance", i).exists()]
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
        streams = {name: svd.CovarianceStream(job.per_position(name)) for name in job.grids}

        def begin(batch, fit_stop=fit_stop, streams=streams):
            first, images, labels = batch
            features = _features(job, images)
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
        encoding.save(job.sidecar("covariance", shard), {name: stream.result() for name, stream in streams.items()})
    return total


def _fit_bases(job):
    """Process 0: merges the shards' covariances in order, and writes the bases."""
    paths = [job.sidecar("covariance", i) for i in job.fit_shards]
    encoding.wait(job, paths, "the statistics of all shards")
    totals = encoding.merged(paths, svd.Covariance)
    bases = {}
    if "patches" in totals:
        bases["patches"] = svd.fit_basis(totals["patches"], job.codec.channels)
    for name in job.stored:
        if grids.of_codec(name) and "patches" in bases:
            codec = PatchPCA.from_basis(bases["patches"], job.codec.patch, job.codec.channels)
            latents = codec.mean.astype(np.float64), codec.vectors.astype(np.float64) * codec.scale
            bases[name] = _fit(job, name, totals[name].through(*latents)).after(*latents)
        else:
            bases[name] = _fit(job, name, totals[name])
    for name, basis in bases.items():
        share = 100 * basis.explained_variance()[-1]
        kept, channels = basis.components, basis.variances.shape[1]
        logging.info("%s: %d of %d channels explain %.1f %%", name, kept, channels, share)
    encoding.save(job.bases, bases)


def _fit(job, name, covariance):
    *_, components = job.stored[name]
    if job.config.svd == "none":
        return svd.identity_basis(covariance)
    return svd.fit_basis(covariance, components, job.config.center)


# --- pass 2 ------------------------------------------------------------------------------------------------------


def _project(job, bases, cache):
    """Writes this process's shards and their moments; returns how many images, and how many the encoder saw for it."""
    shards = [i for i in job.mine if not (job.shard(i).exists() and job.sidecar("moments", i).exists())]
    sizes = {i: job.span(i)[1] - job.span(i)[0] for i in shards}
    seen = sum(size for i, size in sizes.items() if i not in cache)
    progress = Progress("images, encoding", sum(sizes.values()))
    done = 0
    for shard in shards:
        moments = {}
        kept = cache.pop(shard, None)
        records.write_shard(job.shard(shard), _records(job, shard, bases, kept, moments, done, progress))
        encoding.save(job.sidecar("moments", shard), moments)
        done += sizes[shard]
    return done, seen


def _records(job, shard, bases, kept, moments, done, progress):
    """Yields the shard's records, and adds what is stored (after rounding to float16) to `moments`."""
    bases = {name: (np.float32(bases[name].mean), np.float32(bases[name].vectors)) for name in job.stored}
    kept, fields = iter(kept or ()), job.fields

    def begin(batch):
        encoded = _encoded(job, batch[1], bases, next(kept, None))
        if job.flip:
            mirrored = _encoded(job, batch[1][:, :, ::-1], bases, None)
            encoded |= {name + records.MIRRORED: x for name, x in mirrored.items()}
        return encoded

    for (first, images, labels), encoded in _one_ahead(batches(job, *job.span(shard)), begin):
        grids_of = {name: np.asarray(grid)[: len(labels)] for name, grid in encoded.items()}
        for field, grid in grids_of.items():
            bad = ~np.isfinite(grid).all((1, 2, 3))
            _refuse(bad, first, f"NaN, infinity or a value beyond float16 in feature {field!r}")
            name = field.removesuffix(records.MIRRORED)
            part = _latent_moments(grid) if name == "sd_vae" else svd.Moments.of(grid)
            moments[name] = moments[name].merge(part) if name in moments else part
        for row, label in enumerate(labels):
            record = {name: grid[row] for name, grid in grids_of.items()}
            yield records.pack(record | {"label": label, "image": images[row]}, fields)
        done += len(labels)
        progress.update(done)


def _encoded(job, images, bases, features):
    """{field: float16 [B, h, w, K]} of a batch of images, whose raw features may be known."""
    features = _features(job, images) if features is None else features
    found = {name: svd.project(features[name], *basis) for name, basis in bases.items()}
    if job.autoencoder:
        found["sd_vae"] = features["sd_vae"] if "sd_vae" in features else _latents(job, images)
    return {name: x.astype(np.float16) for name, x in found.items()}


def _latent_moments(stored):
    """Moments of all numbers of the latents drawn from stored moments, as of one position of one channel."""
    mean, logvar = np.split(stored.astype(np.float64), 2, axis=-1)
    square = np.square(mean).sum() + np.exp(logvar).sum()
    return svd.Moments(mean.size, mean.sum().reshape(1, 1), square.reshape(1, 1, 1))


def _finish(job):
    """Process 0: merges the moments; writes statistics.npz, then latents.json, which says that all is there."""
    bases = encoding.load(job.bases, svd.Basis)
    made = json.loads((job.directory / encoding.CLAIM_FILE).read_text())
    paths = [job.sidecar("moments", i) for i in range(job.num_shards)]
    moments = encoding.merged(paths, svd.Moments)
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
        **_latent_summary(job, moments),
        "statistics_sha256": hashlib.sha256(job.statistics.read_bytes()).hexdigest(),
        "shards": shards,
    }
    atomic_write(job.index, json.dumps(index, indent=1))


def _latent_summary(job, moments):
    """The grid of the autoencoder's latents, and the scale that brings them to variance 1 about their mean."""
    if not job.autoencoder:
        return {}
    _, std = svd.standardisation(moments["sd_vae"], np.eye(1), 1)
    *grid, numbers = job.moments_shape
    return {"sd_vae": {"grid": grid, "channels": numbers // 2, "measured_scale": float(1 / std[0])}}


def _feature_summary(grid, basis):
    channels = basis.components
    return {
        "grid": list(grid[:2]),
        "channels": basis.variances.shape[1],
        "components": channels,
        "explained_variance": [round(float(share), 6) for share in basis.explained_variance()],
        "bits_per_image_at_sigma": {
            str(sigma): svd.information_bits(grid[0] * grid[1] * channels, sigma) for sigma in BITS_AT
        },
        "basis_sha256": basis.sha256(),
    }


# --- batches -----------------------------------------------------------------------------------------------------


def raw(job, images):
    """What the networks make of a batch of images, and of its mirror images where they are stored: of the work on the
    device all but products with the bases."""
    found = []
    for some in (images, images[:, :, ::-1])[: 1 + job.flip]:
        features = _features(job, some)
        found.append((features, _latents(job, some) if job.autoencoder and "sd_vae" not in features else None))
    return found


def _features(job, images):
    """Every grid of the statistics: the encoder's, the codec's patches, and what of them becomes the codec's features
    when it is projected (pooling and the codec's own projection may change places: both are linear). The features of an
    autoencoder are of its means, not scaled (nested/latents/store.py scales them), and come with all of its moments."""
    placed = jax.device_put(images, partition.local_devices("rows"))
    features = dict(job.encoder.features(placed)) if job.asked else {}
    features = {name: features[name] for name in job.asked}
    if "patches" in job.grids:
        patches = features["patches"] = _patches(placed, job.codec.patch)
        features |= {name: grids.pooled(patches, name) for name in job.stored if grids.of_codec(name)}
    elif any(map(grids.of_codec, job.stored)):
        features["sd_vae"] = _latents(job, images)
        mean = features["sd_vae"][..., : job.codec.channels]
        features |= {name: grids.pooled(mean, name) for name in job.stored if grids.of_codec(name)}
    return features


def _latents(job, images):
    """Moments of the autoencoder's latents, float32 [B, h, w, 2 c]."""
    rows = partition.local_devices("rows")
    return autoencoder_kl.stored_moments(job.codec_params, images, job.codec.batch_size, rows)


@functools.partial(jax.jit, static_argnames=("patch",))
def _patches(images, patch):
    return patchify(normalise(images), patch)


def batches(job, start, stop):
    """Yields (index of the first image, uint8 images [batch_size, H, W, C], int32 labels [n]) of a span in order; the
    last batch is filled up with copies of its last image."""
    size, starts = job.config.batch_size, range(start, stop, job.config.batch_size)
    part = -(-size // READ_THREADS)
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:

        def submit(first):
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


def _one_ahead(items, begin):
    """Yields (item, begin(item)) once the next item has begun as well: jax returns before its results are there, so
    the device has work while the host uses what came before."""
    begun = collections.deque()
    for item in items:
        begun.append((item, begin(item)))
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


def _read(job, indices):
    """Those images with their labels."""
    return [_read_one(job, i) for i in indices]


def _read_one(job, i):
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
