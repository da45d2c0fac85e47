"""The one loop behind every sampler: one lax.scan over a table of numbers with a row for each network evaluation.

Every sampler is linear in its state, the network's outputs and fresh noise. A table first takes x_T to

    x = x_base <- scale x_T + noise n_K    (its `opening`, noise before the first evaluation; most tables have none)

and then row k of its K rows computes

    m    = output_0 x + output_1 denoise(x, t)                 (the evaluation, as x0 or as eps)
    x   <- base x_base + sum_j history_j m_{-j} + noise n_k + last_noise n_{k-1}     (m_{-0} the newest evaluation)
    x_base <- x  if the row commits                            (the end of a step; its inner evaluations do not)

Tables are built on the host in float64, one for each leaf of the variable from the leaf's own schedule, all on the time
grid of the process's first schedule. Noise n_k of sample i is drawn with fold_in(keys[i], j 2^20 + k) for leaf j.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nested.diffusion.denoiser import Cond, DenoiseFn
from nested.diffusion.process import Process, Tree
from nested.diffusion.schedules import Schedule

CLEAN = None  # the time of the data itself: alpha = 1, sigma = 0, whatever the schedule says near t = 0
X0 = (0.0, 1.0)  # the output m = x0

Time = float | None  # a time in [0, 1], or CLEAN
Plan = list[tuple[Any, ...]]  # for each step its times (start, ..., end), floats; the last end may be CLEAN
DrawFn = Callable[[Any, int, jax.Array], jax.Array]  # (k, j, leaf) -> the noise n_k of leaf j


class Sampler(Protocol):
    """What the hierarchy uses of a sampler."""

    def start(self, process: Process, /) -> float:
        """Return the time whose marginal x_T must have."""
        ...

    def span(self, process: Process, /) -> tuple[float, float]:
        """Return the times of the first and of the last evaluation."""
        ...

    def nfe(self, process: Process, /) -> int:
        """Return the number of network evaluations of one call."""
        ...

    def __call__(
        self,
        keys: jax.Array,
        denoise: DenoiseFn,
        process: Process,
        x_T: Tree,
        cond: Cond,
        shown: Sequence[int] = (),
        /,
    ) -> Tree:
        """Draw samples.

        Args:
            keys: [B] typed keys, one per sample. Sample i depends on row i of keys, x_T and cond only.
            denoise: the estimate of x0.
            process: the diffusion of the variable.
            x_T: the state at start(), a tree of [B, ...].
            cond: the conditions, [B, ...] each.
            shown: numbers of evaluations, from 0 on, whose estimates of x0 are returned too.

        Returns:
            A tree like x_T in float32 or better. With `shown`, (that tree, the estimates, leaves [len(shown), B, ...]).
        """
        ...


class Row(NamedTuple):
    """One network evaluation and the state it leads to; in a Table its numbers are arrays [K, ...]."""

    t: Any
    output: Any  # m = output[0] x + output[1] x0
    base: Any
    history: Any  # coefficients of m, newest first
    noise: Any
    commit: Any
    last_noise: Any = 0.0  # coefficient of the previous row's noise


class Table(NamedTuple):
    """What a leaf's sampling is made of.

    rows: arrays [K, ...]; last_noise is None if no row has any. opening: (scale, noise); None if x is x_T.
    """

    rows: Row
    opening: tuple[Any, Any] | None = None


class TableSampler(abc.ABC):
    """The base class of our samplers: a subclass is a frozen dataclass of options with `plan` and `rows`."""

    @abc.abstractmethod
    def plan(self, schedule: Schedule) -> Plan:
        """Return the steps, each as times (start, ..., end), with one evaluation at every time but the last."""

    @abc.abstractmethod
    def rows(self, schedule: Schedule, plan: Plan) -> list[Row]:
        """Return the table's rows for one leaf's schedule."""

    def start(self, process: Process) -> float:
        """Return the time whose marginal x_T must have."""
        return 1.0

    def span(self, process: Process) -> tuple[float, float]:
        """Return the times of the first and of the last evaluation."""
        plan = self.plan(process.schedules[0])
        return plan[0][0], plan[-1][-2]

    def opening(self, schedule: Schedule, plan: Plan, start: float) -> tuple[float, float] | None:
        """Return (scale, noise) from x_T, at `start`, to the state of the first evaluation; None if that is x_T."""
        return None

    def nfe(self, process: Process) -> int:
        """Return the number of network evaluations of one call."""
        return sum(len(times) - 1 for times in self.plan(process.schedules[0]))

    def tables(self, process: Process, variable: Tree) -> tuple[Table, ...]:
        """Return one table per leaf, in numpy float64.

        Raises ValueError if the schedule makes a coefficient infinite.
        """
        with np.errstate(divide="ignore", invalid="ignore"):  # _stack reports what is not finite, in one line
            plan, start = self.plan(process.schedules[0]), self.start(process)
            return tuple(
                Table(_stack(self.rows(schedule, plan), self), self.opening(schedule, plan, start))
                for schedule in process.leaf_schedules(variable)
            )

    def __call__(
        self, keys: jax.Array, denoise: DenoiseFn, process: Process, x_T: Tree, cond: Cond, shown: Sequence[int] = ()
    ) -> Tree:
        """Draw samples: see `Sampler`."""
        tables = self.tables(process, x_T)
        random = any(table.rows.noise.any() or table.opening for table in tables)
        return run(tables, keys if random else None, denoise, x_T, cond, shown=shown)


def run(
    tables: Sequence[Table],
    keys: jax.Array | None,
    denoise: DenoiseFn,
    x_T: Tree,
    cond: Cond,
    draw: DrawFn | None = None,
    shown: Sequence[int] = (),
) -> Tree:
    """Run one table per leaf from x_T with a single lax.scan.

    Args:
        tables: one per leaf of x_T.
        keys: [B] typed keys; None for tables without noise.
        denoise, x_T, cond, shown: as for a Sampler.
        draw: draw(k, j, leaf) is the noise n_k of leaf j, like `leaf`; None draws it from keys, as said above.

    Raises:
        ValueError: if `shown` names an evaluation that does not exist.
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
            assert draw is not None, "a table that begins with noise needs keys, or draw"
            x = table.opening[0] * x + table.opening[1] * draw(count, index, x)
        states.append((x, x, (jnp.zeros_like(x),) * (depth - 1)))
    kept = [jnp.zeros((len(shown), *leaf.shape), leaf.dtype) for leaf in leaves] if shown else []
    scanned = (jnp.arange(count), [table.rows for table in tables])
    (states, kept), _ = jax.lax.scan(evaluate, (states, kept), scanned)
    x = jax.tree.unflatten(structure, [x for x, _, _ in states])
    return (x, jax.tree.unflatten(structure, kept)) if shown else x


def marginal(schedule: Schedule, t: Time) -> tuple[Any, Any]:
    """Return (alpha, sigma) at t, which may be CLEAN."""
    return (1.0, 0.0) if t is CLEAN else schedule(t)


def backward_differences(log_snr: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the estimates D1 of h m' and D2 of h^2 m'' / 2, as vectors over the newest outputs m, newest first.

    log_snr: of those 1, 2 or 3 outputs, oldest first, and of the end of the step, which is h away from the newest one.
    """
    steps = np.diff(log_snr)[::-1]
    gaps, units = steps[1:] / steps[0], np.eye(len(steps))
    slopes = [(units[i] - units[i + 1]) / gap for i, gap in enumerate(gaps)]
    first, second = slopes[0] if slopes else np.zeros(1), np.zeros(len(units))
    if len(slopes) == 2:
        second = (slopes[0] - slopes[1]) / sum(gaps)
        first = slopes[0] + gaps[0] * second
    return first, second


def _drawn_from(keys: jax.Array) -> DrawFn:
    """Draw normal noise, row i from keys[i]. The first leaf's noise is that of a variable of one leaf."""

    def draw(k: Any, index: int, leaf: jax.Array) -> jax.Array:
        def normal(key: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, index * 2**20 + k), leaf.shape[1:], leaf.dtype)

        return jax.vmap(normal)(keys)

    return draw


def _cast(table: Table, dtype: DTypeLike) -> Table:
    """The table with its numbers in a leaf's dtype."""
    cast = jax.tree.map(lambda column: jnp.asarray(column, dtype), table)
    return cast._replace(rows=cast.rows._replace(commit=table.rows.commit))


def _stack(rows: list[Row], sampler: TableSampler) -> Row:
    depth = max(len(row.history) for row in rows)
    padded = [row._replace(history=row.history + (0.0,) * (depth - len(row.history))) for row in rows]
    stacked = Row(*(np.asarray(column) for column in zip(*padded, strict=True)))
    if not all(np.isfinite(column).all() for column in stacked):
        raise ValueError(
            f"{sampler}: infinite coefficients, alpha or sigma is 0 at one of the times: raise t_end (or sigma_min)"
        )
    return stacked if stacked.last_noise.any() else stacked._replace(last_noise=None)
