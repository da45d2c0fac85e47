"""COCO's captions: records, one caption per draw, the first elsewhere, and files that do not fit together."""

import pickle

import numpy as np
import pytest
from helpers.data_sets import COCO_ANNOTATIONS, COCO_CAPTIONS, COCO_IMAGES, write_coco
from helpers.tar_files import levels

from input_pipeline import captions as text
from input_pipeline import loader
from input_pipeline.coco import Coco
from input_pipeline.composition import Subset, select_fields
from input_pipeline.transforms import resized


def test_records(tmp_path):
    source = Coco(write_coco(tmp_path), split="train2014").open()
    assert np.abs(np.array(levels(source)) - [10, 20, 30]).max() <= 1  # by the image's id
    assert (
        source.captions == (COCO_CAPTIONS[10], COCO_CAPTIONS[20], COCO_CAPTIONS[30])
        and source[2]["caption"] == COCO_CAPTIONS[30]
    )
    assert source.num_classes == 0 and source[0]["label"] == 0 and source.image_shape == (None, None, 3)
    assert source.describe() == f"COCO (train2014) {tmp_path}: 3 images, 6 captions" and source.check() is None
    grey = pickle.loads(pickle.dumps(Coco(tmp_path, split="train2014", channels=1).open()))
    assert grey[0]["image"].shape == (4, 5, 1) and grey.fingerprint != source.fingerprint
    write_coco(tmp_path, annotations=COCO_ANNOTATIONS[:-1])
    assert Coco(tmp_path, split="train2014").open().fingerprint != source.fingerprint


class Letters:
    """Tokens are the numbers of the first two letters."""

    fingerprint, max_tokens = "letters", 2

    def __call__(self, texts, silent=False):
        return np.array([[ord(letter) for letter in said[-2:]] for said in texts], np.int32), np.ones((1, 2), bool)


def drawn(source, count=40, **options):
    """text_ids and labels of the first `count` rows, as text."""
    batches = loader.batches(source, seed=3, batch_size=8, threads=0, **options)
    rows = [next(batches)["text_ids"] for _ in range(count // 8)]
    return ["".join(map(chr, row)) for row in np.concatenate(rows)]


ENDS = {said[-2:]: image for image, texts in COCO_CAPTIONS.items() for said in texts}


def test_training_draws_one_caption_and_everything_else_takes_the_first(tmp_path):
    source = resized(Coco(write_coco(tmp_path), split="train2014").open(), 4, "center_lanczos", 3)
    tokenized = select_fields(text.tokenized(source, Letters()), ("image", "text_ids"))
    first = ["".join(map(chr, tokenized[i]["text_ids"])) for i in range(3)]
    assert first == ["og", "at", "ow"]
    in_order = next(loader.in_order(tokenized, 3))
    assert in_order["text_ids"][0].tolist() == [ord("o"), ord("g")]
    rows = drawn(tokenized, 240)
    counts = {end: rows.count(end) for end in ENDS}
    assert sum(counts.values()) == 240 and sum(counts[end] for end in ENDS if ENDS[end] == 10) == 80
    # "a dog" and "some dog" end alike: 2 of 3 draws of 80; 80 of 80; 1 of 2 draws of 80
    assert 40 <= counts["og"] <= 66 and counts["at"] == 80 and 26 <= counts["ow"] <= 54
    assert drawn(Subset(tokenized, np.arange(3)), 40) == rows[:40]


def test_the_draw_is_a_function_of_seed_and_position(tmp_path):
    tokenized = text.tokenized(resized(Coco(write_coco(tmp_path), split="train2014").open(), 4, "center", 3), Letters())
    rows = drawn(tokenized, 40)
    assert drawn(tokenized, 24, start_step=2) == rows[16:]
    hosts = [drawn(tokenized, 40, process_index=index, process_count=2) for index in range(2)]
    assert [row for i in range(0, 20, 4) for host in hosts for row in host[i : i + 4]] == rows
    epochs = [sorted(rows[start : start + 3]) for start in range(0, 39, 3)]
    assert len(set(map(tuple, epochs))) > 1  # another caption in another epoch


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"images": COCO_IMAGES + [{"id": 40, "file_name": "d.jpg"}]},
            "names 1 images without a caption: d.jpg; remove",
        ),
        (
            {"annotations": [*COCO_ANNOTATIONS, {"id": 1, "image_id": 99, "caption": "x"}]},
            "names 1 captions of images that it does not list: 1; get the file again",
        ),
        ({"images": [*COCO_IMAGES, COCO_IMAGES[0]]}, "names 2 images that come twice: 30, c.jpg; get the file again"),
        (
            {"annotations": [*COCO_ANNOTATIONS, COCO_ANNOTATIONS[0]]},
            "names 1 captions that come twice: 1000; get the file again",
        ),
        ({"images": [{"id": 1}]}, r"is not a file of COCO captions \(KeyError\('file_name'\)\): get it again"),
        ({"images": 3}, "is not a file of COCO captions .TypeError"),
        ({"images": [{"id": 1, "file_name": None}]}, r"is not .*images\[0\] has file_name None, expected str"),
        ({"images": [{"id": "1", "file_name": "a.jpg"}]}, r"is not .*images\[0\] has id '1', expected int"),
        (
            {"annotations": [*COCO_ANNOTATIONS, {"id": 1, "image_id": 10, "caption": None}]},
            r"is not a file of COCO captions \(TypeError\('annotations\[6\] has caption None, expected str'\)\): get",
        ),
        ({"annotations": [{"id": 1, "image_id": 10, "caption": "\ud83d"}]}, r"is not .*has caption '\\+ud83d', expe"),
        ({"images": [], "annotations": []}, "names no images"),
    ],
)
def test_files_that_do_not_fit(tmp_path, changes, message):
    write_coco(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"captions_train2014.json {message}") as error:
        Coco(tmp_path, split="train2014").open()
    assert "\n" not in str(error.value)


def test_absent_images_are_counted_and_named(tmp_path):
    images = [*COCO_IMAGES, {"id": 40, "file_name": "../train2014/a.jpg"}, {"id": 50, "file_name": "e.jpg"}]
    annotations = [*COCO_ANNOTATIONS, *({"id": i, "image_id": i, "caption": "x"} for i in (40, 50))]
    write_coco(tmp_path, images, annotations)
    message = f"names 2 images that are not in {tmp_path}/train2014: ../train2014/a.jpg, e.jpg; copy them there"
    with pytest.raises(ValueError, match=message):
        Coco(tmp_path, split="train2014").open()


def test_dangling_links(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "train2014" / "other.jpg").symlink_to(tmp_path / "nowhere")
    assert len(Coco(tmp_path, split="train2014").open()) == 3
    (tmp_path / "train2014" / "a.jpg").unlink()
    (tmp_path / "train2014" / "a.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"names 1 images that are not in {tmp_path}/train2014: a.jpg; copy them"):
        Coco(tmp_path, split="train2014").open()


def test_what_is_not_there(tmp_path):
    write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match="no .*/annotations/captions_val2014.json: set .*, and data.split"):
        Coco(tmp_path, split="val2014").open()
    (tmp_path / "annotations" / "captions_val2014.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=f"no {tmp_path}/val2014: set config.data.path"):
        Coco(tmp_path, split="val2014").open()
    (tmp_path / "val2014").mkdir()
    with pytest.raises(ValueError, match="is not a file of COCO captions .JSONDecodeError"):
        Coco(tmp_path, split="val2014").open()
    (tmp_path / "annotations" / "captions_val2014.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a file of COCO captions .RecursionError"):
        Coco(tmp_path, split="val2014").open()


def test_bad_images(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "train2014" / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 3 images in .*/train2014 are not whole images, .*: b.jpg \("):
        Coco(tmp_path, split="train2014").open().check()
    assert Coco(tmp_path, split="train2014", max_bad_images=1).open()[1]["caption"] == COCO_CAPTIONS[30]
