"""WebDataset tars: successive members with the same name up to the first dot are a sample.

    000123.jpg (jpeg, png, webp)  the image; or 000123.mp4 (avi, webp, gif), the clip
    000123.json                   its "caption", or another key
    000123.txt                    its caption, if there is no .json with that key

Bytes of a .txt that are not UTF-8 become U+FFFD; other members of a sample are ignored. The tars of a folder are its
shards, in the order of their names. A record is read at its place in its tar, so that every order costs the same on a
disk without a moving head. Places and captions are found once and kept (tars.py).
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from input_pipeline import clips, tars
from input_pipeline.decoded import JSON_ERRORS, Decoded, Texts, is_text, some
from input_pipeline.options import CaptionKeyOptions, ClipOptions, FileOptions, IndexOptions
from input_pipeline.sources import fingerprint_of
from input_pipeline.transforms import DECODE_ERRORS, check_channels, decode_image

WALK_THREADS = 8
LOG_EVERY = 30  # seconds


class _Shards(Decoded):
    """Samples of the tars in a folder; a subclass says whether they are images or clips.

    A sample without an image (or clip) or without a caption is left out and named in the log. More than max_bad_images
    of them are an error, which counts and names them. The same limit holds for those that cannot be decoded, see
    decoded.py.

    Args:
      options: of the data; tars are found in the folder itself, not below it.
      reading: what decode() depends on, for the fingerprint.

    shard_ends: where the examples of each tar end.

    Raises: FileNotFoundError for an absent folder; ValueError for a folder without tars or samples, tars that are cut
      off or damaged, members whose path leads out of its folder, samples that come twice in a tar, and too many
      incomplete samples.
    """

    SUFFIXES: tuple[str, ...]

    def __init__(self, options: "WebDataset | WebDatasetClips", reading: tuple[str, ...]):
        caption_key, max_bad = options.caption_key, options.max_bad_images
        self.root = pathlib.Path(options.path).expanduser().absolute()
        where = "set config.data.path to the folder of the tars"
        if not self.root.is_dir():
            raise FileNotFoundError(f"no directory {self.root}: {where}")
        shards = sorted(self.root.glob("*.tar"))
        if not shards:
            raise ValueError(f"no *.tar in {self.root}: {where}")
        self._shards = [shard.name for shard in shards]
        made_from = ("webdataset", caption_key, *self.SUFFIXES, *map(tars.state_of, shards))
        index = tars.read_or_make_index(options.index_dir, made_from, lambda: _walk(shards, self.SUFFIXES, caption_key))
        self._places = index["places"]  # int64 [N, 3]: shard, offset, size
        self._names = Texts(index["names"], index["name_ends"])
        self._refuse_incomplete(index["incomplete"].astype(str).tolist(), max_bad)
        if not len(self._names):
            raise ValueError(f"no samples with a .{' or .'.join(self.SUFFIXES)} and a caption in {self.root}: {where}")
        self.shard_ends = np.searchsorted(self._places[:, 0], np.arange(len(shards)), side="right")
        sizes = (f"{shard.name}:{shard.stat().st_size}" for shard in shards)
        self.fingerprint = fingerprint_of((*reading, caption_key, *sizes))
        captions = Texts(index["text"], index["text_ends"])
        super().__init__(f"samples in {self.root}", len(self._names), max_bad=max_bad, captions=captions)

    def _refuse_incomplete(self, names: list[str], max_bad: int) -> None:
        if len(names) > max_bad:
            raise ValueError(
                f"{len(names)} samples in {self.root} lack a part, data.max_bad_images is {max_bad}: {some(names)}; "
                "complete or remove them"
            )
        if names:
            logging.warning("%d samples in %s are left out: %s", len(names), self.root, some(names))

    def name(self, index: int) -> str:
        return f"{self._shards[self._places[index, 0]]}/{self._names[index]}"

    def data(self, index: int) -> Any:
        """The bytes of the image or clip."""
        shard, offset, size = self._places[index].tolist()
        return tars.read(self.root / self._shards[shard], offset, size)

    def describe(self) -> str:
        return f"{self.NOUN}s of {len(self._shards)} tars in {self.root}: {len(self)} samples, {self.kind}"


@dataclass(frozen=True, kw_only=True)
class WebDataset(FileOptions, IndexOptions, CaptionKeyOptions):
    """Images with captions, of the tars in a folder. open() raises: as _Shards; ValueError for other channels."""

    def open(self) -> "WebDatasetSource":
        return WebDatasetSource(self)


class WebDatasetSource(_Shards):
    """An opened WebDataset."""

    NOUN, A_NOUN = "image", "an image"
    ERRORS = DECODE_ERRORS
    SUFFIXES = ("jpg", "jpeg", "png", "webp")

    def __init__(self, options: WebDataset):
        check_channels(options.channels)
        self.channels = options.channels
        super().__init__(options, (str(options.channels),))

    @property
    def image_shape(self) -> tuple[None, None, int]:
        return (None, None, self.channels)

    def decode(self, data: bytes) -> np.ndarray:
        return decode_image(data, self.channels)


@dataclass(frozen=True, kw_only=True)
class WebDatasetClips(ClipOptions, IndexOptions, CaptionKeyOptions):
    """Clips with captions, of the tars in a folder. open() raises: as _Shards and ClipFolder."""

    def open(self) -> "WebDatasetClipsSource":
        return WebDatasetClipsSource(self)


class WebDatasetClipsSource(_Shards):
    """An opened WebDatasetClips. OpenCV reads only files: an .mp4 is written to a temporary one."""

    NOUN, A_NOUN = "clip", "a clip"
    ERRORS = clips.CLIP_ERRORS
    SUFFIXES = ("mp4", "avi", "webp", "gif")

    def __init__(self, options: WebDatasetClips):
        self.frames, self.stride, self.channels = clips.check_clips(options)
        super().__init__(options, clips.fingerprint_parts(options))
        clips.require_opencv(self._names, self.root)

    @property
    def image_shape(self) -> tuple[int, None, None, int]:
        return (self.frames, None, None, self.channels)

    def data(self, index: int) -> Any:
        """The bytes of an animation, or an open temporary file with a video."""
        data, name = super().data(index), self._names[index]
        if not clips.is_video(name):
            return data
        file = tempfile.NamedTemporaryFile(suffix=pathlib.PurePosixPath(name).suffix)  # noqa: SIM115  decode() closes it
        file.write(data)
        file.flush()
        return file

    def decode(self, data: Any) -> np.ndarray:
        how = (self.frames, self.stride, self.channels)
        if isinstance(data, bytes):
            return clips.decode_clip(data, *how)
        with data:
            return clips.decode_clip(pathlib.Path(data.name), *how)

    def describe(self) -> str:
        return f"{super().describe()}, {self.frames} frames at stride {self.stride}"


def _walk(shards: list[pathlib.Path], suffixes: tuple[str, ...], caption_key: str) -> dict[str, np.ndarray]:
    """The index of all shards.

    The samples of each tar become arrays at once, because millions of them as Python objects take 10 GB.
    """
    with ThreadPoolExecutor(WALK_THREADS) as pool:
        walks = pool.map(lambda shard: _samples(shard, suffixes, caption_key), shards)
        found = list(_with_progress(walks, len(shards)))
    names, texts = (Texts.joined([part[key] for part in found]) for key in ("names", "texts"))
    return {
        "names": names.data,
        "name_ends": names.ends,
        "places": np.concatenate([np.insert(part["places"], 0, shard, axis=1) for shard, part in enumerate(found)]),
        "text": texts.data,
        "text_ends": texts.ends,
        "incomplete": tars.names_array(name for part in found for name in part["incomplete"]),
    }


def _with_progress(walks: Iterable[dict], number: int) -> Iterator[dict]:
    """Yields the walks, and logs the progress every LOG_EVERY seconds."""
    start = last_logged = time.monotonic()
    for done, walk in enumerate(walks, 1):
        now = time.monotonic()
        if now - last_logged >= LOG_EVERY:
            last_logged, left = now, (now - start) * (number - done) / done / 60
            logging.info("%d of %d tars indexed, %.1f minutes to go", done, number, left)
        yield walk


def _samples(shard: pathlib.Path, suffixes: tuple[str, ...], caption_key: str) -> dict:
    """The samples of a tar.

    Returns: "names" of the images or clips, "places" int64 [N, 2] (offset, size) and "texts" of the complete samples;
      "incomplete": what the other samples lack.
    """
    complete, incomplete = [], []
    for key, parts in _grouped(shard).items():
        media = [parts[suffix] for suffix in suffixes if suffix in parts]
        caption = _caption(shard, parts, caption_key)
        if media and caption:
            complete.append((*media[0], caption))
        else:
            incomplete.append(f"{shard.name}/{key} (no {'caption' if media else f'.{suffixes[0]}'})")
    return {
        "names": Texts.encode(name for name, *_ in complete),
        "places": np.array([(offset, size) for _, offset, size, _ in complete], np.int64).reshape(-1, 2),
        "texts": Texts.encode(caption for *_, caption in complete),
        "incomplete": incomplete,
    }


def _grouped(shard: pathlib.Path) -> dict[str, dict[str, tuple[str, int, int]]]:
    """The members of a tar by sample: {sample: {suffix: (name, offset, size)}}."""
    samples: dict[str, dict] = {}
    last = None
    for name, offset, size in tars.members(shard):
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not stem:  # a hidden file, such as macOS adds
            continue
        if key in samples and key != last:
            raise ValueError(f"{shard}: sample {key!r} comes twice; give every sample a name of its own")
        last = key
        parts = samples.setdefault(key, {})
        if suffix.lower() in parts:
            raise ValueError(f"{shard}: {name!r} comes twice; give every sample a name of its own")
        parts[suffix.lower()] = (name, offset, size)
    return samples


def _caption(shard: pathlib.Path, parts: dict, key: str) -> str:
    """The caption of a sample; '' if it has none."""
    if "json" in parts:
        name, *place = parts["json"]
        data = tars.read(shard, *place)
        try:
            found = json.loads(data)
        except JSON_ERRORS as error:
            raise ValueError(f"{shard}: {name} is not JSON ({error}): make the tar again") from error
        if isinstance(found, dict) and isinstance(found.get(key), str):
            if not is_text(found[key]):
                raise ValueError(
                    f"{shard}: {name} has a {key!r} that UTF-8 cannot encode: {found[key]!r:.80}; correct it"
                )
            return found[key].strip()
    if "txt" in parts:
        return tars.read(shard, *parts["txt"][1:]).decode("utf-8", errors="replace").strip()
    return ""
