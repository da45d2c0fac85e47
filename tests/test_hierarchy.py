"""nested/diffusion/hierarchy.py: losses row by row, initial values, sampling from coarse to fine."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny
from helpers.probes import Probe, draw, make_levels

from nested.build.levels import build_levels
from nested.diffusion import hierarchy, process, samplers, schedules
from nested.diffusion.level import Level, row_keys


def every(keys):
    return dict.fromkeys(("top", "middle", "bottom", "pair", "fine"), keys)


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
