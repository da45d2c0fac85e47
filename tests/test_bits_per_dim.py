"""Bits per dimension of held-out images: nested/evaluation/likelihood.py, and the mode that computes them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from nested.diffusion.level import Level, fold_rows, normal
from nested.diffusion.process import Process
from nested.diffusion.samplers.ddpm import DDPM
from nested.diffusion.schedules import ExponentialVE, LinearVP, sd_scaled_linear
from nested.evaluation.likelihood import measure_likelihood, noise_range
from nested.modes import evaluate, train
from nested.runtime import partition

MEAN, STD, SIDE, COUNT, SEED = 0.2, 0.5, 4, 6, 3


@dataclasses.dataclass(frozen=True)
class GaussianNetwork:
    """The exact estimate of x0 for pixels that are N(MEAN, STD^2), independent; it is told t."""

    process: Process
    buffers = ()
    has_dropout = False

    def apply(self, variables, x, c_noise, cond, *, train):
        assert not train and x.dtype == jnp.float32
        alpha, sigma = (value[:, None, None, None] for value in self.process.schedules[0](c_noise))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)


def surprise(x, mean, variance):
    """-log N(x; mean, variance)."""
    return 0.5 * (x - mean) ** 2 / variance + 0.5 * math.log(2 * math.pi * variance)


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("schedule", [ExponentialVE(), LinearVP()])
def test_a_gaussian_has_the_bits_of_its_density(schedule, batch):
    """Independent pixels: the trace is exact, so each image's number is that of N(MEAN, STD^2 + sigma_min^2), but for
    the prior, which is N(0, sigma_max^2) and not N(MEAN, STD^2 + sigma_max^2)."""
    process = Process((schedule,), parameterization="x0", discrete_steps=0, time_scale=1.0)
    level = Level("x", (SIDE, SIDE, 1), GaussianNetwork(process), process, DDPM(steps=2))
    images = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 1), dtype=np.uint8)
    padded = np.concatenate([images, images[:2]])
    found = measure_likelihood(
        level, {}, lambda raw, key: {"x": raw["image"] / 127.5 - 1},
        [{"image": padded[start : start + batch]} for start in range(0, COUNT, batch)], COUNT,
        partition.make_mesh(1, 1), seed=SEED, sigma_min=0.05, sigma_max=60.0, steps=60,
    )  # fmt: skip
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(SEED), jnp.arange(COUNT, dtype=jnp.uint32))
    x = images / 127.5 - 1 + 0.05 * np.asarray(normal(fold_rows(keys, 0), (SIDE, SIDE, 1)), np.float64)
    variance, widest = STD**2 + 0.05**2, STD**2 + 60.0**2
    at_the_end = MEAN + (x - MEAN) * math.sqrt(widest / variance)  # where the ODE leads
    nats = surprise(x, MEAN, variance) - surprise(at_the_end, MEAN, widest) + surprise(at_the_end, 0.0, 60.0**2)
    expected = nats.mean((1, 2, 3)) / math.log(2) + math.log2(127.5)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_range_is_that_of_the_process():
    lowest, highest = noise_range(Process((sd_scaled_linear(),)))  # 1,000 steps: beta_1 = .00085
    assert lowest == pytest.approx(math.sqrt(0.00085 / (1 - 0.00085)), rel=1e-3) and 14 < highest < 15
    assert noise_range(Process((ExponentialVE(),), discrete_steps=0)) == (0.01, 80.0)
    assert noise_range(Process((sd_scaled_linear(),)), 0.1, 5.0) == (0.1, 5.0)


def test_a_run_reports_the_bits_of_its_held_out_images(tmp_path, capsys):
    config = tiny.get_config("L1")
    config.train.steps = 1
    config.sample.update(num_samples=0, batch_size=4)
    config.evaluate.update(num_samples=0, likelihood=6, likelihood_steps=3)
    train.run(config, str(tmp_path))
    path = tmp_path / "likelihood.json"
    first = json.loads(path.read_text())
    assert f"likelihood: {first['bits_per_dim']:.4f} bits/dim" in capsys.readouterr().out
    assert (first["num_images"], first["dims"], first["steps"], first["step"]) == (6, 64, 3, 1)
    assert math.isfinite(first["bits_per_dim"]) and first["standard_error"] > 0
    path.unlink()
    config.sample.batch_size = 8
    config.train.dtype = "bfloat16"  # likelihoods are computed in float32 whatever the training's type
    evaluate.run(config, str(tmp_path))
    again = json.loads(path.read_text())
    assert again["bits_per_dim"] == pytest.approx(first["bits_per_dim"], rel=1e-5)
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    "arg, changes, message",
    [
        ("L2", {}, "bits per dimension are defined for a single level; this config has 2"),
        ("L1", {"evaluate.likelihood": 9}, "likelihood 9: needs as many images .* config.data.holdout is 8"),
        ("L1", {"levels[0].source": "patch_pca"}, "needs a level of pixels, x has the source 'patch_pca'"),
        ("L1", {"levels[0].shape": ((4, 4, 1), (8, 8, 1))}, "needs a level of pixels, x has several resolutions"),
    ],
)
def test_what_has_no_likelihood_is_refused_before_training(arg, changes, message):
    config = tiny.get_config(arg)
    config.evaluate.likelihood = 4
    config = tiny.with_changes(*changes.items(), config=config)
    with pytest.raises(ValueError, match=message) as error:
        evaluate.check_evaluation(config)
    assert "\n" not in str(error.value)
