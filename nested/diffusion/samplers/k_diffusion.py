"""The samplers of EDM and k-diffusion, for any process: stated in x / alpha against the noise level s = sigma / alpha.

There the probability-flow ODE is dx/ds = (x - D) / s with D = denoise(x) the estimate of x0 (arXiv 2206.00364, Eq. 1 at
alpha = 1). nested/diffusion/samplers/noise_levels.py has the grids and carries a method over to x. Names, constants
and defaults are those of k_diffusion/sampling.py (4601bf08), which HDiT (arXiv 2401.11605) samples with. From the
level s to e, with q = e / s and h = log(s / e), the methods are

    euler         x <- q x + (1 - q) D                                                (all methods at e = 0: x = D)
    two stages    x_m by an Euler step to an inner level m, D_m = denoise(x_m), then
                  x <- q x + (1 - q) ((1 - w) D + w D_m)
                  heun m = e, w = 1 / 2q | dpm2 m = sqrt(s e), w = s / m | dpmpp_2s m = sqrt(s e), w = 1 |
                  dpmpp_sde m = s^(1 - r) e^r, w = 1 / 2r
    ancestral     the same to `down` in place of e, then noise of deviation `up`: up^2 + down^2 = e^2 (`ancestral`)
    churn         first up to (1 + gamma) s by noise of deviation s_noise sqrt((1 + gamma)^2 s^2 - s^2)
    lms           x <- x + sum_j c_j (x - D)_{-j} / s_{-j}: Adams-Bashforth, the c_j integrals of Lagrange polynomials
    multistep     with H = (1 + eta) h, phi_1 = 1 - e^-H, phi_2 = 1 - phi_1 / H, phi_3 = phi_2 / H - 1/2:
                  x <- e^-H x + phi_1 D + phi_2 D1 - phi_3 D2 + e sqrt(1 - e^(-2 eta h)) s_noise n
                  D1, D2: `backward_differences` of the last 2 (2m) or 3 (3m) outputs; midpoint: phi_1 / 2 for phi_2

Below 20 to 25 steps the 3M SDE and DPM2 ancestral overshoot: Gaussian data of deviation .5 come out at 5 / 10 / 25 / 50
steps with .86 / .99 / .51 / .50 and 2.25 / .74 / .53 / .51 (Karras levels .01 to 80).

Departures from the authors' code. Noise is drawn per sample and row; the Brownian tree's law is kept: the two noises of
a dpmpp_sde step share the path from s, all others cover disjoint noise levels. A single step works for every sampler.
The noise levels are those of the first schedule; a leaf with another schedule takes its own s at the same times, inner
ones included (so for leaves of unlike schedules 'time_uniform' is the grid that brings each of them close to the data).
dpm_fast is DPMSolver(steps, 3, 'dpm_solver', 'fast', 'log_snr', 'log_snr') from t = 1 to t_end, without its noise;
dpm_adaptive chooses its steps while it runs and fits no table.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.polynomial import polynomial

from nested.diffusion.process import check_name
from nested.diffusion.samplers.noise_levels import OnNoiseLevels, Update, ancestral, check_not_negative, noise_level
from nested.diffusion.samplers.table import Plan, backward_differences
from nested.diffusion.schedules import Schedule


class OneStep(OnNoiseLevels):
    """Methods that start afresh at every step: one evaluation, or two if `inner` gives a noise level."""

    def second_weight(self, s: float, inner: float, end: float) -> float:
        """Return w, the weight of the inner evaluation."""
        return 1.0

    def added_noise(self) -> tuple[float, float]:
        """Return (eta, s_noise) of `ancestral`: no noise."""
        return 0.0, 0.0

    def updates(self, sigmas: list[tuple[float, ...]]) -> list[list[Update]]:
        return [self.step(*times) for times in sigmas]

    def step(self, s: float, *sigmas: float) -> list[Update]:
        """Return the updates of the step from s through the inner noise levels to the last of `sigmas`."""
        *inner, end = sigmas
        eta, s_noise = self.added_noise()
        down, up = ancestral(s, end, eta)
        noise = s_noise * up
        if not inner:
            return [_update(s, down, noise=noise)]
        return [_update(s, inner[0]), _update(s, down, self.second_weight(s, inner[0], end), noise)]


@dataclasses.dataclass(frozen=True)
class Churned(OneStep):
    """EDM's stochastic sampling (its Algorithm 2): noise before the steps whose start is within [s_tmin, s_tmax].

    s_churn sets gamma = min(s_churn / steps, sqrt 2 - 1).
    """

    s_churn: Annotated[float, "how much noise is added before steps; 0: none"] = 0.0
    s_tmin: Annotated[float, "the smallest noise level that noise is added at"] = 0.0
    s_tmax: Annotated[float, "the largest noise level that noise is added at"] = math.inf
    s_noise: Annotated[float, "factor on the noise"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(s_churn=self.s_churn, s_noise=self.s_noise)
        if not 0 <= self.s_tmin <= self.s_tmax:
            raise ValueError(
                f"sampler.s_tmin = {self.s_tmin}, sampler.s_tmax = {self.s_tmax}: expected 0 <= s_tmin <= s_tmax"
            )

    def raised(self, s: float) -> float:
        within = self.s_tmin * (1 - 1e-9) <= s <= self.s_tmax * (1 + 1e-9)  # the grid's end points, to rounding
        return s * (1 + min(self.s_churn / self.steps, math.sqrt(2) - 1)) if within else s

    def updates(self, sigmas: list[tuple[float, ...]]) -> list[list[Update]]:
        """Return the updates; the noise before a step is added at the end of the one before it."""
        result = super().updates(sigmas)
        for updates, (*_, end), (raised, *_) in zip(result, sigmas, sigmas[1:], strict=False):
            updates[-1] = updates[-1]._replace(noise=self.s_noise * np.sqrt(raised**2 - end**2))
        return result

    def opening(self, schedule: Schedule, plan: Plan, start: float) -> tuple[float, float] | None:
        first = plan[0][0]
        if first == start:
            return None
        noise = self.s_noise * np.sqrt(noise_level(schedule, first) ** 2 - noise_level(schedule, start) ** 2)
        alpha = schedule(first)[0]
        return alpha / schedule(start)[0], alpha * noise


@dataclasses.dataclass(frozen=True)
class Ancestral(OneStep):
    """A step down and noise back up (`ancestral`)."""

    eta: Annotated[float, "how much of the step's noise is drawn anew: 0 none, 1 all of it"] = 1.0
    s_noise: Annotated[float, "factor on the noise"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(eta=self.eta, s_noise=self.s_noise)

    def added_noise(self) -> tuple[float, float]:
        return self.eta, self.s_noise


@dataclasses.dataclass(frozen=True)
class Euler(Churned):
    """Euler's method in `steps` evaluations; without churn it is DDIM with eta = 0."""


@dataclasses.dataclass(frozen=True)
class Heun(Churned):
    """EDM's second-order sampler, in 2 steps - 1 evaluations."""

    def inner(self, s: float, end: float) -> tuple[float, ...]:
        return (end,)

    def second_weight(self, s: float, inner: float, end: float) -> float:
        return s / (2 * inner)


@dataclasses.dataclass(frozen=True)
class DPM2(Churned):
    """The midpoint method, with the midpoint halfway in log s, in 2 steps - 1 evaluations."""

    def inner(self, s: float, end: float) -> tuple[float, ...]:
        return (np.sqrt(s * end),)

    def second_weight(self, s: float, inner: float, end: float) -> float:
        return s / inner


@dataclasses.dataclass(frozen=True)
class EulerAncestral(Ancestral):
    """Euler's method down to `down`, in `steps` evaluations."""


@dataclasses.dataclass(frozen=True)
class DPMpp2SAncestral(Ancestral):
    """DPM-Solver++(2S) down to `down`, in 2 steps - 1 evaluations; a step is Euler's if eta > 1 makes `down` 0."""

    def inner(self, s: float, end: float) -> tuple[float, ...]:
        down, _ = ancestral(s, end, self.eta)
        return (np.sqrt(s * down),) if down else ()


@dataclasses.dataclass(frozen=True)
class DPM2Ancestral(DPMpp2SAncestral):
    """DPM2 down to `down`, with the evaluations of DPMpp2SAncestral."""

    def second_weight(self, s: float, inner: float, end: float) -> float:
        return s / inner


@dataclasses.dataclass(frozen=True)
class DPMppSDE(Ancestral):
    """DPM-Solver++ for the SDE, singlestep, in 2 steps - 1 evaluations.

    The noises n of s to m and n' of s to e are increments of one Brownian motion in s, of correlation
    sqrt((s - m) / (s - e)). Raises ValueError for an r outside (0, 1].
    """

    r: Annotated[float, "how far in log s the inner evaluation is, in (0, 1]"] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.r <= 1:
            raise ValueError(f"sampler.r = {self.r}: expected 0 < r <= 1")

    def inner(self, s: float, end: float) -> tuple[float, ...]:
        return (s ** (1 - self.r) * end**self.r,)

    def second_weight(self, s: float, inner: float, end: float) -> float:
        return 1 / (2 * self.r)

    def step(self, s: float, *sigmas: float) -> list[Update]:
        first, *second = super().step(s, *sigmas)
        if not second:
            return [first]
        inner, end = sigmas
        down, up = ancestral(s, inner, self.eta)
        shared = np.sqrt((s - inner) / (s - end))
        noise = second[0].noise
        return [
            _update(s, down, noise=self.s_noise * up),
            second[0]._replace(noise=noise * np.sqrt(1 - shared**2), last_noise=noise * shared),
        ]


@dataclasses.dataclass(frozen=True)
class LMS(OnNoiseLevels):
    """Linear multistep (Adams-Bashforth in s), in `steps` evaluations. Raises ValueError for an order below 1."""

    order: Annotated[int, "how many slopes a step uses"] = 4

    output_x0: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order < 1:
            raise ValueError(f"sampler.order = {self.order}: expected at least 1")

    def updates(self, sigmas: list[tuple[float, ...]]) -> list[list[Update]]:
        starts = [s for s, _ in sigmas]
        return [
            [Update(1.0, lms_coefficients(starts[max(0, k + 1 - self.order) : k + 1][::-1], end))]
            for k, (_, end) in enumerate(sigmas)
        ]


def lms_coefficients(sigmas: Sequence[float], end: float) -> tuple[float, ...]:
    """Return the integrals from sigmas[0] to `end` of the noise levels' Lagrange polynomials (newest first)."""
    nodes = np.asarray(sigmas) - sigmas[0]
    coefficients = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        integral = polynomial.polyint(polynomial.polyfromroots(others))
        coefficients.append(polynomial.polyval(end - sigmas[0], integral) / np.prod(node - others))
    return tuple(coefficients)


@dataclasses.dataclass(frozen=True)
class DPMpp2M(OnNoiseLevels):
    """DPM-Solver++(2M), in `steps` evaluations."""

    def updates(self, sigmas: list[tuple[float, ...]]) -> list[list[Update]]:
        return _multistep(sigmas, order=2, midpoint=True, eta=0.0, s_noise=1.0)


@dataclasses.dataclass(frozen=True)
class DPMpp2MSDE(OnNoiseLevels):
    """DPM-Solver++(2M) for the SDE, in `steps` evaluations."""

    eta: Annotated[float, "0: the ODE; 1: the SDE"] = 1.0
    s_noise: Annotated[float, "factor on the noise"] = 1.0
    solver_type: Annotated[Literal["midpoint", "heun"], "the second-order term"] = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(eta=self.eta, s_noise=self.s_noise)
        check_name("sampler.solver_type", self.solver_type, ("midpoint", "heun"))

    def updates(self, sigmas: list[tuple[float, ...]]) -> list[list[Update]]:
        return _multistep(sigmas, 2, self.solver_type == "midpoint", self.eta, self.s_noise)


@dataclasses.dataclass(frozen=True)
class DPMpp3MSDE(OnNoiseLevels):
    """DPM-Solver++(3M) for the SDE, HDiT's sampler, in `steps` evaluations; use 25 or more."""

    eta: Annotated[float, "0: the ODE; 1: the SDE"] = 1.0
    s_noise: Annotated[float, "factor on the noise"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(eta=self.eta, s_noise=self.s_noise)

    def updates(self, sigmas: list[tuple[float, ...]]) -> list[list[Update]]:
        return _multistep(sigmas, 3, False, self.eta, self.s_noise)


def _multistep(
    sigmas: list[tuple[float, ...]], order: int, midpoint: bool, eta: float, s_noise: float
) -> list[list[Update]]:
    log_snr = [-np.log(s) for s, _ in sigmas]
    result = []
    for k, (s, end) in enumerate(sigmas):
        if end == 0:
            result.append([_update(s, end)])
            continue
        first, second = backward_differences(log_snr[max(0, k + 1 - order) : k + 2])
        h = log_snr[k + 1] - log_snr[k]
        phi_1 = -np.expm1(-(1 + eta) * h)
        phi_2 = 1 - phi_1 / ((1 + eta) * h)
        phi_3 = phi_2 / ((1 + eta) * h) - 0.5
        weights = phi_1 * np.eye(len(first))[0] + (phi_1 / 2 if midpoint else phi_2) * first - phi_3 * second
        noise = s_noise * end * np.sqrt(-np.expm1(-2 * eta * h))
        result.append([Update(1 - phi_1, tuple(weights), noise)])
    return result


def _update(s: float, end: float, second_weight: float | None = None, noise: float = 0.0) -> Update:
    """x <- q x + (1 - q) D, where D may be mixed with that of an inner evaluation (newest first)."""
    q = end / s
    history = (1 - q,) if second_weight is None else ((1 - q) * second_weight, (1 - q) * (1 - second_weight))
    return Update(q, history, noise)
