"""One level of a hierarchy: its variable, network, process and sampler, and how it sees the coarser levels.

A level's variable is one array [B, h, w, c] (clips: [B, frames, h, w, c]), or a tuple of resolutions of one image or
clip, coarse to fine, diffused jointly (Matryoshka, arXiv 2310.15111): one time for all leaves, and for each leaf its
own schedule, noise and loss weight. Functions map over the leaves.

Row i of a batch draws its times, noises and drops from its own key, so nothing depends on how rows are split over
devices, hosts or accumulation steps. The functions on keys at the end of this file are the only way to those draws.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nested.diffusion.guidance import Guider
from nested.diffusion.process import Process, Tree, check_name
from nested.diffusion.samplers.table import Sampler
from nested.diffusion.schedules import Schedule

DROP_MODES = ("joint", "independent")
NOISE_SCALES = {"variance": 0.5, "std": 1.0}  # the power of (t/T)^gamma by which sigma is multiplied


class Network(Protocol):
    """What is used of a level's network; nested.models.backbone.Backbone is the base class of ours.

    buffers: patterns (re.search) of the paths, joined with '/', of parameters that are constants.
    has_dropout: whether training gives the network cond['dropout'], a key for each row.
    """

    buffers: ClassVar[tuple[str, ...]]

    @property
    def has_dropout(self) -> bool: ...

    def num_tokens(self, shape: Any, /) -> int:
        """Return the positions that the network works on for a variable of this shape."""
        ...

    def init(self, rngs: jax.Array, *args: Any, train: bool) -> Mapping[str, Any]:
        """{'params': the initial parameters} for (x, c_noise, cond)."""
        ...

    def apply(self, variables: Mapping[str, Any], *args: Any, train: bool) -> Tree:
        """The network's output for (x, c_noise, cond), a tree like x."""
        ...


@dataclasses.dataclass(frozen=True)
class ConditionNoise:
    """How a cascade noises coarser variables: the network sees alpha(s) z + sigma(s) n, and s.

    s is a noise step: uniform in 0, 1, ..., steps while training, and `noise_step` in sampling, with one noise n per
    sample; the network reads it as cond['noise_step_NAME'] (Saharia et al., arXiv 2205.11487, Sec. 2.4; the values that
    Matryoshka's App. E compares its cascade at).

    schedule: of the noise, read at s / steps. Raises ValueError for a noise_step outside 0, 1, ..., steps.
    """

    schedule: Schedule
    noise_step: int
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.noise_step <= self.steps:
            raise ValueError(
                f"condition noise: noise_step {self.noise_step} is outside 0 to {self.steps} (steps, at least 1)"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One level.

    shape: the variable's shape without the batch axis, (h, w, c) or (frames, h, w, c), or a tuple of such shapes.
    backbone: the network. process: the diffusion of the variable. sampler: how the variable is sampled.
    conditions: names of the coarser levels that this one sees; cond_sigmas: their sigma_m, in the same order.
    num_classes: 0 if the level does not see the label; otherwise labels are 0..num_classes-1 and null is num_classes.
    cond_drop: the probability that a training row loses its conditions. drop_mode: 'joint' drops all of them with one
        coin, 'independent' tosses one coin per condition.
    guidance: w of classifier-free guidance, cond + w (cond - null); 0 evaluates no null condition.
    noise_gamma, noise_scale, noise_resample: in sampling a condition is shown as z + (t/T)^(gamma/2) sigma n, so its
        variance is (t/T)^gamma sigma^2 (CVPR Sec. 4.2), or with noise_scale 'std' as z + (t/T)^gamma sigma n (Table
        3's caption). An infinite gamma shows it clean, 0 as in training. n is drawn once per sample, or with
        noise_resample at every time that the network is evaluated at. t/T: see conditioning.time_fraction.
    threshold: None, or a Guider that limits the estimate of x0 in sampling.
    inputs: names of further entries of the context that the network sees if they are there, such as 'augment'.
    null_text: what stands for an absent text, {'text': [tokens, width], 'text_mask': [tokens]}; None if the level sees
        no text.
    condition_noise: how a cascade noises its conditions; None noises them by cond_sigmas.
    signal_scales: numbers that the leaves are divided by before they are diffused (Chen, arXiv 2301.10972); () if none.
    mixed: (q, ..., p): of every q training rows p have the leaf, coarse to fine; () if all rows have all leaves
        (nested/ops/mixed_rows.py). A leaf's loss is averaged over the rows that have it.
    leaf_weights: the weight of each leaf's loss. loss_weight: the weight of the level's.
    Raises ValueError for a drop_mode or noise_scale that does not exist.
    """

    name: str
    shape: Tree
    backbone: Network
    process: Process
    sampler: Sampler
    conditions: tuple[str, ...] = ()
    cond_sigmas: tuple[float, ...] = ()
    num_classes: int = 0
    cond_drop: float = 0.0
    drop_mode: str = "joint"
    guidance: float = 0.0
    noise_gamma: float = math.inf
    noise_scale: str = "variance"
    noise_resample: bool = False
    threshold: Guider | None = None
    inputs: tuple[str, ...] = ()
    null_text: Mapping[str, Any] | None = None
    condition_noise: ConditionNoise | None = None
    signal_scales: tuple[float, ...] = ()
    mixed: tuple[int, ...] = ()
    leaf_weights: tuple[float, ...] = (1.0,)
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        check_name("hierarchy.drop_mode", self.drop_mode, DROP_MODES)
        check_name("hierarchy.noise_scale", self.noise_scale, NOISE_SCALES)


def is_shape(node: Any) -> bool:
    """Return whether a node of a shape tree is a shape, a tuple of ints."""
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def map_shape(function: Callable[[tuple[int, ...]], Any], shape: Tree) -> Tree:
    """Map over a level's shape tree, whose leaves are tuples of ints."""
    return jax.tree.map(function, shape, is_leaf=is_shape)


def select_context(levels: Iterable[Level], raw: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the context of a batch: what comes with its samples but is no level's variable.

    These are the entries 'label', 'text' and 'text_mask' of `raw`, [B, ...] each, and what Level.inputs names.
    """
    names = {"label", "text", "text_mask"}.union(*(level.inputs for level in levels))
    return {name: raw[name] for name in sorted(names) if name in raw}


def buffer_predicate(levels: Sequence[Level]) -> Callable[[str], bool]:
    """Return the function that says whether the parameter with a path 'level/module/.../leaf' is a constant.

    Constants are stored with the parameters but never trained, averaged or counted (Backbone.buffers).
    """
    patterns = {level.name: level.backbone.buffers for level in levels}

    def is_buffer(path: str) -> bool:
        name, _, rest = path.partition("/")
        return any(re.search(pattern, rest) for pattern in patterns.get(name, ()))

    return is_buffer


def row_keys(key: jax.Array, number: int) -> jax.Array:
    """Return [number] keys, of which the i-th is a function of (key, i) only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number))


def fold_rows(keys: jax.Array, data: int) -> jax.Array:
    """Return fold_in(key, data) for every row's key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def normal(keys: jax.Array, shape: Tree, dtype: DTypeLike = jnp.float32) -> Tree:
    """Draw N(0, I) of `shape` with each row's key: leaves [B, *shape]."""
    leaves, structure = jax.tree.flatten(shape, is_leaf=is_shape)
    return structure.unflatten(
        jax.vmap(lambda key, leaf=leaf: jax.random.normal(key, leaf, dtype))(fold_rows(keys, i))
        for i, leaf in enumerate(leaves)
    )
