"""nested/diffusion/conditioning.py: what a level sees of the coarser ones, noise and drops row by row."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.probes import draw, make_levels

from nested.diffusion import conditioning, process, schedules
from nested.diffusion.samplers import k_diffusion as sigma_samplers


def test_training_conditions_have_the_levels_sigma():
    _, _, bottom = make_levels()
    keys, variables, labels = draw(4096)
    cond = conditioning.train_conditions(bottom, variables, {"label": labels}, keys)
    noise = np.asarray(cond["top"] - variables["top"])
    assert abs(noise.std() - 0.5) < 0.02 and abs(noise.mean()) < 0.02
    np.testing.assert_array_equal(cond["middle"], variables["middle"])
    assert bool(cond["keep_top"].all()) and bool((cond["label"] == labels).all())


def test_joint_drop_loses_everything_at_once():
    _, _, bottom = make_levels(cond_drop=0.25)
    keys, variables, labels = draw(8192)
    cond = conditioning.train_conditions(bottom, variables, {"label": labels}, keys)
    dropped = ~np.asarray(cond["keep_top"])
    assert abs(dropped.mean() - 0.25) < 0.02
    np.testing.assert_array_equal(dropped, ~np.asarray(cond["keep_middle"]))
    np.testing.assert_array_equal(dropped, np.asarray(cond["label"]) == 10)


def test_independent_drop_tosses_a_coin_each():
    _, _, bottom = make_levels(cond_drop=0.5, drop_mode="independent")
    keys, variables, labels = draw(8192)
    cond = conditioning.train_conditions(bottom, variables, {"label": labels}, keys)
    coins = np.stack([~np.asarray(cond["keep_top"]), ~np.asarray(cond["keep_middle"]), np.asarray(cond["label"]) == 10])
    np.testing.assert_allclose(coins.mean(1), 0.5, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(coins), np.eye(3), atol=0.05)


def test_null_conditions_are_all_absent():
    _, _, bottom = make_levels()
    _, variables, labels = draw(3)
    null = conditioning.null_cond(bottom, conditioning.conditions(bottom, variables, {"label": labels}))
    assert not null["keep_top"].any() and not null["keep_middle"].any() and (null["label"] == 10).all()


def shown(level, *times, batch=2048):
    """What `level` sees of zeros at these times, one after the other."""
    seen = []
    denoise = conditioning.noised_conditions(level, lambda x, t, cond: seen.append(cond["top"]), draw(batch)[0])
    for t in times:
        denoise(None, jnp.full(batch, t), {"top": jnp.zeros((batch, 1, 1, 2)), "keep_top": jnp.ones(batch, bool)})
    return seen


@pytest.mark.parametrize(
    "gamma, scale, expected",
    [
        (math.inf, "variance", 0.0),
        (0.0, "variance", 0.5),
        (2.0, "variance", 0.5 * 0.25),  # variance (t/T)^gamma sigma^2, t/T = 1/4, sigma = 1/2
        (2.0, "std", 0.5 * 0.25**2),
        (0.0, "std", 0.5),
    ],
)
def test_generated_conditions_are_noised_by_time_to_the_gamma(gamma, scale, expected):
    _, middle, _ = make_levels(noise_gamma=gamma, noise_scale=scale)
    (z,) = shown(middle, 0.25)
    assert abs(float(z.std()) - expected) < 0.1 * expected + 1e-6


def test_the_noise_on_a_condition_is_one_per_sample_or_one_per_evaluation():
    _, middle, _ = make_levels(noise_gamma=0.0)
    first, second = shown(middle, 0.25, 0.5)
    np.testing.assert_array_equal(first, second)
    anew = dataclasses.replace(middle, noise_resample=True)
    first, second, again = shown(anew, 0.25, 0.5, 0.25)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.06
    np.testing.assert_array_equal(first, again)  # of the time: whatever the batch or the solver's order
    np.testing.assert_array_equal(shown(anew, 0.25, batch=16)[0], first[:16])


def test_noise_on_conditions_of_an_edm_level_falls_over_the_samplers_own_range():
    sampler = sigma_samplers.DPMpp2M(5, "karras", 5e-4, 80.0)  # 5e-4 lies below the schedule's t = 0
    edm = process.Process((schedules.ExponentialVE(),), "edm", sigma_data=0.5, discrete_steps=0)
    _, middle, _ = make_levels(noise_gamma=1.0)
    level = dataclasses.replace(middle, process=edm, sampler=sampler)
    t = schedules.ExponentialVE().inverse_log_snr(-np.log([80.0, 0.2, 5e-4, 1e-4]))
    np.testing.assert_allclose(conditioning.time_fraction(level, jnp.asarray(t)), [1.0, 0.5, 0.0, 0.0], atol=1e-5)
    assert float(conditioning.time_fraction(middle, jnp.asarray(0.3))) == pytest.approx(0.3)


def test_a_missing_label_names_the_level():
    _, _, bottom = make_levels()
    _, variables, _ = draw(2)
    with pytest.raises(ValueError, match=r"level bottom has num_classes 10 but no 'label' \[B\] is given"):
        conditioning.conditions(bottom, variables, {})


def test_condition_noise_must_be_there_to_be_added():
    _, middle, _ = make_levels()
    with pytest.raises(ValueError, match="level middle has no condition_noise: its conditions are"):
        conditioning.add_condition_noise(middle, {}, draw(2)[0], train=True)
