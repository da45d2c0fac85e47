"""The mathematics of hierarchical diffusion: schedules, processes, denoisers, samplers, levels and hierarchies of them.

Losses and samples of any system are computed here, from plain arguments and frozen dataclasses. Imports nested.ops and
nothing else of ours; networks come in as objects (level.Network).
"""

from nested.diffusion.conditioning import conditions, null_cond, train_conditions
from nested.diffusion.denoiser import Cond, DenoiseFn, thresholded
from nested.diffusion.guidance import Guider, guided
from nested.diffusion.hierarchy import init, losses, sample, sample_level, sample_times
from nested.diffusion.level import ConditionNoise, Level, fold_rows, row_keys, select_context
from nested.diffusion.likelihood import log_likelihood
from nested.diffusion.process import Process, Tree
from nested.diffusion.schedules import Density, Schedule

__all__ = [
    "Cond",
    "ConditionNoise",
    "DenoiseFn",
    "Density",
    "Guider",
    "Level",
    "Process",
    "Schedule",
    "Tree",
    "conditions",
    "fold_rows",
    "guided",
    "init",
    "log_likelihood",
    "losses",
    "null_cond",
    "row_keys",
    "sample",
    "sample_level",
    "sample_times",
    "select_context",
    "thresholded",
    "train_conditions",
]
