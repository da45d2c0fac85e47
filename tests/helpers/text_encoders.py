"""Small text encoders and their files: T5's recording with a tokenizer, a random CLIP, and a stand-in for any."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from nested.encoders import clip_text
from nested.encoders.clip_text import PROJECTION

T5_TOKENS = 5
T5_WORDS = ("red", "green", "apple", "circle", "a")
CAPTIONS = ("a red apple", "green circle", "a red apple", "a green circle a red circle")
CLIP_SPECIAL = {"start": 49406, "end": 49407}


def golden_t5(golden, name="enc_t5.npz"):
    expected = golden(name)
    return {key[2:]: array for key, array in expected.items() if key.startswith("w/")}, expected


def write_t5_tokenizer(path, end=True, words=T5_WORDS):
    """tokenizer.json of these words, which ends a text with </s>."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenisation: pip install tokenizers")
    special = ("<pad>", "</s>", "<unk>")
    vocabulary = {word: i for i, word in enumerate((*special, *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if end:
        template = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer.post_processor = template
    tokenizer.enable_padding(length=9)  # as the files of some models do; read_tokenizer undoes both
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))


def write_t5(folder, golden):
    """A whole T5 in two files, as transformers saves a large one, with a tokenizer of five words."""
    params, _ = golden_t5(golden)
    names = sorted(params)
    folder.mkdir()
    for number, part in enumerate((names[:9], names[9:]), 1):
        tensors = {name: params[name] for name in part} | {f"decoder.{number}.weight": np.zeros((2, 2), np.float32)}
        save_file(tensors, folder / f"model-0000{number}-of-00002.safetensors")
    write_t5_tokenizer(folder / "tokenizer.json")
    return folder


def small_clip():
    """Random parameters of a small CLIP (width 64, one head), whose ids go as far as OpenAI's, by our names."""
    random = np.random.default_rng(0)
    layer = {"layer_norm1.weight": 0, "mlp.fc1.weight": np.zeros((16, 64))}
    first = {clip_text.EMBEDDING: np.zeros((49408, 64)), clip_text.POSITION: np.zeros((77, 64))}
    first |= {f"encoder.layers.0.{name}": array for name, array in layer.items()}
    shapes = clip_text.shapes(first) | {PROJECTION: (8, 64)}
    return {name: random.normal(size=shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}


def write_clip_tokenizer(path):
    """Words, with ids, begun and ended as CLIP's tokenizer does."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenisation: pip install tokenizers")
    words = {"<unk>": 0, "a": 1, "red": 2, "apple": 3}
    # ids of a vocabulary may have gaps
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | CLIP_SPECIAL, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="start $A end", special_tokens=list(CLIP_SPECIAL.items())
    )
    tokenizer.save(str(path))


def hugging_face_clip(params, wrapper):
    """As a whole CLIPModel has it, or Stable Diffusion."""
    result = {f"{wrapper}text_model.{name}": array for name, array in params.items() if name != PROJECTION}
    result[f"{wrapper}{PROJECTION}"] = params[PROJECTION]
    result[f"{wrapper}text_model.embeddings.position_ids"] = np.arange(77)[None]
    result[f"{wrapper}vision_model.embeddings.class_embedding"] = np.zeros(2, np.float32)
    return result


class Lengths:
    """A stand-in for a text encoder of three tokens of width 2: a caption is its length, in its first token."""

    name, fingerprint, max_tokens, width = "lengths", "f", 3, 2

    def tokenize(self, texts, silent=False):
        ids = np.array([[len(text), 0, 0] for text in texts], np.int32)
        return ids, np.arange(3)[None] < np.ones((len(texts), 1))

    tokenize.lengths = lambda texts: np.ones(len(texts), int)
    tokenize.fill = None
    tokenize.fingerprint = "t"

    def features(self, ids, mask):
        return np.repeat(ids[..., None], 2, axis=2) * mask[..., None].astype(np.float32)
