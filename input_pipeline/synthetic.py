"""Random latents in place of data."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from input_pipeline.options import SourceOptions
from input_pipeline.sources import Record, fingerprint_of


@dataclass(frozen=True, kw_only=True)
class SyntheticLatents(SourceOptions):
    """Latents of N(0, 1), a pure function of (seed, i), for training and measuring without data. It opens to itself.

    levels: (name, shape) of each variable; record i holds name -> float32 array of that shape, and "label".
    num_classes: labels are uniform in 0..num_classes - 1; 0 for none.
    text: (tokens, width) of the features "text", whose "text_mask" is all true; () for records without text.

    open() raises: ValueError for num_examples below 1.
    """

    synthetic: ClassVar[bool] = True

    levels: tuple[tuple[str, tuple[int, ...]], ...]
    num_examples: Annotated[int, "number of examples"] = 0
    num_classes: int
    seed: int
    text: tuple[int, ...] = ()

    def open(self) -> "SyntheticLatents":
        if self.num_examples < 1:
            raise ValueError(f"synthetic latents: num_examples must be at least 1, found {self.num_examples}")
        return self

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        generator = np.random.default_rng((self.seed, index))
        record: Record = {"label": np.int32(generator.integers(max(self.num_classes, 1)))}
        for name, shape in self.levels:
            record[name] = generator.standard_normal(shape, dtype=np.float32)
        if self.text:
            record["text"] = generator.standard_normal(self.text, dtype=np.float32)
            record["text_mask"] = np.ones(self.text[0], bool)
        return record

    @property
    def fingerprint(self) -> str:
        return fingerprint_of((repr((self.levels, self.num_examples, self.num_classes, self.seed, self.text)),))

    def describe(self) -> str:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.levels)
        return f"synthetic latents: {len(self)} examples of {shapes}, {self.num_classes} classes"
