"""Images and labels held as two arrays, which the sources digits and idx open to."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from input_pipeline.sources import Record, fingerprint_of


@dataclass(frozen=True, eq=False, repr=False)
class ImagesInMemory:
    """Images and labels held as two arrays.

    images_NHWC: uint8 [N, H, W, C].
    labels_N: integers [N] in 0..num_classes - 1.
    class_names: one per label, or ().
    name: for describe() and errors.

    Raises: ValueError for an empty data set, for as many labels or class names as do not fit, and for a label out of
      range.
    """

    images_NHWC: np.ndarray
    labels_N: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if self.images_NHWC.dtype != np.uint8 or self.images_NHWC.ndim != 4:
            found = f"{self.images_NHWC.dtype} {self.images_NHWC.shape}"
            raise ValueError(f"{self.name}: images must be uint8 [N, H, W, C], found {found}")
        if len(self.images_NHWC) == 0:
            raise ValueError(f"{self.name}: the data set is empty")
        if self.labels_N.shape != (len(self.images_NHWC),):
            raise ValueError(f"{self.name}: {len(self.images_NHWC)} images but labels of shape {self.labels_N.shape}")
        if self.class_names and len(self.class_names) != self.num_classes:
            found = f"{len(self.class_names)} class names for {self.num_classes} classes"
            raise ValueError(f"{self.name}: {found}; give one name per class, or ()")
        wrong = np.flatnonzero((self.labels_N < 0) | (self.labels_N >= max(self.num_classes, 1)))
        if len(wrong):
            raise ValueError(
                f"{self.name}: label {self.labels_N[wrong[0]]} of example {wrong[0]} is out of range "
                f"0..{max(self.num_classes, 1) - 1} ({len(wrong)} such labels): set num_classes to the data's"
            )

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def __getitem__(self, index: int) -> Record:
        return {"image": self.images_NHWC[index], "label": np.int32(self.labels_N[index])}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.images_NHWC.shape
        return height, width, channels

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        labels = np.ascontiguousarray(self.labels_N, dtype="<i4")
        shape = str(self.images_NHWC.shape)
        return fingerprint_of((shape, self.images_NHWC.tobytes(), labels.tobytes(), str(self.num_classes)))

    def describe(self) -> str:
        height, width, channels = self.image_shape
        return f"{self.name}: {len(self)} images {height}x{width}x{channels}, {self.num_classes} classes"

    def check(self) -> None:
        """Nothing is left to read."""
