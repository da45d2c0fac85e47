"""Weight files of other code, read safely and without their frameworks, and the mapping between torch and linen names.

`read` returns flat public names for .npz, .safetensors and .pth files; nothing in a file is ever executed. `load` finds
one network among them, whatever wraps it, and `checked` accounts for every tensor of it.
`from_torch` and `to_torch` rest on one rule. A linen module carries the public module's name; a list index is joined
to it with an underscore ('in_blocks.0' is 'in_blocks_0', 'down_levels.0.1' is 'down_levels_0_1'). The leaf names differ
by layer:
    Dense, Conv  kernel     <-  weight, (out, in, *window) -> (*window, in, out)
    LayerNorm, GroupNorm  scale  <-  weight
    Embed        embedding  <-  weight
    HDiT's RMSNorm, attention  gain  <-  scale
    others (bias, pos_embed, ...)  by their own names
safetensors: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data
(https://huggingface.co/docs/safetensors); the data must cover the rest of the file without gaps.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging

from nested import torch_pickle

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_SAFETENSORS_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


def read(path: str | os.PathLike, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays in a weight file by their public names; bfloat16 comes back as float32, everything else as stored.

    path: .npz, .safetensors, or .pth / .pt / .bin / .ckpt (torch zip or legacy stream). Nested dicts are flattened
    with '.', so a wrapper stays in the name: 'state_dict.module.momentum_encoder.cls_token'.
    prefix: only the names that start with it are returned, without it. The whole of it, wrapper included.
    Errors, one line that names the file: FileNotFoundError; ValueError for an unknown suffix, an empty, truncated,
    damaged or foreign file, a pickle that asks for code (named, not run), a prefix that no name has.
    """
    path = _existing(path)
    suffix = os.path.splitext(path)[1]
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    readers |= {torch: torch_pickle.read_stream for torch in TORCH_SUFFIXES}
    if suffix not in readers:
        raise ValueError(f"{path}: unknown kind of weight file {suffix!r}, expected one of {', '.join(readers)}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the weight file is empty (0 bytes); get it again")
    try:
        with open(path, "rb") as stream:
            found, names = readers[suffix](stream, prefix)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not found:
        having = f"it has {_some(names)}" if names else "it has no tensors"
        raise ValueError(f"{path}: no tensor's name starts with {prefix!r}; {having}")
    return {name.removeprefix(prefix): array for name, array in found.items()}


# Weights that were averaged while training, by the words that public files have for them.
AVERAGED = ("model_ema", "nnet_ema", "ema", "teacher", "momentum_encoder")


def load(
    paths: Sequence[str | os.PathLike],
    anchor: str,
    *,
    prefix: str = "",
    prefer: Sequence[str] = AVERAGED,
    unused: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """The tensors of one network by its own names, from the file or the shards `paths`.

    anchor: a name that the network has, such as 'cls_token'; what stands before it in the file ('state_dict.module.
    momentum_encoder.') is the wrapper, and only what stands behind the same wrapper is returned, without it.
    prefix: the wrapper to take; '' finds it. Of several, the one is taken that has a word of `prefer` among its parts,
    the earlier word first. unused: starts of names (without the wrapper) that the network does not need.
    Raises, in one line: as read(); ValueError where nothing is called like the anchor, or two networks are and none is
    preferred (named, to choose from).
    """
    tensors, where = {}, os.fspath(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    for path in paths:
        part = read(path)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(f"{where}: {_some(twice)} in more than one shard; the files are not of one download")
        tensors |= part
    wrapper = _wrapper(list(tensors), anchor, prefix, prefer, where)
    inside = {name.removeprefix(wrapper): array for name, array in tensors.items() if name.startswith(wrapper)}
    return {name: array for name, array in inside.items() if not name.startswith(unused)}


def _wrapper(names: list[str], anchor: str, prefix: str, prefer: Sequence[str], where: str) -> str:
    found = [name.removesuffix(anchor) for name in names if f".{name}".endswith(f".{anchor}")]
    if prefix:
        wanted = prefix if prefix.endswith(".") else f"{prefix}."
        if wanted not in found:
            raise ValueError(f"{where}: no {wanted + anchor!r}; the file has it behind {_some(map(repr, found))}")
        return wanted
    if not found:
        raise ValueError(f"{where}: no tensor is called {anchor!r}, with or without a prefix; it has {_some(names)}")
    for word in prefer:
        preferred = [wrapper for wrapper in found if word in wrapper.split(".")]
        if len(preferred) == 1 and len(found) > 1:
            logging.info("%s: takes the weights behind %r, of %s", where, *preferred, _some(map(repr, found)))
            return preferred[0]
    if len(found) > 1:
        raise ValueError(f"{where}: holds more than one such network: give one of {_some(map(repr, found))} as prefix")
    return found[0]


def checked(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple], what: str) -> dict[str, np.ndarray]:
    """The tensors in the order of `shapes`, {name: shape} of all that the network has.

    Raises ValueError, one line that begins with `what`, where a tensor is missing, unknown or of another shape: the
    first is named with what was expected, and all are counted."""
    problems = [f"tensor {name!r} {tuple(shapes[name])} is missing" for name in shapes if name not in tensors]
    problems += [f"tensor {name!r} {tensors[name].shape} is unknown" for name in tensors if name not in shapes]
    problems += [
        f"tensor {name!r} has shape {tensors[name].shape}, expected {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if problems:
        more = f" ({len(problems)} such problems)" if len(problems) > 1 else ""
        raise ValueError(f"{what}: {problems[0]}{more}; give the file of the network that the config names")
    return {name: tensors[name] for name in shapes}


def sha256(path: str | os.PathLike) -> str:
    """The hex digest of a file's bytes: what identifies the weights that made a set of latents."""
    with open(_existing(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _existing(path: str | os.PathLike) -> str:
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such weight file; check the path in the config or download the file")
    return path


def _some(names, limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def _read_npz(stream, prefix: str) -> tuple[dict[str, np.ndarray], list[str]]:
    start = stream.read(24)
    stream.seek(0)
    if not start.startswith(b"PK\x03\x04"):
        raise ValueError(f"not an .npz file: it begins with {start!r}, expected a zip; get it again")
    found, name = {}, "directory"
    try:
        with np.load(stream, allow_pickle=False) as archive:
            for name in archive.files:
                if name.startswith(prefix):
                    found[name] = archive[name]
            return found, archive.files
    except Exception as error:  # zipfile, zlib and numpy each fail in their own way on a damaged member
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"cannot read {name!r} of the .npz ({reason}); it is truncated, damaged or pickled") from error


def _safetensors_header(stream, size: int) -> tuple[dict[str, dict], int]:
    """(entries by name, where the data starts) with the header's length checked against the file's."""
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"bad safetensors header: it claims {length} bytes, the file has {size}; foreign or truncated")
    try:
        header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for entry in entries.values():
            numbers = [*entry["shape"], *entry["data_offsets"]]
            if entry["dtype"] not in _SAFETENSORS_DTYPES or len(entry["data_offsets"]) != 2:
                raise ValueError(f"dtype {entry['dtype']!r}, expected one of {', '.join(_SAFETENSORS_DTYPES)}")
            if not all(type(number) is int and 0 <= number < torch_pickle.LIMIT for number in numbers):
                raise ValueError(f"shape and offsets {numbers}, expected whole numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"bad safetensors header ({reason}); the file is damaged or foreign") from error
    return entries, 8 + length


def _read_safetensors(stream, prefix: str) -> tuple[dict[str, np.ndarray], list[str]]:
    size = os.fstat(stream.fileno()).st_size
    entries, start = _safetensors_header(stream, size)
    found, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        expected = [end, end + math.prod(shape) * dtype.itemsize]
        if entry["data_offsets"] != expected:
            raise ValueError(f"tensor {name!r} lies at {entry['data_offsets']}, expected {expected} from its shape "
                             f"{shape} and the tensor before it; the safetensors header is damaged")  # fmt: skip
        end = expected[1]
        if name.startswith(prefix) and start + end <= size:
            stream.seek(start + expected[0])
            array = np.frombuffer(stream.read(end - expected[0]), dtype).reshape(shape)
            bfloat16 = entry["dtype"] == "BF16"
            found[name] = (array.astype("<u4") << 16).view("<f4") if bfloat16 else array
    if start + end != size:
        raise ValueError(f"truncated or damaged: the header describes {start + end} bytes, the file has {size}")
    return found, list(entries)


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "gain": "scale"}


def _torch_name(path) -> str:
    """'in_blocks.0.attn.qkv.weight' for the linen path (in_blocks_0, attn, qkv, kernel)."""
    *modules, leaf = [entry.key for entry in path]
    modules = [re.sub(r"(_\d+)+$", lambda indices: indices[0].replace("_", "."), module) for module in modules]
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def _to_torch_layout(path, array):
    """(*window, in, out) -> (out, in, *window) for kernels; everything else as it is."""
    window = range(array.ndim - 2)
    return array.transpose(array.ndim - 1, array.ndim - 2, *window) if path[-1].key == "kernel" else array


def _from_torch_layout(path, array):
    window = range(2, array.ndim)
    return array.transpose(*window, 1, 0) if path[-1].key == "kernel" and array.ndim >= 2 else array


def from_torch(tensors: Mapping[str, np.ndarray], template) -> dict:
    """The tree of `template` (linen params as nested dicts of arrays or jax.ShapeDtypeStruct) filled from a state dict.

    Arrays are cast to the template's dtypes and stay on the host. A tensor that is missing, left over or of another
    shape is a ValueError that names all of them, with the shapes found and expected in linen's layout.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    names = [_torch_name(path) for path, _ in leaves]
    missing = [name for name in names if name not in tensors]
    extra = sorted(set(tensors) - set(names))
    filled, misshapen = [], []
    for name, (path, leaf) in zip(names, leaves, strict=True):
        if name in tensors:
            array = _from_torch_layout(path, np.asarray(tensors[name]))
            filled.append(array.astype(leaf.dtype))
            if array.shape != tuple(leaf.shape):
                misshapen.append(f"{name} (found {array.shape}, expected {leaf.shape})")
    problems = [("missing", missing), ("unexpected", extra), ("of another shape", misshapen)]
    if any(wrong for _, wrong in problems):
        listed = "; ".join(f"{what}: {_some(wrong)}" for what, wrong in problems if wrong)
        raise ValueError(f"the weights do not fit the model. {listed}. Check the model's config against the weights'")
    return jax.tree.unflatten(treedef, filled)


def to_torch(params) -> dict[str, np.ndarray]:
    """The state dict (torch names and layouts, host arrays) of linen params, or of gradients with the same tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {_torch_name(path): _to_torch_layout(path, np.asarray(leaf)) for path, leaf in leaves}
