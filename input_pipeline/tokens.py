"""Turns texts into token ids with the tokenizer of an encoder's weights: tokenizer.json, or a sentencepiece model.

The libraries that read these files (tokenizers, sentencepiece) are optional: runs without text do not need them.
"""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from input_pipeline.sources import fingerprint_of


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Turns captions into ids int32 [N, max_tokens] and a mask bool [N, max_tokens]. Picklable; see read_tokenizer.

    A longer text keeps its first max_tokens - 1 tokens and its last one, the end of text; the first such text of a
    process is logged. A shorter text is padded with id 0, where the mask is False; or, with `fill`, with that id, where
    the mask is True (CLIP's end of text).

    ids: the ids of a text, with its special tokens.
    fingerprint: covers the tokenizer's file and max_tokens.
    """

    ids: Callable[[str], list[int]]
    max_tokens: int
    fingerprint: str
    fill: int | None = None

    def __call__(self, captions: Sequence[str], *, silent: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """silent: do not log that a text is cut, because the caller logs how many are."""
        ids_NL = np.full((len(captions), self.max_tokens), self.fill or 0, np.int32)
        mask_NL = np.full((len(captions), self.max_tokens), self.fill is not None)
        for row, caption in enumerate(captions):
            ids = self.ids(caption)
            if len(ids) > self.max_tokens:
                if not silent:
                    logging.log_first_n(
                        logging.WARNING,
                        "a caption has %d tokens and is cut to max_tokens %d (only the first is logged): %r",
                        1,
                        *(len(ids), self.max_tokens, caption[:80]),
                    )
                ids = ids[: self.max_tokens - 1] + ids[-1:]
            ids_NL[row, : len(ids)] = ids
            mask_NL[row, : len(ids)] = True
        return ids_NL, mask_NL

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """How many tokens each caption has before it is cut, int64 [N]."""
        return np.array([len(self.ids(caption)) for caption in captions], np.int64)


@dataclass(frozen=True, eq=False)
class _Json:
    """Ids from a tokenizer.json, the format of the library tokenizers, without the padding and cut that it asks for."""

    tokenizer: Any  # tokenizers.Tokenizer

    @classmethod
    def read(cls, content: bytes, empty: Sequence[int]) -> "_Json":
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer)

    def __call__(self, caption: str) -> list[int]:
        return self.tokenizer.encode(caption).ids

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Ids from a sentencepiece model (T5's spiece.model), which knows no special tokens: `end` is appended."""

    processor: Any  # sentencepiece.SentencePieceProcessor
    end: tuple[int, ...]

    @classmethod
    def read(cls, content: bytes, empty: Sequence[int]) -> "_Pieces":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        known = [i for i in empty if i < len(processor) and processor.is_control(i)]  # words of the model are not
        return cls(processor, tuple(known))

    def __call__(self, caption: str) -> list[int]:
        return [*self.processor.encode(caption), *self.end]

    def __len__(self) -> int:
        return len(self.processor)


def read_tokenizer(
    folder: pathlib.Path, max_tokens: int, empty: Sequence[int], vocabulary: int, pieces: str = "", filled: bool = False
) -> Tokenizer:
    """Reads the tokenizer of folder/tokenizer.json or, if that is absent, of the sentencepiece model folder/`pieces`.

    Args:
      folder: of the encoder's weights.
      max_tokens: tokens of a text; longer texts are cut.
      empty: the ids that the empty text must have, the special tokens. The last of them ends every text.
      vocabulary: rows of the encoder's embedding; all ids must be smaller.
      pieces: name of the sentencepiece model's file; '' for none.
      filled: whether short texts are padded with the last id of `empty`, which counts as text.

    Raises, in one line: ImportError without the package tokenizers or sentencepiece; FileNotFoundError; ValueError for
      a damaged file, other special tokens, too many ids, or a max_tokens that is too small.
    """
    path, kind = folder / "tokenizer.json", _Json
    if not path.is_file() and pieces and (folder / pieces).is_file():
        path, kind = folder / pieces, _Pieces
    if not path.is_file():
        others = f"tokenizer.json or {pieces}" if pieces else "tokenizer.json alone"
        raise FileNotFoundError(
            f"{path}: no such file; the tokenizer is read from {others}, not from vocab.txt, vocab.json or merges.txt: "
            "copy it from the source of the weights, or save it with transformers' AutoTokenizer.save_pretrained"
        )
    content = path.read_bytes()
    try:
        ids = kind.read(content, empty)
    except ImportError as error:
        raise ImportError(
            f"captions are tokenised by {error.name}, which is not installed: pip install {error.name}"
        ) from error
    except Exception as error:  # the libraries raise no narrower class
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a tokenizer ({reason}); get the file again") from error
    of_empty = ids("")
    if of_empty != list(empty):
        raise ValueError(
            f"{path}: the empty text has the ids {of_empty}, expected {list(empty)}: it belongs to another encoder"
        )
    if len(ids) > vocabulary:
        raise ValueError(f"{path}: {len(ids)} ids, but the encoder embeds {vocabulary}: it belongs to another encoder")
    if max_tokens <= len(empty):
        raise ValueError(f"max_tokens: {max_tokens} given; a text of one token needs at least {len(empty) + 1}")
    fingerprint = fingerprint_of((content, str(max_tokens)))
    return Tokenizer(ids, max_tokens, fingerprint, empty[-1] if filled else None)
