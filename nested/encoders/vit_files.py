"""The weight files of the vision transformers: whose names they have, what lies beside the network in them.

timm's names are those of facebookresearch's moco-v3, dino, dinov2 and mae. CLIP's tower comes by transformers' names or
by OpenAI's: a TorchScript archive, whose projection is [in, out] and whose queries, keys and values are one tensor.
What the files hold besides: MoCo-v3 the two encoders, with their heads, and the optimizer; DINO's full checkpoint a
student and a teacher; DINOv2 a mask token; MAE's full file a decoder; CLIP the text tower. Of MoCo-v3's two encoders
the base encoder is read, as its main_lincls.py and RCG read it, not the momentum encoder; of DINO's the teacher.

Two codes with the same names and widths (DINO and MAE, say) cannot be told apart by their tensors: encoding.json keeps
the file's sha256. Networks trained with open_clip have OpenAI's names, but mostly the exact gelu: they are not these.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nested.weights import files as weights

Parts = dict[str, dict[str, tuple[int, ...]]]  # {part: {leaf: shape}}

BATCH_NORM, BATCH_NORM_EPS = ("weight", "bias", "running_mean", "running_var"), 1e-5


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of naming the network. names: {part: name}, a tuple of them for tensors joined along their first axis;
    {leaf} is weight or bias, {i} the block. batched: tokens have leading axes of 1. projection: name of CLIP's."""

    names: dict[str, Any]
    batched: bool = False
    projection: str = ""
    transposed: bool = False

    def find(self, part: str, leaf: str, i: int | None = None) -> list[str]:
        """The names of the tensors that the leaf is joined of."""
        names = self.names[part]
        return [name.format(leaf=leaf, i=i) for name in ((names,) if isinstance(names, str) else names)]


def _layout(top: dict[str, Any], block: dict[str, Any], **options: Any) -> Layout:
    return Layout(top | {part: _under(block["at"], name) for part, name in block.items() if part != "at"}, **options)


def _under(at: str, name: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return f"{at}.{name}" if isinstance(name, str) else tuple(f"{at}.{part}" for part in name)


TIMM = _layout(
    {
        "cls": "cls_token",
        "positions": "pos_embed",
        "registers": "register_tokens",
        "patch": "patch_embed.proj.{leaf}",
        "norm": "norm.{leaf}",
    },
    {
        "at": "blocks.{i}",
        "norm1": "norm1.{leaf}",
        "qkv": "attn.qkv.{leaf}",
        "out": "attn.proj.{leaf}",
        "scale1": "ls1.{leaf}",
        "norm2": "norm2.{leaf}",
        "fc1": "mlp.fc1.{leaf}",
        "fc2": "mlp.fc2.{leaf}",
        "scale2": "ls2.{leaf}",
    },
    batched=True,
)
TRANSFORMERS = _layout(
    {
        "cls": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "patch": "vision_model.embeddings.patch_embedding.{leaf}",
        "pre_norm": "vision_model.pre_layrnorm.{leaf}",
        "norm": "vision_model.post_layernorm.{leaf}",
    },
    {
        "at": "vision_model.encoder.layers.{i}",
        "norm1": "layer_norm1.{leaf}",
        "qkv": tuple(f"self_attn.{part}_proj.{{leaf}}" for part in "qkv"),
        "out": "self_attn.out_proj.{leaf}",
        "norm2": "layer_norm2.{leaf}",
        "fc1": "mlp.fc1.{leaf}",
        "fc2": "mlp.fc2.{leaf}",
    },
    projection="visual_projection.weight",
)
OPENAI = _layout(
    {
        "cls": "visual.class_embedding",
        "positions": "visual.positional_embedding",
        "patch": "visual.conv1.{leaf}",
        "pre_norm": "visual.ln_pre.{leaf}",
        "norm": "visual.ln_post.{leaf}",
    },
    {
        "at": "visual.transformer.resblocks.{i}",
        "norm1": "ln_1.{leaf}",
        "qkv": "attn.in_proj_{leaf}",
        "out": "attn.out_proj.{leaf}",
        "norm2": "ln_2.{leaf}",
        "fc1": "mlp.c_fc.{leaf}",
        "fc2": "mlp.c_proj.{leaf}",
    },
    projection="visual.proj",
    transposed=True,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """The weight files of one public code.

    layouts: its ways of naming; the first that fits is used. prefer: words of the wrapper that is preferred to others.
    unused: how names begin that the network does not need. head: how the projector's names begin, which are unused
    without the projection. counters: names that are unused with it.
    """

    layouts: tuple[Layout, ...]
    prefer: tuple[str, ...] = weights.AVERAGED
    unused: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()


TEXT_TOWER = (
    "text_model.", "text_projection", "logit_scale", "vision_model.embeddings.position_ids",
    "transformer.", "token_embedding.", "positional_embedding", "ln_final.",
    "input_resolution", "context_length", "vocab_size",
)  # fmt: skip
FAMILIES = {
    "mocov3": Family(
        (TIMM,), prefer=("base_encoder",), head=("head.",),
        counters=("head.1.num_batches", "head.4.num_batches", "head.7.num_batches"),
    ),
    "dino": Family((TIMM,), unused=("head.",)),
    "dinov2": Family((TIMM,), unused=("mask_token", "head.")),
    "mae": Family((TIMM,), unused=("mask_token", "decoder_", "head.")),
    "clip": Family((TRANSFORMERS, OPENAI), unused=TEXT_TOWER, head=("visual_projection.", "visual.proj")),
}  # fmt: skip


def read_vit(
    paths: Sequence[str | pathlib.Path], vit: Any, name: str, *, prefix: str, projected: bool, dtype: str
) -> dict[str, Any]:
    """The parameters for vit.forward of the network `name` from a weight file or its shards: float32, those of products
    in `dtype`.

    prefix: the wrapper to take ('state_dict.module.momentum_encoder.'); '' finds it. projected: with the head. Raises
    as weights.load_network and weights.check_tensors do: every tensor is accounted for."""
    family = FAMILIES[vit.family]
    anchors = [layout.names["cls"] for layout in family.layouts]
    unused = family.unused + (family.counters if projected else family.head)
    tensors = weights.load_network(paths, anchors, prefix=prefix, prefer=family.prefer, unused=unused)
    layout = family.layouts[[anchor in tensors for anchor in anchors].index(True)]
    tensors = weights.check_tensors(tensors, shapes(vit, layout, projected), f"{paths[0]}: not the weights of {name}")
    return params(tensors, vit, layout, projected, dtype)


def _parts(vit: Any, batched: bool) -> tuple[Parts, Parts]:
    """({part: {leaf: shape}} outside the blocks, the same of one block), in torch's layouts."""
    width, hidden = vit.width, vit.hidden
    norm = {"weight": (width,), "bias": (width,)}

    def dense(width_out: int, width_in: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (width_out, width_in), "bias": (width_out,)}

    def tokens(*shape: int) -> dict[str, tuple[int, ...]]:
        return {"tokens": (*((1,) * (3 - len(shape)) if batched else ()), *shape)}

    outside: Parts = {"cls": tokens(width), "positions": tokens(1 + vit.grid**2, width), "norm": norm}
    outside["patch"] = {"weight": (width, 3, vit.patch, vit.patch)}
    if vit.patch_bias:
        outside["patch"]["bias"] = (width,)
    if vit.pre_norm:
        outside["pre_norm"] = norm
    if vit.registers:
        outside["registers"] = tokens(vit.registers, width)
    block = {"norm1": norm, "qkv": dense(3 * width, width), "out": dense(width, width)}
    block |= {"norm2": norm, "fc1": dense(hidden, width), "fc2": dense(width, hidden)}
    if vit.layer_scale:
        block |= {"scale1": {"gamma": (width,)}, "scale2": {"gamma": (width,)}}
    return outside, block


def shapes(vit: Any, layout: Layout, projected: bool) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all tensors of the network in a file of that layout."""
    outside, block = _parts(vit, layout.batched)
    result = {}
    for parts, blocks in ((outside, [None]), (block, range(vit.depth))):
        for i in blocks:
            for part, leaves in parts.items():
                for leaf, (first, *rest) in leaves.items():
                    names = layout.find(part, leaf, i)
                    result |= {name: (first // len(names), *rest) for name in names}
    return result | (_projector_shapes(vit, layout) if projected else {})


def _projector_shapes(vit: Any, layout: Layout) -> dict[str, tuple[int, ...]]:
    if layout.projection:
        shape = (vit.projector[0], vit.width)
        return {layout.projection: shape[::-1] if layout.transposed else shape}
    result, width_in = {}, vit.width
    for i, width in enumerate(vit.projector):
        result[f"head.{3 * i}.weight"] = (width, width_in)
        leaves = ("running_mean", "running_var") if i == len(vit.projector) - 1 else BATCH_NORM
        result |= {f"head.{3 * i + 1}.{leaf}": (width,) for leaf in leaves}
        width_in = width
    return result


def params(tensors: Mapping[str, np.ndarray], vit: Any, layout: Layout, projected: bool, dtype: str) -> dict[str, Any]:
    """{name: tensor} as shapes() -> the tree that vit.forward takes: kernels [in, out], the blocks' leaves stacked."""

    def leaf(part: str, name: str, i: int | None = None) -> jax.Array:
        pieces = [jnp.asarray(tensors[key], jnp.float32) for key in layout.find(part, name, i)]
        array = jnp.concatenate(pieces)
        match array.ndim, name:
            case _, "tokens":
                return array.reshape(-1, vit.width)
            case 4, _:  # the patches' convolution
                return array.transpose(2, 3, 1, 0).reshape(-1, vit.width).astype(dtype)
            case 2, _:
                return array.T.astype(dtype)
        return array

    outside, block = _parts(vit, layout.batched)
    tree: dict[str, Any] = {part: {name: leaf(part, name) for name in leaves} for part, leaves in outside.items()}
    tree["blocks"] = {
        part: {name: jnp.stack([leaf(part, name, i) for i in range(vit.depth)]) for name in leaves}
        for part, leaves in block.items()
    }
    if projected:
        tree["projector"] = _projector(tensors, vit, layout, dtype)
    return tree


def _projector(
    tensors: Mapping[str, np.ndarray], vit: Any, layout: Layout, dtype: str
) -> tuple[dict[str, jax.Array], ...]:
    """The head's layers; MoCo-v3's batch norms, with their running statistics, are folded into them."""
    if layout.projection:
        kernel = jnp.asarray(tensors[layout.projection], jnp.float32)
        return ({"weight": (kernel if layout.transposed else kernel.T).astype(dtype)},)
    layers = []
    for i, width in enumerate(vit.projector):
        norm: dict[str, Any] = {name: tensors.get(f"head.{3 * i + 1}.{name}") for name in BATCH_NORM}
        mean, scale = norm["running_mean"], 1 / np.sqrt(norm["running_var"] + BATCH_NORM_EPS)
        if norm["weight"] is not None:
            scale = scale * norm["weight"]
        shift = np.zeros(width) if norm["bias"] is None else norm["bias"]
        kernel = jnp.asarray(tensors[f"head.{3 * i}.weight"] * scale[:, None], jnp.float32).T
        layers.append({"weight": kernel.astype(dtype), "bias": jnp.asarray(shift - mean * scale, jnp.float32)})
    return tuple(layers)
