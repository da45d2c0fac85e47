"""Samplers: how a level's variable is drawn from its denoiser, each method a table of coefficients.

ddpm holds DDIM, DDPM and Euler's methods in time, dpm_solver the DPM-Solvers, k_diffusion the samplers of EDM and
k-diffusion; table runs them all, noise_levels has the grids of noise levels. Imports schedules, process and denoiser of
nested.diffusion only.
"""

from nested.diffusion.samplers.ddpm import DDIM, DDPM, EulerInTime, EulerMaruyama
from nested.diffusion.samplers.dpm_solver import DPMSolver
from nested.diffusion.samplers.k_diffusion import (
    DPM2,
    LMS,
    DPM2Ancestral,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2SAncestral,
    DPMpp3MSDE,
    DPMppSDE,
    Euler,
    EulerAncestral,
    Heun,
)
from nested.diffusion.samplers.table import Sampler, TableSampler

__all__ = [
    "DDIM",
    "DDPM",
    "DPM2",
    "LMS",
    "DPM2Ancestral",
    "DPMSolver",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2SAncestral",
    "DPMpp3MSDE",
    "DPMppSDE",
    "Euler",
    "EulerAncestral",
    "EulerInTime",
    "EulerMaruyama",
    "Heun",
    "Sampler",
    "TableSampler",
]
