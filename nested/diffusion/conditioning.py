"""A hierarchy is a tuple of levels, coarse to fine; each is a Gaussian diffusion over its own variable.

    p(z_1, ..., z_L) = p(z_L) prod_l p(z_l | z_{>l})                       (Nested Diffusion, CVPR 2025, Sec. 3, Eq. 5)
    loss             = sum_l E || target_l - net_l(z_l^(t), t, z-hat_{>l}, label) ||^2
    z-hat_m          = z_m + sigma_m n      what a finer level sees of level m in training (Sec. 3.3)

A level's networks are its own: levels can be trained together or one at a time, and reused in a deeper hierarchy.
With probability `cond_drop` a training row loses its conditions: coarser variables become the backbone's learnable
empty token, the label the null class, the text the empty one. The same null conditions are what guidance subtracts.

A level's variable may be a tuple of resolutions of one image or clip, coarse to fine, diffused jointly (Matryoshka,
arXiv 2310.15111): one time for all, a schedule and a noise for each, and the loss the weighted sum of theirs.

All functions map over the leaves of a level's variable, one array [B, h, w, c] or a tuple of them. `context` is the
dict of what comes with a sample but is no level's variable, [B, ...] each: 'label', 'text', 'text_mask', and what
Level.inputs names.
Row i of a batch draws its times, noises and drops from its own key, so nothing depends on how rows are split over
devices, hosts or accumulation steps.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested.diffusion import denoiser as dn
from nested.diffusion.process import Process, check_name
from nested.diffusion.schedules import Schedule
from nested.ops.mixed_rows import fill_rows, take_rows

DROP_MODES = ("joint", "independent")
NOISE_SCALES = {"variance": 0.5, "std": 1.0}  # the power of (t/T)^gamma by which sigma is multiplied

Tree = Any
Cond = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ConditionNoise:
    """How a cascade shows coarser variables: alpha(s) z + sigma(s) n, and s to the network as cond['noise_step_NAME'].

    s is uniform in 0, 1, ..., steps while training and `noise_step` in sampling, one noise n per sample (Saharia et al.
    2205.11487, Sec. 2.4; the levels that Matryoshka's App. E compares its cascade at).
    """

    schedule: Schedule
    noise_step: int
    steps: int = 1000

    def __post_init__(self):
        if self.steps < 1 or not 0 <= self.noise_step <= self.steps:
            raise ValueError(f"condition noise: noise_step {self.noise_step} is outside 0 to {self.steps}, at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One level.

    shape: the variable's shape without the batch axis, (h, w, c) or (frames, h, w, c), or a tuple of such shapes.
    conditions: names of the coarser levels this one sees; cond_sigmas: their sigma_m, in the same order.
    num_classes: 0 when the level does not see the label; otherwise labels are 0..num_classes-1, null = num_classes.
    cond_drop, drop_mode: see the module docstring; 'joint' drops everything with one coin, 'independent' tosses one
        coin per condition.
    guidance: w of classifier-free guidance, cond + w (cond - uncond); 0 evaluates no null condition.
    noise_gamma, noise_scale, noise_resample: in sampling a condition is shown as z + (t/T)^(gamma/2) sigma n, so its
        variance is (t/T)^gamma sigma^2 (CVPR Sec. 4.2), or with noise_scale 'std' as z + (t/T)^gamma sigma n (Table
        3's caption); infinity shows it clean, 0 as in training. n is one per sample, or drawn anew at every time that
        the network is evaluated at. t/T: see `time_fraction`.
    threshold: None, or a transform DenoiseFn -> DenoiseFn that limits x0 in sampling.
    inputs: names of what else of `context` (see above) this level sees where it is there, such as 'augment'.
    null_text: None, or what a level with text sees without it: {'text': [tokens, width], 'text_mask': [tokens]}.
    condition_noise: None for cond_sigmas, or how conditions are noised instead.
    leaf_weights: of the loss of each leaf. signal_scales: numbers that the leaves are divided by where they are
        diffused (Chen, 2301.10972), () for none.
    mixed: (q, ..., p): of every q training rows that many have the leaf, coarse to fine; () for all leaves in all rows
        (nested/ops/mixed_rows.py). A leaf's loss is averaged over the rows that have it.
    """

    name: str
    shape: Tree
    backbone: nn.Module
    process: Process
    sampler: Callable
    conditions: tuple[str, ...] = ()
    cond_sigmas: tuple[float, ...] = ()
    num_classes: int = 0
    cond_drop: float = 0.0
    drop_mode: str = "joint"
    guidance: float = 0.0
    noise_gamma: float = math.inf
    noise_scale: str = "variance"
    noise_resample: bool = False
    threshold: Callable | None = None
    inputs: tuple[str, ...] = ()
    null_text: Mapping[str, Any] | None = None
    condition_noise: ConditionNoise | None = None
    signal_scales: tuple[float, ...] = ()
    mixed: tuple[int, ...] = ()
    leaf_weights: tuple[float, ...] = (1.0,)
    loss_weight: float = 1.0

    def __post_init__(self):
        check_name("hierarchy.drop_mode", self.drop_mode, DROP_MODES)
        check_name("hierarchy.noise_scale", self.noise_scale, tuple(NOISE_SCALES))


def is_shape(node) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def map_shape(function: Callable, shape: Tree) -> Tree:
    """Maps over a level's shape tree, whose leaves are tuples of ints."""
    return jax.tree.map(function, shape, is_leaf=is_shape)


def row_keys(key: jax.Array, number: int) -> jax.Array:
    """[number] keys, the i-th a function of (key, i) only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number))


def fold_rows(keys: jax.Array, data: int) -> jax.Array:
    """fold_in(data) on every row's key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def normal(keys: jax.Array, shape: Tree, dtype=jnp.float32) -> Tree:
    """N(0, I) of `shape` for each row's key: leaves [B, *shape]."""
    leaves, structure = jax.tree.flatten(shape, is_leaf=is_shape)
    return structure.unflatten(
        jax.vmap(lambda key, leaf=leaf: jax.random.normal(key, leaf, dtype))(fold_rows(keys, i))
        for i, leaf in enumerate(leaves)
    )


def select_context(levels: Sequence[Level], raw: Mapping[str, jax.Array]) -> Cond:
    """What is given with the records of a batch: labels, text, and what the levels' `inputs` name of their fields."""
    names = {"label", "text", "text_mask"}.union(*(level.inputs for level in levels))
    return {name: raw[name] for name in sorted(names) if name in raw}


def is_buffer(levels: Sequence[Level]) -> Callable[[str], bool]:
    """Whether the parameter with a path 'level/module/.../leaf' is a constant of its backbone (Backbone.buffers)."""
    patterns = {level.name: level.backbone.buffers for level in levels}

    def predicate(path: str) -> bool:
        name, _, rest = path.partition("/")
        return any(re.search(pattern, rest) for pattern in patterns.get(name, ()))

    return predicate


def null_cond(level: Level, cond: Cond) -> Cond:
    """The conditions of `level` with all of them absent (what 10 % of training rows and guidance see). A cascade always
    sees its coarser image: its condition noise is what weakens it."""
    null = dict(cond)
    for name in level.conditions if level.condition_noise is None else ():
        null[f"keep_{name}"] = jnp.zeros_like(cond[f"keep_{name}"])
    if level.num_classes:
        null["label"] = jnp.full_like(cond["label"], level.num_classes)
    for name, value in (level.null_text or {}).items():
        null[name] = jnp.broadcast_to(jnp.asarray(value, cond[name].dtype), cond[name].shape)
    return null


def conditions(level: Level, variables: Mapping[str, Tree], context: Cond) -> Cond:
    """The conditions of `level`, all present, from the coarser levels' variables and what is given."""
    cond = {name: context[name] for name in level.inputs if name in context}
    for name in level.conditions:
        cond[name] = variables[name]
        cond[f"keep_{name}"] = jnp.ones(jax.tree.leaves(variables[name])[0].shape[0], bool)
    if level.num_classes:
        if "label" not in context:
            raise ValueError(f"level {level.name} has num_classes {level.num_classes} but no 'label' [B] is given")
        cond["label"] = context["label"]
    for name in level.null_text or ():
        if name not in context:
            raise ValueError(f"level {level.name} sees text but no {name!r} [B, tokens, ...] is given")
        cond[name] = context[name]
    return cond


def blank_conditions(level: Level, variables: Mapping[str, Tree]) -> Cond:
    """The conditions of one row, where only their shapes count."""
    text = {name: jnp.ones((1, *value.shape)) for name, value in (level.null_text or {}).items()}
    cond = conditions(level, variables, {"label": jnp.zeros(1, jnp.int32), **text})
    if level.condition_noise is not None:
        cond |= {f"noise_step_{name}": jnp.zeros(1) for name in level.conditions}
    return cond


def add_condition_noise(level: Level, cond: Cond, keys: jax.Array, *, train: bool) -> Cond:
    """`cond` with its coarser variables noised by level.condition_noise, which must not be None."""
    cond, condition_noise = dict(cond), level.condition_noise
    for i, name in enumerate(level.conditions):
        z, own = cond[name], fold_rows(keys, i)
        steps = jnp.full(z.shape[:1], condition_noise.noise_step)
        if train:
            steps = jax.vmap(lambda key: jax.random.randint(key, (), 0, condition_noise.steps + 1))(fold_rows(own, 1))
        alpha, sigma = (
            value.reshape(-1, *[1] * (z.ndim - 1)) for value in condition_noise.schedule(steps / condition_noise.steps)
        )
        cond[name] = alpha * z + sigma * normal(own, z.shape[1:])
        cond[f"noise_step_{name}"] = steps.astype(jnp.float32)
    return cond


def train_conditions(level: Level, variables: Mapping[str, Tree], context: Cond, keys: jax.Array) -> Cond:
    """As `conditions`, noised as the level says and dropped with probability cond_drop."""
    cond = conditions(level, variables, context)
    if level.condition_noise is not None:
        cond = add_condition_noise(level, cond, keys, train=True)
    else:
        for i, (name, sigma) in enumerate(zip(level.conditions, level.cond_sigmas, strict=True)):
            shape = jax.tree.map(lambda z: z.shape[1:], variables[name])
            noise = normal(fold_rows(keys, i), shape)
            cond[name] = jax.tree.map(lambda z, n, s=sigma: z + s * n, variables[name], noise)
    if not level.cond_drop:
        return cond
    null = null_cond(level, cond)
    optional = [key for key in cond if key.startswith("keep_") or key in ("label", "text")]
    for i, name in enumerate(sorted(optional)):
        coin = fold_rows(keys, 1000 + (i if level.drop_mode == "independent" else 0))
        dropped = jax.vmap(jax.random.bernoulli, (0, None))(coin, level.cond_drop)
        for part in ("text", "text_mask") if name == "text" else (name,):
            rows_dropped = dropped.reshape(-1, *[1] * (cond[part].ndim - 1))
            cond[part] = jnp.where(rows_dropped, null[part], cond[part])
    return cond


def apply_network(level: Level, params: Tree, *, train: bool) -> Callable:
    """The level's raw network as a function (x_t, c_noise, cond) -> prediction."""
    return lambda x, c_noise, cond: level.backbone.apply({"params": params}, x, c_noise, cond, train=train)


def init(levels: Sequence[Level], key: jax.Array) -> dict[str, Tree]:
    """{level name: parameters}. A level's parameters depend on (key, its name's place from the top) only, so that
    deeper and shallower hierarchies of equal shapes start from equal coarse levels."""
    shapes = {level.name: level.shape for level in levels}
    params = {}
    for i, level in enumerate(levels):
        zeros = {n: map_shape(lambda s: jnp.zeros((1, *s)), shape) for n, shape in shapes.items()}
        cond = blank_conditions(level, zeros)
        variables = level.backbone.init(jax.random.fold_in(key, i), zeros[level.name], jnp.zeros(1), cond, train=False)
        params[level.name] = variables["params"]
    return params


def scale_signal(level: Level, variable: Tree, power: int) -> Tree:
    """The variable times signal_scales^power: -1 into what is diffused, 1 back."""
    if not level.signal_scales:
        return variable
    leaves, structure = jax.tree.flatten(variable)
    return structure.unflatten(leaf * s**power for leaf, s in zip(leaves, level.signal_scales, strict=True))


def leaf_rows(level: Level, batch: int) -> tuple[int, ...]:
    """How many of `batch` training rows have each leaf. Raises ValueError where level.mixed does not divide them."""
    if batch % level.mixed[0]:
        raise ValueError(f"level {level.name}: {batch} rows do not divide into mixed groups of {level.mixed[0]}")
    return tuple(batch // level.mixed[0] * count for count in level.mixed)


def mixed_resolutions(network: Callable, counts: Sequence[int]) -> Callable:
    """`network` fed the rows of each leaf that have it; its output is filled up with zeros to all rows."""

    def mixed(x, c_noise, cond):
        leaves, structure = jax.tree.flatten(x)
        few = structure.unflatten(take_rows(leaf, *counts[: i + 1]) for i, leaf in enumerate(leaves))
        out = jax.tree.leaves(network(few, c_noise, cond))
        return structure.unflatten(fill_rows(leaf, *counts[i::-1]) for i, leaf in enumerate(out))

    return mixed


def sample_times(levels: Sequence[Level], keys: jax.Array) -> dict[str, jax.Array]:
    """Each level's training times [B] for the whole global batch (stratified sampling needs all of it)."""
    return {level.name: level.process.sample_time(fold_rows(fold_rows(keys, i), 0)) for i, level in enumerate(levels)}


def losses(
    levels: Sequence[Level],
    params: Mapping[str, Tree],
    variables: Mapping[str, Tree],
    context: Cond,
    times: Mapping[str, jax.Array],
    keys: jax.Array,
    *,
    only: Sequence[str] | None = None,
    train: bool = True,
) -> dict[str, jax.Array]:
    """Per-row loss [B] of every level (or of those named in `only`), each times its loss_weight.

    variables: {level name: clean variable}; keys: [B] typed keys, of the noise, the drops and dropout. train=False
    (validation) keeps every condition and its noise, and drops none.
    """
    result = {}
    for i, level in enumerate(levels):
        if only is not None and level.name not in only:
            continue
        level_keys = fold_rows(keys, i)
        if not train:
            level = dataclasses.replace(level, cond_drop=0.0)
        x0, t = scale_signal(level, variables[level.name], -1), times[level.name]
        noise = normal(fold_rows(level_keys, 1), level.shape)
        cond = train_conditions(level, variables, context, fold_rows(level_keys, 2))
        if train and level.backbone.has_dropout:
            cond["dropout"] = fold_rows(level_keys, 3)
        process = level.process
        x_t = process.corrupt(x0, noise, t)
        network = apply_network(level, params[level.name], train=train)
        weights = level.leaf_weights
        if train and level.mixed:
            counts = leaf_rows(level, t.shape[0])
            network = mixed_resolutions(network, counts)
            weights = tuple(
                weight * t.shape[0] / count * fill_rows(jnp.ones(count), *counts[i::-1])
                for i, (weight, count) in enumerate(zip(weights, counts, strict=True))
            )
        raw = network(process.network_input(x_t, t), process.c_noise(t), cond)
        result[level.name] = level.loss_weight * process.loss(raw, x0, noise, x_t, t, leaf_weights=weights)
    return result


def time_fraction(level: Level, t: jax.Array) -> jax.Array:
    """t/T of `noise_gamma`: t itself where the schedule is clean at 0; else (EDM, whose range of times is arbitrary)
    t's place between the sampler's last evaluation and its first."""
    if level.process.schedules[0](0.0)[1] == 0:
        return t
    first, last = level.sampler.span(level.process)
    return jnp.clip((t - last) / max(first - last, 1e-9), 0.0, 1.0)


def noised_conditions(level: Level, denoise: Callable, keys: jax.Array) -> Callable:
    """`denoise` seeing its coarser variables noised as Level.noise_gamma says (a DenoiseFn -> DenoiseFn transform)."""
    if math.isinf(level.noise_gamma):
        return denoise

    def noised(x_t, t, cond):
        cond, own = dict(cond), keys
        if level.noise_resample:
            bits = jax.lax.bitcast_convert_type(t.astype(jnp.float32), jnp.uint32)
            own = jax.vmap(jax.random.fold_in)(keys, bits)
        for i, (name, sigma) in enumerate(zip(level.conditions, level.cond_sigmas, strict=True)):
            noise = normal(fold_rows(own, i), jax.tree.map(lambda z: z.shape[1:], cond[name]))
            scale = sigma * time_fraction(level, t) ** (level.noise_gamma * NOISE_SCALES[level.noise_scale])
            cond[name] = jax.tree.map(
                lambda z, n, s=scale: z + s.reshape(-1, *[1] * (z.ndim - 1)) * n, cond[name], noise
            )
        return denoise(x_t, t, cond)

    return noised


def sample_level(level: Level, params: Tree, cond: Cond, keys: jax.Array, shown: Sequence[int] = ()) -> Tree:
    """One level's variable [B, ...] given its conditions.

    shown: numbers k of network evaluations; with any, (variable, the estimates of it that these evaluations gave,
    [len(shown), B, ...]) is returned."""
    denoise = dn.denoiser(apply_network(level, params, train=False), level.process)
    denoise = dn.guided(denoise, lambda c: null_cond(level, c), level.guidance)
    if level.threshold is not None:
        denoise = level.threshold(denoise)
    if level.condition_noise is not None:
        cond = add_condition_noise(level, cond, fold_rows(keys, 2), train=False)
    denoise = noised_conditions(level, denoise, fold_rows(keys, 2))
    x_T = level.process.prior(normal(fold_rows(keys, 0), level.shape), level.sampler.start(level.process))
    result = level.sampler(fold_rows(keys, 1), denoise, level.process, x_T, cond, shown)
    if not shown:
        return scale_signal(level, result, 1)
    return scale_signal(level, result[0], 1), scale_signal(level, result[1], 1)


def sample(
    levels: Sequence[Level],
    params: Mapping[str, Tree],
    keys: Mapping[str, jax.Array],
    context: Cond | None = None,
    fixed: Mapping[str, Tree] | None = None,
) -> dict[str, Tree]:
    """Samples every level coarse to fine: {level name: variable [B, ...]}.

    keys: {level name: [B]}. A level of sample i depends on i's keys of this and the coarser levels, and on what is
    given with it, only, so samples that share the keys of the coarser levels share those levels: the paper's Figure 1
    (fix the coarser levels, resample the finer ones). `fixed` gives variables that are taken as they are.
    """
    variables = dict(fixed or {})
    for i, level in enumerate(levels):
        if level.name not in variables:
            cond = conditions(level, variables, context or {})
            variables[level.name] = sample_level(level, params[level.name], cond, fold_rows(keys[level.name], i))
    return variables
