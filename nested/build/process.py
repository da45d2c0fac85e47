"""Config -> a level's process and its sampler."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nested.build.options import choose, construct
from nested.build.parts import DENSITIES, SAMPLERS, SCHEDULES
from nested.diffusion.process import Process
from nested.diffusion.samplers.table import Sampler
from nested.diffusion.schedules import Shifted


def is_joint(shape: Sequence[Any]) -> bool:
    """Return whether a level's shape is a tuple of shapes: resolutions that are diffused together."""
    return not isinstance(shape[0], int)


def side_ratios(shape: Sequence[Any]) -> tuple[float, ...]:
    """Return how many times finer than the coarsest each leaf's grid is, per side.

    16 frames count as a 4 x 4 grid of images (ml-mdm's 'nest_ratio'; the papers' 'cosine-shift4' for 64 -> 256 pixels
    and for 1 -> 16 frames).
    """
    grids = [math.prod(leaf[:-1]) for leaf in (shape if is_joint(shape) else (shape,))]
    return tuple(math.sqrt(grid / grids[0]) for grid in grids)


def build_process(options: Mapping[str, Any], shape: Sequence[Any], key: str) -> tuple[Process, tuple[float, ...]]:
    """Build the process of a variable.

    shift_power > 0 shifts the schedule of every leaf by (shift_scale x its side ratio)^shift_power; with rescale_signal
    the leaf is divided by its side ratio instead.

    Args:
      options: of config.levels[i].process. shape: of the variable. key: where the options stand, for errors.

    Returns: the process, and the numbers that its leaves are divided by, () for none.
    Raises: ValueError, in one line.
    """
    rest = dict(options)
    base = choose(f"{key}.schedule", rest.pop("schedule"), SCHEDULES)()
    if "density" in rest and rest["density"]:
        density = dict(rest["density"])
        kind = choose(f"{key}.density.name", density.pop("name"), DENSITIES)
        rest["density"] = construct(f"{key}.density", kind, density, {})
    ratios, built, scales = side_ratios(shape), (base,), ()
    if "shift_power" in rest:
        scale, power, rescale = (rest.pop(name) for name in ("shift_scale", "shift_power", "rescale_signal"))
        if rescale and power:
            raise ValueError(
                f"config.{key}: rescale_signal divides the finer images, shift_power {power} shifts their schedules: "
                "set rescale_signal to False or shift_power to 0"
            )
        if power:
            shifted = functools.partial(Shifted, base, power=power)
            built = tuple(construct(key, shifted, {}, dict(scale=scale * ratio)) for ratio in ratios)
        elif scale != 1:
            raise ValueError(f"config.{key}: shift_scale {scale} has no effect with shift_power 0: set it to 1")
        scales = ratios if rescale else ()
    return construct(key, Process, rest, dict(schedules=built)), scales


def build_sampler(options: Mapping[str, Any], key: str) -> Sampler:
    """Build the sampler that `options` name, with the other options; `key` is where they stand in the config."""
    rest = dict(options)
    return construct(key, choose(f"{key}.name", rest.pop("name"), SAMPLERS), rest, {})
