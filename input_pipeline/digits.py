"""The handwritten digits that come with scikit-learn."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from input_pipeline.in_memory import ImagesInMemory
from input_pipeline.options import ImageSourceOptions


@dataclass(frozen=True)
class Digits(ImageSourceOptions):
    """The 1,797 handwritten digits of scikit-learn, 8x8x1, grey levels 0..16 mapped to round(x * 255 / 16)."""

    def open(self) -> ImagesInMemory:
        from sklearn.datasets import load_digits  # the one user of scikit-learn

        data: Any = load_digits()
        images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
        names = tuple(str(digit) for digit in range(10))
        return ImagesInMemory(images, data.target.astype(np.int32), 10, names, "digits of scikit-learn")
