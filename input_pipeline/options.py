"""The options of data: those of each source (SourceOptions), and those that apply to the images of any (DataOptions).

A source is described by a frozen dataclass, and opened by its open(): the description reads no file, so that a config
can be turned into objects, and checked, on a machine without the data. A field annotated with a comment,

    path: Annotated[str, "folder or file of the data"] = ""

is the option of that name in config.data. A field without a comment is decided by other options or by the model. An
option of several sources is declared once, in one of the base classes here.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar, Literal

from input_pipeline.composition import Cached
from input_pipeline.decoded import read_class_names
from input_pipeline.sources import ImageSource, Source
from input_pipeline.transforms import resized


@dataclass(frozen=True)
class SourceOptions:
    """The description of where data come from. Each source is a frozen dataclass derived from this one.

    clips: whether its images have a time axis. synthetic: whether its records are random latents, without images.
    """

    clips: ClassVar[bool] = False
    synthetic: ClassVar[bool] = False

    def open(self) -> Source:
        """Lists the files or reads the index, and returns the records. Raises: see the class."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImageSourceOptions(SourceOptions):
    """Where images, or clips, come from."""

    def open(self) -> ImageSource:
        raise NotImplementedError


@dataclass(frozen=True)
class PathOptions(ImageSourceOptions):
    """Sources of files. path is the only option that may be given by position."""

    path: Annotated[str, "the folder of the data"] = ""
    _: KW_ONLY


@dataclass(frozen=True, kw_only=True)
class ColorOptions(PathOptions):
    """Sources whose images are converted as they are decoded. channels: 1 (grey) or 3 (RGB)."""

    channels: int = 3


@dataclass(frozen=True, kw_only=True)
class FileOptions(ColorOptions):
    """Sources whose images or clips are decoded when they are read, and where some may be bad, see decoded.py."""

    max_bad_images: Annotated[
        int, "files that cannot be decoded are replaced by the next ones; more than this number are an error"
    ] = 0


@dataclass(frozen=True, kw_only=True)
class SplitOptions(PathOptions):
    """Sources with several splits."""

    split: Annotated[
        str, "idx: train | test; imagenet_tar: train | validation; coco: train2014 | val2014; tfds: its own"
    ] = "train"


@dataclass(frozen=True, kw_only=True)
class ClassOptions(PathOptions):
    """Sources that can read only some of their classes."""

    classes: Annotated[str, "a text file of class names, one per line, to read only those classes; '': all"] = ""

    def class_names(self) -> tuple[str, ...]:
        """The names in the file, () for all classes. Raises: as read_class_names."""
        return read_class_names(self.classes) if self.classes else ()


@dataclass(frozen=True, kw_only=True)
class IndexOptions(PathOptions):
    """Sources that keep an index (tars.py)."""

    index_dir: Annotated[
        str, "where indexes of tars and of labels are kept; '': nested/ in the user's cache folder"
    ] = ""


@dataclass(frozen=True, kw_only=True)
class CaptionKeyOptions(PathOptions):
    """Sources whose captions have a name."""

    caption_key: Annotated[
        str, "parquet: the column of captions; webdataset: the key in a sample's .json, which is preferred to its .txt"
    ] = "caption"


@dataclass(frozen=True, kw_only=True)
class ClipOptions(FileOptions):
    """Sources of clips, of which the frames 0, frame_stride, ... are read."""

    clips: ClassVar[bool] = True

    frames: Annotated[int, "frames of a clip, every frame_stride-th of the file"] = 16
    frame_stride: Annotated[int, "1 takes successive frames, 4 every fourth"] = 4


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options of config.data that apply to any source."""

    num_classes: Annotated[int, "number of labels, checked against the data; 0: unlabelled"] = 0
    image_size: Annotated[int, "images are cropped and resized to this square; 0: left as they are"] = 0
    crop: Annotated[
        Literal["center", "center_lanczos", "stretch"],
        "crop to a square as ADM | as U-ViT on COCO | stretch the whole image",
    ] = "center"
    small_images: Annotated[
        Literal["resize", "refuse"], "images with a side below image_size are enlarged | an error"
    ] = "resize"
    channels: Annotated[Literal[0, 1, 3], "convert images to grey (1) or RGB (3); 0: as the data are"] = 0
    cache: Annotated[bool, "keep images in memory once they are read (in each process): for small folders"] = False
    shuffle: Annotated[
        Literal["global", "shards"], "all records at once | shards in random order, and records within shuffle_buffer"
    ] = "global"
    shuffle_buffer: Annotated[
        int, "with 'shards': how many successive records are shuffled at a time, such as 10_000"
    ] = 0
    check: Annotated[bool, "read every image once before training on pixels, to find bad files; False for millions"] = (
        True
    )
    flip: Annotated[bool, "mirror training images with probability 1/2 (encoded data hold both flips)"] = False
    augment_prob: Annotated[float, "non-leaking augmentation of training images; the backbone is told of it"] = 0.0
    downsampling: Annotated[Literal["average", "bilinear"], "how coarser resolutions of pixels are made"] = "average"
    holdout: Annotated[int, "number of records, evenly spaced, that are held out for the validation loss"] = 0

    def __post_init__(self) -> None:
        for name in ("crop", "small_images"):
            if getattr(self, name) != getattr(DataOptions, name) and not self.image_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} but image_size is 0, so that nothing is cropped: set both"
                )
        if (self.shuffle == "shards") != (self.shuffle_buffer > 0):
            raise ValueError(
                f"shuffle {self.shuffle!r} with shuffle_buffer {self.shuffle_buffer}: 'shards' needs a number of "
                "records to shuffle among, such as 10_000, and 'global' 0"
            )


@dataclass(frozen=True)
class ImageData:
    """The description of a source of images that are brought to one size. Nothing is read before open()."""

    source: ImageSourceOptions
    options: DataOptions

    def open(self) -> ImageSource:
        """Opens the source, checks its number of classes and channels, and applies image_size and cache.

        Raises: as the source; ValueError (one line) for another number of classes, and for other channels than the
          data's without image_size.
        """
        options, source = self.options, self.source.open()
        if source.num_classes != options.num_classes:
            raise ValueError(
                f"config.data.num_classes is {options.num_classes} but {source.describe()}; set it to "
                f"{source.num_classes}"
            )
        found = source.image_shape[-1]
        if options.image_size:
            channels = options.channels or found or 0
            source = resized(source, options.image_size, options.crop, channels, small=options.small_images)
        elif options.channels not in (0, found):
            raise ValueError(
                f"config.data.channels is {options.channels} but {source.describe()}; set data.image_size as well to "
                "convert the images, or data.channels to 0"
            )
        return Cached(source) if options.cache else source
