"""DPM-Solver and DPM-Solver++ as U-ViT runs them.

DPM-Solver (noise prediction, arXiv 2206.00927) and DPM-Solver++ (data prediction, arXiv 2211.01095) are those of
U-ViT's dpm_solver_pp.py; its older dpm_solver_pytorch.py, which samples the VPSDE models, is algorithm 'dpm_solver',
method 'fast', grid and intermediate 'log_snr', t_end 1e-4. With h = lambda_t - lambda_s, g = 1 for data, -1 for noise
prediction, (A, B) = (sigma_t / sigma_s, alpha_t) or (alpha_t / alpha_s, sigma_t), and

    phi_1 = expm1(-g h),   phi_2 = phi_1 / h + g,   phi_3 = phi_2 / h - 1/2,

a step from s to t is

    x_t = A x_s - B phi_1 m_s + g B phi_2 D1 - B phi_3 D2

where D1 and D2 estimate h m' and h^2 m'' from the outputs so far. Kept from the authors' code: solver_type
'dpm_solver' puts -phi_1 / 2 for g phi_2 at order 2, and D1 = (m_s2 - m_s) / r2, D2 = 0 at singlestep order 3; the
multistep D2 is half of h^2 m''; order 1 and multistep order 3 are the same for both solver types. Departures: their
multistep branch (it reads a variable before it is set) works here; singlestep with steps not divisible by the order is
an error, not fewer steps. These solvers return x(t_end), without a last denoising step, as the authors run them.
"""

import dataclasses
import itertools
from typing import Annotated, Literal

import numpy as np

from nested.diffusion.process import check_name
from nested.diffusion.samplers.ddpm import check_steps, eps_output
from nested.diffusion.samplers.table import X0, Plan, Row, TableSampler, backward_differences
from nested.diffusion.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class DPMSolver(TableSampler):
    """DPM-Solver and DPM-Solver++; the defaults with 50 steps are U-ViT's on ImageNet latents.

    method: 'multistep' (the first steps are of lower order); 'singlestep' (steps divisible by order); 'fast'
    (singlestep of order 2 or 3, with lower orders at the end so that any number of steps comes out).
    intermediate: the inner evaluations of a singlestep are points of the grid ('grid'), or divide their own step evenly
    in lambda ('log_snr').
    Raises ValueError for other values, and for options that do not go together.
    """

    steps: Annotated[int, "network evaluations"]
    order: Annotated[Literal[1, 2, 3], "order of the solver"] = 3
    algorithm: Annotated[Literal["dpm_solver", "dpm_solver++"], "the prediction it works on: the noise | the data"] = (
        "dpm_solver++"
    )
    method: Annotated[
        Literal["singlestep", "fast", "multistep"], "fast: singlestep, with lower orders at the end for any steps"
    ] = "fast"
    grid: Annotated[Literal["time_uniform", "log_snr"], "from t = 1 to t_end: uniform in t | in log SNR"] = (
        "time_uniform"
    )
    intermediate: Annotated[Literal["grid", "log_snr"], "inner evaluations: grid points | even in log SNR"] = "grid"
    solver_type: Annotated[Literal["dpm_solver", "taylor"], "second-order term: midpoint | Taylor"] = "dpm_solver"
    t_end: Annotated[float, "the time that sampling ends at"] = 1e-3

    def __post_init__(self) -> None:
        check_steps(self.steps, self.t_end)
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

    def plan(self, schedule: Schedule) -> Plan:
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

    def _times(self, schedule: Schedule, intervals: int) -> list[float]:
        if self.grid == "time_uniform":
            return np.linspace(1.0, self.t_end, intervals + 1).tolist()
        log_snr = np.linspace(schedule.log_snr(1.0), schedule.log_snr(self.t_end), intervals + 1)
        return schedule.inverse_log_snr(log_snr).tolist()

    def rows(self, schedule: Schedule, plan: Plan) -> list[Row]:
        if self.method == "multistep":
            return self._multistep_rows(schedule, [plan[0][0]] + [end for _, end in plan])
        return [row for times in plan for row in self._singlestep_rows(schedule, times)]

    def _step(
        self, schedule: Schedule, start: float, end: float, first: np.ndarray, second: np.ndarray, midpoint: bool
    ) -> tuple[float, np.ndarray]:
        """(base, weights) of the step from start to end.

        first (D1), second (D2) and the weights are vectors over the outputs, of which number 0 is the one at `start`.
        midpoint: whether -phi_1 / 2 takes the place of g phi_2.
        """
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

    def _row(self, schedule: Schedule, t: float, base: float, history: np.ndarray, commit: bool) -> Row:
        output = X0 if self.algorithm == "dpm_solver++" else eps_output(*schedule(t))
        return Row(t, output, base, tuple(history), 0.0, commit)

    def _singlestep_rows(self, schedule: Schedule, times: tuple[float, ...]) -> list[Row]:
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

    def _multistep_rows(self, schedule: Schedule, times: list[float]) -> list[Row]:
        log_snr = [schedule.log_snr(t) for t in times]
        rows = []
        for k in range(len(times) - 1):
            order = min(k + 1, self.order)
            first, second = backward_differences(log_snr[k + 1 - order : k + 2])
            midpoint = order == 2 and self.solver_type == "dpm_solver"
            base, weights = self._step(schedule, times[k], times[k + 1], first, second, midpoint)
            rows.append(self._row(schedule, times[k], base, weights, True))
        return rows


def _fast_orders(steps: int, order: int) -> list[int]:
    """The orders of the singlesteps of 'fast': the full order while it fits, and 2, 1 for a 3 that would end it."""
    full, rest = divmod(steps, order)
    if order == 3 and rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)
