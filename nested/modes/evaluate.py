"""The mode `evaluate`: scores of a checkpoint or a weight file, and what the config asks for beside them.

    python main.py --config=... --workdir=... --mode=evaluate --config.evaluate.num_samples=10000

With the weights of a CLIP (config.evaluate.clip) the samples are held to their prompts. With
config.evaluate.memorization they are compared with the training images. With config.evaluate.likelihood the bits per
dimension of held-out images are computed, for a hierarchy of one level of pixels (nested/evaluation/likelihood.py).
With config.evaluate.sweep several values of sampling options are scored instead (nested/modes/sweep.py).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np

from input_pipeline import loader
from input_pipeline.latent_records import unflipped
from nested.build.data import build_data
from nested.build.levels import as_shape, build_levels
from nested.build.options import Config
from nested.build.process import is_joint
from nested.build.sources import build_images
from nested.encoders.efficientnet import EfficientNetLite0, load_efficientnet
from nested.encoders.text_encoder import TextEncoder
from nested.evaluation.clip_score import Clip, load_clip
from nested.evaluation.features import pooled_features, reference_features
from nested.evaluation.likelihood import Likelihood, measure_likelihood, noise_range, write_likelihood
from nested.evaluation.memorization import report_memorization
from nested.evaluation.report import Scorer, score_generator, weights_identity, write_scores
from nested.latents.store import Latents
from nested.modes import sample, sweep
from nested.modes.encode import held_out_records, image_source, open_latents, split_records
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
    encoder = load_score_encoder(config)
    scored, source = scored_against(config, source)
    # The prompts of the scores, and not those of the run's pictures.
    texts = build_data(scored).some_captions(options.num_samples) if config.text.encoder else ()
    images = image_source(build_data(scored), source)
    reference = reference_features(images, encoder, options.num_reference, size, cache_dir)
    return Scorer(encoder, reference, options.num_samples, size, config.sample.batch_size, texts, clip, weights)


def load_score_encoder(config: Config) -> EfficientNetLite0:
    """The extractor of FD-EffLite0: the package's own weights, at config.evaluate.input_size."""
    return load_efficientnet("", input_size=config.evaluate.input_size, map="head", features=())


def with_scored_split(config: Config) -> Config:
    """The config with config.evaluate.split, if it has one, for data.split."""
    other = config.copy_and_resolve_references()
    other.data.split = config.evaluate.split or config.data.split
    return other


def scored_against(config: Config, source: Any) -> tuple[Config, Any]:
    """(config, source) of the images that samples are scored against: the run's, or those of config.evaluate.split."""
    if not config.evaluate.split:
        return config, source
    other = with_scored_split(config)
    try:
        return other, build_images(other).open()
    except (ValueError, OSError) as error:
        raise ValueError(f"config.evaluate.split {config.evaluate.split!r}: {error}") from error


def check_evaluation(config: Config) -> None:
    """Checks, before a run trains for days, that everything that config.evaluate asks for can be made.

    Raises ValueError or FileNotFoundError, in one line that names the option."""
    check_memorization(config)
    check_likelihood(config)
    if wants_clip_score(config):
        find_weight_files(config.evaluate.clip.weights)
    if config.evaluate.split and config.evaluate.num_samples:
        scored_against(config, None)


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
    if number and build_data(config).has_clips:
        raise ValueError(f"config.evaluate.memorization {number}: it compares still images, not clips; set it to 0")


def check_likelihood(config: Config) -> None:
    """Raises ValueError if config.evaluate.likelihood asks for likelihoods that cannot be computed."""
    number, level = config.evaluate.likelihood, config.levels[-1]
    if not number:
        return
    key = f"config.evaluate.likelihood {number}"
    if len(config.levels) > 1:
        raise ValueError(
            f"{key}: bits per dimension are defined for a single level; this config has {len(config.levels)}, and the "
            "finest one's density is only conditional on the others; set it to 0"
        )
    if not build_data(config).levels[-1].source.is_image or is_joint(as_shape(level.shape)):
        variable = "several resolutions" if is_joint(as_shape(level.shape)) else f"the source {level.source!r}"
        raise ValueError(f"{key}: needs a level of pixels, {level.name} has {variable}; set it to 0")
    if number > config.data.holdout:
        raise ValueError(
            f"{key}: needs as many images that are not trained on; config.data.holdout is {config.data.holdout}: "
            "raise that, or lower this"
        )


def load_clip_scorer(config: Config) -> Clip | None:
    """The CLIP of config.evaluate.clip, or None without weights. Raises ValueError as wants_clip_score does."""
    options = config.evaluate.clip
    return load_clip(options.name, options.weights) if wants_clip_score(config) else None


def wants_clip_score(config: Config) -> bool:
    """Whether the config asks for a CLIP score. Raises ValueError if the samples have no prompts or are clips."""
    if not config.evaluate.clip.weights:
        return False
    if not config.text.encoder or build_data(config).has_clips:
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
    lines = []
    if config.evaluate.likelihood:
        likelihood = compute_likelihood(generator, params, config, source, step, weights)
        lines += [f"likelihood: {likelihood}", f"likelihood: {write_likelihood(workdir, likelihood)}"]
    if not config.evaluate.num_samples:
        return lines
    scorer = build_scorer(config, source, cache_dir, weights)
    scores = score_generator(scorer, generator, params, step, config.evaluate.unguided)
    lines += [f"score:   {score}" for score in scores] + [f"scores:  {write_scores(workdir, scores)}"]
    if config.evaluate.memorization:

        def features(images: np.ndarray) -> np.ndarray:
            return pooled_features(scorer.encoder, [images], scorer.batch_size)

        lines += compare_with_training_images(generator, params, config, source, features, step, workdir)
    return lines


def compute_likelihood(
    generator: Generator, params: Tree, config: Config, source: Any, step: int, weights: str = ""
) -> Likelihood:
    """Bits per dimension of config.evaluate.likelihood held-out images, computed in float32.

    source: the run's records, those held out included. weights: identifies a weight file (Score.weights).
    Raises ValueError as check_likelihood does."""
    check_likelihood(config)
    options, size, text = config.evaluate, config.sample.batch_size, text_encoder_of(generator)
    number = options.likelihood
    float32 = config.copy_and_resolve_references()
    float32.train.dtype = "float32"
    (level,) = build_levels(float32, text and text.encode_one())
    sigma_min, sigma_max = noise_range(level.process, options.likelihood_sigma_min, options.likelihood_sigma_max)
    places = held_out_records(config.data.holdout, len(source))
    places = places[np.linspace(0, len(places), number, endpoint=False).astype(int)]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, number, size):
            chosen = np.resize(places[start : start + size], size)  # the last batch repeats its images
            batch = loader.collate([unflipped(source[int(i)]) for i in chosen])
            yield text.with_features(batch) if text else batch

    values = measure_likelihood(
        level,
        params[level.name],
        latents_of(generator).variables,
        batches(),
        number,
        generator.mesh,
        seed=config.seed,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        steps=options.likelihood_steps,
    )
    return Likelihood(
        bits_per_dim=float(values.mean()),
        standard_error=float(values.std() / np.sqrt(number)),
        num_images=number,
        dims=math.prod(level.shape),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        steps=options.likelihood_steps,
        step=step,
        weights=weights,
    )


def text_encoder_of(generator: Generator) -> TextEncoder | None:
    """The encoder of a generator's prompts; a generator that a config builds has a whole TextEncoder, or None."""
    return cast(TextEncoder | None, generator.text)


def latents_of(generator: Generator) -> Latents:
    """The Latents of a generator that a config builds, which give variables besides decoding them."""
    return cast(Latents, generator.latents)


def compare_with_training_images(
    generator: Generator, params: Tree, config: Config, source: Any, features: Features, step: int, workdir: str
) -> list[str]:
    """Writes the report on memorisation that config.evaluate.memorization asks for; returns the lines to print.

    source: the run's records, those held out included. The other arguments are report_memorization's.
    Raises ValueError as check_memorization does."""
    check_memorization(config)
    number = config.evaluate.memorization
    if config.text.encoder:
        generator = dataclasses.replace(generator, prompts=build_data(config).some_captions(number))
    training = split_records(build_data(config), source)[0]
    held_out = [source[int(i)] for i in held_out_records(config.data.holdout, len(source))]
    space = latents_of(generator).finest
    return report_memorization(generator, params, number, space, training, held_out, features, step, workdir)


def run(config: Config, workdir: str, weights: str = "") -> None:
    """Scores the newest checkpoint of the run in `workdir`, or a weight file (as step 0); prints and writes the scores.

    With config.evaluate.sweep it makes the sweep and nothing else. Raises ValueError if there is nothing to score."""
    if not config.evaluate.num_samples and not config.evaluate.likelihood:
        raise ValueError("evaluate.num_samples is 0, so nothing would be scored: give --config.evaluate.num_samples=N")
    check_evaluation(config)
    images_alone = weights and not config.evaluate.memorization and not config.evaluate.likelihood
    if images_alone:  # a file that others trained: nothing is encoded
        config = with_scored_split(config)
    generator, params, step = sample.open_generator(config, workdir, weights)
    data = build_data(config)
    text = text_encoder_of(generator)
    source = build_images(config).open() if images_alone else open_latents(data, workdir, text)[0]
    cache_dir, identity = data.latents_dir(workdir), weights_identity(weights)
    if config.evaluate.sweep:
        todo = sweep.build_combinations(config, generator)  # all are checked before the first is drawn
        scorer = build_scorer(config, source, cache_dir, identity)
        paths = sweep.score_combinations(config, generator, params, todo, scorer.score, step, workdir, identity)
        lines = [f"sweep:   {path}" for path in paths]
    else:
        lines = report_scores(generator, params, config, source, cache_dir, step, workdir, identity)
    if jax.process_index() == 0:
        print("\n".join(lines))
