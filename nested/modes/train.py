"""The mode `train`: a run from its config to its pictures and scores, going on where an earlier call was stopped.

With config.phases the run is several in turn (Matryoshka's progressive training): each phase is a run of its own in
WORKDIR/phases/NAME, the last one in WORKDIR; each starts from the EMA of the one before, with a fresh optimizer.
"""

import contextlib
import functools
import os
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview

from input_pipeline import loader
from nested.build.data import build_data
from nested.build.levels import build_levels, trained_level_names
from nested.build.options import Config, construct, to_plain
from nested.build.saved import upgrade_saved_config
from nested.build.sources import shard_window
from nested.build.training import (
    STATE_KEYS,
    abstract_state,
    batch_spans,
    build_optimizer,
    check_batch_size,
    check_images_exist,
    check_init_from,
    split_phases,
)
from nested.encoders.text_encoder import TextEncoder
from nested.modes import evaluate, sample, summary
from nested.modes.encode import open_latents, split_records
from nested.runtime import partition
from nested.runtime.checkpoint import Checkpoints, Preemption, latest_step
from nested.runtime.writers import MetricWriter
from nested.sampling import generator as sampling
from nested.training import optimizer as opt
from nested.training.loop import Run, fresh_state, train_loop
from nested.training.meter import NonFiniteError
from nested.training.options import TrainOptions
from nested.training.step import Step, TrainState, VariableReader, init_state
from nested.weights import graft

Tree = Any


def make_run(config: Config, latents: VariableReader, text: TextEncoder | None = None) -> Run:
    """The run of a config: its levels, mesh and shardings. Allocates nothing on a device.

    latents: turns the run's records into variables. text: encodes the captions of a batch, if records have token ids.
    Raises ValueError for options that do not fit each other or the devices."""
    levels = build_levels(config, text and text.encode_one())
    mesh = partition.make_mesh(config.train.mesh_data, config.train.mesh_fsdp)
    step = Step(
        levels=levels,
        latents=latents,
        optimizer=build_optimizer(config),
        trained=trained_level_names(config),
        accumulate=config.train.accumulate,
    )
    check_batch_size(config, mesh.size)
    check_init_from(config)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(lambda k: init_state(step, k), key)
    opt.check_groups(step.optimizer, {name: shapes.params[name] for name in step.trained})
    shardings = partition.shardings(shapes, mesh, config.train.fsdp_min_bytes)
    options = construct("train", TrainOptions, config.train, {})
    features = text and text.with_features
    return Run(options, step, mesh, partition.abstract(shapes, shardings), shardings, key, features)


def initial_state(run: Run, config: Config, root: str = "") -> TrainState:
    """A new state on the mesh, with what config.init_from names taken from another run or from a phase of this one.

    root: the run's workdir, which holds its phases."""
    state = fresh_state(run)
    source = config.init_from
    path = phase_dir(root, source.phase) if source.phase else source.path
    if not path:
        return state
    params, ema = state.params, state.ema
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    for place, tree in graft.load_initial_weights(
        to_plain(config), path, run.abstract.params, upgrade_saved_config
    ).items():
        params, ema = graft.replace_subtree(params, place, tree), graft.replace_subtree(ema, place, copy(tree))
    return state.replace(params=params, ema=ema)


def training_batches(config: Config, records: Any, first: int) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields this process's rows of the batches of the steps first, first + 1, ..., each span with its own batch size.

    records: the source of training records. first: the number of steps that have been taken.
    """
    augmentation, window = build_data(config).augmentation, shard_window(config)
    for span in batch_spans(config):
        if span.end <= first:
            continue
        start = max(first, span.start)
        batches = loader.batches(
            records,
            seed=config.seed,
            batch_size=span.batch_size,
            start_step=start,
            offset=span.rows - span.start * span.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.train.threads,
            workers=config.train.workers,
            transform=augmentation,
            shard_window=window,
        )
        try:
            for _ in range(start, span.end):
                yield next(batches)
        finally:
            batches.close()


def phase_dir(root: str, name: str) -> str:
    """The folder of a phase's run; '' is the last one's."""
    return os.path.join(root, "phases", name) if name else root


def run(config: Config, workdir: str) -> None:
    """Trains the phases of the config in turn, going on where an earlier call was stopped."""
    phases = split_phases(config)
    for _, phase in phases:  # errors of a late phase are reported before the first one trains
        build_levels(phase)
        build_optimizer(phase)
        check_batch_size(phase, partition.make_mesh(phase.train.mesh_data, phase.train.mesh_fsdp).size)
        check_init_from(phase)
        check_images_exist(phase)
    if len(phases) > 1:
        shapes = [(name, phase, abstract_state(phase).params) for name, phase in phases]
        for _, phase, params in shapes:
            opt.check_groups(build_optimizer(phase), params)
        graft.check_phases_fit([(name, to_plain(phase), params) for name, phase, params in shapes])
    for name, phase in phases:
        folder = phase_dir(workdir, name)
        if name and (latest_step(folder) or 0) >= phase.train.steps:
            logging.info("phase %s: done, in %s", name, folder)
            continue
        if name:
            logging.info("phase %s: %d steps, in %s", name, phase.train.steps, folder)
            phase.latents_dir = build_data(config).latents_dir(workdir)
            os.makedirs(folder, exist_ok=True)
        if not train_phase(phase, folder, workdir):
            return


def train_phase(config: Config, workdir: str, root: str) -> bool:
    """Trains to config.train.steps from the newest checkpoint in `workdir` or from scratch; then samples and scores.
    False where a signal stopped it."""
    check_images_exist(config)
    evaluate.check_evaluation(config)
    data = build_data(config)
    text = data.open_text_encoder()
    source, latents = open_latents(data, workdir, text)
    run = make_run(config, latents, text)
    training, held_out = split_records(data, source)
    checkpoints = Checkpoints(
        workdir,
        to_plain(config),
        STATE_KEYS,
        keep=config.train.keep,
        save_every=config.train.save_every,
        upgrade=upgrade_saved_config,
    )
    restored = checkpoints.restore(run.abstract)
    state = initial_state(run, config, root) if restored is None else restored
    first = int(state.step)
    if first:
        logging.info("resumed at step %d from %s", first, workdir)
    elif jax.process_index() == 0:
        logging.info("\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False))
    writer = MetricWriter(workdir, jax.process_index(), first)

    @functools.cache
    def generator() -> sampling.Generator:
        return sample.build_generator(config, run.step.levels, latents, run.mesh, text)

    def draw_samples(state: TrainState, step: int) -> np.ndarray:
        path = os.path.join(workdir, "samples", f"step_{step:08d}.png")
        return sample.save_sample_grid(config, generator(), state.ema, path)

    macs = sum(level.macs for level in summary.summarize_levels(run.step.levels) if level.name in run.step.trained)
    batches = training_batches(config, training, first)
    with Preemption() as preemption, contextlib.closing(batches):
        try:
            state, stopped = train_loop(
                run,
                state,
                batches,
                held_out=held_out,
                checkpoints=checkpoints,
                preemption=preemption,
                writer=writer,
                macs=macs,
                draw_samples=draw_samples,
            )
        except NonFiniteError:
            checkpoints.close()  # the last good state is on disk before the run ends
            raise
        checkpoints.save(int(state.step), state, force=True)
        checkpoints.close()
    writer.close()
    if stopped:
        logging.info("stopped by a signal at step %d; run the same command again to go on", int(state.step))
        return False
    finish(run, config, latents, text, state, source, workdir)
    return True


def finish(
    run: Run,
    config: Config,
    latents: sampling.Decoder,
    text: TextEncoder | None,
    state: TrainState,
    source: Any,
    workdir: str,
) -> None:
    """After the last step: makes the pictures and scores that the config asks for, and prints where they are."""
    lines = []
    if not config.sample.num_samples and not config.evaluate.num_samples and not config.evaluate.likelihood:
        return
    generator = sample.build_generator(config, run.step.levels, latents, run.mesh, text)
    if config.sample.num_samples:
        lines += [f"picture: {path}" for path in sample.save_run_pictures(config, generator, state.ema, workdir)]
    if config.evaluate.num_samples or config.evaluate.likelihood:
        cache_dir = build_data(config).latents_dir(workdir)
        lines += evaluate.report_scores(generator, state.ema, config, source, cache_dir, int(state.step), workdir)
    if jax.process_index() == 0:
        print("\n".join(lines))
