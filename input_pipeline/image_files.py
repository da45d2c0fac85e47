"""Sources whose images are decoded when read: a folder of image files, and a directory prepared by TFDS.

Their images may differ in size: wrap them in input_pipeline.transforms.Transformed before batching. Folder is what
folders of images have in common with folders of clips (clips.py).
"""

import json
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from input_pipeline.sources import fingerprint_of
from input_pipeline.transforms import DECODE_ERRORS, check_channels, decode_image

CAPTIONS_FILE = "captions.jsonl"
NAMES_PER_MESSAGE = 10
CHECK_THREADS = 8


def _read_captions(root: pathlib.Path) -> tuple[list[str], list[str]]:
    """(files, captions) of the lines of captions.jsonl, in their order."""
    files, captions = [], []
    lines = (root / CAPTIONS_FILE).read_text(encoding="utf-8").split("\n")  # other line ends may stand in a caption
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        where = f"{root / CAPTIONS_FILE} line {number}"
        try:
            entry = json.loads(line)
            file, caption = entry["file"], entry["caption"]
            below = pathlib.PurePosixPath(file)
            if not isinstance(caption, str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{where} is not {{"file": "...", "caption": "..."}}: {line[:80]!r}') from error
        if below.is_absolute() or ".." in below.parts:
            raise ValueError(f"{where} names {file!r}, which is not a path below {root}")
        files.append(file)
        captions.append(caption)
    return files, captions


def _list_files(root: pathlib.Path) -> list[str]:
    """Paths below root, "/" between the parts, sorted; nothing whose name starts with a dot."""
    found = []
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        relative = pathlib.Path(parent).relative_to(root)
        found += [(relative / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link: a bad image when read
        return -1


class Folder:
    """The files below a directory, which has the first of these layouts that fits:

      captions  a file captions.jsonl with lines {"file": path below the directory, "caption": text}: the lines are the
                examples, in their order, and records get a "caption"; no classes.
      plain     files only, no sub-folders: no classes, examples sorted by name.
      classes   sub-folders only: their sorted names are the labels 0, 1, ...; examples sorted by path, at any depth.

    Every file is an example, except names with a leading dot. One that does not decode to a whole image is bad: record
    i is then the record of the next good file (i + 1, ..., around the end), so that the length and all other records
    stay what they are, for every reader. Each bad file is logged by name; once more than `max_bad` are known the
    source refuses and lists them. check() decodes everything to know them all at once; without it they are found as
    they are read, by each process for itself.

    A subclass says what an example is: NOUN and A_NOUN for messages, decode(path) -> uint8 array, raising one of ERRORS
    for a bad file, and image_shape.

    Args:
      path: the directory. max_bad: as above. reading: what decode() depends on, for the fingerprint.

    Raises: FileNotFoundError where there is no such directory, ValueError where there are no files, or files beside
      class folders, or a line of captions.jsonl that is not as above; when reading, ValueError for bad files.
    """

    NOUN: str
    A_NOUN: str
    ERRORS: tuple[type[Exception], ...]

    def __init__(self, path: str | pathlib.Path, *, max_bad: int, reading: tuple[str, ...]):
        where = f"set config.data.path to the directory of the {self.NOUN}s"
        self.root = pathlib.Path(path).expanduser().absolute()
        if not self.root.is_dir():
            raise FileNotFoundError(f"no directory {self.root}: {where}")
        self.max_bad = max_bad
        self.class_names: tuple[str, ...] = ()
        self._captions = None
        self._labels = None
        self._bad: dict[int, str] = {}  # index -> reason, as far as known
        if (self.root / CAPTIONS_FILE).is_file():
            self._files, self._captions = _read_captions(self.root)
        else:
            self._files = _list_files(self.root)
            self._read_classes()
        if not self._files:
            raise ValueError(f"no {self.NOUN}s in {self.root}: {where}")
        sizes = (f"{file}:{_size(self.root / file)}" for file in self._files)
        self.fingerprint = fingerprint_of((*reading, *sizes, *(self._captions or ())))

    def _read_classes(self) -> None:
        loose = [file for file in self._files if "/" not in file]
        if len(loose) == len(self._files):
            return
        if loose:
            raise ValueError(
                f"{self.root} has files beside its class folders, such as {loose[0]} ({len(loose)} in all): "
                "move each into the folder of its class"
            )
        folders = [file.split("/")[0] for file in self._files]
        self.class_names = tuple(sorted(set(folders)))
        label_of = {name: label for label, name in enumerate(self.class_names)}
        self._labels = [label_of[folder] for folder in folders]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def captions(self) -> tuple[str, ...] | None:
        """The caption of every example, in order, without decoding; None in a folder without captions.jsonl."""
        return None if self._captions is None else tuple(self._captions)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        for offset in range(len(self)):
            i = (index + offset) % len(self)
            if i not in self._bad:
                try:
                    image = self.decode(self.root / self._files[i])
                except self.ERRORS as error:
                    self._add_bad(i, str(error))
                else:
                    record = {"image": image, "label": np.int32(self._labels[i] if self._labels else 0)}
                    return {**record, "caption": self._captions[i]} if self._captions else record
            self._refuse_too_many()
        raise ValueError(f"none of the {len(self)} files in {self.root} is {self.A_NOUN}")

    def _add_bad(self, index: int, reason: str) -> None:
        form = "%s is not a whole %s (%s): the next one takes its place"
        logging.warning(form, self._files[index], self.NOUN, reason)
        self._bad[index] = reason

    def _refuse_too_many(self) -> None:
        if len(self._bad) <= self.max_bad:
            return
        names = [f"{self._files[i]} ({self._bad[i]})" for i in sorted(self._bad)]
        more = f" and {len(names) - NAMES_PER_MESSAGE} more" if len(names) > NAMES_PER_MESSAGE else ""
        raise ValueError(
            f"{len(names)} of {len(self)} files in {self.root} are not whole {self.NOUN}s, data.max_bad_images is "
            f"{self.max_bad}: {', '.join(names[:NAMES_PER_MESSAGE])}{more}; repair or remove them"
        )

    def check(self) -> None:
        """Decodes every file; ValueError lists the bad ones."""

        def reason(index: int) -> str | None:
            try:
                self.decode(self.root / self._files[index])
            except self.ERRORS as error:
                return str(error)

        with ThreadPoolExecutor(CHECK_THREADS) as pool:
            for index, found in enumerate(pool.map(reason, range(len(self)))):
                if found is not None:
                    self._add_bad(index, found)
        self._refuse_too_many()

    def describe(self) -> str:
        kind = "captions" if self._captions else f"{self.num_classes} classes"
        return f"{self.NOUN} folder {self.root}: {len(self)} files, {kind}"


class ImageFolder(Folder):
    """The image files below a directory, in one of the layouts of Folder, decoded as decode_image does.

    check() reads some 500 to 1,000 JPEGs of 500x375 a second and core.

    Args:
      path: the directory. channels: 3 (RGB) or 1 (grey), whatever the files hold. max_bad_images: see Folder.

    Raises: as Folder; ValueError for other channels.
    """

    NOUN, A_NOUN = "image", "an image"
    ERRORS = DECODE_ERRORS

    def __init__(self, path: str | pathlib.Path, *, channels: int = 3, max_bad_images: int = 0):
        check_channels(channels)
        self.channels = channels
        super().__init__(path, max_bad=max_bad_images, reading=(str(channels),))

    @property
    def image_shape(self) -> tuple[None, None, int]:
        return (None, None, self.channels)

    def decode(self, path: pathlib.Path) -> np.ndarray:
        return decode_image(path, self.channels)


class Tfds:
    """A split of a data set prepared by TFDS as ArrayRecord files, read without TensorFlow.

    Its feature "image" is a tfds.features.Image, "label" a ClassLabel or absent (num_classes 0). Images are decoded as
    those of an ImageFolder are. check() does nothing: TFDS validated the records when it wrote them.

    Args:
      path: of the prepared version, DATA_DIR/NAME[/CONFIG]/VERSION. split: as TFDS spells it: "train", "train[:10%]".
      channels: 3 (RGB) or 1 (grey), whatever the files hold.

    Raises: FileNotFoundError where path is no prepared data set; ValueError for another file format, other features
      and an unknown split; when reading, ValueError for an example without a label (-1, as in test splits).
    """

    def __init__(self, path: str | pathlib.Path, split: str, *, channels: int = 3):
        import tensorflow_datasets as tfds  # slow to import

        check_channels(channels)
        root = tfds.core.Path(path).expanduser()
        if not (root / "dataset_info.json").exists():
            raise FileNotFoundError(
                f"{root} is not a data set prepared by TFDS (it has no dataset_info.json): set config.data.path to its "
                "DATA_DIR/NAME/VERSION"
            )
        builder = tfds.builder_from_directory(root)
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
        self.image_shape = (height, width, channels)
        self.name = f"{builder.info.full_name} ({split})"
        self._data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        files = [f"{file.name}:{file.stat().length}" for file in builder.info.splits[split].filepaths]
        self.fingerprint = fingerprint_of((self.name, str(self.image_shape), *files))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        record = self._data[index]
        label = record["label"] if self.num_classes else 0
        if label < 0:  # how TFDS marks a missing label
            raise ValueError(f"TFDS {self.name}: label {label} of example {index} is out of range: take another split")
        return {"image": decode_image(record["image"], self.image_shape[-1]), "label": np.int32(label)}

    def describe(self) -> str:
        return f"TFDS {self.name}: {len(self)} images, {self.num_classes} classes"

    def check(self) -> None:
        pass
