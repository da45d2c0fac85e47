"""Augmentation of images whose parameters are told to the network, so that it does not show in samples. numpy only.

Training sees warped images and nine numbers that describe the warp; sampling sets the nine to zero and gets images that
are not warped. The idea is EDM's (arXiv 2206.00364, section 5), this set of warps that of HDiT's code (arXiv
2401.11605). With p the probability, s = 2^(1/5), n the side of the square image in pixels and N(0, 1) normal draws:

    a0       1 with probability 1/2, whatever p: mirror left to right
    a1       with probability p, 0 or 1 at equal odds: mirror top to bottom
    a2       with probability p, N(0, 1): scale both axes by s^a2
    a3       with probability p, uniform in [-pi, pi): rotate by -a3
    a4, a5   with probability p, uniform in [-pi, pi) and N(0, 1): scale by s^a5 along angle a4, by s^-a5 across it
    a6, a7   with probability p, N(0, 1): translate by a6 n/8 columns and a7 n/8 rows

A parameter that is not drawn is 0. In coordinates (column, row) with c = (n - 1)/2, with translations T, rotations R
and scalings S,

    M = T(c, c) S((-1)^a0, (-1)^a1) S(s^a2, s^a2) R(-a3) R(a4) S(s^a5, s^-a5) R(-a4) T(a6 n/8, a7 n/8) T(-c, -c)

and the pixel at x shows the image at M^-1 x, interpolated by Catmull-Rom (Keys' cubic, a = -1/2) over 4 x 4 pixels. The
image is reflected at its outermost pixel centres. Values are not clipped: they pass -1 and 1 a little near edges. The
network is told

    a0,  a1,  a2,  cos a3 - 1,  sin a3,  a5 cos a4,  a5 sin a4,  a6,  a7.

This follows k_diffusion/augmentation.py at 4601bf08. The draws are made in its order, whether used or not: the coin of
a0, then for each line above a uniform number to compare with p, and the line's own draws. Departures: numpy draws, so
that the bits differ; an image that is only mirrored is not interpolated, which gives the same values; images that are
not square are refused, because the code there exchanges their height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from input_pipeline.latent_records import MIRRORED, unflipped
from input_pipeline.sources import Record

SCALE = 2**0.2  # s
TRANSLATION = 1 / 8  # of the side
# Row i: what 1, t, t^2, t^3 contribute to the weight of the pixel at i - 1, for a point at t in [0, 1).
CATMULL_ROM = np.array([[0, -0.5, 1, -0.5], [1, 0, -2.5, 1.5], [0, 0.5, 2, -1.5], [0, 0, -0.5, 0.5]])


def draw_warp(generator: np.random.Generator, prob: float) -> np.ndarray:
    """The parameters a0, ..., a7 of a warp, float64 [8], from 13 draws of the generator. prob: p, in 0..1."""

    def coin() -> float:
        return float(generator.integers(2))

    def angle() -> float:
        return 2 * np.pi * generator.random() - np.pi

    def sometimes(*laws: Callable[[], float]) -> list[float]:
        happens = generator.random() < prob
        return [happens * law() for law in laws]

    normal = generator.standard_normal
    mirrors = [coin(), *sometimes(coin)]
    return np.array(
        [*mirrors, *sometimes(normal), *sometimes(angle), *sometimes(angle, normal), *sometimes(normal, normal)],
        dtype=np.float64,
    )


def describe_warp(a: np.ndarray) -> np.ndarray:
    """The numbers that the network is told about the warp with parameters a [8]: float32 [9], zero for no warp."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    values = [a0, a1, a2, np.cos(a3) - 1, np.sin(a3), a5 * np.cos(a4), a5 * np.sin(a4), a6, a7]
    return np.array(values, dtype=np.float32)


def warp_matrix(a: np.ndarray, size: int) -> np.ndarray:
    """M of the module's docstring, float64 [3, 3], for the parameters a [8] and images of size x size pixels."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    center, shift = (size - 1) / 2, TRANSLATION * size
    return (
        _translation(center, center)
        @ _scaling(1 - 2 * a0, 1 - 2 * a1)
        @ _scaling(SCALE**a2, SCALE**a2)
        @ _rotation(-a3)
        @ _rotation(a4)
        @ _scaling(SCALE**a5, SCALE**-a5)
        @ _rotation(-a4)
        @ _translation(shift * a6, shift * a7)
        @ _translation(-center, -center)
    )


def _translation(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])


def _scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1])


def _rotation(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def warp(image_HWC: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """Warps an image, float32 [size, size, C], by a matrix of (column, row), [3, 3]: y(x) = image(forward^-1 x)."""
    size = len(image_HWC)
    rows_P, columns_P = np.indices((size, size)).reshape(2, -1)
    x_P, y_P, _ = np.linalg.inv(forward) @ np.stack([columns_P, rows_P, np.ones(size * size)])
    columns_4P, column_weights_4P = _taps(x_P, size)
    rows_4P, row_weights_4P = _taps(y_P, size)
    image_CP = np.ascontiguousarray(image_HWC.reshape(size * size, -1).T)
    warped_CP = np.zeros_like(image_CP)
    for row_P, row_weight_P in zip(rows_4P, row_weights_4P, strict=True):
        for column_P, column_weight_P in zip(columns_4P, column_weights_4P, strict=True):
            pixels_CP = image_CP.take(row_P * size + column_P, axis=1)
            warped_CP += row_weight_P * column_weight_P * pixels_CP
    return warped_CP.T.reshape(image_HWC.shape)


def _taps(x_P: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The 4 pixels around each point of one axis, reflected into 0..size - 1, and their weights: [4, P] each."""
    first_P = np.floor(x_P)
    t_P = x_P - first_P
    weights_4P = CATMULL_ROM @ np.stack([np.ones_like(t_P), t_P, t_P**2, t_P**3])
    period = max(2 * (size - 1), 1)  # 1: the only pixel
    index_4P = np.abs(first_P.astype(np.int32) + np.arange(-1, 3, dtype=np.int32)[:, None]) % period
    return np.minimum(index_4P, period - index_4P), weights_4P.astype(np.float32)


def augment(image_HWC: np.ndarray, generator: np.random.Generator, prob: float) -> tuple[np.ndarray, np.ndarray]:
    """Warps an image at random.

    Args:
      image_HWC: uint8 [H, W, C], H = W.
      generator: that draws the warp.
      prob: p, in 0..1, of each warp but the mirroring left to right, which has 1/2. HDiT's FFHQ models have 0.12.

    Returns: (the image, float32 [H, W, C], where -1 is black and 1 is white and values pass both a little; the numbers
      that the network is told, float32 [9]).

    Raises: ValueError (one line) for another dtype, other axes, or an image that is not square.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[0] != image_HWC.shape[1]:
        raise ValueError(
            f"augmentation needs square images, uint8 [H, H, C], found {image_HWC.dtype} {image_HWC.shape}: crop them "
            "to a square, or set the augmentation's prob to 0"
        )
    a = draw_warp(generator, prob)
    image = image_HWC.astype(np.float32) / 127.5 - 1
    if a[2:].any():
        return warp(image, warp_matrix(a, len(image))), describe_warp(a)
    return image[:: -1 if a[1] else 1, :: -1 if a[0] else 1], describe_warp(a)


def flip_at_random(record: Record, generator: np.random.Generator) -> Record:
    """The record, or with probability 1/2 that of the mirrored image, by one draw of the generator."""
    kept = unflipped(record)
    if generator.random() >= 0.5:
        return kept
    kept |= {name: record[name + MIRRORED] for name in kept if name + MIRRORED in record}
    return kept | {"image": kept["image"][..., ::-1, :]} if "image" in kept else kept


@dataclass(frozen=True)
class Augmentation:
    """The transform of training records (loader.batches), drawn again each time a record is read.

    prob > 0: "image" is warped as by augment() and float32, and "augment" (float32 [9]) is added.
    flip: "image" is mirrored left to right with probability 1/2, stays uint8, and the network is not told. All frames
      of a clip [T, H, W, C] are mirrored, or none. The encoded fields of the mirrored image ('map.mirrored') then
      replace those of the image, all at once.
    With neither, a record is left as it is: prob 0 also turns off the mirroring of augment(), as in the authors' code.

    Raises: ValueError for prob outside 0..1; for both options, because the warps include a mirroring; for records that
      have neither an image nor mirrored fields; and for clips with prob > 0, which warps single images.
    """

    prob: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise ValueError(f"augmentation prob = {self.prob}: expected a number from 0 to 1")
        if self.prob and self.flip:
            raise ValueError(
                f"augmentation flip = True with prob = {self.prob}, whose warps mirror half of the images already: "
                "expected flip = False, or prob = 0"
            )

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        if not (self.prob or self.flip):
            return record
        mirrored = any(name.endswith(MIRRORED) for name in record)
        if "image" not in record and not (self.flip and mirrored):
            raise ValueError(
                f"augmentation needs records with an 'image', found {sorted(record)}: set prob = 0 and flip = False"
            )
        if self.flip:
            return flip_at_random(record, generator)
        if record["image"].ndim == 4:
            raise ValueError(
                f"augmentation prob = {self.prob} warps single images, found clips {record['image'].shape}: expected "
                "prob = 0 (flip = True mirrors whole clips)"
            )
        image, description = augment(record["image"], generator, self.prob)
        return {**record, "image": image, "augment": description}
