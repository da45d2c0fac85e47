"""Runs side by side: the same samples of hierarchies of several depths (Nested Diffusion, Figures 4, 5, 8 and 9).

    python main.py --mode=compare --config=configs/fashion_mnist.py:L3 --workdir=OUT --runs=runs/L1,runs/L2,runs/L3

Sample i has the same label or prompt in every run, and keys from one seed. Each run is sampled with its own config from
the EMA of its newest checkpoint; the seed and config.sample (batch size, prompts) are those of --config. Images are
enlarged to at least 64 pixels.
"""

import json
import os
from collections.abc import Sequence

import jax
import numpy as np

from nested import figures
from nested.build.options import Config, from_plain
from nested.build.saved import upgrade_saved_config
from nested.modes import sample
from nested.runtime.checkpoint import read_config
from nested.runtime.files import atomic_write


def load_run_config(path: str, config: Config) -> Config:
    """The config of the run in `path`, with the seed and config.sample of `config`.

    A config written by an earlier version is brought up to date. Raises FileNotFoundError if there is no run."""
    saved = from_plain(upgrade_saved_config(read_config(path)))
    saved.seed, saved.sample = config.seed, config.sample
    return saved


def format_caption(path: str, levels: int, step: int, scores: Sequence[dict]) -> str:
    """The caption beside a run's row: its name, depth, step and scores."""
    lines = [os.path.basename(path), f"L = {levels}, step {step:,}"]
    lines += [f"FD-EffLite0 {score['fd']:.2f}{'' if score['guided'] else ' unguided'}" for score in scores]
    return "\n".join(lines)


def read_scores_of_step(path: str, step: int) -> list[dict]:
    """The scores of that step in the run's scores.json; [] if it has not been scored."""
    path = os.path.join(path, "scores.json")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [score for score in json.load(file) if score["step"] == step]


def run(config: Config, workdir: str, runs: Sequence[str], number: int) -> None:
    """Writes compare.png, a row per run and a column per sample, and compare.json to `workdir`."""
    runs = [os.path.abspath(os.path.expanduser(run)) for run in runs]
    if len(set(runs)) < max(len(runs), 2):
        raise ValueError(f"--runs names {len(runs)} run(s): give the folders of two or more different ones, --runs=A,B")
    configs = [load_run_config(run, config) for run in runs]
    classes = {run: own.data.num_classes for run, own in zip(runs, configs, strict=True)}
    if len(set(classes.values())) > 1:
        raise ValueError(
            f"--runs: data.num_classes differ, so samples would have other labels: {format_by_name(classes)}"
        )
    images, rows = {}, []
    for run, own in zip(runs, configs, strict=True):
        gen, ema, step = sample.restore_generator(own, run)
        drawn = gen.images(ema, number, f"samples of {os.path.basename(run)}")
        images[run] = drawn.reshape(number, -1, *drawn.shape[-3:])[:, 0]  # of clips the first frame
        rows.append(dict(run=run, levels=len(gen.levels), step=step, scores=read_scores_of_step(run, step)))
    if len({drawn.shape for drawn in images.values()}) > 1:
        raise ValueError(
            f"--runs: images differ in shape: {format_by_name({run: d.shape[1:] for run, d in images.items()})}"
        )
    if jax.process_index() == 0:
        captions = [format_caption(row["run"], row["levels"], row["step"], row["scores"]) for row in rows]
        picture = figures.image_grid(np.concatenate(list(images.values())), number, row_captions=captions)
        figures.save_png(picture, os.path.join(workdir, "compare.png"))
        content = dict(seed=config.seed, num_samples=number, runs=rows)
        atomic_write(os.path.join(workdir, "compare.json"), json.dumps(content, indent=2) + "\n")
        print("\n".join(f"picture: {os.path.join(workdir, name)}" for name in ("compare.png", "compare.json")))


def format_by_name(values: dict) -> str:
    return ", ".join(f"{os.path.basename(run)} {value}" for run, value in values.items())
