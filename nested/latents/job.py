"""The plan of one encoding run: its configuration, the files it writes, what they depend on, who waits for whom.

    encoding.json                                   written first: what the files are made from, the record layout
    statistics/covariance-00003-of-00012.npz        pass 1, one per shard
    statistics/bases.npz                            the SVD bases
    latents-00003-of-00012.array_record             pass 2
    statistics/moments-00003-of-00012.npz           pass 2, written after its shard: the shard is done
    statistics.npz, latents.json                    written last

Shard i belongs to process i % process_count. A directory made from anything else than what the run asks for is refused.
"""

import dataclasses
import functools
import io
import json
import pathlib
import time
from typing import Protocol

import jax
import numpy as np
from absl import logging

from input_pipeline import latent_records as records
from nested.encoders import grids
from nested.runtime.files import atomic_write, local_path
from nested.runtime.partition import local_devices
from nested.runtime.writers import Progress
from nested.spaces.autoencoder_kl import AutoencoderKL
from nested.spaces.codecs import CodecConfig, check_codec

CLAIM_FILE = "encoding.json"
STATISTICS_FILE = "statistics.npz"
COVARIANCE_BYTES = 1 << 29  # of a feature's covariances, float64: several such are in memory, one per shard on disk
SVD = ("shared", "per_position", "none")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """config.encoder. vector: which of the encoder's outputs the vector of an image or a crop is ('cls' | 'pool' |
    'projected'); prefix: what stands before the network's names in the weight file ('' finds it); dtype: of the
    encoder's products; features: grids to store, by their names in nested/encoders/grids.py; components: channels kept
    of each, or one number for all; svd: 'shared' by all positions | 'per_position' | 'none' (channels as the encoder
    gives them); center: the SVD is of features about their mean; fit_images: the basis is fitted to so many images (0:
    all), of shards spread evenly over the data; shard_images: records per shard."""

    name: str
    weights: str
    input_size: int
    map: str
    vector: str
    prefix: str
    dtype: str
    features: tuple
    components: tuple
    svd: str
    center: bool
    fit_images: int
    batch_size: int
    shard_images: int


class Encoder(Protocol):
    """What encode() needs. fingerprint is the sha256 of the weights; features can be traced by jax (its shapes are
    looked up before any work is done). params: arrays, on the devices that features() is to run on."""

    params: object
    name: str
    fingerprint: str

    def features(self, images) -> dict:
        """uint8 [B, H, W, C] -> {name: float32 [B, h, w, C']}, for every name of EncoderConfig.features that is not
        made from the codec's latents. grids.of_images makes them of an encoder's vector and map."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One call of encode(): its arguments, and what follows from them."""

    source: object
    encoder: Encoder | None  # None where no feature is asked of one
    config: EncoderConfig
    codec: CodecConfig
    directory: pathlib.Path
    process_index: int
    process_count: int
    timeout_s: float
    image_shape: tuple
    grids: dict  # feature -> (h, w, C), the codec's patches included, which the codec's features are made of
    autoencoder: AutoencoderKL | None  # of the codec sd_vae
    flip: bool  # whether everything is stored of the mirrored images as well
    check: bool  # whether all images are read once before

    def channels(self, name):
        """Channels of a feature before its SVD: of the codec's latents for theirs."""
        return self.codec.channels if grids.of_codec(name) else self.grids[name][2]

    @property
    def stored(self):
        """feature -> (h, w, K) of the features that go into the records."""
        components = self.config.components * (1 if len(self.config.components) > 1 else len(self.config.features))
        wanted = dict(zip(self.config.features, components, strict=True))
        return {name: (*self.grids[name][:2], min(most, self.channels(name))) for name, most in wanted.items()}

    @property
    def asked(self):
        """The features that the encoder is asked for."""
        return tuple(name for name in self.stored if not grids.of_codec(name))

    def per_position(self, name):
        """Whether the feature has a basis for every position; the codec's patches share one."""
        return self.config.svd == "per_position" and name != "patches"

    @property
    def moments_shape(self):
        """(h, w, 2 c) of the autoencoder's moments."""
        height, width, channels = self.autoencoder.grid(self.image_shape)
        return height, width, 2 * channels

    @property
    def raw(self):
        """name -> (h, w, C) of what records are made of, as far as pass 1 has it: raw features, and the autoencoder's
        moments where features are of them."""
        found = {name: self.grids[name] for name in self.stored}
        moments = self.autoencoder and any(map(grids.of_codec, found))
        return found | {"sd_vae": self.moments_shape} if moments else found

    @functools.cached_property
    def codec_params(self):
        """The autoencoder's encoder, on every device."""
        return jax.device_put(self.autoencoder.encoder, local_devices())

    @property
    def fields(self):
        """The record's layout: a label, what is encoded of the image and, with flips, of its mirror image; the image
        itself where the codec needs it."""
        encoded = [records.Field(name, "float16", shape) for name, shape in self.stored.items()]
        images = [records.Field("image", "uint8", self.image_shape)]
        if self.autoencoder:
            encoded.append(records.Field("sd_vae", "float16", self.moments_shape))
            images = []
        mirrored = [records.Field(field.name + records.MIRRORED, field.dtype, field.shape) for field in encoded]
        return (records.Field("label", "int32", ()), *encoded, *(mirrored if self.flip else ()), *images)

    @property
    def num_shards(self):
        return -(-len(self.source) // self.config.shard_images)

    @property
    def fit_shards(self):
        """{shard: how many of its first images the basis is fitted to}: spread evenly, as data may be sorted."""
        wanted, size = min(self.config.fit_images, len(self.source)) or len(self.source), self.config.shard_images
        count = -(-wanted // size)
        return {i * self.num_shards // count: min(size, wanted - i * size) for i in range(count)}

    @property
    def mine(self):
        return range(self.process_index, self.num_shards, self.process_count)

    def span(self, shard):
        start = shard * self.config.shard_images
        return start, min(start + self.config.shard_images, len(self.source))

    def shard(self, i):
        return self.directory / f"latents-{i:05d}-of-{self.num_shards:05d}.array_record"

    def sidecar(self, kind, i):
        return self.directory / "statistics" / f"{kind}-{i:05d}-of-{self.num_shards:05d}.npz"

    @property
    def bases(self):
        return self.directory / "statistics" / "bases.npz"

    @property
    def checked(self):
        return self.directory / "checked.txt"

    @property
    def statistics(self):
        return self.directory / STATISTICS_FILE

    @property
    def index(self):
        return self.directory / records.INDEX_FILE


def plan(
    source, encoder, config, codec, directory, *,
    autoencoder=None, flip=False, check=True, process_index=0, process_count=1, timeout_s=3600.0,
):  # fmt: skip
    """The Job of encoding `source` into `directory`.

    source: len, [i] -> {"image": uint8 [H, W, C], "label": int}, .fingerprint, .num_classes (0: no labels), .check().
    autoencoder: of the codec sd_vae. flip: mirrored images are stored as well. check: process 0 reads all images once
    before the first is encoded, so that all that cannot serve are named at once. timeout_s: how long to wait for the
    other processes without any progress of theirs. Raises ValueError, in one line: empty data; images that cannot be
    encoded so; an option that does not fit.
    """
    if len(source) == 0:
        raise ValueError("the data set is empty: nothing to encode; check config.data")
    for key in ("components", "batch_size", "shard_images"):
        if np.min(getattr(config, key), initial=1) < 1:
            raise ValueError(f"encoder.{key}: {getattr(config, key)} given; it must be at least 1")
    if len(config.components) not in (1, len(config.features)):
        raise ValueError(
            f"encoder.components: {config.components} given for {len(config.features)} features; give one number, or "
            f"one for each of {', '.join(config.features)}"
        )
    if config.batch_size % jax.local_device_count():
        raise ValueError(
            f"encoder.batch_size: {config.batch_size} given; {jax.local_device_count()} devices share a batch, use a "
            "multiple"
        )
    if config.fit_images < 0:
        raise ValueError(f"encoder.fit_images: {config.fit_images} given; 0 = all images, or how many")
    check_codec(codec)
    shape = tuple(np.shape(source[0]["image"]))
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise ValueError(f"image 0: shape {shape}; images must be [H, W, 1 or 3]")
    found = _grids(encoder, config, codec, shape, autoencoder)
    processes = process_index, process_count, timeout_s
    job = Job(source, encoder, config, codec, local_path(directory), *processes, shape, found, autoencoder, flip, check)
    _check_svd(job)
    return job


def _grids(encoder, config, codec, image_shape, autoencoder):
    """feature -> (h, w, C); the shapes of the encoder's are traced."""
    found, outputs, latents = {}, {}, None
    if codec.name == "patch_pca":
        found["patches"] = latents = _patch_grid(codec, image_shape)
    elif codec.name == "sd_vae":
        latents = autoencoder.grid(image_shape)
    if not all(map(grids.of_codec, config.features)):
        outputs = jax.eval_shape(encoder.features, jax.ShapeDtypeStruct((config.batch_size, *image_shape), np.uint8))
    for name in config.features:
        if not grids.of_codec(name):
            found[name] = tuple(outputs[name].shape[1:])
        elif latents is None:
            raise ValueError(
                f"encoder.features: {name!r} given, but codec.name {codec.name!r} has no latents; take it out or set "
                "codec.name to 'patch_pca' or 'sd_vae'"
            )
        else:
            one = jax.ShapeDtypeStruct((1, *latents), np.float32)
            found[name] = jax.eval_shape(functools.partial(grids.pooled, name=name), one).shape[1:]
    return found


def _check_svd(job):
    """Refuses an SVD that the features do not allow."""
    config = job.config
    if config.svd not in SVD:
        raise ValueError(f"encoder.svd: {config.svd!r} given; choose from {', '.join(map(repr, SVD))}")
    if config.svd == "none" and not config.center:
        raise ValueError("encoder.center: False given, but with encoder.svd 'none' nothing is centred; leave it True")
    for name, (*_, components) in job.stored.items():
        height, width, channels = job.grids[name]
        if config.svd == "none" and components < job.channels(name):
            raise ValueError(
                f"encoder.components: {components} given, but {name!r} has {job.channels(name)} channels, which "
                f"have no order without an SVD: give at least {job.channels(name)}, or another encoder.svd than 'none'"
            )
        if job.per_position(name) and 8 * height * width * channels**2 > COVARIANCE_BYTES:
            raise ValueError(
                f"encoder.svd: 'per_position' given, but {name!r} has {height}x{width} positions of {channels} "
                f"channels, whose covariances take {8e-9 * height * width * channels**2:.2g} GB, of at most "
                f"{COVARIANCE_BYTES / 1e9:.2g}; name it pooled ('mapN', 'codecN') or set encoder.svd to 'shared'"
            )


def _patch_grid(codec, shape):
    height, width, channels = shape
    if codec.patch < 1 or height % codec.patch or width % codec.patch:
        raise ValueError(f"codec.patch: {codec.patch} does not divide the images' {height}x{width}; give a divisor")
    full = codec.patch**2 * channels
    if not 1 <= codec.channels <= full:
        raise ValueError(
            f"codec.channels: {codec.channels} given; a {codec.patch}x{codec.patch} patch of {channels} channel(s) "
            f"has 1 to {full}"
        )
    return height // codec.patch, width // codec.patch, full


def _made_from(job):
    """What the files depend on, by the config's names. Batch size and process count are not among it."""
    keys = ("features", "components", "svd", "center", "fit_images", "shard_images")
    keys += ("input_size", "map", "vector", "prefix", "dtype") if job.asked else ()
    made = {f"encoder.{key}": getattr(job.config, key) for key in keys}
    made |= {f"encoder.{key}": list(getattr(job.config, key)) for key in ("features", "components")}
    if job.asked:
        made |= {"encoder.name": job.encoder.name, "encoder.weights_sha256": job.encoder.fingerprint}
    made["codec.name"] = job.codec.name
    if job.codec.name != "pixels":
        made |= {"codec.patch": job.codec.patch, "codec.channels": job.codec.channels}
    if job.autoencoder:
        made |= {"codec.weights_sha256": job.autoencoder.fingerprint, "codec.prefix": job.codec.prefix}
    if job.flip:
        made["data.flip"] = True
    made |= {"data.fingerprint": job.source.fingerprint, "data.num_images": len(job.source)}
    made |= {"data.num_classes": job.source.num_classes, "data.image_shape": list(job.image_shape)}
    return made


def claim(job):
    """Writes encoding.json, or compares with the one that is there."""
    path, made = job.directory / CLAIM_FILE, _made_from(job)
    text = json.dumps({"made_from": made, "fields": [field.to_json() for field in job.fields]}, indent=1)
    if not path.exists():
        strangers = sorted(file.name for file in job.directory.glob("*.array_record"))
        if strangers:
            raise ValueError(
                f"{job.directory}: holds {strangers[0]} but no {CLAIM_FILE} that says what made it; "
                "use another latents_dir or delete it"
            )
        if job.process_index == 0:
            atomic_write(path, text)
        wait(job, [path], f"{CLAIM_FILE} (process 0)")
    try:
        found = json.loads(path.read_text())["made_from"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete {job.directory} and encode again") from error
    differing = [key for key in sorted({*found, *made}) if found.get(key) != made.get(key)]
    if differing:
        pairs = "; ".join(f"{key} {found.get(key)}, config says {made.get(key)}" for key in differing)
        raise ValueError(f"latents in {job.directory} were made with {pairs}: use another latents_dir or delete it")


def complete(job):
    """Whether latents.json is there with every shard it lists; if a shard is gone, latents.json goes as well."""
    if not job.index.exists():
        return False
    for shard in records.read_index(job.directory)["shards"]:
        path = job.directory / shard["file"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            logging.warning("%s is missing or was cut: it is encoded again", path)
            path.unlink(missing_ok=True)
            job.index.unlink(missing_ok=True)
    return job.index.exists()


def wait(job, paths, what):
    """Polls until all `paths` exist. Raises TimeoutError when none has been added for job.timeout_s."""
    progress, changed, missing = Progress(f"waiting for {what}:", len(paths)), time.monotonic(), paths
    while still := [path for path in missing if not path.exists()]:
        now = time.monotonic()
        changed = now if len(still) < len(missing) else changed
        missing = still
        if now - changed > job.timeout_s:
            raise TimeoutError(
                f"process {job.process_index}: waited {job.timeout_s:.0f} s for {what}: {missing[0]} is still missing; "
                f"are all {job.process_count} encoding processes running, and do they share {job.directory}?"
            )
        progress.update(len(paths) - len(missing))
        time.sleep(0.1)


# --- files -------------------------------------------------------------------------------------------------------


def save(path, parts):
    """Writes {name: dataclass of arrays} to one .npz, whole or not at all, under "name/field"."""
    arrays = {
        f"{name}/{field.name}": getattr(part, field.name)
        for name, part in parts.items()
        for field in dataclasses.fields(part)
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def load(path, kind, prefix=""):
    """The inverse of save, for the parts under `prefix`, all of the dataclass `kind`."""
    with np.load(path, allow_pickle=False) as archive:
        names = dict.fromkeys(key.rpartition("/")[0] for key in archive.files if key.startswith(prefix))
        fields = [field.name for field in dataclasses.fields(kind)]
        return {
            name.removeprefix(prefix): kind(*(archive[f"{name}/{field}"][()] for field in fields)) for name in names
        }


def merged(paths, kind):
    """{name: the parts of all files merged, in the order of `paths`}."""
    total = load(paths[0], kind)
    for path in paths[1:]:
        part = load(path, kind)
        total = {name: total[name].merge(part[name]) for name in total}
    return total
