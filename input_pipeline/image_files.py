"""A folder of image files, and a directory prepared by TFDS.

Their images may differ in size, and are brought to one size (transforms.resized) before they are batched. Folder holds
what folders of images have in common with folders of clips (clips.py).
"""

import json
import os
import pathlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from input_pipeline.decoded import JSON_ERRORS, Decoded, choose_classes, is_text, read_file, some
from input_pipeline.options import ClassOptions, ColorOptions, FileOptions, IndexOptions, SplitOptions
from input_pipeline.sources import Record, fingerprint_of
from input_pipeline.tars import read_or_make_index
from input_pipeline.transforms import DECODE_ERRORS, check_channels, decode_image

CAPTIONS_FILE = "captions.jsonl"


def _read_captions(root: pathlib.Path) -> tuple[list[str], list[str]]:
    """(files, captions) of the lines of captions.jsonl, in order."""
    files, captions = [], []
    lines = (root / CAPTIONS_FILE).read_text(encoding="utf-8").split("\n")  # a caption may contain other line ends
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        where = f"{root / CAPTIONS_FILE} line {number}"
        try:
            entry = json.loads(line)
            file, caption = entry["file"], entry["caption"]
            below = pathlib.PurePosixPath(file)
            if not is_text(file) or not is_text(caption):
                raise TypeError
        except (*JSON_ERRORS, KeyError, TypeError) as error:
            raise ValueError(f'{where} is not {{"file": "...", "caption": "..."}}: {line[:80]!r}') from error
        if below.is_absolute() or ".." in below.parts:
            raise ValueError(f"{where} names {file!r}, which is not a path below {root}")
        files.append(file)
        captions.append(caption)
    return files, captions


def _list_files(root: pathlib.Path) -> list[str]:
    """Paths below root, with "/" between their parts, sorted; names that start with a dot are left out."""
    found = []
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        relative = pathlib.Path(parent).relative_to(root)
        found += [(relative / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a dangling link, or a line of captions.jsonl without its file
        return -1


def _read_pairs(root: pathlib.Path, files: list[str]) -> tuple[list[str], list[str]]:
    """(files, captions) of a folder with a text file NAME.txt beside every NAME.jpg, NAME.mp4, ...

    Bytes of a text that are not UTF-8 become U+FFFD.
    """
    texts = {file.removesuffix(".txt") for file in files if file.endswith(".txt")}
    others = [file for file in files if not file.endswith(".txt")]
    stems = [os.path.splitext(file)[0] for file in others]
    odd = [f"{file} (without its .txt)" for file, stem in zip(others, stems, strict=True) if stem not in texts]
    odd += [f"{stem}.txt (of no other file)" for stem in sorted(texts - set(stems))]
    odd += [f"{stem}.txt (of {count} files)" for stem, count in Counter(stems).items() if count > 1 and stem in texts]
    if odd:
        raise ValueError(
            f"{root} holds .txt files, which are captions, but {len(odd)} files are without a partner: {some(odd)}; "
            "give each one caption, or take the .txt files out"
        )
    return others, [(root / f"{stem}.txt").read_text(encoding="utf-8", errors="replace").strip() for stem in stems]


class Folder(Decoded):
    """The files below a directory, in the first of these layouts that fits:

      captions  a file captions.jsonl with lines {"file": path below the directory, "caption": text}: every line is an
                example, in the order of the file, with a "caption"; no classes
      pairs     NAME.txt, the caption, beside every other file NAME.*, at any depth; no classes; sorted by path
      plain     files only, no sub-folders; no classes; sorted by name
      classes   sub-folders only: their sorted names are the labels 0, 1, ...; sorted by path, at any depth

    Every file is an example, except names with a leading dot. Bad files are treated as decoded.py describes, and a file
    that is absent when the source is opened is a bad one. A subclass defines NOUN, A_NOUN, ERRORS, image_shape and
    decode().

    Args:
      options: where the directory is, and how many bad files are allowed.
      reading: what decode() depends on, for the fingerprint.
      classes: names of the class folders to read; () for all of them.

    Raises: FileNotFoundError if there is no such directory; ValueError if it has no files, files beside class folders,
      captions in another form, or lacks some of the classes; when reading, ValueError for too many bad files.
    """

    def __init__(self, options: FileOptions, reading: tuple[str, ...], classes: tuple[str, ...] = ()):
        where = f"set config.data.path to the directory of the {self.NOUN}s"
        self.root = pathlib.Path(options.path).expanduser().absolute()
        if not self.root.is_dir():
            raise FileNotFoundError(f"no directory {self.root}: {where}")
        captions, labels, class_names = None, None, ()
        if (self.root / CAPTIONS_FILE).is_file():
            self._files, captions = _read_captions(self.root)
        else:
            self._files = _list_files(self.root)
            if any(file.endswith(".txt") for file in self._files):
                self._files, captions = _read_pairs(self.root, self._files)
            else:
                labels, class_names = self._read_classes()
        if not self._files:
            raise ValueError(f"no {self.NOUN}s in {self.root}: {where}")
        if classes:
            numbers, labels, class_names = choose_classes(class_names, labels or (), classes, str(self.root))
            self._files = [self._files[i] for i in numbers]
        sizes = [_size(self.root / file) for file in self._files]
        named = (f"{file}:{size}" for file, size in zip(self._files, sizes, strict=True))
        self.fingerprint = fingerprint_of((*reading, *named, *(captions or ())))
        absent = {i: "no such file" for i, size in enumerate(sizes) if size < 0}
        super().__init__(
            f"files in {self.root}", len(self._files), max_bad=options.max_bad_images, labels=labels,
            class_names=class_names, captions=captions, bad=absent,
        )  # fmt: skip

    def _read_classes(self) -> tuple[list[int] | None, tuple[str, ...]]:
        loose = [file for file in self._files if "/" not in file]
        if len(loose) == len(self._files):
            return None, ()
        if loose:
            raise ValueError(
                f"{self.root} has files beside its class folders, such as {loose[0]} ({len(loose)} in all): "
                "move each into the folder of its class"
            )
        folders = [file.split("/")[0] for file in self._files]
        class_names = tuple(sorted(set(folders)))
        label_of = {name: label for label, name in enumerate(class_names)}
        return [label_of[folder] for folder in folders], class_names

    def name(self, index: int) -> str:
        return self._files[index]

    def data(self, index: int) -> Any:
        return read_file(self.root / self._files[index])

    def describe(self) -> str:
        return f"{self.NOUN} folder {self.root}: {len(self)} files, {self.kind}"


@dataclass(frozen=True, kw_only=True)
class ImageFolder(FileOptions, ClassOptions):
    """The image files below a directory, in one of the layouts of Folder.

    classes names class folders. check() reads some 500 to 1,000 JPEGs of 500x375 a second and core.

    open() raises: as Folder; ValueError for other channels.
    """

    def open(self) -> "ImageFolderSource":
        return ImageFolderSource(self)


class ImageFolderSource(Folder):
    """An opened ImageFolder, whose files are decoded as decode_image does."""

    NOUN, A_NOUN = "image", "an image"
    ERRORS = DECODE_ERRORS

    def __init__(self, options: ImageFolder):
        check_channels(options.channels)
        self.channels = options.channels
        super().__init__(options, (str(options.channels),), options.class_names())

    @property
    def image_shape(self) -> tuple[None, None, int]:
        return (None, None, self.channels)

    def decode(self, data: bytes) -> np.ndarray:
        return decode_image(data, self.channels)


@dataclass(frozen=True, kw_only=True)
class Tfds(ColorOptions, SplitOptions, ClassOptions, IndexOptions):
    """A split of a data set prepared by TFDS as ArrayRecord files, read without TensorFlow.

    Its feature "image" is a tfds.features.Image, "label" a ClassLabel or absent (num_classes 0).

    path: of the prepared version, DATA_DIR/NAME[/CONFIG]/VERSION.
    split: as TFDS spells it: "train", "train[:10%]".
    classes: the chosen classes have the labels 0, 1, ... in sorted order. To find them every record is read once.
    index_dir: where the labels are kept then (tars.py).

    open() raises: FileNotFoundError if path is not a prepared data set; ValueError for another file format, other
      features and an unknown split or class; when reading, ValueError for an example without a label (-1, as in test
      splits).
    """

    def open(self) -> "TfdsSource":
        return TfdsSource(self)


class TfdsSource:
    """An opened Tfds, whose images are decoded as those of an ImageFolder are."""

    def __init__(self, options: Tfds):
        import tensorflow_datasets as tfds  # slow to import

        check_channels(options.channels)
        split, classes = options.split, options.class_names()
        root = tfds.core.Path(options.path).expanduser()
        if not (root / "dataset_info.json").exists():
            raise FileNotFoundError(
                f"{root} is not a data set prepared by TFDS (it has no dataset_info.json): set config.data.path to its "
                "DATA_DIR/NAME/VERSION"
            )
        skip_decoding: Any = tfds.decode.SkipDecoding  # annotated as if it could not be called
        builder: Any = tfds.builder_from_directory(root)  # its annotations allow None in many places
        file_format = builder.info.file_format.value
        if file_format != "array_record":
            raise ValueError(
                f"{root} is prepared as {file_format}, which needs TensorFlow to read: prepare it with "
                "file_format='array_record'"
            )
        features = dict(builder.info.features.items())
        for name, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
            found = features.get(name)
            if not isinstance(found, kind) and (name in features or name == "image"):
                raise ValueError(f"{root}: feature {name!r} must be of type {kind.__name__}, found {found}")
        self.class_names = tuple(features["label"].names) if "label" in features else ()
        height, width, _ = features["image"].shape
        self.image_shape = (height, width, options.channels)
        self.name = f"{builder.info.full_name} ({split})"
        self._data = builder.as_data_source(split, decoders={"image": skip_decoding()})
        files = [f"{file.name}:{file.stat().length}" for file in builder.info.splits[split].filepaths]
        self.fingerprint = fingerprint_of((self.name, str(self.image_shape), *files, *sorted(classes)))
        self._chosen: tuple[np.ndarray, np.ndarray] | None = None  # (indices, labels) of the chosen classes
        if classes:
            made_from = ("tfds", self.name, str(root), *files)
            labels = read_or_make_index(options.index_dir, made_from, self._all_labels)["labels"]
            indices, labels, self.class_names = choose_classes(self.class_names, labels, classes, self.name)
            self._chosen = indices, labels

    def _all_labels(self) -> dict[str, np.ndarray]:
        return {"labels": np.array([self._data[i]["label"] for i in range(len(self._data))], np.int32)}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._data) if self._chosen is None else len(self._chosen[0])

    def __getitem__(self, index: int) -> Record:
        if self._chosen is None:
            record = self._data[index]
            label = record["label"] if self.num_classes else 0
        else:
            indices, labels = self._chosen
            record, label = self._data[int(indices[index])], labels[index]
        if label < 0:  # how TFDS marks a missing label
            raise ValueError(f"TFDS {self.name}: label {label} of example {index} is out of range: take another split")
        try:
            image = decode_image(record["image"], self.image_shape[-1])
        except DECODE_ERRORS as error:
            raise ValueError(
                f"TFDS {self.name}: example {index} is not a whole image ({error}): prepare the data set again, a bad "
                "record cannot be passed over here"
            ) from error
        return {"image": image, "label": np.int32(label)}

    def describe(self) -> str:
        return f"TFDS {self.name}: {len(self)} images, {self.num_classes} classes"

    def check(self) -> None:
        """Does nothing, because TFDS validated the records when it wrote them."""
