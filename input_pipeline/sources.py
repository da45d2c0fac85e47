"""Data sets as random access sources: source[i] -> {"image": uint8 [H, W, C], "label": int32[, "caption": str]}.

Every source is immutable, picklable (worker processes) and answers with the same record for the same i in every
process. A label is in 0..num_classes - 1. A source without labels has num_classes 0 and label 0, which is then the null
class (num_classes) of a model, so unconditional training needs no special case.

A caption is a text, or a tuple of texts of one image. draw(source, i, generator) is record i as training sees it, with
one of its texts drawn by the generator; source[i] has the first one (captions.py). A source whose records lie in
several files has `shard_ends`, for an order that reads one file after the other (loader.py). composition.py makes
sources of other sources.

Here are the sources that are held in memory. image_files.py (folders, TFDS), imagenet.py, coco.py, webdataset.py,
parquet.py and clips.py read files.

`fingerprint` identifies the content, 16 hex digits of a SHA-256: of the bytes where the source holds them all, of file
names and sizes where reading everything would cost hours. Latents keep it, to refuse another data set.
"""

import gzip
import hashlib
import math
import pathlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip


Record = dict[str, Any]  # of arrays, and a caption
Caption = str | tuple[str, ...]  # of a record: one text, or several of the same image


class Source(Protocol):
    """What the loader needs of a data set.

    A source may also have draw(index, generator), shard_ends and captions, which are the functions draw and shard_ends
    below and captions.captions where it does not.
    """

    @property
    def num_classes(self) -> int:
        """Number of labels, 0 for none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the content, in hex."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def describe(self) -> str:
        """One line for logs and errors."""
        ...


class ImageSource(Source, Protocol):
    """What the encoder needs of a data set of images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One per label, or ()."""
        ...

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """(H, W, C), of clips (T, H, W, C), with None for H and W where images differ in size."""
        ...

    def check(self) -> None:
        """Reads every record before a long job starts. Raises: ValueError, which names the damaged ones."""


def draw(source: Source, index: int, generator: np.random.Generator) -> Record:
    """Record `index` as training sees it, with whatever is random in it drawn by the generator.

    It is source[index] for a source that has no draw(index, generator), as nothing in its records is random.
    """
    drawn = getattr(source, "draw", None)
    return source[index] if drawn is None else drawn(index, generator)


def shard_ends(source: Source) -> np.ndarray | None:
    """Where the records of each shard end, int [shards]; None for a source without shards."""
    return getattr(source, "shard_ends", None)


def fingerprint_of(parts: Iterable[bytes | str]) -> str:
    """16 hex digits of the SHA-256 of the parts, each preceded by its length (so that "ab", "c" is not "a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False, repr=False)
class ImagesInMemory:
    """Images and labels held as two arrays.

    images_NHWC: uint8 [N, H, W, C]. labels_N: integers [N] in 0..num_classes - 1. name: for describe() and errors.
    Raises: ValueError for no images, numbers that differ, and a label out of range.
    """

    images_NHWC: np.ndarray
    labels_N: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self):
        if self.images_NHWC.dtype != np.uint8 or self.images_NHWC.ndim != 4:
            found = f"{self.images_NHWC.dtype} {self.images_NHWC.shape}"
            raise ValueError(f"{self.name}: images must be uint8 [N, H, W, C], found {found}")
        if len(self.images_NHWC) == 0:
            raise ValueError(f"{self.name}: the data set is empty")
        if self.labels_N.shape != (len(self.images_NHWC),):
            raise ValueError(f"{self.name}: {len(self.images_NHWC)} images but labels of shape {self.labels_N.shape}")
        if self.class_names and len(self.class_names) != self.num_classes:
            found = f"{len(self.class_names)} class names for {self.num_classes} classes"
            raise ValueError(f"{self.name}: {found}; give one name per class, or ()")
        wrong = np.flatnonzero((self.labels_N < 0) | (self.labels_N >= max(self.num_classes, 1)))
        if len(wrong):
            raise ValueError(
                f"{self.name}: label {self.labels_N[wrong[0]]} of example {wrong[0]} is out of range "
                f"0..{max(self.num_classes, 1) - 1} ({len(wrong)} such labels): set num_classes to the data's"
            )

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def __getitem__(self, index: int) -> Record:
        return {"image": self.images_NHWC[index], "label": np.int32(self.labels_N[index])}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images_NHWC.shape[1:]

    @cached_property
    def fingerprint(self) -> str:
        labels = np.ascontiguousarray(self.labels_N, dtype="<i4")
        shape = str(self.images_NHWC.shape)
        return fingerprint_of((shape, self.images_NHWC.tobytes(), labels.tobytes(), str(self.num_classes)))

    def describe(self) -> str:
        height, width, channels = self.image_shape
        return f"{self.name}: {len(self)} images {height}x{width}x{channels}, {self.num_classes} classes"

    def check(self) -> None:
        pass


class Digits(ImagesInMemory):
    """The 1,797 handwritten digits of scikit-learn, 8x8x1, grey levels 0..16 mapped to round(x * 255 / 16)."""

    def __init__(self):
        from sklearn.datasets import load_digits  # the one user of scikit-learn

        data = load_digits()
        images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
        names = tuple(str(digit) for digit in range(10))
        super().__init__(images, data.target.astype(np.int32), 10, names, "digits of scikit-learn")


def read_idx(path: pathlib.Path, ndim: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes, gzipped when its name ends in .gz.

    Layout: bytes 0, 0, 8 (unsigned byte), ndim; ndim big-endian 32-bit sizes; the values, last dimension fastest.
    Source: "the IDX file format", yann.lecun.com/exdb/mnist.

    Raises: ValueError (one line) for a broken gzip stream, another type or rank, or too few or many bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): copy it again") from error
    magic, header = bytes((0, 0, 8, ndim)), 4 + 4 * ndim
    if data[:4] != magic or len(data) < header:
        raise ValueError(
            f"{path} is not an idx file of {ndim} dimensions of bytes: it starts with 0x{data[:4].hex()}, "
            f"expected 0x{magic.hex()} and {header} bytes of header"
        )
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4))
    if len(data) - header != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(data) - header} values but its header says {shape}, {math.prod(shape)}: copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


class Idx(ImagesInMemory):
    """A split of MNIST, Fashion-MNIST or another set in the same four idx files, plain or .gz, held in memory.

    Args:
      directory: of the files {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz].
      split: "train" or "test".
      num_classes: labels are in 0..num_classes - 1.
      class_names: one per label or (); FASHION_MNIST_CLASSES are Fashion-MNIST's.

    Raises: FileNotFoundError for an absent directory or file, ValueError for a damaged one and for labels out of range.
    """

    FILE_PREFIX = {"train": "train", "test": "t10k"}

    def __init__(
        self, directory: str | pathlib.Path, split: str, *, num_classes: int = 10, class_names: tuple[str, ...] = ()
    ):
        if split not in self.FILE_PREFIX:
            raise ValueError(f"split must be one of {sorted(self.FILE_PREFIX)}, found {split!r}")
        directory = pathlib.Path(directory).expanduser().absolute()
        images = read_idx(self._find(directory, f"{self.FILE_PREFIX[split]}-images-idx3-ubyte"), 3)
        labels = read_idx(self._find(directory, f"{self.FILE_PREFIX[split]}-labels-idx1-ubyte"), 1)
        name = f"idx files {directory} ({split})"
        super().__init__(images[..., None], labels.astype(np.int32), num_classes, class_names, name)

    @staticmethod
    def _find(directory: pathlib.Path, name: str) -> pathlib.Path:
        for path in (directory / name, directory / f"{name}.gz"):
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"no {name} or {name}.gz in {directory}: set config.data.path to the directory of the idx files "
            "(`apt-get install dataset-fashion-mnist` puts Fashion-MNIST in /usr/share/datasets/fashion-mnist)"
        )


@dataclass(frozen=True)
class SyntheticLatents:
    """Latents of N(0, 1), a pure function of (seed, i): to train and to measure without data.

    levels: (name, shape) of each variable; record i holds name -> float32 array of that shape, and "label".
    num_examples: of one epoch. num_classes: labels are uniform in 0..num_classes - 1; 0 for none.
    text: (tokens, width) of features "text" with a "text_mask" that is all true; () for none.
    """

    levels: tuple[tuple[str, tuple[int, ...]], ...]
    num_examples: int
    num_classes: int
    seed: int
    text: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_examples < 1:
            raise ValueError(f"synthetic latents: num_examples must be at least 1, found {self.num_examples}")

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        generator = np.random.default_rng((self.seed, index))
        record = {"label": np.int32(generator.integers(max(self.num_classes, 1)))}
        for name, shape in self.levels:
            record[name] = generator.standard_normal(shape, dtype=np.float32)
        if self.text:
            record["text"] = generator.standard_normal(self.text, dtype=np.float32)
            record["text_mask"] = np.ones(self.text[0], bool)
        return record

    @property
    def fingerprint(self) -> str:
        return fingerprint_of((repr((self.levels, self.num_examples, self.num_classes, self.seed, self.text)),))

    def describe(self) -> str:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.levels)
        return f"synthetic latents: {len(self)} examples of {shapes}, {self.num_classes} classes"
