"""nested/diffusion/hierarchy.py: what conditions what, noise and drops row by row, the cascade of sampling."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.probes import Probe, draw, make_levels

from nested.build.levels import build_levels
from nested.diffusion import conditioning, hierarchy, process, samplers, schedules
from nested.diffusion.level import Level, row_keys
from nested.diffusion.samplers import k_diffusion as sigma_samplers


def every(keys):
    return dict.fromkeys(("top", "middle", "bottom", "pair", "fine"), keys)


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


def test_rows_do_not_depend_on_the_batch():
    levels = make_levels(cond_drop=0.5)
    params = hierarchy.init(levels, jax.random.key(0))
    keys, variables, labels = draw(8)
    times = hierarchy.sample_times(levels, keys)
    whole = hierarchy.losses(levels, params, variables, {"label": labels}, times, keys)
    part = jax.tree.map(lambda x: x[2:5], (variables, {"label": labels}, times, keys))
    some = hierarchy.losses(levels, params, *part)
    for name in whole:
        np.testing.assert_allclose(whole[name][2:5], some[name], rtol=1e-6)


def test_only_the_named_levels_have_a_loss_and_weights_scale_it():
    levels = make_levels()
    params = hierarchy.init(levels, jax.random.key(0))
    keys, variables, labels = draw(4)
    times = hierarchy.sample_times(levels, keys)
    one = hierarchy.losses(levels, params, variables, {"label": labels}, times, keys, only=("middle",))
    assert list(one) == ["middle"]
    doubled = make_levels(loss_weight=2.0)
    two = hierarchy.losses(doubled, params, variables, {"label": labels}, times, keys, only=("middle",))
    np.testing.assert_allclose(two["middle"], 2 * one["middle"], rtol=1e-6)


def test_init_of_shared_levels_is_the_same_in_a_deeper_hierarchy():
    levels = make_levels()
    deep, shallow = hierarchy.init(levels, jax.random.key(0)), hierarchy.init(levels[:2], jax.random.key(0))
    assert sorted(deep) == ["bottom", "middle", "top"]
    np.testing.assert_array_equal(deep["middle"]["bias"], shallow["middle"]["bias"])
    assert deep["middle"]["bias"] != deep["top"]["bias"]


def test_sampling_goes_coarse_to_fine_and_keeps_what_is_fixed():
    levels = make_levels()
    biases = {"top": 1.0, "middle": 10.0, "bottom": 0.0}
    params = {name: {"bias": jnp.array([bias])} for name, bias in biases.items()}
    keys, _, labels = draw(3)
    result = hierarchy.sample(levels, params, every(keys), {"label": labels})
    np.testing.assert_allclose(result["top"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(result["middle"], 11.0, rtol=1e-5)
    np.testing.assert_allclose(result["bottom"][:, 0, 0, 0], 12.0 + labels, rtol=1e-5)
    fixed = {"top": jnp.full((3, 1, 1, 2), 5.0)}
    result = hierarchy.sample(levels, params, every(keys), {"label": labels}, fixed)
    np.testing.assert_array_equal(result["top"], fixed["top"])
    np.testing.assert_allclose(result["middle"], 15.0, rtol=1e-5)


def test_guidance_subtracts_the_null_conditions():
    levels = make_levels(guidance=0.5)
    params = {name: {"bias": jnp.zeros(1)} for name in ("top", "middle", "bottom")}
    keys, _, labels = draw(2)
    fixed = {"top": jnp.full((2, 1, 1, 2), 4.0)}
    middle = hierarchy.sample(levels, params, every(keys), {"label": labels}, fixed)["middle"]
    np.testing.assert_allclose(middle, 4.0 + 0.5 * (4.0 - 100.0), rtol=1e-5)


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


def test_two_levels_are_markovian_either_way():
    """With one coarser level, 'all_higher' and 'next_higher' build the same hierarchy; with two they do not."""
    for depth, same in (("L2", True), ("L3", False)):
        configs = [tiny.get_config(depth), tiny.get_config(depth)]
        configs[1].hierarchy.conditioning = "next_higher"
        shapes = [
            jax.eval_shape(lambda key, config=config: hierarchy.init(build_levels(config), key), jax.random.key(0))
            for config in configs
        ]
        seen = [[level.conditions for level in build_levels(config)] for config in configs]
        assert (seen[0] == seen[1]) == same == (jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1]))


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


def test_a_tuple_variable_goes_through_the_same_code():
    """Two leaves of different shape with a schedule each (Matryoshka's form): loss, sampling and conditioning."""
    proc = process.Process(schedules=(schedules.sd_scaled_linear(), schedules.LinearVP()), parameterization="x0")
    sampler = samplers.DDIM(steps=4, eta=0.0)
    pair = Level("pair", ((4, 4, 1), (8, 8, 1)), Probe(), proc, sampler, leaf_weights=(1.0, 0.5))
    fine = Level("fine", (2, 2, 1), Probe(("pair",)), make_levels()[0].process, sampler, ("pair",), (0.3,))
    levels = (pair, fine)
    params = jax.tree.map(jnp.zeros_like, hierarchy.init(levels, jax.random.key(0)))
    keys = row_keys(jax.random.key(0), 3)
    result = hierarchy.sample(levels, params, every(keys))
    assert [leaf.shape for leaf in result["pair"]] == [(3, 4, 4, 1), (3, 8, 8, 1)]
    variables = {"pair": (jnp.ones((3, 4, 4, 1)), jnp.full((3, 8, 8, 1), 2.0)), "fine": jnp.zeros((3, 2, 2, 1))}
    losses = hierarchy.losses(levels, params, variables, None, hierarchy.sample_times(levels, keys), keys)
    np.testing.assert_allclose(losses["pair"], 1.0 * 1 + 0.5 * 4, rtol=1e-4)  # the network says 0, in x0 space
