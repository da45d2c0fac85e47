"""Folders of clips: which frames are read, and clips that are damaged, too short or transparent."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
from absl import logging
from PIL import Image

from input_pipeline import loader
from input_pipeline.augment import Augmentation
from input_pipeline.clips import CLIP_ERRORS, ClipFolder
from input_pipeline.transforms import resized

KINDS = ("WEBP", "GIF", "PNG")


def encoded(images, kind="WEBP", **options):
    """An animation of uint8 arrays [H, W, 3 or 4], without loss where the kind allows it."""
    file = io.BytesIO()
    first, *others = [Image.fromarray(image) for image in images]
    options |= {"lossless": True} if kind == "WEBP" else {}
    first.save(file, kind, save_all=True, append_images=others, duration=40, **options)
    return file.getvalue()


def noise(frames, height=6, width=4, levels=256):
    return np.random.default_rng(0).integers(0, levels, (frames, height, width, 3), dtype=np.uint8)


def clip(base, frames=9):
    """Frame k of the grey level base + k."""
    return encoded([np.full((6, 4, 3), base + number, np.uint8) for number in range(frames)])


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def levels(source):
    return [source[i]["image"][:, 0, 0, 0].tolist() for i in range(len(source))]


@pytest.fixture
def warnings_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda form, *values: lines.append(form % values))
    return lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames, stride", [(5, 2), (9, 1), (2, 8), (1, 20)])
def test_every_stride_th_frame_from_the_first(tmp_path, kind, frames, stride):
    images = noise(9) // 128 * 255  # eight colours, which GIF stores exactly
    source = ClipFolder(write(tmp_path, {"a": encoded(images, kind)}), frames=frames, frame_stride=stride).open()
    found = source[0]["image"]
    assert found.dtype == np.uint8 and found.shape == (frames, 6, 4, 3)
    assert source.image_shape == (frames, None, None, 3)
    np.testing.assert_array_equal(found, images[::stride][:frames])
    np.testing.assert_array_equal(source[0]["image"], found)


def test_by_default_as_the_paper_16_frames_every_fourth(tmp_path):
    write(tmp_path, {"a": clip(0, 61), "b": clip(0, 60)})
    source = ClipFolder(tmp_path, max_bad_images=1).open()
    assert levels(source)[0] == list(range(0, 61, 4))
    with pytest.raises(ValueError, match="b .60 frames, 61 are needed for 16 at stride 4.; repair or remove them"):
        ClipFolder(tmp_path).open().check()


def test_the_layouts_and_records_of_a_folder(tmp_path):
    classes = ClipFolder(write(tmp_path / "c", {"dog/a.webp": clip(10), "cat/b.webp": clip(20)}), frames=3).open()
    assert levels(classes) == [[20, 24, 28], [10, 14, 18]] and classes.class_names == ("cat", "dog")
    assert [int(classes[i]["label"]) for i in range(2)] == [0, 1]
    assert classes.describe() == f"clip folder {tmp_path}/c: 2 files, 2 classes, 3 frames at stride 4"
    entries = [{"file": "b", "caption": "first"}, {"file": "a", "caption": "second"}]
    write(tmp_path / "t", {"a": clip(10), "b": clip(20)})
    (tmp_path / "t" / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    named = ClipFolder(tmp_path / "t", frames=3, channels=1).open()
    assert levels(named) == [[20, 24, 28], [10, 14, 18]] and named[0]["image"].shape == (3, 6, 4, 1)
    assert named[0]["caption"] == "first" and named[0].keys() == {"image", "label", "caption"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no clips in .*/empty: set config.data.path to the directory of the clips"):
        ClipFolder(tmp_path / "empty").open()


def test_a_training_batch_of_clips(tmp_path):
    files = {f"{i}.webp": encoded(noise(9)[..., ::-1] + np.uint8(i)) for i in range(6)}
    source = resized(ClipFolder(write(tmp_path, files), frames=3).open(), 4, "center", 3)
    batch = next(loader.batches(source, seed=3, batch_size=6, transform=Augmentation(flip=True)))
    assert batch["image"].shape == (6, 3, 4, 4, 3) and batch["image"].dtype == np.uint8
    flips = []
    for image in batch["image"]:
        same = [(image == source[i]["image"]).all() for i in range(6)]
        mirrored = [(image == source[i]["image"][:, :, ::-1]).all() for i in range(6)]
        assert sum(same) + sum(mirrored) == 1  # all frames alike
        flips.append(any(mirrored))
    assert set(flips) == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_transparent_frames_are_laid_over_white(tmp_path, kind):
    rgba = np.zeros((3, 8, 8, 4), np.uint8)
    expected = np.full((3, 8, 8, 3), 255, np.uint8)
    for number in range(3):  # an opaque square of one colour that moves over a clear ground
        place = (number, slice(2 * number, 2 * number + 4), slice(4 - number, 8 - number))
        rgba[place], expected[place] = (200, 0, 0, 255), (200, 0, 0)
    data = encoded(rgba, kind, disposal=2) if kind == "GIF" else encoded(rgba, kind)
    found = ClipFolder(write(tmp_path, {"a": data}), frames=3, frame_stride=1).open()[0]["image"]
    np.testing.assert_array_equal(found, expected)


def test_the_still_picture_of_an_animated_png_is_no_frame(tmp_path):
    images = noise(5)
    write(tmp_path, {"a.png": encoded(images, "PNG", default_image=True)})
    np.testing.assert_array_equal(ClipFolder(tmp_path, frames=4, frame_stride=1).open()[0]["image"], images[1:])
    with pytest.raises(ValueError, match="a.png .4 frames, 5 are needed for 5 at stride 1."):
        ClipFolder(tmp_path, frames=5, frame_stride=1).open().check()


def test_an_animated_png_without_the_data_of_a_frame(tmp_path):
    data = encoded(noise(5), "PNG")
    lacking = data[: data.rindex(b"fdAT") - 4] + data[-12:]  # the last frame's pixels left out, the chunk IEND kept
    source = ClipFolder(write(tmp_path, {"a.png": lacking}), frames=3, frame_stride=2).open()
    with pytest.raises(ValueError, match="a.png .no more images in APNG file.; repair or remove"):
        source.check()
    assert ClipFolder(tmp_path, frames=4, frame_stride=1).open().check() is None


def bad_folder(root):
    """a 10.., b cut off, c text, d too short, e 20.., f a single picture."""
    still = encoded(noise(1), "PNG")
    return write(
        root, {"a": clip(10), "b": clip(30)[:-20], "c": b"no clip", "d": clip(40, 8), "e": clip(20), "f.png": still}
    )


def test_bad_clips_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError) as error:
        ClipFolder(bad_folder(tmp_path), frames=3, max_bad_images=3).open().check()
    message = str(error.value)
    assert message.startswith(f"4 of 6 files in {tmp_path} are not whole clips, data.max_bad_images is 3: b (")
    assert "d (8 frames, 9 are needed for 3 at stride 4), f.png (1 frames, 9" in message and "\n" not in message
    with pytest.raises(ValueError, match="none of the 1 files in .* is a clip"):
        ClipFolder(write(tmp_path / "text", {"c": b"no clip"}), frames=3, max_bad_images=1).open()[0]


def test_within_the_limit_the_next_good_clip_takes_the_place(tmp_path, warnings_logged):
    checked, unchecked = (ClipFolder(bad_folder(tmp_path), frames=3, max_bad_images=4).open() for _ in range(2))
    checked.check()
    assert [line.split()[0] for line in warnings_logged] == ["b", "c", "d", "f.png"]
    assert warnings_logged[1].startswith("c is not a whole clip (cannot identify")
    first, second = [10, 14, 18], [20, 24, 28]
    for source in (checked, unchecked, pickle.loads(pickle.dumps(checked))):
        assert levels(source) == [first, second, second, second, second, first]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of these before it raises
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_clips_are_bad_or_whole(tmp_path, kind):
    rng, whole = np.random.default_rng(0), encoded(noise(5, 12, 10), kind)
    source = ClipFolder(write(tmp_path, {"a": whole}), frames=3, frame_stride=2).open()
    expected, refused = source.decode(whole), 0
    for attempt in range(120):
        cut = whole[: rng.integers(len(whole) - 1)]
        changed = bytearray(whole)
        for position in rng.integers(0, 200 if attempt % 2 else len(whole), 4):
            changed[position] = rng.integers(256)
        for data in (cut, bytes(changed)):
            try:
                found = source.decode(data)
            except CLIP_ERRORS:
                refused += 1
            else:
                assert data is not cut or (found == expected).all()  # of what is left nothing is made up
    assert refused > 140


def test_options_that_cannot_be(tmp_path):
    write(tmp_path, {"a": clip(0)})
    for options, message in (
        ({"frames": 0}, "clips: frames must be at least 1, found 0"),
        ({"frame_stride": 0}, "clips: frame_stride must be at least 1, found 0"),
        ({"channels": 4}, "channels must be 1 .grey. or 3 .RGB., found 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipFolder(tmp_path, **options).open()


def test_the_fingerprint_covers_what_is_read(tmp_path):
    write(tmp_path, {"a": clip(0)})
    options = ({}, {"frames": 2}, {"frame_stride": 1}, {"channels": 1})
    found = [ClipFolder(tmp_path, **{"frames": 3, **changed}).open().fingerprint for changed in options]
    assert len(set(found)) == 4 and ClipFolder(tmp_path, frames=3).open().fingerprint == found[0]


def test_videos_without_opencv_are_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if not installed
    write(tmp_path, {"cat/a.webp": clip(0), "cat/b.MP4": b"", "cat/c.avi": b""})
    with pytest.raises(ImportError, match="2 of 3 clips in .*, such as cat/b.MP4: pip install opencv-python") as error:
        ClipFolder(tmp_path).open()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix, codec", [(".mp4", "mp4v"), (".AVI", "MJPG")])
def test_videos(tmp_path, suffix, codec):
    cv2 = pytest.importorskip("cv2", reason="no OpenCV: pip install opencv-python-headless")
    files = {name: tmp_path / f"{name}{suffix}" for name in "abc"}
    video = cv2.VideoWriter(str(files["a"]), cv2.VideoWriter_fourcc(*codec), 24, (64, 48))
    for number in range(9):
        video.write(np.full((48, 64, 3), (0, 0, 20 * number), np.uint8))  # blue, green, red
    video.release()
    files["b"].write_bytes(files["a"].read_bytes()[:300])
    files["c"].symlink_to(tmp_path / "nowhere")
    source = ClipFolder(tmp_path, frames=3, max_bad_images=2).open()
    source.check()
    found = source[2]["image"].astype(int)
    assert found.shape == (3, 48, 64, 3)
    np.testing.assert_allclose(found[..., 0].mean((1, 2)), [0, 80, 160], atol=6)
    assert found[..., 1:].max() < 30
    grey = ClipFolder(tmp_path, frames=3, channels=1, max_bad_images=2).open()[0]["image"]
    np.testing.assert_allclose(grey.mean((1, 2, 3)), np.array([0, 80, 160]) * 0.299, atol=6)
    with pytest.raises(ValueError, match=r"a\.... .9 frames, 10 are needed.*b\.... .0 frames.*c\.... .*no such file"):
        ClipFolder(tmp_path, frames=10, frame_stride=1).open().check()
