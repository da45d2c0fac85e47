"""COCO's images with their captions: annotations/captions_SPLIT.json beside the folder SPLIT of JPEGs.

There is one record per image, sorted by the image's id. "caption" is the tuple of its texts (five or more), in the
order of the file. Training draws one of them each time, and everything else takes the first
(input_pipeline/captions.py), which is U-ViT's recipe.
"""

import json
import os
import pathlib
from dataclasses import dataclass

import numpy as np

from input_pipeline.decoded import JSON_ERRORS, Decoded, is_text, read_file, some
from input_pipeline.options import FileOptions, SplitOptions
from input_pipeline.sources import fingerprint_of
from input_pipeline.transforms import DECODE_ERRORS, check_channels, decode_image


@dataclass(frozen=True, kw_only=True)
class Coco(FileOptions, SplitOptions):
    """A split of COCO captions.

    path: the folder of annotations/ and of the splits' folders. split: "train2014", "val2014" or another.

    open() raises: FileNotFoundError for an absent file or folder; ValueError, one line that counts and names them, for
      a file that is not JSON of this form, ids that come twice, captions of no listed image, images without a caption,
      and images that are listed but not in the folder.
    """

    def open(self) -> "CocoSource":
        return CocoSource(self)


class CocoSource(Decoded):
    """An opened Coco."""

    NOUN, A_NOUN = "image", "an image"
    ERRORS = DECODE_ERRORS

    def __init__(self, options: Coco):
        check_channels(options.channels)
        root, split = pathlib.Path(options.path).expanduser().absolute(), options.split
        self.file, self.folder = root / "annotations" / f"captions_{split}.json", root / split
        self.channels, self.split = options.channels, split
        for place, exists in ((self.file, self.file.is_file()), (self.folder, self.folder.is_dir())):
            if not exists:
                raise FileNotFoundError(
                    f"no {place}: set config.data.path to the folder of annotations/ and {split}/, and data.split"
                )
        images, captions = _read(self.file)
        self._files = [images[number] for number in sorted(images)]
        present = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file()}
        absent = [file for file in self._files if file not in present]
        _refuse(self.file, absent, f"images that are not in {self.folder}", "copy them there")
        texts = [tuple(captions[number]) for number in sorted(images)]
        sizes = (f"{file}:{present[file]}" for file in self._files)
        counted = (part for of_image in texts for part in (str(len(of_image)), *of_image))
        self.fingerprint = fingerprint_of((str(self.channels), *sizes, *counted))
        self.number_of_texts = sum(len(of_image) for of_image in texts)
        super().__init__(f"images in {self.folder}", len(self._files), max_bad=options.max_bad_images, captions=texts)

    @property
    def image_shape(self) -> tuple[None, None, int]:
        return (None, None, self.channels)

    def name(self, index: int) -> str:
        return self._files[index]

    def data(self, index: int) -> bytes:
        return read_file(self.folder / self._files[index])

    def decode(self, data: bytes) -> np.ndarray:
        return decode_image(data, self.channels)

    def describe(self) -> str:
        return f"COCO ({self.split}) {self.folder.parent}: {len(self)} images, {self.number_of_texts} captions"


def _read(file: pathlib.Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """({image id: file name}, {image id: captions})."""
    try:
        content = json.loads(read_file(file))
        listed = _rows(content, "images", {"id": int, "file_name": str})
        annotations = _rows(content, "annotations", {"id": int, "image_id": int, "caption": str})
    except (*JSON_ERRORS, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a file of COCO captions ({error!r}): get it again") from error
    images = dict(listed)
    repeated = _repeated([number for number, _ in listed]) + _repeated([name for _, name in listed])
    _refuse(file, repeated, "images that come twice", "get the file again")
    _refuse(file, _repeated([number for number, *_ in annotations]), "captions that come twice", "get the file again")
    captions: dict[int, list[str]] = {number: [] for number in images}
    lost = [str(number) for number, image, _ in annotations if image not in captions]
    _refuse(file, lost, "captions of images that it does not list", "get the file again")
    for _, image, text in annotations:
        captions[image].append(text)
    _refuse(file, [images[i] for i, texts in captions.items() if not texts], "images without a caption", "remove them")
    if not images:
        raise ValueError(f"{file} names no images; get the file again")
    return images, captions


def _rows(content: dict, name: str, types: dict[str, type]) -> list[tuple]:
    """The fields, by name, of each entry of a list in the file.

    Raises: TypeError, which names the first value of another type. A text with half of a surrogate pair, which UTF-8
      cannot encode, is not a str here.
    """
    rows = [tuple(entry[field] for field in types) for entry in content[name]]
    for number, row in enumerate(rows):
        for (field, kind), value in zip(types.items(), row, strict=True):
            if not (is_text(value) if kind is str else type(value) is kind):
                raise TypeError(f"{name}[{number}] has {field} {value!r:.80}, expected {kind.__name__}")
    return rows


def _repeated(values: list) -> list[str]:
    """The values that occur more than once, from their second time on."""
    seen, repeated = set(), []
    for value in values:
        if value in seen:
            repeated.append(str(value))
        seen.add(value)
    return repeated


def _refuse(file: pathlib.Path, names: list[str], what: str, advice: str) -> None:
    """Raises ValueError, which counts and names them, if there are any names."""
    if names:
        raise ValueError(f"{file} names {len(names)} {what}: {some(names)}; {advice}")
