"""Pictures of what the levels decide, and of a sample on its way from noise to an image.

Images are uint8 arrays as in nested/figures/grids.py; both functions return one picture, uint8 [height, width, 3].
"""

from collections.abc import Sequence

import numpy as np

from nested.figures.grids import as_rgb, compose_grid, enlarge


def hierarchy_picture(rows: Sequence[tuple[str, np.ndarray]], scale: int | None = None, padding: int = 2) -> np.ndarray:
    """The figure of what each level decides: one strip of images per row, its caption to the left.

    rows: (caption, uint8 images [N, H, W, 1 or 3]) pairs, such as ("all levels resampled", ...), ("z3 fixed", ...),
    ("z3, z2 fixed", ...): Nested Diffusion, figure 1. Rows may differ in N but not in the size of their images.
    scale, padding: as in image_grid. Raises ValueError if there are no rows or their images differ in size, and as
    image_grid does.
    """
    if not rows:
        raise ValueError("hierarchy_picture: no rows; give (caption, images) pairs")
    captions, strips = zip(*rows, strict=True)
    strips = [as_rgb(strip) for strip in strips]
    sizes = sorted({strip.shape[1:3] for strip in strips})
    if len(sizes) > 1:
        raise ValueError(f"hierarchy_picture: found rows of image sizes {sizes}; give images of one size")
    return compose_grid(strips, scale, padding, captions, ())


def steps_picture(
    steps: Sequence[Sequence[np.ndarray]], scale: int | None = None, padding: int = 2, step_captions: Sequence[str] = ()
) -> np.ndarray:
    """The figure of a sample on its way: a column per step and a row per resolution (Matryoshka Diffusion, figure 11).

    steps: for each step the images of one sample at every resolution, uint8 [H, W, 1 or 3] each, always in the same
    order, which is the order of the rows. Every image is enlarged with nearest-neighbour pixels to the largest size.
    step_captions: one text per step, drawn above its column. scale, padding: as in image_grid.
    Raises ValueError if there are no steps, if the steps differ in their sizes, or if a size does not divide the
    largest.
    """
    shapes = sorted({tuple(np.shape(image) for image in step) for step in steps})
    if len(shapes) != 1 or not shapes[0]:
        raise ValueError(f"steps_picture: found steps of images {shapes}; give every step images of the same sizes")
    strips = [as_rgb(np.stack(images)) for images in zip(*steps, strict=True)]
    sizes = [strip.shape[1:3] for strip in strips]
    largest = max(sizes)
    for height, width in sizes:
        factor = largest[0] // height
        if (factor * height, factor * width) != largest:
            raise ValueError(f"steps_picture: {height} x {width} images do not enlarge to {largest[0]} x {largest[1]}")
    strips = [enlarge(strip, largest[0] // strip.shape[1]) for strip in strips]
    captions = [f"{height} x {width}" for height, width in sizes]
    return compose_grid(strips, scale, padding, captions, step_captions)
