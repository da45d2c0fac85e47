"""Features of the distinct captions of a data set, computed once by a frozen text encoder and stored.

The files are described, and read, in input_pipeline/captions.py. A token's feature is rounded to float16; padding is
not stored, and the empty caption always is, as the null text. text.json is written last and atomically: what a killed
run leaves has none, is refused by readers, and is written over by the next run.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from input_pipeline import captions as text
from input_pipeline.sources import fingerprint_of
from nested.encoders.text_encoder import TextEncoder
from nested.runtime.files import atomic_write, check_writable
from nested.runtime.writers import Progress


def store_captions(
    encoder: TextEncoder, captions: Iterable[str], directory: str | pathlib.Path, batch_size: int
) -> dict[str, Any]:
    """Fills `directory` with the features of the distinct `captions`, and of ""; returns the content of text.json.

    One process does all the work; a finished store of the same encoder and captions is left as it is.

    Args:
      captions: of a source (input_pipeline.captions.captions), repeats allowed.
      batch_size: captions encoded at a time.

    Raises, each in one line: ValueError for a store of another encoder or other captions, and for a feature that is NaN
    or beyond float16 (its caption is named); OSError if files cannot be written.
    """
    directory = check_writable(directory)
    texts = sorted({"", *captions})
    keys = text.keys_of(texts)
    order = np.argsort(keys)
    texts, keys = [texts[i] for i in order], keys[order]
    made = {
        "name": encoder.name,
        "encoder": encoder.fingerprint,
        "max_tokens": encoder.max_tokens,
        "width": encoder.width,
        "captions": fingerprint_of(texts),
    }
    if (directory / text.INDEX_FILE).exists():
        return _check_same(directory, made)
    lengths = encoder.tokenize.lengths(texts)
    cut = int((lengths > encoder.max_tokens).sum())
    if cut:
        logging.warning("%d of %d captions are cut to max_tokens %d", cut, len(texts), encoder.max_tokens)
    if encoder.tokenize([""], silent=True)[1].all():  # what fills up a short text is seen: a part of its features
        lengths = np.full_like(lengths, encoder.max_tokens)
    starts = np.concatenate([[0], np.minimum(lengths, encoder.max_tokens).cumsum()])
    _write(directory, "keys", keys.shape, keys.dtype, [keys])
    _write(directory, "starts", starts.shape, starts.dtype, [starts])
    features = _features(encoder, texts, batch_size)
    _write(directory, "features", (int(starts[-1]), encoder.width), np.dtype(np.float16), features)
    sizes = {name: (directory / f"{name}.npy").stat().st_size for name in text.ARRAYS}
    index = {**made, "distinct": len(texts), "cut": cut, "bytes": sizes}
    atomic_write(directory / text.INDEX_FILE, json.dumps(index, indent=1) + "\n")
    return index


def _check_same(directory: pathlib.Path, made: dict[str, Any]) -> dict[str, Any]:
    """text.json of a finished store that was made as `made` says; ValueError names the first thing that differs."""
    index = text.read_index(directory)
    for key, expected in made.items():
        if index[key] != expected:
            raise ValueError(
                f"{directory}: holds text features of other origin: {key!r} is {index[key]!r}, this run's is "
                f"{expected!r}; remove the folder to make them anew, or give another one"
            )
    return index


def _features(encoder: TextEncoder, texts: Sequence[str], batch_size: int) -> Iterator[np.ndarray]:
    """Yields float16 [tokens of a batch, width], without padding; the last batch is filled up with empty texts."""
    progress = Progress("captions, encoding", len(texts))
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        ids_NL, mask_NL = encoder.tokenize([*batch] + [""] * (batch_size - len(batch)), silent=True)
        with np.errstate(over="ignore"):  # what overflows float16 is refused on the next lines
            features_NLC = np.asarray(encoder.features(ids_NL, mask_NL)).astype(np.float16)
        bad = np.flatnonzero(~np.isfinite(features_NLC).all((1, 2)))
        if len(bad):
            raise ValueError(
                f"{encoder.name}: a feature of {batch[bad[0]]!r} is NaN, infinite or beyond float16; check the "
                "weights, or take that caption out"
            )
        yield features_NLC[: len(batch)][mask_NL[: len(batch)]]
        progress.update(first + len(batch))


def _write(
    directory: pathlib.Path, name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]
) -> None:
    """name.npy of that shape, from arrays that follow each other along its first axis."""
    path = directory / f"{name}.npy"
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{path}: not written: {error.strerror}") from error
