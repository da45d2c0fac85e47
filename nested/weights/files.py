"""Weight files of other code, read safely and without their frameworks; the mapping between torch and linen names.

`find_weight_files` names the files of a download, and the shards of an index. `read_tensors` returns the arrays of a
.npz, .safetensors or .pth file by their public names; nothing in a file is ever executed, and an array takes no memory
before it is used. `load_network` finds one network among them, whatever wraps it; `check_tensors` accounts for each of
its tensors. `write_safetensors` writes a .safetensors file.

`from_torch` and `to_torch` follow one rule. A linen module has the name of the public module; a list index is joined to
it with an underscore ('in_blocks.0' is 'in_blocks_0', 'down_levels.0.1' is 'down_levels_0_1'). The names of leaves
depend on the layer:
    Dense, Conv  kernel     <-  weight, (out, in, *window) -> (*window, in, out)
    LayerNorm, GroupNorm  scale  <-  weight
    Embed        embedding  <-  weight
    HDiT's RMSNorm, attention  gain  <-  scale
    others (bias, pos_embed, ...)  keep their names

safetensors: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data
(https://huggingface.co/docs/safetensors); the data must cover the rest of the file without gaps.
"""

import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np
from absl import logging

from nested.runtime.files import atomic_write
from nested.weights import torch_pickle

Tree = Any
KeyPath = tuple[Any, ...]  # of jax.tree_util.tree_flatten_with_path through nested dicts
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # .tar: MoCo-v3's .pth.tar, which is no archive
SAVED_NAMES = (  # of a folder that a library saved a model to, the preferred first
    ("model", ".safetensors"), ("diffusion_pytorch_model", ".safetensors"), ("pytorch_model", ".bin"),
    ("diffusion_pytorch_model", ".bin"),
)  # fmt: skip
HEADER_BYTES = 100_000_000  # of a .safetensors, the format's own limit
_SAFETENSORS_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": torch_pickle.BFLOAT16, "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


def find_weight_files(path: str | os.PathLike) -> list[str]:
    """Finds the weight files of a download.

    Args:
      path: a file, or the folder that a library saved a model to. In a folder, for each of SAVED_NAMES in order, these
        are tried: the shards that an index ('model.safetensors.index.json') lists, model.safetensors, and all files
        model*.safetensors.
    Returns: the absolute paths.
    Raises: in one line, FileNotFoundError if there are none or a shard is missing; ValueError for a damaged index, or
      one that names a file outside of its folder.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    if not folder.is_dir():
        return [_existing(folder)]
    for stem, suffix in SAVED_NAMES:
        if (index := folder / f"{stem}{suffix}.index.json").is_file():
            return _indexed(index)
        whole = folder / f"{stem}{suffix}"
        found = [whole] if whole.is_file() else sorted(folder.glob(f"{stem}*{suffix}"))
        if found:
            return list(map(str, found))
    wanted = ", ".join(f"{stem}*{suffix}" for stem, suffix in SAVED_NAMES)
    raise FileNotFoundError(f"{folder}: no weight file in it ({wanted}); give the folder or the file of the weights")


def _indexed(index: pathlib.Path) -> list[str]:
    """The shards that an index names; all of them exist."""
    try:
        names = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"{index}: not an index of weight files ({reason}); get it again") from error
    if not names:
        raise ValueError(f"{index}: lists no weight files; get it again")
    for name in names:
        if not isinstance(name, str) or name in ("", "..") or pathlib.PurePath(name).name != name:
            raise ValueError(f"{index}: names the shard {name!r}, expected a file of its own folder; get it again")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name}: this shard is missing, {index.name} lists {len(names)}; "
                                    "get the whole folder")  # fmt: skip
    return [str(index.parent / name) for name in sorted(names)]


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays in a weight file by their public names, in the dtypes they are stored in.

    Arrays are read-only views of the file, which is mapped into memory: an array that is not used takes no memory, and
    the file must not change while one is in use. Arrays of a .npz, and those that a zip holds compressed, are copies.

    Args:
      path: .npz, .safetensors, or .pth / .pt / .bin / .ckpt / .tar (torch zip, TorchScript or legacy stream).
    Returns: {name: array}. Nested dicts are flattened with '.', so that a wrapper stays in the name, as in
      'state_dict.module.momentum_encoder.cls_token'. bfloat16 is that of ml_dtypes.
    Raises: in one line that names the file, FileNotFoundError; ValueError for an unknown suffix, for an empty,
      truncated, damaged or foreign file, for one without tensors, and for a pickle that asks for code, which is named
      and not run.
    """
    path = _existing(path)
    suffix = os.path.splitext(path)[1]
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    readers |= dict.fromkeys(TORCH_SUFFIXES, torch_pickle.read_stream)
    if suffix not in readers:
        raise ValueError(f"{path}: unknown kind of weight file {suffix!r}, expected one of {', '.join(readers)}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the weight file is empty (0 bytes); get it again")
    try:
        with open(path, "rb") as stream:
            found = readers[suffix](stream)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not found:
        raise ValueError(f"{path}: the weight file has no tensors; give the file of the network's weights")
    return found


# The words that public files use for weights that were averaged during training.
AVERAGED = ("model_ema", "nnet_ema", "ema", "teacher", "momentum_encoder")


def load_network(
    paths: Sequence[str | os.PathLike],
    anchor: str | Sequence[str],
    *,
    prefix: str = "",
    prefer: Sequence[str] = AVERAGED,
    unused: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Finds one network in a weight file, or in the shards of one, whatever wraps it there.

    Args:
      paths: the file or the shards.
      anchor: the name of a tensor that the network has, such as 'cls_token'. The part of the name before it in the file
        ('state_dict.module.momentum_encoder.') is the wrapper. If different files have different names for the tensor,
        give all of them; the first one that the file has counts.
      prefix: the wrapper to take, '.' for no wrapper; '' finds it.
      prefer: if there are several wrappers, the one that has the earliest of these words among its parts is taken.
      unused: starts of names, without the wrapper, that the network does not need.
    Returns: {name without the wrapper: array} of the tensors with that wrapper.
    Raises: in one line, what read_tensors raises; ValueError if no tensor has the anchor's name, or if several networks
      have it and none is preferred (they are listed to choose from).
    """
    tensors, where = {}, os.fspath(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    for path in paths:
        part = read_tensors(path)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(f"{where}: {_some(twice)} in more than one shard; the files are not of one download")
        tensors |= part
    anchors = (anchor,) if isinstance(anchor, str) else tuple(anchor)
    behind = {f".{name}" for name in tensors}
    present = (name for name in anchors if any(found.endswith(f".{name}") for found in behind))
    wrapper, others = _wrapper(list(tensors), next(present, anchors[0]), prefix, prefer, where)
    kept = (name for name in tensors if name.startswith(wrapper) and not name.startswith(others))
    inside = {name.removeprefix(wrapper): tensors[name] for name in kept}
    return {name: array for name, array in inside.items() if not name.startswith(unused)}


def _wrapper(names: list[str], anchor: str, prefix: str, prefer: Sequence[str], where: str) -> tuple[str, tuple]:
    """(the wrapper to take, the wrappers of other such networks inside it)."""
    found = [name.removesuffix(anchor) for name in names if f".{name}".endswith(f".{anchor}")]
    shown = _some(repr(wrapper or ".") for wrapper in found)
    if not found:
        raise ValueError(f"{where}: no tensor is called {anchor!r}, with or without a prefix; it has {_some(names)}")
    if prefix:
        chosen = [wrapper for wrapper in found if wrapper.rstrip(".") == prefix.rstrip(".")]
        if not chosen:
            raise ValueError(f"{where}: no {prefix.rstrip('.') + '.' + anchor!r}; the file has it behind {shown}")
    else:
        by_word = ([wrapper for wrapper in found if word in wrapper.split(".")] for word in prefer)
        chosen = found if len(found) == 1 else next((some for some in by_word if len(some) == 1), [])
        if not chosen:
            raise ValueError(f"{where}: holds more than one such network: give one of {shown} as prefix")
        if len(found) > 1:
            logging.info("%s: takes the weights behind %r, of %s", where, *chosen, shown)
    return chosen[0], tuple(other for other in found if other != chosen[0] and other.startswith(chosen[0]))


def check_tensors(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple], what: str) -> dict[str, np.ndarray]:
    """Checks that tensors are exactly those of a network, and returns them in the network's order.

    Args:
      tensors: {name: array}.
      shapes: {name: shape} of every tensor of the network.
      what: the beginning of the error.
    Raises: ValueError, in one line, if a tensor is missing, unknown or of another shape: the first one is named with
      what was expected, and all are counted."""
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
    """The hex digest of a file's bytes, which identifies the weights that made a set of latents."""
    with open(_existing(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _existing(path: str | os.PathLike) -> str:
    path = os.path.expanduser(os.fspath(path))
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path}: a folder, expected a weight file; give the file in it")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such weight file; check the path in the config or download the file")
    return path


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def _read_npz(stream: BinaryIO) -> dict[str, np.ndarray]:
    start = stream.read(24)
    stream.seek(0)
    if not start.startswith(b"PK\x03\x04"):
        raise ValueError(f"not an .npz file: it begins with {start!r}, expected a zip; get it again")
    found, name = {}, "directory"
    try:
        with np.load(stream, allow_pickle=False) as archive:
            for name in archive.files:
                found[name] = archive[name]
            return found
    except Exception as error:  # zipfile, zlib and numpy each fail in their own way on a damaged member
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"cannot read {name!r} of the .npz ({reason}); it is truncated, damaged or pickled") from error


def _safetensors_header(stream: BinaryIO) -> tuple[dict[str, dict], dict[str, str], int, int]:
    """(entries by name, metadata, where the data starts, the file's size) with the lengths checked."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"bad safetensors header: it claims {length} bytes, the file has {size}; foreign or truncated")
    if length > HEADER_BYTES:
        raise ValueError(f"bad safetensors header: {length} bytes, expected at most {HEADER_BYTES}; damaged or foreign")
    try:
        header = json.loads(stream.read(length))
        notes = dict(header.pop("__metadata__", {}))
        for entry in header.values():
            numbers = [*entry["shape"], *entry["data_offsets"]]
            if entry["dtype"] not in _SAFETENSORS_DTYPES or len(entry["data_offsets"]) != 2:
                raise ValueError(f"dtype {entry['dtype']!r}, expected one of {', '.join(_SAFETENSORS_DTYPES)}")
            if not all(type(number) is int and 0 <= number < torch_pickle.LIMIT for number in numbers):
                raise ValueError(f"shape and offsets {numbers}, expected whole numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"bad safetensors header ({reason}); the file is damaged or foreign") from error
    return header, notes, 8 + length, size


def _read_safetensors(stream: BinaryIO) -> dict[str, np.ndarray]:
    entries, _, start, size = _safetensors_header(stream)
    data, found, end = torch_pickle.map_file(stream), {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        expected = [end, end + math.prod(shape) * dtype.itemsize]
        if entry["data_offsets"] != expected:
            raise ValueError(f"tensor {name!r} lies at {entry['data_offsets']}, expected {expected} from its shape "
                             f"{shape} and the tensor before it; the safetensors header is damaged")  # fmt: skip
        end = expected[1]
        if start + end <= size:
            found[name] = data[start + expected[0] : start + end].view(dtype).reshape(shape)
    if start + end != size:
        raise ValueError(f"truncated or damaged: the header describes {start + end} bytes, the file has {size}")
    return found


_WRITTEN_DTYPES = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes host arrays to a .safetensors file that is either complete or absent.

    metadata: strings, stored under '__metadata__'. Raises OSError, in one line, if the file cannot be written."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        dtype = _WRITTEN_DTYPES[array.dtype]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8 bytes
    data = (np.ascontiguousarray(array).tobytes() for array in tensors.values())
    atomic_write(path, itertools.chain([len(text).to_bytes(8, "little"), text], data))


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The '__metadata__' of a .safetensors file, or {}. Raises as read_tensors does."""
    path = _existing(path)
    with open(path, "rb") as stream:
        try:
            return _safetensors_header(stream)[1]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "gain": "scale"}


def _torch_name(path: KeyPath) -> str:
    """'in_blocks.0.attn.qkv.weight' for the linen path (in_blocks_0, attn, qkv, kernel)."""
    *modules, leaf = [str(entry.key) for entry in path]
    modules = [re.sub(r"(_\d+)+$", lambda indices: indices[0].replace("_", "."), module) for module in modules]
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def _to_torch_layout(path: KeyPath, array: np.ndarray) -> np.ndarray:
    """(*window, in, out) -> (out, in, *window) for kernels; everything else as it is."""
    window = range(array.ndim - 2)
    return array.transpose(array.ndim - 1, array.ndim - 2, *window) if path[-1].key == "kernel" else array


def _from_torch_layout(path: KeyPath, array: np.ndarray) -> np.ndarray:
    window = range(2, array.ndim)
    return array.transpose(*window, 1, 0) if path[-1].key == "kernel" and array.ndim >= 2 else array


def from_torch(tensors: Mapping[str, np.ndarray], template: Tree) -> dict:
    """Fills a tree of linen parameters from a state dict.

    Args:
      tensors: {name in torch: array}.
      template: nested dicts of arrays or jax.ShapeDtypeStruct.
    Returns: a tree like `template` of host arrays with the template's dtypes.
    Raises: ValueError that names all tensors that are missing, left over or of another shape, with the shapes found
      and expected in linen's layout.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    names = torch_names(template)
    missing = [name for name in names if name not in tensors]
    extra = sorted(set(tensors) - set(names))
    filled, misshapen = [], []
    for name, (path, leaf) in zip(names, leaves, strict=True):
        if name in tensors:
            array = _from_torch_layout(path, np.asarray(tensors[name]))
            if array.shape == tuple(leaf.shape):  # else it may be too large to be copied
                filled.append(array.astype(leaf.dtype))
            else:
                misshapen.append(f"{name} (found {array.shape}, expected {leaf.shape})")
    problems = [("missing", missing), ("unexpected", extra), ("of another shape", misshapen)]
    if any(wrong for _, wrong in problems):
        listed = "; ".join(f"{what}: {_some(wrong)}" for what, wrong in problems if wrong)
        raise ValueError(f"the weights do not fit the model. {listed}. Check the model's config against the weights'")
    return jax.tree.unflatten(treedef, filled)


def torch_names(template: Tree) -> list[str]:
    """The names that linen parameters have in torch, in the order of the tree's leaves."""
    return [_torch_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(template)[0]]


def to_torch(params: Tree) -> dict[str, np.ndarray]:
    """The state dict of linen parameters, or of gradients in the same tree: torch's names and layouts, host arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {_torch_name(path): _to_torch_layout(path, np.asarray(leaf)) for path, leaf in leaves}
