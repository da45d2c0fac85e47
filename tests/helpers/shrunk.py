"""Shipped configs made small in place, trained for two steps on random data."""

import jax
import numpy as np

from helpers.run_data import latents_of
from input_pipeline.loader import collate
from nested.build.options import declared_by_all
from nested.build.parts import SOURCES
from nested.modes import train
from nested.training import step as training

ROWS = 4


def on_random_data(config):
    """The config with batches of four random latents and three tokens of text, if any."""
    config.data.update({name: option.default for name, option in declared_by_all(SOURCES.values()).items()})
    config.data.update(source="synthetic", num_examples=ROWS, flip=False)
    config.text.update(max_tokens=3, width=8)
    config.train.update(batch_size=ROWS, remat=False)
    config.optimizer.warmup_steps = 0
    config.init_from.levels = ()
    return config


def check_two_steps(config, workdir):
    """Two train steps: finite, and every level that trains moves."""
    source, latents = latents_of(config, str(workdir))
    run = train.make_run(config, latents)
    config.init_from.phase = ""
    state = train.initial_state(run, config, str(workdir))
    before = jax.tree.map(np.asarray, state.params)
    # It runs twice: optimising its machine code costs more than it saves.
    options = {"xla_backend_optimization_level": 0}
    update = jax.jit(lambda *inputs: training.train_step(run.step, *inputs), compiler_options=options)
    raw = collate([source[i] for i in range(ROWS)])
    for _ in range(2):  # networks that give zero at first move only their last layers in the first step
        state, metrics = update(state, raw, run.key)
    assert metrics["finite"] and int(state.step) == 2
    moved = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, state.params)
    for name, level in moved.items():
        trained = not config.train_levels or name in config.train_levels
        # those that the zeros of the start let the loss reach in two steps
        assert (np.mean(jax.tree.leaves(level)) > 0.1) == trained, name
