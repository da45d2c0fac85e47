"""What a train step of any config costs here: compile seconds, step time, share of the matmul rate, data wait.

    python -m benchmarks.train_step --config=configs/quickstart.py --workdir=runs/quickstart [--steps=30] [--out=FILE]

Model FLOPs are 6 x the multiply-accumulates of `summary` per image (2 forward, 4 backward); XLA's own count of the
compiled step is printed beside them. The matmul rate is measured in the same process (benchmarks/matmul.py), in the
config's matmul dtype. Without data use a `synthetic` config argument (configs/imagenet_L1.py:synthetic).
--steps=0 compiles the step from shapes alone, whatever its memory: compile seconds and XLA's count of its memory.
"""

import statistics
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from benchmarks import matmul
from benchmarks.report import report
from nested.build.data import build_data
from nested.modes import summary, train
from nested.modes.encode import open_latents, split_records
from nested.runtime import partition
from nested.training import loop as training_loop

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "a file of configs/", lock_config=True)
flags.DEFINE_string("workdir", None, "where the latents are, or go")
flags.DEFINE_integer("steps", 30, "timed steps; 0: compile only")
flags.DEFINE_string("out", "", "the figures as JSON")
flags.mark_flags_as_required(["config", "workdir"])


def measure(config, workdir: str, steps: int) -> dict:
    """The figures, a dict of plain numbers."""
    source, latents = open_latents(build_data(config), workdir)
    run = train.make_run(config, latents)
    training, _ = split_records(build_data(config), source)
    batches = train.training_batches(config, training, 0)
    raw = partition.to_global(next(batches), run.mesh)
    begin = time.perf_counter()
    update = training_loop.compile_step(run).lower(run.abstract, raw, run.key).compile()
    figures = of_program(run, update, time.perf_counter() - begin)
    if not steps:
        return figures
    begin = time.perf_counter()
    state = jax.block_until_ready(training_loop.fresh_state(run))
    init_seconds = time.perf_counter() - begin
    state, metrics = jax.block_until_ready(update(state, raw, run.key))

    times, waits = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        raw = partition.to_global(next(batches), run.mesh)
        waits.append(time.perf_counter() - begin)
        state, metrics = jax.block_until_ready(update(state, raw, run.key))
        times.append(time.perf_counter() - begin)
    batches.close()
    flops = 6 * figures["macs_per_image"] * config.train.batch_size
    step_seconds = statistics.median(times)
    rate = matmul.matmul_rate(config.train.dtype) * 1e9 * jax.device_count()
    return figures | {
        "init_seconds": round(init_seconds, 2),
        "step_seconds_median": round(step_seconds, 5),
        "step_seconds_min": round(min(times), 5),
        "images_per_second": round(config.train.batch_size / step_seconds, 1),
        "model_gflops_per_second": round(flops / step_seconds / 1e9, 1),
        "matmul_gflops_per_second": round(rate / 1e9, 1),
        "share_of_matmul_rate": round(flops / step_seconds / rate, 3),
        "data_wait_share": round(sum(waits) / sum(times), 4),
    }


def of_program(run, update, compile_seconds: float) -> dict:
    """What is known of the compiled step without running it."""
    levels, batch_size, memory = (
        summary.summarize_levels(run.step.levels),
        run.options.batch_size,
        update.memory_analysis(),
    )
    macs = sum(level.macs for level in levels)
    flops = update.cost_analysis()["flops"] * jax.device_count()
    return {
        "batch_size": batch_size,
        "parameters": sum(level.parameters for level in levels),
        "macs_per_image": macs,
        "compile_seconds": round(compile_seconds, 2),
        "xla_flops_over_model_flops": round(flops / (6 * macs * batch_size), 3),
        "state_mib": round(summary.state_bytes(run.abstract) / 2**20, 1),
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "donated_mib": round(memory.alias_size_in_bytes / 2**20, 1),
    }


def main(argv):
    del argv
    report(measure(FLAGS.config, FLAGS.workdir, FLAGS.steps), FLAGS.out)


if __name__ == "__main__":
    app.run(main)
