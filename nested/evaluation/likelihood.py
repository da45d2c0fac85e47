"""Bits per dimension of held-out images, by the probability-flow ODE of a level of pixels (diffusion/likelihood.py).

    u          = x + sigma_min n, n ~ N(0, I)             an image in [-1, 1], dequantised by Gaussian noise
    bits / dim = -log2 p_min(u) / dims + log2(127.5)      127.5 grey levels per unit of x

p_min is the model's density at noise level sigma_min, without guidance or limits on x0. The number is therefore the
negative log density of noised images in units of grey levels. It is not the bound on the probability of 8-bit images
that uniform dequantisation gives (Ho et al., arXiv 2006.11239, Sec. 4.1; Song et al., arXiv 2011.13456), and compares
only with numbers at the same sigma_min.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from nested.diffusion.conditioning import conditions
from nested.diffusion.denoiser import DenoiseFn, denoiser
from nested.diffusion.hierarchy import apply_network
from nested.diffusion.level import Level, fold_rows, normal, select_context
from nested.diffusion.likelihood import log_likelihood
from nested.diffusion.process import Process
from nested.runtime import partition
from nested.runtime.files import atomic_write
from nested.runtime.writers import Progress

Tree = Any
SIGMA_MIN, SIGMA_MAX = 0.01, 80.0  # the range of noise levels, as far as the process is trained there
GREY_LEVELS = 127.5  # per unit of a pixel in [-1, 1]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The content of likelihood.json.

    bits_per_dim: the mean over the images. standard_error: of that mean. num_images, dims: the images, and the numbers
    in each. sigma_min, sigma_max, steps: of the integration. step: of the checkpoint. weights: Score.weights."""

    bits_per_dim: float
    standard_error: float
    num_images: int
    dims: int
    sigma_min: float
    sigma_max: float
    steps: int
    step: int
    weights: str = ""

    def __str__(self) -> str:
        return (
            f"{self.bits_per_dim:.4f} bits/dim, standard error {self.standard_error:.4f}, of {self.num_images:,} "
            f"held-out images with noise {self.sigma_min:.4g} (density at that noise level, not 8-bit probability)"
        )


def noise_range(process: Process, sigma_min: float = 0.0, sigma_max: float = 0.0) -> tuple[float, float]:
    """The range of noise levels sigma / alpha to integrate over.

    sigma_min, sigma_max: the ends, if they are given; 0 takes SIGMA_MIN and SIGMA_MAX or, where the process has no
    such noise levels, its first or last one."""
    first = 1 / process.discrete_steps if process.discrete_steps else process.t_min
    alpha, sigma = (np.asarray(value, np.float64) for value in process.schedules[0](np.array([first, 1.0])))
    with np.errstate(divide="ignore"):
        lowest, highest = sigma / alpha
    return sigma_min or max(SIGMA_MIN, float(lowest)), sigma_max or min(SIGMA_MAX, float(highest) * (1 - 1e-6))


def bits_per_dim(
    denoise: DenoiseFn,
    process: Process,
    x: jax.Array,
    cond: Mapping[str, Any],
    keys: jax.Array,
    *,
    sigma_min: float,
    sigma_max: float,
    steps: int,
) -> jax.Array:
    """Bits per dimension [B] of images x, [B, H, W, C] in [-1, 1]; for jit.

    keys: [B] typed keys of the noise and of the probe of the trace. The other arguments are log_likelihood's."""
    noised = x + sigma_min * normal(fold_rows(keys, 0), x.shape[1:])
    probe = fold_rows(keys, 1)
    nats = log_likelihood(denoise, process, noised, cond, probe, sigma_min=sigma_min, sigma_max=sigma_max, steps=steps)
    return -nats / (math.log(2) * math.prod(x.shape[1:])) + math.log2(GREY_LEVELS)


def measure_likelihood(
    level: Level,
    params: Tree,
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    number: int,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    sigma_min: float,
    sigma_max: float,
    steps: int,
) -> np.ndarray:
    """Computes bits per dimension of a level of pixels that sees no coarser one, given the images' context.

    Args:
      level, params: the level and its parameters.
      variables: (records, None) -> {level name: clean variable}, traceable by jit.
      batches: records {field: [B, ...]}, whole in every process, all of one B that the devices divide.
      number: how many images there are; what the last batch has beyond them is padding.
      mesh: the devices, over which rows are split.
      seed: image i's noise and probe are functions of (seed, i), whatever the batches.
      sigma_min, sigma_max, steps: of the integration.
    Returns: float32 [number], the same in every process.
    """

    def of_batch(params: Tree, raw: Mapping[str, jax.Array], indices: jax.Array) -> jax.Array:
        denoise = denoiser(apply_network(level, params, train=False), level.process)
        cond = conditions(level, {}, select_context((level,), raw))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
        x = variables(raw, None)[level.name]
        return bits_per_dim(
            denoise, level.process, x, cond, keys, sigma_min=sigma_min, sigma_max=sigma_max, steps=steps
        )

    compiled = jax.jit(of_batch, out_shardings=partition.replicated(mesh))
    progress, result, done = Progress("likelihood, held-out images", number), [], 0
    for batch in batches:
        rows = len(next(iter(batch.values())))
        indices = np.arange(done, done + rows, dtype=np.uint32)
        raw = {name: partition.split_rows(np.asarray(value), mesh) for name, value in batch.items()}
        with jax.default_matmul_precision("highest"):
            result.append(np.asarray(compiled(params, raw, partition.split_rows(indices, mesh))))
        progress.update(done := min(done + rows, number))
    return np.concatenate(result)[:number]


def write_likelihood(workdir: str, likelihood: Likelihood) -> str:
    """Writes WORKDIR/likelihood.json in process 0; returns its path."""
    path = os.path.join(workdir, "likelihood.json")
    if jax.process_index() == 0:
        atomic_write(path, json.dumps(dataclasses.asdict(likelihood), indent=2) + "\n")
    return path
