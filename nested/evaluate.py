"""Scores of a run: Frechet and kernel distance on EfficientNet-Lite0's pooled features, and never called FID.

    FD-EffLite0 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))     on 1,280-d features of images and samples

Numbers of this extractor compare runs of this code on one data set; they do not compare with published FIDs, which
need Inception's weights. Both the guided and the unguided score are reported, as U-ViT's users ask for them.
"""

import dataclasses
import io
import json
import os

import jax
import numpy as np
from absl import logging

from nested import build_data, sample
from nested.evaluation import frechet, scores
from nested.files import atomic_write

EXTRACTOR = "EffLite0"


@dataclasses.dataclass(frozen=True)
class Score:
    """fd: FD-EffLite0; kid: MMD^2 (times one, not a thousand). guided: whether the config's guidance was on."""

    guided: bool
    guidance: tuple[float, ...]
    fd: float
    kid: float
    num_samples: int
    num_reference: int
    input_size: int
    step: int

    def __str__(self):
        guidance = ", ".join(f"{w:g}" for w in self.guidance)
        return (
            f"FD-EffLite0 {self.fd:.2f}  KID {self.kid:.4f}  guidance ({guidance})  "
            f"({self.num_samples:,} samples against {self.num_reference:,} images, {self.input_size} px)"
        )


def features(encoder, batches, size: int) -> np.ndarray:
    """Pooled features float32 [N, 1280] of batches of uint8 images; every batch is padded to `size` rows."""
    result = []
    for images in batches:
        padded = np.concatenate([images, np.repeat(images[-1:], size - len(images), axis=0)])
        result.append(np.asarray(encoder.pooled(padded))[: len(images)])
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
    result = features(encoder, batches, size)
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


def score(gen: sample.Generator, ema, source, cache_dir: str, step: int) -> list[Score]:
    """The guided score and, with config.evaluate.unguided and guidance anywhere, the unguided one."""
    config = gen.config
    if min(config.evaluate.num_samples, config.evaluate.num_reference) < 2:
        raise ValueError(
            f"config.evaluate: num_samples {config.evaluate.num_samples}, num_reference "
            f"{config.evaluate.num_reference}; a distance needs 2 or more of each"
        )
    encoder = build_data.score_encoder(config)
    reference = reference_features(config, source, encoder, cache_dir)
    guidance = tuple(level.guidance for level in gen.levels)
    variants = [guidance] + ([(0.0,) * len(guidance)] if config.evaluate.unguided and any(guidance) else [])
    result = []
    for weights in variants:
        drawer = gen if weights == guidance else gen.with_guidance(weights)
        images = drawer.images(ema, config.evaluate.num_samples, f"samples, guidance {weights}")
        size = config.encoder.batch_size
        drawn = features(encoder, rechunk([images], size), size)
        fd = frechet.distance(frechet.fit(drawn, EXTRACTOR), frechet.fit(reference, EXTRACTOR))
        kid = scores.kernel_distance(drawn, reference).mean
        result.append(
            Score(any(weights), weights, fd, kid, len(drawn), len(reference), encoder.input_size, step)
        )
    return result


def write_scores(workdir: str, results: list[Score]) -> str:
    """Writes WORKDIR/scores.json; its path."""
    path = os.path.join(workdir, "scores.json")
    if jax.process_index() == 0:
        atomic_write(path, json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n")
    return path


def evaluate(config, workdir: str) -> None:
    """The mode `evaluate`: scores the newest checkpoint, prints the scores and writes scores.json."""
    if not config.evaluate.num_samples:
        raise ValueError("evaluate.num_samples is 0, so nothing would be scored: give --config.evaluate.num_samples=N")
    source, _ = build_data.latents(config, workdir)
    gen, ema, step = sample.restored(config, workdir)
    results = score(gen, ema, source, build_data.latents_dir(config, workdir), step)
    path = write_scores(workdir, results)
    for result in results:
        print(result)
    logging.info("scores: %s", path)
