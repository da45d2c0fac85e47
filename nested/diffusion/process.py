"""Gaussian diffusion processes: prediction spaces, the loss, the law of the training times.

Forward marginal, for each leaf of a level's variable, with t in [0, 1] and t = 1 the noise:

    x_t = alpha(t) x0 + sigma(t) eps,  eps ~ N(0, I),  lambda(t) = log(alpha(t) / sigma(t))  ("log_snr", half log SNR).

Every network output is some y = p x0 + q eps; the pair (p, q) names its space:

    eps: (0, 1)        x0: (1, 0)        v: (-sigma, alpha)      (Salimans & Ho 2022, arXiv 2202.00512)
    edm: (s / sigma_data, -sigma_data) / sqrt(s^2 + sigma_data^2),  s = sigma / alpha   (Karras et al., 2206.00364)

With d = alpha q - sigma p, a prediction y_a of space a at x_t is, in space b,

    y_b = (p_b q_a - q_b p_a) / d_a  x_t  +  d_b / d_a  y_a,

which is the only conversion in this code base (v -> eps comes out as sigma x_t + alpha v, without a division by alpha).
For edm it is EDM's preconditioning: x0 = c_skip x_t + c_out F with c_skip = sigma_data^2 / (s^2 + sigma_data^2) and
c_out = s sigma_data / sqrt(s^2 + sigma_data^2) at alpha = 1; the network then reads c_in x_t, of unit variance.

The loss is the mean squared error in `loss_space`. Weightings other than 'uniform' are defined for the error in x0, and
the factor (sigma / d)^2 = |dx0 / dy|^2 carries them into the loss space, so that they mean the same in every space:

    karras: 1/s^2 + 1/sigma_data^2      snr: 1/s^2      min_snr: min(1/s^2, gamma)      soft_min_snr: 1/(s^2 + 1/gamma)

(HDiT, arXiv 2401.11605, App. B, with gamma = 1 / sigma_data^2 = 4; the bracket of its Eq. 5 is upside down.) In
edm's own space karras is 1.

With `learned_variance` the network's output has twice the channels: the prediction, then where the log variance lies
between its bounds. The loss gains the variational bound (nested/diffusion/variational_bound.py), which trains the
second half alone and is not weighted; the two are added as they are, as in DiT. Samplers use the posterior variance,
not the learned one.

Everything maps over the leaves of the variable, one schedule per leaf or one for all. Arithmetic is float32, or float64
if the inputs are.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nested.diffusion.schedules import Density, Schedule, as_float
from nested.diffusion.variational_bound import variational_bound

Tree = Any  # arrays in tuples or dicts: a level's variable, a network's parameters
Space = Literal["eps", "x0", "v", "edm"]
Weighting = Literal["uniform", "karras", "snr", "min_snr", "soft_min_snr"]


def _edm(alpha: jax.Array, sigma: jax.Array, sigma_data: float) -> tuple[jax.Array, jax.Array]:
    s = sigma / alpha
    root = jnp.sqrt(s**2 + sigma_data**2)
    return s / (sigma_data * root), -sigma_data / root


SPACES = {  # name -> ((alpha, sigma, sigma_data) -> (p, q))
    "eps": lambda alpha, sigma, _: (jnp.zeros_like(alpha), jnp.ones_like(alpha)),
    "x0": lambda alpha, sigma, _: (jnp.ones_like(alpha), jnp.zeros_like(alpha)),
    "v": lambda alpha, sigma, _: (-sigma, alpha),
    "edm": _edm,
}
WEIGHTINGS = {  # name -> ((1 / s^2, sigma_data, gamma) -> weight of the squared error in x0); None: 1 in any space
    "uniform": None,
    "karras": lambda snr, sigma_data, _: snr + 1 / sigma_data**2,
    "snr": lambda snr, *_: snr,
    "min_snr": lambda snr, _, gamma: jnp.minimum(snr, gamma),
    "soft_min_snr": lambda snr, _, gamma: 1 / (1 / snr + 1 / gamma),
}
GAMMA_WEIGHTINGS = ("min_snr", "soft_min_snr")
NOISE_INPUTS = ("t", "log_sigma")
TIME_SAMPLINGS = {  # name -> (u [B] uniform in [0, 1) -> [B] in [0, 1))
    "uniform": lambda u: u,
    "stratified": lambda u: (jnp.arange(u.shape[0], dtype=u.dtype) + u) / u.shape[0],
}


@dataclasses.dataclass(frozen=True)
class Process:
    """The diffusion of one level's variable.

    schedules: one per leaf of the variable, or a single one for all leaves.
    sigma_data is needed by the edm space and by the weightings that name it, and must be None otherwise.
    density: a law of the noise levels s = sigma / alpha seen in training (nested/diffusion/schedules.py), as a function
        of u [B] in [0, 1); it is read at the first schedule.
    learned_variance: the network's output has twice the channels, the second half for the variance (see above); needs
        parameterization eps, discrete_steps >= 2 and variance preserving schedules.
    Raises ValueError for a name that does not exist, and for options that contradict each other.
    """

    schedules: tuple[Schedule, ...]
    parameterization: Annotated[Space, "what the network predicts"] = "eps"
    loss_space: Annotated[
        Literal["eps", "x0", "v", "edm", None], "where the squared error is taken; None: parameterization"
    ] = None
    weighting: Annotated[Weighting, "weight of the squared error over the noise levels"] = "uniform"
    time_sampling: Annotated[
        Literal["uniform", "stratified"],
        "how training times are drawn: independently | one per stratum of the global batch",
    ] = "uniform"
    discrete_steps: Annotated[int, "N > 0 trains at t = n / N, n uniform in 1..N; 0 at t uniform in [t_min, 1)"] = 1000
    t_min: Annotated[float, "the smallest training time, with discrete_steps 0"] = 0.0
    time_scale: Annotated[float, "the network reads time_scale * noise_input + time_offset"] = 1000.0
    time_offset: Annotated[float, "-1 for networks that count their discrete steps from 0"] = 0.0
    noise_input: Annotated[Literal["t", "log_sigma"], "the time that the network reads: t | log(sigma / alpha)"] = "t"
    sigma_data: Annotated[float | None, "standard deviation of the data, for edm and some weightings"] = None
    gamma: Annotated[float | None, "the gamma of min_snr and soft_min_snr; None: 1 / sigma_data^2"] = None
    density: Annotated[
        Density | None, "law of the noise levels in training; None: that of discrete_steps and t_min"
    ] = None
    learned_variance: Annotated[bool, "whether the network learns the variance too (DiT, ADM)"] = False

    def __post_init__(self) -> None:
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
        check_name("process.noise_input", self.noise_input, NOISE_INPUTS)
        self._check_scales()
        self._check_learned_variance()
        if self.density is not None and (self.discrete_steps or self.t_min):
            raise ValueError(
                f"process.density draws the noise levels itself: set process.discrete_steps = {self.discrete_steps} "
                f"and process.t_min = {self.t_min} to 0"
            )
        if self.discrete_steps and self.t_min:
            raise ValueError(
                f"process.t_min = {self.t_min} has no effect with process.discrete_steps = {self.discrete_steps}: "
                "set one of them to 0"
            )

    def _check_scales(self) -> None:
        """Raise ValueError unless sigma_data and gamma are given exactly if something uses them."""
        spaces = (self.parameterization, self.loss_space)
        needed = "edm" in spaces or self.weighting == "karras"
        needed = needed or (self.weighting in GAMMA_WEIGHTINGS and self.gamma is None)
        if needed != (self.sigma_data is not None):
            expected = "a number" if needed else "None, as nothing uses it"
            raise ValueError(
                f"process.sigma_data = {self.sigma_data} with parameterization {self.parameterization!r}, weighting "
                f"{self.weighting!r}, gamma = {self.gamma}: expected {expected}"
            )
        if self.gamma is not None and self.weighting not in GAMMA_WEIGHTINGS:
            raise ValueError(f"process.gamma = {self.gamma} has no effect with weighting {self.weighting!r}: remove it")
        for name in ("sigma_data", "gamma"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"process.{name} = {getattr(self, name)}: expected a positive number")

    def _check_learned_variance(self) -> None:
        """Raise ValueError unless the variational bound applies: a discrete chain, variance preserving, and eps."""
        names = [type(schedule).__name__ for schedule in self.schedules]
        preserving = all(hasattr(schedule, "log_alpha") for schedule in self.schedules)
        if self.learned_variance and (self.parameterization != "eps" or self.discrete_steps < 2 or not preserving):
            raise ValueError(
                f"process.learned_variance = True with parameterization {self.parameterization!r}, discrete_steps = "
                f"{self.discrete_steps}, schedules {names}: expected 'eps', at least 2 and variance preserving "
                "schedules; change these or set learned_variance to False"
            )

    def leaf_schedules(self, variable: Tree) -> tuple[Schedule, ...]:
        """Return one schedule for each leaf of the variable. Raises ValueError if the numbers do not match."""
        leaves = len(jax.tree.leaves(variable))
        if len(self.schedules) not in (1, leaves):
            raise ValueError(
                f"process.schedules has {len(self.schedules)} entries, the variable {leaves} leaves: give 1 or {leaves}"
            )
        return self.schedules if len(self.schedules) == leaves else self.schedules * leaves

    def _map(self, function: Callable[..., jax.Array], t: jax.Array, *variables: Tree) -> Tree:
        """Map function(alpha, sigma, *leaves) over the leaves; alpha and sigma are the leaf's own, [B, 1, ...]."""
        structure = jax.tree.structure(variables[0])
        columns = zip(*(jax.tree.leaves(variable) for variable in variables), strict=True)
        out = []
        for schedule, leaves in zip(self.leaf_schedules(variables[0]), columns, strict=True):
            shape = (-1,) + (1,) * (leaves[0].ndim - 1)
            alpha, sigma = (value.reshape(shape) for value in schedule(t))
            out.append(function(alpha, sigma, *(as_float(leaf)[0] for leaf in leaves)))
        return jax.tree.unflatten(structure, out)

    def _coefficients(self, space: Space, alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(p, q) of a space."""
        return SPACES[space](alpha, sigma, self.sigma_data)

    def prior(self, noise: Tree, t: float) -> Tree:
        """Return the state that sampling starts from at t: noise, leaves [B, ...], times each leaf's prior_std(t)."""
        leaves, structure = jax.tree.flatten(noise)
        scales = (schedule.prior_std(t) for schedule in self.leaf_schedules(noise))
        return structure.unflatten(leaf * scale for leaf, scale in zip(leaves, scales, strict=True))

    def network_input(self, x_t: Tree, t: jax.Array) -> Tree:
        """Return what the network reads for x_t: x_t itself or, in edm's space, c_in x_t, which has unit variance."""
        if self.parameterization != "edm":
            return x_t
        return self._map(lambda alpha, sigma, x: x / jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2), t, x_t)

    def corrupt(self, x0: Tree, noise: Tree, t: jax.Array) -> Tree:
        """Return x_t = alpha x0 + sigma noise; x0 and noise are trees of [B, ...], t is [B]."""
        return self._map(lambda alpha, sigma, x, n: alpha * x + sigma * n, t, x0, noise)

    def target(self, x0: Tree, noise: Tree, t: jax.Array, space: Space) -> Tree:
        """Return the regression target of a network of this space, p x0 + q noise."""

        def leaf(alpha: jax.Array, sigma: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
            p, q = self._coefficients(space, alpha, sigma)
            return p * x + q * n

        return self._map(leaf, t, x0, noise)

    def convert(self, prediction: Tree, x_t: Tree, t: jax.Array, from_space: Space, to_space: Space) -> Tree:
        """Return a prediction made at (x_t, t) in one space as the same prediction in another.

        prediction, x_t: trees of [B, ...]; t: [B].
        """

        def leaf(alpha: jax.Array, sigma: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
            if from_space == to_space:
                return y
            (p, q), (p_to, q_to) = (self._coefficients(space, alpha, sigma) for space in (from_space, to_space))
            d, d_to = alpha * q - sigma * p, alpha * q_to - sigma * p_to
            return (p_to * q - q_to * p) / d * x + d_to / d * y

        return self._map(leaf, t, prediction, x_t)

    def to_x0(self, raw: Tree, x_t: Tree, t: jax.Array) -> Tree:
        """Return the network's output at (x_t, t) as an estimate of x0."""
        return self.convert(self._split(raw, x_t)[0], x_t, t, self.parameterization, "x0")

    def _split(self, raw: Tree, x_t: Tree) -> tuple[Tree, Tree]:
        """The network's output as (prediction, values of the variance), trees like x_t; None if it is not learned."""
        factor = 2 if self.learned_variance else 1
        leaves, structure = jax.tree.flatten(raw)
        for leaf, x in zip(leaves, jax.tree.leaves(x_t), strict=True):
            if leaf.shape != (*x.shape[:-1], factor * x.shape[-1]):
                raise ValueError(
                    f"process.learned_variance = {self.learned_variance}: the network's output has shape {leaf.shape} "
                    f"for a variable of {x.shape}, expected {factor} times its channels: change "
                    "process.learned_variance or the backbone's learn_variance"
                )
        if not self.learned_variance:
            return raw, None
        halves = zip(*(jnp.split(leaf, 2, axis=-1) for leaf in leaves), strict=True)
        return tuple(structure.unflatten(half) for half in halves)

    def loss(
        self,
        raw: Tree,
        x0: Tree,
        noise: Tree,
        x_t: Tree,
        t: jax.Array,
        leaf_weights: Sequence[float | jax.Array] | None = None,
    ) -> jax.Array:
        """Return the per-sample loss [B].

        It is the sum over leaves of leaf weight * weight(t) * mean squared error in the loss space; with
        learned_variance each leaf adds leaf weight * its variational bound, in bits per element.

        Args:
            raw: the network's output at (x_t, t).
            x0, noise, x_t: trees of [B, ...], where x_t = corrupt(x0, noise, t).
            t: times [B].
            leaf_weights: a float or [B] for each leaf; None is 1 each.

        Raises:
            ValueError: if the number of leaf weights is not that of the leaves, or the output has other shapes.
        """
        schedules = self.leaf_schedules(x0)
        leaf_weights = (1.0,) * len(schedules) if leaf_weights is None else leaf_weights
        if len(leaf_weights) != len(schedules):
            raise ValueError(
                f"leaf_weights has {len(leaf_weights)} entries, the variable {len(schedules)} leaves: give one per leaf"
            )
        space = self.loss_space or self.parameterization
        raw, values = self._split(raw, x_t)
        target = jax.tree.leaves(self.target(x0, noise, t, space))
        prediction = jax.tree.leaves(self.convert(raw, x_t, t, self.parameterization, space))
        total = jnp.zeros(())
        for schedule, leaf_weight, y, truth in zip(schedules, leaf_weights, prediction, target, strict=True):
            weight = leaf_weight * self.weight(schedule, t, space)
            total = total + weight * jnp.mean(jnp.square(y - truth), axis=tuple(range(1, y.ndim)))
        if not self.learned_variance:
            return total
        x0_hat = self.convert(raw, x_t, t, self.parameterization, "x0")
        columns = (jax.tree.leaves(tree) for tree in (x0, x0_hat, values))
        for schedule, leaf_weight, x, x_hat, value in zip(schedules, leaf_weights, *columns, strict=True):
            total = total + leaf_weight * variational_bound(schedule, self.discrete_steps, x, x_hat, t, value)
        return total

    def weight(self, schedule: Schedule, t: jax.Array, space: Space) -> jax.Array:
        """Return the weight [B] of the squared error in `space` at times t [B]."""
        in_x0 = WEIGHTINGS[self.weighting]
        if in_x0 is None:
            return jnp.ones_like(t)
        alpha, sigma = schedule(t)
        p, q = self._coefficients(space, alpha, sigma)
        gamma = self.gamma or (self.sigma_data and self.sigma_data**-2)
        weight = in_x0(jnp.exp(2 * schedule.log_snr(t)), self.sigma_data, gamma)
        return weight * jnp.square(sigma / (alpha * q - sigma * p))

    def sample_time(self, keys: jax.Array) -> jax.Array:
        """Draw training times [B] by keys [B], one per row of the GLOBAL batch (stratified: row i in stratum i)."""
        u = TIME_SAMPLINGS[self.time_sampling](jax.vmap(jax.random.uniform)(keys))
        if self.density is not None:
            inside = jnp.clip(u, 2.0**-24, 1 - 2.0**-24)  # a float32 u can be 0 or, stratified, round to 1
            return self.schedules[0].inverse_log_snr(-jnp.log(self.density(inside)))
        if self.discrete_steps:
            index = jnp.minimum(jnp.floor(u * self.discrete_steps).astype(jnp.int32), self.discrete_steps - 1)
            steps = np.arange(1, self.discrete_steps + 1) / self.discrete_steps  # n / N as XLA divides is an ulp off
            return jnp.asarray(steps, u.dtype)[index]
        return self.t_min + (1 - self.t_min) * u

    def c_noise(self, t: jax.Array) -> jax.Array:
        """Return the time as the network reads it, [B]: time_scale * (t or log(sigma / alpha)) + time_offset."""
        return self.time_scale * (t if self.noise_input == "t" else -self.schedules[0].log_snr(t)) + self.time_offset


def check_name(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError, naming the allowed values, if an option's value is not one of them."""
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is not known: use one of {', '.join(map(repr, allowed))}")
