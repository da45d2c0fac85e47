"""The classes of ImageNet's validation images, from ILSVRC2012_devkit_t12.tar.gz.

data/ILSVRC2012_validation_ground_truth.txt has one number (ILSVRC2012_ID, 1 to 1000) per image; data/meta.mat has a
struct array `synsets` that gives the WordNet id of each number. The .mat file has MATLAB's level 5: elements of a tag
(type and size, both uint32; data of at most four bytes lie within the tag) and data padded to a multiple of 8 bytes.
Only what such a struct array needs is read: compressed elements, struct, character and numeric matrices.

Source: "MAT-File Format", MathWorks, R2019b, chapter 1, "Level 5 MAT-File Format".
"""

import pathlib
import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8", 16: "u1"}
MATRIX, COMPRESSED = 14, 15
STRUCT_CLASS, CHAR_CLASS = 2, 4
MAX_BYTES = 64 << 20  # of a file of the kit, packed and unpacked: the real ones have less than 2 MB
ERRORS = (
    struct.error, zlib.error, KeyError, IndexError, ValueError, TypeError, OverflowError, RecursionError, StopIteration
)  # fmt: skip


def validation_wnids(path: pathlib.Path) -> list[str]:
    """The WordNet id of every validation image, in order.

    path: of ILSVRC2012_devkit_t12.tar.gz.

    Raises: ValueError, one line, for a damaged archive, one without the two files, and numbers without an id.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            files = {info.name: info for info in tar}
            content = {}
            for name in (TRUTH, META):
                found = [info for member, info in files.items() if member.endswith(name) and info.isreg()]
                if not found:
                    raise ValueError(f"it has no {name}")
                if found[0].size > MAX_BYTES:
                    raise ValueError(f"its {name} has {found[0].size:,} bytes, at most {MAX_BYTES:,} are read")
                member = tar.extractfile(found[0])
                content[name] = member.read() if member else b""
        wnid_of = synsets(content[META])
        numbers = [int(line) for line in content[TRUTH].split()]
        unknown = sorted({number for number in numbers if number not in wnid_of})
        if unknown:
            raise ValueError(f"{META} has no ILSVRC2012_ID {unknown[0]} ({len(unknown)} such)")
    except (tarfile.TarError, OSError, EOFError, *ERRORS) as error:
        raise ValueError(f"{path} is not ImageNet's development kit ({error}): copy it again") from error
    return [wnid_of[number] for number in numbers]


def synsets(mat: bytes) -> dict[int, str]:
    """{ILSVRC2012_ID: WordNet id} from the bytes of meta.mat. Raises: one of ERRORS if they are not such a file."""
    if mat[126:128] != b"IM":
        raise ValueError(f"{META} is not a little-endian MAT file of level 5")
    for kind, data in _elements(mat[128:]):
        if kind == COMPRESSED:
            kind, data = next(_elements(_unpacked(data)))
        if kind == MATRIX:
            name, value = _matrix(data)
            if name == "synsets":
                numbers, wnids = value["ILSVRC2012_ID"], value["WNID"]
                if not all(isinstance(wnid, str) for wnid in wnids):
                    raise TypeError("its WNID are not all texts")
                return {int(number[0]): wnid for number, wnid in zip(numbers, wnids, strict=True)}
    raise ValueError(f"{META} has no struct array named synsets")


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(data, MAX_BYTES)
    if not unpacker.eof:
        raise ValueError(f"{META} is cut off, or unpacks to more than {MAX_BYTES:,} bytes")
    return unpacked


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (type, bytes) of successive elements."""
    position = 0
    while position < len(data):
        kind, size = struct.unpack_from("<II", data, position)
        if kind >> 16:  # the short form: the size is the upper half of the first word
            yield kind & 0xFFFF, data[position + 4 : position + 4 + (kind >> 16)]
            position += 8
        else:
            yield kind, data[position + 8 : position + 8 + size]
            position += 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)


def _matrix(data: bytes) -> tuple[str, Any]:
    """(name, value) of a matrix.

    The value of a struct array is {field: [value of each element]}, of characters a str, of numbers a flat array, of
    other classes and of an empty matrix, an element without data, None.
    """
    if not data:
        return "", None
    parts = _elements(data)
    (_, flags), _, (_, name) = next(parts), next(parts), next(parts)
    kind, name = flags[0], name.decode()
    if kind == STRUCT_CLASS:
        (_, width), (_, names) = next(parts), next(parts)
        width = struct.unpack("<i", width)[0]
        fields = [names[i : i + width].split(b"\0")[0].decode() for i in range(0, len(names), width)]
        cells = [_matrix(cell)[1] for _, cell in parts]
        return name, {field: cells[i :: len(fields)] for i, field in enumerate(fields)}
    if 6 <= kind <= 15 or kind == CHAR_CLASS:
        stored_as, raw = next(parts)
        if kind == CHAR_CLASS:
            return name, raw.decode("utf-16-le" if stored_as in (4, 17) else "utf-8")
        return name, np.frombuffer(raw, np.dtype(NUMBERS[stored_as]).newbyteorder("<"))
    return name, None
