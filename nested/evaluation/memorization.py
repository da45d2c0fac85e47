"""Memorisation: how near a run's samples come to its training images, against images that were never trained on.

    d_k(x)      the k-th smallest distance from x to the training images
    samples     d_1 should be distributed as for held-out images; copies lie far below
    d_1 / d_2   below 1/3, a sample counts as memorised in Yoon et al., "Diffusion Probabilistic Models Generalize when
                They Fail to Memorize" (ICML 2023 workshop), with Euclidean distances of pixels

Distances are of pixels (root mean square, in grey levels of 255) and of the features that the scores use (Euclidean).
Beside the held-out images stand training images, each against all others. Where many training images have near copies
(skin tones of one emoji) the ratio says little. All images are compared as the finest level's codec decodes them, which
is the nearest that a sample can come (an autoencoder: the mean of their latents); and as they are, not mirrored where
training mirrors them (config.data.flip).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from input_pipeline import loader
from input_pipeline.composition import select_fields
from nested.build import data as build_data
from nested.evaluation import nearest
from nested.figures.curves import memorization_picture
from nested.runtime import partition
from nested.runtime.files import atomic_write
from nested.runtime.writers import Progress

BATCH = 1024  # training images read, encoded and compared at a time
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHARES = (0.01, 0.05)  # of the other images, that lie below the distances which samples are counted against
MEMORIZED = 1 / 3  # the largest d_1 / d_2 of a memorised sample, after Yoon et al.
SUSPICIOUS = 20  # pairs shown
SAMPLES, HELD_OUT, TRAINING = GROUPS = ("samples", "held_out", "training")
UNITS = {"pixels": "root mean square of pixel differences, grey levels", "features": "Euclidean distance of features"}


@dataclasses.dataclass(frozen=True, eq=False)
class Distances:
    """Of the images of one group, by one kind of distance: `two` float [N, 2], d_1 and d_2, to the training images;
    `nearest` int [N], the first's place among them."""

    two: np.ndarray
    nearest: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """d_1 / d_2 [N]; 1 where both are 0, that is, where training images are equal."""
        first, second = self.two.T
        return np.divide(first, second, out=np.ones_like(first), where=second > 0)


def check_options(config) -> None:
    """ValueError where a report is asked for that cannot be made."""
    if config.evaluate.memorization and not config.evaluate.num_samples:
        raise ValueError(
            f"config.evaluate.memorization {config.evaluate.memorization}: comes with the scores, and "
            "config.evaluate.num_samples is 0; set that, or memorization to 0"
        )
    if config.evaluate.memorization and not config.data.holdout:
        raise ValueError(
            f"config.evaluate.memorization {config.evaluate.memorization}: needs images that are not trained on to "
            "compare with; set config.data.holdout, or memorization to 0"
        )
    if config.evaluate.memorization and len(build_data.finest_shape(config)) > 3:
        raise ValueError(
            f"config.evaluate.memorization {config.evaluate.memorization}: it compares still images, not clips; set it "
            "to 0"
        )


def compare_groups(groups: dict[str, np.ndarray], own, training, features: Callable) -> dict[str, dict[str, Distances]]:
    """{kind: {group: Distances}} of groups of images uint8 [N, H, W, C] to the training images.

    own: for the group of training images, the place of each; it is not its own neighbour. training: an iterable of
    batches of them, in order. features: images -> [N, d]."""
    sizes = [len(images) for images in groups.values()]
    images = np.concatenate(list(groups.values()))
    places = np.concatenate([own if name == TRAINING else np.full(len(x), -1) for name, x in groups.items()])
    kinds = {"pixels": lambda batch: batch, "features": features}
    streams = {kind: nearest.NearestStream(of(images), 2, places) for kind, of in kinds.items()}
    for batch in training:
        for kind, of in kinds.items():
            streams[kind].add(of(batch))
    scales = {"pixels": np.sqrt(images[0].size), "features": 1.0}
    result, cuts = {}, np.cumsum(sizes)[:-1]
    for kind, stream in streams.items():
        found, indices = stream.result()
        parts = zip(np.split(found / scales[kind], cuts), np.split(indices[:, 0], cuts), strict=True)
        result[kind] = {name: Distances(*part) for name, part in zip(groups, parts, strict=True)}
    return result


def summarize_distances(of_groups: dict[str, Distances]) -> dict[str, Any]:
    """What memorization.json says of one kind of distance."""
    first = {name: found.two[:, 0] for name, found in of_groups.items()}
    return {
        "quantiles": {name: quantiles(values) for name, values in first.items()},
        "samples_nearer_than": {
            name: {format_percent(q): float((first[SAMPLES] < np.quantile(first[name], q)).mean()) for q in SHARES}
            for name in (HELD_OUT, TRAINING)
        },
        "ratio_quantiles": {name: quantiles(found.ratio) for name, found in of_groups.items()},
        "ratio_below_third": {name: float((found.ratio < MEMORIZED).mean()) for name, found in of_groups.items()},
    }


def quantiles(values: np.ndarray) -> dict[str, float]:
    return {format_percent(q): float(np.quantile(values, q)) for q in QUANTILES}


def format_percent(share: float) -> str:
    return f"{100 * share:g}%"


def summary_line(kind: str, said: dict[str, Any]) -> str:
    """A line of summarize_distances()."""
    median = {name: said["quantiles"][name]["50%"] for name in GROUPS}
    nearer = said["samples_nearer_than"]
    return (
        f"memorization, {kind}: nearest training image at {median[SAMPLES]:.3g} (median; of held-out images "
        f"{median[HELD_OUT]:.3g}, of other training images {median[TRAINING]:.3g}); nearer than 1 % of held-out images "
        f"{100 * nearer[HELD_OUT]['1%']:.1f} % of samples, than 1 % of training images "
        f"{100 * nearer[TRAINING]['1%']:.1f} %; d1/d2 < 1/3 {100 * said['ratio_below_third'][SAMPLES]:.1f} %"
    )


def make_decoder(latents, mesh) -> Callable:
    """Stored images [N, H, W, C], or their latents' moments -> the uint8 images that the finest level's codec makes of
    them, at the samples' resolution. The rows are split over the mesh."""
    space, size = latents.finest, -(-BATCH // mesh.size) * mesh.size
    size = latents.slices(size, mesh.size)[0].stop

    @functools.partial(jax.jit, out_shardings=partition.replicated(mesh))
    def decoded(stored, params):
        return latents.decode(space.variable({space.fields[0]: stored}, None), params)

    def seen(stored):
        chunks = (stored[start : start + size] for start in range(0, len(stored), size))
        padded = ((len(chunk), partition.split_rows(nearest.pad_rows(chunk, size), mesh)) for chunk in chunks)
        return np.concatenate([np.asarray(decoded(chunk, latents.params))[:count] for count, chunk in padded])

    return seen


def decoded_batches(training, field: str, seen: Callable):
    """The training images in batches, as decoded from that field of the records, with a progress line."""
    progress, done = Progress("training images compared", len(training)), 0
    for batch in loader.in_order(select_fields(training, (field,)), BATCH):
        yield seen(batch[field])
        progress.update(done := done + len(batch[field]))


def stack_records(source, places, field: str) -> np.ndarray:
    """That field of a source's records at these places."""
    return np.stack([source[int(i)][field] for i in places])


def report_memorization(gen, ema, source, features: Callable, step: int, workdir: str) -> list[str]:
    """Draws config.evaluate.memorization samples and compares them with the training images; writes memorization.json
    and memorization.png to workdir. Returns the lines to print: a summary of each kind, and the files.

    gen, ema: a sample.Generator and its parameters, of `step`. source: the run's records, those held out included.
    features: uint8 images [N, H, W, C] -> [N, d], those of the scores.
    Raises ValueError as check_options() does."""
    config = gen.config
    check_options(config)
    number, field = config.evaluate.memorization, gen.latents.finest.fields[0]
    seen = make_decoder(gen.latents, gen.mesh)
    if config.text.encoder:
        gen = dataclasses.replace(gen, prompts=build_data.some_captions(config, number))
    training = build_data.split(config, source)[0]
    own = np.linspace(0, len(training), min(number, len(training)), endpoint=False).astype(int)
    groups = {
        SAMPLES: gen.images(ema, number, "samples, memorization"),
        HELD_OUT: seen(stack_records(source, build_data.held_out(config, len(source)), field)),
        TRAINING: seen(stack_records(training, own, field)),
    }
    found = compare_groups(groups, own, decoded_batches(training, field, seen), features)
    said = {kind: summarize_distances(of_groups) for kind, of_groups in found.items()}
    counts = {f"num_{name}": len(images) for name, images in groups.items()}
    content = {"step": step, "num_compared_with": len(training), **counts, **said}
    paths = [os.path.join(workdir, f"memorization.{kind}") for kind in ("json", "png")]
    drawn = found["features"][SAMPLES]
    worst = drawn.two[:, 0].argsort(kind="stable")[:SUSPICIOUS]
    partners = seen(stack_records(training, drawn.nearest[worst], field))  # on all hosts: the devices of all work at it
    if jax.process_index() == 0:
        atomic_write(paths[0], json.dumps(content, indent=1) + "\n")
        draw_nearest_pairs(groups[SAMPLES][worst], partners, drawn.two[worst, 0], found, paths[1])
    return [*(summary_line(kind, of) for kind, of in said.items()), *(f"memorization: {path}" for path in paths)]


def draw_nearest_pairs(
    samples: np.ndarray, partners: np.ndarray, apart: np.ndarray, found: dict[str, dict[str, Distances]], path: str
) -> None:
    """Writes the PNG of samples beside their nearest training images, with the distributions of d_1.

    samples, partners: uint8 [n, H, W, C]; a partner is the training image nearest by features, at distance `apart` [n].
    found: {kind: {group: Distances}}, a panel of histograms for each kind of distance.
    """
    pixels = np.sqrt(np.square(samples.astype(np.float64) - partners).mean((1, 2, 3)))
    titles = [f"{pixel:.0f}, {feature:.1f}" for pixel, feature in zip(pixels, apart, strict=True)]
    first = {
        f"nearest training image, {UNITS[kind]}": {
            group.replace("_", "-"): distances.two[:, 0] for group, distances in of_groups.items()
        }
        for kind, of_groups in found.items()
    }
    memorization_picture(zip(samples, partners, titles, strict=True), first, path)
