"""NestedUNets of 4 and 8 pixels and two frames, with their inputs, and helpers to run them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from nested.models.nested_unet import NestedUNet
from nested.models.unet_nets import Net

INNER = Net((32,), (1,), (1,), attention_ffn=True, micro=(("scale", 8.0), ("score", 0.5)), groups=8)
OUTER = Net((16, 32), (1, 1), groups=8)
CLIP = Net((32, 32), (1, 1), temporal_attention=(1, 0), kind="temporal", groups=8)
LOW, HIGH, FRAMES = (jax.random.normal(jax.random.key(i), (4, *shape)) for i, shape in enumerate(
    [(4, 4, 3), (8, 8, 3), (2, 4, 4, 3)]))  # fmt: skip
C_NOISE = jnp.array([3.0, 500.0, 20.0, 999.0])
TEXT = {
    "text": jax.random.normal(jax.random.key(9), (4, 5, 16)),
    "text_mask": jnp.arange(5)[None] < jnp.array([[5], [2], [3], [1]]),
}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, x, c_noise, cond):
    return model.apply({"params": params}, x, c_noise, cond, train=False)


def shapes(model, x, cond):
    rows = len(jax.tree.leaves(x)[0])
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, jnp.zeros(rows), cond, train=False)["params"])


def stirred(template):
    """Every parameter random, so that every path matters."""
    random = np.random.default_rng(1)

    def leaf(like):
        scale = 1 / math.sqrt(max(math.prod(like.shape[:-1]), 4))
        return jnp.asarray(scale * random.normal(size=like.shape) + 0.1 * (len(like.shape) == 1), like.dtype)

    return jax.tree.map(leaf, template)


def close(actual, expected, tolerance=2e-5):
    """Within `tolerance` of the largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def tiny(*nets_, **changes):
    return NestedUNet(**(dict(nets=nets_ or (INNER, OUTER), time_width=32, num_heads=4) | changes))


def with_text(*nets_, **changes):
    return tiny(*nets_, **(dict(text_width=16, text_proj=24, lm_layers=1) | changes))
