"""A level of two resolutions whose network gives each leaf a gain and a bias."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nested.diffusion import hierarchy, process, samplers, schedules
from nested.diffusion.level import Level, row_keys
from nested.models.backbone import Backbone

SHAPES = ((2, 2, 1), (4, 4, 1))


class Leafwise(Backbone):
    """Of each leaf: gain x + bias + the time, whatever its rows; of the text, the kept tokens' sum."""

    sees_text: bool = False

    @nn.compact
    def __call__(self, x, c_noise, cond, *, train):
        outputs = []
        for i, leaf in enumerate(jax.tree.leaves(x)):
            bias, gain = (self.param(f"{name}_{i}", nn.initializers.normal(1.0), (1,)) for name in ("bias", "gain"))
            outputs.append(gain[0] * leaf + bias[0] + jnp.mean(c_noise))
            if self.sees_text:
                seen = jnp.sum(cond["text"] * cond["text_mask"][..., None], axis=(1, 2))
                outputs[-1] = jnp.zeros_like(leaf) + seen.reshape(-1, *[1] * (leaf.ndim - 1))
        return jax.tree.unflatten(jax.tree.structure(x), outputs)


def joint(**changes):
    """A level of 2 and 4 pixels whose network predicts x0 and is told 1000 t."""
    proc = process.Process((schedules.cosine(),), parameterization="x0", time_scale=1000.0)
    level = Level("x", SHAPES, Leafwise(), proc, samplers.DDIM(4), leaf_weights=(1.0, 0.5))
    return dataclasses.replace(level, **changes)


def of_images(batch, seed=0):
    random = np.random.default_rng(seed)
    return {"x": tuple(jnp.asarray(random.normal(size=(batch, *shape)), jnp.float32) for shape in SHAPES)}


def losses(level, params, batch=4, variables=None, train=True):
    keys = row_keys(jax.random.key(1), batch)
    times = {"x": jnp.full(batch, 0.3)}  # one time, as Leafwise adds the mean
    return hierarchy.losses((level,), params, variables or of_images(batch), {}, times, keys, train=train)["x"]
