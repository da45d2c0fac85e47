"""Frozen text encoders: captions -> token features for cross-attention, as pure functions over public weights.

Each network is a file that describes itself by a TextNetwork: nested/encoders/clip_text.py (CLIP ViT-L/14, of U-ViT's
text-to-image models), t5.py (FLAN-T5, of Matryoshka's) and minilm.py. The table of them is in nested/build/text.py.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import tokens
from nested.encoders.text_layers import Params
from nested.weights import files as weight_files

DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}

Shapes = dict[str, tuple[int, ...]]


class ApplyText(Protocol):
    """The network: (parameters, ids int [B, L], mask bool [B, L]) -> token features [B, L, width]; jitted."""

    def __call__(self, params: Params, ids_BL: Any, mask_BL: Any) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class TextNetwork:
    """A text encoder before its weights are read: the network, and what its files look like.

    shapes: the tensors found -> {name: the shape expected}. embedding: the name of the token embedding. empty: the ids
    of the empty text. positions: the longest text in tokens, 0 for no limit. anchors, renamed: the embedding's names in
    the files, and the function that brings their names to ours. unused: how the names of tensors begin that a whole
    model has and the features do not depend on. default_folder: finds the weights if no folder is given; without it
    download says what the user has to get. pieces: the name of a sentencepiece model that may replace tokenizer.json.
    filled: whether short texts are filled up with the end of text, which is attended to, or with 0, which is not.
    """

    name: str
    apply: ApplyText
    shapes: Callable[[Mapping[str, np.ndarray]], Shapes]
    embedding: str
    empty: tuple[int, ...]
    positions: int
    anchors: tuple[str, ...]
    unused: tuple[str, ...]
    default_folder: Callable[[], pathlib.Path] | None = None
    download: str = ""
    renamed: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = dict
    pieces: str = ""
    filled: bool = False

    def folder(self) -> pathlib.Path:
        """The folder of the weights that a package ships; FileNotFoundError says where else to get them."""
        if self.default_folder is None:
            raise FileNotFoundError(
                f"{self.name} comes in no package: give the folder of its weights, such as a download of "
                f"{self.download} with tokenizer.json and model*.safetensors"
            )
        return self.default_folder()


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """A frozen network that turns captions into token ids and these into features. The null text is tokenize([""]).

    width: of a token's features. max_tokens: of every text. fingerprint: sha256, in hex, of the name, the weights, the
    tokenizer, max_tokens and a dtype other than float32. tokenize: captions -> (ids int32, mask bool), both
    [N, max_tokens]; it is picklable and needs no jax, for the data pipeline. network: (params, ids, mask) -> features,
    jitted; inside a compiled function call it and not features(), with params among the arguments of that function.
    """

    name: str
    width: int
    max_tokens: int
    fingerprint: str
    tokenize: tokens.Tokenizer
    network: ApplyText
    params: Params

    def features(self, ids: np.ndarray | jax.Array, mask: np.ndarray | jax.Array) -> jax.Array:
        """ids int [N, max_tokens], mask bool [N, max_tokens] -> float32 [N, max_tokens, width], zero where masked."""
        return self.network(self.params, ids, mask).astype(jnp.float32)

    def on_devices(self) -> "TextEncoder":
        """The same encoder with its parameters on the default device."""
        return dataclasses.replace(self, params=jax.device_put(self.params))

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Captions -> {'text': float32 [N, max_tokens, width], 'text_mask': bool [N, max_tokens]}."""
        ids, mask = self.tokenize(list(texts))
        return {"text": np.asarray(self.features(ids, mask)), "text_mask": mask}

    def encode_one(self, text: str = "") -> dict[str, np.ndarray]:
        """The fields of one text, without a batch axis; the default is the null text that replaces dropped captions."""
        return {name: value[0] for name, value in self.encode([text]).items()}

    def with_features(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of records with 'text' in place of 'text_ids', if it has those."""
        rest = {name: value for name, value in raw.items() if name != "text_ids"}
        if "text_ids" not in raw:
            return rest
        return {**rest, "text": self.features(raw["text_ids"], raw["text_mask"])}


def load_text_encoder(
    network: TextNetwork, weights: str | pathlib.Path, max_tokens: int, dtype: str = "float32"
) -> TextEncoder:
    """Reads the weights and the tokenizer of a text encoder.

    Args:
      network: the NETWORK of t5.py, minilm.py or clip_text.py.
      weights: a folder as transformers saves a model, with its tokenizer (tokenizer.json; for T5 spiece.model serves as
        well), or one weight file in such a folder, of any kind that nested.weights reads; '' is the folder of the
        installed package, for minilm. A whole T5, CLIP or Stable Diffusion serves as well as its encoder, whose tensors
        alone are copied.
      max_tokens: the length of every text.
      dtype: 'float32' or 'bfloat16', of the parameters and of what is computed between them.

    Raises, in one line: ValueError for another option, or weights of another network; FileNotFoundError if there are no
    weights; ImportError without the package that tokenises.
    """
    name = network.name
    if dtype not in DTYPES:
        raise ValueError(f"text.dtype: {dtype!r} given; choose from {', '.join(map(repr, DTYPES))}")
    if network.positions and max_tokens > network.positions:
        raise ValueError(f"max_tokens: {max_tokens} given; {name} has positions for {network.positions}")
    files = weight_files.find_weight_files(weights or network.folder())
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
