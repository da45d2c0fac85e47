"""Feature grids by name, for any encoder that gives a vector and a map of an image; and their pooling.

    crops1, crops2, crops4   [B, M, M, C]   the vector of each of the M x M non-overlapping crops (CVPR version, 3.3)
    map                      [B, g, g, C]   the feature map
    map1, map2, ... mapN     [B, N, N, C]   the map, average-pooled: before the SVD, as in the ICLR version, 3.3
    codec, codecN            the same of the level-1 codec's latents (ICLR version, 4.3): nested/latents/passes.py
    makes them

Pooling is torch's AdaptiveAvgPool2d, since 14 x 14 maps are brought to 8 x 8 and 6 x 6: windows overlap there.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CROPS = (1, 2, 4)

Outputs = Callable[[Any, tuple[str, ...]], dict[str, jax.Array]]


def require_one_of(key: str, found: object, allowed: Sequence[object], encoder: str) -> None:
    """Raises ValueError for a value of an option that the encoder of that name does not take."""
    if found not in allowed:
        raise ValueError(f"{key}: {found!r} given; {encoder} takes {', '.join(repr(word) for word in allowed)}")


def parse_feature(name: str) -> tuple[str, int]:
    """'map' -> ('map', 0), 'map4' -> ('map', 4), 'crops2' -> ('crops', 2); ValueError for another word."""
    match = re.fullmatch("(crops|map|codec)([1-9][0-9]*)?", name)
    kind, number = (match[1], int(match[2] or 0)) if match else ("", 0)
    if not kind or kind == "crops" and number not in CROPS:
        raise ValueError(
            f"encoder.features: {name!r} given; choose from 'crops1', 'crops2', 'crops4', 'map', 'codec', or 'mapN', "
            "'codecN' for one of the last two pooled to N x N"
        )
    return kind, number


def is_codec_feature(name: str) -> bool:
    """Whether the feature is made of the codec's latents, and not by an encoder."""
    return parse_feature(name)[0] == "codec"


def feature_grids(outputs: Outputs, images: Any, names: Sequence[str]) -> dict[str, jax.Array]:
    """The grids of images [B, H, W, C] by their names, {name: [B, h, w, C']}; each part of the network runs once.

    Args:
      outputs: (images or crops, parts) -> {'vector': [B, C'], 'map': [B, g, g, C']}, those of the two in `parts`.
      names: of the grids.

    Raises ValueError if the images do not divide into crops, or if a map is smaller than the grid it is pooled to.
    """
    parsed = {name: parse_feature(name) for name in names}
    needed = {"map": any(kind == "map" for kind, _ in parsed.values()), "vector": ("crops", 1) in parsed.values()}
    parts = tuple(part for part, is_needed in needed.items() if is_needed)
    whole = outputs(images, parts) if parts else {}
    grids = {}
    for name, (kind, number) in parsed.items():
        if kind == "map":
            grids[name] = pool_feature(whole["map"], name)
        elif number == 1:
            grids[name] = whole["vector"][:, None, None]
        else:
            grids[name] = _crop_vectors(outputs, images, number)
    return grids


def _crop_vectors(outputs: Outputs, images: Any, splits: int) -> jax.Array:
    height, width = images.shape[1] // splits, images.shape[2] // splits
    if height * splits != images.shape[1] or width * splits != images.shape[2]:
        raise ValueError(
            f"encoder.features: images of {images.shape[1]}x{images.shape[2]} do not divide into {splits}x{splits} "
            f"crops; take 'crops{splits}' out, or resize the images (config.data.image_size)"
        )
    vectors = [  # one call per position: the network is compiled once, for one batch size
        outputs(images[:, y * height : (y + 1) * height, x * width : (x + 1) * width], ("vector",))["vector"]
        for y in range(splits)
        for x in range(splits)
    ]
    return jnp.stack(vectors, 1).reshape(len(images), splits, splits, -1)


def pool_feature(x_BhwC: jax.Array, name: str) -> jax.Array:
    """The grid of the feature `name`: pooled to N x N for 'mapN' and 'codecN', unchanged for 'map' and 'codec'."""
    kind, number = parse_feature(name)
    height, width = x_BhwC.shape[1:3]
    if number > min(height, width):
        raise ValueError(
            f"encoder.features: {name!r} asks for {number}x{number} of a grid of {height}x{width}, and pooling only "
            f"makes it smaller; name '{kind}{min(height, width)}' or less"
        )
    return adaptive_pool(x_BhwC, number) if number else x_BhwC


@functools.partial(jax.jit, static_argnames=("size",))
def adaptive_pool(x_BhwC: jax.Array, size: int) -> jax.Array:
    """[B, h, w, C] -> [B, size, size, C]."""
    rows, columns = (pooling_matrix(n, size).astype(x_BhwC.dtype) for n in x_BhwC.shape[1:3])
    return jnp.einsum("bhwc,ih,jw->bijc", x_BhwC, rows, columns, precision=jax.lax.Precision.HIGHEST)


def pooling_matrix(size: int, pooled: int) -> np.ndarray:
    """One dimension of adaptive average pooling, [pooled, size]: output i is the mean of the inputs
    floor(i size / pooled) ... ceil((i + 1) size / pooled) - 1 (torch.nn.AdaptiveAvgPool2d)."""
    matrix = np.zeros((pooled, size))
    for i in range(pooled):
        start, stop = i * size // pooled, -(-(i + 1) * size // pooled)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix
