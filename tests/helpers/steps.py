"""Train steps outside a run: what they are made of and fixed batches."""

import tempfile

from helpers.run_data import latents_of
from helpers.tiny import get_config
from input_pipeline import loader
from nested.modes import train


def make(changes=(), config=None):
    """(run, records) of the tiny synthetic config with the dotted keys of `changes` set."""
    config = config or get_config("synthetic,L2")
    config.update_from_flattened_dict(dict(changes))
    source, latents = latents_of(config, tempfile.mkdtemp())
    return train.make_run(config, latents), source


def batch_of(source, step=0, rows=8):
    """Records as a batch; a fixed one for each `step`."""
    return loader.collate([source[i % len(source)] for i in range(step * rows, (step + 1) * rows)])
