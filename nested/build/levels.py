"""Config -> the levels of the hierarchy: networks, conditions, processes, samplers. Nothing is put on a device."""

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np

from nested.build import presets
from nested.build.options import choose, construct
from nested.build.parts import BACKBONES, CONDITIONINGS, THRESHOLDS
from nested.build.process import build_process, build_sampler, is_joint
from nested.diffusion.level import ConditionNoise, Level
from nested.diffusion.process import Tree

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_levels(config, null_text=None) -> tuple[Level, ...]:
    """The hierarchy, coarse to fine.

    null_text: {'text': [tokens, width], 'text_mask': [tokens]} of the empty caption, for levels that see text; None
    stands for one token of zeros, where only shapes count or the data are random."""
    if not config.levels:
        raise ValueError("config.levels is empty: give at least one level (configs/common.py level())")
    names = [level.name for level in config.levels]
    if len(set(names)) < len(names):
        raise ValueError(f"config.levels: names must differ, found {', '.join(names)}")
    some = config.hierarchy
    for name in (*some.label_levels, *some.text_levels, *config.train_levels):
        choose("hierarchy.label_levels / text_levels / train_levels", name, names)
    if some.label_levels and not config.data.num_classes:
        raise ValueError("config.hierarchy.label_levels names levels but config.data.num_classes is 0: no labels")
    if some.cond_noise != "sigma" and len(names) == 1:
        raise ValueError(f"config.hierarchy.cond_noise {some.cond_noise!r}: a single level has no conditions: 'sigma'")
    if bool(some.text_levels) != bool(config.text.encoder):
        raise ValueError(
            f"config.hierarchy.text_levels is {tuple(some.text_levels)}, config.text.encoder {config.text.encoder!r}: "
            "give both, or neither"
        )
    if not config.text.encoder and (config.sample.prompts or config.sample.negative_prompt):
        raise ValueError("config.sample.prompts and negative_prompt need text: set config.text.encoder and text_levels")
    if math.isinf(some.noise_gamma) and (some.noise_scale != "variance" or some.noise_resample):
        raise ValueError(
            f"config.hierarchy.noise_scale {some.noise_scale!r}, noise_resample {some.noise_resample}: with gamma "
            "infinity conditions are shown without noise; set them to 'variance' and False, or give a noise_gamma"
        )
    if not some.noise_gamma >= 0:
        raise ValueError(f"config.hierarchy.noise_gamma: found {some.noise_gamma}, expected at least 0, or infinity")
    for i, level in enumerate(config.levels):
        if not level.sigma >= 0:
            raise ValueError(f"config.levels[{i}].sigma: found {level.sigma}, expected at least 0")
    presets.check_preset(config)
    if not 0 <= some.cond_drop < 1:
        raise ValueError(f"config.hierarchy.cond_drop: found {some.cond_drop}, expected a number in [0, 1)")
    if null_text is None:
        tokens, width = config.text.max_tokens, config.text.width
        null_text = {"text": np.zeros((tokens, width), np.float32), "text_mask": np.arange(tokens) == 0}
    result = tuple(build_level(config, i, null_text) for i in range(len(names)))
    for coarse, fine in itertools.pairwise(result):
        if any(c > f for c, f in zip(grid(coarse.shape), grid(fine.shape), strict=True)):
            raise ValueError(
                f"config.levels: the shapes do not nest: {coarse.name} {coarse.shape} comes before {fine.name} "
                f"{fine.shape} but has the larger grid; list the levels coarse to fine"
            )
    return result


def as_shape(shape) -> Tree:
    """A config's shape as tuples."""
    return tuple(tuple(leaf) for leaf in shape) if is_joint(shape) else tuple(shape)


def grid(shape) -> tuple[int, int]:
    """(height, width) of the finest leaf."""
    return (shape[-1] if is_joint(shape) else shape)[-3:-1]


def build_level(config, i: int, null_text) -> Level:
    """The i-th level, counted from the coarsest."""
    options, key = config.levels[i], f"levels[{i}]"
    coarser = {level.name: level for level in config.levels[:i]}
    seen = choose("hierarchy.conditioning", config.hierarchy.conditioning, CONDITIONINGS)(tuple(coarser))
    num_classes = config.data.num_classes if options.name in config.hierarchy.label_levels else 0
    text = options.name in config.hierarchy.text_levels
    absent = seen and config.hierarchy.cond_noise == "sigma"  # whether what is seen can be absent
    if options.guidance and not absent and not num_classes and not text:
        raise ValueError(
            f"config.{key}.guidance is {options.guidance} but nothing conditions {options.name}: set it to 0"
        )
    shape = as_shape(options.shape)
    network = build_backbone(config, options, tuple((name, coarser[name]) for name in seen), num_classes, text, key)
    try:
        network.check_shape(shape)
    except ValueError as error:
        raise ValueError(f"config.{key} ({options.name}): {error}") from error
    process, scales = build_process(options.process, shape, f"{key}.process")
    threshold = choose(f"{key}.threshold", options.threshold, THRESHOLDS)
    return Level(
        name=options.name,
        shape=shape,
        backbone=network,
        process=process,
        sampler=build_sampler(options.sampler, f"{key}.sampler"),
        conditions=seen,
        cond_sigmas=tuple(float(coarser[name].sigma) for name in seen),
        num_classes=num_classes,
        cond_drop=config.hierarchy.cond_drop if seen or num_classes or text else 0.0,
        drop_mode=config.hierarchy.drop_mode,
        guidance=float(options.guidance),
        noise_gamma=float(config.hierarchy.noise_gamma),
        noise_scale=config.hierarchy.noise_scale,
        noise_resample=config.hierarchy.noise_resample,
        threshold=functools.partial(threshold, scales=scales) if threshold and scales else threshold,
        inputs=inputs(config, options, key),
        null_text=null_text if text else None,
        condition_noise=condition_noise(config, process, network, coarser, key) if seen else None,
        signal_scales=scales,
        mixed=mixed(options, key),
        leaf_weights=leaf_weights(options, key),
        loss_weight=float(options.loss_weight),
    )


def leaf_weights(options, key: str) -> tuple[float, ...]:
    """The weight of each resolution's loss; 1 each where the config gives none."""
    leaves = len(options.shape) if is_joint(options.shape) else 1
    weights = tuple(float(weight) for weight in options.leaf_weights) or (1.0,) * leaves
    if len(weights) != leaves or min(weights) < 0 or not any(weights):
        raise ValueError(
            f"config.{key}.leaf_weights {weights}: give {leaves} number(s) of at least 0, coarse to fine, not all 0"
        )
    return weights


def mixed(options, key: str) -> tuple[int, ...]:
    """How many rows of a group have each resolution, checked."""
    counts = tuple(options.mixed)
    leaves = len(options.shape) if is_joint(options.shape) else 1
    falling = all(coarse >= fine for coarse, fine in itertools.pairwise(counts))
    if counts and (len(counts) != leaves or not falling or min(counts) < 1):
        raise ValueError(
            f"config.{key}.mixed {counts}: give {leaves} row count(s) that do not rise, coarse to fine, each at least "
            "1: of every mixed[0] rows so many have that resolution; () for all"
        )
    return counts


def condition_noise(config, process, network, coarser, key: str) -> ConditionNoise | None:
    """The diffusion of the conditions, by the level's own schedule, where config.hierarchy.cond_noise asks for it."""
    kind, noise_step = config.hierarchy.cond_noise, config.hierarchy.cond_noise_step
    choose("hierarchy.cond_noise", kind, ("sigma", "diffused"))
    if kind == "sigma":
        if noise_step:
            raise ValueError(
                f"config.hierarchy.cond_noise_step {noise_step} has no effect with cond_noise 'sigma': set it to 0"
            )
        return None
    sigmas = [name for name, options in coarser.items() if options.sigma]
    if sigmas or not math.isinf(config.hierarchy.noise_gamma):
        raise ValueError(
            f"config.hierarchy.cond_noise 'diffused' with sigma of {', '.join(sigmas) or 'no level'} and noise_gamma "
            f"{config.hierarchy.noise_gamma}: both belong to cond_noise 'sigma'; set them to 0 and infinity"
        )
    if not network.sees_noise_steps:
        raise ValueError(
            f"config.hierarchy.cond_noise 'diffused': {key}.backbone cannot be told how noisy its conditions are; use "
            "nested_unet, or 'sigma'"
        )
    return construct("hierarchy", ConditionNoise, dict(noise_step=noise_step), dict(schedule=process.schedules[-1]))


def inputs(config, options, key: str) -> tuple[str, ...]:
    """What of the records the level's network is told besides the label: of the augmentation, where there is one."""
    if not config.data.augment_prob:
        return ()
    kind = choose(f"{key}.backbone.name", options.backbone.name, BACKBONES)
    if "augment" not in kind.inputs:
        raise ValueError(
            f"config.data.augment_prob is {config.data.augment_prob} but {key}.backbone {options.backbone.name!r} "
            "cannot be told of the augmentation, so its samples would show it; set it to 0 (data.flip mirrors)"
        )
    return ("augment",)


def build_backbone(config, options, seen, num_classes: int, text: bool, key: str):
    """The level's network, with what the hierarchy decides (conditions, classes, text) and the compute dtype.

    seen: (name, options) of the coarser levels that it sees."""
    given = dict(options.backbone)
    kind = choose(f"{key}.backbone.name", given.pop("name"), BACKBONES)
    derived = dict(
        num_classes=num_classes,
        conditions=tuple((name, condition_patch(kind, name, level, key)) for name, level in seen),
        dtype=choose("train.dtype", config.train.dtype, DTYPES),
        remat=config.train.remat,
    )
    if text and not kind.takes_text:
        raise ValueError(f"config.hierarchy.text_levels: {key}.backbone {options.backbone.name!r} does not take text")
    derived |= kind.text_options(config.text.width, config.text.max_tokens) if text else kind.text_options(0, 0)
    return construct(f"{key}.backbone", kind, given, derived)


def condition_patch(kind, name: str, coarser, key: str) -> int | None:
    """The patch size by which a network reads the coarser level's variable; None if it reads no patches."""
    if is_joint(coarser.shape):
        raise ValueError(f"config.{key}: sees {name}, whose variable is several resolutions; only one can be seen")
    if not kind.reads_patches:
        return None
    patch = coarser.backbone.patch_size if "patch_size" in coarser.backbone else None
    if not isinstance(patch, int):
        raise ValueError(f"config.{key}: sees {name}, whose backbone.patch_size is {patch}; give one number there")
    return patch


def trained_level_names(config) -> tuple[str, ...]:
    """Names of the levels that are trained."""
    return tuple(level.name for level in config.levels if not config.train_levels or level.name in config.train_levels)
