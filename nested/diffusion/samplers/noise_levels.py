"""Samplers stated in x / alpha against the noise level s = sigma / alpha: their grids and their tables.

A method gives its steps between noise levels (`updates`) as if alpha were 1. `OnNoiseLevels` finds the times of those
noise levels in the process's first schedule, reads every leaf's own s at these times, and turns the steps into rows for
x. The grids are k-diffusion's (k_diffusion/sampling.py at 4601bf08), and t uniform.
"""

import abc
import dataclasses
import itertools
import math
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np

from nested.diffusion.process import Process, check_name
from nested.diffusion.samplers.table import CLEAN, X0, Plan, Row, TableSampler, Time, marginal
from nested.diffusion.schedules import Schedule

Grid = Literal["time_uniform", "karras", "exponential", "polyexponential", "vp"]
GRIDS = {  # name -> its options
    "time_uniform": ("t_end",),
    "karras": ("sigma_min", "sigma_max", "rho"),
    "exponential": ("sigma_min", "sigma_max"),
    "polyexponential": ("sigma_min", "sigma_max", "rho"),
    "vp": ("t_end",),
}
RHO = {"karras": 7.0, "polyexponential": 1.0}  # the defaults of rho
T_END = 1e-3  # the default, k-diffusion's eps_s


def noise_levels(
    grid: str,
    steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
    t_end: float | None = None,
) -> np.ndarray:
    """Return the `steps` noise levels s of a grid, falling, without the 0 that follows them, in numpy float64.

    karras: s^(1/rho) is linear; exponential: log s is linear; polyexponential: log s is the rho-th power of a linear
    ramp; vp: the levels of the VP-SDE with beta from .1 to 20 at t uniform from 1 to t_end. Options of other grids are
    not read. (k_diffusion/sampling.py:17-44.)
    """
    ramp = np.linspace(1.0, 0.0, steps)
    if grid == "vp":
        t = np.linspace(1.0, T_END if t_end is None else t_end, steps)
        return np.sqrt(np.expm1(19.9 / 2 * t**2 + 0.1 * t))
    assert sigma_min is not None and sigma_max is not None, f"grid {grid!r} needs sigma_min and sigma_max"
    rho = RHO.get(grid, 1.0) if rho is None else rho
    if grid == "karras":
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        return (low + ramp * (high - low)) ** rho
    return np.exp(math.log(sigma_min) + ramp**rho * math.log(sigma_max / sigma_min))


def ancestral(start: float, end: float, eta: float) -> tuple[float, float]:
    """Return (down, up): a deterministic step to `down` and then noise of deviation `up` lead to noise level `end`."""
    up = min(end, eta * end * np.sqrt(1 - (end / start) ** 2))
    return np.sqrt(end**2 - up**2), up


class Update(NamedTuple):
    """In x / alpha, after an evaluation: x <- base x_base + sum_j history_j m_{-j} + noise n_k + last_noise n_{k-1}."""

    base: float
    history: tuple[float, ...]
    noise: float = 0.0
    last_noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class OnNoiseLevels(TableSampler):
    """The base class of samplers on noise levels: their grid, and the way from x / alpha to x.

    grid: 'time_uniform', t uniform from 1 to t_end (default .001), or noise levels from sigma_max to sigma_min:
    'karras' (rho 7), 'exponential', 'polyexponential' (rho 1), or 'vp', those of k-diffusion's get_sigmas_vp (t_end
    .001).
    Raises ValueError for options that the grid does not have, for a range that is not 0 < sigma_min < sigma_max, and,
    once the process is known, for noise levels beyond those of a variance preserving schedule, whose largest is that of
    t = 1.
    """

    steps: Annotated[int, "noise levels; a last step to the clean x0 follows them"]
    grid: Annotated[Grid, "how the noise levels are spaced"] = "time_uniform"
    sigma_min: Annotated[float | None, "karras, exponential, polyexponential: the smallest noise level"] = None
    sigma_max: Annotated[float | None, "karras, exponential, polyexponential: the largest noise level"] = None
    rho: Annotated[float | None, "karras (None: 7), polyexponential (None: 1): exponent of the grid"] = None
    t_end: Annotated[float | None, "time_uniform, vp: the time of the last noise level; None is 1e-3"] = None

    output_x0: ClassVar[bool] = True  # m is D; False: m is the slope (x - D) / s

    def __post_init__(self) -> None:
        check_name("sampler.grid", self.grid, GRIDS)
        if self.steps < 1:
            raise ValueError(f"sampler.steps = {self.steps}: expected at least 1")
        for option in ("sigma_min", "sigma_max", "rho", "t_end"):
            value, has = getattr(self, option), option in GRIDS[self.grid]
            if value is not None and not has:
                raise ValueError(f"sampler.{option} = {value}: sampler.grid = {self.grid!r} has none, leave it out")
            if value is None and has and option in ("sigma_min", "sigma_max"):
                raise ValueError(f"sampler.{option} is missing: sampler.grid = {self.grid!r} needs it")
        low, high = self.sigma_min, self.sigma_max
        if low is not None and high is not None and not 0 < low < high < math.inf:
            raise ValueError(
                f"sampler.sigma_min = {self.sigma_min}, sampler.sigma_max = {self.sigma_max}: "
                "expected 0 < sigma_min < sigma_max"
            )
        if self.rho is not None and not self.rho > 0:
            raise ValueError(f"sampler.rho = {self.rho}: expected a positive number")
        if self.t_end is not None and not 0 <= self.t_end < 1:
            raise ValueError(f"sampler.t_end = {self.t_end}: expected 0 <= t_end < 1")

    @abc.abstractmethod
    def updates(self, sigmas: list[tuple[float, ...]]) -> list[list[Update]]:
        """Return one list per step, with one Update per evaluation.

        sigmas: the noise levels of each step, (start, inner ones ..., end).
        """

    def raised(self, s: float) -> float:
        """Return the noise level that a step from s evaluates first."""
        return s

    def inner(self, s: float, end: float) -> tuple[float, ...]:
        """Return the noise levels of a step's further evaluations; end > 0."""
        return ()

    def nodes(self, schedule: Schedule) -> list[tuple[Any, float]]:
        """Return the grid, [(t, s)], with (CLEAN, 0) at its end."""
        if self.grid == "time_uniform":
            times = np.linspace(1.0, T_END if self.t_end is None else self.t_end, self.steps)
            sigmas = [noise_level(schedule, t) for t in times]
        else:
            sigmas = noise_levels(self.grid, self.steps, self.sigma_min, self.sigma_max, self.rho, self.t_end)
            times = [time_of(schedule, s) for s in sigmas]
        if not all(0 < s < math.inf for s in sigmas):
            raise ValueError(f"{self}: the noise level is 0 at t_end or infinite at t = 1: raise sampler.t_end")
        return [*zip(map(float, times), sigmas, strict=True), (CLEAN, 0.0)]

    def start(self, process: Process) -> float:
        return self.nodes(process.schedules[0])[0][0]

    def plan(self, schedule: Schedule) -> Plan:
        nodes = self.nodes(schedule)
        times = {s: t for t, s in nodes}

        def time(s: float) -> Any:
            return times[s] if s in times else time_of(schedule, s)

        plan = []
        for (_, s), (t_end, end) in itertools.pairwise(nodes):
            s = self.raised(s)
            inner = self.inner(s, end) if end else ()
            plan.append((time(s), *map(time, inner), t_end))
        return plan

    def rows(self, schedule: Schedule, plan: Plan) -> list[Row]:
        """Return the updates in x: the state after an evaluation has the alpha of the next evaluation's time."""
        sigmas = [tuple(noise_level(schedule, t) for t in times) for times in plan]
        points = [marginal(schedule, t) for times in plan for t in times[:-1]] + [marginal(schedule, CLEAN)]
        rows = []
        for times, updates in zip(plan, self.updates(sigmas), strict=True):
            base_alpha = points[len(rows)][0]
            for i, update in enumerate(updates):
                (alpha, sigma), (next_alpha, _) = points[len(rows)], points[len(rows) + 1]
                row = Row(
                    t=times[i],
                    output=X0 if self.output_x0 else (1 / sigma, -alpha / sigma),
                    base=update.base * next_alpha / base_alpha,
                    history=tuple(next_alpha * weight for weight in update.history),
                    noise=next_alpha * update.noise,
                    commit=i + 1 == len(updates),
                    last_noise=next_alpha * update.last_noise,
                )
                rows.append(row)
        return rows


def noise_level(schedule: Schedule, t: Time) -> float:
    """Return s = sigma / alpha at t."""
    alpha, sigma = marginal(schedule, t)
    return sigma / alpha


def time_of(schedule: Schedule, s: float) -> float:
    """Return the time at which sigma / alpha is s.

    Raises ValueError for an s above the largest noise level of a variance preserving schedule.
    """
    t = float(schedule.inverse_log_snr(-np.log(s)))
    alpha, sigma = schedule(1.0)
    if t > 1 + 1e-9 and alpha < 1:
        raise ValueError(
            f"the noise level {s:.6g} is above {sigma / alpha:.6g}, the schedule's largest (at t = 1): "
            "lower sigma_max, or s_tmax if churn raises the level"
        )
    return t


def check_not_negative(**options: float) -> None:
    """Raise ValueError, naming the option, for a negative value."""
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"sampler.{name} = {value}: expected 0 or more")
