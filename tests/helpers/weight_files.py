"""Writes weight files as other frameworks lay them out, without those frameworks: pickle opcodes assembled by hand."""

import json
import pickle
import zipfile

import numpy as np

from nested.weights import torch_pickle


class Global(str):
    """'module name', pushed by the GLOBAL opcode."""


class Call:
    def __init__(self, function, *args):
        self.function, self.args = Global(function), args


class Stored:
    """A reference to a storage, by persistent id."""

    def __init__(self, dtype, key, size, *view):
        self.pid = ("storage", Global(f"torch {dtype}"), key, "cpu", size, *view)


def opcodes(value) -> bytes:
    match value:
        case Global():
            return b"c" + value.replace(" ", "\n").encode() + b"\n"
        case Call():
            return opcodes(value.function) + opcodes(value.args) + b"R"
        case Stored():
            return opcodes(value.pid) + b"Q"
        case dict():
            return b"}(" + b"".join(opcodes(part) for item in value.items() for part in item) + b"u"
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case _:
            return pickle.dumps(value, 2)[2:-1]


def pickled(value) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def tensor(dtype="FloatStorage", key="0", size=6, offset=0, shape=(2, 3), strides=(3, 1)):
    return Call("torch._utils _rebuild_tensor_v2", Stored(dtype, key, size), offset, shape, strides, False, {})


def write_zip(path, content, storages, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        for key, numbers in storages.items():
            archive.writestr(f"archive/data/{key}", numbers.tobytes())
        for name, text in extra:
            archive.writestr(name, text)


def write_state(path, state, around=lambda content: content):
    """A zip checkpoint of {name: float32 array}; around: what holds the state dict."""
    content, storages = {}, {}
    for key, (name, array) in enumerate(state.items()):
        strides = tuple(np.cumprod((1, *array.shape[:0:-1]))[::-1].tolist()) if array.ndim else ()
        content[name] = tensor(key=str(key), size=array.size, shape=array.shape, strides=strides)
        storages[str(key)] = np.ascontiguousarray(array)
    write_zip(path, around(content), storages)


def write_legacy(path, content, storages, keys=None, facts=None):
    facts = {"little_endian": True} if facts is None else facts
    head = [torch_pickle.MAGIC, torch_pickle.PROTOCOL, facts, content, list(storages) if keys is None else keys]
    data = [np.int64(len(numbers)).tobytes() + numbers.tobytes() for numbers in storages.values()]
    path.write_bytes(b"".join(map(pickled, head)) + b"".join(data))


def write_safetensors(path, tensors, changes=(), **metadata):
    header, offset = dict(metadata), 0
    dtypes = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": dtypes[array.dtype], "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    for name, entry in changes:
        header[name].update(entry)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))
