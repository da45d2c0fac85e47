"""AdamW, warm-up, clipping and the exponential moving average (EMA) of parameters.

AdamW (Loshchilov and Hutter 2019) with the semantics of torch.optim.AdamW, as U-ViT trains (its utils.py): one group,
so weight decay acts on every parameter, biases, norms and position embeddings included; it is scaled by the learning
rate:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps) + weight_decay p)        k = 1, 2, ... updates

Learning rate of the update that takes the state from step s to s + 1 (s = 0, 1, ...):

    lr(s) = learning_rate * min(s / warmup_steps, 1) * f(s)      so the first update has lr = 0, as in U-ViT
    f = 1 ('constant'), or (1 + cos(pi u)) / 2 with u = (s - warmup_steps) / (total_steps - warmup_steps) in [0, 1]

EMA: ema <- d ema + (1 - d) p after every update, from step 0, where ema is a copy of the initial parameters.

Parameters are {level name: parameters of that level}. Levels are separate networks, so gradients are clipped by the
norm over one level, not over all: levels trained together are then the same as levels trained alone (Nested Diffusion
trains them alone, in parallel).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

DECAYS = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """learning_rate: peak. warmup_steps: 0 for none. total_steps: where 'cosine' reaches 0 ('constant' wants None).

    clip_norm: largest gradient norm per level, 0 for no clipping. ema_decay: d above, in [0, 1).
    """

    learning_rate: float
    warmup_steps: int
    decay: str
    total_steps: int | None
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    ema_decay: float

    def __post_init__(self):
        if self.decay not in DECAYS:
            raise ValueError(f"optimizer.decay: found {self.decay!r}, expected one of {DECAYS}")
        if self.decay == "constant" and self.total_steps is not None:
            raise ValueError(
                f"optimizer.total_steps: found {self.total_steps}, which decay='constant' does not use; give None"
            )
        if self.decay == "cosine" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"optimizer.total_steps: found {self.total_steps}, "
                f"decay='cosine' needs more than warmup_steps={self.warmup_steps}"
            )
        for name in ("learning_rate", "warmup_steps", "eps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}: found {getattr(self, name)}, expected at least 0")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: found {getattr(self, name)}, expected a number in [0, 1)")


def learning_rate(config, step):
    """lr(step) of the module docstring: [] float; `step` [] int, the updates made so far."""
    step = jnp.asarray(step, jnp.result_type(float))
    rate = jnp.full_like(step, config.learning_rate)
    if config.warmup_steps:
        rate = rate * jnp.minimum(step / config.warmup_steps, 1.0)
    if config.decay == "cosine":
        progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
        rate = rate * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(progress, 0.0, 1.0)))
    return rate


def make_optimizer(config):
    """optax.GradientTransformation for parameters {level: tree}: clip each level, AdamW, the learning rate above.

    A later rule of parameter groups (learning rate or decay by path) belongs between clipping and the learning rate.
    """
    steps = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda step: learning_rate(config, step)),
    ]
    if config.clip_norm:
        steps.insert(0, clip_per_level(config.clip_norm))
    return optax.chain(*steps)


def gradient_norms(gradients):
    """{level: tree of gradients} -> {level: [] float32 L2 norm over that level's parameters}."""
    return {level: optax.tree.norm(tree) for level, tree in gradients.items()}


def clip_per_level(max_norm):
    """GradientTransformation: each level's gradients times min(1, max_norm / (norm + 1e-6)), as torch.nn.utils does."""

    def clip(tree):
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(tree) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), tree)

    return optax.stateless(lambda updates, params: {level: clip(tree) for level, tree in updates.items()})


def ema_update(ema, params, decay):
    """decay * ema + (1 - decay) * params, leaf by leaf, in the EMA's own dtype (float32 or better)."""
    return jax.tree.map(lambda e, p: e * decay + p.astype(e.dtype) * (1 - decay), ema, params)
