"""Pictures of samples and of training, as PNG or WebP, and samples as the .npz that the ADM evaluator reads.

Images are uint8 [N, height, width, 1 or 3], clips [N, frames, height, width, 1 or 3]; a picture is uint8 [height,
width, 3] on white. Small images are enlarged by an integer factor with nearest-neighbour pixels, so that what is seen
is what was sampled. Captions use Pillow's own font.
"""

import io
import math
import os
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nested.runtime.files import atomic_write

LEGIBLE = 64  # pixels: images are enlarged by default to at least this height
CAPTION_SIZE = 16  # pixels of the font
MARGIN = 8  # pixels around captions and panels
WHITE = 255
SHORTEST_SMOOTHED = 10  # points: a curve of fewer is drawn as it is
LOG_RANGE = 4.0  # largest over smallest loss above which the axis is logarithmic


def image_grid(images, columns=None, scale=None, padding=2, row_captions=(), column_captions=()):
    """A picture of `images` uint8 [N, H, W, 1 or 3], row by row; the places left over in the last row stay white.

    columns: default the smallest square grid. scale: integer enlargement, default what makes images 64 pixels tall.
    padding: pixels between images. row_captions, column_captions: one text each (left and above), or none.
    Raises ValueError for arrays that are not images and for captions of another number than the rows or columns.
    """
    images = _rgb(images)
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"image_grid: columns is {columns}; give 1 or more")
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    return _compose(rows, scale, padding, row_captions, column_captions)


def hierarchy_picture(rows, scale=None, padding=2):
    """The figure of what each level decides: `rows` of (caption, images [N, H, W, C]), one strip each, caption at left.

    For example ("resample everything", ...), ("z3 fixed", ...), ("z3, z2 fixed", ...): Nested Diffusion, figure 1.
    Rows may differ in N, not in the images' size. Other arguments and errors as image_grid's.
    """
    if not rows:
        raise ValueError("hierarchy_picture: no rows; give (caption, images) pairs")
    captions, strips = zip(*rows, strict=True)
    strips = [_rgb(strip) for strip in strips]
    sizes = sorted({strip.shape[1:3] for strip in strips})
    if len(sizes) > 1:
        raise ValueError(f"hierarchy_picture: found rows of image sizes {sizes}; give images of one size")
    return _compose(strips, scale, padding, captions, ())


def steps_picture(steps, scale=None, padding=2, step_captions=()):
    """A sample on its way, after Matryoshka Diffusion, figure 11: a column per step, a row per resolution.

    steps: of each step the images of one sample at every resolution, uint8 [H, W, 1 or 3] each, in one order; the rows
    keep it. Each image is enlarged by nearest-neighbour pixels to the size of the largest one.
    step_captions: one text each, above. Other arguments as image_grid's.
    Raises ValueError where there are no steps, steps differ in their sizes, or a size does not divide the largest.
    """
    shapes = sorted({tuple(np.shape(image) for image in step) for step in steps})
    if len(shapes) != 1 or not shapes[0]:
        raise ValueError(f"steps_picture: found steps of images {shapes}; give every step images of the same sizes")
    strips = [_rgb(np.stack(images)) for images in zip(*steps, strict=True)]
    sizes = [strip.shape[1:3] for strip in strips]
    largest = max(sizes)
    for height, width in sizes:
        factor = largest[0] // height
        if (factor * height, factor * width) != largest:
            raise ValueError(f"steps_picture: {height} x {width} images do not enlarge to {largest[0]} x {largest[1]}")
    strips = [_enlarge(strip, largest[0] // strip.shape[1]) for strip in strips]
    captions = [f"{height} x {width}" for height, width in sizes]
    return _compose(strips, scale, padding, captions, step_captions)


def clip_grid(clips, columns=None, scale=None, padding=2, row_captions=()):
    """A picture of `clips` uint8 [N, T, H, W, 1 or 3]: a row per clip, its frames from left to right.

    columns: how many frames are shown, evenly spread from the first to the last; default all T.
    Other arguments as image_grid's. Raises ValueError for what is not clips and for columns not in 1..T.
    """
    clips = _check_clips(clips)
    frames = clips.shape[1]
    columns = frames if columns is None else columns
    if not 1 <= columns <= frames:
        raise ValueError(f"clip_grid: columns is {columns}; give 1 to {frames}, the number of frames")
    shown = clips[:, np.linspace(0, frames - 1, columns).round().astype(int)]
    return _compose([_rgb(row) for row in shown], scale, padding, row_captions, ())


def side_by_side(panels):
    """Pictures beside each other, tops aligned, each under its caption: `panels` of (caption, picture [H, W, 3])."""
    if not panels:
        raise ValueError("side_by_side: no panels; give (caption, picture) pairs")
    labels = [_text(caption) for caption, _ in panels]
    pictures = [_rgb(picture[None])[0] for _, picture in panels]
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


def save_png(picture, path):
    """Writes `picture` uint8 [H, W, 1 or 3] as PNG, whole or not at all. OSError, in one line, where it cannot."""
    buffer = io.BytesIO()
    Image.fromarray(_rgb(np.asarray(picture)[None])[0]).save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())


def save_animation(clips, path, columns=None, scale=None, fps=8):
    """Writes `clips` uint8 [N, T, H, W, 1 or 3] as an animated WebP without loss, whole or not at all.

    All clips play at once and for ever: a frame is the image_grid of their frames, so columns and scale are its.
    fps: frames per second, up to 1,000; WebP stores whole milliseconds. Equal successive frames become a longer one.
    Raises ValueError for what is not clips, another fps and a name that does not end in .webp; OSError as save_png.
    """
    clips, path = _check_clips(clips), pathlib.Path(path)
    if path.suffix != ".webp":
        raise ValueError(f"{path}: animations are stored as .webp; give a name that ends so")
    if not 0 < fps <= 1000:
        raise ValueError(f"{path}: fps is {fps}; give more than 0, at most 1000")
    first, *others = [Image.fromarray(image_grid(images, columns, scale)) for images in clips.swapaxes(0, 1)]
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, lossless=True)
    atomic_write(path, buffer.getvalue())


def save_samples(path, images):
    """Writes `images` uint8 [N, H, W, 1 or 3], or clips [N, T, H, W, 1 or 3], as an .npz of arr_0 uint8 with three
    channels, whole or not at all.

    That is the sample file of guided-diffusion's evaluator; grey is repeated in the three channels. The array goes
    straight to the disk: 50,000 images of 256 x 256 are 9.8 GB, and are not copied in memory.
    """
    images, path = np.asarray(images), pathlib.Path(path)
    stills = images.reshape(-1, *images.shape[2:]) if images.ndim == 5 else images
    images = _rgb(stills).reshape(*images.shape[:-1], 3)
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


def loss_curves(metrics, path, levels=None):
    """Draws each level's losses against the step, a panel a level, on one common axis, and writes the PNG.

    metrics: dicts with "step" and any of "loss/LEVEL" (training) and "validation/LEVEL/tT" (EMA weights at noise level
    T), as the training loop logs them. The training loss is drawn faint and, over it, smoothed by a centred running
    mean of a thirtieth of its points. levels: the panels' names in order, default as found. Values that are not finite
    are left out. Raises ValueError where a level has no training loss to draw.
    """
    from matplotlib.figure import Figure

    levels = list(_keys(metrics, "loss/")) if levels is None else levels
    curves = {level: _curve(metrics, f"loss/{level}") for level in levels}
    empty = [level for level, (steps, _) in curves.items() if not len(steps)]
    if empty or not curves:
        wanted = ", ".join(f"loss/{level}" for level in empty) or "loss/LEVEL"
        raise ValueError(f"{path}: not drawn: no finite {wanted} in {len(metrics)} lines of metrics; train first")
    across = min(len(levels), 3)
    down = math.ceil(len(levels) / across)
    size = (2.0 + 3.6 * across, 1.2 + 3.2 * down)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    handles = {}
    for axis, (level, (steps, losses)) in zip(axes, curves.items(), strict=False):
        axis.set_title(level, loc="left", fontsize=11, fontweight="bold")
        handles |= _draw_training(axis, steps, losses)
        handles |= _draw_validation(axis, metrics, level)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("training step")
    for axis in axes[len(levels) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("loss")
    _scale_losses(axes[0], [line for axis in axes for line in axis.lines])
    figure.suptitle("Loss of each level", fontsize=13)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, 2 * across), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())


def _draw_training(axis, steps, losses):
    """The training curve of one level; {legend text: line}."""
    axis.grid(True, which="major", color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if len(steps) < SHORTEST_SMOOTHED:
        return {"training": axis.plot(steps, losses, color="C0", linewidth=1.8, marker="o", markersize=3)[0]}
    raw = axis.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)[0]
    smooth = axis.plot(steps, _running_mean(losses, max(3, len(losses) // 30)), color="C0", linewidth=1.8)[0]
    return {"training": raw, "training, smoothed": smooth}


def _draw_validation(axis, metrics, level):
    """The validation curves of one level, light for little noise to dark for much; {legend text: line}."""
    from matplotlib import colormaps

    times = sorted(_keys(metrics, f"validation/{level}/t"), key=float)
    handles = {}
    for number, time in enumerate(times):
        steps, losses = _curve(metrics, f"validation/{level}/t{time}")
        colour = colormaps["YlOrRd"](0.45 + 0.5 * number / max(1, len(times) - 1))
        line = axis.plot(steps, losses, color=colour, linewidth=1.2, marker="o", markersize=2.5)[0]
        handles[f"validation, t = {time}"] = line
    return handles


def _scale_losses(axis, lines):
    """A logarithmic axis, with plain numbers, where the losses are positive and span more than LOG_RANGE."""
    from matplotlib import ticker

    values = np.concatenate([line.get_ydata() for line in lines])
    if values.min() > 0 and values.max() > LOG_RANGE * values.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _keys(metrics, prefix):
    """What follows `prefix` in the metrics' names, in order of appearance, as the keys of a dict."""
    return {name.removeprefix(prefix): None for line in metrics for name in line if name.startswith(prefix)}


def _curve(metrics, name):
    points = [(line["step"], line[name]) for line in metrics if name in line and math.isfinite(line[name])]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def _running_mean(values, width):
    """Centred mean over an odd window of about `width` points, over what there is of it at the ends."""
    half = min(width // 2, len(values) // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _compose(rows, scale, padding, row_captions, column_captions):
    """A picture of rows of equal-sized RGB images, with their captions."""
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
            _paste(canvas, _enlarge(image, scale), y + (tall - scale * height) // 2, x)
    return canvas


def _rgb(images):
    """uint8 [N, H, W, 1 or 3] as a view [N, H, W, 3]; ValueError for anything else."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images: found {found}, expected uint8 [N, height, width, 1 or 3], none of them 0")
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _check_clips(clips):
    """uint8 [N, T, H, W, 1 or 3] as it is; ValueError for anything else."""
    clips = np.asarray(clips)
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[-1] not in (1, 3) or 0 in clips.shape:
        found = f"{clips.dtype} {list(clips.shape)}"
        raise ValueError(f"clips: found {found}, expected uint8 [N, frames, height, width, 1 or 3], none of them 0")
    return clips


def _enlarge(images, factor):
    """[..., H, W, C] with every pixel as factor x factor pixels."""
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _text(caption):
    """`caption` (any number of lines) in black on white, uint8 [H, W, 3]."""
    font = ImageFont.load_default(CAPTION_SIZE)
    lines = caption.split("\n")
    line_height = sum(font.getmetrics())
    width = max(math.ceil(font.getlength(line)) for line in lines)
    label = Image.new("RGB", (max(width, 1), line_height * len(lines)), "white")
    draw = ImageDraw.Draw(label)
    for number, line in enumerate(lines):
        draw.text((0, number * line_height), line, fill="black", font=font)
    return np.asarray(label)


def _blank(height, width):
    return np.full((height, width, 3), WHITE, np.uint8)


def _paste(canvas, picture, top, left):
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
