"""Pieces that transformer backbones share: sinusoidal embedding, attention core, patches, torch's initial values.

Numerics: LayerNorm statistics, softmax and the sinusoid are computed in float32, or float64 when that is what comes in;
only matrix products run in the compute dtype.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ATTENTION = ("xla", "cudnn")


class Backbone(nn.Module):
    """What the hierarchy asks of a level's network besides __call__(x, c_noise, cond, *, train) and num_tokens(shape).

    buffers: patterns (re.search) of the paths, joined with '/', of parameters that are constants: saved with the
        others, never trained, averaged or counted. inputs: names of entries of cond that it takes where they are there,
        other than the label, text and coarser variables. has_dropout: whether training gives it cond['dropout'], a key
        per row. sees_noise_steps: whether it takes cond['noise_step_NAME'], how noisy a coarser variable is.
    """

    buffers = ()
    inputs = ()
    has_dropout = False
    sees_noise_steps = False

    def check_shape(self, shape) -> None:
        """Raises ValueError unless it is (h, w, c), positive, and h and w divide by patch_size."""
        patch = self.patch_size
        rows, columns = patch if isinstance(patch, tuple) else (patch, patch)
        if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"shape: found {shape}, expected (height, width, channels)")
        if min(rows, columns) < 1:
            raise ValueError(f"backbone.patch_size: found {patch}, expected at least 1")
        if shape[0] % rows or shape[1] % columns:
            raise ValueError(f"the shape {shape} does not divide into patches of {patch}; change one of them")


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


def attention(
    q_BLHD: jax.Array,
    k_BMHD: jax.Array,
    v_BMHD: jax.Array,
    implementation: str,
    scale: float | None = None,
    mask_BHLM: jax.Array | None = None,
) -> jax.Array:
    """[B, L, H, D] = softmax(scale q k^T) v over all keys, or over those where the mask (any axis may be 1) is True.

    scale: None for 1 / sqrt(D).
    implementation: 'xla' (plain, any dtype, logits and softmax in float32 or better) or 'cudnn' (fused; NVIDIA GPU,
    bfloat16 or float16 only).
    """
    if implementation not in ATTENTION:
        raise ValueError(f"attention: unknown implementation {implementation!r}, expected one of {ATTENTION}")
    if implementation == "cudnn":
        if mask_BHLM is not None:  # cuDNN wants a row of the mask for every query
            mask_BHLM = jnp.broadcast_to(mask_BHLM, (*mask_BHLM.shape[:2], q_BLHD.shape[1], k_BMHD.shape[1]))
        if q_BLHD.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"attention: 'cudnn' works in bfloat16 or float16, found {q_BLHD.dtype}; set dtype='bfloat16' or "
                "attention='xla'"
            )
        return jax.nn.dot_product_attention(q_BLHD, k_BMHD, v_BMHD, mask=mask_BHLM, scale=scale, implementation="cudnn")
    scale = q_BLHD.shape[-1] ** -0.5 if scale is None else scale
    logits_BHLM = jnp.einsum(
        "BLHD,BMHD->BHLM", q_BLHD * scale, k_BMHD, preferred_element_type=at_least_float32(q_BLHD.dtype)
    )
    if mask_BHLM is not None:
        logits_BHLM = jnp.where(mask_BHLM, logits_BHLM, -jnp.inf)
    weights_BHLM = jax.nn.softmax(logits_BHLM, axis=-1).astype(v_BMHD.dtype)
    return jnp.einsum("BHLM,BMHD->BLHD", weights_BHLM, v_BMHD)


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch gives a convolution's weight and bias when nobody sets them."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def torch_xavier(key: jax.Array, shape, dtype=jnp.float32) -> jax.Array:
    """U(-b, b), b^2 = 6 / (fan in + fan out), of a kernel (*window, in, out) taken as the matrix (window in, out)."""
    return nn.initializers.xavier_uniform()(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def unpatchify(tokens_BNP: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """[B, h p, w p, c] from tokens [B, h w, p p c]: rows of patches first, inside a patch rows, columns, channels."""
    (rows, columns), p = grid, patch_size
    tokens_BhwpqC = tokens_BNP.reshape(tokens_BNP.shape[0], rows, columns, p, p, -1)
    return tokens_BhwpqC.swapaxes(2, 3).reshape(tokens_BNP.shape[0], rows * p, columns * p, -1)


class PatchEmbed(nn.Module):
    """[B, h, w, c] -> tokens [B, (h/p) (w/p), width], one linear map per p x p patch, rows first.

    kernel_init: None starts weight and bias as torch leaves a convolution; with one the bias starts at 0.
    """

    patch_size: int
    width: int
    dtype: jnp.dtype | None = None
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
    """Multi-head self-attention; one projection for q, k and v, laid out (3, heads, head width) as in timm."""

    num_heads: int
    qkv_bias: bool = False
    implementation: str = "xla"
    dtype: jnp.dtype | None = None
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
    dtype: jnp.dtype | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    tanh_gelu: bool = False

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        x_BLE = nn.gelu(dense(self.hidden, name="fc1")(x_BLD), approximate=self.tanh_gelu)
        return dense(x_BLD.shape[-1], name="fc2")(x_BLE)
