"""A folder of Parquet files with a column of encoded images, the format of Hugging Face's data sets.

The image column holds bytes, or structs {"bytes", "path"} whose bytes are read; paths alone are refused. A second
column holds captions (a text, or a list of texts of one image), or labels, whose names are taken from Hugging Face's
metadata in the file if it has any. Files are read in the order of their paths, at any depth.

A file is read by row groups, all images of a group at once, and each process keeps the last few groups. Reading images
in a random order over all files is therefore slow: train with data.shuffle 'shards', where the row groups are the
shards. Each process then keeps as many groups as data.shuffle_buffer images come from, so that each group is read once
in an epoch, or twice if two windows of images meet in it.
"""

import json
import pathlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from input_pipeline.decoded import JSON_ERRORS, Decoded, Texts, choose_classes
from input_pipeline.options import CaptionKeyOptions, ClassOptions, FileOptions
from input_pipeline.sources import fingerprint_of
from input_pipeline.transforms import DECODE_ERRORS, check_channels, decode_image

GROUPS_KEPT = 4  # per process, at least: hundreds of MB if a group has 1,000 images


@dataclass(frozen=True, kw_only=True)
class Parquet(FileOptions, ClassOptions, CaptionKeyOptions):
    """Images, with captions or labels or both, of the Parquet files in a folder.

    One of the columns caption_key and label_key may be absent. An image without bytes is a bad one.
    classes: names of the classes to read, or their numbers if labels have no names.
    window: how many images in the order of shards are read in any order (loader.ShardOrder); 0: one after the other.

    open() raises: FileNotFoundError for an absent folder; ValueError for a folder without *.parquet, damaged files,
      absent columns or columns of another type, labels out of range; ImportError (one line) without pyarrow. When
      reading, OSError, which names the file, for a row group that cannot be read.
    """

    image_key: Annotated[str, "the column of images"] = "image"
    label_key: Annotated[str, "the column of labels"] = "label"
    window: int = 0

    def open(self) -> "ParquetSource":
        return ParquetSource(self)


class ParquetSource(Decoded):
    """An opened Parquet. shard_ends: where the examples of each row group end. A null caption is ''."""

    NOUN, A_NOUN = "image", "an image"
    ERRORS = DECODE_ERRORS

    def __init__(self, options: Parquet):
        check_channels(options.channels)
        self.root, self.channels = pathlib.Path(options.path).expanduser().absolute(), options.channels
        self.image_key = image_key = options.image_key
        caption_key, label_key, classes = options.caption_key, options.label_key, options.class_names()
        if not self.root.is_dir():
            raise FileNotFoundError(f"no directory {self.root}: set config.data.path to the folder of *.parquet")
        self._files = sorted(self.root.rglob("*.parquet"))
        if not self._files:
            raise ValueError(f"no *.parquet in {self.root}: set config.data.path to their folder")
        tables = [_Table(file, image_key, caption_key, label_key) for file in self._files]
        captions = _joined(tables, "captions", caption_key)
        labels = _joined(tables, "labels", label_key)
        class_names = _class_names(tables, labels, label_key)
        # (file, row group, its number of rows) of every group
        groups = [(i, group, rows) for i, table in enumerate(tables) for group, rows in enumerate(table.rows)]
        self._groups = [(i, group) for i, group, _ in groups]
        self._group_ends = np.cumsum([rows for *_, rows in groups])
        self._numbers = np.arange(self._group_ends[-1] if groups else 0)  # row of each example, over all files
        if not len(self._numbers):
            raise ValueError(f"no rows in the *.parquet files of {self.root}: set config.data.path to others")
        if classes:
            all_labels = () if labels is None else labels
            self._numbers, labels, class_names = choose_classes(class_names, all_labels, classes, str(self.root))
            captions = captions and [captions[i] for i in self._numbers]
        captions = captions and _packed(captions)
        self.shard_ends = np.searchsorted(self._numbers, self._group_ends)
        self._groups_kept = _groups_to_keep(np.diff(self.shard_ends, prepend=0), options.window)
        sizes = (f"{file.relative_to(self.root)}:{file.stat().st_size}" for file in self._files)
        reading = (str(self.channels), image_key, caption_key, label_key, *class_names)
        self.fingerprint = fingerprint_of((*reading, *sizes))
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        super().__init__(
            f"rows in {self.root}", len(self._numbers), max_bad=options.max_bad_images, labels=labels,
            class_names=class_names, captions=captions,
        )  # fmt: skip

    @property
    def image_shape(self) -> tuple[None, None, int]:
        return (None, None, self.channels)

    def name(self, index: int) -> str:
        group, row = self._place(index)
        file, number = self._groups[group]
        return f"{self._files[file].relative_to(self.root)} row {row} of group {number}"

    def data(self, index: int) -> bytes | None:
        group, row = self._place(index)
        cell = self._images(group)[row].as_py()
        return cell["bytes"] if isinstance(cell, dict) else cell

    def decode(self, data: bytes | None) -> np.ndarray:
        if not data:
            raise ValueError("no bytes")
        return decode_image(data, self.channels)

    def _place(self, index: int) -> tuple[int, int]:
        """(group, row within the group) of an example."""
        number = int(self._numbers[index])
        group = int(np.searchsorted(self._group_ends, number, side="right"))
        return group, number - (int(self._group_ends[group - 1]) if group else 0)

    def _images(self, group: int) -> Any:
        """The image column of a row group, a pyarrow array."""
        with self._lock:  # the threads of a process share what they read
            if group not in self._kept:
                file, number = self._groups[group]
                self._kept[group] = _read_group(self._files[file], number, self.image_key)
                if len(self._kept) > self._groups_kept:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _kept=OrderedDict())

    def describe(self) -> str:
        return f"{len(self._files)} Parquet files in {self.root}: {len(self)} images, {self.kind}"


def _groups_to_keep(sizes: np.ndarray, window: int) -> int:
    """How many groups a process keeps in memory.

    These are all the groups that `window` successive images can come from, in any order of the groups, and one more,
    because some images may be held out of training.

    sizes: of the groups, int [groups].
    """
    ascending = np.sort(sizes[sizes > 0])
    inside = np.searchsorted(np.cumsum(ascending), window, side="right")  # besides parts of one before and one after
    return max(GROUPS_KEPT, int(inside) + 3) if window else GROUPS_KEPT


def _read_group(file: pathlib.Path, number: int, column: str) -> Any:
    """A column of a row group, a pyarrow array. Raises: OSError, which names the file, if it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file).read_row_group(number, columns=[column]).column(0)
    except (pyarrow.ArrowException, OSError) as error:
        raise OSError(f"{file}: row group {number} cannot be read ({_first_line(error)}): copy it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


class _Table:
    """What is read of a file without its images: the rows of each group, captions, labels, names of the classes."""

    def __init__(self, file: pathlib.Path, image_key: str, caption_key: str, label_key: str):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(
                "Parquet files are read by pyarrow, which is not installed: pip install pyarrow"
            ) from error

        try:
            opened = pyarrow.parquet.ParquetFile(file)
            columns = opened.schema_arrow.names
            absent = [] if image_key in columns else [f"data.image_key {image_key!r}"]
            if caption_key not in columns and label_key not in columns:
                absent += [f"data.caption_key {caption_key!r} nor data.label_key {label_key!r}"]
            if absent:
                raise ValueError(f"{file} has no column {absent[0]}, only {', '.join(columns)}: set the right one")
            for what, name in (("image", image_key), ("caption", caption_key), ("label", label_key)):
                if name in columns:
                    _check_type(file, what, name, opened.schema_arrow.field(name).type)
            texts = opened.read([name for name in (caption_key, label_key) if name in columns])
            self.captions = _texts(texts.column(caption_key).to_pylist()) if caption_key in columns else None
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not a whole Parquet file ({_first_line(error)}): copy it again") from error
        self.file = file
        self.rows = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        self.labels = texts.column(label_key).to_pylist() if label_key in columns else None
        note = (opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        self.class_names = _noted_names(file, note, label_key) if label_key in columns else ()


def _check_type(file: pathlib.Path, what: str, name: str, found: Any) -> None:
    """Raises ValueError if the type of a column, found, is not one of images, captions or labels (what)."""
    from pyarrow import types

    kinds = {
        "image": ("bytes, or structs with bytes", (types.is_binary, types.is_large_binary)),
        "caption": ("texts, or lists of texts", (types.is_string, types.is_large_string)),
        "label": ("integers", (types.is_integer,)),
    }
    expected, allowed = kinds[what]
    inner = found
    if what == "image" and types.is_struct(found) and found.get_field_index("bytes") >= 0:
        inner = found.field("bytes").type
    if what == "caption" and (types.is_list(found) or types.is_large_list(found)):
        inner = found.value_type
    if not (types.is_null(inner) or any(fits(inner) for fits in allowed)):
        shown = f"{found!s:.60}"
        raise ValueError(f"{file}: column data.{what}_key {name!r} is {shown}, expected {expected}: set another column")


def _noted_names(file: pathlib.Path, note: bytes, key: str) -> tuple[str, ...]:
    """The names of the classes in Hugging Face's metadata; () if there are none."""
    try:
        names = json.loads(note)["info"]["features"][key]["names"]
    except (KeyError, TypeError):
        return ()
    except JSON_ERRORS as error:
        raise ValueError(
            f"{file}: its metadata of Hugging Face are not JSON ({error}): write the file again"
        ) from error
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _texts(cells: list) -> list:
    """Captions from the cells of a column: a list of texts becomes a tuple, and null becomes ''."""
    return [tuple(text or "" for text in cell) if isinstance(cell, list) else cell or "" for cell in cells]


def _packed(captions: list) -> Texts | list:
    """Packs the captions into one array if every image has one text; otherwise returns them as they are."""
    return captions if any(isinstance(caption, tuple) for caption in captions) else Texts.encode(captions)


def _joined(tables: list[_Table], name: str, key: str) -> list | None:
    """The captions or labels of all files; None if no file has them."""
    found = [getattr(table, name) for table in tables]
    without = [table.file for table, of_table in zip(tables, found, strict=True) if of_table is None]
    if len(without) == len(tables):
        return None
    if without:
        raise ValueError(f"{without[0]} has no column {key!r}, others have ({len(without)} such files): remove it")
    return [value for of_table in found for value in of_table]


def _class_names(tables: list[_Table], labels: list | None, key: str) -> tuple[str, ...]:
    """One name per label: the names in the first file, or the numbers."""
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
