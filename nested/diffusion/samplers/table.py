"""The one loop behind every sampler: a table of numbers, one row per network evaluation, run by one lax.scan.

Every sampler is linear in its state, the network's outputs and fresh noise. A table first takes x_T to

    x = x_base <- scale x_T + noise n_K    (its `opening`, absent from most: noise before the first evaluation)

and then row k of its K rows says

    m    = output_0 x + output_1 denoise(x, t)                 (the evaluation, as x0 or as eps)
    x   <- base x_base + sum_j history_j m_{-j} + noise n_k + last_noise n_{k-1}     (m_{-0} the newest evaluation)
    x_base <- x  where the row commits                         (the end of a step; its inner evaluations do not)

Tables are built on the host in float64, one for each leaf of the variable from the leaf's own schedule, all on the time
grid of the process's first schedule. Noise n_k of sample i is drawn with fold_in(keys[i], j 2^20 + k) for leaf j.
"""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CLEAN = None  # the time of the data itself: alpha = 1, sigma = 0, whatever the schedule says near t = 0
X0 = (0.0, 1.0)  # the output m = x0


class Row(NamedTuple):
    """One network evaluation and the state it leads to."""

    t: float
    output: tuple[float, float]  # m = output[0] x + output[1] x0
    base: float
    history: tuple[float, ...]  # coefficients of m, newest first
    noise: float
    commit: bool
    last_noise: float = 0.0  # coefficient of the previous row's noise


class Table(NamedTuple):
    """What a leaf's sampling is made of."""

    rows: Row  # of arrays [K, ...]; last_noise is None where no row has any
    opening: tuple[float, float] | None = None  # (scale, noise); None for x = x_T


class Sampler(abc.ABC):
    """What the samplers share. A subclass is a frozen dataclass of options with `plan` and `rows`."""

    @abc.abstractmethod
    def plan(self, schedule) -> list[tuple]:
        """The steps, each the times (start, ..., end): one evaluation at every time but the last."""

    @abc.abstractmethod
    def rows(self, schedule, plan) -> list[Row]:
        """The table's rows for one leaf's schedule."""

    def start(self, process) -> float:
        """The time whose marginal x_T must have."""
        return 1.0

    def span(self, process) -> tuple[float, float]:
        """Times of the first and of the last evaluation."""
        plan = self.plan(process.schedules[0])
        return plan[0][0], plan[-1][-2]

    def opening(self, schedule, plan, start) -> tuple[float, float] | None:
        """(scale, noise) from x_T, at `start`, to the state of the first evaluation; None where that is x_T."""
        return None

    def nfe(self, process) -> int:
        """Number of network evaluations of one call."""
        return sum(len(times) - 1 for times in self.plan(process.schedules[0]))

    def tables(self, process, variable) -> tuple[Table, ...]:
        """One table per leaf, numpy float64. Raises ValueError where the schedule makes a coefficient infinite."""
        with np.errstate(divide="ignore", invalid="ignore"):  # _stack reports what is not finite, in one line
            plan, start = self.plan(process.schedules[0]), self.start(process)
            return tuple(
                Table(_stack(self.rows(schedule, plan), self), self.opening(schedule, plan, start))
                for schedule in process.leaf_schedules(variable)
            )

    def __call__(self, keys, denoise, process, x_T, cond, shown=()):
        """keys: [B] typed keys, one per sample; denoise: a DenoiseFn; x_T: tree of [B, ...], the state at start().

        Returns a tree like x_T in float32 or better. Sample i depends on row i of keys, x_T and cond only.
        shown: numbers of evaluations, from 0 on; with any, (that tree, the estimates of x0 that these evaluations gave,
        leaves [len(shown), B, ...]) is returned.
        """
        tables = self.tables(process, x_T)
        random = any(table.rows.noise.any() or table.opening for table in tables)
        return run(tables, keys if random else None, denoise, x_T, cond, shown=shown)


def run(tables, keys, denoise, x_T, cond, draw=None, shown=()):
    """Run one table per leaf from x_T with a single lax.scan. keys: [B], or None for tables without noise.

    draw(k, j, leaf): the noise n_k of leaf j, like `leaf`; None draws it from keys, as above. shown: as for a Sampler.
    """
    leaves, structure = jax.tree.flatten(x_T)
    leaves = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    tables = [_cast(table, leaf.dtype) for table, leaf in zip(tables, leaves, strict=True)]
    count, depth = tables[0].rows.history.shape
    if any(not 0 <= k < count for k in shown):
        raise ValueError(f"shown = {tuple(shown)}: the sampler has the evaluations 0 to {count - 1}")
    if draw is None and keys is not None:
        draw = _drawn_from(keys)

    def advance(k, index, row, state, x0):
        x, base, past = state
        outputs = (row.output[0] * x + row.output[1] * x0.astype(x.dtype), *past)
        x = row.base * base + sum(row.history[j] * m for j, m in enumerate(outputs))
        if draw is not None:
            x = x + row.noise * draw(k, index, x)
            if row.last_noise is not None:
                x = x + row.last_noise * draw(k - 1, index, x)
        return x, jnp.where(row.commit, x, base), outputs[: len(past)]

    def evaluate(carry, scanned):
        states, kept = carry
        k, rows = scanned
        t = jnp.full(leaves[0].shape[:1], rows[0].t)
        x0 = jax.tree.leaves(denoise(jax.tree.unflatten(structure, [x for x, _, _ in states]), t, cond))
        here = jnp.asarray(shown, jnp.int32) == k  # [len(shown)]
        kept = [
            jnp.where(here.reshape(-1, *[1] * new.ndim), new[None].astype(old.dtype), old)
            for old, new in zip(kept, x0[: len(kept)], strict=True)
        ]
        return ([advance(k, i, *of_leaf) for i, of_leaf in enumerate(zip(rows, states, x0, strict=True))], kept), None

    states = []
    for index, (table, x) in enumerate(zip(tables, leaves, strict=True)):
        if table.opening is not None:
            x = table.opening[0] * x + table.opening[1] * draw(count, index, x)
        states.append((x, x, (jnp.zeros_like(x),) * (depth - 1)))
    kept = [jnp.zeros((len(shown), *leaf.shape), leaf.dtype) for leaf in leaves] if shown else []
    scanned = (jnp.arange(count), [table.rows for table in tables])
    (states, kept), _ = jax.lax.scan(evaluate, (states, kept), scanned)
    x = jax.tree.unflatten(structure, [x for x, _, _ in states])
    return (x, jax.tree.unflatten(structure, kept)) if shown else x


def marginal(schedule, t):
    """(alpha, sigma) at t, which may be CLEAN."""
    return (1.0, 0.0) if t is CLEAN else schedule(t)


def backward_differences(log_snr):
    """Estimates D1 of h m' and D2 of h^2 m'' / 2 by the 1, 2 or 3 newest outputs m, as vectors over them, newest first.

    log_snr: of those outputs, oldest first, and of the end of the step, which is h away from the newest output.
    """
    steps = np.diff(log_snr)[::-1]
    gaps, units = steps[1:] / steps[0], np.eye(len(steps))
    slopes = [(units[i] - units[i + 1]) / gap for i, gap in enumerate(gaps)]
    first, second = slopes[0] if slopes else np.zeros(1), np.zeros(len(units))
    if len(slopes) == 2:
        second = (slopes[0] - slopes[1]) / sum(gaps)
        first = slopes[0] + gaps[0] * second
    return first, second


def _drawn_from(keys):
    """draw(k, j, leaf) of normal noise, row i from keys[i]. The first leaf's is that of a variable of one leaf."""

    def draw(k, index, leaf):
        def normal(key):
            return jax.random.normal(jax.random.fold_in(key, index * 2**20 + k), leaf.shape[1:], leaf.dtype)

        return jax.vmap(normal)(keys)

    return draw


def _cast(table, dtype):
    """The table's numbers in a leaf's dtype."""
    cast = jax.tree.map(lambda column: jnp.asarray(column, dtype), table)
    return cast._replace(rows=cast.rows._replace(commit=table.rows.commit))


def _stack(rows, sampler):
    depth = max(len(row.history) for row in rows)
    padded = [row._replace(history=row.history + (0.0,) * (depth - len(row.history))) for row in rows]
    stacked = Row(*(np.asarray(column) for column in zip(*padded, strict=True)))
    if not all(np.isfinite(column).all() for column in stacked):
        raise ValueError(
            f"{sampler}: infinite coefficients, alpha or sigma is 0 at one of the times: raise t_end (or sigma_min)"
        )
    return stacked if stacked.last_noise.any() else stacked._replace(last_noise=None)
