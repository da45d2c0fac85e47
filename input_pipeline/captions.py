"""Captions as numbers: token ids made while the records are read, or the stored features of a frozen text encoder.

    Tokenized   record["caption"] -> "text_ids" int32 [L], "text_mask" bool [L]; the encoder runs on the device
    StoredText  record["caption"] -> "text" float16 [L, width], "text_mask" bool [L]; it ran once
    (nested/latents/captions.py)

A caption may be several texts of one image: records then have the first one's fields, and training (sources.draw, in
loader.batches) those of one drawn at equal odds, U-ViT's recipe for COCO.

L is max_tokens; the mask is True on a text's tokens, which come first (input_pipeline/tokens.py). The null text of
classifier-free guidance is the empty caption "". A record without a caption, or with one of white space alone, is
refused.

A store is a folder of
    keys.npy      S32 [N]           hex digits of the SHA-256 of each distinct caption, sorted: a caption's row
    starts.npy    int64 [N + 1]     row i's tokens are starts[i] to starts[i + 1]
    features.npy  float16 [T, width]  the tokens of all captions, without padding
    text.json     written last, so a folder without it is not a store: the encoder and the sizes of the files
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from input_pipeline.sources import Source, fingerprint_of
from input_pipeline.tokens import Tokenizer

INDEX_FILE = "text.json"
ARRAYS = ("keys", "starts", "features")
NAMES_PER_MESSAGE = 5


# --- captions ----------------------------------------------------------------------------------------------------


Caption = str | tuple[str, ...]  # of a record: one text, or several of the same image


def texts_of(caption: Caption) -> tuple[str, ...]:
    """The texts of a caption; the first one is the caption wherever none is drawn."""
    return (caption,) if isinstance(caption, str) else tuple(caption)


def every_text(found: Iterable[Caption]) -> list[str]:
    """All texts of captions, in order."""
    return [text for caption in found for text in texts_of(caption)]


def captions(source: Source) -> list[Caption]:
    """The caption of every record, in order; images are decoded only where the source has no `captions` of its own.

    Raises ValueError, one line that counts and names them, where records have none or an empty one.
    """
    found = getattr(source, "captions", None)
    if found is None:
        found = [source[i].get("caption") for i in range(len(source))]
    absent = [i for i, caption in enumerate(found) if not _given(caption)]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(found)} examples have no caption or an empty one, such as {_some(absent)}: "
            f"give each a text ({source.describe()})"
        )
    return list(found)


def _given(caption: Caption | None) -> bool:
    return bool(caption) and all(text and not text.isspace() for text in texts_of(caption))


def _some(names: Sequence) -> str:
    more = ", ..." if len(names) > NAMES_PER_MESSAGE else ""
    return ", ".join(repr(name) for name in names[:NAMES_PER_MESSAGE]) + more


@dataclass(frozen=True, eq=False)
class _WithText:
    """A source whose records have the fields of _text(caption) in place of the caption."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        record, texts = self._read(index)
        return {**record, **self._text(texts[0])}

    def draw(self, index: int, generator: np.random.Generator) -> dict:
        """The record with one of its texts; the generator is left alone where there is only one."""
        record, texts = self._read(index)
        return {**record, **self._text(texts[generator.integers(len(texts))] if len(texts) > 1 else texts[0])}

    def _read(self, index: int) -> tuple[dict, tuple[str, ...]]:
        record = dict(self.source[index])
        caption = record.pop("caption", None)
        if not _given(caption):
            raise ValueError(f"example {index} has no caption, or an empty one: give it one ({self.source.describe()})")
        return record, texts_of(caption)

    @property
    def num_classes(self) -> int:
        return self.source.num_classes


@dataclass(frozen=True, eq=False)
class Tokenized(_WithText):
    """A source with "text_ids" int32 [max_tokens] and "text_mask" bool [max_tokens] in place of "caption"."""

    tokenize: Tokenizer

    def _text(self, caption: str) -> dict:
        ids_NL, mask_NL = self.tokenize([caption])
        return {"text_ids": ids_NL[0], "text_mask": mask_NL[0]}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of((self.source.fingerprint, self.tokenize.fingerprint))

    def describe(self) -> str:
        return f"{self.source.describe()}, captions of at most {self.tokenize.max_tokens} tokens"


@dataclass(frozen=True, eq=False)
class Captioned:
    """Records without captions, such as encoded latents, with "caption" of the images that they were made from.

    captions: one per record, in order. ValueError where there are more or fewer.
    """

    source: Source
    captions: Sequence[Caption]

    def __post_init__(self):
        if len(self.captions) != len(self.source):
            raise ValueError(
                f"{len(self.captions)} captions for {len(self.source)} records ({self.source.describe()}): they must "
                "be of the same images; encode them again"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return {**self.source[index], "caption": self.captions[index]}

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def fingerprint(self) -> str:
        said = (caption if isinstance(caption, str) else repr(caption) for caption in self.captions)
        return fingerprint_of((self.source.fingerprint, *said))

    def describe(self) -> str:
        return f"{self.source.describe()}, with captions"


# --- stored features ---------------------------------------------------------------------------------------------


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """The keys of texts in a store, S32 [N], in the order given."""
    return np.array([hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts], "S32")


@dataclass(frozen=True, eq=False)
class StoredText(_WithText):
    """A source with "text" float16 [max_tokens, width], zero where masked, and "text_mask" in place of "caption".

    directory: a store (nested/latents/captions.py writes it). encoder: the fingerprint that its encoder must have;
    None: any. index: what text.json holds, with "name", "encoder" (fingerprint), "max_tokens" and "width". Picklable.

    Raises, in one line: FileNotFoundError where there is no finished store; ValueError for another encoder's, a damaged
    one, and one that lacks captions of the source (counted and named).
    """

    directory: str | pathlib.Path
    encoder: str | None = None

    def __post_init__(self):
        if self.encoder not in (None, self.index["encoder"]):
            raise ValueError(
                f"{self._path}: the features were made by {self.index['name']} with {self.index['max_tokens']} tokens, "
                f"fingerprint {self.index['encoder'][:16]}, this run's encoder is {self.encoder[:16]}: remove the "
                "folder to make them anew, give another folder, or the options of that encoder"
            )
        for name in ARRAYS:
            file = self._path / f"{name}.npy"
            expected, found = self.index["bytes"][name], file.stat().st_size if file.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes, {expected} were written"
                raise ValueError(f"{file}: {state}; remove the folder {self._path} and make the features anew")
        wanted = sorted(set(every_text(captions(self.source))))
        missing = np.flatnonzero(~np.isin(keys_of(wanted), self._arrays["keys"]))
        if len(missing):
            raise ValueError(
                f"{self._path}: no features for {len(missing)} of {len(wanted)} captions, such as "
                f"{_some([wanted[i] for i in missing])}: remove the folder to make them anew, or give the source's own"
            )

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

    def null(self) -> dict:
        """The fields of the null text, the empty caption."""
        return self._text("")

    def _text(self, caption: str) -> dict:
        key = keys_of([caption])
        row = int(np.searchsorted(self._arrays["keys"], key)[0])
        start, stop = self._arrays["starts"][row : row + 2]
        text_LC = np.zeros((self.index["max_tokens"], self.index["width"]), np.float16)
        text_LC[: stop - start] = self._arrays["features"][start:stop]
        return {"text": text_LC, "text_mask": np.arange(len(text_LC)) < stop - start}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of((self.source.fingerprint, self.index["encoder"]))

    def describe(self) -> str:
        shape = f"{self.index['max_tokens']}x{self.index['width']}"
        return f"{self.source.describe()}, features of {self.index['name']} {shape} from {self._path}"


def read_index(directory: pathlib.Path) -> dict:
    """text.json of a finished store; FileNotFoundError or ValueError, in one line, where there is none."""
    path = pathlib.Path(directory) / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found: the text features were not (completely) made; make them first")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); remove the folder and make the features anew") from error
