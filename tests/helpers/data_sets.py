"""Small data sets in the formats of the large ones: COCO, ImageNet's training tar, Parquet, animations."""

import dataclasses
import io
import json

import pyarrow
import pyarrow.parquet
from PIL import Image

from helpers.tar_files import jpeg, tar
from input_pipeline.options import ImageSourceOptions
from nested.build.sources import build_images

COCO_IMAGES = [{"id": 30, "file_name": "c.jpg"}, {"id": 10, "file_name": "a.jpg"}, {"id": 20, "file_name": "b.jpg"}]
COCO_CAPTIONS = {10: ("a dog", "ein Hund", "some dog"), 20: ("a cat",), 30: ("a cow", "eine Kuh")}
COCO_ANNOTATIONS = [
    {"id": 100 * image + number, "image_id": image, "caption": caption}
    for number in range(3)
    for image, captions in COCO_CAPTIONS.items()
    for caption in captions[number : number + 1]
]
IMAGENET_TRAIN = {
    "n02119789.tar": {"n02119789_2.JPEG": jpeg(30), "n02119789_10.JPEG": jpeg(40)},
    "n01440764.tar": {"n01440764_5.JPEG": jpeg(10)},
    "n02100735.tar": {"n02100735_1.JPEG": jpeg(20)},
}


def write_coco(folder, images=COCO_IMAGES, annotations=COCO_ANNOTATIONS, split="train2014"):
    (folder / split).mkdir(exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for name, level in (("a", 10), ("b", 20), ("c", 30)):
        (folder / split / f"{name}.jpg").write_bytes(jpeg(level))
    content = {"info": {}, "images": images, "annotations": annotations}
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_imagenet_train(folder, content=None):
    inner = {name: tar(images) for name, images in (content or IMAGENET_TRAIN).items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    return folder


def parquet_images(levels):
    return [{"bytes": jpeg(level), "path": f"{level}.jpg"} for level in levels]


def write_parquet(folder, name, columns, group=2, names=()):
    """A file of row groups of `group` rows; names: of the classes, as Hugging Face notes them."""
    table = pyarrow.table(columns)
    if names:
        note = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(table, folder / name, row_group_size=group)
    return folder


def animation(base, frames=9):
    """A WebP whose frame k has the grey level base + k."""
    first, *others = [Image.new("RGB", (4, 6), (base + number,) * 3) for number in range(frames)]
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, lossless=True)
    return file.getvalue()


def class_file(folder, *names):
    """A file for config.data.classes, beside the folder."""
    path = folder.with_name(f"{folder.name}-classes.txt")
    path.write_text("\n".join(names))
    return str(path)


def source_kind(open_source):
    """A source for the table nested.build.parts.SOURCES, which opens to what open_source() returns."""

    @dataclasses.dataclass(frozen=True)
    class Kind(ImageSourceOptions):
        def open(self):
            return open_source()

    return Kind


def open_images(config):
    """The opened images of config.data."""
    return build_images(config).open()
