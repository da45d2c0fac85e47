"""Gaussian diffusion processes: schedules, prediction spaces, the loss, the law of the training times.

Forward marginal, for each leaf of a level's variable, with t in [0, 1] and t = 1 the noise:

    x_t = alpha(t) x0 + sigma(t) eps,  eps ~ N(0, I),  lambda(t) = log(alpha(t) / sigma(t))  ("log_snr", half log SNR).

Every network output is some y = p x0 + q eps; the pair (p, q) names its space:

    eps: (0, 1)        x0: (1, 0)        v: (-sigma, alpha)      (Salimans & Ho 2022, arXiv 2202.00512)

With d = alpha q - sigma p, a prediction y_a of space a at x_t is, in space b,

    y_b = (p_b q_a - q_b p_a) / d_a  x_t  +  d_b / d_a  y_a,

the only conversion in this code base (v -> eps comes out as sigma x_t + alpha v, without a division by alpha).

Schedules: `PiecewiseVP` is the DDPM chain of betas read as a continuous process, log alpha linear between t_i = i / N
(the 'discrete' schedule of DPM-Solver, arXiv 2206.00927, and of U-ViT's dpm_solver_pp.py); `LinearVP` is the VP-SDE of
Song et al. (arXiv 2011.13456). Departures from the authors' code: sigma = sqrt(-expm1(2 log alpha)), which keeps its
digits at small t; below t = 1/N log alpha runs to alpha(0) = 1, where theirs extends the next segment and crosses 0.

Everything maps over the leaves of the variable, one schedule per leaf or one for all. Arithmetic is float32, or float64
where the inputs are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


class VariancePreserving:
    """A schedule with alpha^2 + sigma^2 = 1. numpy in, numpy float64 out (sampler tables); jax in, jax out (training).

    A subclass gives log_alpha(t), beta(t) and inverse_log_alpha(value). Any other object with __call__, log_snr and
    inverse_log_snr is as good a schedule; only the Euler sampler in time asks for beta.
    """

    def __call__(self, t):
        """(alpha, sigma) at t, of t's shape."""
        t, xp = _as_float(t)
        log_alpha = self.log_alpha(t)
        return xp.exp(log_alpha), xp.sqrt(xp.abs(xp.expm1(2 * log_alpha)))

    def log_snr(self, t):
        """lambda = log(alpha / sigma) at t; decreasing in t."""
        t, xp = _as_float(t)
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * xp.log(xp.abs(xp.expm1(2 * log_alpha)))

    def inverse_log_snr(self, log_snr):
        """The t at which log(alpha / sigma) has this value. On the host: numpy float64 in and out."""
        return self.inverse_log_alpha(-0.5 * np.logaddexp(-2.0 * np.asarray(log_snr, np.float64), 0.0))


@dataclasses.dataclass(frozen=True)
class LinearVP(VariancePreserving):
    """dx = -beta/2 x dt + sqrt(beta) dw with beta(t) = beta_min + t (beta_max - beta_min); U-ViT's VPSDE (sde.py)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t):
        t, _ = _as_float(t)
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def beta(self, t):
        t, _ = _as_float(t)
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def inverse_log_alpha(self, log_alpha):
        root = np.sqrt(self.beta_min**2 - 4 * (self.beta_max - self.beta_min) * log_alpha)
        return -4 * log_alpha / (self.beta_min + root)


@dataclasses.dataclass(frozen=True)
class PiecewiseVP(VariancePreserving):
    """The chain alpha_n^2 = prod_{i<=n} (1 - beta_i), n = 0..N, at t = n / N, and log alpha linear in between."""

    betas: tuple[float, ...]

    @functools.cached_property
    def _nodes(self):
        """log alpha at t = 0, 1/N ... 1, and its N differences."""
        nodes = 0.5 * np.cumsum([0.0, *np.log1p(-np.asarray(self.betas, np.float64))])
        return nodes, np.diff(nodes)

    def _segment(self, t, xp):
        """Of the segment that holds t: log alpha where it starts, its rise, and how far along it t is, in [0, 1]."""
        nodes, slopes = (xp.asarray(values, t.dtype) for values in self._nodes)
        position = t * len(self.betas)
        index = xp.clip(xp.floor(position), 0, len(self.betas) - 1).astype(np.int32)
        return nodes[index], slopes[index], position - index

    def log_alpha(self, t):
        node, slope, offset = self._segment(*_as_float(t))
        return node + slope * offset

    def beta(self, t):
        """-2 d log alpha / dt."""
        return -2 * len(self.betas) * self._segment(*_as_float(t))[1]

    def inverse_log_alpha(self, log_alpha):
        nodes, slopes = self._nodes
        index = np.clip(np.searchsorted(-nodes, -log_alpha) - 1, 0, len(slopes) - 1)
        return (index + (log_alpha - nodes[index]) / slopes[index]) / len(self.betas)


def sd_scaled_linear(steps=1000, beta_start=0.00085, beta_end=0.012) -> PiecewiseVP:
    """Stable Diffusion's betas, linear in their square root; U-ViT on latents (train_ldm_discrete.py)."""
    return PiecewiseVP(tuple(float(root) ** 2 for root in np.linspace(beta_start**0.5, beta_end**0.5, steps)))


def cosine(steps=1000, max_beta=0.999) -> PiecewiseVP:
    """squaredcos_cap_v2 (Nichol & Dhariwal, arXiv 2102.09672): alpha^2 ~ cos^2((t + .008) / 1.008 pi/2), betas cut."""
    alpha_squared = np.cos((np.linspace(0.0, 1.0, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    return PiecewiseVP(tuple(float(min(beta, max_beta)) for beta in 1 - alpha_squared[1:] / alpha_squared[:-1]))


SPACES = {
    "eps": lambda alpha, sigma: (jnp.zeros_like(alpha), jnp.ones_like(alpha)),
    "x0": lambda alpha, sigma: (jnp.ones_like(alpha), jnp.zeros_like(alpha)),
    "v": lambda alpha, sigma: (-sigma, alpha),
}
WEIGHTINGS = {"uniform": jnp.ones_like}  # name -> (log_snr [B] -> weight [B] of the squared error in the loss space)
TIME_SAMPLINGS = {  # name -> (u [B] uniform in [0, 1) -> [B] in [0, 1))
    "uniform": lambda u: u,
    "stratified": lambda u: (jnp.arange(u.shape[0], dtype=u.dtype) + u) / u.shape[0],
}


@dataclasses.dataclass(frozen=True)
class Process:
    """The diffusion of one level's variable.

    schedules: one per leaf of the variable, or a single one for all leaves.
    parameterization: the space of the network's output, a key of SPACES.
    loss_space: the space of the squared error; None means the parameterization.
    weighting, time_sampling: keys of WEIGHTINGS and TIME_SAMPLINGS.
    discrete_steps: N > 0 trains at t = n / N, n uniform in 1..N; 0 trains at t uniform in [t_min, 1).
    time_scale: the network sees c_noise = time_scale * t (1000 for U-ViT's discrete models, 999 for its VPSDE models).
    Raises ValueError for a name that is not known or options that contradict each other.
    """

    schedules: tuple[VariancePreserving, ...]
    parameterization: str = "eps"
    loss_space: str | None = None
    weighting: str = "uniform"
    time_sampling: str = "uniform"
    discrete_steps: int = 1000
    t_min: float = 0.0
    time_scale: float = 1000.0

    def __post_init__(self):
        check_name("process.parameterization", self.parameterization, SPACES)
        check_name("process.loss_space", self.loss_space, [None, *SPACES])
        check_name("process.weighting", self.weighting, WEIGHTINGS)
        check_name("process.time_sampling", self.time_sampling, TIME_SAMPLINGS)
        if not self.schedules:
            raise ValueError("process.schedules is empty: give one schedule, or one per leaf of the variable")
        if self.discrete_steps < 0 or not 0 <= self.t_min < 1:
            raise ValueError(
                f"process.discrete_steps = {self.discrete_steps}, process.t_min = {self.t_min}: "
                "expected discrete_steps >= 0 and 0 <= t_min < 1"
            )
        if self.discrete_steps and self.t_min:
            raise ValueError(
                f"process.t_min = {self.t_min} has no effect with process.discrete_steps = {self.discrete_steps}: "
                "set one of them to 0"
            )

    def leaf_schedules(self, variable) -> tuple[VariancePreserving, ...]:
        """One schedule for each leaf of the variable. Raises ValueError where the numbers do not match."""
        leaves = len(jax.tree.leaves(variable))
        if len(self.schedules) not in (1, leaves):
            raise ValueError(
                f"process.schedules has {len(self.schedules)} entries, the variable {leaves} leaves: give 1 or {leaves}"
            )
        return self.schedules if len(self.schedules) == leaves else self.schedules * leaves

    def _map(self, function, t, *variables):
        """function(alpha, sigma, *leaves) over the leaves; alpha, sigma [B, 1, ...] of the leaf's schedule and rank."""
        structure = jax.tree.structure(variables[0])
        columns = zip(*(jax.tree.leaves(variable) for variable in variables), strict=True)
        out = []
        for schedule, leaves in zip(self.leaf_schedules(variables[0]), columns, strict=True):
            shape = (-1,) + (1,) * (leaves[0].ndim - 1)
            alpha, sigma = (value.reshape(shape) for value in schedule(t))
            out.append(function(alpha, sigma, *(_as_float(leaf)[0] for leaf in leaves)))
        return jax.tree.unflatten(structure, out)

    def corrupt(self, x0, noise, t):
        """x_t = alpha x0 + sigma noise. x0, noise: trees of [B, ...]; t: [B]."""
        return self._map(lambda alpha, sigma, x, n: alpha * x + sigma * n, t, x0, noise)

    def target(self, x0, noise, t, space):
        """What a perfect network of this space would return (the regression target): p x0 + q noise."""

        def leaf(alpha, sigma, x, n):
            p, q = SPACES[space](alpha, sigma)
            return p * x + q * n

        return self._map(leaf, t, x0, noise)

    def convert(self, prediction, x_t, t, from_space, to_space):
        """A prediction made at (x_t, t) in one space, as the same prediction in another. Trees of [B, ...]; t: [B]."""

        def leaf(alpha, sigma, y, x):
            if from_space == to_space:
                return y
            (p, q), (p_to, q_to) = (SPACES[space](alpha, sigma) for space in (from_space, to_space))
            d, d_to = alpha * q - sigma * p, alpha * q_to - sigma * p_to
            return (p_to * q - q_to * p) / d * x + d_to / d * y

        return self._map(leaf, t, prediction, x_t)

    def to_x0(self, raw, x_t, t):
        """The network's output at (x_t, t) as an estimate of x0."""
        return self.convert(raw, x_t, t, self.parameterization, "x0")

    def loss(self, raw, x0, noise, x_t, t, leaf_weights=None):
        """Per-sample loss [B], the sum over leaves of leaf weight * weighting(lambda) * mean squared error.

        raw: the network's output at (x_t, t); x_t = corrupt(x0, noise, t). leaf_weights: one float per leaf, None for 1
        each; ValueError where their number is not the variable's.
        """
        schedules = self.leaf_schedules(x0)
        leaf_weights = (1.0,) * len(schedules) if leaf_weights is None else leaf_weights
        if len(leaf_weights) != len(schedules):
            raise ValueError(
                f"leaf_weights has {len(leaf_weights)} entries, the variable {len(schedules)} leaves: give one per leaf"
            )
        space = self.loss_space or self.parameterization
        target = jax.tree.leaves(self.target(x0, noise, t, space))
        prediction = jax.tree.leaves(self.convert(raw, x_t, t, self.parameterization, space))
        total = 0.0
        for schedule, leaf_weight, y, truth in zip(schedules, leaf_weights, prediction, target, strict=True):
            weight = leaf_weight * WEIGHTINGS[self.weighting](schedule.log_snr(t))
            total = total + weight * jnp.mean(jnp.square(y - truth), axis=tuple(range(1, y.ndim)))
        return total

    def sample_time(self, keys):
        """Training times [B] from typed keys [B], one per row of the GLOBAL batch (stratified: row i has stratum i)."""
        u = TIME_SAMPLINGS[self.time_sampling](jax.vmap(jax.random.uniform)(keys))
        if self.discrete_steps:
            return jnp.minimum(jnp.floor(u * self.discrete_steps) + 1, self.discrete_steps) / self.discrete_steps
        return self.t_min + (1 - self.t_min) * u

    def c_noise(self, t):
        """What the network is told about the time: time_scale * t."""
        return self.time_scale * t


def _as_float(value):
    """(value in float32 or better, its array module): numpy float64 for host values, jax otherwise."""
    if isinstance(value, jax.Array):
        return value.astype(jnp.promote_types(value.dtype, jnp.float32)), jnp
    return np.asarray(value, np.float64), np


def check_name(name, value, allowed):
    """Raise ValueError, naming the allowed values, where an option's value is not one of them."""
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is not known: use one of {', '.join(map(repr, allowed))}")
