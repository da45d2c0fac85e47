"""What is asked of samples: keys, labels and prompts. Sample i is a function of (seed, i) alone.

Its keys are fold_in(seed, i), its label is i modulo the number of classes, its prompt the i-th in turn: whatever the
batch size, the number of devices and of hosts.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

Indices = Sequence[int] | np.ndarray


class PromptEncoder(Protocol):
    """What sampling asks of a text encoder (nested/encoders/text_encoder.py)."""

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """{'text': float32 [B, tokens, width], 'text_mask': bool [B, tokens]}."""
        ...

    def encode_one(self, text: str = "") -> dict[str, np.ndarray]:
        """The same of one text, without the batch axis."""
        ...


def sample_keys(seed: int, indices: Indices | jax.Array) -> jax.Array:
    """Typed keys [B] of the samples with these indices [B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices, jnp.uint32))


def choose_labels(num_classes: int, indices: Indices, labels: Sequence[int] | None = None) -> np.ndarray:
    """Labels int32 [B]: those given, else sample i has class i mod num_classes (0 if there are no classes).

    Raises ValueError for a label that is not a class.
    """
    if labels is None:
        return np.asarray(indices, np.int32) % max(num_classes, 1)
    if not num_classes:
        raise ValueError("labels given, but this hierarchy has no classes; leave them out")
    if wrong := [int(label) for label in labels if not 0 <= label < num_classes]:
        raise ValueError(f"label {wrong[0]} given; the classes are 0 to {num_classes - 1}")
    return np.asarray(labels, np.int32)


def choose_prompts(prompts: Sequence[str], indices: Indices) -> list[str]:
    """The prompts of the samples with these indices, which take them in turn."""
    return [prompts[int(i) % len(prompts)] for i in indices]
