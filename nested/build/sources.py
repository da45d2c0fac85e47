"""Config -> the source of images: the only reader of the options of config.data that say where images come from."""

from input_pipeline import clips, coco, decoded, image_files, imagenet, parquet, sources, transforms, webdataset
from input_pipeline.composition import Cached
from nested.build.options import choose


def digits(data):
    return sources.Digits()


def idx(data):
    return sources.Idx(data.path, data.split, num_classes=data.num_classes)


def image_folder(data):
    return image_files.ImageFolder(data.path, classes=classes(data), **of_images(data))


def clip_folder(data):
    return clips.ClipFolder(data.path, **of_clips(data))


def tfds(data):
    return image_files.Tfds(
        data.path, data.split, classes=classes(data), channels=data.channels or 3, index_dir=data.index_dir
    )


def imagenet_tar(data):
    options = of_images(data)
    return imagenet.ImageNetTar(data.path, data.split, classes=classes(data), index_dir=data.index_dir, **options)


def coco_captions(data):
    return coco.Coco(data.path, data.split, **of_images(data))


def webdataset_images(data):
    keys = dict(caption_key=data.caption_key, index_dir=data.index_dir)
    return webdataset.WebDataset(data.path, **keys, **of_images(data))


def webdataset_clips(data):
    keys = dict(caption_key=data.caption_key, index_dir=data.index_dir)
    return webdataset.WebDatasetClips(data.path, **keys, **of_clips(data))


def parquet_files(data):
    keys = dict(image_key=data.image_key, caption_key=data.caption_key, label_key=data.label_key)
    return parquet.Parquet(data.path, classes=classes(data), window=data.shuffle_buffer, **keys, **of_images(data))


def of_images(data) -> dict:
    return dict(max_bad_images=data.max_bad_images, channels=data.channels or 3)


def of_clips(data) -> dict:
    return dict(
        frames=data.frames,
        stride=data.frame_stride,
        channels=data.channels or 3,
        max_bad_clips=data.max_bad_images,
    )


def classes(data) -> tuple[str, ...]:
    """The names in the file data.classes; () where there is none."""
    return decoded.read_class_names(data.classes) if data.classes else ()


SOURCES = {
    "digits": digits,
    "idx": idx,
    "image_folder": image_folder,
    "clip_folder": clip_folder,
    "tfds": tfds,
    "imagenet_tar": imagenet_tar,
    "coco": coco_captions,
    "webdataset": webdataset_images,
    "webdataset_clips": webdataset_clips,
    "parquet": parquet_files,
}

TARS, CLIPS = ("imagenet_tar", "webdataset", "webdataset_clips"), ("clip_folder", "webdataset_clips")
FILES = ("image_folder", "clip_folder", "coco", "parquet", *TARS)
# Option of config.data -> (its value where it says nothing, as in configs/common.py; the sources that read it).
SOME_READ = {
    "path": ("", ("idx", "tfds", *FILES)),
    "split": ("train", ("idx", "tfds", "imagenet_tar", "coco")),
    "classes": ("", ("image_folder", "tfds", "imagenet_tar", "parquet")),
    "frames": (16, CLIPS),
    "frame_stride": (4, CLIPS),
    "max_bad_images": (0, FILES),
    "index_dir": ("", ("tfds", *TARS)),
    "image_key": ("image", ("parquet",)),
    "caption_key": ("caption", ("webdataset", "webdataset_clips", "parquet")),
    "label_key": ("label", ("parquet",)),
    "num_examples": (0, ("synthetic",)),
}


def check_options(data) -> None:
    """ValueError for an option that is set and would not be read: by this source (synthetic is one), or without a
    data.image_size."""
    for name, (unset, readers) in SOME_READ.items():
        if data[name] != unset and data.source not in readers:
            raise ValueError(
                f"config.data.{name} is {data[name]!r}, which data.source {data.source!r} does not read, only "
                f"{', '.join(readers)}; set it to {unset!r}"
            )
    for name, unset in (("crop", "center"), ("small_images", "resize")):
        if data[name] != unset and not data.image_size:
            raise ValueError(
                f"config.data.{name} is {data[name]!r} but data.image_size is 0, so that nothing is cropped: set both"
            )


def images(config):
    """The source of images that config.data describes, cropped and resized as it says."""
    data = config.data
    make = choose("data.source", data.source, SOURCES)
    check_options(data)
    source = make(data)
    if source.num_classes != data.num_classes:
        raise ValueError(
            f"config.data.num_classes is {data.num_classes} but {source.describe()}; set it to {source.num_classes}"
        )
    if data.image_size:
        channels = data.channels or source.image_shape[-1]
        choose("data.crop", data.crop, transforms.CROPS)
        source = transforms.resized(source, data.image_size, data.crop, channels, small=data.small_images)
    elif data.channels not in (0, source.image_shape[-1]):
        raise ValueError(
            f"config.data.channels is {data.channels} but {source.describe()}; set data.image_size as well to convert "
            "the images, or data.channels to 0"
        )
    return Cached(source) if data.cache else source


def shard_window(config) -> int:
    """For loader.batches: 0 where config.data.shuffle is 'global'."""
    data = config.data
    shards = choose("data.shuffle", data.shuffle, {"global": False, "shards": True})
    if shards != (data.shuffle_buffer > 0):
        raise ValueError(
            f"config.data.shuffle {data.shuffle!r} with data.shuffle_buffer {data.shuffle_buffer}: 'shards' needs a "
            "number of records to shuffle among, such as 10_000, and 'global' 0"
        )
    return data.shuffle_buffer
