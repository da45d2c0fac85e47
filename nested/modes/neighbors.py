"""The mode `neighbors`: which images are alike in the latents of each level (Nested Diffusion, CVPR 2025, Figure 3).

neighbors.png shows, for a few query images, the nearest other images by the variable of every level and by pixels.
Variables are standardised as the networks see them and free of noise; that of the finest level is the codec's latent.
For labelled data the leave-one-out accuracy of k-NN classification is given for each. Distances are Euclidean
(nested/evaluation/nearest.py) and are written to neighbors.json. No network has to be trained for this mode.
"""

import dataclasses
import json
import os

import jax
import numpy as np

from input_pipeline import loader
from nested import figures
from nested.build.data import build_data
from nested.build.options import Config
from nested.build.sources import source_kind
from nested.evaluation import nearest
from nested.modes.encode import image_source, open_latents
from nested.runtime.files import atomic_write
from nested.runtime.writers import Progress


@dataclasses.dataclass(frozen=True, eq=False)
class Representations:
    """N images and what they are compared by.

    Attributes:
      records: int [N], their numbers among the records.
      images: uint8 [N, H, W, C].
      labels: int [N].
      values: {name of the representation: [N, ...]}.
    """

    records: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    values: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest images of Q queries by one representation, nearest first, without the queries themselves.

    Attributes:
      name: of the representation; shape: of its values, without the batch axis.
      places: int [Q, n], indices into Representations.
      distances: float [Q, n].
      accuracy: of k-NN classification, None if there are no labels.
    """

    name: str
    shape: tuple[int, ...]
    places: np.ndarray
    distances: np.ndarray
    accuracy: float | None


def collect_representations(config: Config, workdir: str) -> Representations:
    """config.evaluate.num_reference records, evenly spaced through the data, by every level and by pixels.

    A level of several resolutions is compared by each of them, NAME.0, NAME.1, ...; one of the images' own shape is the
    image itself, which stands as "pixels", the last."""
    data = build_data(config)
    source, latents = open_latents(data, workdir)
    pictured = image_source(data, source)
    number, size = min(config.evaluate.num_reference, len(source)), config.encoder.batch_size
    chosen = np.linspace(0, len(source), number, endpoint=False).astype(int)
    variables = jax.jit(lambda raw: latents.variables(raw, None))  # of an autoencoder's latents the means
    progress, kept, values = Progress("records", number), [], {}
    for start in range(0, number, size):
        places = [int(i) for i in chosen[start : start + size]]
        batch = loader.collate([source[i] for i in places])
        pixels = batch["image"] if pictured is source else np.stack([pictured[i]["image"] for i in places])
        count = len(batch["label"])
        of_level = variables({name: nearest.pad_rows(batch[name], size) for name in latents.fields})
        for level in config.levels:
            leaves = of_level[level.name]
            for i, leaf in enumerate(leaves if isinstance(leaves, tuple) else (leaves,)):
                if leaf.shape[1:] != pixels.shape[1:]:
                    name = f"{level.name}.{i}" if isinstance(leaves, tuple) else level.name
                    values.setdefault(name, []).append(np.asarray(leaf)[:count])
        kept.append((pixels, batch["label"]))
        progress.update(start + count)
    images, labels = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    values = {name: np.concatenate(parts) for name, parts in values.items()}
    return Representations(chosen, images, labels, values | {"pixels": images})


def find_neighbors(config: Config, found: Representations, queries: np.ndarray) -> list[Neighbors]:
    """The nearest images to those at the places `queries` [Q], by every representation."""
    options, labelled, result = config.evaluate.neighbors, bool(config.data.num_classes), []
    for name, values in found.values.items():
        asked = np.arange(len(values)) if labelled else queries
        progress = Progress(f"distances, {name}", len(asked) * len(values))
        most = max(options.nearest, options.k) if labelled else options.nearest
        distances, places = nearest.nearest_neighbors(values[asked], values, most, asked, progress.update)
        accuracy = None
        if labelled:
            accuracy = nearest.knn_accuracy(places[:, : options.k], found.labels, config.data.num_classes)
            places, distances = places[queries], distances[queries]
        shown = slice(0, options.nearest)
        result.append(Neighbors(name, values.shape[1:], places[:, shown], distances[:, shown], accuracy))
    return result


def neighbors_picture(found: Representations, queries: np.ndarray, results: list[Neighbors], k: int) -> np.ndarray:
    """A block of rows per query, a row per representation: the query, then its nearest images."""
    captions = [describe_neighbors(result, k).replace(": ", "\n") for result in results]
    columns = ["query", *(str(i + 1) for i in range(results[0].places.shape[1]))]
    blocks = []
    for row, query in enumerate(queries):
        shown = np.concatenate([[query, *result.places[row]] for result in results])
        blocks.append(figures.image_grid(found.images[shown], len(columns), None, 2, captions, columns))
    return np.concatenate(blocks)


def describe_neighbors(result: Neighbors, k: int) -> str:
    """'z2x2 2x2x32: 20-NN accuracy 75.3 %', without the accuracy if there are no labels."""
    text = f"{result.name} {'x'.join(map(str, result.shape))}"
    return text if result.accuracy is None else f"{text}: {k}-NN accuracy {100 * result.accuracy:.1f} %"


def check_neighbors(config: Config) -> None:
    """Raises ValueError, before anything is encoded, for data and options that this mode cannot show."""
    options, number = config.evaluate.neighbors, config.evaluate.num_reference
    source = source_kind(config)
    if source.synthetic or source.clips:
        raise ValueError(
            f"config.data.source {config.data.source!r}: --mode=neighbors compares still images; use another source"
        )
    for name, value in options.items():
        if not 1 <= value < number:
            raise ValueError(
                f"config.evaluate.neighbors.{name} {value}: give at least 1 and less than "
                f"config.evaluate.num_reference, {number}"
            )


def run(config: Config, workdir: str) -> None:
    """Writes neighbors.png and neighbors.json to `workdir`, and prints a line for every representation."""
    check_neighbors(config)
    found = collect_representations(config, workdir)
    count, options = len(found.records), config.evaluate.neighbors
    if max(options.values()) >= count:
        raise ValueError(
            f"config.evaluate.neighbors {dict(options)}: there are only {count} images; ask for fewer than that"
        )
    queries = ((np.arange(options.queries) + 0.5) * count / options.queries).astype(int)
    results = find_neighbors(config, found, queries)
    content = {
        "distance": "euclidean",
        "num_images": count,
        "k": options.k,
        "queries": found.records[queries].tolist(),
        "representations": [
            {
                "name": result.name,
                "shape": list(result.shape),
                "accuracy": result.accuracy,
                "nearest": found.records[result.places].tolist(),
                "distances": result.distances.tolist(),
            }
            for result in results
        ],
    }
    paths = [os.path.join(workdir, f"neighbors.{kind}") for kind in ("png", "json")]
    if jax.process_index() == 0:
        figures.save_png(neighbors_picture(found, queries, results, options.k), paths[0])
        atomic_write(paths[1], json.dumps(content, indent=1) + "\n")
        lines = [describe_neighbors(result, options.k) for result in results] + [f"neighbors: {path}" for path in paths]
        print("\n".join(lines))
