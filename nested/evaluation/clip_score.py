"""CLIP score: how well images fit their texts (Hessel et al., arXiv 2104.08718), as Matryoshka reports it.

    score = max(0, mean over the samples of 100 cos(image vector, text vector))

The public code of Matryoshka takes it from torchmetrics with openai/clip-vit-base-patch16, and cuts texts to 77
characters; here only to CLIP's 77 tokens. Images go through nested/encoders/vit.py: resized in float, not in 8 bits.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from input_pipeline.tokens import Tokenizer, read_tokenizer
from nested.encoders import clip_text, vit
from nested.weights import files as weights

NAMES = tuple(name for name in vit.VARIANTS if name.startswith("clip_"))
INPUT_SIZE = {name: vit.VARIANTS[name].grid * vit.VARIANTS[name].patch for name in NAMES}
TEXTS = 64  # encoded at a time

_text_vectors = jax.jit(clip_text.clip_text_embeds)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """Both towers of one CLIP: `images` is the image tower, `params` are the parameters of the text tower."""

    images: vit.VitEncoder
    params: dict
    tokenize: Tokenizer

    def image_vectors(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 1 or 3] -> float32 [B, D], not normalised."""
        return np.asarray(self.images.vectors(images))

    def text_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of N texts, float32 [N, D], not normalised. Equal texts are encoded once, TEXTS at a time."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        ids, _ = self.tokenize(list(rows))
        ids = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % TEXTS, 0)])
        found = [_text_vectors(self.params, some) for some in ids.reshape(-1, TEXTS, ids.shape[1])]
        return np.concatenate(found)[[rows[text] for text in texts]]


def load_clip(name: str, folder: str | os.PathLike) -> Clip:
    """Loads both towers of a CLIP, with its tokenizer, from a folder that transformers saved it to.

    name: 'clip_vitb16' or 'clip_vitl14'. Raises, in one line, ValueError for another name or for weights of another
    network, FileNotFoundError if a file is missing."""
    if name not in NAMES:
        raise ValueError(f"evaluate.clip.name: {name!r} given; choose from {', '.join(map(repr, NAMES))}")
    files = weights.find_weight_files(folder)
    if len(files) > 1:
        raise ValueError(f"evaluate.clip.weights {folder}: {len(files)} weight files; give the folder of a whole CLIP")
    images = vit.load_vit(
        name, files[0], input_size=INPUT_SIZE[name], map=vit.MAP, vector="projected", features=(), prefix="",
        dtype="float32",
    )  # fmt: skip
    params = _text_params(files[0], images.vit.projector[-1], f"{files[0]}: not the text tower of {name}")
    empty, vocabulary = (clip_text.START, clip_text.END), len(params[clip_text.EMBEDDING])
    folder = pathlib.Path(files[0]).parent
    return Clip(images, params, read_tokenizer(folder, clip_text.POSITIONS, empty, vocabulary, filled=True))


def _text_params(file: str, width: int, what: str) -> dict[str, jax.Array]:
    """The text tower of transformers' CLIP, and its projection to `width`, which is saved outside of the tower."""
    tensors = weights.load_network([file], clip_text.EMBEDDING, unused=clip_text.UNUSED)
    projection = {name: x for name, x in weights.read_tensors(file).items() if name == clip_text.PROJECTION}
    shapes = clip_text.shapes(tensors)
    shapes[clip_text.PROJECTION] = (width, shapes["final_layer_norm.weight"][0])
    found = weights.check_tensors(tensors | projection, shapes, what)
    return {name: jnp.asarray(np.array(x, np.float32)) for name, x in found.items()}


def mean_clip_score(image_vectors: ArrayLike, text_vectors: ArrayLike) -> float:
    """The CLIP score of pairs of vectors [N, D], of any norms."""
    x, y = (np.asarray(rows, np.float64) for rows in (image_vectors, text_vectors))
    cosines = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return float(max(100 * cosines.mean(), 0.0))
