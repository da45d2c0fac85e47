"""Data sets as random access sources: source[i] -> {"image": uint8 [H, W, C], "label": int32[, "caption": str]}.

Every source is immutable, picklable (worker processes) and answers with the same record for the same i in every
process. A label is in 0..num_classes - 1. A source without labels has num_classes 0 and label 0, which is then the null
class (num_classes) of a model, so unconditional training needs no special case.

A caption is a text, or a tuple of texts of one image. draw(source, i, generator) is record i as training sees it, with
one of its texts drawn by the generator; source[i] has the first one (captions.py). A source whose records lie in
several files has `shard_ends`, for an order that reads one file after the other (loader.py). composition.py makes
sources of other sources.

Here is the protocol; each source has a file of its own, with its options (options.py).

`fingerprint` identifies the content, 16 hex digits of a SHA-256: of the bytes where the source holds them all, of file
names and sizes where reading everything would cost hours. Latents keep it, to refuse another data set.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

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
