"""What sources of files have in common; bad examples are tested with each of them (test_image_files.py)."""

import pickle

import numpy as np
import pytest

from input_pipeline.decoded import Texts, choose_classes, is_text, read_class_names, some


def test_texts_as_one_array():
    texts = ["", "ein Bär", "a", ""]
    packed = pickle.loads(pickle.dumps(Texts.encode(iter(texts))))
    assert list(packed) == texts and packed[1] == "ein Bär" and len(packed) == 4
    assert list(Texts.encode([])) == [] == list(Texts.joined([])) and Texts.joined([]).ends.dtype == np.int64
    assert list(Texts.joined([Texts.encode(texts), Texts.encode([]), Texts.encode(["bü"])])) == [*texts, "bü"]


def test_texts_that_utf8_cannot_hold():
    assert is_text("ein Bär?") and is_text("\U0001f600") and not is_text("\ud83d") and not is_text(None)


def test_chosen_classes_are_numbered_in_sorted_order():
    numbers, labels, names = choose_classes(("z", "b", "a"), [0, 2, 1, 1, 0], ("z", "a", "z"), "data")
    assert numbers.tolist() == [0, 1, 4] and labels.tolist() == [1, 0, 1] and names == ("a", "z")
    assert labels.dtype == np.int32
    with pytest.raises(ValueError, match="^data: 2 of 3 chosen classes are none of its 3: c, d; correct data.classes$"):
        choose_classes(("z", "b", "a"), [0], ("d", "a", "c"), "data")
    with pytest.raises(ValueError, match="^data: no examples of the 1 chosen classes"):
        choose_classes(("z", "b"), [0, 0], ("b",), "data")


def test_names_in_messages():
    assert some(["a", "b"]) == "a, b" and some([str(i) for i in range(12)]).endswith("8, 9 and 2 more")


def test_class_names_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("\nküche\n tench \n")
    assert read_class_names(tmp_path / "names.txt") == ("küche", "tench")
    with pytest.raises(FileNotFoundError, match=f"^no file {tmp_path}/no.txt: set config.data.classes to a text file"):
        read_class_names(tmp_path / "no.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_class_names("~/names.txt") == ("küche", "tench")
    (tmp_path / "names.txt").write_bytes("küche".encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{tmp_path}/names.txt .config.data.classes. is not UTF-8 text"):
        read_class_names("~/names.txt")
