"""Noise schedules t -> (alpha, sigma), and the densities of the noise levels that training sees.

`ExponentialVE` is EDM's x_t = x0 + sigma eps (arXiv 2206.00364) with log sigma linear in t; `PiecewiseVP` is the DDPM
chain of betas read as a continuous process, log alpha linear between t_i = i / N (the 'discrete' schedule of
DPM-Solver, arXiv 2206.00927, and of U-ViT's dpm_solver_pp.py); `LinearVP` is the VP-SDE of Song et al. (2011.13456).
`Shifted` divides another schedule's SNR, as Matryoshka does level by level (2310.15111, Sec. 3.3 and App. A).
Departures from the authors' code: sigma = sqrt(-expm1(2 log alpha)), which keeps its digits at small t; below t = 1/N
log alpha runs to alpha(0) = 1, while theirs extends the next segment and crosses 0.

Densities map u uniform in [0, 1) to s = sigma / alpha, by the inverse distribution function, so that stratified u give
stratified noise levels (k_diffusion/utils.py:267-385, whose laws and end points these are).

Arithmetic is float32, or float64 if the inputs are; numpy in, numpy float64 out (sampler tables).
"""

import abc
import dataclasses
import functools
import math
from types import ModuleType
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Schedule(Protocol):
    """What a Process and the samplers use of a schedule: numpy in, numpy float64 out (for tables); jax in, jax out.

    The Euler samplers in time also use beta(t), and the learned variance log_alpha(t), of VariancePreserving.
    """

    def __call__(self, t: Any, /) -> tuple[Any, Any]:
        """Return (alpha, sigma) at t, of t's shape."""
        ...

    def log_snr(self, t: Any, /) -> Any:
        """Return lambda = log(alpha / sigma) at t; it decreases in t."""
        ...

    def inverse_log_snr(self, log_snr: Any, /) -> Any:
        """Return the t at which log(alpha / sigma) has this value."""
        ...

    def prior_std(self, t: Any, /) -> Any:
        """Return the standard deviation of the state that sampling starts from at t."""
        ...


class Density(Protocol):
    """A law of noise levels, as its inverse distribution function."""

    def __call__(self, u: jax.Array, /) -> jax.Array:
        """Return the noise levels s = sigma / alpha for u in [0, 1), of u's shape."""
        ...


class VariancePreserving(abc.ABC):
    """A schedule with alpha^2 + sigma^2 = 1. A subclass gives log_alpha and, unless it is Shifted, the others."""

    @abc.abstractmethod
    def log_alpha(self, t: Any) -> Any:
        """Return log alpha at t."""

    def inverse_log_alpha(self, log_alpha: Any) -> Any:
        """Return the t at which log alpha has this value."""
        raise NotImplementedError

    def __call__(self, t: Any) -> tuple[Any, Any]:
        t, xp = as_float(t)
        log_alpha = self.log_alpha(t)
        return xp.exp(log_alpha), xp.sqrt(xp.abs(xp.expm1(2 * log_alpha)))

    def log_snr(self, t: Any) -> Any:
        """Return log(alpha / sigma) at t."""
        t, xp = as_float(t)
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * xp.log(xp.abs(xp.expm1(2 * log_alpha)))

    def inverse_log_snr(self, log_snr: Any) -> Any:
        """Return the t at which log(alpha / sigma) has this value."""
        log_snr, xp = as_float(log_snr)
        return self.inverse_log_alpha(-0.5 * xp.logaddexp(-2.0 * log_snr, xp.zeros_like(log_snr)))

    def prior_std(self, t: Any) -> Any:
        """Return 1: the data's deviation, and so that of every marginal."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearVP(VariancePreserving):
    """dx = -beta/2 x dt + sqrt(beta) dw with beta(t) = beta_min + t (beta_max - beta_min); U-ViT's VPSDE (sde.py)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Any) -> Any:
        t, _ = as_float(t)
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def beta(self, t: Any) -> Any:
        """Return beta(t)."""
        t, _ = as_float(t)
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def inverse_log_alpha(self, log_alpha: Any) -> Any:
        log_alpha, xp = as_float(log_alpha)
        root = xp.sqrt(self.beta_min**2 - 4 * (self.beta_max - self.beta_min) * log_alpha)
        return -4 * log_alpha / (self.beta_min + root)


@dataclasses.dataclass(frozen=True)
class PiecewiseVP(VariancePreserving):
    """The chain alpha_n^2 = prod_{i<=n} (1 - beta_i), n = 0..N, at t = n / N, and log alpha linear in between."""

    betas: tuple[float, ...]

    @functools.cached_property
    def _nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """log alpha at t = 0, 1/N ... 1, and its N differences."""
        nodes = 0.5 * np.cumsum([0.0, *np.log1p(-np.asarray(self.betas, np.float64))])
        return nodes, np.diff(nodes)

    def _segment(self, t: Any, xp: ModuleType) -> tuple[Any, Any, Any]:
        """The segment that holds t: log alpha at its start, its rise, and how far along it t lies, in [0, 1]."""
        nodes, slopes = (xp.asarray(values, t.dtype) for values in self._nodes)
        position = t * len(self.betas)
        index = xp.clip(xp.floor(position), 0, len(self.betas) - 1).astype(np.int32)
        return nodes[index], slopes[index], position - index

    def log_alpha(self, t: Any) -> Any:
        node, slope, offset = self._segment(*as_float(t))
        return node + slope * offset

    def beta(self, t: Any) -> Any:
        """Return -2 d log alpha / dt."""
        return -2 * len(self.betas) * self._segment(*as_float(t))[1]

    def inverse_log_alpha(self, log_alpha: Any) -> Any:
        log_alpha, xp = as_float(log_alpha)
        nodes, slopes = (xp.asarray(values, log_alpha.dtype) for values in self._nodes)
        index = xp.clip(xp.searchsorted(-nodes, -log_alpha) - 1, 0, len(slopes) - 1)
        return (index + (log_alpha - nodes[index]) / slopes[index]) / len(self.betas)


@dataclasses.dataclass(frozen=True)
class Shifted(VariancePreserving):
    """SNR(t) = base SNR(t) / scale^power, SNR = (alpha / sigma)^2 (ml-mdm samplers.py:255-264, 'cosine-shiftN').

    scale: how many times finer the grid is, per side, than the one that `base` is for. A power of 2 keeps the SNR of
    images averaged down to that grid (simple diffusion, 2301.11093); the 256-pixel model has 1. Raises ValueError for a
    scale that is not positive.
    """

    base: VariancePreserving
    scale: float
    power: float

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"Shifted: scale = {self.scale}: expected a positive number")

    def log_alpha(self, t: Any) -> Any:
        _, xp = as_float(t)
        log_alpha = self.base.log_alpha(t)
        return log_alpha - 0.5 * xp.log1p((1 - self.scale**self.power) * xp.expm1(2 * log_alpha))

    def inverse_log_snr(self, log_snr: Any) -> Any:
        return self.base.inverse_log_snr(log_snr + 0.5 * self.power * math.log(self.scale))


@dataclasses.dataclass(frozen=True)
class ExponentialVE:
    """alpha = 1, sigma(t) = sigma_min^(1 - t) sigma_max^t: EDM's variance exploding process.

    The range is wider than any sampler uses, and the formula goes on outside [0, 1].
    Raises ValueError unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 1e-3
    sigma_max: float = 1e3

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"ExponentialVE: sigma_min = {self.sigma_min}, sigma_max = {self.sigma_max}: "
                "expected 0 < sigma_min < sigma_max"
            )

    def __call__(self, t: Any) -> tuple[Any, Any]:
        t, xp = as_float(t)
        return xp.ones_like(t), xp.exp(-self.log_snr(t))

    def log_snr(self, t: Any) -> Any:
        t, _ = as_float(t)
        return -math.log(self.sigma_min) - t * math.log(self.sigma_max / self.sigma_min)

    def inverse_log_snr(self, log_snr: Any) -> Any:
        log_snr, _ = as_float(log_snr)
        return (-log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def prior_std(self, t: Any) -> Any:
        """Return sigma(t), without the data's own variance, as EDM and k-diffusion do."""
        return self(t)[1]


def sd_scaled_linear(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> PiecewiseVP:
    """Return Stable Diffusion's betas, linear in their square root; U-ViT on latents (train_ldm_discrete.py)."""
    return PiecewiseVP(tuple(float(root) ** 2 for root in np.linspace(beta_start**0.5, beta_end**0.5, steps)))


def ldm_linear(steps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195) -> PiecewiseVP:
    """Return latent diffusion's 'linear' betas (arXiv 2112.10752), which are linear in their square root too; RCG's."""
    return sd_scaled_linear(steps, beta_start, beta_end)


def ddpm_linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> PiecewiseVP:
    """Return DDPM's betas (arXiv 2006.11239), which ADM and DiT train with."""
    return PiecewiseVP(tuple(np.linspace(beta_start, beta_end, steps).tolist()))


def cosine(steps: int = 1000, max_beta: float = 0.999) -> PiecewiseVP:
    """Return squaredcos_cap_v2 (Nichol & Dhariwal, 2102.09672): alpha^2 ~ cos^2((t + .008) / 1.008 pi/2), betas cut."""
    alpha_squared = np.cos((np.linspace(0.0, 1.0, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return PiecewiseVP(tuple(float(min(beta, max_beta)) for beta in 1 - alpha_squared[1:] / alpha_squared[:-1]))


def cosine_log_snr(steps: int = 1000, limit: float = 5.0) -> PiecewiseVP:
    """Return Salimans & Ho's cosine (2202.00512), log SNR = -2 log tan from `limit` to -limit (ml-mdm's 'COSINE').

    The first step is already at SNR e^limit; t = 0 is clean.
    """
    first, last = math.atan(math.exp(-limit / 2)), math.atan(math.exp(limit / 2))
    alpha_squared = np.cos(np.linspace(first, last, steps)) ** 2
    return PiecewiseVP(tuple((1 - alpha_squared / np.concatenate([[1.0], alpha_squared[:-1]])).tolist()))


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """log s ~ N(mean, std^2) (EDM: -1.2, 1.2). u is kept 1e-7 from 0 and from 1, as in k-diffusion."""

    mean: Annotated[float, "mean of log s"]
    std: Annotated[float, "standard deviation of log s"]

    def __post_init__(self) -> None:
        _check_positive(std=self.std)

    def __call__(self, u: jax.Array) -> jax.Array:
        return jnp.exp(self.mean + self.std * jax.scipy.special.ndtri(u * (1 - 2e-7) + 1e-7))


@dataclasses.dataclass(frozen=True)
class LogLogistic:
    """log s logistic around `mean` with scale `scale`, restricted to [sigma_min, sigma_max]."""

    mean: Annotated[float, "mean of log s"]
    scale: Annotated[float, "scale of log s"]
    sigma_min: Annotated[float, "the smallest noise level"] = 0.0
    sigma_max: Annotated[float, "the largest noise level"] = math.inf

    def __post_init__(self) -> None:
        _check_positive(scale=self.scale)
        _check_range(self.sigma_min, self.sigma_max, least=0.0)

    def _cdf(self, sigma: float) -> float:
        return 1 / (1 + (math.exp(self.mean) / sigma) ** (1 / self.scale)) if sigma else 0.0

    def __call__(self, u: jax.Array) -> jax.Array:
        low, high = self._cdf(self.sigma_min), self._cdf(self.sigma_max)
        return jnp.exp(self.mean + self.scale * jax.scipy.special.logit(low + u * (high - low)))


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """log s uniform between sigma_min and sigma_max."""

    sigma_min: Annotated[float, "the smallest noise level"]
    sigma_max: Annotated[float, "the largest noise level"]

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    def __call__(self, u: jax.Array) -> jax.Array:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return jnp.exp(low + u * (high - low))


@dataclasses.dataclass(frozen=True)
class VDiffusion:
    """s = sigma_data tan(pi v / 2), v uniform: v-diffusion's cosine schedule, between sigma_min and sigma_max."""

    sigma_data: Annotated[float, "standard deviation of the data"]
    sigma_min: Annotated[float, "the smallest noise level"] = 0.0
    sigma_max: Annotated[float, "the largest noise level"] = math.inf

    def __post_init__(self) -> None:
        _check_positive(sigma_data=self.sigma_data)
        _check_range(self.sigma_min, self.sigma_max, least=0.0)

    def __call__(self, u: jax.Array) -> jax.Array:
        low, high = (2 / math.pi * math.atan(sigma / self.sigma_data) for sigma in (self.sigma_min, self.sigma_max))
        return self.sigma_data * jnp.tan(math.pi / 2 * (low + u * (high - low)))


@dataclasses.dataclass(frozen=True)
class CosineInterpolated:
    """HDiT's density (arXiv 2401.11605, Sec. 3.1; simple diffusion, 2301.11093): u = 0 is sigma_max, u = 1 sigma_min.

    With shift(n) = 2 log(n / image_size) and C(u; n) the cosine schedule of the log SNR moved by it, from that of
    sigma_max to that of sigma_min: log SNR(u) = (1 - u) C(u; noise_low) + u C(u; noise_high), and
    s = sigma_data exp(-log SNR / 2).
    """

    image_size: Annotated[int, "side of the images in pixels"]
    sigma_data: Annotated[float, "standard deviation of the data"]
    noise_low: Annotated[int, "resolution whose schedule counts at high noise levels"] = 32
    noise_high: Annotated[int | None, "resolution whose schedule counts at low noise levels; None: image_size"] = None
    sigma_min: Annotated[float, "the smallest noise level"] = 1e-3
    sigma_max: Annotated[float, "the largest noise level"] = 1e3

    def __post_init__(self) -> None:
        _check_positive(image_size=self.image_size, sigma_data=self.sigma_data, noise_low=self.noise_low)
        _check_positive(noise_high=self.noise_high or self.image_size)
        _check_range(self.sigma_min, self.sigma_max)

    def _shifted(self, u: jax.Array, noise_size: int) -> jax.Array:
        """Log SNR (of power) of the cosine schedule at u."""
        shift = 2 * math.log(noise_size / self.image_size)
        low, high = (-2 * math.log(sigma / self.sigma_data) - shift for sigma in (self.sigma_max, self.sigma_min))
        start, end = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
        return -2 * jnp.log(jnp.tan(end + u * (start - end))) + shift

    def __call__(self, u: jax.Array) -> jax.Array:
        low, high = self._shifted(u, self.noise_low), self._shifted(u, self.noise_high or self.image_size)
        return self.sigma_data * jnp.exp(-((1 - u) * low + u * high) / 2)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"process.density.{name} = {value}: expected a positive number")


def _check_range(sigma_min: float, sigma_max: float, least: float | None = None) -> None:
    if not (sigma_min > 0 or sigma_min == least) or not sigma_min < sigma_max:
        raise ValueError(
            f"process.density: sigma_min = {sigma_min}, sigma_max = {sigma_max}: expected 0 < sigma_min < sigma_max"
        )


def as_float(value: Any) -> tuple[Any, ModuleType]:
    """Return (value in float32 or better, its array module): numpy float64 for host values, jax otherwise."""
    if isinstance(value, jax.Array):
        return value.astype(jnp.promote_types(value.dtype, jnp.float32)), jnp
    return np.asarray(value, np.float64), np
