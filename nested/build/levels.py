"""Config -> the levels of the hierarchy: networks, conditions, processes, samplers. Nothing is put on a device."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from nested.build.options import Config, choose, construct
from nested.build.parts import BACKBONES, CONDITIONINGS, THRESHOLDS
from nested.build.presets import check_preset
from nested.build.process import build_process, build_sampler, is_joint
from nested.build.sections import HierarchyOptions, LevelOptions, check_sections
from nested.diffusion.level import ConditionNoise, Level
from nested.diffusion.process import Process, Tree
from nested.models import Backbone

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_levels(config: Config, null_text: Mapping[str, np.ndarray] | None = None) -> tuple[Level, ...]:
    """Build the hierarchy, coarse to fine.

    Args:
      null_text: {'text': [tokens, width], 'text_mask': [tokens]} of the empty caption, for levels that see text. None
        stands for one token of zeros: enough if only shapes count or the data are random.

    Raises: ValueError, in one line that names the option, for options that do not exist, do not apply or contradict
      each other.
    """
    check_sections(config)
    levels = [construct(f"levels[{i}]", LevelOptions, dict(level), {}) for i, level in enumerate(config.levels)]
    check_hierarchy(config, levels)
    check_preset(config)
    if null_text is None:
        tokens, width = config.text.max_tokens, config.text.width
        null_text = {"text": np.zeros((tokens, width), np.float32), "text_mask": np.arange(tokens) == 0}
    result = tuple(build_level(config, levels, i, null_text) for i in range(len(levels)))
    for coarse, fine in itertools.pairwise(result):
        if any(c > f for c, f in zip(_grid(coarse.shape), _grid(fine.shape), strict=True)):
            raise ValueError(
                f"config.levels: the shapes do not nest: {coarse.name} {coarse.shape} comes before {fine.name} "
                f"{fine.shape} but has the larger grid; list the levels coarse to fine"
            )
    return result


def check_hierarchy(config: Config, levels: Sequence[LevelOptions]) -> None:
    """Raise ValueError, in one line, for options of config.hierarchy that do not go with each other or the levels."""
    names, hierarchy = [level.name for level in levels], config.hierarchy
    if not levels:
        raise ValueError("config.levels is empty: give at least one level (configs/common.py level())")
    if len(set(names)) < len(names):
        raise ValueError(f"config.levels: names must differ, found {', '.join(names)}")
    for name in (*hierarchy.label_levels, *hierarchy.text_levels, *config.train_levels):
        choose("hierarchy.label_levels / text_levels / train_levels", name, names)
    if hierarchy.label_levels and not config.data.num_classes:
        raise ValueError("config.hierarchy.label_levels names levels but config.data.num_classes is 0: no labels")
    if hierarchy.cond_noise != "sigma" and len(names) == 1:
        raise ValueError(
            f"config.hierarchy.cond_noise {hierarchy.cond_noise!r}: a single level has no conditions: 'sigma'"
        )
    if bool(hierarchy.text_levels) != bool(config.text.encoder):
        raise ValueError(
            f"config.hierarchy.text_levels is {tuple(hierarchy.text_levels)}, config.text.encoder "
            f"{config.text.encoder!r}: give both, or neither"
        )
    if not config.text.encoder and (config.sample.prompts or config.sample.negative_prompt):
        raise ValueError("config.sample.prompts and negative_prompt need text: set config.text.encoder and text_levels")
    if math.isinf(hierarchy.noise_gamma) and (hierarchy.noise_scale != "variance" or hierarchy.noise_resample):
        raise ValueError(
            f"config.hierarchy.noise_scale {hierarchy.noise_scale!r}, noise_resample {hierarchy.noise_resample}: with "
            "gamma infinity conditions are shown without noise; set them to 'variance' and False, or give a noise_gamma"
        )
    if not hierarchy.noise_gamma >= 0:
        raise ValueError(
            f"config.hierarchy.noise_gamma: found {hierarchy.noise_gamma}, expected at least 0, or infinity"
        )
    if not 0 <= hierarchy.cond_drop < 1:
        raise ValueError(f"config.hierarchy.cond_drop: found {hierarchy.cond_drop}, expected a number in [0, 1)")
    for i, level in enumerate(levels):
        if not level.sigma >= 0:
            raise ValueError(f"config.levels[{i}].sigma: found {level.sigma}, expected at least 0")


def build_level(config: Config, levels: Sequence[LevelOptions], i: int, null_text: Mapping[str, np.ndarray]) -> Level:
    """Build the i-th level, counted from the coarsest. Raises: as build_levels."""
    level, key = levels[i], f"levels[{i}]"
    hierarchy: HierarchyOptions = construct("hierarchy", HierarchyOptions, dict(config.hierarchy), {})
    coarser = {other.name: other for other in levels[:i]}
    conditions = choose("hierarchy.conditioning", hierarchy.conditioning, CONDITIONINGS)(tuple(coarser))
    num_classes = config.data.num_classes if level.name in hierarchy.label_levels else 0
    text = level.name in hierarchy.text_levels
    droppable = conditions and hierarchy.cond_noise == "sigma"
    if level.guidance and not droppable and not num_classes and not text:
        raise ValueError(f"config.{key}.guidance is {level.guidance} but nothing conditions {level.name}: set it to 0")
    shape = as_shape(level.shape)
    network = build_backbone(config, level, {name: coarser[name] for name in conditions}, num_classes, text, key)
    try:
        network.check_shape(shape)
    except ValueError as error:
        raise ValueError(f"config.{key} ({level.name}): {error}") from error
    process, scales = build_process(level.process, shape, f"{key}.process")
    threshold = choose(f"{key}.threshold", level.threshold, THRESHOLDS)
    return Level(
        name=level.name,
        shape=shape,
        backbone=network,
        process=process,
        sampler=build_sampler(level.sampler, f"{key}.sampler"),
        conditions=conditions,
        cond_sigmas=tuple(float(coarser[name].sigma) for name in conditions),
        num_classes=num_classes,
        cond_drop=hierarchy.cond_drop if conditions or num_classes or text else 0.0,
        drop_mode=hierarchy.drop_mode,
        guidance=float(level.guidance),
        noise_gamma=float(hierarchy.noise_gamma),
        noise_scale=hierarchy.noise_scale,
        noise_resample=hierarchy.noise_resample,
        threshold=functools.partial(threshold, scales=scales) if threshold and scales else threshold,
        inputs=_inputs(config, level, network, key),
        null_text=null_text if text else None,
        condition_noise=_condition_noise(hierarchy, process, network, coarser, key) if conditions else None,
        signal_scales=scales,
        mixed=_mixed(level, key),
        leaf_weights=_leaf_weights(level, key),
        loss_weight=float(level.loss_weight),
    )


def build_backbone(
    config: Config, level: LevelOptions, seen: Mapping[str, LevelOptions], num_classes: int, text: bool, key: str
) -> Backbone:
    """Build a level's network from its options and from what the rest of the config decides.

    Args:
      seen: the coarser levels that it sees, by name.
      num_classes: 0 if it does not see the label. text: whether it sees the text.
      key: where the level stands in the config, for errors.
    """
    options = dict(level.backbone)
    kind = choose(f"{key}.backbone.name", options.pop("name"), BACKBONES)
    if text and not kind.takes_text:
        raise ValueError(f"config.hierarchy.text_levels: {key}.backbone {level.backbone['name']!r} does not take text")
    derived = dict(
        num_classes=num_classes,
        conditions=tuple((name, _condition_patch(kind, name, other, key)) for name, other in seen.items()),
        dtype=choose("train.dtype", config.train.dtype, DTYPES),
        remat=config.train.remat,
        **(kind.text_options(config.text.width, config.text.max_tokens) if text else kind.text_options(0, 0)),
    )
    return construct(f"{key}.backbone", kind, options, derived)


def trained_level_names(config: Config) -> tuple[str, ...]:
    """Return the names of the levels that are trained, coarse to fine."""
    return tuple(level.name for level in config.levels if not config.train_levels or level.name in config.train_levels)


def as_shape(shape: Sequence[Any]) -> Tree:
    """Return a shape of the config, or the shapes of several resolutions, as tuples."""
    return tuple(tuple(leaf) for leaf in shape) if is_joint(shape) else tuple(shape)


def _grid(shape: Tree) -> tuple[int, int]:
    """(height, width) of the finest leaf."""
    return (shape[-1] if is_joint(shape) else shape)[-3:-1]


def _condition_patch(kind: type[Backbone], name: str, coarser: LevelOptions, key: str) -> int | None:
    """The patch size by which a network reads the coarser level's variable; None if it reads no patches."""
    if is_joint(coarser.shape):
        raise ValueError(f"config.{key}: sees {name}, whose variable is several resolutions; only one can be seen")
    if not kind.reads_patches:
        return None
    patch = dict(coarser.backbone).get("patch_size")
    if not isinstance(patch, int):
        raise ValueError(f"config.{key}: sees {name}, whose backbone.patch_size is {patch}; give one number there")
    return patch


def _inputs(config: Config, level: LevelOptions, network: Backbone, key: str) -> tuple[str, ...]:
    """The entries of the context that the network is shown besides label and text: 'augment', if there is any."""
    if not config.data.augment_prob:
        return ()
    if "augment" not in network.inputs:
        raise ValueError(
            f"config.data.augment_prob is {config.data.augment_prob} but {key}.backbone {level.backbone['name']!r} "
            "cannot be told of the augmentation, so its samples would show it; set it to 0 (data.flip mirrors)"
        )
    return ("augment",)


def _condition_noise(
    hierarchy: HierarchyOptions, process: Process, network: Backbone, coarser: Mapping[str, LevelOptions], key: str
) -> ConditionNoise | None:
    """How a cascade noises the conditions, by the level's own schedule; None with cond_noise 'sigma'."""
    if hierarchy.cond_noise == "sigma":
        if hierarchy.cond_noise_step:
            raise ValueError(
                f"config.hierarchy.cond_noise_step {hierarchy.cond_noise_step} has no effect with cond_noise 'sigma': "
                "set it to 0"
            )
        return None
    sigmas = [name for name, other in coarser.items() if other.sigma]
    if sigmas or not math.isinf(hierarchy.noise_gamma):
        raise ValueError(
            f"config.hierarchy.cond_noise 'diffused' with sigma of {', '.join(sigmas) or 'no level'} and noise_gamma "
            f"{hierarchy.noise_gamma}: both belong to cond_noise 'sigma'; set them to 0 and infinity"
        )
    if not network.sees_noise_steps:
        raise ValueError(
            f"config.hierarchy.cond_noise 'diffused': {key}.backbone cannot be told how noisy its conditions are; use "
            "nested_unet, or 'sigma'"
        )
    given = dict(noise_step=hierarchy.cond_noise_step)
    return construct("hierarchy", ConditionNoise, given, dict(schedule=process.schedules[-1]))


def _leaf_weights(level: LevelOptions, key: str) -> tuple[float, ...]:
    """The weight of each resolution's loss; 1 each if the config gives none."""
    leaves = len(level.shape) if is_joint(level.shape) else 1
    weights = tuple(float(weight) for weight in level.leaf_weights) or (1.0,) * leaves
    if len(weights) != leaves or min(weights) < 0 or not any(weights):
        raise ValueError(
            f"config.{key}.leaf_weights {weights}: give {leaves} number(s) of at least 0, coarse to fine, not all 0"
        )
    return weights


def _mixed(level: LevelOptions, key: str) -> tuple[int, ...]:
    """How many rows of a group have each resolution, checked; () if all rows have all."""
    counts = tuple(level.mixed)
    leaves = len(level.shape) if is_joint(level.shape) else 1
    falling = all(coarse >= fine for coarse, fine in itertools.pairwise(counts))
    if counts and (len(counts) != leaves or not falling or min(counts) < 1):
        raise ValueError(
            f"config.{key}.mixed {counts}: give {leaves} row count(s) that do not rise, coarse to fine, each at least "
            "1: the rows of every mixed[0] that have that resolution; () for all"
        )
    return counts
