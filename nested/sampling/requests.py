"""What samples are asked for: sample i is a function of (seed, i), whatever the batch size and the devices.

Its keys are fold_in(seed, i), its label is i modulo the number of classes, its prompt the i-th, in turn.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sample_keys(seed: int, indices: Sequence[int]) -> jax.Array:
    """[B] keys of the samples with these indices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices, jnp.uint32))


def sample_labels(num_classes: int, indices: Sequence[int]) -> np.ndarray:
    """[B] int32: sample i has class i mod num_classes (0 where there are no classes)."""
    return np.asarray(indices, np.int32) % max(num_classes, 1)
