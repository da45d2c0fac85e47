"""WebDataset tars of images and of clips, whole and incomplete, and an order that reads them shard by shard."""

import json
import pickle
import sys

import numpy as np
import pytest
from absl import logging
from helpers.data_sets import animation
from helpers.tar_files import jpeg, levels, tar

from input_pipeline import captions as text
from input_pipeline import clips, loader, tars, webdataset
from input_pipeline.transforms import resized
from input_pipeline.webdataset import WebDataset, WebDatasetClips


def write(folder, shards):
    """{shard: {member: bytes}}"""
    for name, members in shards.items():
        (folder / f"{name}.tar").write_bytes(tar(members))
    return folder


SHARDS = {
    "00001": {"b/7.jpg": jpeg(30), "b/7.txt": b" seven\n", "b/8.cls": b"3", "b/8.PNG": jpeg(40), "b/8.txt": b"eight"},
    "00000": {
        "1.json": json.dumps({"caption": "one", "alt": "ein Bär"}).encode(), "1.jpg": jpeg(10), "1.txt": b"not this",
        "2.seg.jpg": jpeg(99), "2.jpeg": jpeg(20), "2.txt": "zwölf".encode(), "._2": b"hidden",
    },
}  # fmt: skip


def opened(folder, kind=WebDataset, **options):
    return kind(folder, index_dir=str(folder / "index"), **options).open()


def close(found, expected):
    return np.abs(np.array(found) - expected).max() <= 1  # JPEG


@pytest.fixture
def warnings_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda form, *values: lines.append(form % values))
    return lines


def test_images_with_captions(tmp_path, monkeypatch):
    source = opened(write(tmp_path, SHARDS))
    assert close(levels(source), [10, 20, 30, 40]) and source.num_classes == 0 and source.shard_ends.tolist() == [2, 4]
    assert source.captions == ("one", "zwölf", "seven", "eight") and source[1]["caption"] == "zwölf"
    assert source[0]["image"].shape == (4, 5, 3) and source.image_shape == (None, None, 3)
    assert source.describe() == f"images of 2 tars in {tmp_path}: 4 samples, captions"
    assert source.name(3) == "00001.tar/b/8.PNG" and source.check() is None
    monkeypatch.setattr(tars, "members", lambda *args: pytest.fail("the index is there"))
    again = pickle.loads(pickle.dumps(opened(tmp_path, channels=1)))
    with monkeypatch.context() as patch:
        patch.setattr(webdataset.Decoded, "__getitem__", lambda *args: pytest.fail("no image is read for captions"))
        assert text.captions(resized(again, 2, "center", 1)) == list(source.captions)
    assert again[2]["image"].shape == (4, 5, 1)
    assert again.fingerprint != source.fingerprint == opened(tmp_path).fingerprint


def test_another_key_of_the_json(tmp_path):
    source = opened(write(tmp_path, SHARDS), caption_key="alt")
    assert source.captions == ("ein Bär", "zwölf", "seven", "eight")
    assert source.fingerprint != opened(tmp_path).fingerprint


def test_incomplete_samples_are_counted_and_named(tmp_path, warnings_logged):
    shard = {
        "a.jpg": jpeg(1), "b.txt": b"no image", "c.jpg": jpeg(60), "c.txt": b"whole", "d.jpg": jpeg(1), "d.txt": b"  ",
        "e.jpg": jpeg(1), "e.json": b'{"caption": null}', "f.jpg": jpeg(1), "f.json": b"[]",
    }  # fmt: skip
    write(tmp_path, {"0": shard})
    message = (
        f"5 samples in {tmp_path} lack a part, data.max_bad_images is 4: 0.tar/a (no caption), 0.tar/b (no .jpg), "
        "0.tar/d (no caption), 0.tar/e (no caption), 0.tar/f (no caption); complete or remove them"
    )
    for _ in range(2):  # the second time from the index
        with pytest.raises(ValueError) as error:
            opened(tmp_path, max_bad_images=4)
        assert str(error.value) == message
    source = opened(tmp_path, max_bad_images=5)
    assert close(levels(source), [60]) and source.captions == ("whole",)
    assert warnings_logged[0].startswith(f"5 samples in {tmp_path} are left out: 0.tar/a (no caption)")


def test_images_that_cannot_be_decoded(tmp_path, warnings_logged):
    write(tmp_path, SHARDS | {"00002": {"9.jpg": jpeg(50)[:-30], "9.txt": b"nine"}})
    with pytest.raises(ValueError, match=r"1 of 5 samples in .*: 00002.tar/9.jpg \(.*; repair or remove them"):
        opened(tmp_path).check()
    source = opened(tmp_path, max_bad_images=1)
    assert close(levels(source), [10, 20, 30, 40, 10]) and source[4]["caption"] == "one"


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.jpg": b"", "../b.jpg": b""}, "has a member '../b.jpg', which is not a path below its folder"),
        ([("a.jpg", b""), ("b.jpg", b""), ("a.txt", b"")], "sample 'a' comes twice; give every sample a name"),
        ([("a.jpg", b""), ("a.JPG", b"")], "'a.JPG' comes twice; give every sample"),
        (
            {"a.jpg": b"", "a.json": b'{"caption": "\\ud83d"}'},
            r"a.json has a 'caption' that UTF-8 cannot encode: '.ud8",
        ),
        ({"a.jpg": b"", "a.json": b"[" * 100_000}, "a.json is not JSON .*recursion depth.*: make the tar again"),
        ({"a.jpg": b"", "a.json": b"{"}, "a.json is not JSON .*: make the tar again"),
        ({"a.mp4": b"", "a.txt": b"clip"}, "1 samples in .* lack a part, .*: 0.tar/a .no .jpg.; complete"),
        ({}, "no samples with a .jpg or .jpeg or .png or .webp and a caption in "),
    ],
)
def test_bad_tars(tmp_path, members, message):
    write(tmp_path, {"0": members})
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_a_cut_off_tar_is_named(tmp_path):
    write(tmp_path, SHARDS)
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"{shard} is (cut off|not a whole tar)"):
        opened(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory .*/no: set config.data.path to the folder of the tars"):
        opened(tmp_path / "no")
    with pytest.raises(ValueError, match=r"no \*.tar in .*: set config.data.path to the folder of the tars"):
        opened(tmp_path)


def test_what_cannot_be_read_is_no_bad_image(tmp_path):
    source = opened(write(tmp_path, SHARDS), max_bad_images=4)
    shard = tmp_path / "00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"")
    with pytest.raises(OSError, match=f"{shard}: 0 bytes at .*: it was changed while it was in use"):
        source[2]
    shard.write_bytes(whole)
    assert close(levels(source), [10, 20, 30, 40])


def test_a_long_walk_is_reported(monkeypatch):
    said, clock = [], iter([0, 10, 40, 50, 69, 80])  # the start, then each tar's end
    monkeypatch.setattr(webdataset.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(logging, "info", lambda form, *values: said.append(form % values))
    assert list(webdataset._with_progress(iter("abcde"), 5)) == list("abcde")
    assert said == [f"{n} of 5 tars indexed, {left:.1f} minutes to go" for n, left in ((2, 1), (5, 0))]


def test_clips_with_captions(tmp_path):
    shard = {"1.webp": animation(10), "1.txt": b"first", "2.webp": animation(50, 4), "2.json": b'{"caption": "second"}'}
    source = opened(write(tmp_path, {"0": shard}), WebDatasetClips, frames=3, frame_stride=4, max_bad_images=1)
    assert source[0]["image"][:, 0, 0, 0].tolist() == [10, 14, 18] and source[0]["caption"] == "first"
    assert source.image_shape == (3, None, None, 3) and source.captions == ("first", "second")
    assert source[1]["caption"] == "first"  # too short: the next one
    assert source.describe() == f"clips of 1 tars in {tmp_path}: 2 samples, captions, 3 frames at stride 4"
    with pytest.raises(ValueError, match="0.tar/2.webp .4 frames, 9 are needed for 3 at stride 4"):
        opened(tmp_path, WebDatasetClips, frames=3, frame_stride=4).check()
    with pytest.raises(ValueError, match="clips: frames must be at least 1, found 0"):
        opened(tmp_path, WebDatasetClips, frames=0)
    fingerprints = {opened(tmp_path, WebDatasetClips, frames=frames).fingerprint for frames in (2, 3)}
    assert len(fingerprints) == 2


def test_videos_go_through_opencv(tmp_path, monkeypatch):
    """OpenCV, where it is absent, is asked for at once; where it is there it gets a file of the video's bytes."""
    write(tmp_path, {"0": {"1.mp4": b"bytes of a video", "1.txt": b"film"}})
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="1 of 1 clips in .* need OpenCV to be read, such as 1.mp4: pip install"):
        opened(tmp_path, WebDatasetClips)
    seen, temporary = [], []

    def decode(path, frames, stride, channels):
        temporary.append(path)
        seen.append((path.suffix, path.read_bytes(), frames, stride, channels))
        return np.zeros((frames, 2, 2, channels), np.uint8)

    monkeypatch.setattr(clips, "require_opencv", lambda *args: None)
    monkeypatch.setattr(clips, "decode_clip", decode)
    assert opened(tmp_path, WebDatasetClips, frames=2, frame_stride=3)[0]["image"].shape == (2, 2, 2, 3)
    assert seen == [(".mp4", b"bytes of a video", 2, 3, 3)] and len(temporary) == 1 and not temporary[0].exists()


def test_training_reads_shard_by_shard(tmp_path):
    shards = {
        str(shard): {f"{i}.{part}": data for i in range(3) for part, data in (("jpg", jpeg(9)), ("txt", b"t"))}
        for shard in range(4)
    }
    source = opened(write(tmp_path, shards))
    order = loader.ShardOrder(source.shard_ends, seed=0, window=3)
    shard_of = np.array([order[i] // 3 for i in range(12)]).reshape(4, 3)
    assert (shard_of == shard_of[:, :1]).all() and sorted(shard_of[:, 0]) == [0, 1, 2, 3]
    batch = next(loader.batches(source, seed=0, batch_size=4, shard_window=3, threads=0))
    assert batch["image"].shape == (4, 4, 5, 3) and batch["caption"].tolist() == ["t"] * 4
