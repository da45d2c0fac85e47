"""Trains, samples and scores hierarchical diffusion models.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart [--mode=train]
    python main.py --config=... --workdir=... --mode=sample --num_samples=64 --out=grid.png
    python main.py --config=... --workdir=... --mode=export --out=weights.safetensors
    python main.py --config=configs/uvit_release.py:imagenet256_huge --workdir=... --mode=sample --weights=nnet_ema.pth
    python main.py --config=configs/imagenet_L5.py --mode=summary --out=summary.json

On a pod run the same command on every host (README, "On a pod"). This file is kept short: look in nested/.
"""

import logging as std_logging
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
flags.DEFINE_bool("plan", False, "encode: only report the cost, in bytes and hours, at the rates of a first batch")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; only where JAX cannot find it by itself")
flags.DEFINE_integer("num_processes", None, "number of processes; with --coordinator_address")
flags.DEFINE_integer("process_id", None, "this process's number; with --coordinator_address")
flags.mark_flag_as_required("config")
ROOT = os.path.dirname(os.path.abspath(__file__))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line as absl does, and reports what is wrong with it in one line."""
    try:
        if unknown := FLAGS(argv)[1:]:
            raise flags.Error(f"unknown argument {unknown[0]!r}; options start with --")
        FLAGS.config.seed  # noqa: B018  a config file that does not exist is noticed when it is read
        return argv
    except (flags.Error, AttributeError, LookupError, OSError) as error:
        while isinstance(error.args[0], Exception):  # ml_collections wraps its message about unknown keys
            error = error.args[0]
        sys.exit(f"error: option or config: {error.args[0].strip().splitlines()[-1].strip()}")


def check_flags(mode: str) -> None:
    """Raises ValueError for a flag that the mode does not read, or that it needs and is missing."""
    readers = {"runs": ("compare",), "weights": ("sample", "evaluate"), "plan": ("encode",)}
    for name, modes in readers.items():
        if FLAGS[name].value and mode not in modes:
            instead = "set config.init_from.path" if (name, mode) == ("weights", "train") else "remove it"
            raise ValueError(f"--{name} only applies to --mode={' and --mode='.join(modes)}, not to {mode}; {instead}")
    if mode != "summary" and not FLAGS.workdir:
        raise ValueError(f"--mode={mode} needs --workdir, the folder of the run")


def run() -> None:
    from nested.modes import compare, encode, evaluate, export, neighbors, sample, search, summary, train
    from nested.runtime.files import check_writable
    from nested.runtime.launch import start_jax

    config, mode, out, number = FLAGS.config, FLAGS.mode, FLAGS.out, FLAGS.num_samples
    check_flags(mode)
    if mode == "summary":
        return summary.run(config, out)
    # First: a process that fails before it has met the others leaves them waiting.
    start_jax(FLAGS.workdir, FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    workdir = str(check_writable(FLAGS.workdir))
    if FLAGS.plan:
        return encode.plan_encoding(config, workdir, out)
    drivers = dict(
        train=lambda: train.run(config, workdir),
        encode=lambda: encode.run(config, workdir),
        sample=lambda: sample.run(config, workdir, number or config.sample.num_samples, out, FLAGS.weights),
        evaluate=lambda: evaluate.run(config, workdir, FLAGS.weights),
        search=lambda: search.run(config, workdir),
        neighbors=lambda: neighbors.run(config, workdir),
        compare=lambda: compare.run(config, workdir, FLAGS.runs, number or config.sample.columns),
        export=lambda: export.run(config, workdir, out),
    )
    return drivers[mode]()


def is_ours(path: str) -> bool:
    """Whether a source file belongs to this repository and not to a library."""
    return os.path.abspath(path).startswith(ROOT + os.sep) and "site-packages" not in path


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.INFO)
    # Libraries log much at INFO (orbax every file, jax every missing backend): only their warnings are shown.
    logging.get_absl_handler().addFilter(lambda log: log.levelno > std_logging.INFO or is_ours(log.pathname))
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
