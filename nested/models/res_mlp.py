"""RCG's network for representations (Li, Katabi & He, arXiv 2312.03701, Sec. 3.2; latentmlp.py of LTH14/rcg).

    x = W z + b                                                              z [B, c] -> [B, width]
    e = mlp(sinusoids of the time)                                           [B, time_width]
    block:  x += linear2(silu(norm(linear1(silu(norm(x))) + linear_t(silu(e)) + linear_c(silu(label)))))
    output = linear(silu(norm(x)))                                           [B, 1, 1, c], exactly 0 at the start

Names and numerics are those of the authors' code, so its state dicts load with nested.weights.files.from_torch (prefix
'model.diffusion_model.'): LayerNorm eps 1e-5 in the blocks and 1e-6 at the end, `width` sinusoids with cosines first.
So are the initial values: linear2 and the last layer 0, the other layers as torch leaves them, label embedding N(0, 1).
Departures from the authors' code: the label has a null class, the last row of its embedding, so that it can be dropped;
the table is a part of the network, `label_emb`. Dropout, which no config of theirs uses, is left out.
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from nested.models import layers
from nested.models.backbone import Shape, TokenBackbone

VARIANTS = types.MappingProxyType({  # the only network that the authors have configs for
    "l12_w1536": types.MappingProxyType(dict(width=1536, depth=12, time_width=256, mid_width=1536)),
})  # fmt: skip


def layer_norm(epsilon: float, dtype: DTypeLike | None, name: str) -> nn.LayerNorm:
    """Return a LayerNorm with two-pass variance; statistics in float32 or better."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def torch_dense(features: int, fan_in: int, dtype: DTypeLike | None, name: str) -> nn.Dense:
    """Return a linear layer that starts as torch leaves it."""
    init = layers.torch_uniform(fan_in)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


class ResBlock(nn.Module):
    """x [B, width] plus a function of it, of the time e [B, time_width] and of the label, unless that is None."""

    mid_width: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x_BD: jax.Array, e_BT: jax.Array, label_BC: jax.Array | None) -> jax.Array:
        def dense(y_BE: jax.Array, name: str) -> jax.Array:
            return torch_dense(self.mid_width, y_BE.shape[-1], self.dtype, name)(nn.silu(y_BE))

        h_BM = dense(layer_norm(1e-5, self.dtype, "in_layers_0")(x_BD), "in_layers_2") + dense(e_BT, "emb_layers_1")
        if label_BC is not None:
            h_BM = h_BM + dense(label_BC, "context_layers_1")
        h_BM = nn.silu(layer_norm(1e-5, self.dtype, "out_layers_0")(h_BM))
        zeros = nn.initializers.zeros
        return x_BD + nn.Dense(x_BD.shape[-1], dtype=self.dtype, kernel_init=zeros, name="out_layers_3")(h_BM)


class ResMLP(TokenBackbone):
    """The backbone of a level whose variable is one vector, [B, 1, 1, c].

    num_classes: labels are 0..num_classes-1 and null is num_classes; 0: no label.
    conditions: must be (), no coarser levels.
    remat: whether each block is recomputed in the backward pass. dtype: of matrix products and activations; None is
        that of the input. Parameters are float32.
    """

    patch_size: Annotated[int, "must be 1; networks of tokens read this variable by it"] = 1
    width: Annotated[int, "channels of the residual stream"] = 1536
    depth: Annotated[int, "number of blocks"] = 12
    time_width: Annotated[int, "channels of the time embedding"] = 256
    mid_width: Annotated[int, "channels inside the blocks"] = 1536
    num_classes: int = 0
    label_width: Annotated[int, "channels of the label embedding"] = 512
    conditions: tuple[tuple[str, int], ...] = ()
    remat: bool = False
    dtype: DTypeLike | None = None

    def check_shape(self, shape: Shape) -> None:
        """Raise ValueError unless the shape is (1, 1, c) and there are no coarser levels."""
        super().check_shape(shape)
        if tuple(shape[:2]) != (1, 1) or self.patch_size != 1:
            raise ValueError(f"ResMLP: found shape {shape} and patch_size {self.patch_size}, expected (1, 1, channels) "
                             "and 1; for maps use uvit, dit or hdit")  # fmt: skip
        if self.conditions:
            names = [name for name, _ in self.conditions]
            raise ValueError(f"ResMLP takes no coarser levels, conditions has {names}; put this level first")

    @nn.compact
    def __call__(self, x_B11C: jax.Array, c_noise_B: jax.Array, cond: Mapping[str, Any], *, train: bool) -> jax.Array:
        """Return [B, 1, 1, c] like x.

        Args:
            x_B11C: the noisy vector.
            c_noise_B: the time as the network reads it (RCG: 0..999).
            cond: 'label' [B] int if there are classes.
            train: part of the contract of backbones; without dropout it changes nothing.

        Raises:
            ValueError: for a variable of another shape, coarser levels, a missing label, or anything else in cond.
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

    def check(self, x_B11C: Any, cond: Mapping[str, Any]) -> None:
        """Raise ValueError, in one line, for inputs that do not fit: flax and XLA would say it at length."""
        shape = getattr(x_B11C, "shape", type(x_B11C).__name__)
        if not hasattr(x_B11C, "ndim") or x_B11C.ndim != 4:
            raise ValueError(f"ResMLP: its input has shape {shape}, expected one array (batch, 1, 1, channels)")
        self.check_shape(shape[1:])
        expected = ["label"] if self.num_classes else []
        if sorted(cond) != expected:
            raise ValueError(
                f"ResMLP: cond has {sorted(cond)}, expected {expected} with num_classes {self.num_classes}"
            )
