"""The one loop behind every sampler: a table of numbers, one row per network evaluation, run by one lax.scan.

Every sampler of nested/samplers.py is linear in its state, the network's outputs and fresh noise. Row k of a table says

    m    = output_0 x + output_1 denoise(x, t)                 (the evaluation, as x0 or as eps)
    x   <- base x_base + sum_j history_j m_{-j} + noise n_k    (m_{-0} the newest evaluation)
    x_base <- x  where the row commits                         (the end of a step; its inner evaluations do not)

Tables are built on the host in float64, one for each leaf of the variable from the leaf's own schedule, all on the time
grid of the process's first schedule. Noise n_k of sample i is drawn with fold_in(keys[i], k) (leaf j of J: k J + j).
"""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CLEAN = None  # the time of the data itself: alpha = 1, sigma = 0, whatever the schedule says near t = 0


class Row(NamedTuple):
    """One network evaluation and the state it leads to; a table is a Row of arrays [rows, ...]."""

    t: float
    output: tuple[float, float]  # m = output[0] x + output[1] x0
    base: float
    history: tuple[float, ...]  # coefficients of m, newest first
    noise: float
    commit: bool


class Sampler(abc.ABC):
    """What the samplers share. A subclass is a frozen dataclass of options with `plan` and `rows`."""

    @abc.abstractmethod
    def plan(self, schedule) -> list[tuple]:
        """The steps, each the times (start, ..., end): one evaluation at every time but the last."""

    @abc.abstractmethod
    def rows(self, schedule, plan) -> list[Row]:
        """The table's rows for one leaf's schedule."""

    def nfe(self, process) -> int:
        """Number of network evaluations of one call."""
        return sum(len(times) - 1 for times in self.plan(process.schedules[0]))

    def tables(self, process, variable) -> tuple[Row, ...]:
        """One table per leaf, numpy float64. Raises ValueError where the schedule makes a coefficient infinite."""
        with np.errstate(divide="ignore", invalid="ignore"):  # _table reports what is not finite, in one line
            plan = self.plan(process.schedules[0])
            return tuple(_table(self.rows(schedule, plan), self) for schedule in process.leaf_schedules(variable))

    def __call__(self, keys, denoise, process, x_T, cond):
        """keys: [B] typed keys, one per sample; denoise: a DenoiseFn; x_T: tree of [B, ...], the state at t = 1.

        Returns a tree like x_T in float32 or better. Sample i depends on row i of keys, x_T and cond only.
        """
        tables = self.tables(process, x_T)
        random = any(table.noise.any() for table in tables)
        return run(tables, keys if random else None, denoise, x_T, cond)


def run(tables, keys, denoise, x_T, cond):
    """Run one table per leaf from x_T with a single lax.scan. keys: [B], or None for tables without noise."""
    leaves, structure = jax.tree.flatten(x_T)
    leaves = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    tables = tuple(
        jax.tree.map(lambda column, dtype=leaf.dtype: jnp.asarray(column, dtype), table)._replace(commit=table.commit)
        for table, leaf in zip(tables, leaves, strict=True)
    )

    def draw(k, index, leaf):
        def normal(key):
            return jax.random.normal(jax.random.fold_in(key, k * len(leaves) + index), leaf.shape[1:], leaf.dtype)

        return jax.vmap(normal)(keys)

    def advance(k, index, row, state, x0):
        x, base, past = state
        outputs = (row.output[0] * x + row.output[1] * x0.astype(x.dtype), *past)
        x = row.base * base + sum(row.history[j] * m for j, m in enumerate(outputs))
        if keys is not None:
            x = x + row.noise * draw(k, index, x)
        return x, jnp.where(row.commit, x, base), outputs[: len(past)]

    def evaluate(states, scanned):
        k, rows = scanned
        t = jnp.full(leaves[0].shape[:1], rows[0].t)
        x0 = jax.tree.leaves(denoise(jax.tree.unflatten(structure, [x for x, _, _ in states]), t, cond))
        return [advance(k, i, *of_leaf) for i, of_leaf in enumerate(zip(rows, states, x0, strict=True))], None

    rows, depth = tables[0].history.shape
    start = [(leaf, leaf, (jnp.zeros_like(leaf),) * (depth - 1)) for leaf in leaves]
    states, _ = jax.lax.scan(evaluate, start, (jnp.arange(rows), tables))
    return jax.tree.unflatten(structure, [x for x, _, _ in states])


def _table(rows, sampler):
    depth = max(len(row.history) for row in rows)
    padded = [row._replace(history=row.history + (0.0,) * (depth - len(row.history))) for row in rows]
    table = Row(*(np.asarray(column) for column in zip(*padded, strict=True)))
    if not all(np.isfinite(column).all() for column in table):
        raise ValueError(f"{sampler}: infinite coefficients, alpha or sigma is 0 at t = 1 or t_end: raise t_end")
    return table
