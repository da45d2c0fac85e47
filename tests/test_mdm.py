"""Matryoshka's joint process (arXiv 2310.15111) against the authors' code: schedules, losses, thresholds, sampling."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exact import STD, exact_errors

from nested.diffusion.denoiser import denoiser, thresholded
from nested.diffusion.hierarchy import mixed_resolutions
from nested.diffusion.process import Process
from nested.diffusion.samplers import DDIM, DDPM
from nested.diffusion.samplers.table import CLEAN, run
from nested.diffusion.schedules import Shifted, cosine, cosine_log_snr, ddpm_linear
from nested.models.nested_unet import NestedUNet
from nested.models.unet_nets import Net
from nested.weights.files import from_torch

BASES = {"deepfloyd": cosine(), "cosine_logsnr5": cosine_log_snr(), "ddpm": ddpm_linear()}  # by ml-mdm's names
STEPS = np.arange(1001) / 1000
KEYS = jax.random.split(jax.random.key(7), 8)


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def pooled(x, side):
    """The means of squares of side x side pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // side, side, width // side, side, channels).mean((2, 4))


def recorded_network(record):
    """(x, c_noise, cond) -> output, a tree like x, of a recorded spatial network with its weights."""
    config = json.loads(str(record["config_json"]))
    configs = [config]
    while "inner_config" in configs[-1]:
        configs.append(configs[-1]["inner_config"])
    inner = configs[-1]
    model = NestedUNet(
        nets=tuple(
            Net(
                channels=tuple(net["resolution_channels"]),
                resnets=tuple(net["num_resnets_per_resolution"]),
                attention=tuple(net["num_attention_layers"]),
                attention_ffn=net["resnet_config"]["use_attention_ffn"],
                micro=(("scale", float(net["micro_conditioning"].removeprefix("scale:"))),),
                groups=net["resnet_config"]["num_groups_norm"],
            )
            for net in reversed(configs)
        ),
        time_width=config["temporal_dim"],
        text_width=max(inner["conditioning_feature_dim"], 0),
        text_proj=max(inner["conditioning_feature_proj_dim"], 0),
        lm_layers=inner["num_lm_head_layers"],
    )
    tensors = {key.removeprefix("w/"): array for key, array in record.items() if key.startswith("w/")}
    apply = jax.jit(lambda params, x, c_noise, cond: model.apply({"params": params}, x, c_noise, cond, train=False))

    def network(x, c_noise, cond):
        init = lambda: model.init(jax.random.key(0), x, c_noise, cond, train=False)["params"]  # noqa: E731
        return apply(from_torch(tensors, jax.eval_shape(init)), x, c_noise, cond)

    return network


# -------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", BASES)
def test_recorded_base_schedules(golden, name):
    """Their float64 tables before the cast; t = 0 is clean, t = 1 is not quite noise."""
    gamma = golden("mdm_schedules.npz")[f"gammas64/{name}"]
    alpha, sigma = BASES[name](STEPS)
    np.testing.assert_allclose(alpha**2, gamma, rtol=1e-13)
    np.testing.assert_allclose(sigma[1:] ** 2, 1 - gamma[1:], rtol=1e-11)
    assert (alpha[0], sigma[0]) == (1, 0)


def test_recorded_shifted_schedules(golden):
    """13 tables. Theirs is float32, where 1 - gamma cancels; the larger the shift the fewer digits it leaves."""
    record = golden("mdm_schedules.npz")
    names = [key.removeprefix("gammas/") for key in record if key.startswith("gammas/")]
    assert len(names) == 13
    t = jnp.asarray(STEPS, jnp.float32)
    for name in names:
        base, shift = name.split("/")
        scale, power = map(float, shift.removeprefix("shift").split("_p"))
        schedule = Shifted(BASES[base], scale, power)
        alpha, sigma = schedule(STEPS)
        np.testing.assert_allclose(alpha**2, record[f"gammas/{name}"], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(alpha, record.get(f"alpha/{name}", alpha), rtol=1e-5)
        np.testing.assert_allclose(sigma, record.get(f"sigma/{name}", sigma), atol=4e-5)
        for ours, exact in zip(schedule(t), (alpha, sigma), strict=True):  # float32 keeps all of its digits
            assert ours.dtype == jnp.float32
            np.testing.assert_allclose(ours, exact, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("scale, power", [(1.0, 2.0), (1.0, 1.0), (4.0, 0.0)])
def test_no_shift(scale, power):
    shifted = Shifted(cosine(), scale, power)
    np.testing.assert_array_equal(shifted(STEPS), cosine()(STEPS))
    np.testing.assert_array_equal(shifted.log_snr(STEPS[1:]), cosine().log_snr(STEPS[1:]))


@pytest.mark.parametrize("power, ratio", [(1.0, 4.0), (2.0, 1.0)])
def test_snr_of_pooled_noise(power, ratio):
    """4 x 4 pixels averaged: with power 2 the noisy 64-pixel image is as noisy as the base says, else 4 times cleaner.

    Standard error of the variance of 24,576 pooled pixels: 0.9 %."""
    process = Process((Shifted(cosine(), 4.0, power),))
    image = jnp.full((32, 64, 64, 3), 0.8)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=image.shape), jnp.float32)
    for t in (0.1, 0.5, 0.9):
        times = jnp.full(32, t)
        signal = pooled(process.corrupt(image, 0 * noise, times), 4) / 0.8
        noise_left = pooled(process.corrupt(0 * image, noise, times), 4)
        snr = signal.mean() ** 2 / noise_left.var()
        np.testing.assert_allclose(snr, ratio * np.exp(2 * cosine().log_snr(t)), rtol=0.03)


def test_log_snr_of_a_shift():
    """Moved by a constant, and inverted up to both ends of [0, 1]."""
    t = np.array([1e-7, 1e-5, 1e-3, 0.0015, 0.3, 0.9, 0.9995, 1 - 1e-6, 1.0])
    for base in BASES.values():
        for scale, power in ((4.0, 1.0), (16.0, 2.0), (0.5, 1.0)):
            shifted = Shifted(base, scale, power)
            np.testing.assert_allclose(shifted.log_snr(t), base.log_snr(t) - power * np.log(scale) / 2, atol=1e-12)
            np.testing.assert_allclose(shifted.inverse_log_snr(shifted.log_snr(t)), t, rtol=1e-9)
            t32 = jnp.asarray(t[2:], jnp.float32)
            np.testing.assert_allclose(shifted.inverse_log_snr(shifted.log_snr(t32)), t[2:], rtol=2e-5)


# ------------------------------------------------------------------------------------------------------ losses

X0 = {"unet": ("image16",), "nested2": ("nested2/shift_p1/x016", "nested2/shift_p1/x032")}
SUFFIXES = {"unet": ("",), "nested2": ("16", "32")}  # of the leaves' names, coarse to fine
CASES = {  # name -> (the fine leaf's shift and its power, loss space, what the leaves are divided by, their weights)
    "unet/DDPM": ((1, 1), "eps", (1,), (1,)),
    "unet/DDPM_signal2": ((1, 1), "eps", (2,), (1,)),
    "unet/V_PREDICTION": ((1, 1), "v", (1,), (1,)),
    # unet/V_PREDICTION_signal2 is left out: its target is that of the image, its x_t that of the divided image
    "nested2/shift_p1": ((2, 1), "eps", (1, 1), (1, 1)),
    "nested2/shift_p2_w4to1": ((2, 2), "eps", (1, 1), (1, 4)),
    "nested2/shift_p1_vloss": ((2, 1), "v", (1, 1), (1, 1)),
    "nested2/mixed_2to1": ((2, 1), "eps", (1, 1), (1, (1.5, 1.5, 0))),  # 2 of 3 rows have the fine image
    "nested2/signal_rescaled": ((1, 1), "eps", (1, 2), (1, 1)),
    "nested2/single_loss": ((2, 1), "eps", (1, 1), (0, 1)),
}
NEED_A_NETWORK = ("w4to1", "signal_rescaled")  # their outputs are not in the record


def recorded_case(record, name):
    """(process, x0, noise, t, leaf weights, leaf -> the record's arrays). What equals that of the network's first case
    is recorded there only."""
    (scale, power), space, divisors, weights = CASES[name]
    network = name.split("/")[0]
    first = {"unet": "unet/DDPM", "nested2": "nested2/shift_p1"}[network]

    def leaves(what):
        keys = [what + suffix for suffix in SUFFIXES[network]]
        return tuple(nhwc(record.get(f"{name}/{key}", record[f"{first}/{key}"])) for key in keys)

    schedules = (cosine(), Shifted(cosine(), scale, power))[: len(divisors)]
    process = Process(schedules, parameterization="v", loss_space=space, time_offset=-1.0)
    x0 = tuple(nhwc(record[key]) / divisor for key, divisor in zip(X0[network], divisors, strict=True))
    t = jnp.asarray((record["time"] + 1) / 1000, jnp.float32)  # they count from 0
    return process, x0, leaves("eps"), t, tuple(map(jnp.asarray, weights)), leaves


@pytest.mark.parametrize("name", CASES)
def test_recorded_noisy_variables_and_targets(golden, name):
    record = golden("mdm_losses.npz")
    process, x0, noise, t, _, leaves = recorded_case(record, name)
    for ours, theirs in zip(process.corrupt(x0, noise, t), leaves("x_t"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(process.target(x0, noise, t, process.loss_space), leaves("target"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(process.c_noise(t), record["time"], atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_recorded_losses(golden, name):
    """From the recorded outputs where there are any, otherwise from those of the recorded weights."""
    record = golden("mdm_losses.npz")
    process, x0, noise, t, weights, leaves = recorded_case(record, name)
    x_t = process.corrupt(x0, noise, t)
    if name.endswith(NEED_A_NETWORK):
        cond = {"text": jnp.asarray(record["cond"]), "text_mask": jnp.asarray(record["mask"])}
        raw = recorded_network(golden("mdm_nested2.npz"))(x_t, process.c_noise(t), cond)
    else:
        raw = leaves("model_out")
    loss = process.loss(raw, x0, noise, x_t, t, leaf_weights=weights)
    np.testing.assert_allclose(loss, record[f"{name}/loss"], rtol=1e-5)


def test_recorded_mixed_batch(golden):
    """Of 3 rows 2 have the fine image; the network is fed no more, and its output is 0 for the third."""
    record = golden("mdm_losses.npz")
    process, x0, noise, t, _, leaves = recorded_case(record, "nested2/mixed_2to1")
    cond = {"text": jnp.asarray(record["cond"]), "text_mask": jnp.asarray(record["mask"])}
    network = mixed_resolutions(recorded_network(golden("mdm_nested2.npz")), (3, 2))
    out = network(process.corrupt(x0, noise, t), process.c_noise(t), cond)
    for ours, theirs in zip(out, leaves("model_out"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert not np.any(out[1][2])


def test_eps_loss_is_gamma_times_v_loss(x64):
    """Leaf by leaf; a weight of 0 takes a leaf out."""
    random = np.random.default_rng(3)
    x0, noise, v = ([jnp.asarray(random.normal(size=(4, n, n, 3))) for n in (2, 4)] for _ in range(3))
    schedules, t = (cosine(), Shifted(cosine(), 2.0, 2.0)), jnp.asarray([0.01, 0.4, 0.7, 0.999])
    for schedule, weights in zip(schedules, ((1.0, 0.0), (0.0, 1.0)), strict=True):
        losses = []
        for space in ("eps", "v"):
            process = Process(schedules, parameterization="v", loss_space=space)
            losses.append(process.loss(v, x0, noise, process.corrupt(x0, noise, t), t, leaf_weights=weights))
        np.testing.assert_allclose(losses[0], schedule(t)[0] ** 2 * losses[1], rtol=1e-9)


# -------------------------------------------------------------------------------------------------- thresholds

LIMITS = {
    "CLIP": dict(percentile=None),
    "DYNAMIC": dict(percentile=0.995, maximum=100.0),
    "DYNAMIC_IF": dict(percentile=0.95, maximum=1.5),
}


@pytest.mark.parametrize("name", LIMITS)
def test_recorded_thresholds(golden, name):
    """Five images, inside [-1, 1], beyond both maxima, and all zero; the second leaf is for pixels divided by 2."""
    record = golden("mdm_threshold.npz")
    x0 = nhwc(record["x0"])
    plain, scaled = (thresholded(lambda x, *_: (x, x), **LIMITS[name], scales=s)(x0, None, {}) for s in ((), (1, 2)))
    for ours in (*plain, scaled[0]):
        np.testing.assert_allclose(ours, nhwc(record[f"out/{name}"]), rtol=2e-6)
    np.testing.assert_allclose(scaled[1], nhwc(record[f"out/{name}_scale2"]), rtol=2e-6)
    inside = jnp.clip(x0, -1, 1)
    for ours in thresholded(lambda x, *_: (x, x), **LIMITS[name], scales=(1, 0.5))(inside, None, {}):
        np.testing.assert_array_equal(ours, inside)


# ---------------------------------------------------------------------------------------------------- sampling

RUNS = {"ddpm": DDPM(8, grid="released"), "ddim0": DDIM(8, grid="released"), "ddim1": DDIM(8, eta=1.0, grid="released")}


def test_recorded_time_grids(golden):
    record = golden("mdm_schedules.npz")
    for steps in (1, 2, 6, 50, 100, 150, 250, 1000):
        for sampler in (DDPM(steps, grid="released"), DDIM(steps, grid="released")):
            plan = sampler.plan(cosine())
            assert plan[-1][1] is CLEAN
            np.testing.assert_allclose([start * 1000 for start, _ in plan], record[f"timesteps/{steps}"][:-1])


def test_trailing_grid():
    times = {steps: [start for start, _ in DDIM(steps, grid="trailing").plan(cosine())] for steps in range(1, 1001)}
    assert times[4] == [1.0, 0.75, 0.5, 0.25] and times[3] == [1.0, 0.667, 0.333]
    for steps, grid in times.items():
        assert len(grid) == steps and grid[0] == 1 and np.all(np.diff(grid) < 0)
        assert abs(grid[-1] - 1 / steps) < 0.00051
    plans = [DDPM(1000, grid=grid).plan(cosine()) for grid in ("uniform", "released", "trailing")]
    for plan in plans[1:]:
        np.testing.assert_allclose([start for start, _ in plan], [start for start, _ in plans[0]], rtol=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_recorded_steps(golden, name):
    """Each of the 8 steps from its recorded state, estimate of x0 and noise; then 7 of them in one call."""
    record = golden("mdm_sampling_unet.npz")
    (table,) = RUNS[name].tables(Process((cosine(),)), jnp.zeros(1))
    rows = table.rows
    np.testing.assert_allclose(rows.t * 1000, record[f"{name}/t"])
    gamma = cosine()(rows.t)[0] ** 2
    x0 = [record[f"{name}/x0_{k}"] for k in range(8)]
    noise = [record.get(f"ddpm/noise{k}", np.zeros(1)) for k in range(8)]  # of ddim1 too
    x = record["ddpm/init"]  # of all three
    for k in range(8):
        np.testing.assert_allclose(gamma[k], record[f"{name}/g{k}"], rtol=1e-6)
        x = rows.base[k] * x + rows.history[k, 0] * x0[k] + rows.noise[k] * noise[k]
        np.testing.assert_allclose(x, record[f"{name}/x_t_after{k}"], atol=1e-5)
        x = record[f"{name}/x_t_after{k}"]

    recorded_x0, recorded_noise = jnp.stack(x0), jnp.stack(noise[:7])
    denoise = lambda x, t, cond: recorded_x0[jnp.argmin(jnp.abs(rows.t - t[0]))]  # noqa: E731
    seven = table._replace(rows=jax.tree.map(lambda column: column[:7], rows))
    x = run((seven,), None, denoise, jnp.asarray(record["ddpm/init"]), {}, draw=lambda k, j, x: recorded_noise[k])
    np.testing.assert_allclose(x, record[f"{name}/x_t_after6"], atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_recorded_trajectories(golden, name):
    """The recorded network's own, clipped: every estimate of x0 on the way, and where it ends."""
    record = golden("mdm_sampling_unet.npz")
    process = Process((cosine(),), parameterization="v", time_offset=-1.0)
    denoise = thresholded(denoiser(recorded_network(golden("mdm_unet_notext.npz")), process), None)
    x_T = nhwc(record["ddpm/init"])
    noise = jnp.stack([nhwc(record[f"ddpm/noise{k}"]) for k in range(7)] + [0 * x_T])
    tables = RUNS[name].tables(process, x_T)
    x, x0 = run(tables, None, denoise, x_T, {}, draw=lambda k, j, x: noise[k], shown=tuple(range(8)))
    np.testing.assert_allclose(x, nhwc(record[f"{name}/x_t_after7"]), atol=2e-5)
    np.testing.assert_allclose(x0, jnp.stack([nhwc(record[f"{name}/x0_{k}"]) for k in range(8)]), atol=2e-5)


@pytest.mark.parametrize("grid", ["released", "trailing"])
def test_ddpm_is_the_posterior_of_each_leaf(grid):
    """Of each leaf's own chain (samplers.py:281-345, with a = g / g_last); DDIM with eta = 1 is the same."""
    schedules = (cosine(), Shifted(cosine(), 16.0, 2.0))
    for sampler in (DDPM(9, grid=grid), DDIM(9, eta=1.0, grid=grid)):
        tables = sampler.tables(Process(schedules), (jnp.zeros(1), jnp.zeros(1)))
        for schedule, (rows, _) in zip(schedules, tables, strict=True):
            g = schedule(rows.t)[0] ** 2
            g_last = np.append(g[1:], 1.0)
            a = g / g_last
            np.testing.assert_allclose(rows.base, np.sqrt(a) * (1 - g_last) / (1 - g), rtol=1e-9)
            np.testing.assert_allclose(rows.history[:, 0], (1 - a) * np.sqrt(g_last) / (1 - g), rtol=1e-9)
            np.testing.assert_allclose(rows.noise**2, (1 - a) * (1 - g_last) / (1 - g), rtol=1e-9)


@pytest.mark.parametrize("sampler", RUNS.values(), ids=RUNS)
def test_two_resolutions_are_sampled_as_each_would_be_alone(sampler):
    """The fine leaf with its own shift, given the same noise."""
    random = np.random.default_rng(1)
    schedules = (cosine(), Shifted(cosine(), 4.0, 1.0))
    x_T = tuple(jnp.asarray(random.normal(size=(2, n, n, 3)), jnp.float32) for n in (4, 8))
    noise = tuple(jnp.asarray(random.normal(size=(8, *x.shape)), jnp.float32) for x in x_T)
    denoise = lambda x, t, cond: jax.tree.map(lambda leaf: jnp.tanh(leaf + t[0]), x)  # noqa: E731
    together = run(sampler.tables(Process(schedules), x_T), None, denoise, x_T, {}, draw=lambda k, j, x: noise[j][k])
    for i, schedule in enumerate(schedules):
        tables = sampler.tables(Process((schedule,)), x_T[i])
        alone = run(tables, None, denoise, x_T[i], {}, draw=lambda k, j, x, i=i: noise[i][k])
        np.testing.assert_allclose(together[i], alone, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("grid", ["released", "trailing"])
def test_exact_denoiser(grid, eta):
    """Data N(.7, .3^2) comes back, but for the spread that the last step, to the posterior mean, takes away: 0.011 of
    the .3 where log SNR ends at 5."""
    schedules = (cosine(), Shifted(cosine(), 4.0, 1.0), cosine_log_snr())
    sampler = DDIM(500, eta=eta, grid=grid)
    errors = exact_errors(schedules, sampler)
    for schedule, (mean_error, std_error) in zip(schedules, errors, strict=True):
        alpha, sigma = schedule(sampler.plan(schedule)[-1][0])
        lost = STD * (1 - alpha * STD / np.hypot(alpha * STD, sigma))
        assert max(mean_error, abs(std_error - lost)) < (0.01 if eta else 0.004), (schedule, mean_error, std_error)


# ------------------------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Shifted(cosine(), 0.0, 1.0), "Shifted: scale = 0.0: expected a positive number"),
        (lambda: thresholded(None, 0.95, 0.5), "thresholded: maximum = 0.5: give at least 1"),
        (lambda: DDPM(5, grid="log_snr"), "sampler.grid = 'log_snr' is not known: use one of 'uniform', 'released'"),
        (lambda: DDIM(5, t_end=1e-3, grid="trailing"), "sampler.t_end = 0.001 has no effect with grid 'trailing'"),
        (lambda: DDPM(1001, grid="released"), "sampler.steps = 1001: grid 'released' has at most 1000"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
