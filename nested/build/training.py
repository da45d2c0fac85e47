"""Config -> how a run trains: the optimizer, the batch sizes, the phases, and the weights that it starts from."""

import itertools
import re

import jax
from ml_collections import ConfigDict

from nested.build.levels import build_levels, trained_level_names
from nested.build.options import Config, choose, construct, override
from nested.build.sources import source_kind
from nested.training import optimizer as opt
from nested.training.options import BatchSpan
from nested.training.step import Step, TrainState, init_state

# Parts of a config that decide what a train state is: a checkpoint made with others is refused.
STATE_KEYS = (
    "seed", "levels", "hierarchy", "train_levels", "optimizer", "data", "encoder", "codec", "text", "init_from"
)  # fmt: skip


def build_optimizer(config: Config) -> opt.OptimizerConfig:
    """Build config.optimizer; the decay 'cosine' reaches 0 at config.train.steps. Raises: ValueError, in one line."""
    options, steps = config.optimizer, config.train.steps
    if options.decay == "cosine" and steps <= options.warmup_steps:
        raise ValueError(
            f"config.train.steps is {steps}: cosine decay needs more than config.optimizer.warmup_steps, "
            f"{options.warmup_steps}; change one of them"
        )
    total = steps if options.decay == "cosine" else None
    return construct("optimizer", opt.OptimizerConfig, options, dict(total_steps=total))


def abstract_state(config: Config) -> TrainState:
    """The shapes and dtypes of a config's train state; allocates nothing."""
    step = Step(build_levels(config), None, build_optimizer(config), trained_level_names(config))
    return jax.eval_shape(lambda key: init_state(step, key), jax.random.key(0))


def batch_spans(config: Config) -> list[BatchSpan]:
    """Return the run's batch sizes in order: config.train.batch_size, then those of batch_growth."""
    train = config.train
    changes = [(0, train.batch_size), *((int(step), int(size)) for step, size in train.batch_growth)]
    result, rows = [], 0
    for (start, size), (end, _) in itertools.pairwise([*changes, (max(train.steps, changes[-1][0] + 1), 0)]):
        if end <= start:
            raise ValueError(f"config.train.batch_growth {tuple(train.batch_growth)}: its steps must rise from 1 on")
        result.append(BatchSpan(start, end, size, rows))
        rows += (end - start) * size
    return result


def check_batch_size(config: Config, devices: int) -> None:
    """Raise ValueError unless every batch divides by the accumulation groups, and each group by the devices."""
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


def split_phases(config: Config) -> list[tuple[str, Config]]:
    """Return (name, config) of the runs that train one after the other, from one another; the last is ('', config).

    An entry of config.phases says how its phase differs: dict(name=, levels=, train=dict(steps=), ...). The last phase
    has the config's own values. Every later phase gets init_from.phase, the name of the one before it.

    Raises: ValueError, in one line, for a phase without a name of its own or with options that it cannot change.
    """
    result, before = [], config.init_from.phase
    for i, changes in enumerate((*config.phases, None)):
        phase: Config = ConfigDict(config.copy_and_resolve_references())
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


def check_init_from(config: Config) -> None:
    """Raise ValueError unless config.init_from names one place to take weights from and levels that exist."""
    choose("init_from.weights", config.init_from.weights, ("ema", "params"))
    if config.init_from.path and config.init_from.phase:
        raise ValueError(f"config.init_from: path {config.init_from.path} and phase {config.init_from.phase}; give one")
    if config.init_from.levels and not config.init_from.path and not config.init_from.phase:
        raise ValueError(
            f"config.init_from.levels {tuple(config.init_from.levels)} without a run to take them from: give "
            "config.init_from.path, the --workdir of one, or set levels to ()"
        )
    for name in config.init_from.levels:
        choose("init_from.levels", name, [level.name for level in config.levels])


def check_images_exist(config: Config) -> None:
    """Raise ValueError if the config draws or scores images but its data are random latents, which have none."""
    draws = config.sample.num_samples or config.evaluate.num_samples or config.train.sample_every
    if source_kind(config).synthetic and draws:
        raise ValueError(
            "config.data.source is 'synthetic', whose latents have no images: set config.sample.num_samples, "
            "config.evaluate.num_samples and config.train.sample_every to 0"
        )
