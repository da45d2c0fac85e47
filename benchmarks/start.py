"""How long a run waits for its first step, cold and with the compilation cache that a first start leaves behind.

    python -m benchmarks.start [--config=configs/quickstart.py] [--out=FILE]

The config is trained for two steps in a new workdir, then, its checkpoints removed, again from scratch in the same one
(JAX's cache keys hold the cache's path); the latents are made beforehand. The wait is main.py's own figure: building,
initialisation and compilation, up to the end of the first step.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks.report import report

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "configs/quickstart.py", "a file of configs/")
flags.DEFINE_string("out", "", "the figures as JSON")


def first_step(config: str, workdir: pathlib.Path, latents: pathlib.Path, mode: str = "train") -> float:
    """Seconds that main.py reports until its first step is done."""
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", f"--mode={mode}"]
    command += [f"--config.latents_dir={latents}", "--config.train.steps=2", "--config.sample.num_samples=0"]
    command += ["--config.optimizer.warmup_steps=0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"first step done after ([\d.]+) s", done.stderr)
    return float(found.group(1)) if found else 0.0


def main(argv):
    del argv
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        first_step(FLAGS.config, folder / "encode", folder / "latents", mode="encode")
        cold = first_step(FLAGS.config, folder / "run", folder / "latents")
        shutil.rmtree(folder / "run" / "checkpoints")
        warm = first_step(FLAGS.config, folder / "run", folder / "latents")
    figures = {"config": FLAGS.config, "cold_seconds": cold, "warm_seconds": warm}
    report(figures | {"warm_over_cold": round(warm / cold, 3)}, FLAGS.out)


if __name__ == "__main__":
    app.run(main)
