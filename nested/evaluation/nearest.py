"""Exact nearest neighbours by Euclidean distance, and the k-NN classification accuracy that follows from them.

    |q - p|^2 / 2 = |q|^2 / 2 + |p|^2 / 2 - q.p

One matrix product in float32 finds the candidates in a block of points. It loses digits if q is close to p, so that
the distances of the candidates are then computed from q - p itself. Blocks bound the memory. Points at equal distances
are ordered by their indices.

The accuracy is leave-one-out: every image is classified by a vote of its k nearest others. Votes are equal, and a tie
goes to the class of the nearest image among the tied. Nested Diffusion (CVPR 2025, Table 5) quotes 20-NN accuracies of
its encoders on ImageNet without saying which distance or vote it uses; numbers of two distances do not compare.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

SPARE = 4  # candidates of a block beyond k: what the matrix product orders wrongly is within rounding of the k-th
QUERY_ROWS = 1024  # queries at a time
BLOCK_NUMBERS = 2**24  # numbers of a block of points, 64 MiB of float32
SMALLEST, LARGEST = 64, 16384  # points of a block


class NearestStream:
    """Finds the k points nearest to each query among all points added so far.

    queries: [Q, ...] of any real type; they are flattened. own: [Q] the index of the point that is the query itself
    and does not count; -1, or None for all queries, if there is no such point. Raises ValueError for a k below 1.
    """

    def __init__(self, queries: ArrayLike, k: int, own: ArrayLike | None = None) -> None:
        if k < 1:
            raise ValueError(f"nearest neighbours: k is {k}; give 1 or more")
        queries = np.asarray(queries)
        self._queries = queries.reshape(len(queries), -1)
        self._own = np.full(len(queries), -1) if own is None else np.asarray(own)
        self._shift = self._queries.mean(axis=0, dtype=np.float64).astype(np.float32)  # smaller norms, less rounding
        self._k, self._added = k, 0
        self._distances = np.full((len(queries), k), np.inf, np.float32)
        self._indices = np.full((len(queries), k), -1, np.int64)

    def add(self, points: ArrayLike, report: Callable[[int], None] | None = None) -> None:
        """Adds points [N, ...]; their indices continue from those added before.

        report: called with the number of (query, point) pairs that this call has compared so far."""
        points, done = np.asarray(points), 0
        points = points.reshape(len(points), -1)
        size = _power_of_two(min(len(points), max(SMALLEST, min(LARGEST, BLOCK_NUMBERS // points.shape[1]))))
        rows = min(QUERY_ROWS, _power_of_two(len(self._queries)))
        for first in range(0, len(points), size):
            block = points[first : first + size]
            on_device = jax.device_put(pad_rows(block, size))
            for start in range(0, len(self._queries), rows):
                chosen = slice(start, start + rows)
                queries, own = self._queries[chosen], self._own[chosen] - self._added
                found = _closest(
                    pad_rows(queries, rows), on_device, self._shift, pad_rows(own, rows), len(block),
                    min(self._k + SPARE, size),
                )  # fmt: skip
                self._merge(chosen, *(np.asarray(array)[: len(queries)] for array in found))
                done += len(queries) * len(block)
                if report is not None:
                    report(done)
            self._added += len(block)

    def _merge(self, chosen: slice, distances: np.ndarray, places: np.ndarray) -> None:
        distances = np.concatenate([self._distances[chosen], distances], axis=1)
        indices = np.concatenate([self._indices[chosen], places + self._added], axis=1)
        order = np.lexsort((indices, distances), axis=1)[:, : self._k]
        self._distances[chosen] = np.take_along_axis(distances, order, 1)
        self._indices[chosen] = np.take_along_axis(indices, order, 1)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(distances float32 [Q, k] in rising order, indices int64 [Q, k]). Raises ValueError if there are fewer than
        k points."""
        if np.isinf(self._distances).any():
            raise ValueError(f"nearest neighbours: {self._k} asked for among {self._added} points; ask for fewer")
        return self._distances, self._indices


def nearest_neighbors(
    queries: ArrayLike,
    points: ArrayLike,
    k: int,
    own: ArrayLike | None = None,
    report: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(distances [Q, k], indices [Q, k]) of the points [N, ...] nearest to each query; arguments as NearestStream's."""
    stream = NearestStream(queries, k, own)
    stream.add(points, report)
    return stream.result()


def majority_vote(neighbour_labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The class with the most votes, int [N], of labels [N, k], nearest first; a tie goes to the nearest's class."""
    count, k = neighbour_labels.shape
    votes = np.zeros((count, num_classes))
    # 2^-r beside each vote: less than one vote in all, and a nearer neighbour's outweighs all those behind it.
    np.add.at(votes, (np.arange(count)[:, None], neighbour_labels), 1.0 + 2.0 ** -np.arange(1, k + 1)[None])
    return votes.argmax(axis=1)


def knn_accuracy(neighbours: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """The share of N points whose nearest others, int [N, k], vote for the point's own class in `labels` [N]."""
    return float((majority_vote(labels[neighbours], num_classes) == labels).mean())


def _power_of_two(count: int) -> int:
    """The smallest power of two of at least `count`: few shapes, few compilations."""
    return 1 << (count - 1).bit_length()


def pad_rows(rows: np.ndarray, size: int) -> np.ndarray:
    """Appends rows of zeros to [n, ...] up to `size` rows."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])


@functools.partial(jax.jit, static_argnames=("count",))
def _closest(queries_QD, points_ND, shift_D, own_Q, valid, count):
    """(distances [Q, count], places [Q, count]) of the `count` nearest of the first `valid` points; inf where there
    are fewer."""
    q_QD, p_ND = queries_QD.astype(jnp.float32), points_ND.astype(jnp.float32)
    shifted_ND = p_ND - shift_D[None]
    products = jnp.einsum("qd,nd->qn", q_QD - shift_D[None], shifted_ND, precision=jax.lax.Precision.HIGHEST)
    place = jnp.arange(len(p_ND))[None]
    no_point = (place >= valid) | (place == own_Q[:, None])
    half_QN = jnp.where(no_point, jnp.inf, 0.5 * jnp.square(shifted_ND).sum(1)[None] - products)
    found, places = jax.lax.top_k(-half_QN, count)
    squares = jax.lax.map(lambda row: jnp.square(p_ND[row[1]] - row[0][None]).sum(1), (q_QD, places), batch_size=16)
    return jnp.where(jnp.isinf(found), jnp.inf, jnp.sqrt(squares)), places
