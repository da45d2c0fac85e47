"""The training loop: batches in, steps, reports, validation, pictures, checkpoints, and a clean stop by a signal.

The metrics of step k - 1 are fetched after step k has been dispatched, so the device never waits for the host. The
loader has no position: the batch of step s is a function of (seed, s), so a resumed run reads what an uninterrupted one
would have read.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from nested.runtime import partition
from nested.runtime.checkpoint import Checkpoints, Preemption
from nested.runtime.writers import MetricWriter, Progress
from nested.training.meter import Meter
from nested.training.options import TrainOptions
from nested.training.step import Step, TrainState, init_state, train_step, validation_losses

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a training run is made of, before any array is allocated.

    Attributes:
      options: config.train.
      step: levels, latents and optimizer.
      mesh: the devices.
      abstract: the train state as shapes, dtypes and shardings; shardings: its shardings alone.
      key: the run's key.
      text_features: adds the features of a batch's captions on the device; None where records have no token ids.
      began: when the set-up began, for the report of the first step.
    """

    options: TrainOptions
    step: Step
    mesh: jax.sharding.Mesh
    abstract: TrainState
    shardings: TrainState
    key: jax.Array
    text_features: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] | None = None
    began: float = dataclasses.field(default_factory=time.perf_counter)


def fresh_state(run: Run) -> TrainState:
    """A new state on the mesh."""
    # The initialisation runs once: optimising its machine code would cost more than it saves.
    options = {"xla_backend_optimization_level": 0}
    init = jax.jit(lambda key: init_state(run.step, key), out_shardings=run.shardings, compiler_options=options)
    return init(run.key)


def compile_step(run: Run) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step with its state donated: (state, raw, key) -> (state, metrics)."""
    return jax.jit(
        lambda state, raw, key: train_step(run.step, state, raw, key),
        donate_argnums=0,
        out_shardings=(run.shardings, partition.replicated(run.mesh)),
    )


def to_device(run: Run, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, with the features of their captions."""
    raw = partition.to_global(rows, run.mesh)
    return raw if run.text_features is None else run.text_features(raw)


def train_loop(
    run: Run,
    state: TrainState,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    held_out: Mapping[str, np.ndarray] | None,
    checkpoints: Checkpoints,
    preemption: Preemption,
    writer: MetricWriter,
    macs: float,
    draw_samples: Callable[[TrainState, int], np.ndarray],
) -> tuple[TrainState, bool]:
    """Trains to the last step or to a signal.

    Args:
      run: the run.
      state: the state to go on from.
      batches: this process's rows of the coming steps.
      held_out: this process's rows of the held-out batch, or None.
      checkpoints, preemption, writer: where the state goes, whether to stop, where the metrics go.
      macs: multiply-accumulates of one row's forward pass, for the rate that is reported.
      draw_samples: draws a grid of samples of the state at a step, uint8 [H, W, C], and writes it.

    Returns:
      (the state, whether a signal stopped the run before its last step).
    """
    options = run.options
    first = int(state.step)
    if first >= options.steps:
        return state, False
    update, meter = compile_step(run), Meter(options.max_bad_steps)
    progress = Progress("step", options.steps, first)
    validate = jax.jit(lambda ema, raw: validation_losses(run.step, ema, raw, options.eval_times))
    previous, compiled_for = None, 0  # previous: the metrics of step k - 1
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
        last = step >= options.steps
        stop = preemption.should_stop(step)
        if step == first + 1:
            jax.block_until_ready(metrics)
            logging.info("first step done after %.1f s of set-up and compilation", time.perf_counter() - run.began)
        if rows != compiled_for:  # the first step of a batch size compiles: it is not part of any rate
            compiled_for = rows
            jax.block_until_ready(metrics)
            meter.restart_clock()
        if step % options.log_every == 0 or last or stop:
            meter.add(step, previous)
            previous = None
            report = meter.report(macs)
            writer.scalars(step, report)
            loss, rate = report.get("loss", float("nan")), report.get("images_per_second", float("nan"))
            progress.update(step, f"loss {loss:.4f}  {rate:.0f} images/s")
        if held_out is not None and options.eval_every and (step % options.eval_every == 0 or last):
            writer.scalars(step, jax.device_get(validate(state.ema, to_device(run, held_out))))
        if options.sample_every and step % options.sample_every == 0 and not last:
            writer.images(step, {"samples": draw_samples(state, step)})
        if not last:
            checkpoints.save(step, state)
        if last or stop:
            return state, stop
    raise AssertionError("itertools.count ended")
