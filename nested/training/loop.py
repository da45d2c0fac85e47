"""Training: one jitted, donated step over all levels, and the loop around it.

Everything random in step s is a function of (seed, s, row), so a resumed run repeats the uninterrupted one bit for bit:
the state carries no key and the loader no position. A step whose loss or gradient is not finite changes nothing but
the step counter; too many in a row stop the run, and the newest checkpoint is the last good state.

With config.phases the run is several in turn (Matryoshka's progressive training): each phase is a run of its own in
WORKDIR/phases/NAME, the last one in WORKDIR; each starts from the EMA of the one before, with a fresh optimizer.
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from absl import logging
from clu import parameter_overview

from input_pipeline import loader
from nested.build import data as build_data
from nested.build.levels import build_levels, trained_level_names
from nested.build.options import to_plain
from nested.build.sources import shard_window
from nested.build.text import load_text_encoder
from nested.build.training import (
    STATE_KEYS,
    batch_spans,
    build_optimizer,
    check_batch_size,
    check_images_exist,
    check_init_from,
    split_phases,
)
from nested.diffusion import hierarchy
from nested.encoders.text_encoder import TextEncoder
from nested.evaluation import report as evaluate
from nested.modes import summary
from nested.runtime import partition
from nested.runtime.checkpoint import Checkpoints, Preemption, latest_step
from nested.runtime.writers import MetricWriter, Progress
from nested.sampling import generator as sample
from nested.training import optimizer as opt
from nested.training.meter import Meter, NonFiniteError
from nested.weights import graft as transfer

Tree = Any


class TrainState(flax.struct.PyTreeNode):
    """step: [] int32, steps taken. params, ema: {level: parameters}. opt_state: of the trained levels."""

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree


@dataclasses.dataclass(frozen=True)
class Step:
    """What a train step is made of. latents: raw records -> variables (nested/spaces/svd.py)."""

    levels: tuple[hierarchy.Level, ...]
    latents: Any
    optimizer: opt.OptimizerConfig
    trained: tuple[str, ...]
    accumulate: int = 1


def init_state(step: Step, key: jax.Array) -> TrainState:
    """A fresh state; the EMA starts as a copy of the parameters."""
    params = hierarchy.init(step.levels, key)
    trained = {name: params[name] for name in step.trained}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(step).init(trained),
    )


def make_optimizer(step: Step):
    return opt.make_optimizer(step.optimizer, hierarchy.is_buffer(step.levels))


def mean_losses(step: Step, params, variables, context, times, keys) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over levels of the batch mean, and each level's."""
    per_row = hierarchy.losses(step.levels, params, variables, context, times, keys, only=step.trained)
    means = {name: jnp.mean(loss) for name, loss in per_row.items()}
    return sum(means.values()), means


def gradients(step: Step, params, raw: Mapping[str, jax.Array], key: jax.Array):
    """(gradients, {level: loss}) of one batch, its rows taken `accumulate` groups in turn.

    Group a holds rows a, a + accumulate, ...: the batch axis stays where it is sharded, nothing moves.
    """
    batch = jax.tree.leaves(raw)[0].shape[0]
    keys = hierarchy.row_keys(key, batch)
    variables = step.latents.variables(raw, jax.random.fold_in(key, batch))
    times = hierarchy.sample_times(step.levels, keys)
    data = (variables, hierarchy.select_context(step.levels, raw), times, keys)
    grad = jax.grad(lambda p, *rows: mean_losses(step, p, *rows), has_aux=True)
    if step.accumulate == 1:
        return grad(params, *data)
    groups = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch // step.accumulate, step.accumulate, *x.shape[1:]), 1, 0), data
    )

    def add(total, group):
        return jax.tree.map(lambda s, x: s + x / step.accumulate, total, grad(params, *group)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], groups))
    )
    return jax.lax.scan(add, zeros, groups)[0]


def train_step(step: Step, state: TrainState, raw: Mapping[str, jax.Array], key: jax.Array):
    """(state, raw records [B, ...], run key) -> (state, metrics). metrics: loss/LEVEL, loss, gradient_norm/LEVEL,
    learning_rate, finite (whether the update was made)."""
    trained = {name: state.params[name] for name in step.trained}
    frozen = {name: tree for name, tree in state.params.items() if name not in trained}
    grads, losses = gradients(step, trained, raw, jax.random.fold_in(key, state.step))
    norms = opt.gradient_norms(grads)
    total = sum(losses.values())
    finite = jnp.isfinite(total) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    updates, opt_state = make_optimizer(step).update(grads, state.opt_state, trained)
    params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), trained, updates)
    decay, is_buffer = opt.ema_decay(step.optimizer, state.step), hierarchy.is_buffer(step.levels)
    ema = opt.ema_update({name: state.ema[name] for name in step.trained}, params, decay, is_buffer)
    new = state.replace(params=frozen | params, ema={**state.ema, **ema}, opt_state=opt_state)
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state).replace(step=state.step + 1)
    metrics = {
        "loss": total,
        **{f"loss/{name}": value for name, value in losses.items()},
        **{f"gradient_norm/{name}": value for name, value in norms.items()},
        "learning_rate": opt.learning_rate(step.optimizer, state.step),
        "finite": finite,
    }
    return new, metrics


def validation_losses(step: Step, ema, raw: Mapping[str, jax.Array], times: Sequence[float]) -> dict[str, jax.Array]:
    """{"validation/LEVEL/t0.5": mean loss of the EMA weights} at fixed noise levels, with fixed noises."""
    batch = jax.tree.leaves(raw)[0].shape[0]
    keys = hierarchy.row_keys(jax.random.key(0), batch)
    variables, context = step.latents.variables(raw, jax.random.key(1)), hierarchy.select_context(step.levels, raw)
    metrics = {}
    for t in times:
        fixed = {level.name: jnp.full((batch,), t) for level in step.levels}
        losses = hierarchy.losses(step.levels, ema, variables, context, fixed, keys, train=False)
        metrics |= {f"validation/{name}/t{t:g}": jnp.mean(loss) for name, loss in losses.items()}
    return metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """What every mode builds from a config before it works: objects, shardings, and compiled functions' inputs.

    text: the encoder of the captions of a batch, which runs before the step, or None."""

    config: Any
    step: Step
    mesh: Any
    abstract: TrainState
    shardings: TrainState
    key: jax.Array
    text: TextEncoder | None = None
    began: float = dataclasses.field(default_factory=time.perf_counter)


def abstract_state(config) -> TrainState:
    """Shapes and dtypes of a config's train state; allocates nothing."""
    step = Step(build_levels(config), None, build_optimizer(config), trained_level_names(config))
    return jax.eval_shape(lambda key: init_state(step, key), jax.random.key(0))


def make_run(config, latents, text=None) -> Run:
    """Builds levels, mesh and shardings; allocates nothing."""
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
    return Run(config, step, mesh, partition.abstract(shapes, shardings), shardings, key, text)


def fresh_state(run: Run, root: str = "") -> TrainState:
    """A new state on the mesh, with what config.init_from names taken from another run, or a phase of this one, whose
    phases are in `root`."""
    # The initialisation runs once: optimising its machine code would cost more than it saves.
    options = {"xla_backend_optimization_level": 0}
    init = jax.jit(lambda key: init_state(run.step, key), out_shardings=run.shardings, compiler_options=options)
    state = init(run.key)
    source = run.config.init_from
    path = phase_dir(root, source.phase) if source.phase else source.path
    if not path:
        return state
    params, ema = state.params, state.ema
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    for place, tree in transfer.load_initial_weights(run.config, path, run.abstract.params).items():
        params, ema = transfer.replace_subtree(params, place, tree), transfer.replace_subtree(ema, place, copy(tree))
    return state.replace(params=params, ema=ema)


def phase_dir(root: str, name: str) -> str:
    """The folder of a phase's run; '' is the last one's."""
    return os.path.join(root, "phases", name) if name else root


def compiled_step(run: Run) -> Callable:
    """The jitted step with its state donated: (state, raw, key) -> (state, metrics)."""
    return jax.jit(
        lambda state, raw, key: train_step(run.step, state, raw, key),
        donate_argnums=0,
        out_shardings=(run.shardings, partition.replicated(run.mesh)),
    )


def train(config, workdir: str) -> None:
    """Trains the phases of the config in turn, going on where an earlier call was stopped."""
    phases = split_phases(config)
    for _, phase in phases:  # what is wrong in a late phase is said before the first one trains
        build_levels(phase)
        build_optimizer(phase)
        check_batch_size(phase, partition.make_mesh(phase.train.mesh_data, phase.train.mesh_fsdp).size)
        check_init_from(phase)
        check_images_exist(phase)
    if len(phases) > 1:
        shapes = [(name, phase, abstract_state(phase).params) for name, phase in phases]
        for _, phase, params in shapes:
            opt.check_groups(build_optimizer(phase), params)
        transfer.check_phases_fit(shapes)
    for name, phase in phases:
        folder = phase_dir(workdir, name)
        if name and (latest_step(folder) or 0) >= phase.train.steps:
            logging.info("phase %s: done, in %s", name, folder)
            continue
        if name:
            logging.info("phase %s: %d steps, in %s", name, phase.train.steps, folder)
            phase.latents_dir = build_data.latents_dir(config, workdir)
            os.makedirs(folder, exist_ok=True)
        if not train_phase(phase, folder, workdir):
            return


def train_phase(config, workdir: str, root: str) -> bool:
    """Trains to config.train.steps from the newest checkpoint in `workdir` or from scratch; then samples and scores.
    False where a signal stopped it."""
    check_images_exist(config)
    evaluate.check_evaluation(config)
    text = load_text_encoder(config)
    source, latents = build_data.latents(config, workdir, text)
    run = make_run(config, latents, text)
    training, held_out = build_data.split(config, source)
    checkpoints = Checkpoints(
        workdir, to_plain(config), STATE_KEYS, keep=config.train.keep, save_every=config.train.save_every
    )
    restored = checkpoints.restore(run.abstract)
    state = fresh_state(run, root) if restored is None else restored
    first = int(state.step)
    if first:
        logging.info("resumed at step %d from %s", first, workdir)
    elif jax.process_index() == 0:
        logging.info("\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False))
    writer = MetricWriter(workdir, jax.process_index(), first)
    macs = sum(level.macs for level in summary.levels(run.step.levels) if level.name in run.step.trained)
    with Preemption() as preemption:
        try:
            state, stopped = loop(run, state, training, held_out, checkpoints, preemption, writer, macs, workdir)
        except NonFiniteError:
            checkpoints.close()  # the last good state is on disk before the run ends
            raise
        checkpoints.save(int(state.step), state, force=True)
        checkpoints.close()
    writer.close()
    if stopped:
        logging.info("stopped by a signal at step %d; run the same command again to go on", int(state.step))
        return False
    finish(run, state, source, workdir)
    return True


def finish(run: Run, state: TrainState, source, workdir: str) -> None:
    """After the last step: the pictures and scores that the config asks for; prints where they are."""
    config, lines = run.config, []
    if not config.sample.num_samples and not config.evaluate.num_samples:
        return
    gen = sample.generator(config, run.step.levels, run.step.latents, run.mesh, run.text)
    if config.sample.num_samples:
        lines += [f"picture: {path}" for path in sample.show(gen, state.ema, workdir)]
    if config.evaluate.num_samples:
        cache_dir = build_data.latents_dir(config, workdir)
        lines += evaluate.report_scores(gen, state.ema, source, cache_dir, int(state.step), workdir)
    if jax.process_index() == 0:
        print("\n".join(lines))


def to_device(run: Run, rows: Mapping[str, Any]) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, with the features of their texts."""
    raw = partition.to_global(rows, run.mesh)
    return raw if run.text is None else run.text.with_features(raw)


def feed(config, training, first: int) -> Iterator[dict]:
    """This process's rows of the batches of the steps first, first + 1, ..., each span with its own batch size."""
    for span in batch_spans(config):
        if span.end <= first:
            continue
        start = max(first, span.start)
        batches = loader.batches(
            training,
            seed=config.seed,
            batch_size=span.batch_size,
            start_step=start,
            offset=span.rows - span.start * span.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.train.threads,
            workers=config.train.workers,
            transform=build_data.augmentation(config),
            shard_window=shard_window(config),
        )
        try:
            for _ in range(start, span.end):
                yield next(batches)
        finally:
            batches.close()


def loop(run: Run, state, training, held_out, checkpoints, preemption, writer, macs, workdir):
    """Steps to the end or to a signal: (state, whether a signal stopped it)."""
    config = run.config.train
    first = int(state.step)
    if first >= config.steps:
        return state, False
    batches = feed(run.config, training, first)
    update, meter, progress = compiled_step(run), Meter(config.max_bad_steps), Progress("step", config.steps, first)
    validate = jax.jit(lambda ema, raw: validation_losses(run.step, ema, raw, config.eval_times))
    if config.sample_every:
        gen = sample.generator(run.config, run.step.levels, run.step.latents, run.mesh, run.text)
    previous, compiled_for = None, 0  # the metrics of step k - 1 are fetched after step k is dispatched
    for step in itertools.count(first + 1):
        waiting = time.perf_counter()
        raw = to_device(run, next(batches))
        meter.waited += time.perf_counter() - waiting
        state, metrics = update(state, raw, run.key)
        rows = jax.tree.leaves(raw)[0].shape[0]
        meter.rows += rows
        if previous is not None:
            meter.add(step - 1, previous)
        previous = metrics
        last = step >= config.steps
        stop = preemption.should_stop(step)
        if step == first + 1:
            jax.block_until_ready(metrics)
            logging.info("first step done after %.1f s of set-up and compilation", time.perf_counter() - run.began)
        if rows != compiled_for:  # the first step of a batch size compiles: it is not part of any rate
            compiled_for = rows
            jax.block_until_ready(metrics)
            meter.restart_clock()
        if step % config.log_every == 0 or last or stop:
            meter.add(step, previous)
            previous = None
            report = meter.report(macs)
            writer.scalars(step, report)
            loss, rate = report.get("loss", float("nan")), report.get("images_per_second", float("nan"))
            progress.update(step, f"loss {loss:.4f}  {rate:.0f} images/s")
        if held_out is not None and config.eval_every and (step % config.eval_every == 0 or last):
            writer.scalars(step, jax.device_get(validate(state.ema, to_device(run, held_out))))
        if config.sample_every and step % config.sample_every == 0 and not last:
            path = os.path.join(workdir, "samples", f"step_{step:08d}.png")
            writer.images(step, {"samples": sample.save_grid(gen, state.ema, path)})
        if not last:
            checkpoints.save(step, state)
        if last or stop:
            batches.close()
            return state, stop
    raise AssertionError("itertools.count ended")
