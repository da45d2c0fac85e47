"""The encoder of T5 1.0 (Raffel et al. 2020), T5 1.1 and FLAN-T5.

Pre-norm, no biases, no absolute positions; RMS(x) = x / sqrt(mean x^2 + 1e-6) times a gain; attention logits are
q.k + b[bucket(key - query)], not divided by sqrt(d), with the table b of the first layer in all layers:

    x <- x + Attention(RMS(x)),   x <- x + F(RMS(x)),   RMS(x) at the end
    F(y) = Wo relu(Wi y)  (1.0)   or   Wo (gelu(Wi0 y) * Wi1 y)  (1.1, FLAN; gelu in its tanh form)

Matryoshka uses FLAN-T5 XL (width 2048, 128 tokens). No public package holds it, so users give its files. The features
are the last hidden states times the mask, and only text tokens are attended to. Parameters keep their names and layouts
of transformers' files (Dense weights [out, in]).
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nested.encoders import text_layers as layers
from nested.encoders.text_encoder import Shapes, TextNetwork
from nested.encoders.text_layers import Params

EMBEDDING = "shared.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
EPS, MAX_DISTANCE = 1e-6, 128


def relative_buckets(length: int, num_buckets: int) -> np.ndarray:
    """The row of T5's bias table for every query and key, int32 [query, key], computed on the host.

    Half the rows are for keys after the query. Of a half, the first half is one row per distance, the rest grow
    logarithmically to distance 128, and all beyond share the last.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    fraction = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(MAX_DISTANCE / exact))
    far = np.minimum(exact + (fraction * (half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)).astype(np.int32)


def _num_layers(params: Iterable[str]) -> int:
    return sum(name.endswith("SelfAttention.q.weight") and name.startswith("encoder.") for name in params)


@jax.jit
def t5(params: Params, ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """Encodes token ids.

    Args: the parameters; ids int [B, L]; mask bool [B, L], True on the tokens of a text.
    Returns: token features [B, L, width], zero where the mask is False.

    Layers, heads and the kind of F are read off the parameters' names and shapes.
    """
    x_BLC = params[EMBEDDING][ids_BL]
    table_RH = params[BIAS].astype(layers.statistics_dtype(x_BLC))
    bias_BHLL = table_RH[relative_buckets(ids_BL.shape[1], len(table_RH))].transpose(2, 0, 1)[None]
    bias_BHLL = bias_BHLL + layers.mask_bias(mask_BL[:, None, None], bias_BHLL.dtype)
    for i in range(_num_layers(params)):
        at = f"encoder.block.{i}.layer"
        y_BLC = layers.rms_norm(params, f"{at}.0.layer_norm", x_BLC, EPS)
        names = [f"{at}.0.SelfAttention.{part}" for part in "qkvo"]
        x_BLC += layers.attention(params, names, y_BLC, table_RH.shape[1], 1.0, bias_BHLL)
        y_BLC = layers.rms_norm(params, f"{at}.1.layer_norm", x_BLC, EPS)
        at = f"{at}.1.DenseReluDense"
        if f"{at}.wi.weight" in params:
            y_BLC = jax.nn.relu(layers.linear(params, f"{at}.wi", y_BLC))
        else:
            y_BLC = jax.nn.gelu(layers.linear(params, f"{at}.wi_0", y_BLC)) * layers.linear(params, f"{at}.wi_1", y_BLC)
        x_BLC += layers.linear(params, f"{at}.wo", y_BLC)
    return jnp.where(mask_BL[..., None], layers.rms_norm(params, "encoder.final_layer_norm", x_BLC, EPS), 0)


def shapes(tensors: Mapping[str, np.ndarray]) -> Shapes:
    """The shape of every tensor that the embedding, the first layer and the number of layers imply."""
    size = {}
    for what, key, axis in (
        ("vocabulary", EMBEDDING, 0),
        ("width", EMBEDDING, 1),
        ("inner", "encoder.block.0.layer.0.SelfAttention.q.weight", 0),
        ("rows", BIAS, 0),
        ("heads", BIAS, 1),
        ("hidden", "encoder.block.0.layer.1.DenseReluDense.wo.weight", 1),
    ):
        shape = getattr(tensors.get(key), "shape", ())
        size[what] = shape[axis] if len(shape) == 2 else 0  # then the tensor itself is named as the problem
    width, inner, hidden = size["width"], size["inner"], size["hidden"]
    result: Shapes = {EMBEDDING: (size["vocabulary"], width), BIAS: (size["rows"], size["heads"])}
    result["encoder.final_layer_norm.weight"] = (width,)
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in tensors
    for i in range(_num_layers(tensors)):
        at = f"encoder.block.{i}.layer"
        result |= {f"{at}.{part}.layer_norm.weight": (width,) for part in (0, 1)}
        result |= {f"{at}.0.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
        result[f"{at}.0.SelfAttention.o.weight"] = (width, inner)
        at = f"{at}.1.DenseReluDense"
        result |= {f"{at}.{part}.weight": (hidden, width) for part in (("wi_0", "wi_1") if gated else ("wi",))}
        result[f"{at}.wo.weight"] = (width, hidden)
    return result


NETWORK = TextNetwork(
    name="t5",
    apply=t5,
    shapes=shapes,
    embedding=EMBEDDING,
    empty=(1,),  # </s>
    positions=0,
    anchors=(EMBEDDING,),
    unused=("decoder.", "lm_head.", "encoder.embed_tokens."),
    download="google/flan-t5-xl",
    pieces="spiece.model",
)
