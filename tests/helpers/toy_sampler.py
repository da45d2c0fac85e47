"""A sampler from outside of nested/: the estimate of x0 is noised anew at every step, as consistency models do."""

import dataclasses
import itertools
from typing import Annotated

import numpy as np

from nested.diffusion.samplers.table import CLEAN, X0, Row, TableSampler, marginal


@dataclasses.dataclass(frozen=True)
class ToySampler(TableSampler):
    """x_s = alpha_s denoise(x_t, t) + sigma_s n on a uniform grid of times."""

    steps: Annotated[int, "network evaluations"]

    def plan(self, schedule):
        return list(itertools.pairwise([*np.linspace(1.0, 0.1, self.steps).tolist(), CLEAN]))

    def rows(self, schedule, plan):
        ends = [marginal(schedule, end) for _, end in plan]
        return [Row(t, X0, 0.0, (alpha,), sigma, True) for (t, _), (alpha, sigma) in zip(plan, ends, strict=True)]
