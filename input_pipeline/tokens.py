"""Texts as token ids, by the tokenizer that comes with an encoder's weights: tokenizer.json, or a sentencepiece model.

The libraries that read them (tokenizers, sentencepiece) are optional: runs without text do not need them.
"""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from absl import logging

from input_pipeline.sources import fingerprint_of


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Captions -> ids int32 [N, max_tokens] and mask bool [N, max_tokens]. Picklable; made by read_tokenizer.

    A longer text keeps its first max_tokens - 1 tokens and its last one, the end of text; the first such text of a
    process is logged. A shorter one is filled up with id 0, which the mask leaves out; or, with `fill`, with that id,
    which counts as text (CLIP's end of text). fingerprint: of the tokenizer's file and max_tokens.
    """

    ids: Callable[[str], list[int]]  # of a text, with its special tokens
    max_tokens: int
    fingerprint: str
    fill: int | None = None

    def __call__(self, captions: Sequence[str], *, silent: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """silent: whoever calls has said how many are cut."""
        ids_NL = np.full((len(captions), self.max_tokens), self.fill or 0, np.int32)
        mask_NL = np.full((len(captions), self.max_tokens), self.fill is not None)
        for row, caption in enumerate(captions):
            ids = self.ids(caption)
            if len(ids) > self.max_tokens:
                if not silent:
                    logging.log_first_n(
                        logging.WARNING,
                        "a caption has %d tokens and is cut to max_tokens %d, others are too (said once): %r",
                        1,
                        *(len(ids), self.max_tokens, caption[:80]),
                    )
                ids = ids[: self.max_tokens - 1] + ids[-1:]
            ids_NL[row, : len(ids)] = ids
            mask_NL[row, : len(ids)] = True
        return ids_NL, mask_NL

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """Tokens of each caption before the cut, int64 [N]: (lengths > max_tokens).sum() captions are cut."""
        return np.array([len(self.ids(caption)) for caption in captions], np.int64)


@dataclass(frozen=True, eq=False)
class _Json:
    """Ids by a tokenizer.json, the format of the tokenizers library, whose own padding and cut are undone."""

    tokenizer: object  # tokenizers.Tokenizer

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
    """Ids by a model of sentencepiece (T5's spiece.model), which has the text alone: `end` is put behind it."""

    processor: object  # sentencepiece.SentencePieceProcessor
    end: tuple[int, ...]

    @classmethod
    def read(cls, content: bytes, empty: Sequence[int]) -> "_Pieces":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        known = [i for i in empty if i < len(processor) and processor.is_control(i)]  # none where they are words there
        return cls(processor, tuple(known))

    def __call__(self, caption: str) -> list[int]:
        return [*self.processor.encode(caption), *self.end]

    def __len__(self) -> int:
        return len(self.processor)


def read_tokenizer(
    folder: pathlib.Path, max_tokens: int, empty: Sequence[int], vocabulary: int, pieces: str = "", filled: bool = False
) -> Tokenizer:
    """The tokenizer of folder/tokenizer.json or, where that is absent, of the sentencepiece model folder/`pieces`.

    empty: the ids that the empty text must have, the special tokens: the last ends every text. vocabulary: ids must be
    below it (rows of the encoder's embedding). filled: short texts are filled up with the last of `empty`, as text.
    Raises, in one line: ImportError without the package tokenizers or sentencepiece, FileNotFoundError, ValueError for
    a damaged file, other special tokens, too many ids, or max_tokens too small.
    """
    path, kind = folder / "tokenizer.json", _Json
    if not path.is_file() and pieces and (folder / pieces).is_file():
        path, kind = folder / pieces, _Pieces
    if not path.is_file():
        others = f"tokenizer.json or {pieces}" if pieces else "tokenizer.json alone"
        raise FileNotFoundError(
            f"{path}: no such file; the tokenizer is read from {others}, not from vocab.txt, vocab.json or merges.txt: "
            "copy it from where the weights come from, or save it with transformers' AutoTokenizer.save_pretrained"
        )
    content = path.read_bytes()
    try:
        ids = kind.read(content, empty)
    except ImportError as error:
        raise ImportError(f"captions are tokenised by a package that is absent: pip install {error.name}") from error
    except Exception as error:  # the libraries raise nothing more special
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a tokenizer ({reason}); get the file again") from error
    found = ids("")
    if found != list(empty):
        raise ValueError(f"{path}: the empty text has the ids {found}, expected {list(empty)}: another encoder's file")
    if len(ids) > vocabulary:
        raise ValueError(f"{path}: {len(ids)} ids, the encoder embeds {vocabulary}: another's file")
    if max_tokens <= len(empty):
        raise ValueError(f"max_tokens: {max_tokens} given, at least {len(empty) + 1} is needed for a text of one token")
    fingerprint = fingerprint_of((content, str(max_tokens)))
    return Tokenizer(ids, max_tokens, fingerprint, empty[-1] if filled else None)
