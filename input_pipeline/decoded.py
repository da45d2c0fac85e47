"""The base class of sources whose images or clips are decoded when they are read: bad examples, labels, captions.

Record i is {"image", "label"} and, in a source with captions, "caption": a text, or a tuple of texts of one image, one
of which is drawn in training (input_pipeline/captions.py).

An example that does not decode to a whole image is bad. Record i is then the record of the next good example (i + 1,
..., around the end), with that one's label and caption, so that the length and all other records stay the same for
every reader. Each bad example is logged by name; as soon as more than `max_bad` are known, the source raises an error
that lists them. check() decodes everything, to find them all at once; without it every process finds them as it reads.
Bytes that cannot be read do not make an example bad: an OSError, which names the file, ends the run.
"""

import pathlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from input_pipeline.sources import Caption, Record

NAMES_PER_MESSAGE = 10
CHECK_THREADS, CHECKED_AT_ONCE = 8, 4096
JSON_ERRORS = (ValueError, RecursionError)  # of json.loads: bytes that are not UTF-8, not JSON, or nested too deeply


def some(names: Sequence[str]) -> str:
    """At most ten of the names, and how many more there are, for messages."""
    more = f" and {len(names) - NAMES_PER_MESSAGE} more" if len(names) > NAMES_PER_MESSAGE else ""
    return ", ".join(names[:NAMES_PER_MESSAGE]) + more


def read_file(path: pathlib.Path) -> bytes:
    """The bytes of a file. Raises: OSError, which names the file, if they cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_text(value: object) -> bool:
    """Whether the value is a str that UTF-8 can encode; JSON may contain half of a surrogate pair, which it cannot."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


class Decoded:
    """A source of examples that are decoded when they are read. A subclass defines, besides the members below,

      NOUN, A_NOUN       what an example is called in messages: "image", "an image"
      ERRORS             the exceptions that decode raises for a bad example
      image_shape, describe()
      fingerprint        set by its constructor

    Args:
      place: what the examples are and where, for messages: "files in /data".
      number: how many examples there are.
      max_bad: how many of them may be bad.
      labels: integers [number], in the order of class_names; None for a source without labels.
      class_names: one per label.
      captions: [number], each a text or a tuple of texts; None for a source without captions.
      bad: {index: reason} of the examples that are known to be bad.
    """

    NOUN: str
    A_NOUN: str
    ERRORS: tuple[type[Exception], ...]
    fingerprint: str

    def __init__(
        self,
        place: str,
        number: int,
        *,
        max_bad: int,
        labels: ArrayLike | None = None,
        class_names: tuple[str, ...] = (),
        captions: Sequence[Caption] | None = None,
        bad: dict[int, str] | None = None,
    ):
        self.place, self.max_bad, self.class_names = place, max_bad, class_names
        self._number, self._captions = number, captions
        self._labels = np.zeros(number, np.int32) if labels is None else np.asarray(labels, np.int32)
        self._bad: dict[int, str] = {}  # index -> reason, as far as known
        for index, reason in (bad or {}).items():
            self._add_bad(index, reason)

    def name(self, index: int) -> str:
        """The name of an example, for messages."""
        raise NotImplementedError

    def data(self, index: int) -> Any:
        """What decode() turns into an array, such as the bytes of a file. Raises: OSError if it cannot be read."""
        raise NotImplementedError

    def decode(self, data: Any) -> np.ndarray:
        """data(index) -> uint8 array of the shape image_shape. Raises: one of ERRORS for a bad example."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def captions(self) -> tuple[Caption, ...] | None:
        """The caption of every example, in order, without decoding images; None for a source without captions."""
        return None if self._captions is None else tuple(self._captions)

    @property
    def kind(self) -> str:
        """What the examples come with, for describe(): their classes or captions."""
        return f"{self.num_classes} classes" if self._captions is None else "captions"

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        for offset in range(len(self)):
            i = (index + offset) % len(self)
            if i not in self._bad:
                data = self.data(i)
                try:
                    image = self.decode(data)
                except self.ERRORS as error:
                    self._add_bad(i, str(error))
                else:
                    record: Record = {"image": image, "label": np.int32(self._labels[i])}
                    return record if self._captions is None else {**record, "caption": self._captions[i]}
            self._refuse_too_many()
        raise ValueError(f"none of the {len(self)} {self.place} is {self.A_NOUN}")

    def _add_bad(self, index: int, reason: str) -> None:
        form = "%s is not a whole %s (%s): the next one takes its place"
        logging.warning(form, self.name(index), self.NOUN, reason)
        self._bad[index] = reason

    def _refuse_too_many(self) -> None:
        if len(self._bad) <= self.max_bad:
            return
        names = [f"{self.name(i)} ({self._bad[i]})" for i in sorted(self._bad)]
        raise ValueError(
            f"{len(names)} of {len(self)} {self.place} are not whole {self.NOUN}s, data.max_bad_images is "
            f"{self.max_bad}: {some(names)}; repair or remove them"
        )

    def check(self) -> None:
        """Decodes every example. Raises: ValueError, which lists the bad ones if there are more than max_bad."""

        def reason(index: int) -> str | None:
            if index in self._bad:
                return None
            data = self.data(index)
            try:
                self.decode(data)
            except self.ERRORS as error:
                return str(error)

        with ThreadPoolExecutor(CHECK_THREADS) as pool:
            for start in range(0, len(self), CHECKED_AT_ONCE):  # what is queued in a pool takes memory
                part = range(start, min(start + CHECKED_AT_ONCE, len(self)))
                for index, found in zip(part, pool.map(reason, part), strict=True):
                    if found is not None:
                        self._add_bad(index, found)
        self._refuse_too_many()


class Texts(Sequence[str]):
    """Many texts as one array of UTF-8 bytes, which is small and fast to pickle.

    data: uint8, the bytes of all texts, one after the other. ends: int64 [N]; text i is data[ends[i - 1] : ends[i]].
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def encode(cls, texts: Iterable[str]) -> "Texts":
        """Packs the texts."""
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """The texts of all parts, in order."""
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        empty = cls.encode(())
        return cls(np.concatenate([empty.data, *(part.data for part in parts)]), np.concatenate([empty.ends, *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode()


def choose_classes(
    class_names: Sequence[str], labels: ArrayLike, chosen: Sequence[str], where: str
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Selects the examples of some of a source's classes.

    Args:
      class_names: of the source.
      labels: integers [N], of its examples.
      chosen: names of classes, in any order.
      where: the source's name, for errors.

    Returns: (indices of the selected examples, in order, int [n]; their new labels 0, 1, ... in the sorted order of the
      chosen names, int32 [n]; the sorted names).

    Raises: ValueError, one line: it counts and names the chosen classes that the source lacks; or no example remains.
    """
    names = tuple(sorted(set(chosen)))
    old_label = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in names if name not in old_label]
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of {len(names)} chosen classes are none of its {len(class_names)}: "
            f"{some(unknown)}; correct data.classes"
        )
    new_label = np.full(len(class_names), -1, np.int32)
    for label, name in enumerate(names):
        new_label[old_label[name]] = label
    new_labels = new_label[np.asarray(labels, int)]
    indices = np.flatnonzero(new_labels >= 0)
    if not len(indices):
        raise ValueError(f"{where}: no examples of the {len(names)} chosen classes; correct data.classes")
    return indices, new_labels[indices], names


def read_class_names(path: str | pathlib.Path) -> tuple[str, ...]:
    """The class names in a text file (config.data.classes), one per line. Blank lines are ignored.

    Raises, in one line: FileNotFoundError if there is no such file; ValueError if it is not UTF-8, or empty.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: set config.data.classes to a text file of class names, one per line")
    try:
        names = tuple(line.strip() for line in read_file(path).decode("utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} (config.data.classes) is not UTF-8 text ({error}): write one name per line"
        ) from error
    if not names:
        raise ValueError(f"{path} (config.data.classes): no names of classes; write one per line")
    return names
