"""The mode `export`: the networks of a run as weight files (nested/weights/exchange.py).

python main.py --config=... --workdir=... --mode=export --out=weights.safetensors
"""

import os

import jax
from absl import logging

from nested.build.levels import build_levels
from nested.build.options import Config
from nested.diffusion import hierarchy
from nested.runtime import partition
from nested.runtime.checkpoint import read_config, restore_part
from nested.weights.exchange import SUFFIX, write_levels


def run(config: Config, workdir: str, out: str) -> None:
    """Writes the EMA weights of the newest checkpoint in `workdir` to OUT, and each level to OUT.LEVEL (process 0).

    Raises ValueError if `out` is not the name of a .safetensors file, FileNotFoundError if there is no checkpoint."""
    path = os.path.expanduser(out)
    if os.path.splitext(path)[1] != SUFFIX:
        raise ValueError(f"--out={out}: give the name of a {SUFFIX} file to export to")
    levels, mesh = build_levels(config), partition.make_mesh(-1, 1)
    shapes = jax.eval_shape(lambda key: hierarchy.init(levels, key), jax.random.key(0))
    whole = jax.tree.map(lambda _: partition.replicated(mesh), shapes)
    state, step = restore_part(workdir, {"ema": partition.abstract(shapes, whole)})
    if jax.process_index():
        return
    paths = write_levels(path, state["ema"], read_config(workdir), step)
    for name, of_level in zip(state["ema"], paths[1:], strict=True):
        logging.info("export: level %s by its authors' names in %s", name, of_level)
    logging.info("export: step %s of %s in %s", step, workdir, paths[0])
