"""Where data come from: sources of images, captions and latents by file format, and their way into batches.

A source is described by its options, opened by open(), and changed by small record maps; input_pipeline.loader makes
batches of it, the same ones for any number of threads, processes and hosts. This package imports nothing of ours and no
jax of its own; the loader is not imported here, because its library, grain, takes seconds to import.
"""

from input_pipeline.augment import Augmentation
from input_pipeline.captions import texts_of, tokenized, with_captions, with_stored_text
from input_pipeline.clips import ClipFolder
from input_pipeline.coco import Coco
from input_pipeline.composition import Cached, Mapped, RecordMap, Subset, select_fields
from input_pipeline.digits import Digits
from input_pipeline.idx import Idx
from input_pipeline.image_files import ImageFolder, Tfds
from input_pipeline.imagenet import ImageNetTar
from input_pipeline.in_memory import ImagesInMemory
from input_pipeline.latent_records import LatentRecords
from input_pipeline.options import DataOptions, ImageData, ImageSourceOptions, SourceOptions
from input_pipeline.parquet import Parquet
from input_pipeline.sources import Caption, ImageSource, Record, Source, draw, fingerprint_of, shard_ends
from input_pipeline.synthetic import SyntheticLatents
from input_pipeline.tokens import Tokenizer, read_tokenizer
from input_pipeline.transforms import resized
from input_pipeline.webdataset import WebDataset, WebDatasetClips

__all__ = [
    "Augmentation", "Cached", "Caption", "ClipFolder", "Coco", "DataOptions", "Digits", "Idx", "ImageData",
    "ImageFolder", "ImageNetTar", "ImageSource", "ImageSourceOptions", "ImagesInMemory", "LatentRecords", "Mapped",
    "Parquet", "Record", "RecordMap", "Source", "SourceOptions", "Subset", "SyntheticLatents", "Tfds", "Tokenizer",
    "WebDataset", "WebDatasetClips", "draw", "fingerprint_of", "read_tokenizer", "resized", "select_fields",
    "shard_ends", "texts_of", "tokenized", "with_captions", "with_stored_text",
]  # fmt: skip
