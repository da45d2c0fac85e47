"""The blocks of Matryoshka's UNets (nested/models/nested_unet.py): convolutions, ResNets, attention, one resolution.

    ResNet        h = conv1(silu(GN x));   h = silu(GN(h) (1 + a) + b),  a, b = time_layer(silu(temb));
                  x = conv3(x) + conv2(dropout(h)),  conv3 (1x1) only where the width changes
    SelfAttention q, k, v = qkv(GN32 x);  h = attend(q, k, v) + attend(q, kv_cond(LN text));   x = x + proj_out(h);
                  x = x + ffn(x),  ffn = 1x1(gelu(1x1(GN32 x))),  with options.ffn
    TokenBlock    x = x + proj_out(attend(qkv(LN x)));  x = x + mlp(LN x)
    TemporalAttentionBlock   x + conv(nearest x2(TokenBlock over the frames of each pixel(conv stride 2 (x))))
    Stage         one resolution: each ResNet followed by its attention layers; at the end a resampling convolution

(arXiv 2310.15111, App. A; ml_mdm/models/unet.py at de8cde2.) The text attends with the same queries as the image, in
a softmax of its own. Everything starts as torch leaves it, U(-1, 1) / sqrt(fan in) for weight and bias, and the last
layer of each residual branch at 0. Norms have eps 1e-5; GELU is the exact one; strided convolutions pad both sides.

Numerics: norm statistics, softmax, rotary angles and everything computed from temb are float32 (or float64 if the input
is). Arrays of images are x_RHWC: R is the batch, or batch times frames with the frames of a sample side by side. Their
conditions have B rows and are repeated.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from nested.models.hdit_blocks import EXACT, dropout
from nested.models.layers import torch_uniform
from nested.ops.attention import at_least_float32, attention

ATTENTION_GROUPS = 32  # of the norms before attention, whatever the ResNets have
TEMPORAL_HEAD_WIDTH = 32


class Conv(nn.Module):
    """torch's convolution, channels last, padded by half its window: [B, *spatial, c] -> [B, *spatial, features].

    window, stride: over the first spatial axes; a window of ones, or (), is computed as a matrix product. zero: starts
    at 0. dtype: None for that of the input and the parameters.
    """

    features: int
    window: tuple[int, ...] = (3, 3)
    stride: int = 1
    zero: bool = False
    use_bias: bool = True
    dtype: DTypeLike | None = None
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1]
        init = nn.initializers.zeros if self.zero else torch_uniform(math.prod(self.window) * C)
        kernel = self.param("kernel", init, (*self.window, C, self.features))
        bias = self.param("bias", init, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if math.prod(self.window) == 1:
            y = jnp.dot(x, kernel.reshape(C, self.features), precision=self.precision)
        else:
            ones = (1,) * (x.ndim - 2 - len(self.window))
            y = jax.lax.conv_general_dilated(
                x, kernel.reshape(*self.window, *ones, C, self.features), (self.stride,) * len(self.window) + ones,
                [(size // 2, size // 2) for size in (*self.window, *ones)], precision=self.precision,
                dimension_numbers=jax.lax.conv_dimension_numbers(x.shape, (1,) * x.ndim, _channels_last(x.ndim)),
            )  # fmt: skip
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _channels_last(ndim: int) -> tuple[str, str, str]:
    axes = "012"[: ndim - 2]
    return (f"N{axes}C", f"{axes}IO", f"N{axes}C")


linear = functools.partial(Conv, window=())
exact_linear = functools.partial(linear, precision=EXACT)  # for conditions: few rows, in float32
pointwise = functools.partial(Conv, window=(1, 1))


def group_norm(groups: int, dtype: DTypeLike | None, name: str) -> nn.GroupNorm:
    """Return torch's GroupNorm: eps 1e-5, two-pass variance."""
    return nn.GroupNorm(groups, epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


def layer_norm(dtype: DTypeLike | None, name: str) -> nn.LayerNorm:
    """Return torch's LayerNorm: eps 1e-5, two-pass variance."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


def repeat_rows(x: jax.Array, rows: int) -> jax.Array:
    """Return [rows, ...]: each row of x as often as a sample has frames."""
    return x if x.shape[0] == rows else jnp.repeat(x, rows // x.shape[0], axis=0)


def split_rows(x: jax.Array, batch: int) -> jax.Array:
    """Return [R, ...] as [batch, R / batch, ...]: frames on an axis of their own."""
    return x.reshape(batch, -1, *x.shape[1:])


def join_rows(x: jax.Array) -> jax.Array:
    """Return [B, T, ...] as [B T, ...], the inverse of split_rows."""
    return x.reshape(-1, *x.shape[2:])


def upsample(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return x twice as large along each axis, by nearest neighbours."""
    for axis in axes:
        x = jnp.repeat(x, 2, axis=axis)
    return x


def sinusoid(t_B: jax.Array, width: int) -> jax.Array:
    """Return [B, width] = concat[sin(t f), cos(t f)], f_k = 10000^(-k / (width / 2)), which is float64 on the host."""
    half = width // 2
    t_B1 = t_B.astype(at_least_float32(t_B.dtype))[:, None]
    frequencies_1K = np.exp(-math.log(10000.0) * np.arange(half) / half)[None]
    angles_BK = t_B1 * jnp.asarray(frequencies_1K, t_B1.dtype)
    return jnp.concatenate([jnp.sin(angles_BK), jnp.cos(angles_BK)], axis=-1)


class NumberEmbeddings(nn.Module):
    """The sum over the named numbers [B] of their embeddings, [B, width]; 0 at the start."""

    width: int

    @nn.compact
    def __call__(self, numbers: Mapping[str, jax.Array]) -> jax.Array:
        total: Any = 0.0
        for name, number_B in numbers.items():
            hidden_BD = exact_linear(self.width, name=f"{name}_0")(sinusoid(number_B, self.width // 4))
            total = total + exact_linear(self.width, zero=True, name=f"{name}_1")(nn.silu(hidden_BD))
        return total


@dataclasses.dataclass(frozen=True)
class Options:
    """What the blocks of one resolution share.

    width: channels. groups: of the ResNets' norms. attention, temporal_attention: layers after each ResNet. ffn:
    whether image attention has a feed-forward. num_heads: of image and text attention. temporal: whether frames are
    resampled, not pixels. rotary: whether temporal attention has rotary positions. dropout: rate in the ResNets.
    implementation: of attention. remat: whether each ResNet and attention layer is recomputed in the backward pass.
    dtype: see NestedUNet.
    """

    width: int
    groups: int
    attention: int
    temporal_attention: int
    ffn: bool
    num_heads: int
    temporal: bool
    rotary: bool
    dropout: float
    implementation: str
    remat: bool
    dtype: DTypeLike | None


class ResNet(nn.Module):
    """[R, H, W, c], temb [B, D], keys [B] or None -> [R, H, W, width]; the keys are folded with the module's path."""

    options: Options

    @nn.compact
    def __call__(self, x_RHWC: jax.Array, temb_BD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        options, rows = self.options, x_RHWC.shape[0]
        width, groups, dtype = options.width, options.groups, options.dtype
        h_RHWC = nn.silu(group_norm(groups, dtype, "norm1")(x_RHWC))
        h_RHWC = Conv(width, dtype=dtype, name="conv1")(h_RHWC)
        time_BE = exact_linear(2 * width, name="time_layer")(nn.silu(temb_BD)).astype(h_RHWC.dtype)
        scale_R11C, shift_R11C = jnp.split(repeat_rows(time_BE, rows)[:, None, None], 2, axis=-1)
        h_RHWC = nn.silu(group_norm(groups, dtype, "norm2")(h_RHWC) * (1 + scale_R11C) + shift_R11C)
        if keys_B is not None:
            h_BTHWC, index = split_rows(h_RHWC, keys_B.shape[0]), zlib.crc32("/".join(self.path).encode())
            h_RHWC = join_rows(dropout(h_BTHWC, options.dropout, keys_B, index))
        h_RHWC = Conv(width, zero=True, dtype=dtype, name="conv2")(h_RHWC)
        if x_RHWC.shape[-1] != width:
            x_RHWC = pointwise(width, dtype=dtype, name="conv3")(x_RHWC)
        return x_RHWC + h_RHWC


class SelfAttention(nn.Module):
    """[R, H, W, C] -> [R, H, W, C]: each pixel attends to all pixels and, unless text_BLD is None, to the text.

    mask_BL: which tokens of the text are attended to; None is all.
    """

    options: Options

    @nn.compact
    def __call__(self, x_RHWC: jax.Array, text_BLD: jax.Array | None, mask_BL: jax.Array | None) -> jax.Array:
        R, H, W, C = x_RHWC.shape
        options, heads, dtype = self.options, self.options.num_heads, self.options.dtype
        qkv_RHWE = pointwise(3 * C, dtype=dtype, name="qkv")(group_norm(ATTENTION_GROUPS, dtype, "norm")(x_RHWC))
        q_RLND, k_RLND, v_RLND = jnp.moveaxis(qkv_RHWE.reshape(R, H * W, 3, heads, C // heads), 2, 0)
        h_RLND = attention(q_RLND, k_RLND, v_RLND, options.implementation)
        if text_BLD is not None:
            B, L, _ = text_BLD.shape
            kv_BLE = linear(2 * C, dtype=dtype, name="kv_cond")(layer_norm(dtype, "norm_cond")(text_BLD))
            kv_RLE = repeat_rows(kv_BLE, R)
            k_RLND, v_RLND = jnp.moveaxis(kv_RLE.reshape(R, L, 2, heads, C // heads), 2, 0)
            mask_R11L = None if mask_BL is None else repeat_rows(mask_BL, R)[:, None, None]
            h_RLND = h_RLND + attention(q_RLND, k_RLND, v_RLND, options.implementation, mask_BHLM=mask_R11L)
        x_RHWC = x_RHWC + pointwise(C, zero=True, dtype=dtype, name="proj_out")(h_RLND.reshape(R, H, W, C))
        if not options.ffn:
            return x_RHWC
        h_RHWC = group_norm(ATTENTION_GROUPS, dtype, "ffn_0")(x_RHWC)
        h_RHWC = nn.gelu(pointwise(4 * C, dtype=dtype, name="ffn_1")(h_RHWC), approximate=False)
        return x_RHWC + pointwise(C, zero=True, dtype=dtype, name="ffn_3")(h_RHWC)


class RotaryPositions(nn.Module):
    """Turns the pairs (x_2i, x_2i+1) of each head by t * freqs_i, t = 0, 1, ...: [B, T, N, D] -> [B, T, N, D].

    freqs_i = 10000^(-2 i / D) as in rotary_embedding_torch, whose state dict holds them; never trained.
    """

    @nn.compact
    def __call__(self, x_BTND: jax.Array) -> jax.Array:
        D = x_BTND.shape[-1]
        frequencies = 10000.0 ** (-np.arange(0, D, 2) / D)
        freqs_F = self.param("freqs", lambda _, shape: jnp.asarray(frequencies, jnp.float32), (D // 2,))
        freqs_F = jax.lax.stop_gradient(freqs_F)
        angles_TF = jnp.arange(x_BTND.shape[1], dtype=freqs_F.dtype)[:, None] * freqs_F[None]
        cos, sin = (turn(angles_TF)[None, :, None] for turn in (jnp.cos, jnp.sin))
        wide = x_BTND.astype(at_least_float32(x_BTND.dtype)).reshape(*x_BTND.shape[:-1], D // 2, 2)
        first, second = wide[..., 0], wide[..., 1]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.reshape(x_BTND.shape).astype(x_BTND.dtype)


class TokenAttention(nn.Module):
    """x + proj_out(attend(qkv(LN x))), [B, L, C]; nothing attends to masked tokens (mask_BL False)."""

    num_heads: int
    rotary: bool
    implementation: str
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x_BLC: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
        B, L, C = x_BLC.shape
        qkv_BLE = linear(3 * C, dtype=self.dtype, name="qkv")(layer_norm(self.dtype, "norm")(x_BLC))
        q_BLND, k_BLND, v_BLND = jnp.moveaxis(qkv_BLE.reshape(B, L, 3, self.num_heads, C // self.num_heads), 2, 0)
        if self.rotary:
            turn = RotaryPositions(name="pos_emb")
            q_BLND, k_BLND = turn(q_BLND), turn(k_BLND)
        mask_B11L = None if mask_BL is None else mask_BL[:, None, None]
        h_BLND = attention(q_BLND, k_BLND, v_BLND, self.implementation, mask_BHLM=mask_B11L)
        return x_BLC + linear(C, zero=True, dtype=self.dtype, name="proj_out")(h_BLND.reshape(B, L, C))


class TokenMlp(nn.Module):
    """x + linear(gelu(linear(LN x))), [..., C], four times as wide inside."""

    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1]
        h = linear(4 * C, dtype=self.dtype, name="main_1")(layer_norm(self.dtype, "main_0")(x))
        return x + linear(C, zero=True, dtype=self.dtype, name="main_3")(nn.gelu(h, approximate=False))


class TokenBlock(nn.Module):
    """A transformer layer of the text: [B, L, C] -> [B, L, C]."""

    num_heads: int
    implementation: str
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x_BLC: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
        x_BLC = TokenAttention(self.num_heads, False, self.implementation, self.dtype, name="attn")(x_BLC, mask_BL)
        return TokenMlp(self.dtype, name="mlp")(x_BLC)


class TemporalAttentionBlock(nn.Module):
    """[R, H, W, C] of `batch` samples -> the same; each pixel of the half-sized frames attends to itself over time."""

    options: Options
    batch: int

    @nn.compact
    def __call__(self, x_RHWC: jax.Array) -> jax.Array:
        options, dtype, C = self.options, self.options.dtype, x_RHWC.shape[-1]
        h_RHWC = Conv(C, stride=2, dtype=dtype, name="down_conv")(x_RHWC)
        _, H, W, _ = h_RHWC.shape
        h_BPTC = split_rows(h_RHWC, self.batch).reshape(self.batch, -1, H * W, C).swapaxes(1, 2)
        T = h_BPTC.shape[2]
        h_PTC = h_BPTC.reshape(-1, T, C)
        heads = C // TEMPORAL_HEAD_WIDTH
        h_PTC = TokenAttention(heads, options.rotary, options.implementation, dtype, name="attn")(h_PTC)
        h_PTC = TokenMlp(dtype, name="mlp")(h_PTC)
        h_RHWC = h_PTC.reshape(self.batch, H * W, T, C).swapaxes(1, 2).reshape(-1, H, W, C)
        return x_RHWC + Conv(C, dtype=dtype, name="up_conv")(upsample(h_RHWC, (1, 2)))


class Context(NamedTuple):
    """The conditions of a net's blocks.

    text_BLD: the text's tokens, or None; mask_BL: which of them are attended to, None is all; keys_B: of dropout, or
    None.
    """

    temb_BD: jax.Array
    text_BLD: jax.Array | None
    mask_BL: jax.Array | None
    keys_B: jax.Array | None


class Stage(nn.Module):
    """One resolution, down or up: [R, H, W, c] -> ([R', H', W', width], the arrays that the way up joins to its own).

    resnets: their number; options.attention layers follow each. resample: what the last convolution does, 'down' to
    half the sides or frames, 'up' to twice, 'same'; "" if there is none.
    skips: arrays joined to the channels before each ResNet, in this order; there are none on the way down.
    """

    options: Options
    resnets: int
    resample: str

    @nn.compact
    def __call__(
        self, x_RHWC: jax.Array, context: Context, skips: Sequence[jax.Array] = ()
    ) -> tuple[jax.Array, list[jax.Array]]:
        options, outputs = self.options, []
        recomputed = nn.remat if options.remat else lambda module: module
        for i in range(self.resnets):
            if skips:
                x_RHWC = jnp.concatenate([x_RHWC, skips[i]], axis=-1)
            resnet = recomputed(ResNet)(options, name=f"resnets_{i}")
            x_RHWC = resnet(x_RHWC, context.temb_BD, context.keys_B)
            for j in range(i * options.attention, (i + 1) * options.attention):
                x_RHWC = recomputed(SelfAttention)(options, name=f"attn_{j}")(x_RHWC, context.text_BLD, context.mask_BL)
            for j in range(i * options.temporal_attention, (i + 1) * options.temporal_attention):
                block = recomputed(TemporalAttentionBlock)
                x_RHWC = block(options, context.temb_BD.shape[0], name=f"t_attn_{j}")(x_RHWC)
            outputs.append(x_RHWC)
        if self.resample:
            x_RHWC = self.resampled(x_RHWC, context.temb_BD.shape[0])
            outputs.append(x_RHWC)
        return x_RHWC, outputs

    def resampled(self, x_RHWC: jax.Array, batch: int) -> jax.Array:
        """Return the features at the next resolution; batch: the number of samples."""
        options, stride = self.options, 2 if self.resample == "down" else 1
        if not options.temporal:
            if self.resample == "up":
                x_RHWC = upsample(x_RHWC, (1, 2))
            return Conv(options.width, stride=stride, dtype=options.dtype, name="resample")(x_RHWC)
        _, H, W, C = x_RHWC.shape
        x_BTPC = x_RHWC.reshape(batch, -1, H * W, C)
        if self.resample == "up":
            x_BTPC = upsample(x_BTPC, (1,))
        x_BTPC = Conv(options.width, window=(3,), stride=stride, dtype=options.dtype, name="resample")(x_BTPC)
        return x_BTPC.reshape(-1, H, W, C)
