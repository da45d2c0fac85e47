"""Tensors of PyTorch checkpoints (.pth) as numpy arrays, without torch and without running what the file says.

Two layouts are read. The zip of torch >= 1.6 has the members `<name>/data.pkl` and `<name>/data/<key>`, one per
storage; in an archive of TorchScript, modules are objects of classes `__torch__...`, whose state is read and whose code
is not. The legacy stream has four pickles (magic number, protocol 1001, system facts, the object), a pickled list of
storage keys, then for each key an int64 element count and the raw bytes.

A pickle is a program. Here it can build dicts, lists, numbers, strings and *descriptions* of tensors, and nothing else:
every global that it names is looked up in a short table (never imported), and one that is not in the table is refused
by name. Storages are read only after the pickle has ended, and every offset and stride is checked against the bytes
that exist. Tensors are views of the file, which is mapped into memory; the checksums of a zip's members are verified.

A small file cannot become a large object: the pickle's memo is at most as long as the pickle, compressed members must
have the expected size, and ITEMS bounds the containers that few bytes can make by sharing.
"""

import collections
import dataclasses
import io
import itertools
import math
import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from typing import IO

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
LIMIT = 2**40  # elements in a tensor; a stride of 0 could claim any number of them
ITEMS = 2**22  # items of containers that are visited
PICKLE_BYTES = 2**24  # a compressed pickle may be larger than the whole file up to here
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bf16", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat run of numbers somewhere in the file: dtype 'f4' ... or 'bf16', its key there, its element count."""

    dtype: str
    key: str
    size: int

    @property
    def numpy_dtype(self) -> np.dtype:
        return BFLOAT16 if self.dtype == "bf16" else np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        return self.size * self.numpy_dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for an object whose content is not needed (argparse.Namespace, numpy scalars); it ignores all content."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def swallow(self, *content):
        pass

    __setstate__ = __setitem__ = append = extend = swallow


class _ScriptModule(_Inert):
    """Stands for a module of TorchScript: its attributes, including tensors and other modules, but no code."""

    __slots__ = ("attributes",)

    def __init__(self, *args, **kwargs):
        self.attributes = {}

    def __setstate__(self, state):
        self.attributes = state


_INERT = {
    ("_codecs", "encode"), ("numpy", "dtype"), ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"), ("torch", "device"),
}  # fmt: skip
_DTYPES = {
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
}  # fmt: skip
# Packages whose objects are options: of a training script, of Lightning (its callbacks and hyper-parameters, in Stable
# Diffusion's own files), of ml-mdm (older files have its modules without their root).
_OPTIONS = {
    "argparse", "simple_parsing", "pathlib", "ml_mdm", "config", "models", "diffusion", "samplers", "reader",
    "language_models", "lightning", "lightning_fabric", "pytorch_lightning",
}  # fmt: skip
_SCRIPT_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


class _Refused(ValueError):
    """The pickle is readable and asks for something that is not allowed."""


class _Unpickler(pickle.Unpickler):
    """Builds containers and descriptions of tensors, refuses every other global by name, and records the storages."""

    def __init__(self, stream):
        super().__init__(stream)
        self.storages = {}

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) in _INERT or module.split(".")[0] in _OPTIONS:
            return _Inert
        if module.split(".")[0] == "__torch__":
            return _ScriptModule
        if module == "torch.jit._pickle" and name in _SCRIPT_LISTS:
            return self.first
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self.tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): self.first,
        }
        if (module, name) not in known:
            raise _Refused(
                f"its pickle asks for {f'{module}.{name}'!r}, which no plain checkpoint needs; nothing was run. "
                "Get the file from a source you trust, or re-save its state_dict alone"
            )
        return known[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or dtype not in STORAGES.values() or view not in ([], [None]) or size < 0:
            raise _Refused(f"its pickle refers to unknown data ({kind!r}); re-save its state_dict with torch")
        self.storages[str(key)] = Storage(dtype, str(key), int(size))
        return self.storages[str(key)]

    def tensor(self, storage, offset, shape, strides, *_):
        if not isinstance(storage, Storage):
            raise _Refused("its pickle builds a tensor without a storage; the file is damaged")
        return Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))

    def first(self, data, *_):
        """A parameter or a typed list without what comes beside its data."""
        return data


def _unpickle(stream: IO[bytes]) -> tuple[object, dict[str, Storage]]:
    """(the object, the storages it refers to by key) of one pickle."""
    unpickler, start = _Unpickler(stream), stream.tell()
    try:
        for opcode, index, position in pickletools.genops(stream):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (index or 0) > (position or 0):
                raise _Refused(f"its pickle gives an object the number {index} at byte {position}; the file is hostile")
        stream.seek(start)
        return unpickler.load(), unpickler.storages
    except _Refused:
        raise
    except Exception as error:  # a pickle's opcodes can fail in any way: all of them mean a damaged or foreign file
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"its pickle cannot be read ({reason}); the file is truncated or foreign") from error


def _flatten(content) -> Iterator[tuple[str, Tensor]]:
    """Yields (dotted name, tensor) for every tensor in nested dicts, lists and modules, and leaves out the rest."""
    number = itertools.count()

    def walk(value, name):
        if next(number) == ITEMS:
            raise _Refused(f"its containers hold more than {ITEMS} items, shared ones again; the file is hostile")
        if isinstance(value, _ScriptModule):
            value = value.attributes
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                yield from walk(item, f"{name}.{key}" if name else str(key))

    yield from walk(content, "")


def _numbers(storage: Storage, raw: np.ndarray) -> np.ndarray:
    """The storage's elements, from its bytes."""
    if len(raw) != storage.nbytes:
        raise ValueError(
            f"truncated: storage {storage.key} should hold {storage.nbytes} bytes, found {len(raw)}; get the file again"
        )
    return raw.view(storage.numpy_dtype)


def _view(name: str, tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    """A read-only view of the tensor's elements. Raises ValueError if it would leave its storage."""
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    whole = all(0 <= number < LIMIT for number in (offset, *shape, *strides)) and math.prod(shape) < LIMIT
    sane = whole and len(shape) == len(strides)
    reach = sum((n - 1) * step for n, step in zip(shape, strides, strict=False)) + 1 if math.prod(shape) else 0
    if not sane or offset + reach > len(numbers):
        raise ValueError(
            f"tensor {name!r} (shape {shape}, strides {strides}, offset {offset}) leaves its storage of {len(numbers)} "
            "elements; the file is damaged"
        )
    step_bytes = [step * numbers.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, step_bytes, writeable=False)


def _require_little_endian(little: bool) -> None:
    if not little:
        raise ValueError("its numbers are big-endian, expected little-endian; re-save it on a little-endian machine")


def map_file(stream: IO[bytes]) -> np.ndarray:
    """Maps the bytes of an open file into memory, uint8 [size]; the system fills them when they are read.

    The file must not change while arrays made of them are in use."""
    return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _member(archive: zipfile.ZipFile, name: str, file_bytes: np.ndarray, limit: int) -> np.ndarray:
    """The bytes of a zip's member: a view of the file if they are stored uncompressed, otherwise a copy.

    Raises ValueError for a damaged member, and for a compressed one of more than `limit` bytes."""
    try:
        info = archive.getinfo(name)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"compression {info.compress_type}, expected none or deflate")
        with archive.open(info) as member:  # zipfile tests the member's local header and, at its end, the checksum
            if info.compress_type == zipfile.ZIP_DEFLATED:
                if info.file_size > limit:
                    raise ValueError(f"{info.file_size} bytes when decompressed, expected at most {limit}")
                return np.frombuffer(member.read(info.file_size), np.uint8)  # no more than that is decompressed
            while member.read(2**20):
                pass
    except Exception as error:  # zipfile and zlib each fail in their own way on a damaged member
        raise ValueError(f"member {name!r} is damaged ({error}); get the file again") from error
    header = file_bytes[info.header_offset : info.header_offset + 30]
    start = info.header_offset + 30 + int(header[26:30].view("<u2").sum())  # after the name and the extra field
    if info.file_size != info.compress_size or start + info.file_size > len(file_bytes):
        raise ValueError(f"member {name!r} is damaged: {info.file_size} bytes at {start}; get the file again")
    return file_bytes[start : start + info.file_size]


def _zip_parts(stream: IO[bytes]) -> tuple[object, Callable[[Storage], np.ndarray]]:
    try:
        archive = zipfile.ZipFile(stream)
    except Exception as error:  # mostly zipfile.BadZipFile; a damaged directory fails in other ways too
        raise ValueError(f"truncated or damaged: it begins as a zip, but {error}; get the file again") from error
    names = set(archive.namelist())
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a zip with {len(pickles)} members '*/data.pkl', expected 1: not a torch checkpoint")
    root = pickles[0].removesuffix("data.pkl")
    file_bytes = map_file(stream)

    def member(name: str, limit: int) -> np.ndarray:
        if root + name not in names:
            raise ValueError(f"the zip has no member {root + name!r}; the file is damaged, get it again")
        return _member(archive, root + name, file_bytes, limit)

    if root + "byteorder" in names:
        _require_little_endian(member("byteorder", len("little")).tobytes() == b"little")
    content, _ = _unpickle(io.BytesIO(member("data.pkl", max(PICKLE_BYTES, len(file_bytes))).tobytes()))
    return content, lambda storage: member(f"data/{storage.key}", storage.nbytes)


def _legacy_parts(stream: IO[bytes]) -> tuple[object, Callable[[Storage], np.ndarray]]:
    if _unpickle(stream)[0] != MAGIC or _unpickle(stream)[0] != PROTOCOL:
        raise ValueError("a pickle, but not torch's: the magic number or the protocol 1001 is missing")
    facts, _ = _unpickle(stream)
    _require_little_endian(isinstance(facts, dict) and facts.get("little_endian") is True)
    content, storages = _unpickle(stream)
    keys, _ = _unpickle(stream)
    if not isinstance(keys, list) or not storages.keys() <= set(map(str, keys)):
        raise ValueError("its list of storages does not have all its tensors use; the file is damaged, get it again")
    file_bytes, raw = map_file(stream), {}
    for key in map(str, keys):
        count = int.from_bytes(stream.read(8), "little", signed=True)
        storage, start = storages.get(key), stream.tell()
        if storage is None or count != storage.size or len(file_bytes) - start < storage.nbytes:
            raise ValueError(f"truncated or damaged: {storage} has {count} elements and {len(file_bytes) - start} bytes"
                             " left in the file; get the file again")  # fmt: skip
        raw[key] = file_bytes[start : start + storage.nbytes]
        stream.seek(storage.nbytes, 1)
    return content, lambda storage: raw[storage.key]


def read_stream(stream: IO[bytes]) -> dict[str, np.ndarray]:
    """Reads the tensors of an open binary .pth file by their dotted names. Raises ValueError as described above."""
    start = stream.read(4)
    stream.seek(0)
    if start == b"PK\x03\x04":
        content, raw = _zip_parts(stream)
    elif start[:1] == b"\x80":
        content, raw = _legacy_parts(stream)
    else:
        start = stream.read(24)
        raise ValueError(f"not a torch checkpoint: it begins with {start!r}, expected a zip or torch's legacy stream; "
                         "a web page or another format was saved under this name? Get it again")  # fmt: skip
    try:
        tensors = list(_flatten(content))
    except RecursionError as error:
        raise ValueError("its pickle holds a container within itself; the file is damaged or foreign") from error
    numbers, found = {}, {}
    for name, tensor in tensors:
        if name in found:
            raise ValueError(f"two tensors have the name {name!r}; the file is damaged")
        if tensor.storage not in numbers:
            numbers[tensor.storage] = _numbers(tensor.storage, raw(tensor.storage))
        found[name] = _view(name, tensor, numbers[tensor.storage])
    return found
