"""Neighborhood attention (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023), as HDiT uses it.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j      j over the kernel_h x kernel_w keys of the window of query i

On an axis of length L with kernel k the window of the query at i is the keys

    [s, s + k),   s = clip(i - k // 2, 0, L - k)

It is shifted inward at borders and never shrinks, as in NATTEN; an even kernel has k // 2 keys before the query.

Two implementations of the one function:
- 'reference': all H W keys with a mask. Memory is quadratic in the tokens; it is the faster one on small grids.
- 'blocked': queries in tiles of a few rows and columns, each tile against the one patch of keys that holds the windows
  of all its queries, with a mask inside. A loop walks over the bands (rows) of tiles; the backward pass computes each
  band again, so memory is linear in the tokens. It is made of slices, pads and matrix products, which every device has;
  a batch split over devices needs no communication.
Departures from NATTEN: no dilation, no causal masks; scale is an argument, as it is there (HDiT passes 1).
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # added to a logit outside the window; two of them still fit in float32
BAND_ROWS, TILE_COLUMNS, WIDEST_TILE = 4, 8, 16  # the fastest of those tried on a CPU
DENSE_TOKENS = 196  # 'auto': up to here all keys with a mask are faster than tiles (measured on a CPU, forward 2x)


def neighborhood_attention(
    q_BHWND: jax.Array,
    k_BHWND: jax.Array,
    v_BHWND: jax.Array,
    kernel_size: int | tuple[int, int],
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Return neighborhood attention, [B, H, W, N, D], with logits and softmax in float32 or better.

    Args:
        q_BHWND, k_BHWND, v_BHWND: queries, keys and values of N heads of width D on a grid of H x W tokens.
        kernel_size: keys per axis, or (rows, columns).
        scale: factor of q . k; None is D ** -0.5.
        implementation: 'reference', 'blocked' (see above) or 'auto', the reference up to DENSE_TOKENS tokens.

    Raises:
        ValueError: if the arrays differ in shape, a kernel does not fit on the grid, or the implementation is unknown.
    """
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    _check(q_BHWND.shape, k_BHWND.shape, v_BHWND.shape, kernel, implementation)
    if implementation == "auto":
        _, H, W, _, _ = q_BHWND.shape
        implementation = "reference" if H * W <= DENSE_TOKENS else "blocked"
    factor = q_BHWND.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](q_BHWND, k_BHWND, v_BHWND, kernel, factor)


def _check(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    kernel: tuple[int, ...],
    implementation: str,
) -> None:
    if len(q_shape) != 5 or not q_shape == k_shape == v_shape:
        raise ValueError(f"neighborhood_attention: q, k, v have shapes {q_shape}, {k_shape}, {v_shape}, expected one "
                         "shape (batch, height, width, heads, head width)")  # fmt: skip
    grid = q_shape[1:3]
    if len(kernel) != 2 or not all(1 <= k <= size for k, size in zip(kernel, grid, strict=True)):
        raise ValueError(f"neighborhood_attention: kernel_size {kernel} on a grid of {grid} (height, width), expected "
                         "from 1 to the grid's size per axis; take a smaller kernel or a larger grid")  # fmt: skip
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"neighborhood_attention: unknown implementation {implementation!r}, expected 'auto' or one "
                         f"of {list(IMPLEMENTATIONS)}")  # fmt: skip


def window_starts(queries: np.ndarray, size: int, kernel: int) -> np.ndarray:
    """Return the first key of each query's window on an axis of length `size`."""
    return np.clip(queries - kernel // 2, 0, size - kernel)


def _mask(queries_TQ: np.ndarray, keys_TK: np.ndarray, size: int, kernel: int) -> np.ndarray:
    """[T, Q, K] on one axis: 0 for the keys in the window of a query, MASKED for others; positions are by tile."""
    distance_TQK = keys_TK[:, None, :] - window_starts(queries_TQ, size, kernel)[:, :, None]
    return np.where((distance_TQK >= 0) & (distance_TQK < kernel), np.float32(0), np.float32(MASKED))


def _attend(q_XQD: jax.Array, k_XKD: jax.Array, v_XKD: jax.Array, mask_XQK: jax.Array, scale: float) -> jax.Array:
    """Masked attention of some queries to some keys, [..., Q, D]; axes of size 1 in the mask are repeated."""
    dtype = jnp.promote_types(q_XQD.dtype, jnp.float32)
    logits_XQK = jnp.einsum("...qd,...kd->...qk", q_XQD, k_XKD, preferred_element_type=dtype)
    logits_XQK = scale * logits_XQK + mask_XQK.astype(dtype)
    largest_XQ1 = jax.lax.stop_gradient(jnp.max(logits_XQK, axis=-1, keepdims=True))
    weights_XQK = jnp.exp(logits_XQK - largest_XQ1)
    total_XQ1 = jnp.sum(weights_XQK, axis=-1, keepdims=True)
    sum_XQD = jnp.einsum("...qk,...kd->...qd", weights_XQK.astype(v_XKD.dtype), v_XKD, preferred_element_type=dtype)
    return (sum_XQD / total_XQ1).astype(v_XKD.dtype)


# ------------------------------------------------------------------------------------------------------- reference


def _reference(
    q_BHWND: jax.Array, k_BHWND: jax.Array, v_BHWND: jax.Array, kernel: tuple[int, ...], scale: float
) -> jax.Array:
    B, H, W, N, D = q_BHWND.shape
    axes = [(np.arange(size)[None], size, k) for size, k in zip((H, W), kernel, strict=True)]
    (mask_HH,), (mask_WW,) = (_mask(positions, positions, size, k) for positions, size, k in axes)
    mask_LM = (mask_HH[:, None, :, None] + mask_WW[None, :, None, :]).reshape(H * W, H * W)
    q_BNLD, k_BNLD, v_BNLD = (x.reshape(B, H * W, N, D).swapaxes(1, 2) for x in (q_BHWND, k_BHWND, v_BHWND))
    out_BNLD = _attend(q_BNLD, k_BNLD, v_BNLD, jnp.asarray(mask_LM)[None, None], scale)
    return out_BNLD.swapaxes(1, 2).reshape(B, H, W, N, D)


# --------------------------------------------------------------------------------------------------------- blocked


def tile_shape(height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of a tile of queries; a narrow grid is one tile wide."""
    return min(BAND_ROWS, height), width if width <= WIDEST_TILE else TILE_COLUMNS


def _blocked(
    q_BHWND: jax.Array, k_BHWND: jax.Array, v_BHWND: jax.Array, kernel: tuple[int, ...], scale: float
) -> jax.Array:
    """Z bands of R rows of queries, each cut into T tiles of R x C; a tile's patch of keys is P x S.

    The P rows of a band start at its first window, or earlier where the grid ends: they hold every window of the band.
    """
    B, H, W, N, D = q_BHWND.shape
    R, C = tile_shape(H, W)
    bands, tiles = -(-H // R), -(-W // C)

    rows_ZR = np.arange(bands * R).reshape(bands, R)
    P = min(R + kernel[0] - 1, H)
    first_rows_Z = np.clip(rows_ZR[:, 0] - kernel[0] // 2, 0, H - P)
    mask_ZRP = _mask(rows_ZR, first_rows_Z[:, None] + np.arange(P), H, kernel[0])

    columns_TC = np.arange(tiles * C).reshape(tiles, C)
    before, after = _reach(columns_TC, W, kernel[1])
    mask_TCS = _mask(columns_TC, columns_TC[:, :1] + np.arange(-before, C + after), W, kernel[1])
    halo = functools.partial(_tiles, tiles=tiles, columns=C, before=before, after=after)

    q_BHWND = jnp.pad(q_BHWND, ((0, 0), (0, bands * R - H), (0, 0), (0, 0), (0, 0)))

    def band(first_query_row: jax.Array, first_key_row: jax.Array, mask_RP: jax.Array) -> jax.Array:
        q_BRWND = jax.lax.dynamic_slice_in_dim(q_BHWND, first_query_row, R, axis=1)
        k_BPWND, v_BPWND = (jax.lax.dynamic_slice_in_dim(x, first_key_row, P, axis=1) for x in (k_BHWND, v_BHWND))
        mask_TRCPS = mask_RP[None, :, None, :, None] + jnp.asarray(mask_TCS)[:, None, :, None, :]
        mask_11TQK = mask_TRCPS.reshape(1, 1, tiles, R * C, -1)
        q_BNTQD = _tiles(q_BRWND, tiles, C, before=0, after=0)
        out_BNTQD = _attend(q_BNTQD, halo(k_BPWND), halo(v_BPWND), mask_11TQK, scale)
        out_BRTCND = out_BNTQD.reshape(B, N, tiles, R, C, D).transpose(0, 3, 2, 4, 1, 5)
        return out_BRTCND.reshape(B, R, tiles * C, N, D)[:, :, :W]

    plan = (jnp.asarray(rows_ZR[:, 0]), jnp.asarray(first_rows_Z), jnp.asarray(mask_ZRP))
    band = jax.checkpoint(band, prevent_cse=False)  # a loop's body needs no such guard
    out_ZBRWND = jax.lax.map(lambda of_band: band(*of_band), plan)
    return jnp.moveaxis(out_ZBRWND, 0, 1).reshape(B, bands * R, W, N, D)[:, :H]


def _reach(columns_TC: np.ndarray, width: int, kernel: int) -> tuple[int, int]:
    """The columns (before, after) a tile that the windows of its queries reach, at most over all tiles."""
    starts_TC = window_starts(columns_TC, width, kernel)
    before = np.max(columns_TC[:, :1] - starts_TC)
    after = np.max(starts_TC + kernel - 1 - columns_TC[:, -1:])
    return max(0, int(before)), max(0, int(after))


def _tiles(x_BRWND: jax.Array, tiles: int, columns: int, before: int, after: int) -> jax.Array:
    """Tiles [B, N, T, R * S, D] of `columns` columns, each with those before and after it, S in all; 0 beyond the grid.

    Slices and concatenation take the place of a gather, so that the transpose is pads and sums, not a scatter.
    """
    B, R, W, N, D = x_BRWND.shape
    neighbours = -(-(before + after) // columns)
    after_the_grid = (tiles + neighbours) * columns - W - before
    x_BNRWD = x_BRWND.transpose(0, 3, 1, 2, 4)
    x_BNRWD = jnp.pad(x_BNRWD, ((0, 0), (0, 0), (0, 0), (before, after_the_grid), (0, 0)))
    x_BNRTCD = x_BNRWD.reshape(B, N, R, tiles + neighbours, columns, D)
    x_BNRTSD = jnp.concatenate([x_BNRTCD[:, :, :, i : i + tiles] for i in range(neighbours + 1)], axis=4)
    x_BNRTSD = x_BNRTSD[:, :, :, :, : before + columns + after]
    return x_BNRTSD.transpose(0, 1, 3, 2, 4, 5).reshape(B, N, tiles, -1, D)


IMPLEMENTATIONS = types.MappingProxyType({"reference": _reference, "blocked": _blocked})
