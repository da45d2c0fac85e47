"""DDIM and DDPM, and Euler's methods in time. Each sampler writes its coefficients into a table (table.py).

DDIM, DDPM (arXiv 2010.02502, 2006.11239): t uniform from 1 to t_end, then a last step to the clean x0. DDIM with
eta = 1 is DDPM with the posterior variance; with eta = 0 it is Euler in sigma / alpha.
EulerInTime, EulerMaruyama: the ODE and the SDE of a variance preserving schedule, integrated in t (U-ViT's sde.py).
"""

import dataclasses
import itertools
import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from nested.diffusion.process import Process, check_name
from nested.diffusion.samplers.table import CLEAN, X0, Plan, Row, TableSampler, marginal
from nested.diffusion.schedules import Schedule

Grid = Literal["uniform", "released", "trailing"]
GRIDS = {  # name -> (the times of N evaluations in steps of a chain of 1,000; None for times that are not such steps)
    "uniform": None,
    "released": lambda steps: np.round(np.arange(steps + 1) * (1001 / (steps + 1)))[:0:-1],
    "trailing": lambda steps: np.round(1000 - np.arange(steps) * (1000 / steps)),
}


@dataclasses.dataclass(frozen=True)
class OnTimeGrid(TableSampler):
    """What DDIM and DDPM share: the times of the evaluations, before the last step to clean data.

    grid: 'uniform' from 1 to t_end (None: 1e-3); 'released', the times of ml-mdm's samplers (250 steps begin at
    997 / 1000); 'trailing', evenly from 1 to 1 / steps.
    Raises ValueError for a grid that does not exist, and for steps or t_end that do not fit the grid.
    """

    steps: Annotated[int, "network evaluations"]
    t_end: Annotated[float | None, "uniform: the time of the last evaluation; None is 1e-3"] = None
    grid: Annotated[Grid, "uniform from 1 to t_end | released: ml-mdm's times | trailing: from 1 to 1 / steps"] = (
        "uniform"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps, 1e-3 if self.t_end is None else self.t_end)
        check_name("sampler.grid", self.grid, GRIDS)
        if self.grid != "uniform" and self.t_end is not None:
            raise ValueError(f"sampler.t_end = {self.t_end} has no effect with grid {self.grid!r}: remove it")
        if self.grid != "uniform" and self.steps > 1000:
            raise ValueError(f"sampler.steps = {self.steps}: grid {self.grid!r} has at most 1000")

    def plan(self, schedule: Schedule | None) -> Plan:
        return _grid_steps(self.steps, self.t_end, self.grid)

    def start(self, process: Process) -> float:
        return self.plan(None)[0][0]


@dataclasses.dataclass(frozen=True)
class DDIM(OnTimeGrid):
    """DDIM. Raises ValueError for an eta outside [0, 1], and as OnTimeGrid does."""

    eta: Annotated[float, "0: deterministic; 1: DDPM's ancestral sampling"] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta = {self.eta}: expected a number from 0 to 1")

    def rows(self, schedule: Schedule, plan: Plan) -> list[Row]:
        return _ddim_rows(schedule, plan, self.eta)


@dataclasses.dataclass(frozen=True)
class DDPM(OnTimeGrid):
    """Ancestral sampling, x_s ~ q(x_s | x_t, x0 = denoise(x_t)): DDIM with eta = 1."""

    def rows(self, schedule: Schedule, plan: Plan) -> list[Row]:
        return _ddim_rows(schedule, plan, 1.0)


@dataclasses.dataclass(frozen=True)
class EulerInTime(TableSampler):
    """Euler in x against t on dx/dt = beta/2 (eps / sigma - x), down to t = 0: ODE in U-ViT's sde.py.

    Raises ValueError for steps below 1, for a t_end outside [0, 1), and for a schedule that has no beta(t).
    """

    steps: Annotated[int, "network evaluations"]
    t_end: Annotated[float, "the time of the last evaluation"] = 1e-3

    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_steps(self.steps, self.t_end)

    def plan(self, schedule: Schedule) -> Plan:
        return _grid_steps(self.steps, self.t_end, "uniform")

    def rows(self, schedule: Any, plan: Plan) -> list[Row]:
        if not hasattr(schedule, "beta"):
            name = type(self).__name__
            raise ValueError(f"sampler {name}: {schedule} has no beta(t): use Euler, in sigma / alpha, instead")
        rows, score = [], 2 if self.stochastic else 1
        for start, end in plan:
            alpha, sigma = schedule(start)
            change = (start - (0.0 if end is CLEAN else end)) * schedule.beta(start) / 2
            noise = math.sqrt(2 * change) if self.stochastic and end is not CLEAN else 0.0
            rows.append(Row(start, eps_output(alpha, sigma), 1 + change, (-score * change / sigma,), noise, True))
        return rows


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(EulerInTime):
    """Euler-Maruyama in x against t on dx = (beta eps / sigma - beta/2 x) dt + sqrt(beta) dw, down to t = 0.

    This is ReverseSDE in U-ViT's sde.py, which samples its pixel models in 1,000 steps. The last step adds no noise.
    Raises ValueError as EulerInTime does.
    """

    stochastic: ClassVar[bool] = True


def eps_output(alpha: float, sigma: float) -> tuple[float, float]:
    """Return the Row.output of m = eps = (x - alpha x0) / sigma."""
    return 1 / sigma, -alpha / sigma


def check_steps(steps: int, t_end: float) -> None:
    """Raise ValueError unless steps >= 1 and 0 <= t_end < 1."""
    if steps < 1 or not 0 <= t_end < 1:
        raise ValueError(f"sampler.steps = {steps}, sampler.t_end = {t_end}: expected steps >= 1 and 0 <= t_end < 1")


def _ddim_rows(schedule: Schedule, plan: Plan, eta: float) -> list[Row]:
    rows = []
    for start, end in plan:
        (alpha_s, sigma_s), (alpha_t, sigma_t) = marginal(schedule, start), marginal(schedule, end)
        ratio = alpha_s * sigma_t / (alpha_t * sigma_s)  # in [0, 1)
        noise = eta * sigma_t * math.sqrt(1 - ratio**2)
        base = math.sqrt(sigma_t**2 - noise**2) / sigma_s
        rows.append(Row(start, X0, base, (alpha_t - base * alpha_s,), noise, True))
    return rows


def _grid_steps(steps: int, t_end: float | None, grid: Grid) -> Plan:
    chain_steps = GRIDS[grid]
    if chain_steps is None:
        times = np.linspace(1.0, 1e-3 if t_end is None else t_end, steps)
    else:
        times = chain_steps(steps) / 1000
    return list(itertools.pairwise([*times.tolist(), CLEAN]))
