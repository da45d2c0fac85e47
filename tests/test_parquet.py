"""Parquet files of images with captions or labels, as Hugging Face's data sets are kept."""

import pickle
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.data_sets import class_file, parquet_images, write_parquet
from helpers.tar_files import jpeg, levels

from input_pipeline import captions as text
from input_pipeline import loader, parquet
from input_pipeline.decoded import Texts
from input_pipeline.parquet import Parquet

LEVELS = (10, 20, 30, 40, 50)


def close(found, expected):
    return np.abs(np.array(found) - expected).max() <= 1  # JPEG


@pytest.fixture
def captioned(tmp_path):
    write_parquet(tmp_path, "data/train-1.parquet", {"image": parquet_images(LEVELS[3:]), "caption": ["d", "e"]})
    return write_parquet(
        tmp_path, "data/train-0.parquet", {"image": parquet_images(LEVELS[:3]), "caption": ["a", "b", "ü"]}
    )


def test_captions(captioned):
    source = Parquet(captioned).open()
    assert close(levels(source), LEVELS) and source.captions == ("a", "b", "ü", "d", "e") and source.num_classes == 0
    assert source[2]["caption"] == "ü" and source[2]["image"].shape == (4, 5, 3)
    assert source.shard_ends.tolist() == [2, 3, 5] and source.image_shape == (None, None, 3)
    assert source.describe() == f"2 Parquet files in {captioned}: 5 images, captions" and source.check() is None
    batch = next(loader.batches(source, seed=0, batch_size=5, threads=0, shard_window=2))
    assert sorted(batch["caption"]) == sorted(source.captions)
    grey = pickle.loads(pickle.dumps(Parquet(captioned, channels=1).open()))
    assert (
        close(levels(grey), LEVELS) and grey.fingerprint != source.fingerprint == Parquet(captioned).open().fingerprint
    )


def test_labels_and_bytes_in_columns_of_other_names(tmp_path):
    write_parquet(tmp_path, "a.parquet", {"img": [jpeg(level) for level in LEVELS], "fine": [1, 0, 2, 1, 0]})
    source = Parquet(tmp_path, image_key="img", label_key="fine").open()
    assert close(levels(source), LEVELS) and [int(source[i]["label"]) for i in range(5)] == [1, 0, 2, 1, 0]
    assert source.class_names == ("0", "1", "2") and source.captions is None and "caption" not in source[0]
    some = Parquet(tmp_path, image_key="img", label_key="fine", classes=class_file(tmp_path, "2", "0")).open()
    assert close(levels(some), [20, 30, 50]) and [int(some[i]["label"]) for i in range(3)] == [0, 1, 0]
    assert some.shard_ends.tolist() == [1, 2, 3] and some.fingerprint != source.fingerprint
    with pytest.raises(ValueError, match="1 of 1 chosen classes are none of its 3: 7; correct data.classes"):
        Parquet(tmp_path, image_key="img", label_key="fine", classes=class_file(tmp_path, "7")).open()


def test_names_of_classes_and_several_captions(tmp_path):
    columns = {"image": parquet_images(LEVELS[:2]), "label": [1, 1], "caption": [["a", "b"], ["c"]]}
    source = Parquet(write_parquet(tmp_path, "a.parquet", columns, names=("cat", "dog"))).open()
    assert source.class_names == ("cat", "dog") and source[0]["label"] == 1
    assert source.captions == (("a", "b"), ("c",))
    assert Parquet(tmp_path, classes=class_file(tmp_path, "dog")).open().captions == source.captions


def test_only_a_few_row_groups_are_kept(tmp_path, monkeypatch):
    write_parquet(tmp_path, "a.parquet", {"image": parquet_images(LEVELS * 2), "caption": ["x"] * 10}, group=1)
    source, reads = Parquet(tmp_path).open(), []
    read = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda file, i, **how: reads.append(i) or read(file, i, **how)
    )
    for index in (0, 1, 0, 2, 3, 0, 4, 0, 1):  # 1 is the one not used for longest when 4 comes
        source[index]
    assert reads == [0, 1, 2, 3, 4, 1] and len(source._kept) == parquet.GROUPS_KEPT


def test_every_row_group_of_a_window_is_kept(tmp_path, monkeypatch):
    """In the order of shards a group is read once an epoch, or twice where windows meet, whatever sizes groups have."""
    for number, group in enumerate((1, 2, 3, 5)):
        rows = 7 * group
        columns = {"image": [jpeg(9)] * rows, "label": [i % 2 for i in range(rows)]}
        write_parquet(tmp_path, f"{number}.parquet", columns, group=group)
    reads = []
    read = parquet._read_group
    monkeypatch.setattr(parquet, "_read_group", lambda *where: reads.append(where[:2]) or read(*where))
    for options in ({}, {"classes": class_file(tmp_path, "1")}):  # fewer images of a group: more groups in a window
        sources = {window: Parquet(tmp_path, window=window, **options).open() for window in (0, 20)}
        for window, source in sources.items():
            reads.clear()
            order = loader.ShardOrder(source.shard_ends, seed=0, window=20, epochs=1)
            for position in range(len(source)):
                source.data(order[position])
            groups, windows = int((np.diff(source.shard_ends, prepend=0) > 0).sum()), -(-len(source) // 20)
            assert len(set(reads)) == groups
            assert (len(reads) <= groups + windows - 1) == (window == 20)
        pickled = pickle.loads(pickle.dumps(sources[20]))
        assert pickled._groups_kept == sources[20]._groups_kept < 28 and sources[0]._groups_kept == parquet.GROUPS_KEPT


def test_a_group_that_cannot_be_read_is_no_bad_image(captioned, monkeypatch):
    source = Parquet(captioned, max_bad_images=5).open()
    file = captioned / "data" / "train-1.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=f"^{file}: row group 0 cannot be read .*: copy it again$") as error:
        source[3]
    assert "\n" not in str(error.value)
    file.write_bytes(whole)
    assert close(levels(source), LEVELS)


def test_bad_images(tmp_path):
    rows = [{"bytes": None, "path": "a.jpg"}, None, {"bytes": jpeg(9)[:-40], "path": ""}, *parquet_images([90])]
    write_parquet(tmp_path, "a.parquet", {"image": rows, "caption": list("abcd")})
    message = r"3 of 4 rows in .*: a.parquet row 0 of group 0 \(no bytes\), a.parquet row 1 of group 0 \(no bytes\), a"
    with pytest.raises(ValueError, match=message):
        Parquet(tmp_path).open().check()
    assert Parquet(tmp_path, max_bad_images=3).open()[0]["caption"] == "d"


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"picture": [b""], "caption": ["a"]}, "no column data.image_key 'image', only picture, caption: set the"),
        ({"image": [b""], "text": ["a"]}, "no column data.caption_key 'caption' nor data.label_key 'label', only"),
        ({"image": ["/etc/passwd"], "label": [0]}, "data.image_key 'image' is string, expected bytes, or structs with"),
        ({"image": [{"path": "a.jpg"}], "label": [0]}, "data.image_key 'image' is struct<path: string>, expected"),
        ({"image": [b""], "caption": [7]}, "a.parquet: column data.caption_key 'caption' is int64, expected texts, or"),
        ({"image": [b""], "caption": [[7]]}, "data.caption_key 'caption' is list<.*: int64>, expected texts, or lists"),
        ({"image": [b""], "label": ["cat"]}, "data.label_key 'label' is string, expected integers: set another column"),
        ({"image": [b"", b""], "label": [0, -1]}, "1 of 2 labels in column 'label' are not in 0 to .*, such as -1"),
        ({"image": [b""], "label": [None]}, "1 of 1 labels in column 'label' are not in 0 to .*, such as None"),
        ({"image": pyarrow.array([], pyarrow.binary()), "label": pyarrow.array([], pyarrow.int64())}, "no rows in the"),
    ],
)
def test_other_columns(tmp_path, columns, message):
    write_parquet(tmp_path, "a.parquet", columns)
    with pytest.raises(ValueError, match=message) as error:
        Parquet(tmp_path).open()
    assert "\n" not in str(error.value)


def test_notes_of_hugging_face(tmp_path):
    table = pyarrow.table({"image": [jpeg(9)], "label": [0]})
    notes = {'{"info": null}': ("0",), "[]": ("0",), '{"info": {"features": {"label": {"names": "cat"}}}}': ("0",)}
    for note, names in notes.items():
        pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": note}), tmp_path / "a.parquet")
        assert Parquet(tmp_path).open().class_names == names
    for note in ("{", "[" * 100_000):
        pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": note}), tmp_path / "a.parquet")
        with pytest.raises(
            ValueError, match=f"{tmp_path}/a.parquet: its metadata of Hugging Face are not JSON .*: write"
        ):
            Parquet(tmp_path).open()


def test_captions_that_are_null_are_named_before_the_first_step(tmp_path):
    source = Parquet(
        write_parquet(tmp_path, "a.parquet", {"image": parquet_images(LEVELS[:3]), "caption": ["a", None, "c"]})
    ).open()
    assert isinstance(source._captions, Texts) and source.captions == ("a", "", "c")
    with pytest.raises(ValueError, match="1 of 3 examples have no caption or an empty one, such as 1: give"):
        text.captions(source)


def test_labels_beyond_the_names_and_files_that_differ(tmp_path):
    write_parquet(tmp_path, "a.parquet", {"image": parquet_images([1]), "label": [2]}, names=("cat", "dog"))
    with pytest.raises(ValueError, match="labels in column 'label' are not in 0 to 1, such as 2"):
        Parquet(tmp_path).open()
    write_parquet(tmp_path, "b.parquet", {"image": parquet_images([1]), "caption": ["a"]})
    with pytest.raises(ValueError, match=r"a.parquet has no column 'caption', others have \(1 such files\): remove it"):
        Parquet(tmp_path).open()


def test_damaged_files(captioned):
    file = captioned / "data" / "train-1.parquet"
    whole = file.read_bytes()
    for data in (whole[:-20], whole[:100], b"", b"<html>"):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"{file} is not a whole Parquet file .*: copy it again") as error:
            Parquet(captioned).open()
        assert "\n" not in str(error.value)


def test_captions_that_are_not_utf8(tmp_path):
    ends = pyarrow.array([0, 1], pyarrow.int32()).buffers()[1]
    latin = pyarrow.StringArray.from_buffers(1, ends, pyarrow.py_buffer(b"\xfc"))
    write_parquet(tmp_path, "a.parquet", {"image": parquet_images([1]), "caption": latin})
    with pytest.raises(ValueError, match="a.parquet is not a whole Parquet file .'utf-8' codec can't decode"):
        Parquet(tmp_path).open()


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no directory .*/no: set config.data.path to the folder of"):
        Parquet(tmp_path / "no").open()
    with pytest.raises(ValueError, match=r"no \*.parquet in .*: set config.data.path to their folder"):
        Parquet(tmp_path).open()
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match="Parquet files are read by pyarrow, which is not installed: pip install pyarrow"
    ):
        Parquet(tmp_path).open()
