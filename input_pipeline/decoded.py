"""What sources have in common whose images or clips are decoded when they are read: bad ones, labels, captions.

Record i is {"image", "label"} and, where there are captions, "caption": a text, or a tuple of texts of one image, of
which training draws one (input_pipeline/captions.py).

An example that does not decode to a whole image is bad: record i is then the record of the next good one (i + 1, ...,
around the end), with its own label and caption, so that the length and all other records stay what they are, for every
reader. Each bad one is logged by name; once more than `max_bad` are known the source refuses and lists them. check()
decodes everything to know them all at once; without it they are found as they are read, by each process for itself.
Bytes that cannot be read say nothing of an example: OSError, which names the file, ends the run.
"""

import pathlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

NAMES_PER_MESSAGE = 10
CHECK_THREADS, CHECKED_AT_ONCE = 8, 4096
JSON_ERRORS = (ValueError, RecursionError)  # of json.loads: bytes that are not UTF-8, not JSON, or nested too deeply


def some(names: Sequence[str]) -> str:
    """Ten names at most, and how many more there are: for messages."""
    more = f" and {len(names) - NAMES_PER_MESSAGE} more" if len(names) > NAMES_PER_MESSAGE else ""
    return ", ".join(names[:NAMES_PER_MESSAGE]) + more


def read_file(path: pathlib.Path) -> bytes:
    """The bytes of a file. OSError, which names it, where they cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_text(value) -> bool:
    """Whether a value is a str that UTF-8 can hold: JSON may have half of a surrogate pair."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


class Decoded:
    """A source of examples that are decoded when read; a subclass says what they are:

      NOUN, A_NOUN       for messages. ERRORS: what decode raises for a bad example.
      name(i)            of example i, for messages
      data(i)            -> what decode turns into an array, such as a file's bytes; OSError names what cannot be read
      decode(data)       -> uint8 array
      image_shape, fingerprint, describe()

    Args:
      place: what the examples are and where, for messages: "files in /data". number: of them. max_bad: as above.
      labels: integers [number], in the order of class_names; None for none. captions: [number], each a text or a tuple
      of texts; None for none. bad: {number: reason} of examples that are known to be bad.
    """

    NOUN: str
    A_NOUN: str
    ERRORS: tuple[type[Exception], ...]

    def __init__(
        self,
        place: str,
        number: int,
        *,
        max_bad: int,
        labels: Sequence[int] | None = None,
        class_names: tuple[str, ...] = (),
        captions: Sequence | None = None,
        bad: dict[int, str] | None = None,
    ):
        self.place, self.max_bad, self.class_names = place, max_bad, class_names
        self._number, self._labels, self._captions = number, labels, captions
        self._bad: dict[int, str] = {}  # index -> reason, as far as known
        for index, reason in (bad or {}).items():
            self._add_bad(index, reason)

    def name(self, index: int) -> str:
        raise NotImplementedError

    def data(self, index: int):
        raise NotImplementedError

    def decode(self, data) -> np.ndarray:
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def captions(self) -> tuple | None:
        """The captions of every example, in order, without decoding; None where there are none."""
        return None if self._captions is None else tuple(self._captions)

    @property
    def kind(self) -> str:
        """What the examples come with, for describe()."""
        return f"{self.num_classes} classes" if self._captions is None else "captions"

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict:
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
                    record = {"image": image, "label": np.int32(0 if self._labels is None else self._labels[i])}
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
        """Decodes every example; ValueError lists the bad ones."""

        def reason(index: int) -> str | None:
            if index in self._bad:
                return None
            data = self.data(index)
            try:
                self.decode(data)
            except self.ERRORS as error:
                return str(error)

        with ThreadPoolExecutor(CHECK_THREADS) as pool:
            for start in range(0, len(self), CHECKED_AT_ONCE):  # what waits in a pool takes memory
                part = range(start, min(start + CHECKED_AT_ONCE, len(self)))
                for index, found in zip(part, pool.map(reason, part), strict=True):
                    if found is not None:
                        self._add_bad(index, found)
        self._refuse_too_many()


class Texts(Sequence):
    """Many texts as one array of UTF-8 bytes: small, and pickled at once. text_i = bytes[ends[i - 1] : ends[i]]."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """The texts of all parts, in order."""
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        empty = cls.of(())
        return cls(np.concatenate([empty.data, *(part.data for part in parts)]), np.concatenate([empty.ends, *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode()


def choose_classes(
    class_names: Sequence[str], labels: Sequence[int], wanted: Sequence[str], where: str
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The examples of some of a source's classes, whose labels become 0, 1, ... in the sorted order of their names.

    Args:
      class_names: of the source. labels: [N], of its examples. wanted: names, in any order. where: for errors.

    Returns: (numbers of the examples that stay, in order [n]; their new labels [n]; the sorted names).

    Raises: ValueError, one line, for names that the source lacks, counted and named, and for no examples.
    """
    wanted = tuple(sorted(set(wanted)))
    place = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in wanted if name not in place]
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of {len(wanted)} chosen classes are none of its {len(class_names)}: "
            f"{some(unknown)}; correct data.classes"
        )
    new_label = np.full(len(class_names), -1, np.int32)
    for label, name in enumerate(wanted):
        new_label[place[name]] = label
    labels = new_label[np.asarray(labels)]
    numbers = np.flatnonzero(labels >= 0)
    if not len(numbers):
        raise ValueError(f"{where}: no examples of the {len(wanted)} chosen classes; correct data.classes")
    return numbers, labels[numbers], wanted


def read_class_names(path) -> tuple[str, ...]:
    """The names in a text file (config.data.classes), one a line; blank lines do not count.

    Raises, in one line: FileNotFoundError where there is no such file; ValueError for one that is not UTF-8, or empty.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: set config.data.classes to a text file of class names, one a line")
    try:
        names = tuple(line.strip() for line in read_file(path).decode("utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} (config.data.classes) is not UTF-8 text ({error}): write one name a line") from error
    if not names:
        raise ValueError(f"{path} (config.data.classes): no names of classes; write one a line")
    return names
