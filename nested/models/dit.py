"""DiT (Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, arXiv 2212.09748, Sec. 3.2).

    x = patches + positions                                      positions: sin and cos of column and row, a constant
    c = mlp(sinusoids of the time) + label + sum_m (W_m z_m + b_m)           z_m: coarser levels of one vector each
    block:  s1, a1, g1, s2, a2, g2 = W silu(c) + b               "adaLN-Zero": W and b start at 0
            x += g1 attention((1 + a1) norm(x) + s1)
            x += g2 mlp((1 + a2) norm(x) + s2)
    output = unpatchify(linear((1 + a) norm(x) + s)),  s, a = W silu(c) + b             exactly 0 at the start

In pixel space with patches of 4 it is the baseline of HDiT's Table 1 (arXiv 2401.11605).
Names and numerics are those of the authors' code (models.py of facebookresearch/DiT), so its state dicts load with
nested.weights.files.from_torch: LayerNorm without parameters and eps 1e-6, tanh GELU, 256 sinusoids with cosines first.
So are the initial values: linear layers Xavier uniform, time and label embedding N(0, .02^2), and 0 for biases and for
the layers that end a residual branch or the network. The patch embedding's bias, which some versions leave to torch, is
0 too.
Coarser levels enter as in RCG's pixel generator (arXiv 2312.03701; pixel_generator/dit/models.py of LTH14/rcg): through
a linear layer (Xavier uniform, bias 0) into c. A dropped level becomes a learnable vector of its channels before that
layer. RCG leaves out the label if there is a vector; here both are added. Its networks have the exact GELU (`tanh_gelu`
False).
Departures from the authors' code: grids need not be square; without classes there is no label; `num_classes` does not
count the null class, which is the last row of the label embedding. The time, the label, the adaptive scales, the
coarser levels' vectors and the norms are float32 (or float64 if the input is) in every compute dtype.
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nested.models import layers
from nested.models.backbone import TokenBackbone
from nested.models.injection import Empty, check_empty, kept_or_empty
from nested.ops.attention import Attention, at_least_float32

SINUSOIDS = 256  # width of the time's sinusoidal embedding

VARIANTS = types.MappingProxyType({
    "S": types.MappingProxyType(dict(width=384, depth=12, num_heads=6)),
    "B": types.MappingProxyType(dict(width=768, depth=12, num_heads=12)),
    "L": types.MappingProxyType(dict(width=1024, depth=24, num_heads=16)),
    "XL": types.MappingProxyType(dict(width=1152, depth=28, num_heads=16)),
})  # fmt: skip


def position_embedding(rows: int, columns: int, width: int) -> np.ndarray:
    """Return [1, rows columns, width] float64: for the column, then the row, sin and then cos of position * frequency.

    Frequencies fall from 1 to 1 / 10000 (excluded), width / 4 of them. Positions count patches, from 0.
    """
    frequencies_F = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    row_N, column_N = np.divmod(np.arange(rows * columns), columns)
    angles = [position_N[:, None] * frequencies_F for position_N in (column_N, row_N)]
    return np.concatenate([wave(angle_NF) for angle_NF in angles for wave in (np.sin, np.cos)], axis=1)[None]


def modulated_norm(x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, name: str) -> jax.Array:
    """Return (1 + scale) norm(x) + shift, computed in float32 or better, in x's dtype."""
    norm = nn.LayerNorm(
        epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False,
        dtype=at_least_float32(x_BLD.dtype), name=name,
    )  # fmt: skip
    return ((1 + scale_BD[:, None]) * norm(x_BLD) + shift_BD[:, None]).astype(x_BLD.dtype)


def adaptive(c_BD: jax.Array, count: int) -> list[jax.Array]:
    """Return `count` vectors [B, D] from the conditioning vector: shifts, scales and gates."""
    values_BE = nn.Dense(
        count * c_BD.shape[-1], kernel_init=nn.initializers.zeros, name="adaLN_modulation_1"
    )(nn.silu(c_BD))  # fmt: skip
    return jnp.split(values_BE, count, axis=-1)


class TimeEmbedder(nn.Module):
    """Times [B] -> [B, width], float32 or better: sinusoids and two layers."""

    width: int

    @nn.compact
    def __call__(self, c_noise_B: jax.Array) -> jax.Array:
        dense = nn.initializers.normal(0.02)
        time_BD = nn.Dense(self.width, kernel_init=dense, name="mlp_0")(
            layers.timestep_embedding(c_noise_B, SINUSOIDS)
        )  # fmt: skip
        return nn.Dense(self.width, kernel_init=dense, name="mlp_2")(nn.silu(time_BD))


class LabelEmbedder(nn.Module):
    """Labels [B] -> [B, width]; the last row is the null class."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, label_B: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        return nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="embedding_table")(label_B)


class Block(nn.Module):
    """Attention and MLP, each modulated before and gated after by the conditioning vector c."""

    num_heads: int
    mlp_ratio: float
    tanh_gelu: bool
    attention: str
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, c_BD: jax.Array) -> jax.Array:
        shift1_BD, scale1_BD, gate1_BD, shift2_BD, scale2_BD, gate2_BD = adaptive(c_BD, 6)
        init = layers.torch_xavier
        attend = layers.SelfAttention(self.num_heads, True, self.attention, self.dtype, init, name="attn")
        mlp = layers.Mlp(int(x_BLD.shape[-1] * self.mlp_ratio), self.dtype, init, self.tanh_gelu, name="mlp")
        y_BLD = attend(modulated_norm(x_BLD, shift1_BD, scale1_BD, "norm1"))
        x_BLD = (x_BLD + gate1_BD[:, None] * y_BLD).astype(x_BLD.dtype)
        y_BLD = mlp(modulated_norm(x_BLD, shift2_BD, scale2_BD, "norm2"))
        return (x_BLD + gate2_BD[:, None] * y_BLD).astype(x_BLD.dtype)


class FinalLayer(nn.Module):
    """[B, L, D] -> [B, L, features]; 0 at the start."""

    features: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, c_BD: jax.Array) -> jax.Array:
        shift_BD, scale_BD = adaptive(c_BD, 2)
        x_BLD = modulated_norm(x_BLD, shift_BD, scale_BD, "norm_final")
        return nn.Dense(self.features, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="linear")(x_BLD)


class DiT(TokenBackbone):
    """The backbone of a level whose variable is one array [B, h, w, c].

    num_classes: labels are 0..num_classes-1 and null is num_classes; 0: no label.
    conditions: (name, patch size, which is not used) of each coarser level, a variable of shape (1, 1, c).
    empty: what stands for a dropped level: 'variable', a learnable vector of its channels, before its linear layer
        (RCG's fake latent), or 'token', one of `width`, after it.
    remat: whether each block is recomputed in the backward pass. dtype: of matrix products and the residual stream;
        None is that of the input. Parameters are float32.
    """

    width: Annotated[int, "channels of a token, a multiple of 4 and of num_heads"] = 768
    depth: Annotated[int, "number of blocks"] = 12
    num_heads: Annotated[int, "number of attention heads"] = 12
    mlp_ratio: Annotated[float, "hidden width of the MLP over width"] = 4
    tanh_gelu: Annotated[bool, "whether GELU is approximated by tanh (DiT), or exact (RCG)"] = True
    num_classes: int = 0
    conditions: tuple[tuple[str, int], ...] = ()
    empty: Annotated[Empty, "what is learned in place of a dropped level"] = "variable"
    attention: Annotated[Attention, "its implementation; cudnn is fused, for NVIDIA GPUs in bfloat16"] = "xla"
    learn_variance: Annotated[bool, "whether the output has twice the channels, for process.learned_variance"] = False
    remat: bool = False
    dtype: DTypeLike | None = None

    buffers: ClassVar[tuple[str, ...]] = (r"^pos_embed$",)

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, c_noise_B: jax.Array, cond: Mapping[str, Any], *, train: bool) -> jax.Array:
        """Return [B, h, w, c] like x.

        With learn_variance it is [B, h, w, 2c]: the prediction and then, per channel, where the log variance lies
        between its bounds (-1 to 1, as in Improved DDPM).

        Args:
            x_BHWC: the noisy variable.
            c_noise_B: the time as the network reads it (DiT: 0..1000).
            cond: 'label' [B] int if there are classes, each condition by its name [B, 1, 1, c] and, optional,
                'keep_NAME' [B] bool.
            train: part of the contract of backbones; without dropout it changes nothing.

        Raises:
            ValueError: if a coarser level has more than one vector, something is missing in cond or unknown there, a
                shape does not divide, or pos_embed is for another grid.
        """
        self.check(x_BHWC, cond)
        p, (_, height, width, channels) = self.patch_size, x_BHWC.shape
        grid = (height // p, width // p)
        embed = layers.PatchEmbed(p, self.width, self.dtype, layers.torch_xavier, name="x_embedder")
        x_BLD = embed(x_BHWC)
        x_BLD = x_BLD + self.positions(grid).astype(x_BLD.dtype)
        c_BD = TimeEmbedder(self.width, name="t_embedder")(c_noise_B)
        if self.num_classes:
            c_BD = c_BD + LabelEmbedder(self.num_classes, self.width, name="y_embedder")(cond["label"])
        c_BD = sum(self.embedded_conditions(cond), c_BD)

        block = nn.remat(Block) if self.remat else Block
        config = (self.num_heads, self.mlp_ratio, self.tanh_gelu, self.attention, self.dtype)
        for i in range(self.depth):
            x_BLD = block(*config, name=f"blocks_{i}")(x_BLD, c_BD)
        features = p * p * channels * (2 if self.learn_variance else 1)
        pixels_BLP = FinalLayer(features, self.dtype, name="final_layer")(x_BLD, c_BD)
        return layers.unpatchify(pixels_BLP, grid, p).astype(x_BHWC.dtype)

    def embedded_conditions(self, cond: Mapping[str, Any]) -> list[jax.Array]:
        """Return each coarser level's vector as [B, D], float32 or better; dropped rows have the empty one."""
        embedded = []
        for name, _ in self.conditions:
            embed = nn.Dense(self.width, kernel_init=layers.torch_xavier, name=f"rep_{name}")
            z_BC = cond[name][:, 0, 0]
            size = z_BC.shape[1] if self.empty == "variable" else self.width
            empty = self.param(f"empty_{name}", nn.initializers.normal(0.02), (1, size))
            if self.empty == "variable":
                embedded.append(embed(kept_or_empty(z_BC, empty, cond, name)))
            else:
                embedded.append(kept_or_empty(embed(z_BC), empty, cond, name))
        return embedded

    def positions(self, grid: tuple[int, int]) -> jax.Array:
        """Return [1, L, D], a constant that is kept with the parameters, as in the authors' code."""
        if self.has_variable("params", "pos_embed"):
            held, needed = self.get_variable("params", "pos_embed").shape[1], grid[0] * grid[1]
            if held != needed:
                raise ValueError(f"DiT: a grid of {grid} patches needs {needed} positions, pos_embed has {held}; for "
                                 f"another resolution use position_embedding{(*grid, self.width)}")  # fmt: skip

        def init(key: jax.Array) -> jax.Array:
            return jnp.asarray(position_embedding(*grid, self.width), jnp.float32)

        return jax.lax.stop_gradient(self.param("pos_embed", init))

    def check(self, x_BHWC: Any, cond: Mapping[str, Any]) -> None:
        """Raise ValueError, in one line, for inputs that do not fit: flax and XLA would say it at length."""
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"DiT: width {self.width} must be divisible by 4 and by num_heads {self.num_heads}")
        shape = getattr(x_BHWC, "shape", type(x_BHWC).__name__)
        p = self.patch_size
        if not hasattr(x_BHWC, "ndim") or x_BHWC.ndim != 4 or shape[1] % p or shape[2] % p:
            raise ValueError(f"DiT: its input has shape {shape}, expected one array (batch, height, width, channels), "
                             f"height and width divisible by patch_size {p}")  # fmt: skip
        names = [name for name, _ in self.conditions]
        required = ["label"] * (self.num_classes > 0) + names
        missing = [name for name in required if name not in cond]
        unknown = sorted(set(cond) - set(required) - {f"keep_{name}" for name in names})
        if missing or unknown:
            raise ValueError(f"DiT: cond has {sorted(cond)}, expected {required} (keep_NAME optional): missing "
                             f"{missing}, unknown {unknown}; see num_classes, conditions")  # fmt: skip
        for name in names:
            shape = getattr(cond[name], "shape", type(cond[name]).__name__)
            if not hasattr(cond[name], "ndim") or cond[name].ndim != 4 or shape[1:3] != (1, 1):
                raise ValueError(f"DiT: {name} has shape {shape}, expected one vector (batch, 1, 1, channels); "
                                 "for a level that sees maps use uvit or hdit")  # fmt: skip
        check_empty("DiT", self.empty)
