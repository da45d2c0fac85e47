"""A hierarchy of networks that show what they are given."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from nested.diffusion import process, samplers, schedules
from nested.diffusion.level import Level, row_keys
from nested.models.backbone import Backbone


class Probe(Backbone):
    """A backbone whose output shows its conditions: bias + sum of kept conditions' means + label."""

    conditions: tuple = ()
    num_classes: int = 0

    @nn.compact
    def __call__(self, x, c_noise, cond, *, train):
        bias = self.param("bias", nn.initializers.normal(1.0), (1,))
        seen = jnp.zeros(c_noise.shape)
        for name in self.conditions:
            mean = sum(leaf.mean(tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(cond[name]))
            seen += jnp.where(cond[f"keep_{name}"], mean, 100.0)
        if self.num_classes:
            seen += cond["label"]
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) + (seen + bias).reshape(-1, *[1] * (leaf.ndim - 1)), x)


def make_levels(**changes):
    proc = process.Process(schedules=(schedules.sd_scaled_linear(),), parameterization="x0")
    sampler = samplers.DDIM(steps=4, eta=0.0)
    top = Level("top", (1, 1, 2), Probe(), proc, sampler)
    middle = Level("middle", (2, 2, 3), Probe(("top",)), proc, sampler, ("top",), (0.5,))
    bottom = Level("bottom", (4, 4, 1), Probe(("top", "middle"), 10), proc, sampler, ("top", "middle"), (0.5, 0.0), 10)
    return top, dataclasses.replace(middle, **changes), dataclasses.replace(bottom, **changes)


def draw(batch, seed=0):
    keys = row_keys(jax.random.key(seed), batch)
    variables = {
        "top": jax.random.normal(jax.random.key(1), (batch, 1, 1, 2)),
        "middle": jax.random.normal(jax.random.key(2), (batch, 2, 2, 3)),
        "bottom": jax.random.normal(jax.random.key(3), (batch, 4, 4, 1)),
    }
    return keys, variables, jnp.arange(batch) % 10
