"""nested/build/sources.py: every source from its config, and options that a source does not read."""

import json
import types

import numpy as np
import pytest
from helpers.data_sets import animation, open_images, parquet_images, write_coco, write_imagenet_train, write_parquet
from helpers.refusals import refused
from helpers.tar_files import jpeg, levels, tar
from helpers.tiny import with_changes

from configs import coco, imagenet, mdm
from input_pipeline import captions as text
from nested.build import sources as build_sources
from nested.build.data import build_data
from nested.build.options import declared
from nested.build.parts import SOURCES
from nested.modes import encode, evaluate


def with_source(source, path, **data):
    data = {"path": str(path), "index_dir": "", **data}
    if "index_dir" in declared(SOURCES[source]):
        data["index_dir"] = str(path / "index")
    return with_changes(("data.source", source), ("data.num_classes", 0), *((f"data.{k}", v) for k, v in data.items()))


def test_imagenet_tars(tmp_path):
    write_imagenet_train(tmp_path)
    (tmp_path / "subset.txt").write_text("n02119789\n\n n01440764 \n")
    config = with_source("imagenet_tar", tmp_path, num_classes=3, image_size=2)
    source = open_images(config)
    assert len(source) == 4 and source.class_names[0] == "n01440764" and source[0]["image"].shape == (2, 2, 3)
    config.data.update(classes=str(tmp_path / "subset.txt"), num_classes=2)
    assert [int(record["label"]) for record in map(open_images(config).__getitem__, range(3))] == [0, 1, 1]
    (tmp_path / "subset.txt").write_text("\n")
    refused(open_images, config, match="subset.txt (config.data.classes): no names of classes; write one per")


def test_webdataset_tars(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar({"a.jpg": jpeg(9), "a.json": b'{"alt": "x"}', "b.jpg": b"", "b.txt": b"y"}))
    config = with_source("webdataset", tmp_path, caption_key="alt", max_bad_images=1, channels=1)
    assert open_images(config)[0]["image"].shape == (4, 5, 1)
    assert build_data(config).some_captions(9) == ("x", "y")
    (tmp_path / "1.tar").write_bytes(tar({"a.webp": animation(3), "a.txt": b"clip", "b.gif": b"", "b.txt": b"y"}))
    (tmp_path / "0.tar").unlink()
    source = open_images(with_source("webdataset_clips", tmp_path, frames=3, frame_stride=2))
    assert source[0]["image"][:, 0, 0, 0].tolist() == [3, 5, 7] and source.image_shape == (3, None, None, 3)


def test_parquet_files(tmp_path):
    write_parquet(tmp_path, "a.parquet", {"img": parquet_images([8, 90]), "text": ["a", "b"], "fine": [1, 0]})
    config = with_source("parquet", tmp_path, image_key="img", caption_key="text", label_key="fine", num_classes=2)
    source = open_images(config)
    assert source.captions == ("a", "b") and [int(source[i]["label"]) for i in range(2)] == [1, 0]


def test_coco_takes_the_first_captions_where_none_is_drawn(tmp_path):
    write_coco(tmp_path)
    config = with_source("coco", tmp_path, split="train2014", image_size=4, crop="center_lanczos")
    assert build_data(config).some_captions(30_000) == ("a dog", "a cat", "a cow")
    assert build_data(config).some_captions(1) == ("a dog",)
    assert open_images(config).describe().endswith("center_lanczos to 4x4x3")


def test_samples_are_scored_against_another_split(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "v.jpg").write_bytes(jpeg(200))
    content = {
        "images": [{"id": 1, "file_name": "v.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a valley"}],
    }
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    config = with_source("coco", tmp_path, split="train2014", image_size=4)
    run = open_images(config)
    assert evaluate.scored_against(config, run) == (config, run)
    config.evaluate.split = "val2014"
    other, source = evaluate.scored_against(config, run)
    assert build_data(other).some_captions(5) == ("a valley",) and abs(levels(source)[0] - 200) <= 1
    assert config.data.split == "train2014"
    config.evaluate.num_samples = config.evaluate.num_reference = 2
    seen = []

    def reference(source, encoder, number, size, cache_dir):
        seen.append(source.describe())
        return np.eye(3, dtype=np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "reference_features", reference)
        patch.setattr(evaluate, "load_score_encoder", lambda config: None)
        evaluate.build_scorer(config, run, "")
    assert seen == [source.describe()] and "val2014" in seen[0]


@pytest.mark.parametrize(
    "source, option, value, readers",
    [
        ("digits", "path", "/data", "idx, image_folder, clip_folder, tfds"),
        ("image_folder", "split", "val", "idx, tfds, imagenet_tar, coco"),
        ("clip_folder", "classes", "names.txt", "image_folder, tfds, imagenet_tar, parquet"),
        ("image_folder", "frames", 1, "clip_folder, webdataset_clips"),
        ("webdataset", "frame_stride", 2, "clip_folder, webdataset_clips"),
        ("tfds", "max_bad_images", 3, "image_folder, clip_folder"),
        ("coco", "index_dir", "/tmp", "tfds, imagenet_tar, webdataset, webdataset_clips"),
        ("webdataset", "image_key", "jpg", "parquet"),
        ("coco", "caption_key", "alt", "webdataset, webdataset_clips, parquet"),
        ("tfds", "label_key", "fine", "parquet"),
        ("digits", "num_examples", 5, "synthetic"),
    ],
)
def test_options_that_a_source_does_not_read_are_refused(source, option, value, readers):
    config = with_changes(("data.source", source), (f"data.{option}", value))
    message = f"config.data.{option} is {value!r}, but {source!r} does not read it, only {readers}"
    refused(open_images, config, match=message)


def test_options_that_random_latents_do_not_read_are_refused():
    config = with_changes(("data.source", "synthetic"), ("data.num_examples", 5))
    assert build_sources.build_source(config).num_examples == 5
    refused(build_sources.build_images, config, match="config.data.source 'synthetic' has no images")
    config.data.path = "/data"
    refused(build_sources.build_source, config, match="config.data.path is '/data', but 'synthetic' does not read it")
    for module in (coco, imagenet, mdm):
        assert build_sources.build_source(module.get_config("synthetic")).synthetic


def test_the_window_of_parquet_is_the_buffer(tmp_path):
    write_parquet(tmp_path, "a.parquet", {"image": parquet_images([8] * 9), "label": [0] * 9}, group=1)
    config = with_source("parquet", tmp_path, num_classes=1)
    kept = open_images(config)._groups_kept
    config.data.update(shuffle="shards", shuffle_buffer=6)
    assert open_images(config)._groups_kept > kept


def test_crops():
    config = with_changes(("data.crop", "stretch"))
    refused(open_images, config, match="config.data: crop is 'stretch' but image_size is 0, so that nothing")
    small = with_changes(("data.small_images", "refuse"))
    refused(open_images, small, match="config.data: small_images is 'refuse' but image_size is 0, so that")
    config.data.image_size = small.data.image_size = 4
    (stretch,), (refuse,) = open_images(config).maps, open_images(small).maps
    assert stretch.crop == "stretch" and refuse.small == "refuse"
    config.data.crop = "middle"
    refused(open_images, config, match="config.data.crop: 'middle' given; choose from 'center', 'center_lanczos'")


def test_the_order_of_training():
    assert build_sources.shard_window(with_changes()) == 0
    config = with_changes(("data.shuffle", "shards"), ("data.shuffle_buffer", 500))
    assert build_sources.shard_window(config) == 500
    for changes in ([("data.shuffle", "shards")], [("data.shuffle_buffer", 5)]):
        refused(
            build_sources.shard_window, with_changes(*changes), match="'shards' needs a number of records to shuffle"
        )
    refused(build_sources.shard_window, with_changes(("data.shuffle", "no")), match="config.data.shuffle: 'no' given;")


def test_every_caption_of_coco_is_stored(tmp_path, monkeypatch):
    """The texts of an image are all encoded, so that training may draw any of them."""
    write_coco(tmp_path)
    config = with_source("coco", tmp_path, split="train2014", image_size=4)
    stored = []
    monkeypatch.setattr(encode.text_store, "store_captions", lambda encoder, texts, *how: stored.extend(texts))
    monkeypatch.setattr(text, "with_stored_text", lambda source, *how: source)
    config.text.update(encoder="minilm", stored=True)
    loaded = types.SimpleNamespace(fingerprint="f")
    encode.with_text(build_data(config), open_images(config), ("image",), loaded, str(tmp_path))
    assert sorted(stored) == ["a cat", "a cow", "a dog", "ein Hund", "eine Kuh", "some dog"]


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"synthetic", "digits"}))
def test_building_a_source_reads_nothing(source, tmp_path):
    config = with_source(source, tmp_path / "absent", image_size=8)
    images = build_sources.build_images(config)
    assert images.source == build_sources.build_source(config) and images.source.path == config.data.path
    assert images.source.clips == ("clip" in source) and not images.source.synthetic
    with pytest.raises((FileNotFoundError, ValueError)):
        images.open()
