"""Dot-product attention, in plain XLA or by cuDNN's fused kernel: one function for every network here.

Logits and softmax are in float32, or float64 if that is what comes in; only matrix products run in the inputs' dtype.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Attention = Literal["xla", "cudnn"]
ATTENTION: tuple[Attention, ...] = ("xla", "cudnn")


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype itself, or float32 if it has fewer digits."""
    return jnp.promote_types(dtype, jnp.float32)


def attention(
    q_BLHD: jax.Array,
    k_BMHD: jax.Array,
    v_BMHD: jax.Array,
    implementation: str,
    scale: float | None = None,
    mask_BHLM: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(scale q k^T) v, [B, L, H, D], over all keys or over those that the mask allows.

    Args:
        q_BLHD: queries of H heads of width D.
        k_BMHD, v_BMHD: keys and values.
        implementation: 'xla' (plain, any dtype) or 'cudnn' (fused; NVIDIA GPU, bfloat16 or float16 only).
        scale: None is 1 / sqrt(D).
        mask_BHLM: True for the keys that count; any axis may be 1.

    Raises:
        ValueError: for another implementation, and for 'cudnn' in another dtype.
    """
    if implementation not in ATTENTION:
        raise ValueError(f"attention: unknown implementation {implementation!r}, expected one of {ATTENTION}")
    if implementation == "cudnn":
        if mask_BHLM is not None:  # cuDNN wants a row of the mask for every query
            mask_BHLM = jnp.broadcast_to(mask_BHLM, (*mask_BHLM.shape[:2], q_BLHD.shape[1], k_BMHD.shape[1]))
        if q_BLHD.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"attention: 'cudnn' works in bfloat16 or float16, found {q_BLHD.dtype}; set dtype='bfloat16' or "
                "attention='xla'"
            )
        return jax.nn.dot_product_attention(q_BLHD, k_BMHD, v_BMHD, mask=mask_BHLM, scale=scale, implementation="cudnn")
    factor = q_BLHD.shape[-1] ** -0.5 if scale is None else scale
    logits_BHLM = jnp.einsum(
        "BLHD,BMHD->BHLM", q_BLHD * factor, k_BMHD, preferred_element_type=at_least_float32(q_BLHD.dtype)
    )
    if mask_BHLM is not None:
        logits_BHLM = jnp.where(mask_BHLM, logits_BHLM, -jnp.inf)
    weights_BHLM = jax.nn.softmax(logits_BHLM, axis=-1).astype(v_BMHD.dtype)
    return jnp.einsum("BHLM,BMHD->BLHD", weights_BHLM, v_BMHD)
