"""nested/diffusion/hierarchy.py, Matryoshka's part: joint resolutions, mixed batches, text, noisy conditions, steps
shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.leafwise import SHAPES, Leafwise, joint, losses
from helpers.probes import draw, make_levels
from helpers.processes import run_python
from helpers.refusals import refused
from helpers.run_data import latents_of
from helpers.tiny_mdm import get_config
from helpers.toy_encoding import level as level_source
from helpers.trees import assert_equal

from input_pipeline import loader
from nested.build.data import build_data
from nested.diffusion import conditioning, hierarchy, schedules
from nested.diffusion.level import ConditionNoise, row_keys, select_context
from nested.latents.store import latents_of_images
from nested.modes import train
from nested.runtime import partition
from nested.sampling import generator as sampling
from nested.training import loop as training_loop
from nested.training import step as training

NULL_TEXT = {"text": np.full((3, 2), -5.0, np.float32), "text_mask": np.array([True, False, False])}


@pytest.fixture(scope="module")
def params():
    return hierarchy.init((joint(),), jax.random.key(0))


# --- leaves of a loss ------------------------------------------------------------------------------------------------


def test_all_rows_mixed_is_the_plain_loss(params):
    plain, mixed = (
        jax.value_and_grad(lambda p, level=level: losses(level, p).mean())(params)
        for level in (joint(), joint(mixed=(4, 4)))
    )
    assert_equal(plain, mixed)


def test_a_row_without_the_fine_image_has_the_loss_of_the_coarse_one(params):
    """The sum over a batch is that of each leaf's mean over the rows that have it."""
    mixed = losses(joint(mixed=(2, 1)), params)
    coarse, fine = (losses(joint(leaf_weights=weights), params) for weights in ((1.0, 0.0), (0.0, 0.5)))
    assert float(fine.min()) > 0.01
    np.testing.assert_allclose(mixed[1::2], coarse[1::2], rtol=1e-6)
    np.testing.assert_allclose(mixed.mean(), coarse.mean() + fine[::2].mean(), rtol=1e-6)


def test_mixed_rows_are_trainings_alone_and_must_divide(params):
    np.testing.assert_array_equal(
        losses(joint(mixed=(2, 1)), params, train=False), losses(joint(), params, train=False)
    )
    refused(losses, joint(mixed=(3, 1)), params, match="level x: 4 rows do not divide into mixed groups of 3")


def test_a_leaf_of_weight_0_trains_nothing(params):
    """Fig. 4: without the multi-resolution loss."""
    grads = jax.grad(lambda p: losses(joint(leaf_weights=(0.0, 1.0)), p).mean())(params)["x"]
    assert not grads["bias_0"].any() and not grads["gain_0"].any() and abs(grads["bias_1"][0]) > 0.01


FOUR_DEVICES = """
import jax, sys
sys.path.insert(0, "tests")
from jax.sharding import NamedSharding, PartitionSpec
from helpers.leafwise import hierarchy, joint, losses, of_images
params = hierarchy.init((joint(),), jax.random.key(0))
rows = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
loss = jax.jit(lambda variables: losses(joint(mixed=(2, 1)), params, 8, variables), out_shardings=rows)
print(*loss(jax.device_put(of_images(8), rows)).tolist())
"""


def test_the_mixed_loss_does_not_depend_on_the_devices(params):
    found = [float(number) for number in run_python(FOUR_DEVICES).split()]
    np.testing.assert_allclose(found, losses(joint(mixed=(2, 1)), params, 8), rtol=1e-5)


# --- signal scales ---------------------------------------------------------------------------------------------------


def test_what_is_diffused_is_divided_by_the_signal_scales_and_samples_are_not():
    level = joint(signal_scales=(1.0, 4.0), leaf_weights=(1.0, 1.0))
    params = {"x": {f"{name}_{i}": jnp.zeros(1) for name in ("bias", "gain") for i in (0, 1)}}
    told_nothing = dataclasses.replace(level, process=dataclasses.replace(level.process, time_scale=0.0))
    variables = {"x": tuple(jnp.full((4, *shape), 8.0) for shape in SHAPES)}
    np.testing.assert_allclose(losses(told_nothing, params, 4, variables), 8.0**2 + 2.0**2, rtol=1e-6)
    params["x"]["bias_0"] = params["x"]["bias_1"] = jnp.full(1, 3.0)
    keys = row_keys(jax.random.key(0), 2)
    drawn, shown = hierarchy.sample_level(told_nothing, params["x"], {}, keys, shown=(3,))
    for leaves in (drawn, jax.tree.map(lambda leaf: leaf[0], shown)):
        np.testing.assert_allclose(leaves[0], 3.0, rtol=1e-5)
        np.testing.assert_allclose(leaves[1], 12.0, rtol=1e-5)


# --- text ------------------------------------------------------------------------------------------------------------


def text_level(**changes):
    return joint(backbone=Leafwise(sees_text=True), null_text=NULL_TEXT, **changes)


def texts(batch):
    return {"text": jnp.ones((batch, 3, 2)), "text_mask": jnp.ones((batch, 3), bool), "label": jnp.zeros(batch, int)}


@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_a_dropped_text_is_the_null_text_with_its_mask(mode):
    level = text_level(cond_drop=0.5, drop_mode=mode, num_classes=10)
    cond = conditioning.train_conditions(level, {}, texts(4096), row_keys(jax.random.key(0), 4096))
    dropped = ~np.asarray(cond["text_mask"][:, 1])
    assert abs(dropped.mean() - 0.5) < 0.03
    np.testing.assert_array_equal(cond["text"], np.where(dropped[:, None, None], -5.0, 1.0) * np.ones((1, 3, 2)))
    np.testing.assert_array_equal(cond["text_mask"], [[True, not gone, not gone] for gone in dropped])
    agree = np.mean(dropped == (np.asarray(cond["label"]) == 10))
    assert agree == 1 if mode == "joint" else abs(agree - 0.5) < 0.03


def test_guidance_leads_away_from_the_null_text(params):
    level = text_level(guidance=0.5)
    x = hierarchy.sample_level(level, params["x"], conditioning.conditions(level, {}, texts(2)), draw(2)[0])
    np.testing.assert_allclose(x[1], 6.0 + 0.5 * (6.0 - -10.0), rtol=1e-5)  # 3 tokens of (1, 1); 1 of (-5, -5)


def test_missing_text_names_the_level():
    only_text = {"text": texts(2)["text"]}
    for context, name in (({}, "text"), (only_text, "text_mask")):
        message = f"level x sees text but no '{name}' [B, tokens, ...] is given"
        refused(conditioning.conditions, text_level(), {}, context, match=message)


def test_the_text_of_a_batch_reaches_the_network():
    """Records of random text -> context -> NestedUNet, which refuses to be without; and the gradient of its weights."""
    config = get_config("deep")
    config.data.update(source="synthetic", num_examples=16)
    config.text.update(encoder="minilm", max_tokens=3, width=6)
    config.hierarchy.text_levels = ("x",)
    source, made = latents_of(config, "unused")
    run = train.make_run(config, made, build_data(config).open_text_encoder())
    raw = training_loop.to_device(run, loader.collate([source[i] for i in range(8)]))
    context = select_context(run.step.levels, raw)
    np.testing.assert_array_equal(context["text"][5], source[5]["text"])
    assert context["text_mask"].shape == (8, 3) and run.step.levels[0].null_text["text"].shape == (3, 6)
    grads, _ = jax.eval_shape(lambda p: training.gradients(run.step, p, raw, run.key), run.abstract.params)
    assert grads["x"]["inner_unet"]["inner_unet"]["cond_emb"]["kernel"].shape == (6, 32)
    del raw["text"]
    refused(training.gradients, run.step, run.abstract.params, raw, run.key, match="level x sees text but no 'text'")


# --- noise on the conditions of a cascade ----------------------------------------------------------------------------


def cascaded(**changes):
    """The level 'middle', which sees 'top' noised."""
    level = make_levels()[1]
    condition_noise = ConditionNoise(**dict(schedule=schedules.cosine(), noise_step=400) | changes)
    return dataclasses.replace(level, cond_sigmas=(0.0,), condition_noise=condition_noise)


def noised(level, batch=4096, train=True):
    keys, variables, _ = draw(batch)
    if train:
        return variables["top"], conditioning.train_conditions(level, variables, {}, keys)
    return variables["top"], conditioning.add_condition_noise(
        level, conditioning.conditions(level, variables, {}), keys, train=False
    )


def test_training_levels_are_uniform_and_told():
    z, cond = noised(cascaded(steps=4, noise_step=0))
    told = np.asarray(cond["noise_step_top"])
    assert told.dtype == np.float32 and set(told) == {0, 1, 2, 3, 4}
    np.testing.assert_allclose(np.bincount(told.astype(int)) / 4096, 0.2, atol=0.03)
    alpha, sigma = schedules.cosine()(jnp.asarray(told) / 4)
    noise = (cond["top"] - alpha[:, None, None, None] * z)[:, 0, 0]
    np.testing.assert_array_equal(noise[told == 0], 0)
    for step in (1, 2, 3, 4):
        assert np.std(noise[told == step]) == pytest.approx(float(sigma[told == step][0]), rel=0.08)


def test_sampling_has_one_level():
    z, cond = noised(cascaded(), train=False)
    assert set(np.asarray(cond["noise_step_top"])) == {400.0} and bool(cond["keep_top"].all())
    alpha, sigma = schedules.cosine()(0.4)
    noise = np.asarray(cond["top"] - alpha * z)
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(sigma, rel=0.03)


def test_a_cascade_keeps_its_image_where_labels_are_dropped():
    """Guidance leads away from no label, not from no image."""
    level = dataclasses.replace(cascaded(), cond_drop=0.9, num_classes=3)
    keys, variables, _ = draw(64)
    context = {"label": jnp.zeros(64, jnp.int32)}
    cond = conditioning.train_conditions(level, variables, context, keys)
    assert bool(cond["keep_top"].all()) and 40 < (np.asarray(cond["label"]) == 3).sum() < 64
    null = conditioning.null_cond(level, conditioning.conditions(level, variables, context))
    assert bool(null["keep_top"].all()) and (np.asarray(null["label"]) == 3).all()


def test_level_0_shows_the_condition_clean():
    z, cond = noised(cascaded(noise_step=0), 8, train=False)
    np.testing.assert_array_equal(cond["top"], z)
    assert not cond["noise_step_top"].any()


def test_samples_see_their_level():
    """Probe returns the mean of its condition: alpha 5 + sigma n, other than the clean 5 of level 0."""
    params, fixed = {"bias": jnp.zeros(1)}, {"top": jnp.full((256, 1, 1, 2), 5.0)}
    x = {}
    for steps in (0, 400):
        level = cascaded(noise_step=steps)
        cond = conditioning.conditions(level, fixed, {})
        sampled = jax.jit(lambda keys, level=level, cond=cond: hierarchy.sample_level(level, params, cond, keys))
        x[steps] = sampled(row_keys(jax.random.key(0), 256))[:, 0, 0, 0]
    alpha, sigma = schedules.cosine()(0.4)
    np.testing.assert_allclose(x[0], 5.0, rtol=1e-5)
    assert np.mean(x[400]) == pytest.approx(5 * alpha, abs=0.15)
    assert np.std(x[400]) == pytest.approx(sigma / np.sqrt(2), rel=0.15)


@pytest.mark.parametrize("changes", [dict(noise_step=-1), dict(noise_step=5, steps=4), dict(noise_step=0, steps=0)])
def test_levels_outside_the_steps(changes):
    refused(lambda: cascaded(**changes), match="is outside 0 to")


# --- steps shown -----------------------------------------------------------------------------------------------------


def test_shown_steps_are_the_estimates_of_those_evaluations(params):
    level = joint()
    constant = {"x": {**params["x"], "gain_0": jnp.zeros(1), "gain_1": jnp.zeros(1)}}
    keys = row_keys(jax.random.key(3), 2)
    plain = hierarchy.sample_level(level, params["x"], {}, keys)
    again, _ = hierarchy.sample_level(level, params["x"], {}, keys, shown=(0, 2))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    _, shown = hierarchy.sample_level(level, constant["x"], {}, keys, shown=(3, 1))
    times = np.linspace(1, 1e-3, 4)[[3, 1]]
    for i, leaf in enumerate(shown):
        assert leaf.shape == (2, 2, *SHAPES[i])
        np.testing.assert_allclose(leaf[:, 1, 1, 1, 0], 1000 * times + constant["x"][f"bias_{i}"], rtol=1e-5)


def test_a_generator_shows_every_resolution():
    """The first and the last evaluation are among those shown. The network says t - .2 and t - .5."""
    level = joint(process=dataclasses.replace(joint().process, time_scale=1.0))
    biases = (-0.2, -0.5)
    params = {f"bias_{i}": jnp.full(1, bias) for i, bias in enumerate(biases)}
    params = {"x": params | {"gain_0": jnp.zeros(1), "gain_1": jnp.zeros(1)}}
    made = latents_of_images((level_source("x", "pixels", SHAPES),), (4, 4, 1))
    gen = sampling.make_generator((level,), made, partition.make_mesh(1, 1), seed=0, batch_size=1, num_classes=10)
    for number, times in ((3, (1.0, 0.334, 1e-3)), (9, (1.0, 0.667, 0.334, 1e-3))):
        steps = gen.steps(params, 0, number)
        assert len(steps) == len(times)
        for t, images in zip(times, steps, strict=True):
            assert [image.shape for image in images] == list(SHAPES) and images[0].dtype == np.uint8
            for bias, image in zip(biases, images, strict=True):
                np.testing.assert_allclose(image, np.full(image.shape, (t + bias + 1) * 127.5), atol=1)
