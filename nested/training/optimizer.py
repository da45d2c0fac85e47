"""AdamW, warm-up, clipping and the exponential moving average (EMA) of parameters.

AdamW (Loshchilov and Hutter 2019) with the semantics of torch.optim.AdamW, as U-ViT trains (its utils.py); without
groups, weight decay acts on every parameter, biases, norms and position embeddings included; it is scaled by the
learning rate:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps) + weight_decay p)        k = 1, 2, ... updates

Learning rate of the update that takes the state from step s to s + 1 (s = 0, 1, ...):

    lr(s) = learning_rate * min(max(s, warmup_start) / warmup_steps, 1) * f(s)
    with warmup_start 0 the first update has lr = 0, as in U-ViT; with 1 it has the second's, as in ml-mdm
    f = 1 ('constant'), or (1 + cos(pi u)) / 2 with u = (s - warmup_steps) / (total_steps - warmup_steps) in [0, 1]

Groups multiply lr and weight_decay by rule on the parameters' paths, 'level/module/.../leaf'. Buffers (constants that a
model saves with its parameters, Backbone.buffers) are never updated.

EMA: ema <- d ema + (1 - d) p after every update, from step 0, where ema is a copy of the initial parameters;
    d = ema_decay, or with ema_power k > 0 (k-diffusion, utils.py:89-152) min(ema_decay, 1 - (1 + s)^-k).

Parameters are {level name: parameters of that level}. Levels are separate networks, so gradients are clipped by the
norm over one level, not over all: levels trained together are then the same as levels trained alone (Nested Diffusion
trains them alone, in parallel).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax import GradientTransformation

Tree = Any
IsBuffer = Callable[[str], bool]  # whether the parameter with this path, 'level/module/.../leaf', is a constant
Decay = Literal["constant", "cosine"]


@dataclasses.dataclass(frozen=True)
class Group:
    """The parameters whose path matches `pattern` (re.search). Where several groups match, the first one counts."""

    pattern: Annotated[str, "regular expression for paths 'level/module/.../leaf'"]
    learning_rate: Annotated[float, "factor on optimizer.learning_rate"] = 1.0
    weight_decay: Annotated[float, "factor on optimizer.weight_decay"] = 1.0

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"optimizer.groups: pattern {self.pattern!r} is not a regular expression: {error}"
            ) from error
        if min(self.learning_rate, self.weight_decay) < 0:
            raise ValueError(
                f"optimizer.groups: {self.pattern!r} has learning_rate {self.learning_rate}, weight_decay "
                f"{self.weight_decay}; factors are at least 0"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """config.optimizer.

    total_steps: the step at which 'cosine' reaches 0; None with 'constant'. The build takes it from train.steps.
    Raises ValueError for a value out of range.
    """

    learning_rate: Annotated[float, "peak learning rate"] = 2e-4
    warmup_steps: Annotated[int, "steps of linear warm-up; 0: none"] = 0
    warmup_start: Annotated[Literal[0, 1], "1: the first update has the rate of step 1, not 0 (ml-mdm)"] = 0
    decay: Annotated[Decay, "of the learning rate after the warm-up; cosine reaches 0 at train.steps"] = "constant"
    b1: Annotated[float, "AdamW: decay of the first moment"] = 0.9
    b2: Annotated[float, "AdamW: decay of the second moment"] = 0.999
    eps: Annotated[float, "AdamW: added to the root of the second moment"] = 1e-8
    weight_decay: Annotated[float, "AdamW: decoupled, scaled by the learning rate"] = 0.03
    clip_norm: Annotated[float, "largest gradient norm of a level; 0: no clipping"] = 0.0
    ema_decay: Annotated[float, "decay of the moving average of the parameters"] = 0.9999
    ema_power: Annotated[float, "k > 0: the decay of update s is at most 1 - (1 + s)^-k; 0: constant"] = 0.0
    groups: Annotated[tuple[Group, ...], "factors by rule on parameter paths: dict(pattern=, learning_rate=, ...)"] = ()
    total_steps: int | None = None

    def __post_init__(self):
        if self.decay not in get_args(Decay):
            raise ValueError(f"optimizer.decay: found {self.decay!r}, expected one of {get_args(Decay)}")
        if self.decay == "constant" and self.total_steps is not None:
            raise ValueError(
                f"optimizer.total_steps: found {self.total_steps}, which decay='constant' does not use; give None"
            )
        if self.decay == "cosine" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"optimizer.total_steps: found {self.total_steps}, "
                f"decay='cosine' needs more than warmup_steps={self.warmup_steps}"
            )
        if self.warmup_start not in (0, 1):
            raise ValueError(f"optimizer.warmup_start: found {self.warmup_start}, expected 0 or 1")
        for name in ("learning_rate", "warmup_steps", "eps", "weight_decay", "clip_norm", "ema_power"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}: found {getattr(self, name)}, expected at least 0")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: found {getattr(self, name)}, expected a number in [0, 1)")


def learning_rate(config: OptimizerConfig, step: ArrayLike) -> jax.Array:
    """lr(step) of the module docstring, float []. step: int [], the number of updates made so far."""
    step = jnp.asarray(step, jnp.result_type(float))
    rate = jnp.full_like(step, config.learning_rate)
    if config.warmup_steps:
        rate = rate * jnp.minimum(jnp.maximum(step, config.warmup_start) / config.warmup_steps, 1.0)
    if config.total_steps is not None:  # cosine
        progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
        rate = rate * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(progress, 0.0, 1.0)))
    return rate


def path_name(path: tuple[Any, ...]) -> str:
    """'x/mapping/blocks_0/norm/gain' for a jax key path."""
    return "/".join(entry.key for entry in path)


def group_factors(config: OptimizerConfig, is_buffer: IsBuffer, path: tuple[Any, ...]) -> tuple[float, float]:
    """(factor on the learning rate, factor on the weight decay) of the parameter at a jax key path."""
    name = path_name(path)
    if is_buffer(name):
        return 0.0, 0.0
    for group in config.groups:
        if re.search(group.pattern, name):
            return group.learning_rate, group.weight_decay
    return 1.0, 1.0


def check_groups(config: OptimizerConfig, params: Tree) -> None:
    """Raises ValueError if the pattern of a group matches no path of `params`, {level: parameters or their shapes}."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for group in config.groups:
        if not any(re.search(group.pattern, name) for name in names):
            raise ValueError(
                f"optimizer.groups: pattern {group.pattern!r} matches no parameter; there are {names[0]}, {names[-1]} "
                f"and {len(names) - 2} between them"
            )


def make_optimizer(config: OptimizerConfig, is_buffer: IsBuffer = lambda path: False) -> GradientTransformation:
    """The optimizer for parameters {level: tree}: clipping per level, AdamW by groups, the learning rate.

    is_buffer: says which parameters are constants, which are never updated.
    """

    def decay(updates, params):
        return jax.tree_util.tree_map_with_path(
            lambda path, u, p: u + config.weight_decay * group_factors(config, is_buffer, path)[1] * p, updates, params
        )

    def rate(updates, params):
        return jax.tree_util.tree_map_with_path(lambda path, u: group_factors(config, is_buffer, path)[0] * u, updates)

    steps = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.stateless(decay),
        optax.scale_by_learning_rate(lambda step: learning_rate(config, step)),
        optax.stateless(rate),
    ]
    if config.clip_norm:
        steps.insert(0, clip_per_level(config.clip_norm))
    return optax.chain(*steps)


def gradient_norms(gradients: Mapping[str, Tree]) -> dict[str, jax.Array]:
    """{level: gradients} -> {level: their L2 norm, float32 []}."""
    return {level: optax.tree.norm(tree) for level, tree in gradients.items()}


def clip_per_level(max_norm: float) -> GradientTransformation:
    """Multiplies the gradients of each level by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils does."""

    def clip(tree):
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(tree) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), tree)

    return optax.stateless(lambda updates, params: {level: clip(tree) for level, tree in updates.items()})


def ema_decay(config: OptimizerConfig, step: ArrayLike) -> jax.Array:
    """d of the module docstring at the update that takes the state from `step` to step + 1, float []."""
    step = jnp.asarray(step, jnp.result_type(float))
    if not config.ema_power:
        return jnp.full_like(step, config.ema_decay)
    return jnp.minimum(config.ema_decay, 1 - (1 + step) ** -config.ema_power)


def ema_update(ema: Tree, params: Tree, decay: ArrayLike, is_buffer: IsBuffer = lambda path: False) -> Tree:
    """decay * ema + (1 - decay) * params, leaf by leaf, in the dtype of the EMA. Buffers are copied."""

    def leaf(path, e, p):
        p = p.astype(e.dtype)
        return p if is_buffer(path_name(path)) else e * decay + p * (1 - decay)

    return jax.tree_util.tree_map_with_path(leaf, ema, params)
