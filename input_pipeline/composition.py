"""Sources made of another source: its records mapped, a subset of them, or its records kept in memory.

Whatever happens to a record between its file and the loader is a RecordMap; Mapped applies a tuple of them:

    Resize         crops, resizes and converts "image"                                 transforms.py
    AddCaptions    adds "caption", found by the record's number                        captions.py
    DrawCaption    replaces several texts of one image by one of them                  captions.py
    Tokenize       replaces "caption" by token ids                                     captions.py
    LookUpText     replaces "caption" by the stored features of a text encoder         captions.py
    SelectFields   keeps the named fields                                              here

DrawCaption is the only map that draws. Labels, class names, shards and the order of the records stay those of the
source.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from input_pipeline.sources import Caption, Record, Source, draw, fingerprint_of, shard_ends


class RecordMap:
    """One step of a record on its way to the loader. Maps are frozen dataclasses, and picklable for worker processes.

    A subclass overrides __call__, and the other methods whose answer it changes.
    """

    def __call__(self, record: Record, index: int, generator: np.random.Generator | None) -> Record:
        """Returns a changed record; the argument is not modified.

        Args:
          record: from the source, or from the map before.
          index: the number of the record in the source.
          generator: of a row of a training batch; None outside training, where nothing is drawn.

        Raises: ValueError for a record that cannot be mapped; Mapped adds the source to the message.
        """
        raise NotImplementedError

    def fingerprint_parts(self) -> Iterable[str]:
        """What the fingerprint covers in addition to the source's fingerprint. A map that only removes fields adds
        nothing."""
        return ()

    def describe(self) -> str:
        """A few words for the end of the source's description, or ''."""
        return ""

    def image_shape_after(self, image_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The shape of the images that it returns, for images of this shape."""
        return image_shape

    def captions_after(self, captions: tuple[Caption, ...] | None) -> tuple[Caption, ...] | None:
        """The captions of the records that it returns; None if the records must be read to know them."""
        return captions

    def check(self, source: Source) -> None:
        """Raises ValueError if the map refuses a record of the source. By default no record is read."""


@dataclass(frozen=True, eq=False)
class Derived:
    """A source made of another one. Every answer is that of `source`; subclasses override what they change."""

    source: Any  # a Source; class_names, image_shape and check() need an ImageSource

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.source[index]

    def draw(self, index: int, generator: np.random.Generator) -> Record:
        return draw(self.source, index, generator)

    @property
    def shard_ends(self) -> np.ndarray | None:
        return shard_ends(self.source)

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        return self.source.image_shape

    @property
    def captions(self) -> tuple[Caption, ...] | None:
        """The caption of every record, without decoding images; None if that is not possible."""
        return getattr(self.source, "captions", None)

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def describe(self) -> str:
        return self.source.describe()

    def check(self) -> None:
        self.source.check()


@dataclass(frozen=True, eq=False)
class Mapped(Derived):
    """A source whose records go through `maps`, in order."""

    maps: tuple[RecordMap, ...]

    def __getitem__(self, index: int) -> Record:
        return self._map(self.source[index], index, None)

    def draw(self, index: int, generator: np.random.Generator) -> Record:
        return self._map(draw(self.source, index, generator), index, generator)

    def _map(self, record: Record, index: int, generator: np.random.Generator | None) -> Record:
        for each in self.maps:
            try:
                record = each(record, index, generator)
            except ValueError as error:
                raise ValueError(f"{error} ({self.source.describe()})") from error
        return record

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        shape = self.source.image_shape
        for each in self.maps:
            shape = each.image_shape_after(shape)
        return shape

    @property
    def captions(self) -> tuple[Caption, ...] | None:
        found = super().captions
        for each in self.maps:
            found = each.captions_after(found)
        return found

    @property
    def fingerprint(self) -> str:
        found = self.source.fingerprint
        for each in self.maps:
            parts = tuple(each.fingerprint_parts())
            found = fingerprint_of((found, *parts)) if parts else found
        return found

    def describe(self) -> str:
        return ", ".join(filter(None, (self.source.describe(), *(each.describe() for each in self.maps))))

    def check(self) -> None:
        self.source.check()
        for number, each in enumerate(self.maps):
            try:
                each.check(Mapped(self.source, self.maps[:number]))
            except ValueError as error:
                raise ValueError(f"{error} ({self.source.describe()})") from error


@dataclass(frozen=True)
class SelectFields(RecordMap):
    """Keeps the named fields: those that go to the device, without captions. The fingerprint stays the same."""

    names: tuple[str, ...]

    def __call__(self, record: Record, index: int, generator: np.random.Generator | None) -> Record:
        return {name: record[name] for name in self.names}

    def captions_after(self, captions: tuple[Caption, ...] | None) -> tuple[Caption, ...] | None:
        return captions if "caption" in self.names else None


def select_fields(source: Source, names: Iterable[str]) -> Mapped:
    """The source with only the named fields of its records."""
    return Mapped(source, (SelectFields(tuple(names)),))


@dataclass(frozen=True, eq=False)
class Subset(Derived):
    """The records of a source with these numbers, such as those that are not held out of training.

    This is not a map, because it changes which records there are.

    indices: int [n], numbers of records of the source.
    Raises: ValueError (one line) for no indices, and for an index that is not in the source.
    """

    indices: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.indices) or min(self.indices) < 0 or max(self.indices) >= len(self.source):
            raise ValueError(
                f"a subset of {len(self.indices)} examples: give at least one, with numbers from 0 to "
                f"{len(self.source) - 1}"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self._source_index(index)]

    def draw(self, index: int, generator: np.random.Generator) -> Record:
        return draw(self.source, self._source_index(index), generator)

    def _source_index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return int(self.indices[index])

    @property
    def shard_ends(self) -> np.ndarray | None:
        """Where the remaining records of each shard end; None if the subset changes the order."""
        ends = shard_ends(self.source)
        in_order = bool((np.diff(self.indices) > 0).all())
        return np.searchsorted(self.indices, ends) if ends is not None and in_order else None

    @property
    def captions(self) -> tuple[Caption, ...] | None:
        found = super().captions
        return None if found is None else tuple(found[int(i)] for i in self.indices)

    @property
    def fingerprint(self) -> str:
        indices = np.asarray(self.indices, "<i8")
        return fingerprint_of((self.source.fingerprint, indices.tobytes()))

    def describe(self) -> str:
        return f"{len(self):,} examples of {self.source.describe()}"


@dataclass(frozen=True, eq=False)
class Cached(Derived):
    """Keeps every record in memory once it is read, for images that take longer to decode than to train on.

    This is not a map: a map gets a record after it is read, while this source saves reading it again. A worker process
    starts with an empty memory of its own.
    """

    _records: dict[int, Record] = field(default_factory=dict, init=False, repr=False)

    def __getitem__(self, index: int) -> Record:
        if index not in self._records:
            self._records[index] = self.source[index]
        return dict(self._records[index])

    def draw(self, index: int, generator: np.random.Generator) -> Record:
        return self[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "_records": {}}
