"""What HDiT's train steps cost to compile and to hold, by XLA; slow, so not in the default run."""

import tempfile
import time

import jax
import jax.numpy as jnp
import pytest
from helpers.run_data import latents_of

from configs import hdit, hdit_ffhq1024
from nested.modes import train
from nested.training import loop as training_loop


@pytest.fixture
def uncached():
    """Compilation for real, not from the persistent cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def compiled_step(config, batch_size):
    """(seconds, XLA's program) of a train step, from shapes alone."""
    config.train.batch_size = batch_size
    run = train.make_run(config, latents_of(config, tempfile.mkdtemp())[1])
    (level,) = run.step.levels
    raw = {"x": jax.ShapeDtypeStruct((batch_size, *level.shape), jnp.float32)}
    raw["label"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    begin = time.perf_counter()
    program = training_loop.compile_step(run).lower(run.abstract, raw, run.key).compile()
    return time.perf_counter() - begin, program


@pytest.mark.slow
def test_the_step_of_hdit_e_compiles_in_a_minute(uncached):
    seconds, program = compiled_step(hdit.get_config("E,synthetic"), 2)
    assert seconds < 60
    assert program.memory_analysis().alias_size_in_bytes > 4 * 4 * 117e6  # parameters, EMA, two moments, donated


@pytest.mark.slow
def test_ffhq_at_1024_pixels_fits_24_gib():
    config = hdit_ffhq1024.get_config("synthetic")
    assert (config.train.dtype, config.train.remat) == ("bfloat16", True)
    memory = compiled_step(config, 1)[1].memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert 2**30 < held + memory.temp_size_in_bytes < 24 * 2**30
