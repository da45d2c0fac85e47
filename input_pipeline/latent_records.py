"""Encoded images on disk: ArrayRecord shards of raw bytes, read back by random access.

A record is the concatenation of its fields in the order of the layout (latents.json "fields": name, dtype, shape),
little-endian, without padding: label first, then the feature grids, then the image, so that every field is aligned. If
both flips are stored, the name of a field of the mirrored image is that of the image's field followed by '.mirrored'.
Shards are written with 'group_size:1' (one record per block, so that random access reads only that record, 100 to 150
times faster than with large groups), and np.frombuffer views replace any decoding of records.
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  a C++ extension
from numpy.typing import ArrayLike

from input_pipeline.sources import Record

WRITER_OPTIONS = "group_size:1"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
INDEX_FILE = "latents.json"
MIRRORED = ".mirrored"  # the end of the name of a field of the mirrored image


def unflipped(record: Record) -> Record:
    """The record, or batch of records, without the fields of the mirrored image."""
    return {name: value for name, value in record.items() if not name.endswith(MIRRORED)}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the layout of a record. dtype: numpy's name of it, such as 'float16'."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_as(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        return self.count * self.stored_as.itemsize

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Field":
        return cls(entry["name"], entry["dtype"], tuple(entry["shape"]))


def pack(record: Mapping[str, ArrayLike], fields: Sequence[Field]) -> bytes:
    """{name: array} -> bytes. Raises: ValueError if the shape of an array is not that of its field."""
    parts = []
    for field in fields:
        array = np.asarray(record[field.name])
        if array.shape != field.shape:
            raise ValueError(f"record field {field.name!r}: shape {array.shape}, the layout says {field.shape}")
        parts.append(np.ascontiguousarray(array, field.stored_as).tobytes())
    return b"".join(parts)


def unpack(data: bytes, fields: Sequence[Field]) -> Record:
    """bytes -> {name: read-only array}, views of `data`."""
    record: Record = {}
    offset = 0
    for field in fields:
        record[field.name] = np.frombuffer(data, field.stored_as, field.count, offset).reshape(field.shape)
        offset += field.nbytes
    return record


def write_shard(path: str | os.PathLike, records: Iterable[bytes]) -> None:
    """Writes records to the shard `path`.

    They are written under a temporary name and flushed to the disk before the file is renamed, so that a half-written
    shard never has the name of a shard.

    Raises: OSError, in one line, if it cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        writer = _attempt(path, array_record_module.ArrayRecordWriter, str(temporary), WRITER_OPTIONS)
        try:
            for record in records:
                _attempt(path, writer.write, record)
            _attempt(path, writer.close)
        finally:
            with contextlib.suppress(RuntimeError):  # closing again is harmless; after a failure it fails again
                writer.close()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _attempt(path: pathlib.Path, call: Callable[..., Any], *arguments: Any) -> Any:
    """call(*arguments), with the error of array_record as an OSError that names the shard."""
    try:
        return call(*arguments)
    except RuntimeError as error:  # the only error that array_record raises
        raise OSError(f"{path}: shard not written: {str(error).splitlines()[0]}") from error


class LatentRecords:
    """The records of a finished latents directory, a source.

    Record i is {"label": int32, <feature>: float16 [h, w, K], "image": uint8 [H, W, C]}, read-only numpy views. If an
    autoencoder made the finest level, the moments of its latents, float16 [h, w, 2 c], take the place of the image. The
    object is picklable; readers are opened on first use.

    Args:
      directory: of the latents.
      fields: names of the fields to return; None for all.

    Raises, in one line: FileNotFoundError or ValueError if encoding was not finished, if a shard is missing or has
      another size than was written, or for an unknown field.
    """

    def __init__(self, directory: str | os.PathLike, fields: Iterable[str] | None = None):
        self.directory = pathlib.Path(directory).expanduser().absolute()
        index = read_index(self.directory)
        self.fingerprint = index["fingerprint"]
        self.num_classes = index["num_classes"]
        self.image_shape = tuple(index["image_shape"])
        self._layout = tuple(Field.from_json(entry) for entry in index["fields"])
        names = tuple(field.name for field in self._layout)
        self.fields = names if fields is None else tuple(fields)
        for name in self.fields:
            if name not in names:
                raise ValueError(f"{self.directory}: no field {name!r} in these latents, only {', '.join(names)}")
        self._shards = tuple(shard["file"] for shard in index["shards"])
        self._ends = tuple(itertools.accumulate(shard["records"] for shard in index["shards"]))
        for shard in index["shards"]:
            _check_shard(self.directory / shard["file"], shard["bytes"])
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def shard_ends(self) -> np.ndarray:
        """Where the records of each shard end (sources.py)."""
        return np.array(self._ends)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        record = unpack(self._reader(shard).read([index - first])[0], self._layout)
        return {name: record[name] for name in self.fields}

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:  # two threads may both open it, and either reader serves
            path = self.directory / self._shards[shard]
            self._readers[shard] = array_record_module.ArrayRecordReader(str(path), READER_OPTIONS)
        return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def describe(self) -> str:
        return f"{len(self):,} encoded images in {len(self._shards)} shard(s), {self.directory}"


def read_index(directory: str | os.PathLike) -> dict[str, Any]:
    """The content of latents.json.

    Raises, in one line: FileNotFoundError if encoding was not finished; ValueError for a damaged file.
    """
    path = pathlib.Path(directory).expanduser() / INDEX_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found: these latents were not (completely) encoded; run --mode=encode")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete the folder and run --mode=encode") from error


def _check_shard(path: pathlib.Path, nbytes: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != nbytes:
        state = "is missing" if found is None else f"has {found} bytes, {nbytes} were written"
        raise ValueError(f"{path}: shard {state}; run --mode=encode to make it again")
