"""Config -> levels, processes, samplers, optimizer: the only reader of the config's model part (data: build_data.py).

Names in a config are keys of the dicts below; an unknown name, or an option that its object does not take, is a
one-line error. Nothing here allocates arrays on a device.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from nested import denoiser, hierarchy, process, samplers, schedules, sigma_samplers
from nested import optimizer as opt
from nested.models.dit import DiT
from nested.models.hdit import HDiT
from nested.models.uvit import UViT

# Parts of a config that decide what a train state is: a checkpoint made with others is refused.
STATE_KEYS = ("seed", "levels", "hierarchy", "train_levels", "optimizer", "data", "encoder", "codec", "init_from")

BACKBONES = {"uvit": UViT, "hdit": HDiT, "dit": DiT}
SCHEDULES = {
    "sd_scaled_linear": schedules.sd_scaled_linear,
    "cosine": schedules.cosine,
    "ddpm_linear": schedules.ddpm_linear,
    "linear_vp": schedules.LinearVP,
    "exponential_ve": schedules.ExponentialVE,
}
DENSITIES = {
    "lognormal": schedules.LogNormal,
    "loglogistic": schedules.LogLogistic,
    "loguniform": schedules.LogUniform,
    "v_diffusion": schedules.VDiffusion,
    "cosine_interpolated": schedules.CosineInterpolated,
}
SAMPLERS = {
    "ddpm": samplers.DDPM,
    "ddim": samplers.DDIM,
    "dpm_solver": samplers.DPMSolver,
    "euler_in_time": samplers.EulerInTime,
    "euler": sigma_samplers.Euler,
    "heun": sigma_samplers.Heun,
    "dpm2": sigma_samplers.DPM2,
    "lms": sigma_samplers.LMS,
    "euler_ancestral": sigma_samplers.EulerAncestral,
    "dpm2_ancestral": sigma_samplers.DPM2Ancestral,
    "dpmpp_2s_ancestral": sigma_samplers.DPMpp2SAncestral,
    "dpmpp_sde": sigma_samplers.DPMppSDE,
    "dpmpp_2m": sigma_samplers.DPMpp2M,
    "dpmpp_2m_sde": sigma_samplers.DPMpp2MSDE,
    "dpmpp_3m_sde": sigma_samplers.DPMpp3MSDE,
}
THRESHOLDS = {
    "none": None,
    "static": functools.partial(denoiser.thresholded, percentile=None),
    "dynamic": functools.partial(denoiser.thresholded, percentile=0.995),
}
CONDITIONINGS = {
    "all_higher": lambda coarser: tuple(coarser),
    "next_higher": lambda coarser: tuple(coarser[-1:]),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def plain(config):
    """A config as dicts, lists and values (JSON): what is stored beside checkpoints and compared."""
    if isinstance(config, (ConfigDict, dict)):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, (tuple, list)) else config


def choose(key: str, name: str, table) -> Any:
    """table[name], or a one-line error that names the key, the value found and the values allowed."""
    if name not in table:
        raise ValueError(f"config.{key}: {name!r} given; choose from {', '.join(map(repr, table))}")
    return table[name]


def construct(key: str, constructor, options: dict, derived: dict):
    """constructor(**options, **derived); `derived` is what other parts of the config decide.

    Options that it does not take, that others decide or whose values it refuses are one-line errors at `key`."""
    decided = [name for name in options if name in derived]
    if decided:
        raise ValueError(f"config.{key}: {', '.join(decided)} is decided by other parts of the config; remove it here")
    try:
        return constructor(**options, **derived)
    except TypeError as error:
        raise ValueError(f"config.{key}: {error}; found options {', '.join(options)}") from error
    except ValueError as error:
        raise ValueError(f"config.{key}: {error}") from error


def levels(config) -> tuple[hierarchy.Level, ...]:
    """The hierarchy, coarse to fine."""
    if not config.levels:
        raise ValueError("config.levels is empty: give at least one level (configs/common.py level())")
    names = [level.name for level in config.levels]
    if len(set(names)) < len(names):
        raise ValueError(f"config.levels: names must differ, found {', '.join(names)}")
    for name in (*config.hierarchy.label_levels, *config.train_levels):
        choose("hierarchy.label_levels / train_levels", name, dict.fromkeys(names))
    if config.hierarchy.label_levels and not config.data.num_classes:
        raise ValueError("config.hierarchy.label_levels names levels but config.data.num_classes is 0: no labels")
    if not 0 <= config.hierarchy.cond_drop < 1:
        raise ValueError(f"config.hierarchy.cond_drop: found {config.hierarchy.cond_drop}, expected a number in [0, 1)")
    result = tuple(build_level(config, i) for i in range(len(names)))
    for coarse, fine in itertools.pairwise(result):
        if coarse.shape[0] > fine.shape[0] or coarse.shape[1] > fine.shape[1]:
            raise ValueError(
                f"config.levels: the shapes do not nest: {coarse.name} {coarse.shape} comes before {fine.name} "
                f"{fine.shape} but has the larger grid; list the levels coarse to fine"
            )
    return result


def build_level(config, i: int) -> hierarchy.Level:
    """The i-th level, counted from the coarsest."""
    options, key = config.levels[i], f"levels[{i}]"
    coarser = {level.name: level for level in config.levels[:i]}
    seen = choose("hierarchy.conditioning", config.hierarchy.conditioning, CONDITIONINGS)(tuple(coarser))
    num_classes = config.data.num_classes if options.name in config.hierarchy.label_levels else 0
    if options.guidance and not seen and not num_classes:
        raise ValueError(
            f"config.{key}.guidance is {options.guidance} but nothing conditions {options.name}: set it to 0"
        )
    check_shape(key, options)
    patches = tuple((name, coarser[name].backbone.patch_size) for name in seen)
    for name, patch in patches:
        if not isinstance(patch, int):
            raise ValueError(f"config.{key}: sees {name}, whose backbone.patch_size is {patch}; give one number there")
    return hierarchy.Level(
        name=options.name,
        shape=tuple(options.shape),
        backbone=backbone(config, options, patches, num_classes, key),
        process=build_process(options.process, f"{key}.process"),
        sampler=sampler(options.sampler, f"{key}.sampler"),
        conditions=seen,
        cond_sigmas=tuple(float(coarser[name].sigma) for name in seen),
        num_classes=num_classes,
        cond_drop=config.hierarchy.cond_drop if seen or num_classes else 0.0,
        drop_mode=config.hierarchy.drop_mode,
        guidance=float(options.guidance),
        noise_gamma=float(config.hierarchy.noise_gamma),
        threshold=choose(f"{key}.threshold", options.threshold, THRESHOLDS),
        inputs=inputs(config, options, key),
        loss_weight=float(options.loss_weight),
    )


def check_shape(key: str, options) -> None:
    """(h, w, c), positive, divisible by the patch size."""
    shape, patch = tuple(options.shape), options.backbone.patch_size
    rows, columns = patch if isinstance(patch, tuple) else (patch, patch)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"config.{key}.shape: found {shape}, expected (height, width, channels)")
    if min(rows, columns) < 1:
        raise ValueError(f"config.{key}.backbone.patch_size: found {patch}, expected at least 1")
    if shape[0] % rows or shape[1] % columns:
        raise ValueError(
            f"config.{key}: the shape {shape} of {options.name} does not divide into patches of "
            f"backbone.patch_size {patch}; change one of them"
        )


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


def backbone(config, options, conditions, num_classes: int, key: str):
    """The level's network, with what the hierarchy decides (conditions, classes) and the compute dtype."""
    given = dict(options.backbone)
    kind = choose(f"{key}.backbone.name", given.pop("name"), BACKBONES)
    derived = dict(
        num_classes=num_classes,
        conditions=conditions,
        dtype=choose("train.dtype", config.train.dtype, DTYPES),
        remat=config.train.remat,
    )
    return construct(f"{key}.backbone", kind, given, derived)


def build_process(options, key: str) -> process.Process:
    given = dict(options)
    schedule = choose(f"{key}.schedule", given.pop("schedule"), SCHEDULES)()
    if given.get("density"):
        density = dict(given["density"])
        kind = choose(f"{key}.density.name", density.pop("name"), DENSITIES)
        given["density"] = construct(f"{key}.density", kind, density, {})
    return construct(key, process.Process, given, dict(schedules=(schedule,)))


def sampler(options, key: str):
    given = dict(options)
    return construct(key, choose(f"{key}.name", given.pop("name"), SAMPLERS), given, {})


def trained(config) -> tuple[str, ...]:
    """Names of the levels that are trained."""
    return tuple(level.name for level in config.levels if not config.train_levels or level.name in config.train_levels)


def shared_levels(other: dict, config) -> tuple[str, ...]:
    """Names of the levels of another run's config whose networks fit this config's: same name, shape and backbone, the
    same conditions and classes. Coarse levels of a shallower hierarchy fit a deeper one (CVPR Sec. 4: it reuses L - 1).
    """

    def networks(some):
        some_hierarchy, coarser, result = some["hierarchy"], (), {}
        choose_seen = choose("hierarchy.conditioning", some_hierarchy["conditioning"], CONDITIONINGS)
        for level in some["levels"]:
            classes = some["data"]["num_classes"] if level["name"] in some_hierarchy["label_levels"] else 0
            result[level["name"]] = (level["shape"], level["backbone"], choose_seen(coarser), classes)
            coarser += ((level["name"], level["shape"], level["backbone"]["patch_size"]),)
        return result

    theirs, ours = networks(other), networks(plain(config))
    return tuple(name for name in ours if theirs.get(name) == ours[name])


def check_pictures(config) -> None:
    """Random latents have no images to draw or score; better said before training than after it."""
    asked = config.sample.num_samples or config.evaluate.num_samples or config.train.sample_every
    if config.data.source == "synthetic" and asked:
        raise ValueError(
            "config.data.source is 'synthetic', whose latents have no images: set config.sample.num_samples, "
            "config.evaluate.num_samples and config.train.sample_every to 0"
        )


def check_init_from(config) -> None:
    """Which of another run's weights to take, and into levels that there are."""
    choose("init_from.weights", config.init_from.weights, dict.fromkeys(("ema", "params")))
    for name in config.init_from.levels:
        choose("init_from.levels", name, dict.fromkeys(level.name for level in config.levels))


def optimizer(config) -> opt.OptimizerConfig:
    """config.optimizer; 'cosine' decays to 0 at config.train.steps."""
    options, steps = config.optimizer, config.train.steps
    if options.decay == "cosine" and steps <= options.warmup_steps:
        raise ValueError(
            f"config.train.steps is {steps}: cosine decay needs more than config.optimizer.warmup_steps, "
            f"{options.warmup_steps}; change one of them"
        )
    given = dict(options)
    given["groups"] = tuple(
        construct(f"optimizer.groups[{i}]", opt.Group, dict(group), {}) for i, group in enumerate(options.groups)
    )
    total = steps if options.decay == "cosine" else None
    return construct("optimizer", opt.OptimizerConfig, given, dict(total_steps=total))


class Phase(NamedTuple):
    """Steps start ... end - 1 with one batch size, after `rows` rows of earlier phases."""

    start: int
    end: int
    batch_size: int
    rows: int


def phases(config) -> list[Phase]:
    """The run's batch sizes, config.train.batch_size and batch_growth, in order."""
    train = config.train
    changes = [(0, train.batch_size), *((int(step), int(size)) for step, size in train.batch_growth)]
    result, rows = [], 0
    for (start, size), (end, _) in itertools.pairwise([*changes, (max(train.steps, changes[-1][0] + 1), 0)]):
        if end <= start:
            raise ValueError(f"config.train.batch_growth {tuple(train.batch_growth)}: its steps must rise from 1 on")
        result.append(Phase(start, end, size, rows))
        rows += (end - start) * size
    return result


def check_batch(config, devices: int) -> None:
    """Every batch must divide by the accumulation groups and each group by the devices."""
    groups = config.train.accumulate
    for batch in (phase.batch_size for phase in phases(config)):
        if groups < 1 or batch < 1 or batch % (groups * devices):
            raise ValueError(
                f"config.train.batch_size {batch} does not divide by {devices} devices x config.train.accumulate "
                f"{groups}; use a multiple of {max(groups, 1) * devices}"
            )
