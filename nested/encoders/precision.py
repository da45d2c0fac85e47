"""The precision of matrix products in the encoders.

An accelerator rounds float32 products to fewer bits by default; what is frozen here is float32 where it says so.
"""

import jax
import jax.numpy as jnp


def of_products(dtype) -> jax.lax.Precision | None:
    """What `precision` products of numbers of that dtype take: the highest, of bfloat16 the accelerator's own."""
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
