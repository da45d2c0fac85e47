"""Scores of a run: Frechet and kernel distance on EfficientNet-Lite0's pooled features, and never called FID.

    FD-EffLite0 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))     on 1,280-d features of images and samples

Numbers of this extractor compare runs of this code on one data set; they do not compare with published FIDs, which
need Inception's weights. With the weights of a CLIP (config.evaluate.clip) the samples are held to their prompts too.
Both the guided and the unguided score are reported, as U-ViT's users ask for them. Clips are scored frame by frame.
With config.evaluate.sweep options of sampling are scored at several values (nested/modes/sweep.py).
"""

import dataclasses
import hashlib
import io
import json
import os

import jax
import numpy as np
from absl import logging

from nested.build import data as build_data
from nested.evaluation import clip_score, frechet, memorization
from nested.evaluation import kernel as scores
from nested.modes import sample, sweep
from nested.runtime.files import atomic_write
from nested.sampling import generator as sampling
from nested.weights import files as weight_files

EXTRACTOR = "EffLite0"


@dataclasses.dataclass(frozen=True)
class Score:
    """fd: FD-EffLite0; kid: MMD^2 (times one, not a thousand). guided: whether the config's guidance was on. clip: the
    CLIP score with the prompts, where config.evaluate.clip has weights. weights: 16 digits of the sha256 of the weight
    file that was scored, '' for the step of a run."""

    guided: bool
    guidance: tuple[float, ...]
    fd: float
    kid: float
    num_samples: int
    num_reference: int
    input_size: int
    step: int
    clip: float | None = None
    weights: str = ""

    def __str__(self):
        guidance = ", ".join(f"{w:g}" for w in self.guidance)
        return (
            f"FD-EffLite0 {self.fd:.2f}  KID {self.kid:.4f}  {self._clip()}guidance ({guidance})  "
            f"({self.num_samples:,} samples against {self.num_reference:,} images, {self.input_size} px)"
        )

    def _clip(self):
        return "" if self.clip is None else f"CLIP score {self.clip:.2f}  "


def pooled_features(encoder, batches, size: int) -> np.ndarray:
    """Pooled features float32 [N, 1280] of uint8 images, given in batches of any length; of clips, one per frame. Every
    batch that is encoded is padded to `size` rows."""
    return encode_batches(encoder.pooled, (batch.reshape(-1, *batch.shape[-3:]) for batch in batches), size)


def encode_batches(network, batches, size: int) -> np.ndarray:
    """What `network` makes of images, given in batches of any length, padded to `size` rows each time."""
    result = []
    for images in rechunk(batches, size):
        padded = np.concatenate([images, np.repeat(images[-1:], size - len(images), axis=0)])
        result.append(np.asarray(network(padded))[: len(images)])
    return np.concatenate(result)


def reference_features(config, source, encoder, cache_dir: str) -> np.ndarray:
    """Features of config.evaluate.num_reference images, evenly spaced through the data; computed once, then kept."""
    number = min(config.evaluate.num_reference, len(source))
    made_from = f"{encoder.fingerprint[:8]}-{source.fingerprint[:8]}"
    name = f"reference-{EXTRACTOR}-{made_from}-{encoder.input_size}px-{number}.npy"
    path = os.path.join(cache_dir, name)
    if os.path.exists(path):
        return np.load(path, allow_pickle=False)
    logging.info("computing the features of %d reference images", number)
    chosen = np.linspace(0, len(source), number, endpoint=False).astype(int)
    size = config.encoder.batch_size
    batches = (
        np.stack([source[int(i)]["image"] for i in chosen[start : start + size]]) for start in range(0, number, size)
    )
    result = pooled_features(encoder, batches, size)
    if jax.process_index() == 0:
        buffer = io.BytesIO()
        np.save(buffer, result)
        atomic_write(path, buffer.getvalue())
    return result


def rechunk(batches, size: int):
    """Batches of any length as batches of at most `size` rows."""
    for batch in batches:
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def score_run(gen: sampling.Generator, ema, source, cache_dir: str, step: int, file: str = "") -> list[Score]:
    """The guided score and, with config.evaluate.unguided and guidance anywhere, the unguided one. file: identifies the
    weight file that is scored (Score.weights)."""
    guidance = tuple(level.guidance for level in gen.levels)
    drawers = [gen]
    if gen.config.evaluate.unguided and any(guidance):
        drawers.append(gen.with_guidance((0.0,) * len(guidance)))
    measure = make_scorer(gen.config, source, cache_dir, file)
    return [measure(drawer, ema, step) for drawer in drawers]


def make_scorer(config, source, cache_dir: str, file: str = ""):
    """The function (generator, EMA, step) -> Score against the data that the config names."""
    if min(config.evaluate.num_samples, config.evaluate.num_reference) < 2:
        raise ValueError(
            f"config.evaluate: num_samples {config.evaluate.num_samples}, num_reference "
            f"{config.evaluate.num_reference}; a distance needs 2 or more of each"
        )
    clip = load_clip_scorer(config)
    encoder, size, number = build_data.score_encoder(config), config.encoder.batch_size, config.evaluate.num_samples
    scored, source = build_data.scored_against(config, source)
    texts = build_data.some_captions(scored, number) if config.text.encoder else ()  # not those of the pictures
    reference = reference_features(config, build_data.pictures(scored, source), encoder, cache_dir)
    fitted = frechet.fit_statistics(reference, EXTRACTOR)

    def measure(gen, ema, step):
        weights = tuple(level.guidance for level in gen.levels)
        if texts:
            gen = dataclasses.replace(gen, prompts=texts)
        vectors = []

        def drawn_batches():
            for images in gen.batches(ema, number, f"samples, guidance {weights}"):
                if clip:
                    vectors.append(encode_batches(clip.image_vectors, [images], config.sample.batch_size))
                yield images

        drawn = pooled_features(encoder, drawn_batches(), size)
        fd = frechet.statistics_distance(frechet.fit_statistics(drawn, EXTRACTOR), fitted)
        kid = scores.kernel_distance(drawn, reference).mean
        fits = None
        if clip:
            prompts = [gen.prompts[i % len(gen.prompts)] for i in range(number)]
            fits = clip_score.mean_clip_score(np.concatenate(vectors), clip.text_vectors(prompts))
        return Score(any(weights), weights, fd, kid, len(drawn), len(reference), encoder.input_size, step, fits, file)

    return measure


def check_evaluation(config) -> None:
    """ValueError for what cannot be scored, before a run trains for days: memorisation, a CLIP, another split."""
    memorization.check_options(config)
    if wants_clip_score(config):
        weight_files.find_weight_files(config.evaluate.clip.weights)
    if config.evaluate.split and config.evaluate.num_samples:
        build_data.scored_against(config, None)


def weights_identity(path: str) -> str:
    """What Score.weights says of a weight file, or a folder of them."""
    if not path:
        return ""
    return hashlib.sha256("".join(map(weight_files.sha256, weight_files.find_weight_files(path))).encode()).hexdigest()[
        :16
    ]


def load_clip_scorer(config) -> clip_score.Clip | None:
    """The CLIP of config.evaluate.clip, None without weights. Raises ValueError as wants_clip_score() does."""
    options = config.evaluate.clip
    return clip_score.load_clip(options.name, options.weights) if wants_clip_score(config) else None


def wants_clip_score(config) -> bool:
    """Whether to compute a CLIP score. Raises ValueError where there are no prompts or the samples are clips."""
    if not config.evaluate.clip.weights:
        return False
    if not config.text.encoder or len(build_data.finest_shape(config)) != 3:
        raise ValueError(
            "config.evaluate.clip.weights is given, but the CLIP score is of images with prompts: this config has "
            f"{'clips' if config.text.encoder else 'no text (config.text.encoder)'}; set it to ''"
        )
    return True


def report_scores(
    gen: sampling.Generator, ema, source, cache_dir: str, step: int, workdir: str, file: str = ""
) -> list[str]:
    """Scores, written to scores.json, and what config.evaluate.memorization asks for; the lines to print."""
    config = gen.config
    results = score_run(gen, ema, source, cache_dir, step, file)
    lines = [f"score:   {result}" for result in results] + [f"scores:  {write_scores(workdir, results)}"]
    if config.evaluate.memorization:
        encoder, size = build_data.score_encoder(config), config.encoder.batch_size
        lines += memorization.report_memorization(
            gen, ema, source, lambda images: pooled_features(encoder, [images], size), step, workdir
        )
    return lines


def write_scores(workdir: str, results: list[Score]) -> str:
    """Writes WORKDIR/scores.json; its path."""
    path = os.path.join(workdir, "scores.json")
    if jax.process_index() == 0:
        atomic_write(path, json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n")
    return path


def evaluate(config, workdir: str, weights: str = "") -> None:
    """The mode `evaluate`: scores the newest checkpoint, or the weights in a file (as step 0), prints the scores and
    writes scores.json, with the report on memorisation that the config asks for; or makes a sweep and nothing else."""
    if not config.evaluate.num_samples:
        raise ValueError("evaluate.num_samples is 0, so nothing would be scored: give --config.evaluate.num_samples=N")
    check_evaluation(config)
    images_alone = weights and not config.evaluate.memorization
    if images_alone:  # of a file that others trained: nothing is encoded
        config = build_data.scored_config(config)
    gen, ema, step = sample.open_generator(config, workdir, weights)
    source = build_data.images(config) if images_alone else build_data.latents(config, workdir, gen.text)[0]
    cache_dir, file = build_data.latents_dir(config, workdir), weights_identity(weights)
    if config.evaluate.sweep:
        todo = sweep.build_combinations(gen)  # all are checked before the first is drawn
        paths = sweep.score_combinations(
            gen, ema, todo, make_scorer(config, source, cache_dir, file), step, workdir, file
        )
        if jax.process_index() == 0:
            print("\n".join(f"sweep:   {path}" for path in paths))
        return
    lines = report_scores(gen, ema, source, cache_dir, step, workdir, file)
    if jax.process_index() == 0:
        print("\n".join(lines))
