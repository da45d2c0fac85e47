"""nested/training/optimizer.py: AdamW as torch has it, warm-up, clipping per level, EMA."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested.training import optimizer

CONFIG = optimizer.OptimizerConfig(
    learning_rate=0.02,
    warmup_steps=4,
    decay="constant",
    total_steps=None,
    b1=0.99,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.03,
    clip_norm=0.0,
    ema_decay=0.9,
)


def quadratic(target):
    return jax.grad(lambda params: optax.tree.norm(optax.tree.sub(params, target), squared=True))


def train(config, params, target, steps):
    transform = optimizer.make_optimizer(config)
    state, gradient = transform.init(params), quadratic(target)
    for _ in range(steps):
        updates, state = transform.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_six_steps_of_the_authors_code(golden, x64):
    file = golden("uvit_training.npz")
    settings = json.loads(str(file["adamw/settings"]))
    config = dataclasses.replace(
        CONFIG,
        learning_rate=settings["lr"],
        warmup_steps=settings["warmup"],
        b1=settings["betas"][0],
        b2=settings["betas"][1],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        ema_decay=settings["ema"],
    )
    transform = optimizer.make_optimizer(config)
    params = {"z1": {"w": jnp.asarray(file["adamw/params"][0])}}
    ema, state = params, transform.init(params)
    gradient = quadratic({"z1": {"w": jnp.asarray(file["adamw/target"])}})
    np.testing.assert_array_equal(file["adamw/ema"][0], file["adamw/params"][0])  # the EMA starts as a copy
    for step in range(6):
        np.testing.assert_allclose(optimizer.learning_rate(config, step), file["adamw/lr_used"][step], rtol=1e-12)
        updates, state = transform.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        ema = optimizer.ema_update(ema, params, config.ema_decay)
        np.testing.assert_allclose(params["z1"]["w"], file["adamw/params"][step + 1], rtol=0, atol=1e-12)
        np.testing.assert_allclose(ema["z1"]["w"], file["adamw/ema"][step + 1], rtol=0, atol=1e-12)


def test_weight_decay_reaches_biases_and_norms(x64):
    config = dataclasses.replace(CONFIG, warmup_steps=0)
    params = {"z1": {"bias": jnp.full(3, 2.0), "scale": jnp.ones(())}}
    trained = train(config, params, params, 1)  # at the optimum: zero gradient, decay alone
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(after, before * (1 - 0.02 * 0.03), rtol=1e-14)


def test_cosine_decay_ends_at_zero(x64):
    config = dataclasses.replace(CONFIG, decay="cosine", total_steps=104)
    rates = [float(optimizer.learning_rate(config, step)) for step in (0, 2, 4, 54, 104, 200)]
    np.testing.assert_allclose(rates, [0, 0.01, 0.02, 0.01, 0, 0], atol=1e-17)


def test_no_warm_up_starts_at_the_peak():
    assert float(optimizer.learning_rate(dataclasses.replace(CONFIG, warmup_steps=0), 0)) == pytest.approx(0.02)


def test_levels_together_equal_levels_alone(x64):
    rng = np.random.default_rng(0)
    params, target = (
        {name: {"w": jnp.asarray(rng.normal(size=n) * size)} for name, n, size in (("z2", 3, 0.01), ("z1", 5, 10.0))}
        for _ in range(2)
    )
    config = dataclasses.replace(CONFIG, clip_norm=0.5, eps=1e-2)  # a large eps makes Adam see the gradients' scale
    together = train(config, params, target, 5)
    for name in params:
        alone = train(config, {name: params[name]}, {name: target[name]}, 5)
        np.testing.assert_allclose(together[name]["w"], alone[name]["w"], rtol=1e-13)
    unclipped = train(dataclasses.replace(config, clip_norm=0.0), params, target, 5)
    assert not np.allclose(unclipped["z1"]["w"], together["z1"]["w"], rtol=1e-3)


def test_clipping_by_the_norm_of_each_level():
    gradients = {"z2": {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}, "z1": {"a": jnp.array([0.3, 0.4])}}
    norms = optimizer.gradient_norms(gradients)
    np.testing.assert_allclose([norms["z2"], norms["z1"]], [5.0, 0.5], rtol=1e-6)
    clip = optimizer.clip_per_level(1.0)
    clipped, _ = clip.update(gradients, clip.init(gradients))
    np.testing.assert_allclose(clipped["z2"]["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["z2"]["b"], 0.8, rtol=1e-6)
    np.testing.assert_array_equal(clipped["z1"]["a"], gradients["z1"]["a"])  # below the limit: untouched


def test_ema_stays_float32_beside_bfloat16_parameters():
    params = {"z1": jnp.full(2, 1.1, jnp.bfloat16)}
    ema = optimizer.ema_update({"z1": jnp.ones(2)}, params, 0.7)
    assert ema["z1"].dtype == jnp.float32
    np.testing.assert_allclose(ema["z1"], 0.7 + 0.3 * np.float64(params["z1"][0]), rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"decay": "linear"}, r"optimizer.decay: found 'linear', expected one of \('constant', 'cosine'\)"),
        ({"total_steps": 9}, "optimizer.total_steps: found 9, which decay='constant' does not use"),
        ({"decay": "cosine"}, "optimizer.total_steps: found None, decay='cosine' needs more than warmup_steps=4"),
        ({"decay": "cosine", "total_steps": 4}, "optimizer.total_steps: found 4"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm: found -1.0, expected at least 0"),
        ({"ema_decay": 1.0}, r"optimizer.ema_decay: found 1.0, expected a number in \[0, 1\)"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
