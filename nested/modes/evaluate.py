"""The mode `evaluate`: scores of a checkpoint or a weight file, and what the config asks for beside them.

    python main.py --config=... --workdir=... --mode=evaluate --config.evaluate.num_samples=10000

With the weights of a CLIP (config.evaluate.clip) the samples are held to their prompts. With config.evaluate.
memorization the samples are compared with the training images. With config.evaluate.sweep several values of sampling
options are scored instead (nested/modes/sweep.py).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nested.build import data as build_data
from nested.build.options import Config
from nested.evaluation.clip_score import Clip, load_clip
from nested.evaluation.features import pooled_features, reference_features
from nested.evaluation.memorization import report_memorization
from nested.evaluation.report import Scorer, score_generator, weights_identity, write_scores
from nested.modes import sample, sweep
from nested.sampling.generator import Generator
from nested.weights.files import find_weight_files

Features = Callable[[np.ndarray], np.ndarray]  # uint8 images [N, H, W, C] -> [N, D]
Tree = Any


def build_scorer(config: Config, source: Any, cache_dir: str, weights: str = "") -> Scorer:
    """The scorer of the images that the config names, with the features of its reference images computed.

    Args:
      config: the run's config.
      source: the run's records.
      cache_dir: the folder that keeps the features of reference images.
      weights: identifies a weight file that is scored (Score.weights).
    Raises: ValueError if fewer than two samples or reference images are asked for, and as check_evaluation does.
    """
    options = config.evaluate
    if min(options.num_samples, options.num_reference) < 2:
        raise ValueError(
            f"config.evaluate: num_samples {options.num_samples}, num_reference {options.num_reference}; a distance "
            "needs 2 or more of each"
        )
    clip, size = load_clip_scorer(config), config.encoder.batch_size
    encoder = build_data.score_encoder(config)
    scored, source = build_data.scored_against(config, source)
    # The prompts of the scores, and not those of the run's pictures.
    texts = build_data.some_captions(scored, options.num_samples) if config.text.encoder else ()
    images = build_data.pictures(scored, source)
    reference = reference_features(images, encoder, options.num_reference, size, cache_dir)
    return Scorer(encoder, reference, options.num_samples, size, config.sample.batch_size, texts, clip, weights)


def check_evaluation(config: Config) -> None:
    """Checks, before a run trains for days, that everything that config.evaluate asks for can be made.

    Raises ValueError or FileNotFoundError, in one line that names the option."""
    check_memorization(config)
    if wants_clip_score(config):
        find_weight_files(config.evaluate.clip.weights)
    if config.evaluate.split and config.evaluate.num_samples:
        build_data.scored_against(config, None)


def check_memorization(config: Config) -> None:
    """Raises ValueError if config.evaluate.memorization asks for a report that cannot be made."""
    number = config.evaluate.memorization
    if number and not config.evaluate.num_samples:
        raise ValueError(
            f"config.evaluate.memorization {number}: comes with the scores, and config.evaluate.num_samples is 0; set "
            "that, or memorization to 0"
        )
    if number and not config.data.holdout:
        raise ValueError(
            f"config.evaluate.memorization {number}: needs images that are not trained on to compare with; set "
            "config.data.holdout, or memorization to 0"
        )
    if number and len(build_data.finest_shape(config)) > 3:
        raise ValueError(f"config.evaluate.memorization {number}: it compares still images, not clips; set it to 0")


def load_clip_scorer(config: Config) -> Clip | None:
    """The CLIP of config.evaluate.clip, or None without weights. Raises ValueError as wants_clip_score does."""
    options = config.evaluate.clip
    return load_clip(options.name, options.weights) if wants_clip_score(config) else None


def wants_clip_score(config: Config) -> bool:
    """Whether the config asks for a CLIP score. Raises ValueError if the samples have no prompts or are clips."""
    if not config.evaluate.clip.weights:
        return False
    if not config.text.encoder or len(build_data.finest_shape(config)) != 3:
        raise ValueError(
            "config.evaluate.clip.weights is given, but the CLIP score is of images with prompts: this config has "
            f"{'clips' if config.text.encoder else 'no text (config.text.encoder)'}; set it to ''"
        )
    return True


def report_scores(
    generator: Generator, params: Tree, config: Config, source: Any, cache_dir: str, step: int, workdir: str,
    weights: str = "",
) -> list[str]:  # fmt: skip
    """Scores a generator, writes scores.json and what else config.evaluate asks for; returns the lines to print.

    source: the run's records, those held out included. The other arguments are build_scorer's and Scorer.score's."""
    scorer = build_scorer(config, source, cache_dir, weights)
    scores = score_generator(scorer, generator, params, step, config.evaluate.unguided)
    lines = [f"score:   {score}" for score in scores] + [f"scores:  {write_scores(workdir, scores)}"]
    if config.evaluate.memorization:

        def features(images: np.ndarray) -> np.ndarray:
            return pooled_features(scorer.encoder, [images], scorer.batch_size)

        lines += compare_with_training_images(generator, params, config, source, features, step, workdir)
    return lines


def compare_with_training_images(
    generator: Generator, params: Tree, config: Config, source: Any, features: Features, step: int, workdir: str
) -> list[str]:
    """Writes the report on memorisation that config.evaluate.memorization asks for; returns the lines to print.

    source: the run's records, those held out included. The other arguments are report_memorization's.
    Raises ValueError as check_memorization does."""
    check_memorization(config)
    number = config.evaluate.memorization
    if config.text.encoder:
        generator = dataclasses.replace(generator, prompts=build_data.some_captions(config, number))
    training = build_data.split(config, source)[0]
    held_out = [source[int(i)] for i in build_data.held_out(config, len(source))]
    return report_memorization(generator, params, number, training, held_out, features, step, workdir)


def run(config: Config, workdir: str, weights: str = "") -> None:
    """Scores the newest checkpoint of the run in `workdir`, or a weight file (as step 0); prints and writes the scores.

    With config.evaluate.sweep it makes the sweep and nothing else. Raises ValueError if there is nothing to score."""
    if not config.evaluate.num_samples:
        raise ValueError("evaluate.num_samples is 0, so nothing would be scored: give --config.evaluate.num_samples=N")
    check_evaluation(config)
    images_alone = weights and not config.evaluate.memorization
    if images_alone:  # a file that others trained: nothing is encoded
        config = build_data.scored_config(config)
    generator, params, step = sample.open_generator(config, workdir, weights)
    source = build_data.images(config) if images_alone else build_data.latents(config, workdir, generator.text)[0]
    cache_dir, identity = build_data.latents_dir(config, workdir), weights_identity(weights)
    if config.evaluate.sweep:
        todo = sweep.build_combinations(config, generator)  # all are checked before the first is drawn
        scorer = build_scorer(config, source, cache_dir, identity)
        lines = [
            f"sweep:   {path}"
            for path in sweep.score_combinations(config, generator, params, todo, scorer.score, step, workdir, identity)
        ]
    else:
        lines = report_scores(generator, params, config, source, cache_dir, step, workdir, identity)
    if jax.process_index() == 0:
        print("\n".join(lines))
