"""Encoded images on disk: ArrayRecord shards of raw bytes, read back by random access.

A record is the concatenation of its fields in the order of the layout (latents.json "fields": name, dtype, shape),
little-endian, without padding: label first, then the feature grids, then the image, so every field is aligned. Where
both flips are stored, a field of the mirrored image has the name of the image's with '.mirrored' behind it. Shards
are written with 'group_size:1' (one record per block: random access reads that record only; 100 to 150 times faster
than large groups) and np.frombuffer views replace any per-record decoding.
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib

import numpy as np
from array_record.python import array_record_module

WRITER_OPTIONS = "group_size:1"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
INDEX_FILE = "latents.json"
MIRRORED = ".mirrored"  # behind the name of a field: that of the mirrored image


def unflipped(record):
    """The record, or batch of records, without the fields of mirrored images."""
    return {name: value for name, value in record.items() if not name.endswith(MIRRORED)}


@dataclasses.dataclass(frozen=True)
class Field:
    name: str
    dtype: str
    shape: tuple

    @property
    def count(self):
        return math.prod(self.shape)

    @property
    def stored_as(self):
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self):
        return self.count * self.stored_as.itemsize

    def to_json(self):
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, entry):
        return cls(entry["name"], entry["dtype"], tuple(entry["shape"]))


def pack(record, fields):
    """{name: array} -> bytes. Raises ValueError where an array's shape is not the layout's."""
    parts = []
    for field in fields:
        array = np.asarray(record[field.name])
        if array.shape != field.shape:
            raise ValueError(f"record field {field.name!r}: shape {array.shape}, the layout says {field.shape}")
        parts.append(np.ascontiguousarray(array, field.stored_as).tobytes())
    return b"".join(parts)


def unpack(data, fields):
    """bytes -> {name: read-only array}, views of `data`."""
    record, offset = {}, 0
    for field in fields:
        record[field.name] = np.frombuffer(data, field.stored_as, field.count, offset).reshape(field.shape)
        offset += field.nbytes
    return record


def write_shard(path, records):
    """Writes byte strings to `path`: under a temporary name, flushed to the disk, then renamed, so that a half-written
    shard never has the name of a shard. Raises OSError in one line where it cannot be written."""
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


def _attempt(path, call, *arguments):
    try:
        return call(*arguments)
    except RuntimeError as error:  # array_record's only kind of error
        raise OSError(f"{path}: shard not written: {str(error).splitlines()[0]}") from error


class LatentRecords:
    """Random access over the records of a finished latents directory: [i] -> {"label": int32, <feature>: float16
    [h, w, K], "image": uint8 [H, W, C]} (read-only numpy views); in place of the image "sd_vae": float16 [h, w, 2 c],
    the moments of its latents, where an autoencoder is the codec. Picklable; readers are opened on first use.

    fields: names to return; None = all. Raises FileNotFoundError / ValueError in one line where the directory is not
    finished, a shard is missing or its size differs from what was written, or a field is unknown.
    """

    def __init__(self, directory, fields=None):
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
        self._readers = {}

    def __len__(self):
        return self._ends[-1]

    @property
    def shard_ends(self):
        """Where the records of each shard end (sources.py)."""
        return np.array(self._ends)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        shard = bisect.bisect_right(self._ends, i)
        first = self._ends[shard - 1] if shard else 0
        record = unpack(self._reader(shard).read([i - first])[0], self._layout)
        return {name: record[name] for name in self.fields}

    def _reader(self, shard):
        if shard not in self._readers:  # two threads may both open it: one reader is kept, either serves
            path = self.directory / self._shards[shard]
            self._readers[shard] = array_record_module.ArrayRecordReader(str(path), READER_OPTIONS)
        return self._readers[shard]

    def __getstate__(self):
        return {**self.__dict__, "_readers": {}}

    def describe(self):
        """One line."""
        return f"{len(self):,} encoded images in {len(self._shards)} shard(s), {self.directory}"


def read_index(directory):
    """latents.json of a finished directory, as a dict; FileNotFoundError in one line where encoding is not finished."""
    path = pathlib.Path(directory).expanduser() / INDEX_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found: these latents were not (completely) encoded; run --mode=encode")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete the folder and run --mode=encode") from error


def _check_shard(path, nbytes):
    found = path.stat().st_size if path.exists() else None
    if found != nbytes:
        state = "is missing" if found is None else f"has {found} bytes, {nbytes} were written"
        raise ValueError(f"{path}: shard {state}; run --mode=encode again to make it anew")
