"""RCG's network for representations (Li, Katabi & He, arXiv 2312.03701, Sec. 3.2; latentmlp.py of LTH14/rcg).

    x = W z + b                                                              z [B, c] -> [B, width]
    e = mlp(sinusoids of the time)                                           [B, time_width]
    block:  x += linear2(silu(norm(linear1(silu(norm(x))) + linear_t(silu(e)) + linear_c(silu(label)))))
    output = linear(silu(norm(x)))                                           [B, 1, 1, c], exactly 0 at the start

Names and numerics are those of the authors' code, so its state dicts load with nested.weights.files.from_torch (prefix
'model.diffusion_model.'): LayerNorm eps 1e-5 in the blocks and 1e-6 at the end, `width` sinusoids with cosines first.
Initial values as there: linear2 and the last layer 0, the other layers as torch leaves them, label embedding N(0, 1).
Departures from the authors' code: the label has a null class, the last row of its embedding, so that it can be dropped,
and theirs has none; that table is a part of the network, `label_emb`. Dropout, which no config of theirs uses, is left
out.
"""

import types
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested.models import layers

VARIANTS = types.MappingProxyType({  # the only one that they have configs of
    "l12_w1536": types.MappingProxyType(dict(width=1536, depth=12, time_width=256, mid_width=1536)),
})  # fmt: skip


def layer_norm(epsilon: float, dtype, name: str) -> nn.LayerNorm:
    """Two-pass variance; statistics in float32 or better."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def torch_dense(features: int, fan_in: int, dtype, name: str) -> nn.Dense:
    """A linear layer that starts as torch leaves it."""
    init = layers.torch_uniform(fan_in)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


class ResBlock(nn.Module):
    """x [B, width] plus what the block makes of it, the time e [B, time_width] and, unless None, the label."""

    mid_width: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x_BD: jax.Array, e_BT: jax.Array, label_BC: jax.Array | None) -> jax.Array:
        def dense(y_BE, name):
            return torch_dense(self.mid_width, y_BE.shape[-1], self.dtype, name)(nn.silu(y_BE))

        h_BM = dense(layer_norm(1e-5, self.dtype, "in_layers_0")(x_BD), "in_layers_2") + dense(e_BT, "emb_layers_1")
        if label_BC is not None:
            h_BM = h_BM + dense(label_BC, "context_layers_1")
        h_BM = nn.silu(layer_norm(1e-5, self.dtype, "out_layers_0")(h_BM))
        zeros = nn.initializers.zeros
        return x_BD + nn.Dense(x_BD.shape[-1], dtype=self.dtype, kernel_init=zeros, name="out_layers_3")(h_BM)


class ResMLP(layers.Backbone):
    """The backbone of a level whose variable is one vector, [B, 1, 1, c].

    width, mid_width: of the residual stream and inside the blocks; depth: number of blocks; time_width: of the time's
        embedding. num_classes: labels 0..num_classes-1, null = num_classes; 0: no label. label_width: of its embedding.
    conditions: must be (), no coarser levels. patch_size: 1, by which networks of tokens read this variable.
    remat: recompute each block in the backward pass. dtype: of matrix products and activations, None for that of the
        input; parameters are float32.
    """

    width: int
    depth: int
    time_width: int
    mid_width: int
    patch_size: int = 1
    num_classes: int = 0
    label_width: int = 512
    conditions: tuple[tuple[str, int], ...] = ()
    remat: bool = False
    dtype: jnp.dtype | None = None

    def num_tokens(self, shape: tuple[int, int, int]) -> int:
        """1: the vector."""
        return 1

    def check_shape(self, shape) -> None:
        """Raises ValueError unless it is (1, 1, c) and the options allow it."""
        super().check_shape(shape)
        if tuple(shape[:2]) != (1, 1) or self.patch_size != 1:
            raise ValueError(f"ResMLP: found shape {shape} and patch_size {self.patch_size}, expected (1, 1, channels) "
                             "and 1; for maps use uvit, dit or hdit")  # fmt: skip
        if self.conditions:
            names = [name for name, _ in self.conditions]
            raise ValueError(f"ResMLP takes no coarser levels, conditions has {names}; put this level first")

    @nn.compact
    def __call__(self, x_B11C: jax.Array, c_noise_B: jax.Array, cond: Mapping[str, jax.Array], *, train: bool):
        """[B, 1, 1, c] like x. c_noise_B: the time (RCG: 0..999). cond: 'label' [B] int where num_classes.

        `train` is part of the contract of backbones; this one has no dropout and does the same either way.
        ValueError: a variable of another shape, coarser levels, a label that is missing, anything else in cond.
        """
        self.check(x_B11C, cond)
        x_BC = x_B11C[:, 0, 0]
        x_BD = torch_dense(self.width, x_BC.shape[1], self.dtype, "input_proj")(x_BC)
        e_BT = layers.timestep_embedding(c_noise_B, self.width).astype(x_BD.dtype)
        e_BT = torch_dense(self.time_width, self.width, self.dtype, "time_embed_0")(e_BT)
        e_BT = torch_dense(self.time_width, self.time_width, self.dtype, "time_embed_2")(nn.silu(e_BT))
        label_BC = None
        if self.num_classes:
            embed = nn.Embed(
                self.num_classes + 1, self.label_width, dtype=self.dtype,
                embedding_init=nn.initializers.normal(1.0), name="label_emb",
            )  # fmt: skip
            label_BC = embed(cond["label"])
        block = nn.remat(ResBlock) if self.remat else ResBlock
        for i in range(self.depth):
            x_BD = block(self.mid_width, self.dtype, name=f"res_blocks_{i}")(x_BD, e_BT, label_BC)
        y_BD = nn.silu(layer_norm(1e-6, self.dtype, "out_0")(x_BD))
        zeros = nn.initializers.zeros
        out_BC = nn.Dense(x_BC.shape[1], dtype=self.dtype, kernel_init=zeros, name="out_2")(y_BD)
        return out_BC[:, None, None].astype(x_B11C.dtype)

    def check(self, x_B11C, cond) -> None:
        """One line about what does not fit, before flax or XLA say it at length."""
        shape = getattr(x_B11C, "shape", type(x_B11C).__name__)
        if not hasattr(x_B11C, "ndim") or x_B11C.ndim != 4:
            raise ValueError(f"ResMLP: its input has shape {shape}, expected one array (batch, 1, 1, channels)")
        self.check_shape(shape[1:])
        expected = ["label"] if self.num_classes else []
        if sorted(cond) != expected:
            raise ValueError(
                f"ResMLP: cond has {sorted(cond)}, expected {expected} with num_classes {self.num_classes}"
            )
