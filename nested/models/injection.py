"""How a network reads coarser variables: what stands for a dropped one, and the injection of the ICLR draft.

Nested Diffusion's first draft (an anonymous ICLR submission, Sec. 4.1) upsamples each condition to the level's token
grid by a transposed convolution. After every two blocks it concatenates these features with the tokens, and two fully
connected layers follow:

    c_m = deconv_m(z_m)                                 [B, H W, D], once per forward pass
    x   = x + mlp_j([x, c_1, ..., c_n])                 x: the patch tokens; j = 0, 1, ... counts the places

The draft gives neither kernel sizes nor initial values, and does not say whether the places share their layers or keep
a residual. Here each place has its own layers and the residual is kept; GELU (erf) stands between the layers; linear
layers start at N(0, .02^2) like all layers of U-ViT, transposed convolutions as torch leaves them.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nested.models import layers

Empty = Literal["token", "variable"]  # what is learned in place of a dropped level: after, before its embedding


def check_empty(network: str, empty: str) -> None:
    """Raise ValueError unless `empty` is one of Empty's values."""
    if empty not in get_args(Empty):
        raise ValueError(f"{network}: empty is {empty!r}, expected one of {', '.join(map(repr, get_args(Empty)))}")


def kept_or_empty(z: jax.Array, empty: jax.Array, cond: Mapping[str, jax.Array], name: str) -> jax.Array:
    """Return z [B, ...] with `empty` (of z's rank, broadcast against it) in the rows where cond['keep_NAME'] is False.

    Without 'keep_NAME' in cond all rows are kept.
    """
    if f"keep_{name}" not in cond:
        return z
    keep = cond[f"keep_{name}"].reshape(-1, *[1] * (z.ndim - 1))
    return jnp.where(keep, z, empty.astype(z.dtype))


class Deconvolution(nn.Module):
    """[B, h, w, c] -> features [B, H W, width] of the grid (H, W), rows first, by one transposed convolution.

    Stride s = H // h and kernel k = H - (h - 1) s per axis make (h - 1) s + k = H, even if h does not divide H.
    The grid must be at least h x w.
    """

    grid: tuple[int, int]
    width: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, z_BhwC: jax.Array) -> jax.Array:
        sizes = z_BhwC.shape[1:3]
        strides = tuple(target // size for target, size in zip(self.grid, sizes, strict=True))
        kernel = tuple(
            target - (size - 1) * stride for target, size, stride in zip(self.grid, sizes, strides, strict=True)
        )
        init = layers.torch_uniform(self.width * math.prod(kernel))  # torch takes its fan-in from the output channels
        c_BHWD = nn.ConvTranspose(
            self.width, kernel, strides=strides, padding="VALID", dtype=self.dtype, kernel_init=init, bias_init=init,
            name="proj",
        )(z_BhwC)  # fmt: skip
        return c_BHWD.reshape(c_BHWD.shape[0], -1, self.width)


class Injection(nn.Module):
    """x + mlp([x, c]): `num_layers` linear layers of x's width with GELU between them."""

    num_layers: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x_BND: jax.Array, c_BNE: jax.Array) -> jax.Array:
        y = jnp.concatenate([x_BND, c_BNE], axis=-1)
        for i in range(self.num_layers):
            dense = nn.Dense(
                x_BND.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=f"fc{i + 1}"
            )
            y = dense(nn.gelu(y, approximate=False) if i else y)
        return x_BND + y
