"""Features of images by the network whose statistics are scored, in batches of one compiled size.

The extractor is EfficientNet-Lite0's pooled layer, 1,280 numbers an image; clips are scored frame by frame. Numbers of
this extractor compare runs of this code on one data set. They do not compare with published FIDs, which need
Inception's weights, and are therefore never called FID.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import jax
import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from input_pipeline.sources import Source
from nested.runtime.files import atomic_write

EXTRACTOR = "EffLite0"


class PooledEncoder(Protocol):
    """A frozen network with one vector per image; fingerprint identifies its weights, input_size its resolution."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def input_size(self) -> int: ...

    def pooled(self, images: np.ndarray) -> ArrayLike:
        """uint8 [B, H, W, 1 or 3] -> float32 [B, D]."""
        ...


def pooled_features(encoder: PooledEncoder, batches: Iterable[np.ndarray], size: int) -> np.ndarray:
    """Computes the features of images, or of every frame of clips.

    Args:
      encoder: the extractor.
      batches: uint8 [n, H, W, C] images or [n, T, H, W, C] clips; n may vary.
      size: the images that the encoder sees at a time; smaller batches are padded.
    Returns: float32 [N, D], in order.
    """
    return encode_batches(encoder.pooled, (batch.reshape(-1, *batch.shape[-3:]) for batch in batches), size)


def encode_batches(network: Callable[[np.ndarray], ArrayLike], batches: Iterable[np.ndarray], size: int) -> np.ndarray:
    """The results of `network` for images given in batches of any length; it sees `size` rows each time."""
    result = []
    for images in rechunk(batches, size):
        padded = np.concatenate([images, np.repeat(images[-1:], size - len(images), axis=0)])
        result.append(np.asarray(network(padded))[: len(images)])
    return np.concatenate(result)


def rechunk(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cuts batches of any length into batches of at most `size` rows; a batch is never joined with the next."""
    for batch in batches:
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def reference_features(source: Source, encoder: PooledEncoder, number: int, size: int, cache_dir: str) -> np.ndarray:
    """Computes the features of `number` images of a source once, and keeps them in a file in `cache_dir`.

    Args:
      source: records with an "image"; its fingerprint, with the encoder's, names the file.
      encoder: the extractor.
      number: how many images, evenly spaced through the source; at most all of them.
      size: the images read and encoded at a time.
      cache_dir: the folder of the file.
    Returns: float32 [number, D].
    """
    number = min(number, len(source))
    made_from = f"{encoder.fingerprint[:8]}-{source.fingerprint[:8]}"
    name = f"reference-{EXTRACTOR}-{made_from}-{encoder.input_size}px-{number}.npy"
    path = os.path.join(cache_dir, name)
    if os.path.exists(path):
        return np.load(path, allow_pickle=False)
    logging.info("computing the features of %d reference images", number)
    chosen = np.linspace(0, len(source), number, endpoint=False).astype(int)
    batches = (
        np.stack([source[int(i)]["image"] for i in chosen[start : start + size]]) for start in range(0, number, size)
    )
    result = pooled_features(encoder, batches, size)
    if jax.process_index() == 0:
        buffer = io.BytesIO()
        np.save(buffer, result)
        atomic_write(path, buffer.getvalue())
    return result
