"""Pieces that backbones share: sinusoidal embedding, patches, self-attention, MLP, torch's initial values.

LayerNorm statistics, softmax and the sinusoid are float32, or float64 if the input is; only matrix products run in the
compute dtype.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nested.ops.attention import at_least_float32, attention


def timestep_embedding(t_B: jax.Array, width: int, max_period: float = 10000.0) -> jax.Array:
    """Return [B, width] = concat[cos(t f), sin(t f)], f_k = max_period^(-k / (width // 2)); an odd width ends in a 0.

    Cosines first, as libs/uvit.py:20-38. float32, or float64 for float64 times; frequencies are float64 on the host.
    """
    half = width // 2
    t_B1 = t_B.astype(at_least_float32(t_B.dtype))[:, None]
    frequencies_1K = np.exp(-math.log(max_period) * np.arange(half) / half)[None]
    angles_BK = t_B1 * jnp.asarray(frequencies_1K, t_B1.dtype)
    embedding_BD = jnp.concatenate([jnp.cos(angles_BK), jnp.sin(angles_BK)], axis=-1)
    return jnp.pad(embedding_BD, ((0, 0), (0, width % 2)))


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Return U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for a convolution's weight and bias."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def torch_xavier(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draw U(-b, b), b^2 = 6 / (fan in + fan out), for a kernel (*window, in, out) read as (window in, out)."""
    return nn.initializers.xavier_uniform()(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def unpatchify(tokens_BNP: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """Return [B, h p, w p, c] of tokens [B, h w, p p c]: rows of patches first; in a patch rows, columns, channels."""
    (rows, columns), p = grid, patch_size
    tokens_BhwpqC = tokens_BNP.reshape(tokens_BNP.shape[0], rows, columns, p, p, -1)
    return tokens_BhwpqC.swapaxes(2, 3).reshape(tokens_BNP.shape[0], rows * p, columns * p, -1)


class PatchEmbed(nn.Module):
    """[B, h, w, c] -> tokens [B, (h/p) (w/p), width] by one linear map of every p x p patch, rows first.

    kernel_init: None starts weight and bias as torch leaves a convolution; any other starts the bias at 0.
    """

    patch_size: int
    width: int
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        p = self.patch_size
        default = torch_uniform(p * p * x_BHWC.shape[-1])
        x_BhwD = nn.Conv(
            self.width, (p, p), strides=(p, p), padding="VALID", dtype=self.dtype, name="proj",
            kernel_init=self.kernel_init or default,
            bias_init=nn.initializers.zeros if self.kernel_init else default,
        )(x_BHWC)  # fmt: skip
        return x_BhwD.reshape(x_BhwD.shape[0], -1, self.width)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection to q, k and v, laid out (3, heads, head width) as in timm."""

    num_heads: int
    qkv_bias: bool = False
    implementation: str = "xla"
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        B, L, D = x_BLD.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        qkv_BLE = dense(3 * D, use_bias=self.qkv_bias, name="qkv")(x_BLD)
        q_BLHK, k_BLHK, v_BLHK = jnp.moveaxis(qkv_BLE.reshape(B, L, 3, self.num_heads, D // self.num_heads), 2, 0)
        out_BLHK = attention(q_BLHK, k_BLHK, v_BLHK, self.implementation)
        return dense(D, name="proj")(out_BLHK.reshape(B, L, D))


class Mlp(nn.Module):
    """Two layers with GELU between them: the exact one (erf), or its approximation by tanh."""

    hidden: int
    dtype: DTypeLike | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    tanh_gelu: bool = False

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        x_BLE = nn.gelu(dense(self.hidden, name="fc1")(x_BLD), approximate=self.tanh_gelu)
        return dense(x_BLD.shape[-1], name="fc2")(x_BLE)
