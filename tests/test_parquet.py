"""Parquet files of images with captions or labels, as Hugging Face's data sets are kept."""

import json
import pickle
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tar_files import jpeg, levels

from input_pipeline import loader, parquet
from input_pipeline.parquet import Parquet

LEVELS = (10, 20, 30, 40, 50)


def structs(levels):
    return [{"bytes": jpeg(level), "path": f"{level}.jpg"} for level in levels]


def write(folder, name, columns, group=2, names=()):
    """A file of row groups of `group` rows; names: of the classes, as Hugging Face notes them."""
    table = pyarrow.table(columns)
    if names:
        note = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(table, folder / name, row_group_size=group)
    return folder


def close(found, expected):
    return np.abs(np.array(found) - expected).max() <= 1  # JPEG


@pytest.fixture
def captioned(tmp_path):
    write(tmp_path, "data/train-1.parquet", {"image": structs(LEVELS[3:]), "caption": ["d", "e"]})
    return write(tmp_path, "data/train-0.parquet", {"image": structs(LEVELS[:3]), "caption": ["a", "b", "ü"]})


def test_captions(captioned):
    source = Parquet(captioned)
    assert close(levels(source), LEVELS) and source.captions == ("a", "b", "ü", "d", "e") and source.num_classes == 0
    assert source[2]["caption"] == "ü" and source[2]["image"].shape == (4, 5, 3)
    assert source.shard_ends.tolist() == [2, 3, 5] and source.image_shape == (None, None, 3)
    assert source.describe() == f"2 Parquet files in {captioned}: 5 images, captions" and source.check() is None
    batch = next(loader.batches(source, seed=0, batch_size=5, threads=0, shard_window=2))
    assert sorted(batch["caption"]) == sorted(source.captions)
    grey = pickle.loads(pickle.dumps(Parquet(captioned, channels=1)))
    assert close(levels(grey), LEVELS) and grey.fingerprint != source.fingerprint == Parquet(captioned).fingerprint


def test_labels_and_bytes_in_columns_of_other_names(tmp_path):
    write(tmp_path, "a.parquet", {"img": [jpeg(level) for level in LEVELS], "fine": [1, 0, 2, 1, 0]})
    source = Parquet(tmp_path, image_key="img", label_key="fine")
    assert close(levels(source), LEVELS) and [int(source[i]["label"]) for i in range(5)] == [1, 0, 2, 1, 0]
    assert source.class_names == ("0", "1", "2") and source.captions is None and "caption" not in source[0]
    some = Parquet(tmp_path, image_key="img", label_key="fine", classes=("2", "0"))
    assert close(levels(some), [20, 30, 50]) and [int(some[i]["label"]) for i in range(3)] == [0, 1, 0]
    assert some.shard_ends.tolist() == [1, 2, 3] and some.fingerprint != source.fingerprint
    with pytest.raises(ValueError, match="1 of 1 chosen classes are none of its 3: 7; correct data.classes"):
        Parquet(tmp_path, image_key="img", label_key="fine", classes=("7",))


def test_names_of_classes_and_several_captions(tmp_path):
    columns = {"image": structs(LEVELS[:2]), "label": [1, 1], "caption": [["a", "b"], ["c"]]}
    source = Parquet(write(tmp_path, "a.parquet", columns, names=("cat", "dog")))
    assert source.class_names == ("cat", "dog") and source[0]["label"] == 1
    assert source.captions == (("a", "b"), ("c",))
    assert Parquet(tmp_path, classes=("dog",)).captions == source.captions


def test_only_a_few_row_groups_are_kept(tmp_path, monkeypatch):
    write(tmp_path, "a.parquet", {"image": structs(LEVELS * 2), "caption": ["x"] * 10}, group=1)
    source, reads = Parquet(tmp_path), []
    read = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda file, i, **how: reads.append(i) or read(file, i, **how)
    )
    for index in (0, 1, 0, 2, 3, 0, 4, 0, 1):  # 1 is the one not used for longest when 4 comes
        source[index]
    assert reads == [0, 1, 2, 3, 4, 1] and len(source._kept) == parquet.GROUPS_KEPT


def test_bad_images(tmp_path):
    rows = [{"bytes": None, "path": "a.jpg"}, None, {"bytes": jpeg(9)[:-40], "path": ""}, *structs([90])]
    write(tmp_path, "a.parquet", {"image": rows, "caption": list("abcd")})
    message = r"3 of 4 rows in .*: a.parquet row 0 of group 0 \(no bytes\), a.parquet row 1 of group 0 \(no bytes\), a"
    with pytest.raises(ValueError, match=message):
        Parquet(tmp_path).check()
    assert Parquet(tmp_path, max_bad_images=3)[0]["caption"] == "d"


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"picture": [b""], "caption": ["a"]}, "no column data.image_key 'image', only picture, caption: set the"),
        ({"image": [b""], "text": ["a"]}, "no column data.caption_key 'caption' nor data.label_key 'label', only"),
        ({"image": [b"", b""], "label": [0, -1]}, "1 of 2 labels in column 'label' are not in 0 to .*, such as -1"),
        ({"image": [b""], "label": [None]}, "1 of 1 labels in column 'label' are not in 0 to .*, such as None"),
        ({"image": pyarrow.array([], pyarrow.binary()), "label": pyarrow.array([], pyarrow.int64())}, "no rows in the"),
    ],
)
def test_other_columns(tmp_path, columns, message):
    write(tmp_path, "a.parquet", columns)
    with pytest.raises(ValueError, match=message) as error:
        Parquet(tmp_path)
    assert "\n" not in str(error.value)


def test_labels_beyond_the_names_and_files_that_differ(tmp_path):
    write(tmp_path, "a.parquet", {"image": structs([1]), "label": [2]}, names=("cat", "dog"))
    with pytest.raises(ValueError, match="labels in column 'label' are not in 0 to 1, such as 2"):
        Parquet(tmp_path)
    write(tmp_path, "b.parquet", {"image": structs([1]), "caption": ["a"]})
    with pytest.raises(ValueError, match=r"a.parquet has no column 'caption', others have \(1 such files\): remove it"):
        Parquet(tmp_path)


def test_damaged_files(captioned):
    file = captioned / "data" / "train-1.parquet"
    whole = file.read_bytes()
    for data in (whole[:-20], whole[:100], b"", b"<html>"):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"{file} is not a whole Parquet file .*: copy it again") as error:
            Parquet(captioned)
        assert "\n" not in str(error.value)


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no directory .*/no: set config.data.path to the folder of"):
        Parquet(tmp_path / "no")
    with pytest.raises(ValueError, match=r"no \*.parquet in .*: set config.data.path to their folder"):
        Parquet(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="Parquet is read by a package that is absent: pip install pyarrow"):
        Parquet(tmp_path)
