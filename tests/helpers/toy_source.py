"""A source from outside of input_pipeline/: stripes, whose label is their direction."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from input_pipeline import ImagesInMemory, ImageSourceOptions


@dataclass(frozen=True, kw_only=True)
class ToySource(ImageSourceOptions):
    """Grey images of horizontal (0) and vertical (1) stripes."""

    stripes: Annotated[int, "stripes of an image"] = 2
    images: Annotated[int, "how many images there are"] = 32

    def open(self):
        labels = np.arange(self.images) % 2
        wave = np.arange(8) * 2 * self.stripes // 8 % 2 * 255
        pictures = np.where(labels[:, None, None] == 0, wave[None, :, None], wave[None, None, :])
        return ImagesInMemory(pictures[..., None].astype(np.uint8), labels, 2, ("horizontal", "vertical"), "stripes")
