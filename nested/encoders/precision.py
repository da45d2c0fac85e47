"""The precision of matrix products in the encoders.

An accelerator rounds float32 products to fewer bits by default. The frozen networks compute in float32 if they say so.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def product_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """The `precision` argument for products of numbers of this dtype: the highest, or the default for bfloat16."""
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
