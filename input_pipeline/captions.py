"""Captions as numbers: token ids made while the records are read, or the stored features of a frozen text encoder.

    tokenized          record["caption"] -> "text_ids" int32 [L], "text_mask" bool [L]; the encoder runs on the device
    with_stored_text   record["caption"] -> "text" float16 [L, width], "text_mask" bool [L]; the encoder ran once
                       (nested/latents/captions.py)

A caption may be several texts of one image. Records then have the fields of the first text, and in training
(sources.draw, in loader.batches) those of one text drawn at equal odds, U-ViT's recipe for COCO.

L is max_tokens. The mask is True on a text's tokens, which come first (input_pipeline/tokens.py). The null text of
classifier-free guidance is the empty caption "". A record without a caption, or with one of white space only, is
refused.

A text store is a folder of
    keys.npy      S32 [N]           hex digits of the SHA-256 of each distinct caption, sorted: a caption's row
    starts.npy    int64 [N + 1]     row i's tokens are starts[i] to starts[i + 1]
    features.npy  float16 [T, width]  the tokens of all captions, without padding
    text.json     the encoder and the sizes of the files; it is written last, so that a folder without it is not a store
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import numpy as np

from input_pipeline.composition import Mapped, RecordMap
from input_pipeline.sources import Caption, Record, Source
from input_pipeline.tokens import Tokenizer

INDEX_FILE = "text.json"
ARRAYS = ("keys", "starts", "features")
NAMES_PER_MESSAGE = 5


def texts_of(caption: Caption) -> tuple[str, ...]:
    """The texts of a caption. The first one is used wherever none is drawn."""
    return (caption,) if isinstance(caption, str) else tuple(caption)


def every_text(captions: Iterable[Caption]) -> list[str]:
    """All texts of the captions, in order."""
    return [text for caption in captions for text in texts_of(caption)]


def captions(source: Source) -> list[Caption]:
    """The caption of every record, in order. Images are decoded only if the source has no `captions` of its own.

    Raises: ValueError, one line that counts and names the records without a caption, or with an empty one.
    """
    known: Sequence[Caption] | None = getattr(source, "captions", None)
    found = [source[i].get("caption") for i in range(len(source))] if known is None else known
    present = [caption for caption in found if _has_text(caption)]
    if len(present) < len(found):
        absent = [i for i, caption in enumerate(found) if not _has_text(caption)]
        raise ValueError(
            f"{len(absent)} of {len(found)} examples have no caption or an empty one, such as {_some(absent)}: "
            f"give each a text ({source.describe()})"
        )
    return present


def _has_text(caption: Caption | None) -> TypeGuard[Caption]:
    return bool(caption) and all(text and not text.isspace() for text in texts_of(caption))


def _some(names: Sequence) -> str:
    more = ", ..." if len(names) > NAMES_PER_MESSAGE else ""
    return ", ".join(repr(name) for name in names[:NAMES_PER_MESSAGE]) + more


@dataclass(frozen=True, eq=False)
class AddCaptions(RecordMap):
    """Adds "caption" to records without one, such as encoded latents: that of the image with the same number.

    captions: one per record of the source, in order.
    """

    captions: Sequence[Caption]

    def __call__(self, record: Record, index: int, generator: np.random.Generator | None) -> Record:
        return {**record, "caption": self.captions[index]}

    def captions_after(self, captions: tuple[Caption, ...] | None) -> tuple[Caption, ...]:
        return tuple(self.captions)

    def fingerprint_parts(self) -> Iterable[str]:
        return (caption if isinstance(caption, str) else repr(caption) for caption in self.captions)

    def describe(self) -> str:
        return "with captions"


@dataclass(frozen=True)
class DrawCaption(RecordMap):
    """Replaces several texts of one image by one of them, drawn at equal odds, or by the first where none is drawn.

    The generator is left alone for a caption of one text. Raises: ValueError for a record without a caption.
    """

    def __call__(self, record: Record, index: int, generator: np.random.Generator | None) -> Record:
        caption = record.get("caption")
        if not _has_text(caption):
            raise ValueError(f"example {index} has no caption, or an empty one: give it one")
        texts = texts_of(caption)
        drawn = 0 if generator is None or len(texts) == 1 else int(generator.integers(len(texts)))
        return {**record, "caption": texts[drawn]}

    def captions_after(self, captions: tuple[Caption, ...] | None) -> None:
        """None: which of the texts a record has is drawn."""


@dataclass(frozen=True, eq=False)
class Tokenize(RecordMap):
    """Replaces "caption", a text, by "text_ids" int32 [max_tokens] and "text_mask" bool [max_tokens]."""

    tokenizer: Tokenizer

    def __call__(self, record: Record, index: int, generator: np.random.Generator | None) -> Record:
        ids_NL, mask_NL = self.tokenizer([record["caption"]])
        return {**_without_caption(record), "text_ids": ids_NL[0], "text_mask": mask_NL[0]}

    def captions_after(self, captions: tuple[Caption, ...] | None) -> None:
        """None: its records have no caption."""

    def fingerprint_parts(self) -> Iterable[str]:
        return (self.tokenizer.fingerprint,)

    def describe(self) -> str:
        return f"captions of at most {self.tokenizer.max_tokens} tokens"


def _without_caption(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "caption"}


def tokenized(source: Source, tokenizer: Tokenizer) -> Mapped:
    """The source with token ids of one text of each caption in place of "caption": see DrawCaption and Tokenize."""
    return Mapped(source, (DrawCaption(), Tokenize(tokenizer)))


def with_captions(source: Source, captions: Sequence[Caption]) -> Mapped:
    """The source with "caption" of the images that its records were made from.

    captions: one per record, in order. Raises: ValueError for more or fewer.
    """
    if len(captions) != len(source):
        raise ValueError(
            f"{len(captions)} captions for {len(source)} records ({source.describe()}): they must be of the same "
            "images; encode them again"
        )
    return Mapped(source, (AddCaptions(captions),))


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """The keys of the texts in a store, S32 [N], in the same order."""
    return np.array([hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts], "S32")


@dataclass(frozen=True, eq=False)
class LookUpText(RecordMap):
    """Replaces "caption", a text, by its stored features.

    These are "text" float16 [max_tokens, width], zero where masked, and "text_mask" bool [max_tokens].

    directory: a text store (nested/latents/captions.py writes it).
    encoder: the fingerprint that the store's encoder must have; None accepts any.
    index: the content of text.json, with "name", "encoder" (fingerprint), "max_tokens" and "width".

    Raises, in one line: FileNotFoundError if there is no finished store; ValueError for a store that another encoder
    made, and for a damaged one.
    """

    directory: str | pathlib.Path
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.encoder is not None and self.encoder != self.index["encoder"]:
            raise ValueError(
                f"{self._path}: the features were made by {self.index['name']} with {self.index['max_tokens']} tokens, "
                f"fingerprint {self.index['encoder'][:16]}, this run's encoder is {self.encoder[:16]}: remove the "
                "folder to make them again, name another folder, or use the options of that encoder"
            )
        for name in ARRAYS:
            file = self._path / f"{name}.npy"
            expected, found = self.index["bytes"][name], file.stat().st_size if file.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes, {expected} were written"
                raise ValueError(f"{file}: {state}; remove the folder {self._path} to make the features again")

    def require_texts(self, texts: Iterable[str]) -> None:
        """Raises ValueError, one line that counts and names them, for texts that the store has no features of."""
        distinct = sorted(set(texts))
        missing = np.flatnonzero(~np.isin(keys_of(distinct), self._arrays["keys"]))
        if len(missing):
            raise ValueError(
                f"{self._path}: no features for {len(missing)} of {len(distinct)} captions, such as "
                f"{_some([distinct[i] for i in missing])}: remove the folder to make them again"
            )

    def __call__(self, record: Record, index: int, generator: np.random.Generator | None) -> Record:
        return {**_without_caption(record), **self.look_up(record["caption"])}

    def look_up(self, text: str) -> Record:
        """The stored fields of a text; those of the null text, the empty caption, are look_up("")."""
        row = int(np.searchsorted(self._arrays["keys"], keys_of([text]))[0])
        start, stop = self._arrays["starts"][row : row + 2]
        text_LC = np.zeros((self.index["max_tokens"], self.index["width"]), np.float16)
        text_LC[: stop - start] = self._arrays["features"][start:stop]
        return {"text": text_LC, "text_mask": np.arange(len(text_LC)) < stop - start}

    def captions_after(self, captions: tuple[Caption, ...] | None) -> None:
        """None: its records have no caption."""

    def fingerprint_parts(self) -> Iterable[str]:
        return (self.index["encoder"],)

    def describe(self) -> str:
        shape = f"{self.index['max_tokens']}x{self.index['width']}"
        return f"features of {self.index['name']} {shape} from {self._path}"

    @cached_property
    def index(self) -> dict:
        return read_index(self._path)

    @property
    def _path(self) -> pathlib.Path:
        return pathlib.Path(self.directory).expanduser().absolute()

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: np.load(self._path / f"{name}.npy", mmap_mode="r") for name in ARRAYS}

    def __getstate__(self) -> dict:  # a pickled memory map is a copy of its file
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}


def with_stored_text(source: Source, directory: str | pathlib.Path, encoder: str | None = None) -> Mapped:
    """The source with stored features of one text of each caption in place of "caption".

    Args:
      source: with captions, all of which must be in the store.
      directory, encoder: of the store, see LookUpText.

    Raises: as LookUpText; ValueError for texts that the store lacks, and for records without a caption.
    """
    store = LookUpText(directory, encoder)
    store.require_texts(every_text(captions(source)))
    return Mapped(source, (DrawCaption(), store))


def read_index(directory: pathlib.Path) -> dict:
    """The content of text.json of a finished store. Raises: FileNotFoundError or ValueError, in one line."""
    path = pathlib.Path(directory) / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found: the text features were not (completely) made; make them first")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); remove the folder to make the features again") from error
