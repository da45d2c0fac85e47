"""What the text encoders have in common, as functions of parameters by transformers' names (Dense weights [out, in]).

Statistics of norms and softmaxes are float32 or better; the rest is of the dtype of what goes in. Products of float32
are float32 whatever the accelerator's default.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from nested.encoders import precision

Params = Mapping[str, jax.Array]


def statistics_dtype(x: jax.Array) -> np.dtype:
    """The dtype of statistics of x."""
    return jnp.promote_types(x.dtype, jnp.float32)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y in the precision of their dtype."""
    return jnp.matmul(x, y, precision=precision.product_precision(x.dtype))


def linear(params: Params, name: str, x_BLC: jax.Array) -> jax.Array:
    """A dense layer, with a bias if it has one."""
    y_BLC = matmul(x_BLC, params[f"{name}.weight"].T)
    bias = params.get(f"{name}.bias")
    return y_BLC if bias is None else y_BLC + bias[None, None]


def layer_norm(params: Params, name: str, x_BLC: jax.Array, eps: float) -> jax.Array:
    """LN over the channels."""
    x = x_BLC.astype(statistics_dtype(x_BLC))
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
    return x.astype(x_BLC.dtype) * params[f"{name}.weight"][None, None] + params[f"{name}.bias"][None, None]


def rms_norm(params: Params, name: str, x_BLC: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square, times a gain."""
    x = x_BLC.astype(statistics_dtype(x_BLC))
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return x.astype(x_BLC.dtype) * params[f"{name}.weight"][None, None]


def attention(
    params: Params, names: Sequence[str], x_BLC: jax.Array, heads: int, scale: float, bias_BHLL: jax.Array
) -> jax.Array:
    """Multi-head attention.

    names: of the q, k, v and output layers. bias: added to the logits, broadcast over its axes of size 1.
    """
    q, k, v, out = names
    q_BLHD, k_BLHD, v_BLHD = (linear(params, name, x_BLC).reshape(*x_BLC.shape[:2], heads, -1) for name in (q, k, v))
    exact = precision.product_precision(x_BLC.dtype)
    logits_BHLL = jnp.einsum("bqhd,bkhd->bhqk", q_BLHD, k_BLHD, precision=exact) * scale
    logits_BHLL = logits_BHLL.astype(statistics_dtype(x_BLC)) + bias_BHLL
    weights_BHLL = jax.nn.softmax(logits_BHLL, -1).astype(x_BLC.dtype)
    x_BLHD = jnp.einsum("bhqk,bkhd->bqhd", weights_BHLL, v_BLHD, precision=exact)
    return linear(params, out, x_BLHD.reshape(*x_BLC.shape[:2], -1))


def mask_bias(mask: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """0 where the mask is True, the least number elsewhere, in its shape. Finite, so that no softmax is NaN."""
    return jnp.where(mask, 0.0, jnp.finfo(dtype).min).astype(dtype)
