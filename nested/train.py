"""Training: one jitted, donated step over all levels, and the loop around it.

Everything random in step s is a function of (seed, s, row), so a resumed run repeats the uninterrupted one bit for bit:
the state carries no key and the loader no position. A step whose loss or gradient is not finite changes nothing but
the step counter; too many in a row stop the run, and the newest checkpoint is the last good state.
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
from nested import build, build_data, evaluate, hierarchy, partition, sample, summary
from nested import optimizer as opt
from nested.checkpoint import Checkpoints, Preemption, read_config, restore_subtree
from nested.writers import MetricWriter, Progress

Tree = Any


class TrainState(flax.struct.PyTreeNode):
    """step: [] int32, steps taken. params, ema: {level: parameters}. opt_state: of the trained levels."""

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a train step is made of. latents: raw records -> variables (nested/encoders/compress.py)."""

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


def mean_losses(step: Step, params, variables, given, times, keys) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over levels of the batch mean, and each level's."""
    per_row = hierarchy.losses(step.levels, params, variables, given, times, keys, only=step.trained)
    means = {name: jnp.mean(loss) for name, loss in per_row.items()}
    return sum(means.values()), means


def gradients(step: Step, params, raw: Mapping[str, jax.Array], key: jax.Array):
    """(gradients, {level: loss}) of one batch, its rows taken `accumulate` groups in turn.

    Group a holds rows a, a + accumulate, ...: the batch axis stays where it is sharded, nothing moves.
    """
    batch = jax.tree.leaves(raw)[0].shape[0]
    keys = hierarchy.rows(key, batch)
    variables = step.latents.variables(raw, jax.random.fold_in(key, batch))
    times = hierarchy.sample_times(step.levels, keys)
    data = (variables, hierarchy.given(step.levels, raw), times, keys)
    grad = jax.grad(lambda p, *rows: mean_losses(step, p, *rows), has_aux=True)
    if step.accumulate == 1:
        return grad(params, *data)
    groups = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch // step.accumulate, step.accumulate, *x.shape[1:]), 1, 0), data
    )

    def add(total, group):
        return jax.tree.map(lambda s, x: s + x / step.accumulate, total, grad(params, *group)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, params, *jax.tree.map(
        lambda x: x[0], groups)))
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
    keys = hierarchy.rows(jax.random.key(0), batch)
    variables, given = step.latents.variables(raw, jax.random.key(1)), hierarchy.given(step.levels, raw)
    metrics = {}
    for t in times:
        fixed = {level.name: jnp.full((batch,), t) for level in step.levels}
        losses = hierarchy.losses(step.levels, ema, variables, given, fixed, keys, train=False)
        metrics |= {f"validation/{name}/t{t:g}": jnp.mean(loss) for name, loss in losses.items()}
    return metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """What every mode builds from a config before it works: objects, shardings, and compiled functions' inputs."""

    config: Any
    step: Step
    mesh: Any
    abstract: TrainState
    shardings: TrainState
    key: jax.Array
    began: float = dataclasses.field(default_factory=time.perf_counter)


def abstract_state(config) -> TrainState:
    """Shapes and dtypes of a config's train state; allocates nothing."""
    step = Step(build.levels(config), None, build.optimizer(config), build.trained(config))
    return jax.eval_shape(lambda key: init_state(step, key), jax.random.key(0))


def make_run(config, latents) -> Run:
    """Builds levels, mesh and shardings; allocates nothing."""
    levels = build.levels(config)
    mesh = partition.make_mesh(config.train.mesh_data, config.train.mesh_fsdp)
    step = Step(
        levels=levels,
        latents=latents,
        optimizer=build.optimizer(config),
        trained=build.trained(config),
        accumulate=config.train.accumulate,
    )
    build.check_batch(config, mesh.size)
    build.check_init_from(config)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(lambda k: init_state(step, k), key)
    opt.check_groups(step.optimizer, {name: shapes.params[name] for name in step.trained})
    shardings = partition.shardings(shapes, mesh, config.train.fsdp_min_bytes)
    return Run(config, step, mesh, partition.abstract(shapes, shardings), shardings, key)


def fresh_state(run: Run) -> TrainState:
    """A new state on the mesh, with the levels that config.init_from names taken from another run."""
    # The initialisation runs once: optimising its machine code would cost more than it saves.
    options = {"xla_backend_optimization_level": 0}
    init = jax.jit(lambda key: init_state(run.step, key), out_shardings=run.shardings, compiler_options=options)
    state = init(run.key)
    source = run.config.init_from
    if not source.path:
        return state
    names = tuple(source.levels) or build.shared_levels(read_config(source.path), run.config)
    wanted = {source.weights: {name: run.abstract.params[name] for name in names}}
    taken = restore_subtree(source.path, wanted)[source.weights] if names else {}
    logging.info("init_from %s: took the %s of %s", source.path, source.weights, ", ".join(names) or "no level")
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return state.replace(params=state.params | taken, ema=state.ema | copy(taken))


def compiled_step(run: Run) -> Callable:
    """The jitted step with its state donated: (state, raw, key) -> (state, metrics)."""
    return jax.jit(
        lambda state, raw, key: train_step(run.step, state, raw, key),
        donate_argnums=0,
        out_shardings=(run.shardings, partition.replicated(run.mesh)),
    )


class Meter:
    """Averages of the step metrics since the last report, the data wait, and the count of skipped steps in a row."""

    def __init__(self, max_bad_steps: int):
        self.max_bad_steps, self.bad_in_a_row, self.skipped = max_bad_steps, 0, 0
        self.reset()

    def reset(self):
        self.sums, self.good = {}, 0
        self.restart_clock()

    def restart_clock(self):
        """What was done so far is part of no rate."""
        self.rows, self.waited, self.start = 0, 0.0, time.perf_counter()

    def add(self, step: int, metrics: Mapping[str, jax.Array]):
        """Takes one step's metrics (already computed on the device); raises NonFiniteError when too many are bad."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values.pop("finite"):
            self.bad_in_a_row = 0
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.good += 1
            return
        self.bad_in_a_row += 1
        self.skipped += 1
        logging.warning("step %d: loss %g is not finite or its gradient is not; update skipped", step, values["loss"])
        if self.bad_in_a_row >= self.max_bad_steps:
            raise NonFiniteError(
                f"{self.bad_in_a_row} steps in a row (the last is {step}) had a non-finite loss or gradient; the state "
                "is that of the last good step: look at loss/* in metrics.jsonl, lower optimizer.learning_rate"
            )

    def report(self, macs_per_row: float) -> dict[str, float]:
        """Means since the last report, with images/s, model FLOP/s (6 x multiply-accumulates) and the data wait."""
        elapsed, rows = time.perf_counter() - self.start, self.rows
        result = {name: total / max(self.good, 1) for name, total in self.sums.items()}
        if rows:  # not where the only step since is the run's first, which compiles and is not timed
            result["images_per_second"] = rows / elapsed
            result["model_flops_per_second"] = 6 * macs_per_row * rows / elapsed
            result["data_wait_share"] = self.waited / elapsed
        result["skipped_steps"] = self.skipped
        self.reset()
        return result


def train(config, workdir: str) -> None:
    """Trains to config.train.steps from the newest checkpoint in `workdir` or from scratch; then samples and scores."""
    build.check_pictures(config)
    source, latents = build_data.latents(config, workdir)
    run = make_run(config, latents)
    training, held_out = build_data.split(config, source)
    checkpoints = Checkpoints(
        workdir, build.plain(config), build.STATE_KEYS, keep=config.train.keep, save_every=config.train.save_every
    )
    restored = checkpoints.restore(run.abstract)
    state = fresh_state(run) if restored is None else restored
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
        return
    finish(run, state, source, workdir)


def finish(run: Run, state: TrainState, source, workdir: str) -> None:
    """After the last step: pictures and, where the config asks for them, scores; prints where they are."""
    config = run.config
    if not config.sample.num_samples:
        return
    gen = sample.generator(config, run.step.levels, run.step.latents, run.mesh)
    paths = sample.show(gen, state.ema, workdir)
    lines = [f"picture: {path}" for path in paths]
    if config.evaluate.num_samples:
        results = evaluate.score(gen, state.ema, source, build_data.latents_dir(config, workdir), int(state.step))
        lines += [f"score:   {result}" for result in results]
        lines.append(f"scores:  {evaluate.write_scores(workdir, results)}")
    if jax.process_index() == 0:
        print("\n".join(lines))


def feed(config, training, first: int) -> Iterator[dict]:
    """This process's rows of the batches of the steps first, first + 1, ..., each phase with its own batch size."""
    for phase in build.phases(config):
        if phase.end <= first:
            continue
        start = max(first, phase.start)
        batches = loader.batches(
            training,
            seed=config.seed,
            batch_size=phase.batch_size,
            start_step=start,
            offset=phase.rows - phase.start * phase.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.train.threads,
            workers=config.train.workers,
            transform=build_data.augmentation(config),
        )
        try:
            for _ in range(start, phase.end):
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
        gen = sample.generator(run.config, run.step.levels, run.step.latents, run.mesh)
    previous, compiled_for = None, 0  # the metrics of step k - 1 are fetched after step k is dispatched
    for step in itertools.count(first + 1):
        waiting = time.perf_counter()
        raw = partition.to_global(next(batches), run.mesh)
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
            writer.scalars(step, jax.device_get(validate(state.ema, partition.to_global(held_out, run.mesh))))
        if config.sample_every and step % config.sample_every == 0 and not last:
            path = os.path.join(workdir, "samples", f"step_{step:08d}.png")
            writer.images(step, {"samples": sample.save_grid(gen, state.ema, path)})
        if not last:
            checkpoints.save(step, state)
        if last or stop:
            batches.close()
            return state, not last
