"""nested/modes/neighbors.py: the mode on a toy encoding, against distances and votes by definition; what it refuses."""

import json

import jax
import numpy as np
import pytest
from helpers import toy_encoding as toy
from helpers.neighbors import by_definition
from helpers.toy_encoding import level as level_source
from PIL import Image

from configs import common
from input_pipeline import latent_records as records
from input_pipeline.in_memory import ImagesInMemory
from nested.latents.store import latents_of_images, read_latents
from nested.modes import neighbors


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """(records, Latents) of 44 random images with 4 labels: z3 1x1x4, z2 2x3x3, z1 4x4x12."""
    directory = tmp_path_factory.mktemp("latents")
    toy.run(directory)
    result = read_latents(directory, toy.LEVELS)
    return records.LatentRecords(directory, ("label", *result.fields)), result


def make_config(levels, num_classes=4, **options):
    config = common.default()
    net = common.uvit(width=16, depth=1, num_heads=2)
    config.data.num_classes = num_classes
    config.levels = tuple(common.level(level.name, level.source, level.shape, 1, backbone=net) for level in levels)
    config.encoder.batch_size = 16
    config.evaluate.update(num_reference=40, neighbors=dict(queries=3, nearest=5, k=7) | options)
    return config


def values_by_hand(encoded, chosen):
    """{representation: [N, ...]} of the chosen records, in one batch."""
    source, made = encoded
    rows = [source[int(i)] for i in chosen]
    raw = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    variables = {name: np.asarray(z) for name, z in made.variables(raw, jax.random.key(0)).items()}
    return {name: variables[name] for name in ("z3", "z2", "z1")} | {"pixels": raw["image"]}, raw["label"]


@pytest.mark.parametrize("num_classes", [4, 0])
def test_the_mode_finds_shows_and_tells_the_neighbours(encoded, monkeypatch, tmp_path, capsys, num_classes):
    monkeypatch.setattr(neighbors, "open_latents", lambda data, workdir: encoded)
    neighbors.run(make_config(toy.LEVELS, num_classes), str(tmp_path))
    content = json.loads((tmp_path / "neighbors.json").read_text())
    chosen = np.linspace(0, 44, 40, endpoint=False).astype(int)
    places = np.array([6, 20, 33])  # (0, 1, 2 and a half) thirds of 40
    assert (content["num_images"], content["k"], content["queries"]) == (40, 7, chosen[places].tolist())
    values, labels = values_by_hand(encoded, chosen)
    assert [said["name"] for said in content["representations"]] == list(values)
    lines = []
    for said, (name, x) in zip(content["representations"], values.items(), strict=True):
        distances, nearest = by_definition(x, x, 7, own=np.arange(40))
        assert said["nearest"] == chosen[nearest[places, :5]].tolist()
        np.testing.assert_allclose(said["distances"], distances[places, :5], rtol=1e-5)
        votes = [max(row, key=row.count) for row in labels[nearest].tolist()]
        accuracy = np.mean(votes == labels) if num_classes else None
        assert said["accuracy"] == accuracy and said["shape"] == list(x.shape[1:])
        shown = f"{name} {'x'.join(map(str, x.shape[1:]))}"
        lines.append(f"{shown}: 7-NN accuracy {100 * accuracy:.1f} %" if num_classes else shown)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [*lines, f"neighbors: {tmp_path}/neighbors.png", f"neighbors: {tmp_path}/neighbors.json"]


def test_the_picture_has_a_block_of_rows_for_each_query(encoded, monkeypatch, tmp_path):
    monkeypatch.setattr(neighbors, "open_latents", lambda data, workdir: encoded)
    neighbors.run(make_config(toy.LEVELS, num_classes=0, nearest=2), str(tmp_path))
    picture = np.asarray(Image.open(tmp_path / "neighbors.png"))
    content = json.loads((tmp_path / "neighbors.json").read_text())
    source, scale, cell = encoded[0], 8, 64 + 2
    block = picture.shape[0] // 3
    left = picture.shape[1] - 3 * cell  # after the captions
    for number, query in enumerate(content["queries"]):
        top = (number + 1) * block - 4 * cell
        for row, said in enumerate(content["representations"]):
            for column, i in enumerate([query, *said["nearest"][number]]):
                y, x = top + row * cell, left + column * cell
                shown = picture[y : y + 64 : scale, x : x + 64 : scale]
                np.testing.assert_array_equal(shown, source[i]["image"])


def test_resolutions_are_compared_one_by_one_and_whole_images_once(monkeypatch, tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    source = ImagesInMemory(images, random.integers(0, 2, 50), 2, (), "toy")
    levels = (level_source("y", "pixels", (2, 2, 1)), level_source("x", "pixels", ((4, 4, 1), (8, 8, 1))))
    made = latents_of_images(levels, (8, 8, 1))
    monkeypatch.setattr(neighbors, "open_latents", lambda data, workdir: (source, made))
    found = neighbors.collect_representations(make_config(levels, num_classes=2), str(tmp_path))
    assert {name: x.shape for name, x in found.values.items()} == {
        "y": (40, 2, 2, 1), "x.0": (40, 4, 4, 1), "pixels": (40, 8, 8, 1),
    }  # fmt: skip
    np.testing.assert_array_equal(found.images, images[found.records])
    np.testing.assert_array_equal(found.labels, [source[i]["label"] for i in found.records])
    average = images[found.records].reshape(40, 2, 4, 2, 4, 1).mean((2, 4)) / 127.5 - 1
    np.testing.assert_allclose(found.values["y"], average, atol=1e-6)


@pytest.mark.parametrize("source", ["synthetic", "clip_folder"])
def test_what_is_not_still_images_is_refused(source):
    config = make_config(toy.LEVELS)
    config.data.source = source
    with pytest.raises(ValueError, match=f"^config.data.source '{source}': --mode=neighbors compares still im"):
        neighbors.run(config, "unused")


@pytest.mark.parametrize("name, value", [("queries", 0), ("nearest", 40), ("k", 41)])
def test_options_out_of_range_are_refused(name, value):
    message = f"^config.evaluate.neighbors.{name} {value}: give at least 1 and less than config.evaluate.num_ref.*, 40$"
    with pytest.raises(ValueError, match=message):
        neighbors.run(make_config(toy.LEVELS, **{name: value}), "unused")


def test_fewer_images_than_neighbours_are_refused(encoded, monkeypatch):
    monkeypatch.setattr(neighbors, "open_latents", lambda data, workdir: encoded)
    config = make_config(toy.LEVELS, k=44)
    config.evaluate.num_reference = 1000
    with pytest.raises(ValueError, match="there are only 44 images; ask for fewer than that"):
        neighbors.run(config, "unused")
