"""A space from outside of nested/: pixels in [-1, 1], each square block of them folded into the channels."""

import dataclasses
from typing import Annotated, ClassVar

from nested.spaces.pixels import normalise, to_images
from nested.spaces.space import ImageCodec, ImageSpace


@dataclasses.dataclass(frozen=True)
class ToySpace(ImageCodec):
    name: ClassVar[str] = "toy"
    fold: Annotated[int, "side of the blocks"] = 2

    def fit(self, level, encoded):
        return Folded(level.shape, self.fold)


@dataclasses.dataclass(frozen=True, eq=False)
class Folded(ImageSpace):
    fold: int

    def variable(self, raw, key):
        (h, w, c), f = self.shape, self.fold
        return normalise(raw["image"]).reshape(-1, h, f, w, f, c // f**2).swapaxes(2, 3).reshape(-1, h, w, c)

    def decode(self, z, params):
        (h, w, c), f = self.shape, self.fold
        return to_images(z.reshape(-1, h, w, f, f, c // f**2).swapaxes(2, 3).reshape(-1, h * f, w * f, c // f**2))
