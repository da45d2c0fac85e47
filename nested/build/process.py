"""Config -> schedules, processes, samplers, limits on x0: the tables of their names, and the two ways to look them up.

A name in a config is a key of one of these dicts; an unknown one, or an option that its object does not take, is a
one-line error.
"""

import functools
import math
from typing import Any

from nested.diffusion import denoiser, process, schedules
from nested.diffusion.samplers import dpm_solver as samplers
from nested.diffusion.samplers import k_diffusion as sigma_samplers

SCHEDULES = {
    "sd_scaled_linear": schedules.sd_scaled_linear,
    "ldm_linear": schedules.ldm_linear,
    "cosine": schedules.cosine,
    "cosine_log_snr": schedules.cosine_log_snr,
    "ddpm_linear": schedules.ddpm_linear,
    "linear_vp": schedules.LinearVP,
    "exponential_ve": schedules.ExponentialVE,
}
DENSITIES = {
    "lognormal": schedules.LogNormal,
    "loglogistic": schedules.LogLogistic,
    "loguniform": schedules.LogUniform,
    "v_diffusion": schedules.VDiffusion,
    "cosine_interpolated": schedules.CosineInterpolated,
}
SAMPLERS = {
    "ddpm": samplers.DDPM,
    "ddim": samplers.DDIM,
    "dpm_solver": samplers.DPMSolver,
    "euler_in_time": samplers.EulerInTime,
    "euler_maruyama": samplers.EulerMaruyama,
    "euler": sigma_samplers.Euler,
    "heun": sigma_samplers.Heun,
    "dpm2": sigma_samplers.DPM2,
    "lms": sigma_samplers.LMS,
    "euler_ancestral": sigma_samplers.EulerAncestral,
    "dpm2_ancestral": sigma_samplers.DPM2Ancestral,
    "dpmpp_2s_ancestral": sigma_samplers.DPMpp2SAncestral,
    "dpmpp_sde": sigma_samplers.DPMppSDE,
    "dpmpp_2m": sigma_samplers.DPMpp2M,
    "dpmpp_2m_sde": sigma_samplers.DPMpp2MSDE,
    "dpmpp_3m_sde": sigma_samplers.DPMpp3MSDE,
}
THRESHOLDS = {
    "none": None,
    "static": functools.partial(denoiser.thresholded, percentile=None),
    "dynamic": functools.partial(denoiser.thresholded, percentile=0.995),
    "dynamic_100": functools.partial(denoiser.thresholded, percentile=0.995, maximum=100.0),
    "deepfloyd": functools.partial(denoiser.thresholded, percentile=0.95, maximum=1.5),
}


def choose(key: str, name: str, table) -> Any:
    """table[name], or a one-line error that names the key, the value found and the values allowed."""
    if name not in table:
        raise ValueError(f"config.{key}: {name!r} given; choose from {', '.join(map(repr, table))}")
    return table[name]


def construct(key: str, constructor, options: dict, derived: dict):
    """constructor(**options, **derived); `derived` is what other parts of the config decide.

    Options that it does not take, that others decide or whose values it refuses are one-line errors at `key`."""
    decided = [name for name in options if name in derived]
    if decided:
        raise ValueError(f"config.{key}: {', '.join(decided)} is decided by other parts of the config; remove it here")
    try:
        return constructor(**options, **derived)
    except TypeError as error:
        raise ValueError(f"config.{key}: {error}; found options {', '.join(options)}") from error
    except ValueError as error:
        raise ValueError(f"config.{key}: {error}") from error


def is_joint(shape) -> bool:
    """Whether a level's shape is a tuple of shapes: resolutions diffused together."""
    return not isinstance(shape[0], int)


def side_ratios(shape) -> tuple[float, ...]:
    """How many times finer than the coarsest each leaf's grid is, per side; 16 frames count as a 4 x 4 grid of images
    (ml-mdm's 'nest_ratio'; papers' 'cosine-shift4' for 64 -> 256 pixels and for 1 -> 16 frames)."""
    grids = [math.prod(leaf[:-1]) for leaf in (shape if is_joint(shape) else (shape,))]
    return tuple(math.sqrt(grid / grids[0]) for grid in grids)


def build_process(options, shape, key: str) -> tuple[process.Process, tuple[float, ...]]:
    """(the process of a variable of this shape, the numbers that its leaves are divided by, () for none).

    shift_power > 0 shifts the schedule of every leaf by (shift_scale x its side ratio)^shift_power; with rescale_signal
    the leaf is divided by its side ratio instead."""
    given = dict(options)
    base = choose(f"{key}.schedule", given.pop("schedule"), SCHEDULES)()
    if given.get("density"):
        density = dict(given["density"])
        kind = choose(f"{key}.density.name", density.pop("name"), DENSITIES)
        given["density"] = construct(f"{key}.density", kind, density, {})
    ratios, built, scales = side_ratios(shape), (base,), ()
    if "shift_power" in given:
        scale, power, rescale = (given.pop(name) for name in ("shift_scale", "shift_power", "rescale_signal"))
        if rescale and power:
            raise ValueError(
                f"config.{key}: rescale_signal divides the finer images, shift_power {power} shifts their schedules: "
                "set rescale_signal to False or shift_power to 0"
            )
        if power:
            shifted = functools.partial(schedules.Shifted, base, power=power)
            built = tuple(construct(key, shifted, {}, dict(scale=scale * ratio)) for ratio in ratios)
        elif scale != 1:
            raise ValueError(f"config.{key}: shift_scale {scale} has no effect with shift_power 0: set it to 1")
        scales = ratios if rescale else ()
    return construct(key, process.Process, given, dict(schedules=built)), scales


def sampler(options, key: str):
    given = dict(options)
    return construct(key, choose(f"{key}.name", given.pop("name"), SAMPLERS), given, {})
