"""Folders of image files and prepared TFDS directories, whole and damaged."""

import io
import json
import pathlib
import pickle
import sys

import numpy as np
import pytest
from absl import logging
from helpers.data_sets import class_file
from PIL import Image

from input_pipeline import decoded, loader
from input_pipeline.image_files import ImageFolder, Tfds, TfdsSource
from input_pipeline.transforms import resized


def png(level, height=4, width=3):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def write(root, files):
    """files: path below root -> bytes."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def levels(source):
    """The grey level of each image: which file answered."""
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


@pytest.fixture
def warnings_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda form, *values: lines.append(form % values))
    return lines


def test_class_folders(tmp_path):
    files = {"dog/b.png": png(1), "cat/z.png": png(2), "cat/deep/a.png": png(3), "cat/a.JPG": png(4), ".git/x": b"x"}
    source = ImageFolder(write(tmp_path, files | {"cat/.DS_Store": b"x"})).open()
    assert source.class_names == ("cat", "dog") and source.num_classes == 2 and source.image_shape == (None, None, 3)
    assert levels(source) == [4, 3, 2, 1]  # cat/a.JPG, cat/deep/a.png, cat/z.png, dog/b.png
    assert [int(source[i]["label"]) for i in range(4)] == [0, 0, 0, 1] and source[0]["label"].dtype == np.int32
    assert source[0]["image"].shape == (4, 3, 3) and "caption" not in source[0]
    assert source.describe() == f"image folder {tmp_path}: 4 files, 2 classes"
    assert ImageFolder(tmp_path, channels=1).open()[0]["image"].shape == (4, 3, 1)
    assert source.check() is None
    with pytest.raises(IndexError):
        source[4]


def test_plain_folder(tmp_path):
    source = ImageFolder(write(tmp_path, {"b.png": png(2), "a.png": png(1)})).open()
    assert levels(source) == [1, 2] and source.num_classes == 0 and source[1]["label"] == 0


def test_captions(tmp_path):
    entries = (("x/b.png", "ein Bär"), ("a.png", "a"), ("a.png", "b"))
    lines = [{"file": file, "caption": caption} for file, caption in entries]
    write(tmp_path, {"a.png": png(1), "x/b.png": png(2), "unlisted.png": png(3)})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    source = ImageFolder(tmp_path).open()
    assert levels(source) == [2, 1, 1] and source.num_classes == 0
    assert source.describe() == f"image folder {tmp_path}: 3 files, captions"
    batch = next(loader.in_order(source, 3))
    assert batch["caption"].tolist() == ["ein Bär", "a", "b"] and batch["image"].shape == (3, 4, 3, 3)
    (tmp_path / "captions.jsonl").write_text((tmp_path / "captions.jsonl").read_text().replace('"b"}', '"c"}'))
    assert ImageFolder(tmp_path).open().fingerprint != source.fingerprint


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file": "a.png"', "is not"),
        ('{"file": "a.png"}', "is not"),
        ('["a.png", "a"]', "is not"),
        ('{"file": "a.png", "caption": 3}', "is not"),
        ('{"file": 3, "caption": "a"}', "is not"),
        ('{"file": "a.png", "caption": "half \\ud83d of a pair"}', "is not"),
        ("[" * 100_000, "is not"),
        ('{"file": "/etc/passwd", "caption": "a"}', "names '/etc/passwd', which is not a path below"),
        ('{"file": "x/../../a.png", "caption": "a"}', "names 'x/../../a.png', which is not a path below"),
    ],
)
def test_bad_captions(tmp_path, line, message):
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "a"}\n' + line)
    with pytest.raises(ValueError, match=f"captions.jsonl line 2 {message}") as error:
        ImageFolder(tmp_path).open()
    assert "\n" not in str(error.value)


def test_captions_in_text_files(tmp_path):
    files = {"b/1.png": png(1), "b/1.txt": b" one\n", "a.b.png": png(2), "a.b.txt": "zw\u00f6lf".encode()}
    source = ImageFolder(write(tmp_path, files)).open()
    assert levels(source) == [2, 1] and source.captions == ("zw\u00f6lf", "one") and source.num_classes == 0
    assert source[1]["caption"] == "one"
    first = source.fingerprint
    write(tmp_path, {"b/1.txt": b"tw\xff"})
    assert ImageFolder(tmp_path).open().fingerprint != first and ImageFolder(tmp_path).open().captions[1] == "tw\ufffd"
    write(tmp_path, {"c.png": png(3), "d.txt": b"d", "b/1.jpg": png(1)})
    message = (
        r"holds .txt files, which are captions, but 3 files are without a partner: c.png \(without its .txt\), "
        r"d.txt \(of no other file\), b/1.txt \(of 2 files\); give each one caption"
    )
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path).open()


def test_some_of_the_class_folders(tmp_path):
    files = {"dog/b.png": png(1), "cat/z.png": png(2), "ant/a.png": png(3), "dog/a.png": png(4)}
    source = ImageFolder(write(tmp_path, files), classes=class_file(tmp_path, "dog", "ant")).open()
    assert levels(source) == [3, 4, 1] and [int(source[i]["label"]) for i in range(3)] == [0, 1, 1]
    assert source.class_names == ("ant", "dog") and source.fingerprint != ImageFolder(tmp_path).open().fingerprint
    with pytest.raises(ValueError, match=f"{tmp_path}: 1 of 2 chosen classes are none of its 3: cow; correct"):
        ImageFolder(tmp_path, classes=class_file(tmp_path, "cow", "cat")).open()
    plain = write(tmp_path / "plain", {"a.png": png(1)})
    with pytest.raises(ValueError, match="1 of 1 chosen classes are none of its 0: cat"):
        ImageFolder(plain, classes=class_file(tmp_path, "cat")).open()


def damaged_folder(root):
    """a 1, b truncated, c text, d 4, e a dangling link."""
    write(root, {"a.png": png(1), "b.png": png(2, 40, 40)[:-30], "c.png": b"not an image", "d.png": png(4)})
    (root / "e.png").symlink_to(root / "nowhere.png")
    return root


def test_bad_images_are_refused_by_name(tmp_path):
    source = ImageFolder(damaged_folder(tmp_path)).open()
    with pytest.raises(ValueError) as error:
        source.check()
    message = str(error.value)
    assert message.startswith(f"3 of 5 files in {tmp_path} are not whole images, data.max_bad_images is 0: b.png (")
    assert all(f"{name}.png (" in message for name in "bce") and "d.png" not in message and "\n" not in message


def test_bad_images_are_refused_when_read_without_check(tmp_path):
    source = ImageFolder(damaged_folder(tmp_path)).open()
    assert source[0]["image"][0, 0, 0] == 1
    with pytest.raises(ValueError, match="2 of 5 files .*: b.png .*, e.png .no such file.; repair or remove them"):
        source[1]
    with pytest.raises(ValueError, match="2 of 5 files"):  # nor is it passed over the second time
        source[1]
    two_allowed = ImageFolder(tmp_path, max_bad_images=2).open()
    with pytest.raises(ValueError, match="3 of 5 files .*, data.max_bad_images is 2: b.png .*c.png .*e.png"):
        levels(two_allowed)


def test_what_cannot_be_read_is_no_bad_image(tmp_path, monkeypatch):
    """Records are a function of the index: an error that passes must not make one process take other images."""
    source = ImageFolder(write(tmp_path, {"a.png": png(1), "b.png": png(2)}), max_bad_images=2).open()
    read_bytes = pathlib.Path.read_bytes

    def fails(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pathlib.Path, "read_bytes", fails)
    for read in (lambda: source[0], source.check):
        with pytest.raises(OSError, match=f"Too many open files: '{tmp_path}/a.png'"):
            read()
    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    assert levels(source) == [1, 2]


def test_within_the_limit_the_next_good_image_takes_the_place(tmp_path, warnings_logged):
    damaged_folder(tmp_path)
    checked = ImageFolder(tmp_path, max_bad_images=3).open()
    checked.check()
    assert [line.split()[0] for line in warnings_logged] == ["e.png", "b.png", "c.png"]  # the link, when it is opened
    unchecked = ImageFolder(tmp_path, max_bad_images=3).open()
    for source in (checked, unchecked, pickle.loads(pickle.dumps(checked))):
        assert levels(source) == levels(source) == [1, 4, 4, 4, 1]
    assert len(warnings_logged) == 6  # once for each source that found out by itself


def test_a_replacement_brings_its_own_label_and_caption(tmp_path):
    source = ImageFolder(write(tmp_path, {"cat/a.png": b"", "dog/a.png": png(2)}), max_bad_images=1).open()
    assert [int(source[i]["label"]) for i in range(2)] == [1, 1]
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "cat/a.png", "caption": "a cat"}\n{"file": "dog/a.png", "caption": "a dog"}'
    )
    assert ImageFolder(tmp_path, max_bad_images=1).open()[0]["caption"] == "a dog"


def test_long_lists_of_bad_images_are_cut(tmp_path):
    source = ImageFolder(write(tmp_path, {f"{i:02}.png": b"x" for i in range(13)})).open()
    with pytest.raises(ValueError, match="13 of 13 files .*09.png .* and 3 more; repair") as error:
        source.check()
    assert "10.png" not in str(error.value)
    with pytest.raises(ValueError, match="none of the 13 files in .* is an image"):
        ImageFolder(tmp_path, max_bad_images=13).open()[0]


def test_the_check_does_not_depend_on_threads(tmp_path, monkeypatch):
    found = []
    for threads in (1, 7):
        monkeypatch.setattr(decoded, "CHECK_THREADS", threads)
        monkeypatch.setattr(decoded, "CHECKED_AT_ONCE", threads + 1)
        with pytest.raises(ValueError) as error:
            ImageFolder(damaged_folder(tmp_path / str(threads))).open().check()
        found.append(str(error.value).replace(str(tmp_path / str(threads)), ""))
    assert found[0] == found[1]


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no directory {tmp_path}/no: set config.data.path"):
        ImageFolder(tmp_path / "no").open()
    with pytest.raises(ValueError, match=f"no images in {tmp_path}: set config.data.path"):
        ImageFolder(tmp_path).open()
    with pytest.raises(ValueError, match=r"files beside its class folders, such as README \(2 in all\)"):
        ImageFolder(write(tmp_path, {"cat/a.png": png(1), "README": b"", "z.png": png(1)})).open()


def test_fingerprint_of_a_folder(tmp_path):
    first = ImageFolder(write(tmp_path, {"a/1.png": png(1), "b/1.png": png(2)})).open().fingerprint
    assert ImageFolder(tmp_path).open().fingerprint == first != ImageFolder(tmp_path, channels=1).open().fingerprint
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert ImageFolder(moved).open().fingerprint == first
    (moved / "b" / "1.png").write_bytes(png(2, height=60))
    assert ImageFolder(moved).open().fingerprint != first


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Seven grey images of different heights with two classes, as TFDS writes them; no TensorFlow."""
    import tensorflow_datasets as tfds

    class Seven(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
                "number": np.int64,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(7, 2), "test": self._generate_examples(2, 0)}

        def _generate_examples(self, count, classes):
            for i in range(count):
                label = i % classes if classes else -1
                yield i, {"image": io.BytesIO(png(10 * i, height=4 + i)), "label": label, "number": i}

    builder = Seven(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    assert "tensorflow" not in sys.modules
    return builder.data_path


def test_tfds(prepared):
    source = Tfds(str(prepared), split="train").open()
    records = [source[i] for i in range(len(source))]
    numbers = [int(record["image"][0, 0, 0]) // 10 for record in records]
    assert sorted(numbers) == list(range(7))  # TFDS shuffles as it writes
    assert [int(record["label"]) for record in records] == [number % 2 for number in numbers]
    assert [record["image"].shape for record in records] == [(4 + number, 3, 3) for number in numbers]
    assert records[0].keys() == {"image", "label"} and records[0]["label"].dtype == np.int32
    assert source.class_names == ("even", "odd") and source.num_classes == 2 and source.image_shape == (None, None, 3)
    assert source.describe() == "TFDS seven/1.0.0 (train): 7 images, 2 classes" and source.check() is None
    first = Tfds(prepared, split="train[:3]", channels=1).open()
    assert len(first) == 3 and first[0]["image"].shape[-1] == 1 and first.fingerprint != source.fingerprint
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[2]["image"], records[2]["image"])
    batch = next(loader.in_order(resized(source, 4, "center", 1), 7))
    assert batch["image"].shape == (7, 4, 4, 1) and "tensorflow" not in sys.modules


def test_some_classes_of_tfds(prepared, tmp_path, monkeypatch):
    index = str(tmp_path / "index")
    whole, source = (
        Tfds(prepared, split="train").open(),
        Tfds(prepared, split="train", classes=class_file(tmp_path, "odd"), index_dir=index).open(),
    )
    kept = [i for i in range(7) if whole[i]["label"] == 1]
    assert len(source) == 3 and source.class_names == ("odd",) and source.num_classes == 1
    for i, number in enumerate(kept):
        np.testing.assert_array_equal(source[i]["image"], whole[number]["image"])
        assert source[i]["label"] == 0
    assert source.fingerprint != whole.fingerprint
    monkeypatch.setattr(TfdsSource, "_all_labels", lambda source: pytest.fail("the labels are there"))
    assert (
        len(
            pickle.loads(
                pickle.dumps(
                    Tfds(prepared, split="train", classes=class_file(tmp_path, "even", "odd"), index_dir=index).open()
                )
            )
        )
        == 7
    )
    with pytest.raises(ValueError, match="chosen classes are none of its 2: prime; correct data.classes"):
        Tfds(prepared, split="train", classes=class_file(tmp_path, "prime"), index_dir=index).open()


def copy_of(prepared, to, name, old, new):
    """The prepared directory with one text replaced, once, in one of its files."""
    to.mkdir()
    for file in prepared.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    text = (to / name).read_text()
    assert old in text
    (to / name).write_text(text.replace(old, new, 1))
    return to


def test_tfds_that_cannot_be_read(prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a data set prepared by TFDS .* config.data.path"):
        Tfds(tmp_path, split="train").open()
    with pytest.raises(ValueError, match="Unknown split 'val'. Should be one of"):
        Tfds(prepared, split="val").open()
    with pytest.raises(ValueError, match=r"TFDS seven/1.0.0 \(test\): label -1 of example 1 is out of range"):
        Tfds(prepared, split="test").open()[1]
    records = copy_of(prepared, tmp_path / "a", "dataset_info.json", '"array_record"', '"tfrecord"')
    with pytest.raises(ValueError, match="prepared as tfrecord, which needs TensorFlow .* file_format='array_record'"):
        Tfds(records, split="train").open()
    renamed = copy_of(prepared, tmp_path / "b", "features.json", '"image":', '"picture":')
    with pytest.raises(ValueError, match="feature 'image' must be of type Image, found None") as error:
        Tfds(renamed, split="train").open()
    assert "\n" not in str(error.value)


def test_a_bad_image_of_tfds_is_named(prepared, monkeypatch):
    source = Tfds(prepared, split="train").open()
    monkeypatch.setattr(source, "_data", [{"image": png(3)[:-30], "label": 0}])
    message = r"^TFDS seven/1.0.0 \(train\): example 0 is not a whole image \(.*\): prepare the data set again, a bad"
    with pytest.raises(ValueError, match=message) as error:
        source[0]
    assert "\n" not in str(error.value)


def test_fingerprint_of_tfds(prepared, tmp_path):
    copied = copy_of(prepared, tmp_path / "a", "dataset_info.json", "", "")
    first = Tfds(prepared, split="train").open().fingerprint
    assert Tfds(copied, split="train").open().fingerprint == first != Tfds(prepared, split="test").open().fingerprint
    assert Tfds(prepared, split="train", channels=1).open().fingerprint != first
    with next(copied.glob("*train*")).open("ab") as shard:
        shard.write(b"more")
    assert Tfds(copied, split="train").open().fingerprint != first


def test_tfds_without_labels(prepared, tmp_path):
    unlabelled = copy_of(prepared, tmp_path / "a", "features.json", '"label":', '"kind":')
    source = Tfds(unlabelled, split="train").open()
    assert source.num_classes == 0 and source[1]["label"] == 0
    numbered = copy_of(unlabelled, tmp_path / "b", "features.json", '"number":', '"label":')
    with pytest.raises(ValueError, match="feature 'label' must be of type ClassLabel, found Tensor"):
        Tfds(numbered, split="train").open()
