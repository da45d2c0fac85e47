"""U-ViT (Bao et al., "All are Worth Words", CVPR 2023; libs/uvit.py, uvit_t2i.py), with coarser levels as tokens.

    tokens = [label] [time] [text ...] patches [z_m patches ...] ...  + pos_embed
    x = tokens;  for i < n: x = block(x), push x;   x = mid(x);   for i < n: x = block(skip_linear([x, pop]))
    block(x):  x += attention(norm1(x));  x += mlp(norm2(x))                              n = depth // 2
    output = conv3x3(unpatchify(decoder_pred(norm(patches))))                             [B, h, w, c], like the input

Numerics of the authors' code: LayerNorm eps 1e-5, erf GELU, cosines first; initial values as there (everything
N(0, .02^2) with zero bias, label embedding N(0, 1), both convolutions as torch leaves them).
Nested Diffusion (CVPR 2025, Sec. 3.3) appends the noised variables of coarser levels as tokens, each through its own
patch embedding; one that is dropped becomes a learnable empty token, repeated, before the position is added.
Departures from the authors' code: grids need not be square; norm and decoder_pred run on the patch tokens only (the
rest was discarded); `num_classes` does not count the null class, which is the last row of the label embedding.
An odd depth gives 2 (depth // 2) + 1 blocks, as there.
"""

import types
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested.models import layers

VARIANTS = types.MappingProxyType({
    "S": types.MappingProxyType(dict(width=512, depth=12, num_heads=8)),
    "S_deep": types.MappingProxyType(dict(width=512, depth=16, num_heads=8)),
    "base": types.MappingProxyType(dict(width=768, depth=12, num_heads=12, time_mlp=True)),  # Nested Diffusion, Table 6
    "M": types.MappingProxyType(dict(width=768, depth=16, num_heads=12)),
    "L": types.MappingProxyType(dict(width=1024, depth=20, num_heads=16)),
    "H": types.MappingProxyType(dict(width=1152, depth=28, num_heads=16, final_conv=False)),
})  # fmt: skip


class Block(nn.Module):
    """One transformer block; with a long skip the two streams are first merged by a linear layer."""

    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    attention: str
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, skip_BLD: jax.Array | None = None) -> jax.Array:
        width = x_BLD.shape[-1]
        if skip_BLD is not None:
            x_BLE = jnp.concatenate([x_BLD, skip_BLD], axis=-1)
            x_BLD = nn.Dense(
                width, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name="skip_linear"
            )(x_BLE)  # fmt: skip
        attend = layers.SelfAttention(self.num_heads, self.qkv_bias, self.attention, self.dtype, name="attn")
        mlp = layers.Mlp(int(width * self.mlp_ratio), self.dtype, name="mlp")
        x_BLD = x_BLD + attend(layer_norm(self.dtype, "norm1")(x_BLD))
        return x_BLD + mlp(layer_norm(self.dtype, "norm2")(x_BLD))


def layer_norm(dtype, name: str) -> nn.LayerNorm:
    """torch's LayerNorm: eps 1e-5, two-pass variance; statistics in float32 or better."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


class UViT(layers.Backbone):
    """The backbone of one level whose variable is one array [B, h, w, c].

    num_classes: labels 0..num_classes-1, null = num_classes; 0: no label token. text_dim, text_tokens: size and number
        of the text encoder's vectors; 0: no text. conditions: (name, patch size) of each coarser level, in token order.
    mlp_ratio: hidden width of the MLP over `width`. time_mlp: two layers after the time embedding. skip: long skips.
    final_conv: 3x3 convolution at the end. attention: 'xla' or 'cudnn'. remat: recompute each block in the backward
        pass. dtype: of matrix products and activations, None for that of the input; parameters are float32.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4
    qkv_bias: bool = False
    num_classes: int = 0
    text_dim: int = 0
    text_tokens: int = 0
    conditions: tuple[tuple[str, int], ...] = ()
    time_mlp: bool = False
    skip: bool = True
    final_conv: bool = True
    attention: str = "xla"
    remat: bool = False
    dtype: jnp.dtype | None = None

    @property
    def num_extra_tokens(self) -> int:
        """Tokens before the patches: label, time, text."""
        return (self.num_classes > 0) + 1 + self.text_tokens

    def num_tokens(self, shape: tuple[int, int, int]) -> int:
        """Tokens of a variable of this shape (h, w, c), without those of its conditions."""
        return shape[0] * shape[1] // self.patch_size**2

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, c_noise_B: jax.Array, cond: Mapping[str, jax.Array], *, train: bool):
        """[B, h, w, c] like x. c_noise_B: the time as the network is told it (U-ViT: 0..1000). cond: 'label' [B] int,
        'text' [B, T, C], each condition by its name [B, h, w, c] and, optional, 'keep_NAME' [B] bool.

        `train` is part of the contract of backbones; U-ViT has no dropout and does the same either way.
        ValueError: a condition is missing or unknown, a shape does not divide, the tokens are not those of the params.
        """
        self.check(x_BHWC, cond)
        patches_BND = layers.PatchEmbed(self.patch_size, self.width, self.dtype, name="patch_embed")(x_BHWC)
        x_BLD = jnp.concatenate([*self.extra_tokens(c_noise_B, cond, patches_BND.dtype), patches_BND,
                                 *self.condition_tokens(cond)], axis=1)  # fmt: skip
        x_BLD = x_BLD + self.position_embedding(x_BLD.shape[1], x_BHWC.shape).astype(x_BLD.dtype)

        block = nn.remat(Block) if self.remat else Block
        config = (self.num_heads, self.mlp_ratio, self.qkv_bias, self.attention, self.dtype)
        skips = []
        for i in range(self.depth // 2):
            x_BLD = block(*config, name=f"in_blocks_{i}")(x_BLD)
            skips.append(x_BLD)
        x_BLD = block(*config, name="mid_block")(x_BLD)
        for i in range(self.depth // 2):
            x_BLD = block(*config, name=f"out_blocks_{i}")(x_BLD, skips.pop() if self.skip else None)

        start = self.num_extra_tokens
        patches_BND = layer_norm(self.dtype, "norm")(x_BLD[:, start : start + patches_BND.shape[1]])
        return self.decode(patches_BND, x_BHWC.shape).astype(x_BHWC.dtype)

    def extra_tokens(self, c_noise_B, cond, dtype) -> list[jax.Array]:
        """The tokens before the patches, each [B, 1 or T, D]: label, time, text."""
        time_BD = layers.timestep_embedding(c_noise_B, self.width).astype(dtype)
        if self.time_mlp:
            time_BE = nn.silu(self.dense(4 * self.width, "time_embed_0")(time_BD))
            time_BD = self.dense(self.width, "time_embed_2")(time_BE)
        tokens = [time_BD[:, None]]
        if self.num_classes:
            embed = nn.Embed(
                self.num_classes + 1, self.width, dtype=self.dtype, embedding_init=nn.initializers.normal(1.0),
                name="label_emb",
            )  # fmt: skip
            tokens.insert(0, embed(cond["label"])[:, None])
        if self.text_tokens:
            tokens.append(self.dense(self.width, "context_embed")(cond["text"].astype(dtype)))
        return tokens

    def condition_tokens(self, cond) -> list[jax.Array]:
        """The tokens of each coarser level, [B, its patches, D]; the empty token where keep_NAME is False."""
        tokens = []
        for name, patch_size in self.conditions:
            empty_11D = self.param(f"empty_{name}", nn.initializers.normal(0.02), (1, 1, self.width))
            z_BMD = layers.PatchEmbed(patch_size, self.width, self.dtype, name=f"cond_embed_{name}")(cond[name])
            if f"keep_{name}" in cond:
                z_BMD = jnp.where(cond[f"keep_{name}"][:, None, None], z_BMD, empty_11D.astype(z_BMD.dtype))
            tokens.append(z_BMD)
        return tokens

    def position_embedding(self, num_tokens: int, shape) -> jax.Array:
        if self.has_variable("params", "pos_embed"):
            held = self.get_variable("params", "pos_embed").shape[1]
            if held != num_tokens:
                raise ValueError(
                    f"U-ViT: an input of shape {shape[1:]} with its conditions makes {num_tokens} tokens, pos_embed "
                    f"has {held}; for another resolution use resize_position_embedding"
                )
        return self.param("pos_embed", nn.initializers.normal(0.02), (1, num_tokens, self.width))

    def decode(self, patches_BND, shape) -> jax.Array:
        _, height, width, channels = shape
        p = self.patch_size
        pixels_BNP = self.dense(p * p * channels, "decoder_pred")(patches_BND)
        x_BHWC = layers.unpatchify(pixels_BNP, (height // p, width // p), p)
        if self.final_conv:
            init = layers.torch_uniform(9 * channels)
            x_BHWC = nn.Conv(
                channels, (3, 3), padding=1, dtype=self.dtype, kernel_init=init, bias_init=init, name="final_layer"
            )(x_BHWC)
        return x_BHWC

    def dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=name)

    def check(self, x_BHWC, cond) -> None:
        """One line about what does not fit, before flax or XLA say it at length."""
        if self.width % self.num_heads:
            raise ValueError(f"U-ViT: width {self.width} is not divisible by num_heads {self.num_heads}")
        if (self.text_dim > 0) != (self.text_tokens > 0):
            raise ValueError(f"U-ViT: text_dim {self.text_dim} and text_tokens {self.text_tokens} go together: "
                             "set both or neither")  # fmt: skip
        names = [name for name, _ in self.conditions]
        required = ["label"] * (self.num_classes > 0) + ["text"] * (self.text_tokens > 0) + names
        missing = [name for name in required if name not in cond]
        unknown = sorted(set(cond) - set(required) - {f"keep_{name}" for name in names})
        if missing or unknown:
            raise ValueError(f"U-ViT: cond has {sorted(cond)}, expected {required} (keep_NAME optional): missing "
                             f"{missing}, unknown {unknown}; see num_classes, text_tokens, conditions")  # fmt: skip
        if self.text_tokens and cond["text"].shape[1:] != (self.text_tokens, self.text_dim):
            raise ValueError(f"U-ViT: text has shape {cond['text'].shape}, expected (batch, {self.text_tokens}, "
                             f"{self.text_dim}) from text_tokens and text_dim")  # fmt: skip
        grids = [("its input", x_BHWC, self.patch_size)] + [(name, cond[name], p) for name, p in self.conditions]
        for name, z_BHWC, p in grids:
            shape = getattr(z_BHWC, "shape", type(z_BHWC).__name__)
            if not hasattr(z_BHWC, "ndim") or z_BHWC.ndim != 4 or shape[1] % p or shape[2] % p:
                raise ValueError(f"U-ViT: {name} has shape {shape}, expected one array (batch, height, width, "
                                 f"channels), height and width divisible by the patch size {p}")  # fmt: skip


def resize_position_embedding(
    params: Mapping, old_grid: tuple[int, int], new_grid: tuple[int, int], extras: int
) -> dict:
    """The params with pos_embed's patch positions resampled (bicubic) to another grid, for another resolution.

    old_grid, new_grid: (rows, columns) of patches. extras: tokens before the patches (UViT.num_extra_tokens); those
    and the coarser levels' tokens after the patches are kept. ValueError: pos_embed is too short for old_grid.
    """
    pos_1LD = params["pos_embed"]
    end = extras + old_grid[0] * old_grid[1]
    if pos_1LD.shape[1] < end:
        raise ValueError(f"pos_embed has {pos_1LD.shape[1]} tokens, expected at least {end}: {extras} and a grid of "
                         f"{old_grid}")  # fmt: skip
    width = pos_1LD.shape[2]
    grid_1hwD = pos_1LD[:, extras:end].reshape(1, *old_grid, width)
    resized_1ND = jax.image.resize(grid_1hwD, (1, *new_grid, width), "bicubic").reshape(1, -1, width)
    return {**params, "pos_embed": jnp.concatenate([pos_1LD[:, :extras], resized_1ND, pos_1LD[:, end:]], axis=1)}
