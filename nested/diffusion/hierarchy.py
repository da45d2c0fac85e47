"""A hierarchy is a tuple of levels, coarse to fine; each is a Gaussian diffusion over its own variable.

    p(z_1, ..., z_L) = p(z_L) prod_l p(z_l | z_{>l})                       (Nested Diffusion, CVPR 2025, Sec. 3, Eq. 5)
    loss             = sum_l E || target_l - net_l(z_l^(t), t, z-hat_{>l}, label) ||^2

z-hat is what a level sees of the coarser ones (nested/diffusion/conditioning.py). A level's networks are its own:
levels can be trained together or one at a time, and reused in a deeper hierarchy.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from nested.diffusion.conditioning import (
    add_condition_noise,
    blank_conditions,
    conditions,
    noised_conditions,
    null_cond,
    train_conditions,
)
from nested.diffusion.denoiser import Cond, NetworkFn, denoiser
from nested.diffusion.guidance import guided
from nested.diffusion.level import Level, fold_rows, map_shape, normal
from nested.diffusion.process import Tree
from nested.ops.mixed_rows import fill_rows, take_rows


def apply_network(level: Level, params: Tree, *, train: bool) -> NetworkFn:
    """Return the level's raw network as a function (input, c_noise, cond) -> prediction."""
    return lambda x, c_noise, cond: level.backbone.apply({"params": params}, x, c_noise, cond, train=train)


def init(levels: Sequence[Level], key: jax.Array) -> dict[str, Tree]:
    """Return {level name: initial parameters}.

    A level's parameters depend on (key, its place from the top) only, so that deeper and shallower hierarchies of equal
    shapes start from equal coarse levels.
    """
    shapes = {level.name: level.shape for level in levels}
    params = {}
    for i, level in enumerate(levels):
        zeros = {n: map_shape(lambda s: jnp.zeros((1, *s)), shape) for n, shape in shapes.items()}
        cond = blank_conditions(level, zeros)
        variables = level.backbone.init(jax.random.fold_in(key, i), zeros[level.name], jnp.zeros(1), cond, train=False)
        params[level.name] = variables["params"]
    return params


def scale_signal(level: Level, variable: Tree, power: int) -> Tree:
    """Return the variable times signal_scales^power: -1 gives the diffused variable, 1 the original."""
    if not level.signal_scales:
        return variable
    leaves, structure = jax.tree.flatten(variable)
    return structure.unflatten(leaf * s**power for leaf, s in zip(leaves, level.signal_scales, strict=True))


def leaf_rows(level: Level, batch: int) -> tuple[int, ...]:
    """Return how many of `batch` training rows have each leaf.

    Raises ValueError if the batch does not divide into groups of level.mixed.
    """
    if batch % level.mixed[0]:
        raise ValueError(f"level {level.name}: {batch} rows do not divide into mixed groups of {level.mixed[0]}")
    return tuple(batch // level.mixed[0] * count for count in level.mixed)


def mixed_resolutions(network: NetworkFn, counts: Sequence[int]) -> NetworkFn:
    """Return `network` fed with those rows of each leaf that have it; zeros fill its output up to all rows."""

    def mixed(x: Tree, c_noise: jax.Array, cond: Cond) -> Tree:
        leaves, structure = jax.tree.flatten(x)
        few = structure.unflatten(take_rows(leaf, *counts[: i + 1]) for i, leaf in enumerate(leaves))
        out = jax.tree.leaves(network(few, c_noise, cond))
        return structure.unflatten(fill_rows(leaf, *counts[i::-1]) for i, leaf in enumerate(out))

    return mixed


def sample_times(levels: Sequence[Level], keys: jax.Array) -> dict[str, jax.Array]:
    """Draw each level's training times [B] for the whole global batch (stratified sampling needs all of it)."""
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
    """Return {level name: per-row loss [B]}, each times the level's loss_weight.

    Args:
        levels: the whole hierarchy.
        params: {level name: parameters} of the levels that have a loss.
        variables: {level name: clean variable}, leaves [B, ...].
        context: what comes with the samples, [B, ...] each.
        times: {level name: [B]} in [0, 1].
        keys: [B] typed keys of the noise, the drops and dropout.
        only: the names of the levels to take; None takes all of them.
        train: False (validation) keeps every condition and its noise, and drops none.
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
        weights: Sequence[float | jax.Array] = level.leaf_weights
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


def sample_level(level: Level, params: Tree, cond: Cond, keys: jax.Array, shown: Sequence[int] = ()) -> Tree:
    """Draw one level's variable, leaves [B, ...].

    Args:
        level: the level.
        params: its parameters.
        cond: its conditions, without noise (conditioning.conditions).
        keys: [B] typed keys, one per sample.
        shown: the numbers of network evaluations whose estimates are wanted.

    Returns:
        The variable. With `shown`, (the variable, the estimates of it that these evaluations gave, leaves
        [len(shown), B, ...]).
    """
    denoise = denoiser(apply_network(level, params, train=False), level.process)
    denoise = guided(denoise, lambda c: null_cond(level, c), level.guidance)
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
    """Draw every level, coarse to fine.

    A level of sample i depends on i's keys of this and the coarser levels and on i's context only, so samples that
    share the keys of the coarser levels share those levels: the paper's Figure 1 (fix the coarser levels, resample the
    finer ones).

    Args:
        levels: the hierarchy.
        params: {level name: parameters}.
        keys: {level name: [B] typed keys}.
        context: what comes with the samples, such as 'label' [B].
        fixed: {level name: variable} of levels that are not drawn but taken as they are.

    Returns:
        {level name: variable, leaves [B, ...]}, the fixed ones included.
    """
    variables = dict(fixed or {})
    for i, level in enumerate(levels):
        if level.name not in variables:
            cond = conditions(level, variables, context or {})
            variables[level.name] = sample_level(level, params[level.name], cond, fold_rows(keys[level.name], i))
    return variables
