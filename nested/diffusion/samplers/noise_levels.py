"""Samplers stated in x / alpha against the noise level s = sigma / alpha: their grids, their tables for any process.

A method gives its steps between noise levels (`updates`) as if alpha were 1; `OnNoiseLevels` finds the times of the
levels in the process's first schedule, reads every leaf's own s at those times, and turns the steps into rows for x.
The grids are k-diffusion's (k_diffusion/sampling.py at 4601bf08), and t uniform.
"""

import abc
import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from nested.diffusion.process import check_name
from nested.diffusion.samplers.table import CLEAN, X0, Row, Sampler, marginal

GRIDS = {  # name -> its options
    "time_uniform": ("t_end",),
    "karras": ("sigma_min", "sigma_max", "rho"),
    "exponential": ("sigma_min", "sigma_max"),
    "polyexponential": ("sigma_min", "sigma_max", "rho"),
    "vp": ("t_end",),
}
DEFAULTS = {"karras": 7.0, "polyexponential": 1.0}  # of rho
T_END = 1e-3  # the default, k-diffusion's eps_s


def noise_levels(grid, steps, sigma_min=None, sigma_max=None, rho=None, t_end=None):
    """The `steps` noise levels s of a grid, falling, without the 0 that follows them. numpy float64.

    karras: s^(1/rho) linear; exponential: log s linear; polyexponential: log s as the rho-th power of a linear ramp;
    vp: those of the VP-SDE with beta from .1 to 20 at t uniform from 1 to t_end. (k_diffusion/sampling.py:17-44.)
    """
    ramp = np.linspace(1.0, 0.0, steps)
    if grid == "vp":
        t = np.linspace(1.0, T_END if t_end is None else t_end, steps)
        return np.sqrt(np.expm1(19.9 / 2 * t**2 + 0.1 * t))
    rho = DEFAULTS.get(grid, 1.0) if rho is None else rho
    if grid == "karras":
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        return (low + ramp * (high - low)) ** rho
    return np.exp(math.log(sigma_min) + ramp**rho * math.log(sigma_max / sigma_min))


def ancestral(start, end, eta):
    """(down, up): step deterministically to `down`, then add noise of deviation `up`; the level is then `end`."""
    up = min(end, eta * end * np.sqrt(1 - (end / start) ** 2))
    return np.sqrt(end**2 - up**2), up


class Update(NamedTuple):
    """In x / alpha, after an evaluation: x <- base x_base + sum_j history_j m_{-j} + noise n_k + last_noise n_{k-1}."""

    base: float
    history: tuple[float, ...]
    noise: float = 0.0
    last_noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class OnNoiseLevels(Sampler):
    """What the samplers below share: the grid, and the way from x / alpha to x.

    steps: number of levels; a last step to the clean x0 follows them. grid: 'time_uniform', t uniform from 1 to t_end
    (default .001), or noise levels from sigma_max to sigma_min: 'karras' (rho 7), 'exponential', 'polyexponential'
    (rho 1), or 'vp', those of k-diffusion's get_sigmas_vp (t_end .001).
    Raises ValueError for options that are not the grid's, for a range that is not 0 < sigma_min < sigma_max, and, once
    the process is known, for levels that a variance preserving schedule does not reach: its largest is that of t = 1.
    """

    steps: int
    grid: str = "time_uniform"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    t_end: float | None = None

    def __post_init__(self):
        check_name("sampler.grid", self.grid, GRIDS)
        if self.steps < 1:
            raise ValueError(f"sampler.steps = {self.steps}: expected at least 1")
        for option in ("sigma_min", "sigma_max", "rho", "t_end"):
            value, has = getattr(self, option), option in GRIDS[self.grid]
            if value is not None and not has:
                raise ValueError(f"sampler.{option} = {value}: sampler.grid = {self.grid!r} has none, leave it out")
            if value is None and has and option in ("sigma_min", "sigma_max"):
                raise ValueError(f"sampler.{option} is missing: sampler.grid = {self.grid!r} needs it")
        if self.sigma_max is not None and not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sampler.sigma_min = {self.sigma_min}, sampler.sigma_max = {self.sigma_max}: "
                "expected 0 < sigma_min < sigma_max"
            )
        if self.rho is not None and not self.rho > 0:
            raise ValueError(f"sampler.rho = {self.rho}: expected a positive number")
        if self.t_end is not None and not 0 <= self.t_end < 1:
            raise ValueError(f"sampler.t_end = {self.t_end}: expected 0 <= t_end < 1")

    @abc.abstractmethod
    def updates(self, sigmas) -> list[list[Update]]:
        """One list per step, one Update per evaluation. sigmas: of each step (start, inner levels ..., end)."""

    output_x0 = True  # m is D; False: m is the slope (x - D) / s

    def raised(self, s):
        """The level that a step from s evaluates first."""
        return s

    def inner(self, s, end) -> tuple:
        """Levels of a step's further evaluations; end > 0."""
        return ()

    def nodes(self, schedule):
        """The grid, [(t, s)], with (CLEAN, 0) at its end."""
        if self.grid == "time_uniform":
            times = np.linspace(1.0, T_END if self.t_end is None else self.t_end, self.steps)
            sigmas = [noise_level(schedule, t) for t in times]
        else:
            sigmas = noise_levels(self.grid, self.steps, self.sigma_min, self.sigma_max, self.rho, self.t_end)
            times = [time_of(schedule, s) for s in sigmas]
        if not all(0 < s < math.inf for s in sigmas):
            raise ValueError(f"{self}: the noise level is 0 at t_end or infinite at t = 1: raise sampler.t_end")
        return [*zip(map(float, times), sigmas, strict=True), (CLEAN, 0.0)]

    def start(self, process):
        return self.nodes(process.schedules[0])[0][0]

    def plan(self, schedule):
        nodes = self.nodes(schedule)
        times = {s: t for t, s in nodes}

        def time(s):
            return times[s] if s in times else time_of(schedule, s)

        plan = []
        for (_, s), (t_end, end) in itertools.pairwise(nodes):
            s = self.raised(s)
            inner = self.inner(s, end) if end else ()
            plan.append((time(s), *map(time, inner), t_end))
        return plan

    def rows(self, schedule, plan):
        """The updates, from x / alpha to x: the state after an evaluation is that of the next evaluation's time."""
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


def noise_level(schedule, t):
    """s = sigma / alpha at t."""
    alpha, sigma = marginal(schedule, t)
    return sigma / alpha


def time_of(schedule, s):
    """The time at which sigma / alpha is s. Raises ValueError above a variance preserving schedule's largest level."""
    t = float(schedule.inverse_log_snr(-np.log(s)))
    alpha, sigma = schedule(1.0)
    if t > 1 + 1e-9 and alpha < 1:
        raise ValueError(
            f"the noise level {s:.6g} is above {sigma / alpha:.6g}, the schedule's largest (at t = 1): "
            "lower sigma_max, or s_tmax where it comes from churn"
        )
    return t


def check_not_negative(**options):
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"sampler.{name} = {value}: expected 0 or more")
