"""A folder of Parquet files with a column of encoded images, as Hugging Face's data sets are kept.

The image column holds bytes, or structs {"bytes", "path"} of which the bytes are read. Beside it stands a column of
captions (a text, or a list of texts of one image), or of labels, whose names are taken from Hugging Face's note in the
file where it has one. Files are taken in the order of their paths, at any depth.

A file is read by row groups, all images of a group at once, and each process keeps the last few of them: images in a
random order over everything are slow, so train with data.shuffle 'shards', where the row groups are the shards and
data.shuffle_buffer a few of them.
"""

import json
import pathlib
import threading
from collections import OrderedDict

import numpy as np

from input_pipeline.decoded import Decoded, choose_classes
from input_pipeline.sources import fingerprint_of
from input_pipeline.transforms import DECODE_ERRORS, check_channels, decode_image

GROUPS_KEPT = 4  # per process: hundreds of MB where a group has 1,000 images


class Parquet(Decoded):
    """Images, with captions or labels or both, of Parquet files.

    Args:
      path: the folder. image_key, caption_key, label_key: names of columns; of the last two, one may be absent.
      classes: names (or numbers, where labels have no names) of the classes to read; () for all of them.
      channels: 3 (RGB) or 1 (grey). max_bad_images: see decoded.py; an image without bytes is a bad one.

    shard_ends: where each row group's examples end.

    Raises: FileNotFoundError for no folder; ValueError for one without *.parquet, damaged files, absent columns or ones
      of another type, labels out of range; ImportError (one line) without pyarrow.
    """

    NOUN, A_NOUN = "image", "an image"
    ERRORS = DECODE_ERRORS

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        image_key: str = "image",
        caption_key: str = "caption",
        label_key: str = "label",
        classes: tuple[str, ...] = (),
        channels: int = 3,
        max_bad_images: int = 0,
    ):
        check_channels(channels)
        self.root, self.image_key, self.channels = pathlib.Path(path).expanduser().absolute(), image_key, channels
        if not self.root.is_dir():
            raise FileNotFoundError(f"no directory {self.root}: set config.data.path to the folder of *.parquet")
        self._files = sorted(self.root.rglob("*.parquet"))
        if not self._files:
            raise ValueError(f"no *.parquet in {self.root}: set config.data.path to their folder")
        tables = [_Table(file, image_key, caption_key, label_key) for file in self._files]
        captions = _joined(tables, "captions", caption_key)
        labels = _joined(tables, "labels", label_key)
        class_names = _class_names(tables, labels, label_key)
        # (file, row group, rows of the ones before it) of every group
        groups = [(i, group, rows) for i, table in enumerate(tables) for group, rows in enumerate(table.rows)]
        self._groups = [(i, group) for i, group, _ in groups]
        self._group_ends = np.cumsum([rows for *_, rows in groups])
        self._numbers = np.arange(self._group_ends[-1] if groups else 0)
        if not len(self._numbers):
            raise ValueError(f"no rows in the *.parquet files of {self.root}: set config.data.path to others")
        if classes:
            self._numbers, labels, class_names = choose_classes(class_names, labels or (), classes, str(self.root))
            captions = captions and [captions[i] for i in self._numbers]
        self.shard_ends = np.searchsorted(self._numbers, self._group_ends)
        sizes = (f"{file.relative_to(self.root)}:{file.stat().st_size}" for file in self._files)
        reading = (str(channels), image_key, caption_key, label_key, *class_names)
        self.fingerprint = fingerprint_of((*reading, *sizes))
        self._kept: OrderedDict[int, list] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(
            f"rows in {self.root}", len(self._numbers), max_bad=max_bad_images, labels=labels, class_names=class_names,
            captions=captions,
        )  # fmt: skip

    @property
    def image_shape(self) -> tuple[None, None, int]:
        return (None, None, self.channels)

    def name(self, index: int) -> str:
        group, row = self._place(index)
        file, number = self._groups[group]
        return f"{self._files[file].relative_to(self.root)} row {row} of group {number}"

    def decode(self, index: int) -> np.ndarray:
        group, row = self._place(index)
        cell = self._images(group)[row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data:
            raise ValueError("no bytes")
        return decode_image(data, self.channels)

    def _place(self, index: int) -> tuple[int, int]:
        """(group, row in it)."""
        number = int(self._numbers[index])
        group = int(np.searchsorted(self._group_ends, number, side="right"))
        return group, number - (int(self._group_ends[group - 1]) if group else 0)

    def _images(self, group: int):
        """The image column of a row group."""
        with self._lock:  # threads of one process share what they read
            if group not in self._kept:
                import pyarrow.parquet

                file, number = self._groups[group]
                table = pyarrow.parquet.ParquetFile(self._files[file]).read_row_group(number, columns=[self.image_key])
                self._kept[group] = table.column(0)
                if len(self._kept) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _kept=OrderedDict())

    def describe(self) -> str:
        return f"{len(self._files)} Parquet files in {self.root}: {len(self)} images, {self.kind}"


class _Table:
    """What is known of a file without its images: rows of each group, captions, labels, names of the classes."""

    def __init__(self, file: pathlib.Path, image_key: str, caption_key: str, label_key: str):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("Parquet is read by a package that is absent: pip install pyarrow") from error

        try:
            opened = pyarrow.parquet.ParquetFile(file)
            columns = opened.schema_arrow.names
            absent = [] if image_key in columns else [f"data.image_key {image_key!r}"]
            if caption_key not in columns and label_key not in columns:
                absent += [f"data.caption_key {caption_key!r} nor data.label_key {label_key!r}"]
            if absent:
                raise ValueError(f"{file} has no column {absent[0]}, only {', '.join(columns)}: set the right one")
            texts = opened.read([name for name in (caption_key, label_key) if name in columns])
        except (pyarrow.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file} is not a whole Parquet file ({reason}): copy it again") from error
        self.file = file
        self.rows = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        self.captions = _texts(texts.column(caption_key).to_pylist()) if caption_key in columns else None
        self.labels = texts.column(label_key).to_pylist() if label_key in columns else None
        note = (opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(note).get("info", {}).get("features", {})
        self.class_names = tuple((features.get(label_key) or {}).get("names") or ())


def _texts(cells: list) -> list:
    """A list of texts becomes a tuple; what is no text is none."""
    return [tuple(cell) if isinstance(cell, list) else cell for cell in cells]


def _joined(tables: list[_Table], name: str, key: str) -> list | None:
    """The captions or labels of all files; None where none has them."""
    found = [getattr(table, name) for table in tables]
    without = [table.file for table, of_table in zip(tables, found, strict=True) if of_table is None]
    if len(without) == len(tables):
        return None
    if without:
        raise ValueError(f"{without[0]} has no column {key!r}, others have ({len(without)} such files): remove it")
    return [value for of_table in found for value in of_table]


def _class_names(tables: list[_Table], labels: list | None, key: str) -> tuple[str, ...]:
    """One name per label: those in the first file, or the numbers."""
    if labels is None:
        return ()
    wrong = [label for label in labels if not isinstance(label, int) or label < 0]
    names = tables[0].class_names or tuple(map(str, range(0 if wrong else max(labels, default=-1) + 1)))
    wrong += [label for label in labels if not wrong and label >= len(names)]
    if wrong:
        raise ValueError(
            f"{tables[0].file.parent}: {len(wrong)} of {len(labels)} labels in column {key!r} are not in 0 to "
            f"{len(names) - 1}, such as {wrong[0]!r}: take another split or data.label_key"
        )
    return names
