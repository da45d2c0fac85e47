"""The mode `sample`: samples of a checkpoint or a weight file as an archive, and the pictures that people look at.

    python main.py --config=... --workdir=... --mode=sample --num_samples=64 --out=grid.png

Sampling reads what earlier modes have written and never encodes a data set.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from nested import figures
from nested.build.data import build_data
from nested.build.levels import build_levels, trained_level_names
from nested.build.options import Config, to_plain
from nested.build.saved import upgrade_saved_config
from nested.diffusion import hierarchy
from nested.diffusion.level import Level
from nested.encoders.text_encoder import TextEncoder
from nested.runtime import partition
from nested.runtime.checkpoint import latest_step, restore_part
from nested.runtime.files import atomic_write
from nested.runtime.writers import read_metrics
from nested.sampling.generator import Decoder, Generator, make_generator
from nested.weights.exchange import load_parameters

Tree = Any


def build_generator(
    config: Config,
    levels: Sequence[Level],
    latents: Decoder,
    mesh: jax.sharding.Mesh,
    text: TextEncoder | None = None,
) -> Generator:
    """The generator of these levels, with the seed, the batch size and the prompts of the config.

    Prompts are config.sample.prompts or, if there are none, the captions of the data."""
    prompts: Sequence[str] = ()
    if text is not None:
        prompts = tuple(config.sample.prompts) or build_data(config).some_captions(config.sample.num_samples)
    return make_generator(
        levels,
        latents,
        mesh,
        seed=config.seed,
        batch_size=config.sample.batch_size,
        num_classes=config.data.num_classes,
        text=text,
        prompts=prompts,
        negative_prompt=config.sample.negative_prompt,
    )


def restore_generator(config: Config, workdir: str) -> tuple[Generator, Tree, int]:
    """(generator, EMA parameters, step) of the newest checkpoint in `workdir`; an older one if that is damaged.

    Raises FileNotFoundError if there is no checkpoint."""
    if latest_step(workdir) is None:
        folder = os.path.join(workdir, "checkpoints")
        raise FileNotFoundError(
            f"{folder}: no checkpoint found; give the --workdir of a run that has saved, or --weights=FILE"
        )
    generator, abstract = prepare_generator(config, workdir)
    state, step = restore_part(workdir, {"ema": abstract})
    return generator, state["ema"], step


def open_generator(config: Config, workdir: str, weights: str) -> tuple[Generator, Tree, int]:
    """(generator, parameters, step) of the weight file or folder `weights`, as step 0; '' for restore_generator()."""
    if not weights:
        return restore_generator(config, workdir)
    generator, abstract = prepare_generator(config, workdir)
    return generator, load_parameters(weights, to_plain(config), abstract, upgrade=upgrade_saved_config), 0


def prepare_generator(config: Config, workdir: str) -> tuple[Generator, Tree]:
    """(the config's generator, the parameters that it takes as shapes and shardings)."""
    data = build_data(config)
    latents, text = data.open_decoder(workdir), data.open_text_encoder()
    levels = build_levels(config, text and text.encode_one())
    mesh = partition.make_mesh(config.train.mesh_data, config.train.mesh_fsdp)
    shapes = jax.eval_shape(lambda key: hierarchy.init(levels, key), jax.random.key(0))
    abstract = partition.abstract(shapes, partition.shardings(shapes, mesh, config.train.fsdp_min_bytes))
    return build_generator(config, levels, latents, mesh, text), abstract


def sample_grid(config: Config, images: np.ndarray) -> np.ndarray:
    """Images side by side, uint8 [H, W, C]; of clips [N, T, H, W, C] a row of frames each."""
    if images.ndim == 5:
        return figures.clip_grid(images[: config.sample.columns], scale=config.sample.scale)
    return figures.image_grid(images, columns=config.sample.columns, scale=config.sample.scale)


def save_sample_pictures(config: Config, images: np.ndarray, prompts: Sequence[str], base: str) -> list[str]:
    """Writes BASE.png, for clips also BASE.webp, which moves, and with prompts BASE.txt, a line per sample.

    Returns the paths."""
    paths = [base + ".png"]
    figures.save_png(sample_grid(config, images), paths[0])
    if images.ndim == 5:
        paths.append(base + ".webp")
        figures.save_animation(
            images, paths[-1], columns=config.sample.columns, scale=config.sample.scale, fps=config.sample.fps
        )
    if prompts:
        paths.append(base + ".txt")
        lines = [f"{i}\t{prompts[i % len(prompts)]}\n" for i in range(len(images))]
        atomic_write(paths[-1], "".join(lines))
    return paths


def save_sample_grid(config: Config, generator: Generator, params: Tree, path: str) -> np.ndarray:
    """Draws config.sample.num_samples samples; process 0 writes their pictures, `path` a PNG. Returns the grid."""
    images = generator.images(params, config.sample.num_samples, "samples")
    if jax.process_index() == 0:
        save_sample_pictures(config, images, generator.prompts, os.path.splitext(path)[0])
    return sample_grid(config, images)


def save_steps(generator: Generator, params: Tree, number: int, path: str) -> None:
    """Draws sample 0 and writes what `number` of its network evaluations estimate."""
    steps = generator.steps(params, 0, number)
    if jax.process_index() == 0:
        figures.save_png(figures.steps_picture(steps), path)


def save_run_pictures(config: Config, generator: Generator, params: Tree, workdir: str) -> list[str]:
    """Writes the pictures of a run: samples.png and curves.png, hierarchy.png if it has several levels, steps.png if
    the config asks for it. Returns the paths."""
    paths = [os.path.join(workdir, "samples.png")]
    save_sample_grid(config, generator, params, paths[0])
    if config.sample.steps_shown:
        paths.append(os.path.join(workdir, "steps.png"))
        save_steps(generator, params, config.sample.steps_shown, paths[-1])
    if len(generator.levels) > 1:
        rows = generator.cascade(params, firsts=(2, 5))
        paths.append(os.path.join(workdir, "hierarchy.png"))
        if jax.process_index() == 0:
            figures.save_png(figures.hierarchy_picture(rows, scale=config.sample.scale), paths[-1])
    metrics = read_metrics(workdir) if jax.process_index() == 0 else []
    if metrics:
        paths.append(os.path.join(workdir, "curves.png"))
        figures.loss_curves(metrics, paths[-1], trained_level_names(config))
    return paths


def run(config: Config, workdir: str, num_samples: int, out: str, weights: str = "") -> None:
    """Writes OUT.png, a grid of the first ten rows, OUT.npz (arr_0, as the ADM evaluator reads it), for clips OUT.webp,
    and OUT_steps.png if config.sample.steps_shown is set.

    Args:
      config: the run's config.
      workdir: the folder of the run.
      num_samples: how many samples to draw.
      out: OUT with a suffix that is cut off; '' for WORKDIR/samples_N.
      weights: a weight file or folder to sample from; '' for the newest checkpoint.

    Raises:
      ValueError: num_samples is less than 1.
    """
    if num_samples < 1:
        raise ValueError(f"{num_samples} samples asked for: give --num_samples=N, or set config.sample.num_samples")
    generator, params, step = open_generator(config, workdir, weights)
    images = generator.images(params, num_samples, "samples")
    base = os.path.splitext(out)[0] if out else os.path.join(workdir, f"samples_{num_samples}")
    if jax.process_index() == 0:
        save_sample_pictures(config, images[: 10 * config.sample.columns], generator.prompts, base)
        figures.save_samples(base + ".npz", images)
    if config.sample.steps_shown:
        save_steps(generator, params, config.sample.steps_shown, base + "_steps.png")
    logging.info("%d samples of %s: %s.png and %s.npz", num_samples, weights or f"step {step}", base, base)
