"""Trees of arrays compared and copied."""

import jax
import numpy as np


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def copied(tree):
    """A tree on the host that shares no memory with donated buffers."""
    return jax.tree.map(np.array, jax.device_get(tree))
