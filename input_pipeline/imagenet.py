"""ImageNet-1k from the tars in which it is distributed, without unpacking them.

    train       ILSVRC2012_img_train.tar: a tar of one tar of JPEGs per class, n01440764.tar, ...
    validation  ILSVRC2012_img_val.tar: 50,000 JPEGs; their classes are read from a file val_labels.txt of lines
                "ILSVRC2012_val_00000001.JPEG n01751748", or else from ILSVRC2012_devkit_t12.tar.gz

A label is the position of the class' WordNet id among the sorted ids, as in TFDS and torchvision. The kit's own numbers
(ILSVRC2012_ID) have another order: data/meta.mat gives the id of each (devkit.py).
"""

import pathlib
import re
from dataclasses import dataclass

import numpy as np

from input_pipeline import devkit, tars
from input_pipeline.decoded import Decoded, choose_classes, some
from input_pipeline.options import ClassOptions, FileOptions, IndexOptions, SplitOptions
from input_pipeline.sources import fingerprint_of
from input_pipeline.transforms import DECODE_ERRORS, check_channels, decode_image

TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
LABELS_FILE, KIT = "val_labels.txt", "ILSVRC2012_devkit_t12.tar.gz"
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class ImageNetTar(FileOptions, SplitOptions, ClassOptions, IndexOptions):
    """A split of ImageNet-1k, sorted by class, then by file name. Each image is read at its place in the tar.

    path: the folder of the tars. split: "train" or "validation".
    classes: WordNet ids of a subset, whose labels are then 0, 1, ... in sorted order.

    open() raises: ValueError for another split, damaged tars, members with other names, images without a label,
      unknown classes; FileNotFoundError for an absent tar or the labels of the validation split.
    """

    def open(self) -> "ImageNetTarSource":
        return ImageNetTarSource(self)


class ImageNetTarSource(Decoded):
    """An opened ImageNetTar.

    shard_ends: where the examples of each class end; the classes are the shards.
    """

    NOUN, A_NOUN = "image", "an image"
    ERRORS = DECODE_ERRORS

    def __init__(self, options: ImageNetTar):
        check_channels(options.channels)
        split, channels, classes = options.split, options.channels, options.class_names()
        if split not in TARS:
            raise ValueError(f"split must be one of {sorted(TARS)}, found {split!r}")
        root = pathlib.Path(options.path).expanduser().absolute()
        self.tar, self.channels, self.split = root / TARS[split], channels, split
        if not self.tar.is_file():
            raise FileNotFoundError(f"no {self.tar.name} in {root}: set config.data.path to the folder of the tars")
        walk = _training if split == "train" else _validation
        index = tars.read_or_make_index(
            options.index_dir,
            ("imagenet", split, tars.state_of(self.tar), *_states(root, split)),
            lambda: walk(self.tar),
        )
        names = tuple(index["classes"].astype(str).tolist())
        indices, labels = np.arange(len(index["labels"])), index["labels"]
        if classes:
            indices, labels, names = choose_classes(names, labels, classes, str(self.tar))
        self._files, self._offsets, self._sizes = (index[key][indices] for key in ("files", "offsets", "sizes"))
        self.shard_ends = np.searchsorted(labels, np.arange(len(names)), side="right")
        content = (array.tobytes() for array in (self._files, self._sizes, np.asarray(labels, np.int32)))
        self.fingerprint = fingerprint_of((self.tar.name, str(channels), *names, *content))
        super().__init__(
            f"images in {self.tar}", len(self._files), max_bad=options.max_bad_images, labels=labels, class_names=names
        )

    @property
    def image_shape(self) -> tuple[None, None, int]:
        return (None, None, self.channels)

    def name(self, index: int) -> str:
        return self._files[index].decode()

    def data(self, index: int) -> bytes:
        return tars.read(self.tar, int(self._offsets[index]), int(self._sizes[index]))

    def decode(self, data: bytes) -> np.ndarray:
        return decode_image(data, self.channels)

    def describe(self) -> str:
        return f"ImageNet ({self.split}) in {self.tar}: {len(self)} images, {self.num_classes} classes"


def _states(root: pathlib.Path, split: str) -> list[str]:
    """The states of the files that the labels come from."""
    files = [root / LABELS_FILE, root / KIT] if split == "validation" else []
    return [tars.state_of(file) for file in files if file.is_file()]


def _index(classes: list[str], entries: list[tuple[str, int, int, int]]) -> dict[str, np.ndarray]:
    """The arrays of an index, sorted by label and file. entries: (file, label, offset, size) of each image."""
    entries = sorted(entries, key=lambda entry: (entry[1], entry[0]))
    files, labels, offsets, sizes = zip(*entries, strict=True)
    return {
        "classes": tars.names_array(classes),
        "files": tars.names_array(files),
        "labels": np.array(labels, np.int32),
        "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
    }


def _training(tar: pathlib.Path) -> dict[str, np.ndarray]:
    """The index of the training tar."""
    inner = sorted(tars.members(tar))
    odd = [name for name, *_ in inner if not WNID.fullmatch(name.removesuffix(".tar")) or not name.endswith(".tar")]
    if odd or not inner:
        raise ValueError(f"{tar}: expected tars of classes such as n01440764.tar, found {some(odd) or 'nothing'}")
    entries = []
    for label, (name, offset, size) in enumerate(inner):
        try:
            images = tars.members(tar, offset, size)
        except ValueError as error:
            raise ValueError(f"{error} (its member {name})") from error
        if not images:
            raise ValueError(f"{tar}: its member {name} holds no images: copy the tar again")
        entries += [(file, label, start, length) for file, start, length in images]
    return _index([name.removesuffix(".tar") for name, *_ in inner], entries)


def _validation(tar: pathlib.Path) -> dict[str, np.ndarray]:
    """The index of the validation tar."""
    wnid_of = _labels(tar.parent)
    classes = sorted(set(wnid_of.values()))
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    images = tars.members(tar)
    absent = [name for name, *_ in images if name not in wnid_of]
    if absent or not images:
        what = f"{len(absent)} of {len(images)} images have no label: {some(absent)}" if images else "no images"
        raise ValueError(f"{tar}: {what}; check {LABELS_FILE} or {KIT} beside it")
    return _index(classes, [(name, label_of[wnid_of[name]], start, length) for name, start, length in images])


def _labels(root: pathlib.Path) -> dict[str, str]:
    """{file name: WordNet id} of the validation images."""
    if (root / LABELS_FILE).is_file():
        lines = (root / LABELS_FILE).read_text(encoding="utf-8").split("\n")
        found = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if words and (len(words) != 2 or not WNID.fullmatch(words[1])):
                raise ValueError(f"{root / LABELS_FILE} line {number} is not 'NAME.JPEG n01440764': {line[:80]!r}")
            if words:
                found[words[0]] = words[1]
        return found
    if (root / KIT).is_file():
        wnids = devkit.validation_wnids(root / KIT)
        return {f"ILSVRC2012_val_{number:08}.JPEG": wnid for number, wnid in enumerate(wnids, 1)}
    raise FileNotFoundError(
        f"neither {LABELS_FILE} nor {KIT} is in {root}, but one is needed for the classes of {TARS['validation']}: put "
        "one there, or use data.source tfds or a tree of class folders (image_folder)"
    )
