"""U-ViT (Bao et al., "All are Worth Words", CVPR 2023; libs/uvit.py, uvit_t2i.py), with coarser levels as tokens.

    tokens = [label] [time] [text ...] patches [z_m patches ...] ...  + pos_embed
    x = tokens;  for i < n: x = block(x), push x;   x = mid(x);   for i < n: x = block(skip_linear([x, pop]))
    block(x):  x += attention(norm1(x));  x += mlp(norm2(x))                              n = depth // 2
    output = conv3x3(unpatchify(decoder_pred(norm(patches))))                             [B, h, w, c], like the input

The numerics are those of the authors' code: LayerNorm eps 1e-5, erf GELU, cosines first. So are the initial values:
N(0, .02^2) with zero bias, label embedding N(0, 1), both convolutions as torch leaves them.
Nested Diffusion (CVPR 2025, Sec. 3.3) appends the noised variables of coarser levels as tokens, each through its own
patch embedding; a dropped level becomes a learnable empty token, repeated, before the position is added. The first
draft of that paper (ICLR) instead joins them to the patch tokens every few blocks: nested/models/injection.py.
All tokens of a text are attended to, the padding of short captions included, as in the authors' t2i model.
Departures from the authors' code: grids need not be square; norm and decoder_pred run on the patch tokens only (the
rest was discarded); `num_classes` does not count the null class, which is the last row of the label embedding.
As there, the network has 2 (depth // 2) + 1 blocks.
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nested.models import layers
from nested.models.backbone import Shape, TokenBackbone
from nested.models.injection import Deconvolution, Empty, Injection, check_empty, kept_or_empty
from nested.ops.attention import Attention

VARIANTS = types.MappingProxyType({
    "S": types.MappingProxyType(dict(width=512, depth=12, num_heads=8)),
    "S_deep": types.MappingProxyType(dict(width=512, depth=16, num_heads=8)),
    "base": types.MappingProxyType(dict(width=768, depth=12, num_heads=12, time_mlp=True)),  # Nested Diffusion, Table 6
    "M": types.MappingProxyType(dict(width=768, depth=16, num_heads=12)),
    "L": types.MappingProxyType(dict(width=1024, depth=20, num_heads=16)),
    "H": types.MappingProxyType(dict(width=1152, depth=28, num_heads=16, final_conv=False)),
})  # fmt: skip

Injections = Literal["append_tokens", "deconv_concat"]  # CVPR, the ICLR draft


class Block(nn.Module):
    """One transformer block; with a long skip the two streams are first merged by a linear layer."""

    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    attention: str
    dtype: DTypeLike | None

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


def layer_norm(dtype: DTypeLike | None, name: str) -> nn.LayerNorm:
    """Return torch's LayerNorm: eps 1e-5, two-pass variance; statistics in float32 or better."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


class UViT(TokenBackbone):
    """The backbone of one level whose variable is one array [B, h, w, c].

    num_classes: labels are 0..num_classes-1 and null is num_classes; 0: no label token. text_dim, text_tokens: size and
        number of the text encoder's vectors; 0: no text. conditions: (name, patch size) of each coarser level, in token
        order.
    injection: 'deconv_concat' joins the coarser levels to the patch tokens after every `inject_every`-th block by
        `inject_layers` linear layers (both must be 0 with 'append_tokens') and does not use their patch sizes.
    empty: what stands for a dropped level: 'token', a learnable vector of `width`, after the level's embedding;
        'variable', a learnable vector of its channels, before that (RCG's fake latent).
    remat: whether each block is recomputed in the backward pass. dtype: of matrix products and activations; None is
        that of the input. Parameters are float32.
    """

    width: Annotated[int, "channels of a token"] = 512
    depth: Annotated[int, "blocks: the network has 2 (depth // 2) + 1 of them"] = 12
    num_heads: Annotated[int, "number of attention heads"] = 8
    mlp_ratio: Annotated[float, "hidden width of the MLP over width"] = 4
    qkv_bias: Annotated[bool, "whether q, k and v have a bias"] = False
    num_classes: int = 0
    text_dim: int = 0
    text_tokens: int = 0
    conditions: tuple[tuple[str, int], ...] = ()
    injection: Annotated[Injections, "how coarser levels enter (CVPR | ICLR)"] = "append_tokens"
    inject_every: Annotated[int, "deconv_concat: blocks from one injection to the next; ICLR: 2"] = 0
    inject_layers: Annotated[int, "deconv_concat: linear layers of an injection; ICLR: 2"] = 0
    empty: Annotated[Empty, "what is learned in place of a dropped level"] = "token"
    time_mlp: Annotated[bool, "whether two layers follow the time embedding"] = False
    skip: Annotated[bool, "whether there are long skip connections"] = True
    final_conv: Annotated[bool, "whether a 3x3 convolution ends the network"] = True
    attention: Annotated[Attention, "its implementation; cudnn is fused, for NVIDIA GPUs in bfloat16"] = "xla"
    remat: bool = False
    dtype: DTypeLike | None = None

    takes_text: ClassVar[bool] = True

    @classmethod
    def text_options(cls, width: int, max_tokens: int) -> dict[str, int]:
        return dict(text_dim=width, text_tokens=max_tokens)

    @property
    def num_extra_tokens(self) -> int:
        """The number of tokens before the patches: label, time, text."""
        return (self.num_classes > 0) + 1 + self.text_tokens

    def check_shape(self, shape: Shape) -> None:
        """Raise ValueError unless the shape divides into patches and the options fit each other."""
        super().check_shape(shape)
        self.check_options()

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, c_noise_B: jax.Array, cond: Mapping[str, Any], *, train: bool) -> jax.Array:
        """Return [B, h, w, c] like x.

        Args:
            x_BHWC: the noisy variable.
            c_noise_B: the time as the network reads it (U-ViT: 0..1000).
            cond: 'label' [B] int, 'text' [B, T, C], each condition by its name [B, h, w, c] and, optional, 'keep_NAME'
                [B] bool. A 'text_mask' beside 'text' is allowed but not read.
            train: part of the contract of backbones; without dropout it changes nothing.

        Raises:
            ValueError: if a condition is missing or unknown, a shape does not divide, a condition's grid is larger than
                that of the tokens (deconv_concat), the parameters are for another number of tokens, or options
                contradict each other.
        """
        self.check(x_BHWC, cond)
        patches_BND = layers.PatchEmbed(self.patch_size, self.width, self.dtype, name="patch_embed")(x_BHWC)
        tokens = [*self.extra_tokens(c_noise_B, cond, patches_BND.dtype), patches_BND]
        conditions, c_BNE = self.embedded_conditions(cond, x_BHWC.shape), None
        if self.injection == "append_tokens":
            tokens += conditions
        elif conditions:
            c_BNE = jnp.concatenate(conditions, axis=-1)
        x_BLD = jnp.concatenate(tokens, axis=1)
        x_BLD = x_BLD + self.position_embedding(x_BLD.shape[1], x_BHWC.shape).astype(x_BLD.dtype)

        block = nn.remat(Block) if self.remat else Block
        config = (self.num_heads, self.mlp_ratio, self.qkv_bias, self.attention, self.dtype)
        skips, half = [], self.depth // 2
        for i in range(half):
            x_BLD = self.injected(block(*config, name=f"in_blocks_{i}")(x_BLD), i + 1, c_BNE)
            skips.append(x_BLD)
        x_BLD = self.injected(block(*config, name="mid_block")(x_BLD), half + 1, c_BNE)
        for i in range(half):
            x_BLD = block(*config, name=f"out_blocks_{i}")(x_BLD, skips.pop() if self.skip else None)
            x_BLD = self.injected(x_BLD, half + 2 + i, c_BNE)

        start = self.num_extra_tokens
        patches_BND = layer_norm(self.dtype, "norm")(x_BLD[:, start : start + patches_BND.shape[1]])
        return self.decode(patches_BND, x_BHWC.shape).astype(x_BHWC.dtype)

    def extra_tokens(self, c_noise_B: jax.Array, cond: Mapping[str, Any], dtype: DTypeLike) -> list[jax.Array]:
        """Return the tokens before the patches, each [B, 1 or T, D]: label, time, text."""
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

    def embedded_conditions(self, cond: Mapping[str, Any], shape: tuple[int, ...]) -> list[jax.Array]:
        """Return each coarser level as [B, its own patches, D]; with deconv_concat as [B, this level's patches, D]."""
        embedded, grid = [], (shape[1] // self.patch_size, shape[2] // self.patch_size)
        for name, patch_size in self.conditions:
            if self.injection == "append_tokens":
                embed = layers.PatchEmbed(patch_size, self.width, self.dtype, name=f"cond_embed_{name}")
            else:
                embed = Deconvolution(grid, self.width, self.dtype, name=f"cond_deconv_{name}")
            z_BHWC = cond[name]
            empty_shape = (1, 1, 1, z_BHWC.shape[-1]) if self.empty == "variable" else (1, 1, self.width)
            empty = self.param(f"empty_{name}", nn.initializers.normal(0.02), empty_shape)
            if self.empty == "variable":
                embedded.append(embed(kept_or_empty(z_BHWC, empty, cond, name)))
            else:
                embedded.append(kept_or_empty(embed(z_BHWC), empty, cond, name))
        return embedded

    def injected(self, x_BLD: jax.Array, blocks_done: int, c_BNE: jax.Array | None) -> jax.Array:
        """Return the tokens after `blocks_done` blocks; after every inject_every-th the conditions join the patches."""
        if c_BNE is None or blocks_done % self.inject_every:
            return x_BLD
        injection = nn.remat(Injection) if self.remat else Injection
        inject = injection(self.inject_layers, self.dtype, name=f"inject_{blocks_done // self.inject_every - 1}")
        extras_BSD, patches_BND = jnp.split(x_BLD, [self.num_extra_tokens], axis=1)
        return jnp.concatenate([extras_BSD, inject(patches_BND, c_BNE)], axis=1)

    def position_embedding(self, num_tokens: int, shape: tuple[int, ...]) -> jax.Array:
        """Return the learned positions [1, num_tokens, D]; ValueError if the parameters hold another number."""
        if self.has_variable("params", "pos_embed"):
            held = self.get_variable("params", "pos_embed").shape[1]
            if held != num_tokens:
                raise ValueError(
                    f"U-ViT: an input of shape {shape[1:]} with its conditions makes {num_tokens} tokens, pos_embed "
                    f"has {held}; for another resolution use resize_position_embedding"
                )
        return self.param("pos_embed", nn.initializers.normal(0.02), (1, num_tokens, self.width))

    def decode(self, patches_BND: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Return the output [B, h, w, c] of the patch tokens; shape: that of the input."""
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
        """Return a linear layer that starts at N(0, .02^2)."""
        return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=name)

    def check(self, x_BHWC: Any, cond: Mapping[str, Any]) -> None:
        """Raise ValueError, in one line, for inputs that do not fit: flax and XLA would say it at length."""
        self.check_options()
        names = [name for name, _ in self.conditions]
        required = ["label"] * (self.num_classes > 0) + ["text"] * (self.text_tokens > 0) + names
        missing = [name for name in required if name not in cond]
        optional = {f"keep_{name}" for name in names} | ({"text_mask"} if self.text_tokens else set())
        unknown = sorted(set(cond) - set(required) - optional)
        if missing or unknown:
            raise ValueError(f"U-ViT: cond has {sorted(cond)}, expected {required} (keep_NAME optional): missing "
                             f"{missing}, unknown {unknown}; see num_classes, text_tokens, conditions")  # fmt: skip
        if self.text_tokens and cond["text"].shape[1:] != (self.text_tokens, self.text_dim):
            raise ValueError(f"U-ViT: text has shape {cond['text'].shape}, expected (batch, {self.text_tokens}, "
                             f"{self.text_dim}) from text_tokens and text_dim")  # fmt: skip
        appended = self.injection == "append_tokens"
        seen = [(name, cond[name], p if appended else 1) for name, p in self.conditions]
        for name, z_BHWC, p in [("its input", x_BHWC, self.patch_size), *seen]:
            shape = getattr(z_BHWC, "shape", type(z_BHWC).__name__)
            if not hasattr(z_BHWC, "ndim") or z_BHWC.ndim != 4 or shape[1] % p or shape[2] % p:
                raise ValueError(f"U-ViT: {name} has shape {shape}, expected one array (batch, height, width, "
                                 f"channels), height and width divisible by the patch size {p}")  # fmt: skip
        grid = (x_BHWC.shape[1] // self.patch_size, x_BHWC.shape[2] // self.patch_size)
        for name, z_BHWC, _ in () if appended else seen:
            if z_BHWC.shape[1] > grid[0] or z_BHWC.shape[2] > grid[1]:
                raise ValueError(f"U-ViT: {name} has a grid of {z_BHWC.shape[1:3]}, larger than the {grid} patches "
                                 "that deconv_concat joins it to; give this level a smaller patch_size")  # fmt: skip

    def check_options(self) -> None:
        """Raise ValueError for options that do not fit each other."""
        if self.width % self.num_heads:
            raise ValueError(f"U-ViT: width {self.width} is not divisible by num_heads {self.num_heads}")
        if (self.text_dim > 0) != (self.text_tokens > 0):
            raise ValueError(f"U-ViT: text_dim {self.text_dim} and text_tokens {self.text_tokens} go together: "
                             "set both or neither")  # fmt: skip
        check_empty("U-ViT", self.empty)
        if self.injection not in get_args(Injections):
            raise ValueError(f"U-ViT: injection is {self.injection!r}, expected one of {get_args(Injections)}")
        numbers, appended = (self.inject_every, self.inject_layers), self.injection == "append_tokens"
        if any(numbers) if appended else min(numbers) < 1:
            raise ValueError(f"U-ViT: inject_every and inject_layers are {numbers} with injection {self.injection!r}: "
                             f"set them to {0 if appended else 'at least 1 (the draft: 2)'}")  # fmt: skip


def resize_position_embedding(
    params: Mapping, old_grid: tuple[int, int], new_grid: tuple[int, int], extras: int
) -> dict:
    """Return the parameters for another resolution: the patch positions of pos_embed resampled (bicubic).

    Args:
        params: a U-ViT's parameters.
        old_grid, new_grid: (rows, columns) of patches.
        extras: the number of tokens before the patches (UViT.num_extra_tokens). Their positions, and those of the
            coarser levels' tokens after the patches, are kept.

    Raises:
        ValueError: if pos_embed is too short for old_grid.
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
