"""Config -> levels, optimizer, the run's phases: the reader of the config's model part, with build_process.py
(processes and samplers); the data part is build_data.py's. Nothing here allocates arrays on a device.
"""

import functools
import itertools
import math
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nested.build import presets
from nested.build.process import THRESHOLDS, build_process, choose, construct, is_joint, sampler
from nested.diffusion import hierarchy
from nested.models.dit import DiT
from nested.models.hdit import HDiT
from nested.models.nested_unet import NestedUNet, nets
from nested.models.res_mlp import ResMLP
from nested.models.uvit import UViT
from nested.training import optimizer as opt

# Parts of a config that decide what a train state is: a checkpoint made with others is refused.
STATE_KEYS = (
    "seed", "levels", "hierarchy", "train_levels", "optimizer", "data", "encoder", "codec", "text", "init_from"
)  # fmt: skip

BACKBONES = {"uvit": UViT, "hdit": HDiT, "dit": DiT, "nested_unet": NestedUNet, "res_mlp": ResMLP}
TEXT = {  # what a network that takes text is told of its encoder
    NestedUNet: lambda text: dict(text_width=text.width),
    UViT: lambda text: dict(text_dim=text.width, text_tokens=text.max_tokens),
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


def levels(config, null_text=None) -> tuple[hierarchy.Level, ...]:
    """The hierarchy, coarse to fine.

    null_text: {'text': [tokens, width], 'text_mask': [tokens]} of the empty caption (build_data.Text), for levels that
    see text; None stands for one token of zeros, where only shapes count or the data are random."""
    if not config.levels:
        raise ValueError("config.levels is empty: give at least one level (configs/common.py level())")
    names = [level.name for level in config.levels]
    if len(set(names)) < len(names):
        raise ValueError(f"config.levels: names must differ, found {', '.join(names)}")
    some = config.hierarchy
    for name in (*some.label_levels, *some.text_levels, *config.train_levels):
        choose("hierarchy.label_levels / text_levels / train_levels", name, dict.fromkeys(names))
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
    presets.check(config)
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


def as_shape(shape) -> hierarchy.Tree:
    """A config's shape as tuples."""
    return tuple(tuple(leaf) for leaf in shape) if is_joint(shape) else tuple(shape)


def grid(shape) -> tuple[int, int]:
    """(height, width) of the finest leaf."""
    return (shape[-1] if is_joint(shape) else shape)[-3:-1]


def build_level(config, i: int, null_text) -> hierarchy.Level:
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
    network = backbone(config, options, tuple((name, coarser[name]) for name in seen), num_classes, text, key)
    try:
        network.check_shape(shape)
    except ValueError as error:
        raise ValueError(f"config.{key} ({options.name}): {error}") from error
    process, scales = build_process(options.process, shape, f"{key}.process")
    threshold = choose(f"{key}.threshold", options.threshold, THRESHOLDS)
    return hierarchy.Level(
        name=options.name,
        shape=shape,
        backbone=network,
        process=process,
        sampler=sampler(options.sampler, f"{key}.sampler"),
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
        augmentation=augmentation(config, process, network, coarser, key) if seen else None,
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


def augmentation(config, process, network, coarser, key: str) -> hierarchy.NoiseAugmentation | None:
    """The diffusion of the conditions, by the level's own schedule, where config.hierarchy.cond_noise asks for it."""
    kind, level = config.hierarchy.cond_noise, config.hierarchy.cond_level
    choose("hierarchy.cond_noise", kind, dict.fromkeys(("sigma", "diffused")))
    if kind == "sigma":
        if level:
            raise ValueError(f"config.hierarchy.cond_level {level} has no effect with cond_noise 'sigma': set it to 0")
        return None
    sigmas = [name for name, options in coarser.items() if options.sigma]
    if sigmas or not math.isinf(config.hierarchy.noise_gamma):
        raise ValueError(
            f"config.hierarchy.cond_noise 'diffused' with sigma of {', '.join(sigmas) or 'no level'} and noise_gamma "
            f"{config.hierarchy.noise_gamma}: both belong to cond_noise 'sigma'; set them to 0 and infinity"
        )
    if not network.sees_levels:
        raise ValueError(
            f"config.hierarchy.cond_noise 'diffused': {key}.backbone cannot be told how noisy its conditions are; use "
            "nested_unet, or 'sigma'"
        )
    return construct("hierarchy", hierarchy.NoiseAugmentation, dict(level=level), dict(schedule=process.schedules[-1]))


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


def backbone(config, options, seen, num_classes: int, text: bool, key: str):
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
    if text and kind not in TEXT:
        raise ValueError(f"config.hierarchy.text_levels: {key}.backbone {options.backbone.name!r} does not take text")
    if kind in TEXT:
        derived |= {name: value if text else 0 for name, value in TEXT[kind](config.text).items()}
    if kind is NestedUNet:
        given["nets"] = construct(f"{key}.backbone.nets", nets, dict(options=given["nets"]), {})
    return construct(f"{key}.backbone", kind, given, derived)


def condition_patch(kind, name: str, coarser, key: str) -> int | None:
    """The patch size by which a network of tokens reads the coarser level's variable; None for a NestedUNet."""
    if is_joint(coarser.shape):
        raise ValueError(f"config.{key}: sees {name}, whose variable is several resolutions; only one can be seen")
    if kind is NestedUNet:
        return None
    patch = coarser.backbone.patch_size if "patch_size" in coarser.backbone else None
    if not isinstance(patch, int):
        raise ValueError(f"config.{key}: sees {name}, whose backbone.patch_size is {patch}; give one number there")
    return patch


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
            text = some["text"] if level["name"] in some_hierarchy.get("text_levels", ()) else {}
            text = [text.get(key) for key in ("encoder", "max_tokens", "width")]
            told = some_hierarchy.get("cond_noise", "sigma")
            seen = choose_seen(coarser)
            result[level["name"]] = (level["shape"], level["backbone"], seen, classes, text, told if seen else "")
            coarser += ((level["name"], level["shape"], level["backbone"].get("patch_size")),)
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


def phases(config) -> list[tuple[str, ConfigDict]]:
    """[(name, config)] of the runs that train one after the other, each from the one before; the last is ('', config).

    An entry of config.phases says in what its phase differs: dict(name=, levels=, train=dict(steps=), ...). The last
    phase has the config's own values. Every later phase gets init_from.phase, the name of the one before it."""
    result, before = [], config.init_from.phase
    for i, changes in enumerate((*config.phases, None)):
        phase = ConfigDict(config.copy_and_resolve_references())
        phase.phases, name = (), ""
        if changes is not None:
            changes = dict(changes)
            name = str(changes.pop("name", ""))
            if not re.fullmatch(r"\w[\w.-]*", name) or name in [earlier for earlier, _ in result]:
                raise ValueError(f"config.phases[{i}].name: {name!r} given; each needs a name of its own, such as s64")
            decided = [key for key in ("phases", "latents_dir") if key in changes]
            if i and set(changes.get("init_from", ())) - {"weights"}:
                decided.append("init_from")
            if decided:
                raise ValueError(f"config.phases[{i}].{decided[0]}: decided by the order of the phases; remove it here")
            override(phase, changes, f"phases[{i}]")
        if i:
            phase.init_from.update(path="", levels=(), phase=before)
        before = name
        result.append((name, phase))
    return result


def override(config, changes, key: str) -> None:
    """Sets what a nested dict of changes says; ValueError for a key that config does not have, or a part that is no
    dict."""
    for name, value in changes.items():
        if name not in config:
            raise ValueError(f"config.{key}.{name}: there is no such option; choose from {', '.join(config)}")
        if isinstance(config[name], ConfigDict):
            if not isinstance(value, (dict, ConfigDict)):
                raise ValueError(f"config.{key}.{name}: {value!r} given, expected a dict of its options")
            override(config[name], value, f"{key}.{name}")
        else:
            with config.ignore_type():
                config[name] = value


def check_init_from(config) -> None:
    """Which of another run's weights to take, and into levels that there are."""
    choose("init_from.weights", config.init_from.weights, dict.fromkeys(("ema", "params")))
    if config.init_from.path and config.init_from.phase:
        raise ValueError(f"config.init_from: path {config.init_from.path} and phase {config.init_from.phase}; give one")
    if config.init_from.levels and not config.init_from.path and not config.init_from.phase:
        raise ValueError(
            f"config.init_from.levels {tuple(config.init_from.levels)} without a run to take them from: give "
            "config.init_from.path, the --workdir of one, or set levels to ()"
        )
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


class BatchSpan(NamedTuple):
    """Steps start ... end - 1 with one batch size, after `rows` rows of earlier spans."""

    start: int
    end: int
    batch_size: int
    rows: int


def batch_spans(config) -> list[BatchSpan]:
    """The run's batch sizes, config.train.batch_size and batch_growth, in order."""
    train = config.train
    changes = [(0, train.batch_size), *((int(step), int(size)) for step, size in train.batch_growth)]
    result, rows = [], 0
    for (start, size), (end, _) in itertools.pairwise([*changes, (max(train.steps, changes[-1][0] + 1), 0)]):
        if end <= start:
            raise ValueError(f"config.train.batch_growth {tuple(train.batch_growth)}: its steps must rise from 1 on")
        result.append(BatchSpan(start, end, size, rows))
        rows += (end - start) * size
    return result


def check_batch(config, devices: int) -> None:
    """Every batch must divide by the accumulation groups and each group by the devices."""
    groups = config.train.accumulate
    for batch in (span.batch_size for span in batch_spans(config)):
        if groups < 1 or batch < 1 or batch % (groups * devices):
            raise ValueError(
                f"config.train.batch_size {batch} does not divide by {devices} devices x config.train.accumulate "
                f"{groups}; use a multiple of {max(groups, 1) * devices}"
            )
        for i, level in enumerate(config.levels):
            if level.mixed and batch // (groups * devices) % level.mixed[0]:
                raise ValueError(
                    f"config.levels[{i}].mixed {tuple(level.mixed)}: the {batch // (groups * devices)} rows per device "
                    f"of config.train.batch_size {batch} do not divide into groups of {level.mixed[0]}"
                )
