"""Samplers: sampler(keys, denoise, process, x_T, cond) -> x0. Each is a frozen dataclass that writes its method's
coefficients into a table (nested/diffusion/samplers/table.py, which also holds the loop that runs it). Those of EDM and
k-diffusion, stated in x / alpha against sigma / alpha, are in nested/diffusion/samplers/k_diffusion.py.

DDIM, DDPM (arXiv 2010.02502, 2006.11239): t uniform from 1 to t_end, then a last step to the clean x0. DDIM with
eta = 1 is DDPM with the posterior variance; with eta = 0 it is Euler in sigma / alpha.

DPM-Solver (noise prediction, arXiv 2206.00927) and DPM-Solver++ (data prediction, arXiv 2211.01095) are those of
U-ViT's dpm_solver_pp.py; its older dpm_solver_pytorch.py, which samples the VPSDE models, is algorithm 'dpm_solver',
method 'fast', grid and intermediate 'log_snr', t_end 1e-4. With h = lambda_t - lambda_s, g = 1 for data, -1 for noise
prediction, (A, B) = (sigma_t / sigma_s, alpha_t) or (alpha_t / alpha_s, sigma_t), and

    phi_1 = expm1(-g h),   phi_2 = phi_1 / h + g,   phi_3 = phi_2 / h - 1/2,

a step from s to t is

    x_t = A x_s - B phi_1 m_s + g B phi_2 D1 - B phi_3 D2

where D1 and D2 estimate h m' and h^2 m'' from the outputs at hand. Kept from the authors' code: solver_type
'dpm_solver' puts -phi_1 / 2 for g phi_2 at order 2, and D1 = (m_s2 - m_s) / r2, D2 = 0 at singlestep order 3; the
multistep D2 is half of h^2 m''; order 1 and multistep order 3 are the same for both solver types. Departures: their
multistep branch (it reads a variable before it is set) works here; singlestep with steps not divisible by the order is
an error, not fewer steps. These solvers return x(t_end), without a last denoising step, as the authors run them.
"""

import dataclasses
import itertools
import math
from typing import ClassVar

import numpy as np

from nested.diffusion.process import check_name
from nested.diffusion.samplers.table import CLEAN, X0, Row, Sampler, backward_differences, marginal

GRIDS = {  # name -> (the times of N evaluations in steps of a chain of 1,000; None for times that are not such steps)
    "uniform": None,
    "released": lambda steps: np.round(np.arange(steps + 1) * (1001 / (steps + 1)))[:0:-1],
    "trailing": lambda steps: np.round(1000 - np.arange(steps) * (1000 / steps)),
}


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """eta in [0, 1]: 0 deterministic, 1 DDPM's ancestral sampling. `steps` evaluations.

    grid: the times of the evaluations, before the last step to clean data. 'uniform' from 1 to t_end (None: 1e-3);
    'released', those of ml-mdm's samplers (250 steps begin at 997 / 1000); 'trailing', evenly from 1 to 1 / steps.
    """

    steps: int
    eta: float = 0.0
    t_end: float | None = None
    grid: str = "uniform"

    def __post_init__(self):
        _check_grid(self.steps, self.t_end, self.grid)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta = {self.eta}: expected a number from 0 to 1")

    def plan(self, schedule):
        return _grid_steps(self.steps, self.t_end, self.grid)

    def start(self, process):
        return self.plan(None)[0][0]

    def rows(self, schedule, plan):
        rows = []
        for start, end in plan:
            (alpha_s, sigma_s), (alpha_t, sigma_t) = marginal(schedule, start), marginal(schedule, end)
            ratio = alpha_s * sigma_t / (alpha_t * sigma_s)  # in [0, 1)
            noise = self.eta * sigma_t * math.sqrt(1 - ratio**2)
            base = math.sqrt(sigma_t**2 - noise**2) / sigma_s
            rows.append(Row(start, X0, base, (alpha_t - base * alpha_s,), noise, True))
        return rows


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling, x_s ~ q(x_s | x_t, x0 = denoise(x_t)): DDIM with eta = 1."""

    steps: int
    t_end: float | None = None
    grid: str = "uniform"

    def __post_init__(self):
        _check_grid(self.steps, self.t_end, self.grid)

    def plan(self, schedule):
        return _grid_steps(self.steps, self.t_end, self.grid)

    def start(self, process):
        return self.plan(None)[0][0]

    def rows(self, schedule, plan):
        return DDIM(self.steps, 1.0, self.t_end, self.grid).rows(schedule, plan)


@dataclasses.dataclass(frozen=True)
class EulerInTime(Sampler):
    """Euler in x against t on dx/dt = beta/2 (eps / sigma - x), down to t = 0: ODE in U-ViT's sde.py.

    Raises ValueError for a schedule that has no beta(t).
    """

    steps: int
    t_end: float = 1e-3

    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        _check(self.steps, self.t_end)

    def plan(self, schedule):
        return _grid_steps(self.steps, self.t_end, "uniform")

    def rows(self, schedule, plan):
        if not hasattr(schedule, "beta"):
            name = type(self).__name__
            raise ValueError(f"sampler {name}: {schedule} has no beta(t): use Euler, in sigma / alpha, instead")
        rows, score = [], 2 if self.stochastic else 1
        for start, end in plan:
            alpha, sigma = schedule(start)
            change = (start - (0.0 if end is CLEAN else end)) * schedule.beta(start) / 2
            noise = math.sqrt(2 * change) if self.stochastic and end is not CLEAN else 0.0
            rows.append(Row(start, _eps(alpha, sigma), 1 + change, (-score * change / sigma,), noise, True))
        return rows


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(EulerInTime):
    """Euler-Maruyama in x against t on dx = (beta eps / sigma - beta/2 x) dt + sqrt(beta) dw, down to t = 0: ReverseSDE
    in U-ViT's sde.py, which samples its pixel models in 1,000 steps. The last step adds no noise.

    Raises ValueError for a schedule that has no beta(t).
    """

    stochastic = True


@dataclasses.dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver and DPM-Solver++; the defaults with steps = 50 are U-ViT's on ImageNet latents.

    steps: network evaluations. order: 1, 2 or 3. algorithm: 'dpm_solver' (noise) or 'dpm_solver++' (data prediction).
    method: 'multistep' (the first steps of lower order); 'singlestep' (steps divisible by order); 'fast' (singlestep of
    order 2 or 3, with lower orders at the end so that any number of steps comes out).
    grid: t uniform ('time_uniform') or lambda uniform ('log_snr') from t = 1 to t_end.
    intermediate: the inner evaluations of a singlestep are points of the grid ('grid'), or divide their own step evenly
    in lambda ('log_snr').
    Raises ValueError for anything else, and for options that do not go together.
    """

    steps: int
    order: int = 3
    algorithm: str = "dpm_solver++"
    method: str = "fast"
    grid: str = "time_uniform"
    intermediate: str = "grid"
    solver_type: str = "dpm_solver"
    t_end: float = 1e-3

    def __post_init__(self):
        _check(self.steps, self.t_end)
        check_name("sampler.order", self.order, (1, 2, 3))
        check_name("sampler.algorithm", self.algorithm, ("dpm_solver", "dpm_solver++"))
        check_name("sampler.method", self.method, ("singlestep", "fast", "multistep"))
        check_name("sampler.grid", self.grid, ("time_uniform", "log_snr"))
        check_name("sampler.intermediate", self.intermediate, ("grid", "log_snr"))
        check_name("sampler.solver_type", self.solver_type, ("dpm_solver", "taylor"))
        if self.method == "singlestep" and self.steps % self.order:
            raise ValueError(
                f"sampler.steps = {self.steps} is not divisible by sampler.order = {self.order}: "
                "method 'singlestep' needs it, 'fast' does not"
            )
        if self.method == "fast" and self.order == 1:
            raise ValueError("sampler.order = 1: method 'fast' mixes orders, use order 2 or 3, or method 'singlestep'")
        if self.method == "multistep" and self.intermediate != "grid":
            raise ValueError("sampler.intermediate = 'log_snr': method 'multistep' has none, use 'grid'")

    def plan(self, schedule):
        if self.method == "multistep":
            orders = [1] * self.steps
        elif self.method == "singlestep":
            orders = [self.order] * (self.steps // self.order)
        else:
            orders = _fast_orders(self.steps, self.order)
        if self.intermediate == "grid":
            times = self._times(schedule, self.steps)
            ends = np.cumsum([0, *orders])
            return [tuple(times[start : end + 1]) for start, end in itertools.pairwise(ends)]
        times = self._times(schedule, len(orders))
        plan = []
        for (start, end), order in zip(itertools.pairwise(times), orders, strict=True):
            log_snr = np.linspace(schedule.log_snr(start), schedule.log_snr(end), order + 1)
            plan.append((start, *schedule.inverse_log_snr(log_snr[1:-1]).tolist(), end))
        return plan

    def _times(self, schedule, intervals):
        if self.grid == "time_uniform":
            return np.linspace(1.0, self.t_end, intervals + 1).tolist()
        log_snr = np.linspace(schedule.log_snr(1.0), schedule.log_snr(self.t_end), intervals + 1)
        return schedule.inverse_log_snr(log_snr).tolist()

    def rows(self, schedule, plan):
        if self.method == "multistep":
            return self._multistep_rows(schedule, [plan[0][0]] + [end for _, end in plan])
        return [row for times in plan for row in self._singlestep_rows(schedule, times)]

    def _step(self, schedule, start, end, first, second, midpoint):
        """(base, weights) of the step from start to end. first (D1), second (D2), weights: vectors over the outputs, of
        which number 0 is the one at `start`. midpoint: -phi_1 / 2 for g phi_2."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(start), schedule(end)
        h = schedule.log_snr(end) - schedule.log_snr(start)
        if self.algorithm == "dpm_solver++":
            g, base, scale = 1, sigma_t / sigma_s, alpha_t
        else:
            g, base, scale = -1, alpha_t / alpha_s, sigma_t
        phi_1 = np.expm1(-g * h)
        phi_2 = phi_1 / h + g
        phi_3 = phi_2 / h - 0.5
        anchor = np.eye(len(first))[0]
        weights = -phi_1 * anchor + (-phi_1 / 2 if midpoint else g * phi_2) * first - phi_3 * second
        return base, scale * weights

    def _row(self, schedule, t, base, history, commit):
        output = X0 if self.algorithm == "dpm_solver++" else _eps(*schedule(t))
        return Row(t, output, base, tuple(history), 0.0, commit)

    def _singlestep_rows(self, schedule, times):
        """Evaluations at times[:-1]: the k-th leads to times[k + 1], the last one by the full order."""
        log_snr = [schedule.log_snr(t) for t in times]
        evaluations = len(times) - 1
        rows = []
        for k in range(evaluations):
            units = np.eye(k + 1)
            fractions = [(log_snr[i] - log_snr[0]) / (log_snr[k + 1] - log_snr[0]) for i in range(1, k + 1)]
            slopes = [(units[i + 1] - units[0]) / r for i, r in enumerate(fractions)]
            first, second = slopes[-1] if slopes else np.zeros(1), np.zeros(k + 1)
            simple = k + 1 == evaluations and self.solver_type == "dpm_solver"
            if k == 2 and not simple:
                (d1, d2), (r1, r2) = slopes, fractions
                first, second = (r2 * d1 - r1 * d2) / (r2 - r1), 2 * (d2 - d1) / (r2 - r1)
            base, weights = self._step(schedule, times[0], times[k + 1], first, second, simple and k == 1)
            rows.append(self._row(schedule, times[k], base, weights[::-1], k + 1 == evaluations))
        return rows

    def _multistep_rows(self, schedule, times):
        log_snr = [schedule.log_snr(t) for t in times]
        rows = []
        for k in range(len(times) - 1):
            order = min(k + 1, self.order)
            first, second = backward_differences(log_snr[k + 1 - order : k + 2])
            midpoint = order == 2 and self.solver_type == "dpm_solver"
            base, weights = self._step(schedule, times[k], times[k + 1], first, second, midpoint)
            rows.append(self._row(schedule, times[k], base, weights, True))
        return rows


def _eps(alpha, sigma):
    """m = eps = (x - alpha x0) / sigma."""
    return 1 / sigma, -alpha / sigma


def _grid_steps(steps, t_end, grid):
    if grid == "uniform":
        times = np.linspace(1.0, 1e-3 if t_end is None else t_end, steps)
    else:
        times = GRIDS[grid](steps) / 1000
    return list(itertools.pairwise([*times.tolist(), CLEAN]))


def _check_grid(steps, t_end, grid):
    _check(steps, 1e-3 if t_end is None else t_end)
    check_name("sampler.grid", grid, GRIDS)
    if grid != "uniform" and t_end is not None:
        raise ValueError(f"sampler.t_end = {t_end} has no effect with grid {grid!r}: remove it")
    if grid != "uniform" and steps > 1000:
        raise ValueError(f"sampler.steps = {steps}: grid {grid!r} has at most 1000")


def _fast_orders(steps, order):
    """Orders of the singlesteps of 'fast': the full order while it fits; 2, 1 for a last 3 that fills steps."""
    full, rest = divmod(steps, order)
    if order == 3 and rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)


def _check(steps, t_end):
    if steps < 1 or not 0 <= t_end < 1:
        raise ValueError(f"sampler.steps = {steps}, sampler.t_end = {t_end}: expected steps >= 1 and 0 <= t_end < 1")
