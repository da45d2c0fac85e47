"""Plots: losses over training, scores over the values of an option, and distances to the training images.

matplotlib is imported by the functions that draw, because it takes half a second to load. Every plot is written as a
PNG file that is either complete or absent.
"""

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nested.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SHORTEST_SMOOTHED = 10  # points: a curve of fewer is drawn as it is
LOG_RANGE = 4.0  # largest over smallest loss above which the axis is logarithmic
PAIR_COLUMNS = 4  # pairs of images in a row of memorization_picture
GROUP_COLOURS = ("C3", "C0", "0.6")  # of the groups in memorization_picture, in their order


def loss_curves(
    metrics: Sequence[Mapping[str, float]], path: str | os.PathLike, levels: Sequence[str] | None = None
) -> None:
    """Draws each level's losses against the training step, one panel per level on a common axis, and writes the PNG.

    metrics: dicts with "step" and any of "loss/LEVEL" (training) and "validation/LEVEL/tT" (EMA weights at the time T
    of the noise schedule), as the training loop logs them. The training loss is drawn faint and, over it, smoothed by
    a centred running mean of a thirtieth of its points. levels: the panels in order; by default those found in
    `metrics`. Values that are not finite are left out.
    Raises ValueError if a level has no training loss to draw.
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
    _save(figure, path)


def _draw_training(axis: "Axes", steps: np.ndarray, losses: np.ndarray) -> "dict[str, Line2D]":
    """Draws the training curve of one level; {legend text: line}."""
    axis.grid(True, which="major", color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if len(steps) < SHORTEST_SMOOTHED:
        return {"training": axis.plot(steps, losses, color="C0", linewidth=1.8, marker="o", markersize=3)[0]}
    raw = axis.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)[0]
    smooth = axis.plot(steps, _running_mean(losses, max(3, len(losses) // 30)), color="C0", linewidth=1.8)[0]
    return {"training": raw, "training, smoothed": smooth}


def _draw_validation(axis: "Axes", metrics: Sequence[Mapping[str, float]], level: str) -> "dict[str, Line2D]":
    """Draws the validation curves of one level, from light (little noise) to dark (much noise); {legend text: line}."""
    from matplotlib import colormaps

    times = sorted(_keys(metrics, f"validation/{level}/t"), key=float)
    handles = {}
    for number, time in enumerate(times):
        steps, losses = _curve(metrics, f"validation/{level}/t{time}")
        colour = colormaps["YlOrRd"](0.45 + 0.5 * number / max(1, len(times) - 1))
        line = axis.plot(steps, losses, color=colour, linewidth=1.2, marker="o", markersize=2.5)[0]
        handles[f"validation, t = {time}"] = line
    return handles


def _scale_losses(axis: "Axes", lines: "Sequence[Line2D]") -> None:
    """Makes the axis logarithmic, with plain numbers, if the losses are positive and span more than LOG_RANGE."""
    from matplotlib import ticker

    values = np.concatenate([np.asarray(line.get_ydata()) for line in lines])
    if values.min() > 0 and values.max() > LOG_RANGE * values.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _keys(metrics: Sequence[Mapping[str, float]], prefix: str) -> dict[str, None]:
    """The rest of each metric name that starts with `prefix`, in order of appearance, as the keys of a dict."""
    return {name.removeprefix(prefix): None for line in metrics for name in line if name.startswith(prefix)}


def _curve(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one metric, float64, without the values that are not finite."""
    points = [(line["step"], line[name]) for line in metrics if name in line and math.isfinite(line[name])]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The centred mean over an odd window of about `width` points; the window is cut off at the ends."""
    half = min(width // 2, len(values) // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def score_curves(
    x: Sequence[float | str],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    x_label: str,
    path: str | os.PathLike,
    against: tuple[str, str] | tuple[()] = (),
) -> None:
    """Draws scores over the values of an option, one panel per score, and writes the PNG.

    x: the values of the option, the same for every curve. Numbers lie on an axis; if one is infinite or not a number,
    all values stand at equal distances. panels: {score: {legend text: its values at x}}; NaN leaves a gap.
    against: two of the scores, or (); the second is drawn over the first in a further panel, each point with its x.
    """
    from matplotlib.figure import Figure

    numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in x)
    places = np.asarray(x, np.float64) if numbers else np.arange(len(x))
    labels = [value if isinstance(value, str) else f"{value:g}" for value in x]
    count = len(panels) + bool(against)
    picture = Figure(figsize=(4.6 * count + 0.4, 4.4), dpi=120, layout="constrained")
    axes = picture.subplots(1, count, squeeze=False)[0]
    legend = {}
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        legend = {name: axis.plot(places, y, marker="o", markersize=4, linewidth=1.6)[0] for name, y in lines.items()}
        _label_panel(axis, title, x_label)
        axis.set_xticks(places, labels)
    if against:
        across, up = (panels[name] for name in against)
        for name in up:
            axes[-1].plot(across[name], up[name], marker="o", markersize=4, linewidth=1.6)
            for label, *point in zip(labels, across[name], up[name], strict=True):
                axes[-1].annotate(label, point, xytext=(4, 4), textcoords="offset points", fontsize=8, color="0.35")
        _label_panel(axes[-1], f"{against[1]} over {against[0]}, by {x_label}", against[0])
    if len(legend) > 1:
        picture.legend(legend.values(), legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _save(picture, path)


def _label_panel(axis: "Axes", title: str, x_label: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(x_label)
    axis.grid(True, color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def memorization_picture(
    pairs: Iterable[tuple[np.ndarray, np.ndarray, str]],
    distances: Mapping[str, Mapping[str, np.ndarray]],
    path: str | os.PathLike,
) -> None:
    """Draws samples beside their nearest training images, and the distributions of the distances; writes the PNG.

    pairs: (sample, training image, title) triples; both images are uint8 [H, W, 1 or 3]. distances: {axis label:
    {group: distances [N]}}, a panel of histograms for each label; the groups are coloured in the order of
    GROUP_COLOURS.
    """
    from matplotlib.figure import Figure

    pairs = list(pairs)
    down = -(-len(pairs) // PAIR_COLUMNS)
    figure = Figure(figsize=(15, max(5.0, 1.35 * down)), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(3, 2))[0]
    left.suptitle("Samples (left) nearest by features to a training image (right); pixel and feature distance")
    axes = left.subplots(down, PAIR_COLUMNS, squeeze=False).ravel()
    for axis, (sample, partner, title) in zip(axes, pairs, strict=False):
        between = np.full((sample.shape[0], max(1, sample.shape[1] // 16), sample.shape[2]), 255, np.uint8)
        pair = np.concatenate([sample, between, partner], axis=1)
        axis.imshow(pair.repeat(3 // pair.shape[2], axis=2), interpolation="nearest")
        axis.set_title(title, fontsize=8)
    for axis in axes:
        axis.axis("off")
    panels = right.subplots(len(distances), 1, squeeze=False).ravel()
    for axis, (x_label, groups) in zip(panels, distances.items(), strict=True):
        bins = np.linspace(0, np.quantile(np.concatenate(list(groups.values())), 0.995) or 1.0, 50)
        for (group, values), colour in zip(groups.items(), GROUP_COLOURS, strict=True):
            label = f"{group}: {len(values):,}"
            axis.hist(values, bins, density=True, histtype="step", color=colour, label=label)
        axis.set_xlabel(x_label)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: "Figure", path: str | os.PathLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
