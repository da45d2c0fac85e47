"""Plots of scores: panels of curves over the values of one option."""

import io
import math

from nested.runtime.files import atomic_write


def score_curves(x, panels, x_label, path, against=()):
    """Draws a panel for each score, side by side, and writes the PNG, whole or not at all.

    x: the values of the option, of every curve the same; numbers lie on an axis, where one is infinite or no number
    all stand at equal distances. panels: {score: {legend text: its values at x}}; NaN leaves a gap. against: two of
    the scores; the second is drawn over the first in a panel of its own, each point with its x.
    """
    from matplotlib.figure import Figure

    numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in x)
    places = x if numbers else range(len(x))
    labels = [f"{v:g}" if isinstance(v, (int, float)) else v for v in x]
    count = len(panels) + bool(against)
    picture = Figure(figsize=(4.6 * count + 0.4, 4.4), dpi=120, layout="constrained")
    axes = picture.subplots(1, count, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        handles = [axis.plot(places, y, marker="o", markersize=4, linewidth=1.6)[0] for y in lines.values()]
        _dress(axis, title, x_label)
        axis.set_xticks(places, labels)
    if against:
        across, up = (panels[name] for name in against)
        for name in up:
            axes[-1].plot(across[name], up[name], marker="o", markersize=4, linewidth=1.6)
            for label, *point in zip(labels, across[name], up[name], strict=True):
                axes[-1].annotate(label, point, xytext=(4, 4), textcoords="offset points", fontsize=8, color="0.35")
        _dress(axes[-1], f"{against[1]} over {against[0]}, by {x_label}", against[0])
    if len(lines) > 1:
        picture.legend(handles, lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())


def _dress(axis, title, x_label):
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(x_label)
    axis.grid(True, color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
