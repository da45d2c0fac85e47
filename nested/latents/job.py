"""The plan of one encoding run: its options, the files it writes, what they depend on, who waits for whom.

    encoding.json                                   written first: what the files are made from, the record layout
    statistics/covariance-00003-of-00012.npz        pass 1, one per shard
    statistics/bases.npz                            the SVD bases
    latents-00003-of-00012.array_record             pass 2
    statistics/moments-00003-of-00012.npz           pass 2, written after its shard: the shard is done
    statistics.npz, latents.json                    written last

Shard i belongs to process i % process_count. A directory is refused if it was made from anything else than what the run
asks for.
"""

import dataclasses
import functools
import inspect
import io
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

import jax
import numpy as np
from absl import logging

from input_pipeline import latent_records as records
from input_pipeline.sources import ImageSource
from nested.encoders import grids
from nested.encoders.encoder import Encoder
from nested.runtime.files import atomic_write, local_path
from nested.runtime.writers import Progress
from nested.spaces.space import IMAGE, Grid, LatentGrid, OpenCodec

CLAIM_FILE = "encoding.json"
STATISTICS_FILE = "statistics.npz"
COVARIANCE_BYTES = 1 << 29  # of a feature's covariances, float64: several such are in memory, one per shard on disk
SVD = ("shared", "per_position", "none")


@dataclasses.dataclass(frozen=True)
class EncodingOptions:
    """The options of config.encoder that say what is stored of the features, and how encoding runs."""

    features: Annotated[tuple[str, ...], "of crops1, crops2, crops4 (one vector per crop) and map"] = ("map",)
    components: Annotated[tuple[int, ...], "leading SVD components stored, of each feature, or one number for all"] = (
        64,
    )
    svd: Annotated[
        Literal["shared", "per_position", "none"],
        "shared by positions | per_position | none (channels as the encoder gives them)",
    ] = "shared"
    center: Annotated[bool, "the SVD is of features about their mean"] = True
    fit_images: Annotated[int, "images, evenly spaced, the SVD basis is fitted on; 0: all, each encoded twice"] = 32768
    batch_size: Annotated[int, "images encoded at a time"] = 64
    shard_images: Annotated[int, "records of a file"] = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One call of encode(): its arguments, and what follows from them.

    encoder: None if no feature is made by one. grids: feature -> (h, w, C) before its SVD, with those that the codec
    needs statistics of. latent_grid: of the codec. flip: whether everything is stored of the mirrored images as well.
    check: whether all images are read once before the first is encoded.
    """

    source: ImageSource
    encoder: Encoder | None
    options: EncodingOptions
    codec: OpenCodec
    directory: pathlib.Path
    process_index: int
    process_count: int
    timeout_s: float
    image_shape: Grid
    grids: Mapping[str, Grid]
    latent_grid: LatentGrid | None
    flip: bool
    check: bool

    def channels(self, name: str) -> int:
        """Channels of a feature before its SVD: those of the codec's latents for a feature of the codec."""
        if self.latent_grid is not None and grids.is_codec_feature(name):
            return self.latent_grid.channels
        return self.grids[name][2]

    @property
    def stored(self) -> dict[str, Grid]:
        """feature -> (h, w, K) of the features that go into the records."""
        components = self.options.components * (1 if len(self.options.components) > 1 else len(self.options.features))
        most = dict(zip(self.options.features, components, strict=True))
        return {name: (*self.grids[name][:2], min(number, self.channels(name))) for name, number in most.items()}

    @property
    def encoder_features(self) -> tuple[str, ...]:
        """The features that the encoder makes."""
        return tuple(name for name in self.stored if not grids.is_codec_feature(name))

    @property
    def codec_features(self) -> tuple[str, ...]:
        """The features that are made of the codec's latents."""
        return tuple(name for name in self.stored if grids.is_codec_feature(name))

    def per_position(self, name: str) -> bool:
        """Whether the grid has a basis for every position; what the codec needs statistics of shares one."""
        return self.options.svd == "per_position" and name in self.stored

    @property
    def codec_in_pass_1(self) -> bool:
        """Whether the statistics of pass 1 need what the codec makes of images."""
        return bool(self.codec.statistics(self.image_shape) or self.codec_features)

    @property
    def raw(self) -> dict[str, tuple[int, ...]]:
        """name -> (h, w, C) of what records are made of, as far as pass 1 has it: raw features, and what the codec
        stores if pass 1 needs it."""
        found: dict[str, tuple[int, ...]] = {name: self.grids[name] for name in self.stored}
        codec = self.codec.fields(self.image_shape) if self.codec_in_pass_1 else ()
        return found | {field.name: field.shape for field in codec}

    @property
    def fields(self) -> tuple[records.Field, ...]:
        """The record's layout: a label, what is encoded of the image and, with flips, of its mirror image; the image
        itself if the codec needs it."""
        encoded = [records.Field(name, "float16", shape) for name, shape in self.stored.items()]
        encoded += self.codec.fields(self.image_shape)
        mirrored = [records.Field(field.name + records.MIRRORED, field.dtype, field.shape) for field in encoded]
        images = [records.Field(IMAGE, "uint8", self.image_shape)] if self.codec.stores_images else []
        return (records.Field("label", "int32", ()), *encoded, *(mirrored if self.flip else ()), *images)

    @property
    def num_shards(self) -> int:
        return -(-len(self.source) // self.options.shard_images)

    @property
    def fit_shards(self) -> dict[int, int]:
        """{shard: how many of its first images the basis is fitted to}: spread evenly, as data may be sorted."""
        number, size = min(self.options.fit_images, len(self.source)) or len(self.source), self.options.shard_images
        count = -(-number // size)
        return {i * self.num_shards // count: min(size, number - i * size) for i in range(count)}

    @property
    def own_shards(self) -> range:
        """The shards of this process."""
        return range(self.process_index, self.num_shards, self.process_count)

    def span(self, shard: int) -> tuple[int, int]:
        """The first image of a shard, and the one after its last."""
        start = shard * self.options.shard_images
        return start, min(start + self.options.shard_images, len(self.source))

    def shard_path(self, i: int) -> pathlib.Path:
        return self.directory / f"latents-{i:05d}-of-{self.num_shards:05d}.array_record"

    def sidecar(self, kind: str, i: int) -> pathlib.Path:
        """The file of a shard's sums, kind 'covariance' or 'moments'."""
        return self.directory / "statistics" / f"{kind}-{i:05d}-of-{self.num_shards:05d}.npz"

    @property
    def bases_path(self) -> pathlib.Path:
        return self.directory / "statistics" / "bases.npz"

    @property
    def checked_path(self) -> pathlib.Path:
        return self.directory / "checked.txt"

    @property
    def statistics_path(self) -> pathlib.Path:
        return self.directory / STATISTICS_FILE

    @property
    def index_path(self) -> pathlib.Path:
        return self.directory / records.INDEX_FILE


def plan_job(
    source: ImageSource, encoder: Encoder | None, options: EncodingOptions, codec: OpenCodec,
    directory: str | pathlib.Path, *, flip: bool = False, check: bool = True, process_index: int = 0,
    process_count: int = 1, timeout_s: float = 3600.0,
) -> Job:  # fmt: skip
    """The job of encoding `source` into `directory`.

    Args:
      source: its images [H, W, C] are uint8 and of one size; labels count if num_classes is not 0.
      encoder: None if no feature is made by one.
      flip: whether mirrored images are stored as well.
      check: process 0 reads all images once before the first is encoded, so that all that cannot serve are named at
        once.
      timeout_s: how long to wait for the other processes without any progress of theirs.

    Raises ValueError, in one line, for empty data, images that cannot be encoded so, and an option that does not fit.
    """
    if len(source) == 0:
        raise ValueError("the data set is empty: nothing to encode; check config.data")
    for key in ("components", "batch_size", "shard_images"):
        if np.min(getattr(options, key), initial=1) < 1:
            raise ValueError(f"encoder.{key}: {getattr(options, key)} given; it must be at least 1")
    if len(options.components) not in (1, len(options.features)):
        raise ValueError(
            f"encoder.components: {options.components} given for {len(options.features)} features; give one number, or "
            f"one for each of {', '.join(options.features)}"
        )
    if options.batch_size % jax.local_device_count():
        raise ValueError(
            f"encoder.batch_size: {options.batch_size} given; {jax.local_device_count()} devices share a batch, use a "
            "multiple"
        )
    if options.fit_images < 0:
        raise ValueError(f"encoder.fit_images: {options.fit_images} given; 0 = all images, or how many")
    shape = tuple(np.shape(source[0][IMAGE]))
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise ValueError(f"image 0: shape {shape}; images must be [H, W, 1 or 3]")
    latent_grid = codec.latent_grid(shape)
    found = _grids(encoder, options, codec, shape, latent_grid)
    processes = process_index, process_count, timeout_s
    job = Job(
        source, encoder, options, codec, local_path(directory), *processes, shape, found, latent_grid, flip, check
    )
    _check_svd(job)
    return job


def _grids(
    encoder: Encoder | None, options: EncodingOptions, codec: OpenCodec, image_shape: Grid, latents: LatentGrid | None
) -> dict[str, Grid]:
    """feature -> (h, w, C); the shapes of the encoder's are traced."""
    found, outputs = codec.statistics(image_shape), {}
    if encoder is not None and not all(map(grids.is_codec_feature, options.features)):
        outputs = jax.eval_shape(encoder.features, jax.ShapeDtypeStruct((options.batch_size, *image_shape), np.uint8))
    for name in options.features:
        if not grids.is_codec_feature(name):
            found[name] = tuple(outputs[name].shape[1:])
        elif latents is None:
            raise ValueError(
                f"encoder.features: {name!r} given, but codec.name {codec.name!r} has no latents; take it out or set "
                "codec.name to a codec that has latents"
            )
        else:
            one = jax.ShapeDtypeStruct((1, *latents.shape), np.float32)
            found[name] = jax.eval_shape(functools.partial(grids.pool_feature, name=name), one).shape[1:]
    return found


def _check_svd(job: Job) -> None:
    """Refuses an SVD that the features do not allow."""
    options = job.options
    if options.svd not in SVD:
        raise ValueError(f"encoder.svd: {options.svd!r} given; choose from {', '.join(map(repr, SVD))}")
    if options.svd == "none" and not options.center:
        raise ValueError("encoder.center: False given, but with encoder.svd 'none' nothing is centred; leave it True")
    for name, (*_, components) in job.stored.items():
        height, width, channels = job.grids[name]
        if options.svd == "none" and components < job.channels(name):
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


def _made_from(job: Job) -> dict[str, Any]:
    """What the files depend on, by the config's names. Batch size and process count are not among it."""
    options = dataclasses.asdict(job.options)
    made = {f"encoder.{key}": options[key] for key in ("features", "components", "svd", "center", "fit_images")}
    made["encoder.shard_images"] = job.options.shard_images
    made |= {f"encoder.{key}": list(options[key]) for key in ("features", "components")}
    if job.encoder is not None and job.encoder_features:
        made |= {f"encoder.{key}": value for key, value in job.encoder.made_from.items()}
        made |= {"encoder.name": job.encoder.name, "encoder.weights_sha256": job.encoder.fingerprint}
    made |= {"codec.name": job.codec.name, **job.codec.made_from}
    if job.flip:
        made["data.flip"] = True
    made |= {"data.fingerprint": job.source.fingerprint, "data.num_images": len(job.source)}
    made |= {"data.num_classes": job.source.num_classes, "data.image_shape": list(job.image_shape)}
    return made


def claim_directory(job: Job) -> None:
    """Writes encoding.json, or compares it with the one that is there: ValueError names what differs."""
    path, made = job.directory / CLAIM_FILE, _made_from(job)
    text = json.dumps({"made_from": made, "fields": [field.to_json() for field in job.fields]}, indent=1)
    if not path.exists():
        unclaimed = sorted(file.name for file in job.directory.glob("*.array_record"))
        if unclaimed:
            raise ValueError(
                f"{job.directory}: holds {unclaimed[0]} but no {CLAIM_FILE} that says what made it; "
                "use another latents_dir or delete it"
            )
        if job.process_index == 0:
            atomic_write(path, text)
        wait_for(job, [path], f"{CLAIM_FILE} (process 0)")
    try:
        found = json.loads(path.read_text())["made_from"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete {job.directory} and encode again") from error
    differing = [key for key in sorted({*found, *made}) if found.get(key) != made.get(key)]
    if differing:
        pairs = "; ".join(f"{key} {found.get(key)}, config says {made.get(key)}" for key in differing)
        raise ValueError(f"latents in {job.directory} were made with {pairs}: use another latents_dir or delete it")


def is_complete(job: Job) -> bool:
    """Whether latents.json is there with every shard it lists; if a shard is gone, latents.json goes as well."""
    if not job.index_path.exists():
        return False
    for shard in records.read_index(job.directory)["shards"]:
        path = job.directory / shard["file"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            logging.warning("%s is missing or was cut: it is encoded again", path)
            path.unlink(missing_ok=True)
            job.index_path.unlink(missing_ok=True)
    return job.index_path.exists()


def wait_for(job: Job, paths: Sequence[pathlib.Path], what: str) -> None:
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


class Mergeable(Protocol):
    """Sums over a part of the data."""

    def merge(self, other: Any) -> Any: ...


Part = TypeVar("Part")
Sums = TypeVar("Sums", bound=Mergeable)


def save_parts(path: pathlib.Path, parts: Mapping[str, Any]) -> None:
    """Writes {name: dataclass of arrays} to one .npz, whole or not at all, under "name/field"."""
    arrays = {
        f"{name}/{field.name}": getattr(part, field.name)
        for name, part in parts.items()
        for field in dataclasses.fields(part)
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def load_parts(path: pathlib.Path, kind: type[Part], prefix: str = "") -> dict[str, Part]:
    """The inverse of save_parts, for the parts under `prefix`, all of the dataclass `kind`."""
    with np.load(path, allow_pickle=False) as archive:
        names = dict.fromkeys(key.rpartition("/")[0] for key in archive.files if key.startswith(prefix))
        fields = inspect.signature(kind).parameters
        return {
            name.removeprefix(prefix): kind(*(archive[f"{name}/{field}"][()] for field in fields)) for name in names
        }


def merge_parts(paths: Sequence[pathlib.Path], kind: type[Sums]) -> dict[str, Sums]:
    """{name: the parts of all files merged, in the order of `paths`}."""
    total = load_parts(paths[0], kind)
    for path in paths[1:]:
        part = load_parts(path, kind)
        total = {name: total[name].merge(part[name]) for name in total}
    return total
