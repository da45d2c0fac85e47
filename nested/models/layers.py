"""Pieces that transformer backbones share: sinusoidal embedding, attention core, patches, torch's initial values.

Numerics: LayerNorm statistics, softmax and the sinusoid are computed in float32, or float64 when that is what comes in;
only matrix products run in the compute dtype.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ATTENTION = ("xla", "cudnn")


def at_least_float32(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def timestep_embedding(t_B: jax.Array, width: int, max_period: float = 10000.0) -> jax.Array:
    """[B, width] = concat[cos(t f), sin(t f)], f_k = max_period^(-k / (width // 2)); an odd width ends in a 0.

    Cosines first, as libs/uvit.py:20-38. float32, or float64 for float64 times; frequencies are float64 on the host.
    """
    half = width // 2
    t_B1 = t_B.astype(at_least_float32(t_B.dtype))[:, None]
    frequencies_1K = np.exp(-math.log(max_period) * np.arange(half) / half)[None]
    angles_BK = t_B1 * jnp.asarray(frequencies_1K, t_B1.dtype)
    embedding_BD = jnp.concatenate([jnp.cos(angles_BK), jnp.sin(angles_BK)], axis=-1)
    return jnp.pad(embedding_BD, ((0, 0), (0, width % 2)))


def attention(q_BLHD: jax.Array, k_BMHD: jax.Array, v_BMHD: jax.Array, implementation: str) -> jax.Array:
    """[B, L, H, D] = softmax(q k^T / sqrt(D)) v over all keys, no mask.

    implementation: 'xla' (plain, any dtype, logits and softmax in float32 or better) or 'cudnn' (fused; NVIDIA GPU,
    bfloat16 or float16 only).
    """
    if implementation not in ATTENTION:
        raise ValueError(f"attention: unknown implementation {implementation!r}, expected one of {ATTENTION}")
    if implementation == "cudnn":
        if q_BLHD.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"attention: 'cudnn' works in bfloat16 or float16, found {q_BLHD.dtype}; set dtype='bfloat16' or "
                "attention='xla'"
            )
        return jax.nn.dot_product_attention(q_BLHD, k_BMHD, v_BMHD, implementation="cudnn")
    scale = q_BLHD.shape[-1] ** -0.5
    logits_BHLM = jnp.einsum(
        "BLHD,BMHD->BHLM", q_BLHD * scale, k_BMHD, preferred_element_type=at_least_float32(q_BLHD.dtype)
    )
    weights_BHLM = jax.nn.softmax(logits_BHLM, axis=-1).astype(v_BMHD.dtype)
    return jnp.einsum("BHLM,BMHD->BLHD", weights_BHLM, v_BMHD)


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch gives a convolution's weight and bias when nobody sets them."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def unpatchify(tokens_BNP: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """[B, h p, w p, c] from tokens [B, h w, p p c]: rows of patches first, inside a patch rows, columns, channels."""
    (rows, columns), p = grid, patch_size
    tokens_BhwpqC = tokens_BNP.reshape(tokens_BNP.shape[0], rows, columns, p, p, -1)
    return tokens_BhwpqC.swapaxes(2, 3).reshape(tokens_BNP.shape[0], rows * p, columns * p, -1)


class PatchEmbed(nn.Module):
    """[B, h, w, c] -> tokens [B, (h/p) (w/p), width], one linear map per p x p patch, rows first."""

    patch_size: int
    width: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        p = self.patch_size
        init = torch_uniform(p * p * x_BHWC.shape[-1])
        x_BhwD = nn.Conv(
            self.width, (p, p), strides=(p, p), padding="VALID", dtype=self.dtype, kernel_init=init, bias_init=init,
            name="proj",
        )(x_BHWC)  # fmt: skip
        return x_BhwD.reshape(x_BhwD.shape[0], -1, self.width)


class SelfAttention(nn.Module):
    """Multi-head self-attention; one projection for q, k and v, laid out (3, heads, head width) as in timm."""

    num_heads: int
    qkv_bias: bool = False
    implementation: str = "xla"
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        B, L, D = x_BLD.shape
        dense = nn.initializers.normal(0.02)
        qkv_BLE = nn.Dense(3 * D, use_bias=self.qkv_bias, dtype=self.dtype, kernel_init=dense, name="qkv")(x_BLD)
        q_BLHK, k_BLHK, v_BLHK = jnp.moveaxis(qkv_BLE.reshape(B, L, 3, self.num_heads, D // self.num_heads), 2, 0)
        out_BLHK = attention(q_BLHK, k_BLHK, v_BLHK, self.implementation)
        return nn.Dense(D, dtype=self.dtype, kernel_init=dense, name="proj")(out_BLHK.reshape(B, L, D))


class Mlp(nn.Module):
    """Two layers with the exact (erf) GELU between them."""

    hidden: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        dense = nn.initializers.normal(0.02)
        x_BLE = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=dense, name="fc1")(x_BLD)
        x_BLE = nn.gelu(x_BLE, approximate=False)
        return nn.Dense(x_BLD.shape[-1], dtype=self.dtype, kernel_init=dense, name="fc2")(x_BLE)
