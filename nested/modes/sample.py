"""The mode `sample`: samples of a checkpoint or a weight file as an archive, and the pictures that people look at."""

import os
from typing import Any

import jax
import numpy as np
from absl import logging

from nested import figures as pictures
from nested.build import data as build_data
from nested.build.levels import build_levels, trained_level_names
from nested.build.options import to_plain
from nested.build.text import load_text_encoder
from nested.diffusion import hierarchy
from nested.runtime import partition
from nested.runtime.checkpoint import latest_step, restore_part
from nested.runtime.files import atomic_write
from nested.runtime.writers import read_metrics
from nested.sampling.generator import Generator, make_generator
from nested.weights.exchange import load_parameters

Tree = Any


def restore_generator(config, workdir: str) -> tuple[Generator, Tree, int]:
    """(generator, EMA parameters, step) of the newest checkpoint in `workdir`."""
    if latest_step(workdir) is None:
        folder = os.path.join(workdir, "checkpoints")
        raise FileNotFoundError(
            f"{folder}: no checkpoint found; give the --workdir of a run that has saved, or --weights=FILE"
        )
    made, abstract = prepare_generator(config, workdir)
    state, step = restore_part(workdir, {"ema": abstract})  # an older step where the newest is damaged
    return made, state["ema"], step


def open_generator(config, workdir: str, weights: str) -> tuple[Generator, Tree, int]:
    """(generator, parameters, 0) of the weight file or folder `weights` (nested/weights/exchange.py); '': as
    `restore_generator`."""
    if not weights:
        return restore_generator(config, workdir)
    made, abstract = prepare_generator(config, workdir)
    return made, load_parameters(weights, to_plain(config), abstract), 0


def prepare_generator(config, workdir: str) -> tuple[Generator, Tree]:
    """The config's generator, and the parameters that it takes as shapes and shardings."""
    latents = build_data.decoder(config, workdir)
    text = load_text_encoder(config)
    levels = build_levels(config, text and text.encode_one())
    mesh = partition.make_mesh(config.train.mesh_data, config.train.mesh_fsdp)
    shapes = jax.eval_shape(lambda key: hierarchy.init(levels, key), jax.random.key(0))
    abstract = partition.abstract(shapes, partition.shardings(shapes, mesh, config.train.fsdp_min_bytes))
    return make_generator(config, levels, latents, mesh, text), abstract


def sample_grid(config, images: np.ndarray) -> np.ndarray:
    """Images side by side; of clips [N, T, H, W, C] a row of frames each."""
    if images.ndim == 5:
        return pictures.clip_grid(images[: config.sample.columns], scale=config.sample.scale)
    return pictures.image_grid(images, columns=config.sample.columns, scale=config.sample.scale)


def save_sample_pictures(gen: Generator, images: np.ndarray, base: str) -> list[str]:
    """Writes BASE.png, of clips BASE.webp as well (all of them, moving), and with prompts BASE.txt, a line per sample;
    their paths."""
    config, paths = gen.config, [base + ".png"]
    pictures.save_png(sample_grid(config, images), paths[0])
    if images.ndim == 5:
        paths.append(base + ".webp")
        sizes = dict(columns=config.sample.columns, scale=config.sample.scale)
        pictures.save_animation(images, paths[-1], fps=config.sample.fps, **sizes)
    if gen.prompts:
        paths.append(base + ".txt")
        lines = [f"{i}\t{gen.prompts[i % len(gen.prompts)]}\n" for i in range(len(images))]
        atomic_write(paths[-1], "".join(lines))
    return paths


def save_sample_grid(gen: Generator, ema: Tree, path: str) -> np.ndarray:
    """Writes the pictures of config.sample.num_samples samples (process 0), PATH a PNG, and returns that grid."""
    images = gen.images(ema, gen.config.sample.num_samples, "samples")
    if jax.process_index() == 0:
        save_sample_pictures(gen, images, os.path.splitext(path)[0])
    return sample_grid(gen.config, images)


def save_run_pictures(gen: Generator, ema: Tree, workdir: str) -> list[str]:
    """Writes samples.png, hierarchy.png (where there is more than one level), steps.png (where the config asks for it)
    and curves.png; their paths."""
    paths = [os.path.join(workdir, "samples.png")]
    save_sample_grid(gen, ema, paths[0])
    if gen.config.sample.steps_shown:
        paths.append(os.path.join(workdir, "steps.png"))
        steps = gen.steps(ema, 0, gen.config.sample.steps_shown)
        if jax.process_index() == 0:
            pictures.save_png(pictures.steps_picture(steps), paths[-1])
    if len(gen.levels) > 1:
        rows = gen.cascade(ema, firsts=(2, 5))
        paths.append(os.path.join(workdir, "hierarchy.png"))
        if jax.process_index() == 0:
            pictures.save_png(pictures.hierarchy_picture(rows, scale=gen.config.sample.scale), paths[-1])
    metrics = read_metrics(workdir) if jax.process_index() == 0 else []
    if metrics:
        paths.append(os.path.join(workdir, "curves.png"))
        pictures.loss_curves(metrics, paths[-1], trained_level_names(gen.config))
    return paths


def run(config, workdir: str, num_samples: int, out: str, weights: str = "") -> None:
    """The mode `sample`: OUT.png (a grid of the first ten rows), OUT.npz (arr_0, as the ADM evaluator reads), and for
    clips OUT.webp; with config.sample.steps_shown OUT_steps.png."""
    if num_samples < 1:
        raise ValueError(f"{num_samples} samples asked for: give --num_samples=N, or set config.sample.num_samples")
    gen, ema, step = open_generator(config, workdir, weights)
    images = gen.images(ema, num_samples, "samples")
    base = os.path.splitext(out)[0] if out else os.path.join(workdir, f"samples_{num_samples}")
    if jax.process_index() == 0:
        save_sample_pictures(gen, images[: 10 * config.sample.columns], base)
        pictures.save_samples(base + ".npz", images)
    if config.sample.steps_shown:
        steps = gen.steps(ema, 0, config.sample.steps_shown)
        if jax.process_index() == 0:
            pictures.save_png(pictures.steps_picture(steps), base + "_steps.png")
    origin = weights or f"step {step}"
    logging.info("%d samples of %s: %s.png and %s.npz", num_samples, origin, base, base)
