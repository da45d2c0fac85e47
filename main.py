"""Trains, samples and scores hierarchical diffusion models.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart [--mode=train]
    python main.py --config=... --workdir=... --mode=sample --num_samples=64 --out=grid.png
    python main.py --config=... --workdir=... --mode=export --out=weights.safetensors
    python main.py --config=configs/uvit_release.py:imagenet256_huge --workdir=... --mode=sample --weights=nnet_ema.pth
    python main.py --config=configs/imagenet_L5.py --mode=summary --out=summary.json

On a pod run the same command on every host (README, "On a pod"). This file is kept short: look in nested/.
"""

import os
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("train", "encode", "sample", "evaluate", "search", "neighbors", "compare", "export", "summary")
FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "a file of configs/, e.g. configs/imagenet_L3.py", lock_config=True)
flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, pictures, latents; shared by all hosts")
flags.DEFINE_enum("mode", "train", MODES, "what to do")
flags.DEFINE_integer("num_samples", 0, "sample, compare: how many; 0: config.sample.num_samples, config.sample.columns")
flags.DEFINE_list("runs", [], "compare: folders of runs, DIR,DIR,...")
flags.DEFINE_string("out", "", "sample: OUT.png, OUT.npz; export: the .safetensors file; summary, --plan: JSON")
flags.DEFINE_string("weights", "", "sample, evaluate: a weight file, released or exported, in place of a checkpoint")
flags.DEFINE_bool("plan", False, "encode: only say what it would cost, in bytes and hours, at rates of a first batch")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; only where JAX cannot find out itself")
flags.DEFINE_integer("num_processes", None, "number of processes; with --coordinator_address")
flags.DEFINE_integer("process_id", None, "this process's number; with --coordinator_address")
flags.mark_flag_as_required("config")
ROOT = os.path.dirname(os.path.abspath(__file__))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, where what an option or a config file got wrong is one line."""
    try:
        if unknown := FLAGS(argv)[1:]:
            raise flags.Error(f"unknown argument {unknown[0]!r}; options start with --")
        FLAGS.config.seed  # noqa: B018, a config file that is not there shows when it is read
        return argv
    except (flags.Error, AttributeError, LookupError, OSError) as error:
        while isinstance(error.args[0], Exception):  # ml_collections wraps what it says about unknown keys
            error = error.args[0]
        sys.exit(f"error: option or config: {error.args[0].strip().splitlines()[-1].strip()}")


def start_jax(workdir: str) -> None:
    """Distributed start-up where asked for, and a compilation cache that outlives the process."""
    if FLAGS.coordinator_address or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"{workdir}/compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run() -> None:
    from nested.build.levels import build_levels
    from nested.modes import compare, encode, evaluate, export, neighbors, sample, search, summary, train
    from nested.runtime.files import check_writable

    config, mode = FLAGS.config, FLAGS.mode
    if FLAGS.runs and mode != "compare":
        raise ValueError(f"--runs is of --mode=compare, not of {mode}: leave it out")
    if FLAGS.weights and mode not in ("sample", "evaluate"):
        raise ValueError(f"--weights is of --mode=sample and evaluate, not of {mode} (train has config.init_from.path)")
    if FLAGS.plan and mode != "encode":
        raise ValueError(f"--plan is of --mode=encode, not of {mode}: leave it out")
    if mode == "summary":
        print(summary.write_summary(build_levels(config), train.abstract_state(config), FLAGS.out))
        return
    if not FLAGS.workdir:
        raise ValueError(f"--mode={mode} needs --workdir, the folder of the run")
    start_jax(FLAGS.workdir)  # first: a process that fails before it has met the others leaves them waiting
    workdir = str(check_writable(FLAGS.workdir))
    if mode == "sample":
        sample.run(config, workdir, FLAGS.num_samples or config.sample.num_samples, FLAGS.out, FLAGS.weights)
    elif mode == "evaluate":
        evaluate.run(config, workdir, FLAGS.weights)
    elif FLAGS.plan:
        encode.plan(config, workdir, FLAGS.out)
    elif mode == "export":
        export.run(config, workdir, FLAGS.out)
    elif mode == "compare":
        compare.run(config, workdir, FLAGS.runs, FLAGS.num_samples or config.sample.columns)
    else:
        dict(
            train=train.run, encode=encode.run, search=search.run, neighbors=neighbors.run,
        )[mode](config, workdir)  # fmt: skip


def is_ours(path: str) -> bool:
    """Whether a source file is of this repository, not of a library."""
    return os.path.abspath(path).startswith(ROOT + os.sep) and "site-packages" not in path


def main(argv) -> None:
    logging.set_verbosity(logging.INFO)
    # Libraries tell much at INFO (orbax every file, jax every missing backend): only their warnings are shown.
    logging.get_absl_handler().addFilter(lambda log: log.levelno > logging.logging.INFO or is_ours(log.pathname))
    try:
        run()
    except Exception as error:
        # Our own errors are one line a person can act on; anything else keeps its traceback.
        if not is_ours(traceback.extract_tb(error.__traceback__)[-1].filename):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            os._exit(1)  # a process that waits for its peers at exit would keep them all hanging
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
