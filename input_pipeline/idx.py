"""MNIST, Fashion-MNIST and other sets in the same four idx files."""

import gzip
import math
import pathlib
import zlib
from dataclasses import dataclass

import numpy as np

from input_pipeline.in_memory import ImagesInMemory
from input_pipeline.options import SplitOptions

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
FILE_PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: pathlib.Path, ndim: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes, which is gzipped if its name ends in .gz.

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


@dataclass(frozen=True, kw_only=True)
class Idx(SplitOptions):
    """A split of MNIST, Fashion-MNIST or another set in the same four idx files, plain or .gz, held in memory.

    path: the folder of the files {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz].
    split: "train" or "test".
    num_classes: labels are in 0..num_classes - 1.
    class_names: one per label or (); FASHION_MNIST_CLASSES are Fashion-MNIST's.

    open() raises: FileNotFoundError for an absent folder or file, ValueError for another split, a damaged file and
      labels out of range.
    """

    num_classes: int = 10
    class_names: tuple[str, ...] = ()

    def open(self) -> ImagesInMemory:
        if self.split not in FILE_PREFIX:
            raise ValueError(f"split must be one of {sorted(FILE_PREFIX)}, found {self.split!r}")
        directory = pathlib.Path(self.path).expanduser().absolute()
        images = read_idx(_find(directory, f"{FILE_PREFIX[self.split]}-images-idx3-ubyte"), 3)
        labels = read_idx(_find(directory, f"{FILE_PREFIX[self.split]}-labels-idx1-ubyte"), 1)
        name = f"idx files {directory} ({self.split})"
        return ImagesInMemory(images[..., None], labels.astype(np.int32), self.num_classes, self.class_names, name)


def _find(directory: pathlib.Path, name: str) -> pathlib.Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no {name} or {name}.gz in {directory}: set config.data.path to the directory of the idx files "
        "(`apt-get install dataset-fashion-mnist` puts Fashion-MNIST in /usr/share/datasets/fashion-mnist)"
    )
