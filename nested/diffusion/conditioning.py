"""The conditions of a level: coarser variables with noise, the label, the text, and how they are left out.

    z-hat_m = z_m + sigma_m n      what a finer level sees of level m in training (CVPR 2025, Sec. 3.3)

The conditions of a level are a dict, [B, ...] each: every coarser variable by its name, with 'keep_NAME' [B] bool;
'label'; 'text' and 'text_mask'; and, for a cascade, 'noise_step_NAME' [B], how noisy that variable is.
With probability cond_drop a training row loses its conditions: coarser variables become the backbone's learnable empty
token (keep_NAME False), the label becomes the null class, the text the empty one. Guidance subtracts the same null
conditions.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nested.diffusion.denoiser import Cond, DenoiseFn
from nested.diffusion.level import NOISE_SCALES, Level, fold_rows, normal
from nested.diffusion.process import Tree


def null_cond(level: Level, cond: Cond) -> Cond:
    """Return the conditions of `level` with all of them absent.

    A cascade always sees its coarser image: only its noise weakens it.
    """
    null = dict(cond)
    for name in level.conditions if level.condition_noise is None else ():
        null[f"keep_{name}"] = jnp.zeros_like(cond[f"keep_{name}"])
    if level.num_classes:
        null["label"] = jnp.full_like(cond["label"], level.num_classes)
    for name, value in (level.null_text or {}).items():
        null[name] = jnp.broadcast_to(jnp.asarray(value, cond[name].dtype), cond[name].shape)
    return null


def conditions(level: Level, variables: Mapping[str, Tree], context: Cond) -> dict[str, Any]:
    """Return the conditions of `level`, all present and without noise.

    Args:
        level: the level that sees them.
        variables: the coarser levels' variables by name.
        context: what comes with the samples (level.select_context).

    Raises:
        ValueError: if the level sees a label or a text that the context lacks.
    """
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
    """Return conditions of one row, to initialise a network or to count its operations: only their shapes matter."""
    text = {name: jnp.ones((1, *value.shape)) for name, value in (level.null_text or {}).items()}
    cond = conditions(level, variables, {"label": jnp.zeros(1, jnp.int32), **text})
    if level.condition_noise is not None:
        cond |= {f"noise_step_{name}": jnp.zeros(1) for name in level.conditions}
    return cond


def add_condition_noise(level: Level, cond: Cond, keys: jax.Array, *, train: bool) -> dict[str, Any]:
    """Return `cond` with its coarser variables noised by level.condition_noise, and their noise steps.

    Args:
        level: a level of a cascade.
        cond: its conditions.
        keys: [B] keys of the noise and, in training, of the steps.
        train: whether steps are drawn, uniform; otherwise all are condition_noise.noise_step.

    Raises:
        ValueError: if the level has no condition_noise.
    """
    noise = level.condition_noise
    if noise is None:
        raise ValueError(f"level {level.name} has no condition_noise: its conditions are noised by cond_sigmas")
    cond = dict(cond)
    for i, name in enumerate(level.conditions):
        z, own = cond[name], fold_rows(keys, i)
        steps = jnp.full(z.shape[:1], noise.noise_step)
        if train:
            steps = jax.vmap(lambda key: jax.random.randint(key, (), 0, noise.steps + 1))(fold_rows(own, 1))
        alpha, sigma = (value.reshape(-1, *[1] * (z.ndim - 1)) for value in noise.schedule(steps / noise.steps))
        cond[name] = alpha * z + sigma * normal(own, z.shape[1:])
        cond[f"noise_step_{name}"] = steps.astype(jnp.float32)
    return cond


def train_conditions(level: Level, variables: Mapping[str, Tree], context: Cond, keys: jax.Array) -> dict[str, Any]:
    """Return the conditions of `level` as training shows them: noised, and dropped with probability cond_drop.

    Args and errors are those of `conditions`; keys: [B] keys of the noise and of the drops.
    """
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


def time_fraction(level: Level, t: jax.Array) -> jax.Array:
    """Return t/T, [B] in [0, 1], by which Level.noise_gamma weakens the noise of conditions.

    It is t itself if the schedule is clean at 0. Otherwise (EDM, whose range of times is arbitrary) it is the place of
    t between the sampler's last evaluation and its first.
    """
    if level.process.schedules[0](0.0)[1] == 0:
        return t
    first, last = level.sampler.span(level.process)
    return jnp.clip((t - last) / max(first - last, 1e-9), 0.0, 1.0)


def noised_conditions(level: Level, denoise: DenoiseFn, keys: jax.Array) -> DenoiseFn:
    """Return `denoise` with its coarser variables noised as Level.noise_gamma says.

    keys: [B] keys of the noise. An infinite noise_gamma returns `denoise` itself.
    """
    if math.isinf(level.noise_gamma):
        return denoise

    def noised(x_t: Tree, t: jax.Array, cond: Cond) -> Tree:
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
