"""The blocks of HDiT (nested/models/hdit.py): norms, positions, attention, feed-forward, mapping network.

    RMSNorm(x)     = x rsqrt(mean x^2 + 1e-6) g                          g learned, or 1 + W cond ("AdaRMSNorm")
    attention(x)   = out(softmax(q k^T) v),   q, k <- rope(sqrt(s) q / sqrt(sum q^2 + 1e-6))       s learned per head
    feed_forward   = down(u * gelu(g)), [u, g] = up(x)  ("geglu")        or  down(gelu(up(x)))  ("gelu")
    block(x)       = x + f(AdaRMSNorm(x, cond)),  f attention or feed-forward

(arXiv 2401.11605, Sec. 4.2 and App. C; k_diffusion/models/image_transformer_v2.py.) No bias anywhere. The softmax has
no 1 / sqrt(D): the cosine similarity is scaled by s, 10 at the start. RoPE turns half of each head, by angles
position * frequency with pi to 10 pi shared out among the heads; positions span [-1, 1] along the longer side.
Linear layers start as torch leaves them, U(-1, 1) / sqrt(fan in), and those that end a residual branch at 0.

Norm statistics, cosine similarity, RoPE, softmax, Fourier features, mapping network and the adaptive scales are float32
(or float64 if the input is). In bfloat16 the authors compute the last three, and the RoPE of globally attending levels,
in bfloat16 too. Dropout takes a key per row, so that a row's mask does not depend on the batch around it.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nested.models.layers import torch_uniform
from nested.ops.attention import at_least_float32, attention
from nested.ops.neighborhood_attention import neighborhood_attention

EPSILON = 1e-6
EXACT = jax.lax.Precision.HIGHEST  # accelerators round float32 products; those of conditions are few and must be exact
MAPPING_INDEX = 1 << 20  # of the mapping network's first dropout, beyond those of the layers
ATTENTIONS = ("global", "neighborhood", "shifted_window", "none")
FeedForwardKind = Literal["geglu", "gelu"]
FEED_FORWARDS = {"geglu": 3, "gelu": 4}  # name -> hidden width over width


def linear(
    features: int,
    fan_in: int,
    name: str,
    dtype: DTypeLike | None = None,
    zero: bool = False,
    precision: jax.lax.Precision | None = None,
) -> nn.Dense:
    """Return a layer without bias that starts as torch's does, or at zeros. precision: EXACT if float32 is meant."""
    init = nn.initializers.zeros if zero else torch_uniform(fan_in)
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, precision=precision, name=name)


def axial_positions(height: int, width: int) -> np.ndarray:
    """Return [height, width, 2] float64, (row, column) of the cells' centres; the longer side spans [-1, 1]."""
    longer = max(height, width)
    rows, columns = ((2 * np.arange(n) + 1 - n) / longer for n in (height, width))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)


def halved(positions_HW2: np.ndarray) -> np.ndarray:
    """Return the positions of the next level: the mean of each 2 x 2."""
    H, W, _ = positions_HW2.shape
    return positions_HW2.reshape(H // 2, 2, W // 2, 2, 2).mean((1, 3))


def rope_frequencies(num_heads: int, head_width: int) -> np.ndarray:
    """Return [num_heads, head_width / 8] float64: pi to 10 pi, log-spaced without the end, dealt to heads in turn."""
    count = num_heads * head_width // 8
    return (math.pi * 10 ** (np.arange(count) / count)).reshape(-1, num_heads).T


def rotate(x_BHWND: jax.Array, theta_HWNF: jax.Array) -> jax.Array:
    """Turn the pairs (x_j, x_{j + F}), j < F = D / 4, by theta; the other half of each head stays."""
    F = theta_HWNF.shape[-1]
    cos, sin = jnp.cos(theta_HWNF)[None], jnp.sin(theta_HWNF)[None]
    first, second, rest = x_BHWND[..., :F], x_BHWND[..., F : 2 * F], x_BHWND[..., 2 * F :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, index: int) -> jax.Array:
    """Drop entries of row b of x by the mask of fold_in(keys[b], index); without keys nothing is dropped."""
    if rate == 0 or keys_B is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the RMS norm over the last axis; statistics and scale in float32 or better, the product in x's dtype."""
    mean_square = jnp.mean(jnp.square(x.astype(at_least_float32(x.dtype))), axis=-1, keepdims=True)
    return x * (scale * jax.lax.rsqrt(mean_square + EPSILON)).astype(x.dtype)


class RMSNorm(nn.Module):
    """[..., D] -> [..., D]; a learned scale, 1 at the start."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = self.param("gain", nn.initializers.ones, (x.shape[-1],))
        return normalise(x, scale_D.reshape((1,) * (x.ndim - 1) + (-1,)))


class AdaRMSNorm(nn.Module):
    """[B, H, W, D], cond [B, M] -> [B, H, W, D]; the scale is 1 + W cond, W 0 at the start."""

    @nn.compact
    def __call__(self, x_BHWD: jax.Array, cond_BM: jax.Array) -> jax.Array:
        scale_BD = 1 + linear(x_BHWD.shape[-1], cond_BM.shape[-1], "linear", zero=True, precision=EXACT)(cond_BM)
        return normalise(x_BHWD, scale_BD[:, None, None])


class FourierFeatures(nn.Module):
    """[B, n] -> [B, features]: cos and sin of 2 pi W x, W ~ N(0, 1) [features / 2, n] drawn once and never trained."""

    features: int

    @nn.compact
    def __call__(self, x_Bn: jax.Array) -> jax.Array:
        weight_Fn = self.param("weight", nn.initializers.normal(1.0), (self.features // 2, x_Bn.shape[-1]))
        # Not a matrix product, which accelerators round: angles of many turns need every digit.
        angles_BF = 2 * math.pi * jnp.sum(x_Bn[:, None] * jax.lax.stop_gradient(weight_Fn)[None], axis=-1)
        return jnp.concatenate([jnp.cos(angles_BF), jnp.sin(angles_BF)], axis=-1)


class AxialRoPE(nn.Module):
    """Angles [H, W, N, D / 4] of a grid of positions: D / 8 from the row, then D / 8 from the column. Never trained."""

    num_heads: int
    head_width: int

    @nn.compact
    def __call__(self, positions_HW2: np.ndarray) -> jax.Array:
        freqs_NF = self.param(
            "freqs", lambda _, shape: jnp.asarray(rope_frequencies(self.num_heads, self.head_width), jnp.float32),
            (self.num_heads, self.head_width // 8),
        )  # fmt: skip
        freqs_NF = jax.lax.stop_gradient(freqs_NF)
        grid_HW2 = jnp.asarray(positions_HW2, freqs_NF.dtype)
        return jnp.concatenate([grid_HW2[:, :, axis, None, None] * freqs_NF[None, None] for axis in (0, 1)], -1)


def shifted_window_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Return bool [windows, window^2, window^2], which cells see each other after a roll by `shift`.

    The rows and columns that wrapped around, the first `shift` of the first window row and column, see only each other.
    """
    part = (np.arange(window) < shift).astype(int)  # within a first window: 1 what wrapped, 0 the rest
    rows, columns = (np.zeros((n // window, window), int) for n in (height, width))
    rows[0], columns[0] = part, part
    cells = np.stack(np.broadcast_arrays(rows[:, None, :, None], columns[None, :, None, :]), -1)
    cells = cells.reshape(-1, window * window, 2)
    return (cells[:, :, None] == cells[:, None, :]).all(-1)


def shifted_window_attention(
    q_BHWND: jax.Array, k_BHWND: jax.Array, v_BHWND: jax.Array, window: int, shift: int, implementation: str
) -> jax.Array:
    """Return [B, H, W, N, D]: attention within windows of the grid rolled by `shift` towards larger indices."""
    B, H, W, N, D = q_BHWND.shape
    rows, columns = H // window, W // window

    def cut(x_BHWND: jax.Array) -> jax.Array:
        x_BHWND = jnp.roll(x_BHWND, (shift, shift), axis=(1, 2))
        return x_BHWND.reshape(B, rows, window, columns, window, N, D).swapaxes(2, 3).reshape(-1, window**2, N, D)

    mask = None
    if shift:
        mask = jnp.asarray(shifted_window_mask(H, W, window, shift))
        mask = jnp.tile(mask, (B, 1, 1))[:, None]
    out = attention(cut(q_BHWND), cut(k_BHWND), cut(v_BHWND), implementation, scale=1.0, mask_BHLM=mask)
    out = out.reshape(B, rows, columns, window, window, N, D).swapaxes(2, 3).reshape(B, H, W, N, D)
    return jnp.roll(out, (-shift, -shift), axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class LevelOptions:
    """What the layers of one level share.

    attention: one of ATTENTIONS; window: the kernel or window of 'neighborhood' and 'shifted_window'. head_width: a
    multiple of 8. hidden: width inside the feed-forward of kind `feed_forward`. rope: whether q and k are turned.
    dropout: a rate. implementation: of global and window attention ('xla', 'cudnn'); neighborhood: of neighborhood
    attention. remat: whether attention and feed-forward are each recomputed in the backward pass. dtype: see HDiT.
    """

    attention: str
    window: int | tuple[int, int]
    head_width: int
    hidden: int
    feed_forward: str
    rope: bool
    dropout: float
    implementation: str
    neighborhood: str
    remat: bool
    dtype: DTypeLike | None


class SelfAttention(nn.Module):
    """x + attention(norm(x)), [B, H, W, D].

    number: the layer's place within its level, down and then up; windows of odd ones are shifted by half.
    index: which of the model's dropouts this is.
    """

    options: LevelOptions
    number: int
    index: int

    @nn.compact
    def __call__(
        self, x_BHWD: jax.Array, positions_HW2: np.ndarray, cond_BM: jax.Array, keys_B: jax.Array | None
    ) -> jax.Array:
        B, H, W, D = x_BHWD.shape
        options = self.options
        normed_BHWD = AdaRMSNorm(name="norm")(x_BHWD, cond_BM)
        qkv_BHWE = linear(3 * D, D, "qkv_proj", options.dtype)(normed_BHWD)
        qkv = qkv_BHWE.reshape(B, H, W, 3, -1, options.head_width)
        N = D // options.head_width
        scale_N = self.param("gain", nn.initializers.constant(10.0), (N,))
        theta_HWNF = AxialRoPE(N, options.head_width, name="pos_emb")(positions_HW2) if options.rope else None
        q_BHWND, k_BHWND = (similarity(qkv[:, :, :, i], scale_N, theta_HWNF) for i in (0, 1))
        out_BHWND = self.attend(q_BHWND, k_BHWND, qkv[:, :, :, 2])
        out_BHWD = dropout(out_BHWND.reshape(B, H, W, D), options.dropout, keys_B, self.index)
        return x_BHWD + linear(D, D, "out_proj", options.dtype, zero=True)(out_BHWD)

    def attend_macs(self, q_BHWND: jax.Array, k_BHWND: jax.Array, v_BHWND: jax.Array) -> int:
        """Return the multiply-accumulates of `attend`: q k^T and the sum over v, of the keys that count.

        nested/modes/summary.py reads it.
        """
        _, H, W, _, _ = q_BHWND.shape
        window = self.options.window if self.options.attention != "global" else (H, W)
        return 2 * q_BHWND.size * (window**2 if isinstance(window, int) else math.prod(window))

    def attend(self, q_BHWND: jax.Array, k_BHWND: jax.Array, v_BHWND: jax.Array) -> jax.Array:
        """Return softmax(q k^T) v over each query's keys, [B, H, W, N, D]."""
        options = self.options
        if options.attention == "neighborhood":
            return neighborhood_attention(q_BHWND, k_BHWND, v_BHWND, options.window, 1.0, options.neighborhood)
        if options.attention == "shifted_window":
            window = options.window
            assert isinstance(window, int)  # HDiT.check_level
            shift = window // 2 if self.number % 2 else 0
            return shifted_window_attention(q_BHWND, k_BHWND, v_BHWND, window, shift, options.implementation)
        B, H, W, N, D = q_BHWND.shape
        q_BLND, k_BLND, v_BLND = (x.reshape(B, H * W, N, D) for x in (q_BHWND, k_BHWND, v_BHWND))
        return attention(q_BLND, k_BLND, v_BLND, options.implementation, scale=1.0).reshape(B, H, W, N, D)


def similarity(x_BHWND: jax.Array, scale_N: jax.Array, theta_HWNF: jax.Array | None) -> jax.Array:
    """Return a query or key as cosine attention wants it: normalised, times sqrt(scale), turned; in x's dtype."""
    wide = x_BHWND.astype(at_least_float32(x_BHWND.dtype))
    length = jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + EPSILON)
    wide = wide * (jnp.sqrt(scale_N).reshape(1, 1, 1, -1, 1) * length)
    return (wide if theta_HWNF is None else rotate(wide, theta_HWNF)).astype(x_BHWND.dtype)


def feed_forward(
    x: jax.Array,
    hidden: int,
    kind: str,
    rate: float,
    keys_B: jax.Array | None,
    index: int,
    dtype: DTypeLike | None,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """Return down(dropout(activation(up(x)))), [..., D], in the calling module. The second half of GEGLU gates."""
    width = x.shape[-1]
    if kind == "geglu":
        value, gate = jnp.split(linear(2 * hidden, width, "up_proj", dtype, precision=precision)(x), 2, axis=-1)
        x = value * nn.gelu(gate, approximate=False)
    else:
        x = nn.gelu(linear(hidden, width, "up_proj", dtype, precision=precision)(x), approximate=False)
    down = linear(width, hidden, "down_proj", dtype, zero=True, precision=precision)
    return down(dropout(x, rate, keys_B, index))


class FeedForward(nn.Module):
    """x + feed_forward(norm(x)), [B, H, W, D]."""

    options: LevelOptions
    index: int

    @nn.compact
    def __call__(self, x_BHWD: jax.Array, cond_BM: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        options = self.options
        normed_BHWD = AdaRMSNorm(name="norm")(x_BHWD, cond_BM)
        return x_BHWD + feed_forward(
            normed_BHWD, options.hidden, options.feed_forward, options.dropout, keys_B, self.index, options.dtype
        )


class Layer(nn.Module):
    """Attention, unless the level has none, and feed-forward: [B, H, W, D] -> [B, H, W, D]."""

    options: LevelOptions
    number: int
    index: int

    @nn.compact
    def __call__(
        self, x_BHWD: jax.Array, positions_HW2: np.ndarray, cond_BM: jax.Array, keys_B: jax.Array | None
    ) -> jax.Array:
        attend, forward = SelfAttention, FeedForward
        if self.options.remat:
            attend, forward = nn.remat(attend), nn.remat(forward)
        if self.options.attention != "none":
            attend = attend(self.options, self.number, 2 * self.index, name="self_attn")
            x_BHWD = attend(x_BHWD, positions_HW2, cond_BM, keys_B)
        return forward(self.options, 2 * self.index + 1, name="ff")(x_BHWD, cond_BM, keys_B)


class MappingBlock(nn.Module):
    """x + feed_forward(norm(x)), [B, M]."""

    hidden: int
    kind: str
    rate: float
    index: int

    @nn.compact
    def __call__(self, x_BM: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        normed_BM = RMSNorm(name="norm")(x_BM)
        return x_BM + feed_forward(normed_BM, self.hidden, self.kind, self.rate, keys_B, self.index, None, EXACT)


class MappingNetwork(nn.Module):
    """Condition [B, M] -> the vector [B, M] that every AdaRMSNorm reads."""

    depth: int
    hidden: int
    kind: str
    rate: float

    @nn.compact
    def __call__(self, x_BM: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        x_BM = RMSNorm(name="in_norm")(x_BM)
        for i in range(self.depth):
            x_BM = MappingBlock(self.hidden, self.kind, self.rate, MAPPING_INDEX + i, name=f"blocks_{i}")(x_BM, keys_B)
        return RMSNorm(name="out_norm")(x_BM)
