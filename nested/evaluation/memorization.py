"""Memorisation: how near a run's samples come to its training images, against images that were never trained on.

    d_k(x)      the k-th smallest distance from x to the training images
    samples     d_1 should be distributed as for held-out images; copies lie far below
    d_1 / d_2   below 1/3, a sample counts as memorised in Yoon et al., "Diffusion Probabilistic Models Generalize when
                They Fail to Memorize" (ICML 2023 workshop), with Euclidean distances of pixels

Distances are taken of pixels (root mean square, in grey levels of 255) and of the features that the scores use
(Euclidean). Beside the held-out images, training images are compared, each with all others. If many training images
have near copies (skin tones of one emoji), the ratio says little. All images are compared as the finest level's codec
decodes them, which is the nearest that a sample can come (for an autoencoder: the mean of their latents), and as they
are, even if training mirrors them (config.data.flip).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from input_pipeline import loader
from input_pipeline.composition import select_fields
from nested.evaluation.nearest import NearestStream, pad_rows
from nested.figures.curves import memorization_picture
from nested.runtime import partition
from nested.runtime.files import atomic_write
from nested.runtime.writers import Progress
from nested.sampling.generator import Decoder, Generator
from nested.spaces.space import DecodableSpace

Tree = Any
Source = Any  # a sequence of records, dicts of arrays
Decode = Callable[[np.ndarray], np.ndarray]  # a stored field [N, ...] -> uint8 images [N, H, W, C]
BATCH = 1024  # training images read, encoded and compared at a time
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHARES = (0.01, 0.05)  # of the other images, that lie below the distances which samples are counted against
MEMORIZED = 1 / 3  # the largest d_1 / d_2 of a memorised sample, after Yoon et al.
SUSPICIOUS = 20  # pairs shown
SAMPLES, HELD_OUT, TRAINING = GROUPS = ("samples", "held_out", "training")
UNITS = {"pixels": "root mean square of pixel differences, grey levels", "features": "Euclidean distance of features"}


@dataclasses.dataclass(frozen=True, eq=False)
class Distances:
    """Distances of one kind from the images of one group to the training images.

    two: float [N, 2], d_1 and d_2. nearest: int [N], the place of the nearest among the training images."""

    two: np.ndarray
    nearest: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """d_1 / d_2 [N]; 1 if both are 0, because training images are equal."""
        first, second = self.two.T
        return np.divide(first, second, out=np.ones_like(first), where=second > 0)


def compare_groups(
    groups: dict[str, np.ndarray],
    own: np.ndarray,
    training: Iterable[np.ndarray],
    features: Callable[[np.ndarray], np.ndarray],
) -> dict[str, dict[str, Distances]]:
    """Finds the two training images nearest to every image, by pixels and by features.

    Args:
      groups: {group: uint8 images [N, H, W, C]}.
      own: [N] the places of the group of training images, none of which is its own neighbour.
      training: batches of all training images, in order.
      features: images -> [N, D].
    Returns: {kind of distance: {group: Distances}}.
    """
    sizes = [len(images) for images in groups.values()]
    images = np.concatenate(list(groups.values()))
    places = np.concatenate([own if name == TRAINING else np.full(len(x), -1) for name, x in groups.items()])
    kinds = {"pixels": lambda batch: batch, "features": features}
    streams = {kind: NearestStream(of(images), 2, places) for kind, of in kinds.items()}
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
    """The entry of memorization.json for one kind of distance."""
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
    """{'50%': median, ...} for the shares QUANTILES."""
    return {format_percent(q): float(np.quantile(values, q)) for q in QUANTILES}


def format_percent(share: float) -> str:
    """0.05 -> '5%'."""
    return f"{100 * share:g}%"


def summary_line(kind: str, summary: dict[str, Any]) -> str:
    """The line to print for one kind of distance and its summarize_distances."""
    median = {name: summary["quantiles"][name]["50%"] for name in GROUPS}
    nearer = summary["samples_nearer_than"]
    return (
        f"memorization, {kind}: nearest training image at {median[SAMPLES]:.3g} (median; of held-out images "
        f"{median[HELD_OUT]:.3g}, of other training images {median[TRAINING]:.3g}); nearer than 1 % of held-out images "
        f"{100 * nearer[HELD_OUT]['1%']:.1f} % of samples, than 1 % of training images "
        f"{100 * nearer[TRAINING]['1%']:.1f} %; d1/d2 < 1/3 {100 * summary['ratio_below_third'][SAMPLES]:.1f} %"
    )


def make_decoder(space: DecodableSpace, latents: Decoder, mesh: jax.sharding.Mesh) -> Decode:
    """A function from stored images to what the finest level's codec makes of them, as uint8 images.

    Args:
      space: of the finest level; its first field is stored, an image or the moments of its latent.
      latents: the decoder of the same space, with its parameters on the devices.
      mesh: the devices, over which rows are split.
    """
    size = latents.slices(-(-BATCH // mesh.size) * mesh.size, mesh.size)[0].stop

    @functools.partial(jax.jit, out_shardings=partition.replicated(mesh))
    def decode_rows(stored: jax.Array, params: Tree) -> jax.Array:
        return latents.decode(space.variable({space.fields[0]: stored}, None), params)

    def decode(stored: np.ndarray) -> np.ndarray:
        chunks = (stored[start : start + size] for start in range(0, len(stored), size))
        padded = ((len(chunk), partition.split_rows(pad_rows(chunk, size), mesh)) for chunk in chunks)
        return np.concatenate([np.asarray(decode_rows(chunk, latents.params))[:count] for count, chunk in padded])

    return decode


def decoded_batches(training: Source, field: str, decode: Decode) -> Iterator[np.ndarray]:
    """The training images in batches, as decoded from `field` of the records, with a progress line."""
    progress, done = Progress("training images compared", len(training)), 0
    for batch in loader.in_order(select_fields(training, (field,)), BATCH):
        yield decode(batch[field])
        progress.update(done := done + len(batch[field]))


def stack_records(source: Source, places: Iterable[int], field: str) -> np.ndarray:
    """One field of the records at these places, as an array [n, ...]."""
    return np.stack([source[int(i)][field] for i in places])


def report_memorization(
    generator: Generator,
    params: Tree,
    number: int,
    space: DecodableSpace,
    training: Source,
    held_out: Source,
    features: Callable[[np.ndarray], np.ndarray],
    step: int,
    workdir: str,
) -> list[str]:
    """Compares samples with the training images; writes memorization.json and memorization.png to `workdir`.

    Args:
      generator, params: what draws the samples, and its parameters, of `step`.
      number: how many samples are drawn, and how many training images are compared with all others.
      space: of the finest level. All images are compared as it decodes them.
      training: the records that are trained on.
      held_out: records that are not.
      features: uint8 images [N, H, W, C] -> [N, D], those of the scores.
      step: of the parameters; it is written to the file.
      workdir: the folder of the two files.
    Returns: the lines to print, a summary for each kind of distance and the paths.
    """
    field, decode = space.fields[0], make_decoder(space, generator.latents, generator.mesh)
    own = np.linspace(0, len(training), min(number, len(training)), endpoint=False).astype(int)
    groups = {
        SAMPLES: generator.images(params, number, "samples, memorization"),
        HELD_OUT: decode(stack_records(held_out, range(len(held_out)), field)),
        TRAINING: decode(stack_records(training, own, field)),
    }
    found = compare_groups(groups, own, decoded_batches(training, field, decode), features)
    summaries = {kind: summarize_distances(of_groups) for kind, of_groups in found.items()}
    counts = {f"num_{name}": len(images) for name, images in groups.items()}
    content = {"step": step, "num_compared_with": len(training), **counts, **summaries}
    paths = [os.path.join(workdir, f"memorization.{kind}") for kind in ("json", "png")]
    drawn = found["features"][SAMPLES]
    worst = drawn.two[:, 0].argsort(kind="stable")[:SUSPICIOUS]
    partners = decode(stack_records(training, drawn.nearest[worst], field))  # on all hosts: all devices take part
    if jax.process_index() == 0:
        atomic_write(paths[0], json.dumps(content, indent=1) + "\n")
        draw_nearest_pairs(groups[SAMPLES][worst], partners, drawn.two[worst, 0], found, paths[1])
    lines = [summary_line(kind, summary) for kind, summary in summaries.items()]
    return lines + [f"memorization: {path}" for path in paths]


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
