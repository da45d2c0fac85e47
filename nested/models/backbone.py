"""Backbone: the base class of a level's network, and what the hierarchy and the build need to know of one.

A backbone is a linen module __call__(x, c_noise, cond, *, train) -> output like x: x is a level's variable, c_noise [B]
the time as the network reads it (Process.c_noise), cond its conditions by name (nested/diffusion/conditioning.py). Its
options are the fields annotated with a comment; the hierarchy decides the other fields (num_classes, conditions, dtype,
remat, the size of the text).
"""

import math
from typing import Annotated, Any, ClassVar

import flax.linen as nn

Shape = Any  # (h, w, c) or (frames, h, w, c), or a tuple of such shapes


class Backbone(nn.Module):
    """The network of one level.

    buffers: patterns (re.search) of the paths, joined with '/', of parameters that are constants: they are saved with
        the others but never trained, averaged or counted.
    inputs: names of the entries of cond that the network reads if they are there, besides the label, the text and
        coarser variables.
    takes_text: whether it reads 'text'; text_options then gives the fields that describe the encoder.
    reads_patches: whether it needs the patch size of each coarser level; `conditions` then holds (name, patch size),
        otherwise (name, None).
    sees_noise_steps: whether it reads cond['noise_step_NAME'], how noisy a coarser variable is.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()
    takes_text: ClassVar[bool] = False
    reads_patches: ClassVar[bool] = False
    sees_noise_steps: ClassVar[bool] = False

    @classmethod
    def text_options(cls, width: int, max_tokens: int) -> dict[str, int]:
        """Return the fields that tell the network of text of `max_tokens` vectors of `width`; zeros are no text."""
        return {}

    @property
    def has_dropout(self) -> bool:
        """Whether training gives the network cond['dropout'], a key for each row."""
        return False

    def num_tokens(self, shape: Shape) -> int:
        """Return the positions that the network works on for a variable of this shape: pixels, unless it has tokens."""
        leaves = shape if isinstance(shape[0], (tuple, list)) else (shape,)
        return sum(math.prod(leaf[:-1]) for leaf in leaves)

    def check_shape(self, shape: Shape) -> None:
        """Raise ValueError if the network's options do not fit each other or a variable of this shape."""


class TokenBackbone(Backbone):
    """A network of tokens, each a patch of a variable [B, h, w, c]."""

    patch_size: Annotated[int, "side of a token's patch, in positions of the level's variable"]

    reads_patches: ClassVar[bool] = True

    @property
    def patch(self) -> tuple[int, int]:
        """(rows, columns) of a token's patch."""
        return self.patch_size, self.patch_size

    def num_tokens(self, shape: Shape) -> int:
        """Return the tokens of a variable of this shape (h, w, c), without those of its conditions."""
        rows, columns = self.patch
        return shape[0] // rows * (shape[1] // columns)

    def check_shape(self, shape: Shape) -> None:
        """Raise ValueError unless the shape is (h, w, c), positive, and h and w divide by patch_size."""
        rows, columns = self.patch
        if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"shape: found {shape}, expected (height, width, channels)")
        if min(rows, columns) < 1:
            raise ValueError(f"backbone.patch_size: found {self.patch_size}, expected at least 1")
        if shape[0] % rows or shape[1] % columns:
            raise ValueError(f"the shape {shape} does not divide into patches of {self.patch_size}; change one of them")
