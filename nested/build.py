"""Config -> objects: the only reader of the config's model, data and encoder parts.

Names in a config are keys of the dicts below; an unknown name, or an option that its object does not take, is a
one-line error. Nothing here allocates arrays on a device.
"""

import functools
import itertools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from input_pipeline import image_files, loader, sources, transforms
from input_pipeline import latents as records
from nested import denoiser, encode, encoding, hierarchy, process, samplers
from nested import latents as latents_
from nested import optimizer as opt
from nested.encoders import efficientnet
from nested.files import atomic_write
from nested.models.uvit import UViT

# Parts of a config that decide what a train state is: a checkpoint made with others is refused.
STATE_KEYS = ("seed", "levels", "hierarchy", "train_levels", "optimizer", "data", "encoder", "codec", "init_from")

BACKBONES = {"uvit": UViT}
SCHEDULES = {
    "sd_scaled_linear": process.sd_scaled_linear,
    "cosine": process.cosine,
    "linear_vp": process.LinearVP,
}
SAMPLERS = {
    "ddpm": samplers.DDPM,
    "ddim": samplers.DDIM,
    "euler": samplers.Euler,
    "heun": samplers.Heun,
    "dpm_solver": samplers.DPMSolver,
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
ENCODERS = {"efficientnet_lite0": efficientnet.load}
PUBLISHED = ("mocov3_vitb16", "sd_vae")  # frozen networks of the papers, which come with the published weights


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
        loss_weight=float(options.loss_weight),
    )


def check_shape(key: str, options) -> None:
    """(h, w, c), positive, divisible by the patch size."""
    shape, patch = tuple(options.shape), options.backbone.patch_size
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"config.{key}.shape: found {shape}, expected (height, width, channels)")
    if patch < 1:
        raise ValueError(f"config.{key}.backbone.patch_size: found {patch}, expected at least 1")
    if shape[0] % patch or shape[1] % patch:
        raise ValueError(
            f"config.{key}: the shape {shape} of {options.name} does not divide into patches of "
            f"backbone.patch_size {patch}; change one of them"
        )


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
    total = steps if options.decay == "cosine" else None
    return construct("optimizer", opt.OptimizerConfig, dict(options), dict(total_steps=total))


def check_batch(config, devices: int) -> None:
    """The batch must divide by the accumulation groups and each group by the devices."""
    batch, groups = config.train.batch_size, config.train.accumulate
    if groups < 1 or batch < 1 or batch % (groups * devices):
        raise ValueError(
            f"config.train.batch_size {batch} does not divide by {devices} devices x config.train.accumulate {groups}; "
            f"use a multiple of {max(groups, 1) * devices}"
        )


# --- data ----------------------------------------------------------------------------------------------------------


def digits(data):
    return sources.Digits()


def idx(data):
    return sources.Idx(data.path, data.split, num_classes=data.num_classes)


def image_folder(data):
    return image_files.ImageFolder(data.path, max_bad_images=data.max_bad_images, channels=data.channels or 3)


def tfds(data):
    return image_files.Tfds(data.path, data.split, channels=data.channels or 3)


SOURCES = {"digits": digits, "idx": idx, "image_folder": image_folder, "tfds": tfds}


def images(config):
    """The source of images that config.data describes, cropped and resized as it says."""
    data = config.data
    source = choose("data.source", data.source, SOURCES)(data)
    if source.num_classes != data.num_classes:
        raise ValueError(
            f"config.data.num_classes is {data.num_classes} but {source.describe()}; set it to {source.num_classes}"
        )
    if data.image_size:
        channels = data.channels or source.image_shape[2]
        source = transforms.Transformed(source, data.image_size, crop="center", channels=channels)
    elif data.channels not in (0, source.image_shape[2]):
        raise ValueError(
            f"config.data.channels is {data.channels} but {source.describe()}; set data.image_size as well to convert "
            "the images, or data.channels to 0"
        )
    return source


def encoder(config):
    """The frozen encoder of config.encoder."""
    options = config.encoder
    for part in (options.name, config.codec.name):
        if part in PUBLISHED:
            raise ValueError(
                f"config: {part!r} comes with the published weights, not part of this version; --mode=summary and "
                "training on synthetic latents (configs/imagenet_L3.py:synthetic) work, efficientnet_lite0 encodes"
            )
    load = choose("encoder.name", options.name, ENCODERS)
    return load(
        options.weights, input_size=options.input_size, map=options.map, vector="pool", features=tuple(options.features)
    )


def score_encoder(config):
    """The extractor of FD-EffLite0: the package's own weights, at config.evaluate.input_size."""
    return efficientnet.load("", input_size=config.evaluate.input_size, map="head", vector="pool", features=())


def latents_dir(config, workdir: str) -> str:
    return os.path.expanduser(config.latents_dir) or os.path.join(workdir, "latents")


def wanted(config) -> tuple[latents_.LevelSource, ...]:
    """Where every level's variable comes from."""
    return tuple(latents_.LevelSource(level.name, level.source, tuple(level.shape)) for level in config.levels)


class SyntheticVariables:
    """The place of Latents where the data are random latents: the records are the variables."""

    def __init__(self, names):
        self.names = names

    def variables(self, raw, key):
        del key
        return {name: raw[name] for name in self.names}

    def decode(self, z):
        raise ValueError("synthetic latents have no images: there is nothing to sample or to score")


def latents(config, workdir: str):
    """(records, Latents): encodes the data first where that has not been done."""
    if config.data.source == "synthetic":
        shapes = tuple((level.name, tuple(level.shape)) for level in config.levels)
        source = sources.SyntheticLatents(shapes, config.data.num_examples, config.data.num_classes, config.seed)
        return source, SyntheticVariables([name for name, _ in shapes])
    directory = encode_images(config, workdir)
    result = latents_.read(directory, wanted(config))
    report = result.report({level.name: float(level.sigma) for level in config.levels[:-1]})
    logging.info("levels, coarse to fine:\n%s", latents_.format_report(report))
    if jax.process_index() == 0:
        atomic_write(os.path.join(workdir, "levels.json"), json.dumps(report, indent=2) + "\n")
    return records.LatentRecords(directory, ("label", *result.fields)), result


def encode_images(config, workdir: str) -> str:
    """Encodes config.data into the latents' directory, unless it is there; returns the directory."""
    directory = latents_dir(config, workdir)
    frozen = encoder(config)  # before the data: one that is not available is said before anyone fetches a data set
    encode.encode(
        images(config),
        frozen,
        construct("encoder", encoding.EncoderConfig, dict(config.encoder), dict(vector="pool")),
        construct("codec", encoding.CodecConfig, dict(config.codec), {}),
        directory,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return directory


def split(config, source):
    """(records to train on, this process's rows of the held-out batch or None)."""
    held_out = config.data.holdout
    if not held_out:
        return source, None
    if held_out >= len(source) or held_out % jax.process_count():
        raise ValueError(
            f"config.data.holdout {held_out} of {len(source)} records: keep it below that and a multiple of the "
            f"{jax.process_count()} process(es)"
        )
    training = sources.Part(source, 0, len(source) - held_out)
    rows = held_out // jax.process_count()
    first = len(source) - held_out + rows * jax.process_index()
    return training, loader.collate([source[i] for i in range(first, first + rows)])
