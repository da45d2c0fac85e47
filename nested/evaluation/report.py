"""Scores of a run: Frechet and kernel distances of samples and data, and the CLIP score of samples and prompts.

    FD-EffLite0 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))     on 1,280-d features of images and samples

Both the guided and the unguided score are reported, because users of U-ViT ask for them. Clips are scored frame by
frame. The features, and why this is not FID, are described in nested/evaluation/features.py.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nested.evaluation import clip_score, frechet
from nested.evaluation.features import EXTRACTOR, PooledEncoder, encode_batches, pooled_features
from nested.evaluation.kernel import kernel_distance
from nested.runtime.files import atomic_write
from nested.sampling.generator import Generator
from nested.weights.files import find_weight_files, sha256

Tree = Any


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of one way of sampling.

    guided: whether any level was guided. guidance: the weight of each level. fd: FD-EffLite0. kid: MMD^2 (times one,
    not a thousand). clip: the CLIP score with the prompts, None without a CLIP. step: of the checkpoint. weights: 16
    digits of the sha256 of the weight file that was scored, '' for a checkpoint of a run."""

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

    def __str__(self) -> str:
        guidance = ", ".join(f"{w:g}" for w in self.guidance)
        clip = "" if self.clip is None else f"CLIP score {self.clip:.2f}  "
        return (
            f"FD-EffLite0 {self.fd:.2f}  KID {self.kid:.4f}  {clip}guidance ({guidance})  "
            f"({self.num_samples:,} samples against {self.num_reference:,} images, {self.input_size} px)"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Scores generators against one set of reference images.

    encoder: the extractor. reference: float32 [N, D], its features of the reference images. num_samples: how many are
    drawn. batch_size: the images that the extractor sees at a time. sample_batch: those that a CLIP sees at a time.
    texts: the prompts of the samples, in turn; () leaves the generator's own. clip: the CLIP that holds the samples to
    their prompts, or None. weights: identifies a weight file that is scored (Score.weights).
    """

    encoder: PooledEncoder
    reference: np.ndarray
    num_samples: int
    batch_size: int
    sample_batch: int
    texts: tuple[str, ...] = ()
    clip: clip_score.Clip | None = None
    weights: str = ""

    @functools.cached_property
    def statistics(self) -> frechet.Statistics:
        """Mean and covariance of the reference features."""
        return frechet.fit_statistics(self.reference, EXTRACTOR)

    def score(self, generator: Generator, params: Tree, step: int) -> Score:
        """Draws samples of a generator with these parameters, of `step`, and scores them."""
        guidance = tuple(level.guidance for level in generator.levels)
        if self.texts:
            generator = dataclasses.replace(generator, prompts=self.texts)
        vectors = []

        def drawn_batches():
            for images in generator.batches(params, self.num_samples, f"samples, guidance {guidance}"):
                if self.clip:
                    vectors.append(encode_batches(self.clip.image_vectors, [images], self.sample_batch))
                yield images

        drawn = pooled_features(self.encoder, drawn_batches(), self.batch_size)
        fd = frechet.statistics_distance(frechet.fit_statistics(drawn, EXTRACTOR), self.statistics)
        kid = kernel_distance(drawn, self.reference).mean
        clip = None
        if self.clip:
            prompts = [generator.prompts[i % len(generator.prompts)] for i in range(self.num_samples)]
            clip = clip_score.mean_clip_score(np.concatenate(vectors), self.clip.text_vectors(prompts))
        return Score(
            guided=any(guidance),
            guidance=guidance,
            fd=fd,
            kid=kid,
            num_samples=len(drawn),
            num_reference=len(self.reference),
            input_size=self.encoder.input_size,
            step=step,
            clip=clip,
            weights=self.weights,
        )


def score_generator(scorer: Scorer, generator: Generator, params: Tree, step: int, unguided: bool) -> list[Score]:
    """The score of a generator as it is and, with `unguided` and guidance at any level, its score without guidance."""
    guidance = tuple(level.guidance for level in generator.levels)
    generators = [generator]
    if unguided and any(guidance):
        generators.append(generator.with_guidance((0.0,) * len(guidance)))
    return [scorer.score(one, params, step) for one in generators]


def write_scores(workdir: str, scores: Sequence[Score]) -> str:
    """Writes WORKDIR/scores.json in process 0; returns its path."""
    path = os.path.join(workdir, "scores.json")
    if jax.process_index() == 0:
        atomic_write(path, json.dumps([dataclasses.asdict(score) for score in scores], indent=2) + "\n")
    return path


def weights_identity(path: str) -> str:
    """The Score.weights of a weight file or a folder of them, by their content; '' for ''."""
    if not path:
        return ""
    return hashlib.sha256("".join(map(sha256, find_weight_files(path))).encode()).hexdigest()[:16]
