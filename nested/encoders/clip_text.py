"""CLIP's text encoder (Radford et al., arXiv 2103.00020), whose token features U-ViT's text-to-image models read.

Pre-norm with biases, learned positions, LN eps 1e-5; a token sees itself and those before it, padding included:

    x = token[id] + position[i];   x <- x + Attention(LN(x)),   x <- x + W2 f(W1 LN(x)),   f(y) = y sigmoid(1.702 y)
    features = LN(x)                                          (last_hidden_state of transformers' CLIPTextModel)
    text vector = W features[first end of text]               (text_embeds, not normalised)

U-ViT (libs/clip.py) takes the features of all 77 tokens of ViT-L/14 (width 768); short texts are filled up with
<|endoftext|>, as openai/clip-vit-large-patch14's tokenizer does. Heads are 64 wide in all of OpenAI's models.
Files have transformers' names (behind 'text_model.', in Stable Diffusion 'cond_stage_model.transformer.text_model.') or
OpenAI's; parameters here have transformers', without what stands before them.
"""

import functools
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nested.encoders import text_layers as layers
from nested.encoders.text_encoder import Shapes, TextNetwork
from nested.encoders.text_layers import Params

EPS, HEAD_WIDTH = 1e-5, 64
POSITIONS, START, END = 77, 49406, 49407
EMBEDDING, POSITION, PROJECTION = (
    "embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "text_projection.weight",
)  # fmt: skip
OPENAI_EMBEDDING = "token_embedding.weight"
# Of a whole CLIP: what the features do not depend on; and a constant that some files hold.
UNUSED = (
    "visual.", "logit_scale", "input_resolution", "context_length", "vocab_size", "text_projection",
    "embeddings.position_ids",
)  # fmt: skip
OPENAI_NAMES = (  # pattern of OpenAI's name -> transformers'
    (r"^token_embedding\.weight$", EMBEDDING),
    (r"^positional_embedding$", POSITION),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
)


@functools.partial(jax.jit, static_argnames="heads")
def clip_text(
    params: Params, ids_BL: jax.Array, mask_BL: jax.Array | None = None, heads: int | None = None
) -> jax.Array:
    """Encodes token ids.

    Args: the parameters, whose names give the number of layers; ids int [B, L], L at most the number of positions; the
    mask, which has no effect, since padding is attended to; heads of attention, None for OpenAI's width // 64.
    Returns: token features [B, L, width].
    """
    del mask_BL
    length = ids_BL.shape[1]
    x_BLC = params[EMBEDDING][ids_BL] + params[POSITION][None, :length]
    heads = heads or x_BLC.shape[-1] // HEAD_WIDTH
    causal = np.tri(length, dtype=bool)[None, None]
    bias_11LL = layers.mask_bias(causal, layers.statistics_dtype(x_BLC))
    for i in range(num_layers(params)):
        at = f"encoder.layers.{i}"
        names = [f"{at}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
        y_BLC = layers.layer_norm(params, f"{at}.layer_norm1", x_BLC, EPS)
        x_BLC += layers.attention(params, names, y_BLC, heads, (x_BLC.shape[-1] // heads) ** -0.5, bias_11LL)
        y_BLC = layers.linear(params, f"{at}.mlp.fc1", layers.layer_norm(params, f"{at}.layer_norm2", x_BLC, EPS))
        x_BLC += layers.linear(params, f"{at}.mlp.fc2", y_BLC * jax.nn.sigmoid(1.702 * y_BLC))
    return layers.layer_norm(params, "final_layer_norm", x_BLC, EPS)


def clip_text_embeds(params: Params, ids_BL: jax.Array, heads: int | None = None) -> jax.Array:
    """The text vectors [B, width of images and texts] of a CLIP score, not normalised; params with PROJECTION.

    The end of text has the largest id; of several, which fill up a short text, the first counts."""
    features_BLC = clip_text(params, ids_BL, heads=heads)
    ends_B = jnp.argmax(ids_BL, -1)
    return layers.matmul(features_BLC[jnp.arange(len(ids_BL)), ends_B], params[PROJECTION].T)


def num_layers(params: Iterable[str]) -> int:
    """The number of layers that the parameters' names tell."""
    return sum(name.endswith("layer_norm1.weight") for name in params)


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """OpenAI's names and layouts (q, k, v stacked; the projection [in, out]) as transformers'; others as they are."""
    if OPENAI_EMBEDDING not in tensors:
        return dict(tensors)
    result = {}
    for name, array in tensors.items():
        for pattern, replacement in OPENAI_NAMES:
            name = re.sub(pattern, replacement, name)
        stacked = re.fullmatch(r"(.*self_attn)\.in_proj_(weight|bias)", name)
        if stacked and len(array) % 3 == 0:
            parts = np.split(array, 3)
            result |= {f"{stacked[1]}.{part}_proj.{stacked[2]}": x for part, x in zip("qkv", parts, strict=True)}
        elif name == "text_projection":
            result[PROJECTION] = array.T
        elif not name.endswith(".attn_mask"):  # of TorchScript archives
            result[name] = array
    return result


def shapes(tensors: Mapping[str, np.ndarray]) -> Shapes:
    """The shape of every tensor that the embeddings, the first layer and the number of layers imply."""

    def size(name: str, axis: int) -> int:
        shape = getattr(tensors.get(name), "shape", ())
        return shape[axis] if len(shape) == 2 else 0  # then the tensor itself is named as the problem

    width, hidden = size(EMBEDDING, 1), size("encoder.layers.0.mlp.fc1.weight", 0)
    result = {EMBEDDING: (size(EMBEDDING, 0), width), POSITION: (size(POSITION, 0), width)}
    for i in range(num_layers(tensors)):
        at = f"encoder.layers.{i}"
        dense = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        dense |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        for name, shape in dense.items():
            result |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            result |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
    return result | {"final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}


NETWORK = TextNetwork(
    name="clip_vitl14",
    apply=clip_text,
    shapes=shapes,
    embedding=EMBEDDING,
    empty=(START, END),
    positions=POSITIONS,
    anchors=(EMBEDDING, OPENAI_EMBEDDING),
    unused=UNUSED,
    download="openai/clip-vit-large-patch14",
    renamed=renamed,
    filled=True,
)
