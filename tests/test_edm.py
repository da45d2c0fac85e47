"""The EDM process, its noise densities, and HDiT's training steps, against the authors' code and algebra."""

import collections
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common, hdit
from nested.build.levels import build_levels
from nested.build.training import build_optimizer
from nested.diffusion import hierarchy, schedules
from nested.diffusion.level import buffer_predicate
from nested.diffusion.process import Process
from nested.training import optimizer
from nested.weights import files as weights

GOLDEN = "hdit_loss_sigma.npz"


def edm(sigma_data=0.5, **changes):
    options = dict(
        schedules=(schedules.ExponentialVE(),), parameterization="edm", loss_space="edm", discrete_steps=0,
        noise_input="log_sigma", time_scale=0.25, sigma_data=sigma_data,
    )  # fmt: skip
    return Process(**options | changes)


def at(process, sigma):
    return process.schedules[0].inverse_log_snr(-jnp.log(sigma))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.6162])
def test_preconditioning(golden, x64, sigma_data):
    data, process = golden(GOLDEN), edm(sigma_data)
    sigma = jnp.asarray(data["sigma"])
    t, one = at(process, sigma), jnp.ones((len(sigma), 1))
    skip = process.convert(0 * one, one, t, "edm", "x0")[:, 0]
    out = process.convert(one, 0 * one, t, "edm", "x0")[:, 0]
    for ours, name in ((skip, "c_skip"), (out, "c_out"), (process.network_input(one, t)[:, 0], "c_in")):
        np.testing.assert_allclose(ours, data[f"{name}/sd{sigma_data}"], rtol=1e-11)
    np.testing.assert_allclose(process.c_noise(t), np.log(data["sigma"]) / 4, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.6162])
def test_weightings_are_those_of_the_authors_in_edms_space(golden, x64, sigma_data):
    data = golden(GOLDEN)
    sigma = jnp.asarray(data["sigma"])
    cases = [(name, {}, f"weight/{name.replace('_', '-')}") for name in ("karras", "snr", "soft_min_snr")]
    cases += [("min_snr", dict(gamma=g), f"weight_constructed/min-snr-g{g:g}") for g in (4.0, 5.0)]
    for name, gamma, key in cases:
        process = edm(sigma_data, weighting=name, **gamma)
        weight = process.weight(process.schedules[0], at(process, sigma), "edm")
        np.testing.assert_allclose(weight, data[f"{key}/sd{sigma_data}"], rtol=1e-10, err_msg=key)
    default = edm(sigma_data, weighting="soft_min_snr").weight(schedules.ExponentialVE(), at(edm(), sigma), "edm")
    given = edm(sigma_data, weighting="soft_min_snr", gamma=sigma_data**-2)
    np.testing.assert_allclose(given.weight(schedules.ExponentialVE(), at(edm(), sigma), "edm"), default, rtol=1e-12)


def test_a_weighting_means_the_same_loss_in_every_space(x64):
    """snr, soft_min_snr ... weigh the error in x0, wherever the loss is taken and whatever the network predicts."""
    random = np.random.default_rng(0)
    x0, noise, raw = (jnp.asarray(random.normal(size=(5, 3, 3, 1))) for _ in range(3))
    t = jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    for schedule in (schedules.ExponentialVE(), schedules.LinearVP()):
        losses = []
        for space in ("edm", "eps", "v", "x0"):
            process = edm(schedules=(schedule,), loss_space=space, weighting="soft_min_snr")
            losses.append(process.loss(raw, x0, noise, process.corrupt(x0, noise, t), t))
        np.testing.assert_allclose(losses[1:], [losses[0]] * 3, rtol=1e-9)
    eps = Process((schedules.LinearVP(),), "eps", weighting="snr", discrete_steps=0)
    np.testing.assert_allclose(eps.weight(schedules.LinearVP(), t, "eps"), 1.0, rtol=1e-9)


DENSITIES = {
    "cosine/sd0.5": schedules.VDiffusion(0.5, 1e-3, 1e3),
    "lognormal/-1.2_1.2": schedules.LogNormal(-1.2, 1.2),
    "loglogistic/log0.5_0.5": schedules.LogLogistic(math.log(0.5), 0.5),
    "loglogistic/log0.5_0.5_1e-2_80": schedules.LogLogistic(math.log(0.5), 0.5, 1e-2, 80.0),
    "loguniform/1e-2_80": schedules.LogUniform(1e-2, 80.0),
    "cosine-interpolated/d256_low64_high128_sd0.5": schedules.CosineInterpolated(256, 0.5, 64, 128, 1e-2, 80.0),
}


def test_densities(golden, x64):
    data = golden(GOLDEN)
    names = [name.removeprefix("density/") for name in data if name.startswith("density/")]
    assert len(names) == 14
    for name in names:
        if name in DENSITIES:
            density = DENSITIES[name]
        else:
            size, sigma_data = re.fullmatch(r"cosine-interpolated/d(\d+)_sd([.\d]+)", name).groups()
            density = schedules.CosineInterpolated(int(size), float(sigma_data))
        np.testing.assert_allclose(density(jnp.asarray(data["u"])), data[f"density/{name}"], rtol=1e-11, err_msg=name)


def test_times_follow_the_density_stratified_over_the_global_batch():
    density = schedules.CosineInterpolated(256, 0.5)
    process = edm(density=density, time_sampling="stratified")
    keys = jax.random.split(jax.random.key(0), 400)
    sigma = process.schedules[0](process.sample_time(keys))[1]
    edges = density(jnp.arange(401) / 400)
    assert np.all((sigma <= edges[:-1] * 1.001) & (sigma >= edges[1:] * 0.999))  # one in every stratum, in order
    percentiles = np.percentile(sigma, (5, 25, 50, 75, 95))
    np.testing.assert_allclose(percentiles, (0.045, 0.349, 1.41, 5.71, 43.8), rtol=0.03)  # hdit at 256 pixels
    again = edm(density=density).sample_time(keys)
    assert np.abs(np.sort(process.schedules[0](again)[1])[::-1] / sigma - 1).max() > 0.05  # independent: no strata


def test_the_loss_at_the_start_is_the_mean_weight():
    """A network of zeros on data of standard deviation sigma_data: E[w] of 256 pixels, .0795 (soft), .3227 (snr)."""
    keys = jax.random.split(jax.random.key(1), 4096)
    density = schedules.CosineInterpolated(256, 0.5)
    x0, noise = (jax.random.normal(key, (4096, 4, 4, 1)) for key in jax.random.split(jax.random.key(2)))
    for weighting, expected in (("soft_min_snr", 0.0795), ("snr", 0.3227), ("uniform", 1.0)):
        process = edm(weighting=weighting, density=density, time_sampling="stratified")
        t = process.sample_time(keys)
        x_t = process.corrupt(0.5 * x0, noise, t)
        assert np.mean(process.loss(0 * x0, 0.5 * x0, noise, x_t, t)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("schedule", [schedules.ExponentialVE(), schedules.LinearVP(), schedules.cosine(50)])
def test_inverses_agree_on_host_and_device(x64, schedule):
    t = np.linspace(0.01, 0.99, 30)
    log_snr = schedule.log_snr(t)
    np.testing.assert_allclose(schedule.inverse_log_snr(log_snr), t, atol=1e-9)
    np.testing.assert_allclose(jax.jit(schedule.inverse_log_snr)(jnp.asarray(log_snr)), t, atol=1e-9)


def test_what_sampling_starts_from():
    noise = (jnp.ones((2, 3, 3, 1)), jnp.ones((2, 6, 6, 1)))
    two = edm(schedules=(schedules.ExponentialVE(0.01, 100.0), schedules.LinearVP()))
    coarse, fine = two.prior(noise, 0.75)
    np.testing.assert_allclose(coarse, 10.0, rtol=1e-6)
    np.testing.assert_array_equal(fine, 1.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: edm(None), "process.sigma_data = None with parameterization 'edm'"),
        (lambda: edm(-1.0), "process.sigma_data = -1.0: expected a positive number"),
        (lambda: edm(weighting="snr", gamma=4.0), "process.gamma = 4.0 has no effect with weighting 'snr'"),
        (lambda: edm(noise_input="sigma"), "process.noise_input = 'sigma' is not known: use one of 't', 'log_sigma'"),
        (lambda: edm(density=schedules.LogUniform(0.1, 1), discrete_steps=9), "set process.discrete_steps = 9"),
        (lambda: Process((schedules.LinearVP(),), sigma_data=0.5), "expected None, as nothing uses it"),
        (lambda: Process((schedules.LinearVP(),), weighting="min_snr"), "process.sigma_data = None"),
        (lambda: schedules.ExponentialVE(10.0, 1.0), "sigma_min = 10.0, sigma_max = 1.0: expected 0 < sigma_min"),
        (lambda: schedules.LogUniform(80.0, 0.01), "process.density: sigma_min = 80.0, sigma_max = 0.01: expected 0 <"),
        (lambda: schedules.LogUniform(0.0, 1.0), "sigma_min = 0.0"),
        (lambda: schedules.LogNormal(0.0, 0.0), "process.density.std = 0.0: expected a positive number"),
        (lambda: schedules.CosineInterpolated(0, 0.5), "process.density.image_size = 0"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- training


def golden_level(data):
    """The level of the recorded run, built as configs build it, and its initial parameters in float64."""
    config = common.default()
    backbone = common.hdit(
        depths=(1, 1), widths=(16, 16), attentions=("neighborhood", "global"), windows=(3, 0), head_widths=8,
        mapping_depth=1, mapping_width=16,
    )  # fmt: skip
    config.data.update(num_classes=3, augment_prob=0.12)
    config.levels = (common.level("x", "pixels", (16, 16, 1), 2, backbone=backbone, process=common.edm_process(16)),)
    config.hierarchy.label_levels = ("x",)
    config.optimizer.update(common.hdit_optimizer())
    (level,) = build_levels(config)
    level = dataclasses.replace(level, backbone=level.backbone.clone(dtype=None))  # float64 throughout
    template = jax.eval_shape(lambda: hierarchy.init((level,), jax.random.key(0)))["x"]
    tensors = {name[5:]: array for name, array in data.items() if name.startswith("init/")}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), weights.from_torch(tensors, template))
    return level, {"x": params}, build_optimizer(config)


def test_six_training_steps_of_the_authors_code(golden, x64):
    """AdamW in four groups, clipping, EMA with warm-up: parameters, averages, losses and norms after each step."""
    data = golden("hdit_train_steps.npz")
    meta = json.loads(str(data["meta"]))
    level, params, options = golden_level(data)
    assert (options.learning_rate, options.weight_decay, options.clip_norm) == (5e-4, 0.01, 1.0) == (
        meta["lr"], meta["weight_decay"], meta["clip"])  # fmt: skip
    is_buffer = buffer_predicate((level,))
    transform = optimizer.make_optimizer(options, is_buffer)

    def loss(params, x0, noise, sigma, augment, label):
        process, t = level.process, at(level.process, sigma)
        x_t = process.corrupt(x0, noise, t)
        network = hierarchy.apply_network(level, params["x"], train=True)
        raw = network(process.network_input(x_t, t), process.c_noise(t), {"augment": augment, "label": label})
        return jnp.mean(process.loss(raw, x0, noise, x_t, t))

    gradient, transformed = jax.jit(jax.value_and_grad(loss)), jax.jit(transform.update)
    ema, state = params, transform.init(params)
    images = lambda name, i: jnp.asarray(data[name][i].transpose(0, 2, 3, 1), jnp.float64)  # noqa: E731
    for step in range(6):
        inputs = [images("in/images", step), images("in/noise", step)]
        inputs += [jnp.asarray(data[f"in/{name}"][step], jnp.float64) for name in ("sigma", "aug_cond")]
        value, gradients = gradient(params, *inputs, jnp.asarray(data["in/class_cond"][step]))
        np.testing.assert_allclose(value, data["loss"][step], rtol=1e-9)
        factor = 50.0 if step % 2 else 1.0
        gradients = jax.tree.map(lambda g, factor=factor: factor * g, gradients)
        norm = optimizer.gradient_norms(gradients)["x"]
        np.testing.assert_allclose(norm, data["grad_norm"][step], rtol=1e-9)
        updates, state = transformed(gradients, state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
        decay = optimizer.ema_decay(options, step)
        np.testing.assert_allclose(decay, data["ema_decay"][step], rtol=1e-12)
        ema = optimizer.ema_update(ema, params, decay, is_buffer)
        for prefix, tree in (("after", params), ("ema", ema)):
            ours = weights.to_torch(tree["x"])
            for name, array in ours.items():
                recorded = data.get(f"{prefix}{step + 1}/{name}")
                if recorded is not None:
                    np.testing.assert_allclose(array, recorded, rtol=0, atol=1e-8, err_msg=f"{step} {name}")
    assert np.array_equal(ema["x"]["aug_emb"]["weight"], golden_level(data)[1]["x"]["aug_emb"]["weight"])


def test_groups_are_those_of_the_authors(golden, x64):
    data = golden("hdit_train_steps.npz")
    level, params, options = golden_level(data)
    is_buffer = buffer_predicate((level,))
    found = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
        (name,) = weights.to_torch(_nest(path[1:]))
        found[name] = optimizer.group_factors(options, is_buffer, path)
    factors = {"wd": (1, 1), "no_wd": (1, 0), "mapping_wd": (1 / 3, 1), "mapping_no_wd": (1 / 3, 0)}
    groups = json.loads(str(data["meta"]))["param_groups"]
    expected = {name: factors[group] for group, names in groups.items() for name in names}
    assert {name: value for name, value in found.items() if value != (0.0, 0.0)} == expected
    assert len(found) == len(expected) + 5  # time and augmentation Fourier weights, three sets of frequencies


def test_the_groups_of_hdit_e_have_the_authors_sizes():
    config = hdit.get_config("E")
    levels, options = build_levels(config), build_optimizer(config)
    params = jax.eval_shape(lambda: hierarchy.init(levels, jax.random.key(0)))
    sizes, is_buffer = collections.Counter(), buffer_predicate(levels)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        sizes[optimizer.group_factors(options, is_buffer, path)] += math.prod(leaf.shape)
    del sizes[0.0, 0.0]
    assert sizes == {(1, 1): 94_408_704, (1, 0): 1_948_957, (1 / 3, 1): 20_643_840, (1 / 3, 0): 2_304}
    additive = jax.tree_util.tree_flatten_with_path({"x": {"pos_embed": 0.0}})[0][0][0]
    assert optimizer.group_factors(options, is_buffer, additive) == (1, 0)


def _nest(path):
    tree = np.zeros((1, 1))
    for entry in reversed(path):
        tree = {entry.key: tree}
    return tree


def test_ema_warms_up(golden):
    data = golden(GOLDEN)
    for power in (2 / 3, 0.75):
        config = optimizer.OptimizerConfig(ema_decay=0.9999, ema_power=power)
        ours = [float(optimizer.ema_decay(config, int(step))) for step in data["ema_decay/steps"]]
        np.testing.assert_allclose(ours, data[f"ema_decay/power{power:.4f}"], atol=2e-7)
    constant = dataclasses.replace(config, ema_power=0.0)
    assert float(optimizer.ema_decay(constant, 0)) == pytest.approx(0.9999)


def test_a_group_that_matches_nothing_is_an_error(golden, x64):
    _, params, options = golden_level(golden("hdit_train_steps.npz"))
    optimizer.check_groups(options, params)
    wrong = dataclasses.replace(options, groups=(optimizer.Group("mappin/"),))
    with pytest.raises(ValueError, match="pattern 'mappin/' matches no parameter; there are x/aug_emb"):
        optimizer.check_groups(wrong, params)
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression"):
        optimizer.Group("(")
    with pytest.raises(ValueError, match="factors are at least 0"):
        optimizer.Group("x", learning_rate=-1.0)
