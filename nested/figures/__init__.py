"""Pictures of samples, levels, losses and scores, and the image files that hold them.

All functions take arrays and plain values; none knows a model or a config. The package may import nested.runtime only,
and it is the one place that uses matplotlib and draws with Pillow.
"""

from nested.figures.curves import loss_curves, memorization_picture, score_curves
from nested.figures.grids import clip_grid, image_grid, save_animation, save_png, save_samples, side_by_side
from nested.figures.levels import hierarchy_picture, steps_picture

__all__ = [
    "clip_grid",
    "hierarchy_picture",
    "image_grid",
    "loss_curves",
    "memorization_picture",
    "save_animation",
    "save_png",
    "save_samples",
    "score_curves",
    "side_by_side",
    "steps_picture",
]
