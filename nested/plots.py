"""Plots of scores: panels of curves over the values of one option."""

import io
import math

from nested.files import atomic_write


def curves(x, panels, x_label, path):
    """Draws a panel for each score, side by side, and writes the PNG, whole or not at all.

    x: the values of the option, of every curve the same; numbers lie on an axis, where one is infinite or no number
    all stand at equal distances. panels: {score: {legend text: its values at x}}; NaN leaves a gap.
    """
    from matplotlib.figure import Figure

    numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in x)
    places = x if numbers else range(len(x))
    picture = Figure(figsize=(4.6 * len(panels) + 0.4, 4.4), dpi=120, layout="constrained")
    for axis, (title, lines) in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        handles = [axis.plot(places, y, marker="o", markersize=4, linewidth=1.6)[0] for y in lines.values()]
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlabel(x_label)
        axis.grid(True, color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks(places, [f"{v:g}" if isinstance(v, (int, float)) else v for v in x])
    if len(lines) > 1:
        picture.legend(handles, lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
