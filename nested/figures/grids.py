"""Grids of images, animations, and the files that samples are saved to.

Images are uint8 [N, height, width, 1 or 3], clips uint8 [N, frames, height, width, 1 or 3]; a picture is uint8 [height,
width, 3] on white. Small images are enlarged by an integer factor with nearest-neighbour pixels, so that a picture
shows exactly the pixels that were sampled. Captions use Pillow's own font.
"""

import io
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nested.runtime.files import atomic_write

LEGIBLE = 64  # pixels: images are enlarged by default to at least this height
CAPTION_SIZE = 16  # pixels of the font
MARGIN = 8  # pixels around captions and panels
WHITE = 255


def image_grid(
    images: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    padding: int = 2,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> np.ndarray:
    """Arranges images in a grid, row by row; the unused places of the last row stay white.

    images: uint8 [N, H, W, 1 or 3]. columns: by default those of the smallest square grid. scale: the integer factor
    of enlargement; by default images become at least 64 pixels tall. padding: pixels between images. row_captions,
    column_captions: one text for each row (drawn to its left) or column (drawn above it), or none.
    Raises ValueError for arrays that are not images, and if the number of captions is not that of the rows or columns.
    """
    images = as_rgb(images)
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"image_grid: columns is {columns}; give 1 or more")
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    return compose_grid(rows, scale, padding, row_captions, column_captions)


def clip_grid(
    clips: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    padding: int = 2,
    row_captions: Sequence[str] = (),
) -> np.ndarray:
    """Shows clips, uint8 [N, T, H, W, 1 or 3]: one row per clip, its frames from left to right.

    columns: how many frames are shown, evenly spaced from the first to the last; by default all T. The other arguments
    are those of image_grid. Raises ValueError for arrays that are not clips, and for columns outside 1..T.
    """
    clips = check_clips(clips)
    frames = clips.shape[1]
    count = frames if columns is None else columns
    if not 1 <= count <= frames:
        raise ValueError(f"clip_grid: columns is {count}; give 1 to {frames}, the number of frames")
    shown = clips[:, np.linspace(0, frames - 1, count).round().astype(int)]
    return compose_grid([as_rgb(row) for row in shown], scale, padding, row_captions, ())


def side_by_side(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Places pictures beside each other, tops aligned, each under its caption.

    panels: (caption, picture uint8 [H, W, 1 or 3]) pairs. Raises ValueError if there are none."""
    if not panels:
        raise ValueError("side_by_side: no panels; give (caption, picture) pairs")
    labels = [_text(caption) for caption, _ in panels]
    pictures = [as_rgb(picture[None])[0] for _, picture in panels]
    top = max(label.shape[0] for label in labels) + MARGIN
    widths = [max(label.shape[1], picture.shape[1]) for label, picture in zip(labels, pictures, strict=True)]
    height = top + max(picture.shape[0] for picture in pictures) + 2 * MARGIN
    canvas = _blank(height, sum(widths) + 2 * MARGIN * len(panels))
    left = MARGIN
    for label, picture, width in zip(labels, pictures, widths, strict=True):
        _paste(canvas, label, MARGIN, left)
        _paste(canvas, picture, MARGIN + top, left)
        left += width + 2 * MARGIN
    return canvas


def save_png(picture: np.ndarray, path: str | os.PathLike) -> None:
    """Writes a picture, uint8 [H, W, 1 or 3], as a PNG file that is either complete or absent.

    Raises OSError, in one line, if the file cannot be written."""
    buffer = io.BytesIO()
    Image.fromarray(as_rgb(np.asarray(picture)[None])[0]).save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())


def save_animation(
    clips: np.ndarray, path: str | os.PathLike, columns: int | None = None, scale: int | None = None, fps: float = 8
) -> None:
    """Writes clips, uint8 [N, T, H, W, 1 or 3], as an animated lossless WebP file that is either complete or absent.

    All clips play at once and for ever: each frame of the animation is the image_grid of the clips' frames, with its
    `columns` and `scale`. fps: frames per second, up to 1,000; WebP stores whole milliseconds. Equal successive frames
    become one longer frame.
    Raises ValueError for arrays that are not clips, another fps, or a name that does not end in .webp; OSError as
    save_png does.
    """
    clips, path = check_clips(clips), pathlib.Path(path)
    if path.suffix != ".webp":
        raise ValueError(f"{path}: animations are stored as .webp; give a name that ends so")
    if not 0 < fps <= 1000:
        raise ValueError(f"{path}: fps is {fps}; give more than 0, at most 1000")
    first, *others = [Image.fromarray(image_grid(images, columns, scale)) for images in clips.swapaxes(0, 1)]
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, lossless=True)
    atomic_write(path, buffer.getvalue())


def save_samples(path: str | os.PathLike, images: np.ndarray) -> None:
    """Writes images, or clips, as an .npz file with one array, arr_0, uint8 with three channels.

    This is the sample file that the evaluator of guided-diffusion reads; grey is repeated in the three channels. The
    array goes straight to the disk: 50,000 images of 256 x 256 pixels take 9.8 GB and are not copied in memory. The
    file is either complete or absent.
    Raises ValueError for another suffix or for arrays that are not images; OSError, in one line, if the file cannot be
    written.
    """
    images, path = np.asarray(images), pathlib.Path(path)
    stills = images.reshape(-1, *images.shape[2:]) if images.ndim == 5 else images
    images = as_rgb(stills).reshape(*images.shape[:-1], 3)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: samples are stored as .npz; give a name that ends so")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, arr_0=images)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path}: samples not written: {error.strerror}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def compose_grid(
    rows: Sequence[np.ndarray],
    scale: int | None,
    padding: int,
    row_captions: Sequence[str],
    column_captions: Sequence[str],
) -> np.ndarray:
    """Draws rows of RGB images, all of one size, with the captions of rows and columns.

    rows: uint8 [n, H, W, 3] each; n may differ. The other arguments and the errors are those of image_grid."""
    columns = max(len(row) for row in rows)
    for kind, captions, count in (("row", row_captions, len(rows)), ("column", column_captions, columns)):
        if captions and len(captions) != count:
            raise ValueError(f"found {len(captions)} {kind} captions for {count} {kind}s; give {count}, or none")
    height, width = rows[0].shape[1:3]
    scale = math.ceil(LEGIBLE / height) if scale is None else scale
    if scale < 1 or padding < 0:
        raise ValueError(f"found scale {scale}, padding {padding}; give scale 1 or more, padding 0 or more")
    beside, above = [_text(caption) for caption in row_captions], [_text(caption) for caption in column_captions]
    tall = max([scale * height, *(label.shape[0] for label in beside)])
    wide = max([scale * width, *(label.shape[1] + MARGIN for label in above)])
    left = max([0, *(label.shape[1] + 2 * MARGIN for label in beside)])
    top = max([0, *(label.shape[0] + MARGIN for label in above)])
    canvas = _blank(top + len(rows) * (tall + padding) + padding, left + columns * (wide + padding) + padding)
    for column, label in enumerate(above):
        _paste(canvas, label, MARGIN // 2, left + padding + column * (wide + padding) + (wide - label.shape[1]) // 2)
    for number, row in enumerate(rows):
        y = top + padding + number * (tall + padding)
        if beside:
            _paste(canvas, beside[number], y + (tall - beside[number].shape[0]) // 2, MARGIN)
        for column, image in enumerate(row):
            x = left + padding + column * (wide + padding) + (wide - scale * width) // 2
            _paste(canvas, enlarge(image, scale), y + (tall - scale * height) // 2, x)
    return canvas


def as_rgb(images: np.ndarray) -> np.ndarray:
    """A view [N, H, W, 3] of images, uint8 [N, H, W, 1 or 3]. Raises ValueError for any other array."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images: found {found}, expected uint8 [N, height, width, 1 or 3], none of them 0")
    return np.broadcast_to(images, (*images.shape[:3], 3))


def check_clips(clips: np.ndarray) -> np.ndarray:
    """Returns clips, uint8 [N, T, H, W, 1 or 3], unchanged. Raises ValueError for any other array."""
    clips = np.asarray(clips)
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[-1] not in (1, 3) or 0 in clips.shape:
        found = f"{clips.dtype} {list(clips.shape)}"
        raise ValueError(f"clips: found {found}, expected uint8 [N, frames, height, width, 1 or 3], none of them 0")
    return clips


def enlarge(images: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel of images [..., H, W, C] as factor x factor pixels."""
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _text(caption: str) -> np.ndarray:
    """A caption of any number of lines in black on white, uint8 [H, W, 3]."""
    font = ImageFont.load_default(CAPTION_SIZE)
    lines = caption.split("\n")
    line_height = sum(font.getmetrics())  # pyright: ignore[reportAttributeAccessIssue]  with a size it is FreeType
    width = max(math.ceil(font.getlength(line)) for line in lines)
    label = Image.new("RGB", (max(width, 1), line_height * len(lines)), "white")
    draw = ImageDraw.Draw(label)
    for number, line in enumerate(lines):
        draw.text((0, number * line_height), line, fill="black", font=font)
    return np.asarray(label)


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), WHITE, np.uint8)


def _paste(canvas: np.ndarray, picture: np.ndarray, top: int, left: int) -> None:
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
