"""HDiT as a level of a run: augmentation, dropout, growing batches, constants, whole runs of main.py."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.refusals import refused
from helpers.run_data import decoder_of, latents_of
from helpers.steps import batch_of, make
from helpers.tiny import get_config, run_main
from helpers.trees import assert_equal, copied

from configs import common
from input_pipeline.composition import Mapped, select_fields
from input_pipeline.digits import Digits
from nested.build.data import build_data
from nested.build.levels import build_levels
from nested.build.training import batch_spans, build_optimizer, check_batch_size
from nested.diffusion import conditioning, hierarchy
from nested.diffusion.level import buffer_predicate, row_keys, select_context
from nested.modes import train
from nested.runtime import checkpoint
from nested.spaces import svd
from nested.spaces.patch_pca import PatchSpace, patchify
from nested.spaces.pixels import normalise
from nested.training import loop as training_loop

GROUPS = common.hdit_groups()
DIGITS = select_fields(Digits().open(), ("label", "image"))


def config_of(*changes, arg="L1,hdit"):
    config = get_config(arg)
    config.update_from_flattened_dict(dict(changes))
    return config


# --- data ------------------------------------------------------------------------------------------------------------


def test_images_that_no_encoder_needs_are_read_as_they_are(tmp_path):
    source, latents = latents_of(config_of(), str(tmp_path))
    assert isinstance(source, Mapped) and set(source[3]) == {"label", "image"}
    assert [path.name for path in tmp_path.iterdir()] == [f"checked-{source.fingerprint}.txt"]  # and nothing encoded
    batch = batch_of(source)
    x = latents.variables(batch, None)["x"]
    np.testing.assert_allclose(x, batch["image"] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(latents.decode(x), batch["image"])
    moved = x + 0.3  # an augmented image is in [-1, 1] already
    np.testing.assert_array_equal(latents.variables({"image": moved}, None)["x"], moved)
    wrong = config_of()
    wrong.levels[0].shape = (8, 8, 3)
    refused(latents_of, wrong, str(tmp_path), match="level x: shape 8x8x3 given, but images of 8x8x1")


def test_augmented_images_are_not_normalised_twice():
    covariance = svd.CovarianceStream()
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    covariance.add(patchify(normalise(images), 2), 9)
    space = PatchSpace.from_basis(svd.fit_basis(covariance.result(), 3), 2, (4, 4, 3))
    image = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1), np.uint8)
    moved, stored = (space.variable({"image": x}, None) for x in (normalise(image), image))
    np.testing.assert_allclose(moved, stored, atol=1e-6)


def test_sampling_needs_no_images_where_the_variables_are_images(tmp_path):
    config = config_of(("data.source", "idx"), ("data.path", str(tmp_path / "gone")))
    z = jnp.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
    assert decoder_of(config, "unused").decode(z).shape == (1, 8, 8, 1)
    refused(latents_of, config, "unused", match="gone")


def test_augmentation_is_refused_where_it_would_lie():
    augmented = ("data.augment_prob", 0.5)
    refused(latents_of, config_of(augmented, arg="hdit"), "unused", match="encoded for z1x1, z2x2 is of unch")
    refused(build_levels, config_of(augmented, arg="L1"), match="levels[0].backbone 'uvit' cannot be told of the augm")
    both = config_of(augmented, ("data.flip", True))
    refused(build_data, both, match="config.data: ")
    assert build_data(config_of()).augmentation is None
    oblong = config_of(augmented)
    oblong.levels[0].shape = (8, 4, 1)
    refused(latents_of, oblong, "unused", match="the augmentation is of square images, x is 8x4; set it to 0")


def test_the_network_is_told_of_the_augmentation_and_of_none_in_validation_and_sampling():
    (plain,), (level,) = (build_levels(config_of(("data.augment_prob", p))) for p in (0.0, 0.5))
    assert (plain.inputs, level.inputs) == ((), ("augment",))
    batch = next(train.training_batches(config_of(("data.augment_prob", 0.9)), DIGITS, 0))
    context = select_context((level,), batch)
    assert set(context) == {"label", "augment"} and set(select_context((plain,), batch)) == {"label"}
    assert batch["image"].dtype == np.float32 and np.abs(context["augment"]).max() > 0.5
    cond = conditioning.conditions(level, {}, context)
    assert np.array_equal(cond["augment"], batch["augment"])
    null = conditioning.null_cond(level, cond)  # guidance changes the label alone
    assert np.array_equal(null["augment"], batch["augment"]) and set(np.asarray(null["label"])) == {10}


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """(run, states before and after each of seven steps, their metrics) with augmentation, dropout and groups."""
    config = config_of(("data.augment_prob", 0.5), ("optimizer.learning_rate", 0.01), ("optimizer.ema_power", 0.75),
                       ("optimizer.groups", GROUPS), ("optimizer.eps", 1e-12), ("train.steps", 7))  # fmt: skip
    run, source = make(config=config)
    update = training_loop.compile_step(run)
    state = training_loop.fresh_state(run)
    states, metrics, batches = [copied(state)], [], train.training_batches(config, source, 0)
    for _ in range(7):
        state, values = update(state, next(batches), run.key)
        states.append(copied(state))
        metrics.append(jax.device_get(values))
    batches.close()
    return run, states, metrics


def test_constants_stay_and_the_average_warms_up(trained):
    run, states, metrics = trained
    assert all(values["finite"] and np.isfinite(values["loss"]) for values in metrics)
    is_buffer = buffer_predicate(run.step.levels)
    flat = [jax.tree_util.tree_flatten_with_path(state.params)[0] for state in states]
    ema = [jax.tree.leaves(state.ema) for state in states]
    constants = 0
    for (path, before), (_, after), average in zip(flat[0], flat[7], ema[7], strict=True):
        name = "/".join(entry.key for entry in path)
        if is_buffer(name):
            constants += 1
            assert np.array_equal(before, after) and np.array_equal(average, before), name
        else:
            assert not np.array_equal(before, after), name
    assert constants == 5
    assert_equal(states[1].ema, states[1].params)  # the first decay is 0
    last = [tree["x"]["patch_out"]["proj"]["kernel"] for tree in (states[2].ema, states[2].params)]
    assert not np.array_equal(*last)


def test_dropout_is_drawn_from_the_rows_keys_in_training_only(trained):
    run, states, _ = trained
    (level,), params = run.step.levels, states[7].params
    variables = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)}
    context, times = {"label": jnp.arange(4)}, {"x": jnp.linspace(0.4, 0.6, 4)}
    keys = row_keys(jax.random.key(0), 4)

    @jax.jit
    def both(variables, context, times, keys):
        return [
            hierarchy.losses((level,), params, variables, context, times, keys, train=t)["x"] for t in (True, False)
        ]

    noisy, clean = both(variables, context, times, keys)
    part = jax.tree.map(lambda leaf: leaf[1:3], (variables, context, times, keys))
    np.testing.assert_allclose(both(*part)[0], noisy[1:3], rtol=1e-5)
    undropped = jax.jit(lambda: hierarchy.losses(
        (level_without_drops(level),), params, variables, context, times, keys, train=True)["x"])()  # fmt: skip
    assert np.abs(noisy - undropped).max() > 1e-6
    np.testing.assert_allclose(undropped, clean, rtol=1e-5)


def level_without_drops(level):
    return dataclasses.replace(level, backbone=level.backbone.clone(dropouts=0.0), cond_drop=0.0)


def test_batches_grow_and_go_on_with_the_data():
    growing = config_of(("train.batch_growth", ((2, 16), (3, 24))), ("train.steps", 5), ("data.augment_prob", 0.5))
    assert [tuple(span) for span in batch_spans(growing)] == [(0, 2, 8, 0), (2, 3, 16, 16), (3, 5, 24, 32)]
    batches = list(train.training_batches(growing, DIGITS, 0))
    assert [len(batch["label"]) for batch in batches] == [8, 8, 16, 24, 24]
    constant = config_of(("train.batch_size", 8), ("train.steps", 10), ("data.augment_prob", 0.5))
    steps = list(train.training_batches(constant, DIGITS, 0))
    joined = {name: np.concatenate([batch[name] for batch in steps]) for name in batches[0]}
    for name, whole in joined.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), whole)
    for batch, again in zip(batches[3:], train.training_batches(growing, DIGITS, 3), strict=True):  # resumed at step 3
        assert_equal(batch, again)
    falling = config_of(("train.batch_growth", ((3, 16), (2, 24))))
    refused(batch_spans, falling, match="its steps must rise from 1 on")
    refused(batch_spans, config_of(("train.batch_growth", ((0, 16),))), match="its steps must rise from 1 on")
    odd = config_of(("train.batch_growth", ((2, 15),)))
    refused(check_batch_size, odd, 2, match="config.train.batch_size 15 does not divide by 2 devices")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ("optimizer.groups", (dict(pattern="mapping/", rate=2.0),)),
            "optimizer.groups[0]: unknown option rate",
        ),
        (("levels[0].process.density.name", "normal"), "process.density.name: 'normal' given; choose from 'logn"),
        (("levels[0].process.density.sigma_min", 5e3), "config.levels[0].process.density: process.density: sigma_min"),
        (("levels[0].process.discrete_steps", 10), "config.levels[0].process: process.density draws the noise levels"),
        (("levels[0].sampler.steps", 0), "config.levels[0].sampler: sampler.steps = 0"),
        (("levels[0].sampler.sigma_min", 200.0), "sampler.sigma_min = 200.0, sampler.sigma_max = 160.0: expected"),
    ],
)
def test_refusals_name_the_key(change, message):
    config, (path, value) = config_of(), change
    place = config
    *parts, key = path.replace("[0]", ".0").split(".")
    for part in parts:
        place = place[int(part)] if part.isdigit() else place[part]
    place[key] = value

    def build_all():
        build_levels(config)
        build_optimizer(config)

    refused(build_all, match=message)


def test_a_level_with_oblong_patches_conditions_nothing():
    config = config_of(arg="hdit")
    config.levels[0].backbone = common.hdit(depths=(1,), widths=(16,), attentions=("global",), head_widths=8)
    config.levels[0].backbone["patch_size"] = (1, 1)
    refused(build_levels, config, match="config.levels[1]: sees z1x1, whose backbone.patch_size is (1, 1); give one")


# --- whole runs ------------------------------------------------------------------------------------------------------


def fingerprints(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["fingerprints"]


def test_a_run_resumed_after_its_batch_grew_is_bit_for_bit_that_of_one_go(tmp_path):
    options = ["--config.data.augment_prob=0.5", "--config.train.batch_growth=((2,16),)"]
    options += ["--config.evaluate.num_samples=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    out, _ = run_main(f"--workdir={one}", "--config.train.steps=4", *options, config="tests/helpers/tiny.py:L1,hdit")
    assert "samples.png" in out and not (one / "latents").exists() and not (one / "hierarchy.png").exists()
    run_main(f"--workdir={two}", "--config.train.steps=3", *options, config="tests/helpers/tiny.py:L1,hdit")
    run_main(f"--workdir={two}", "--config.train.steps=4", *options, config="tests/helpers/tiny.py:L1,hdit")
    assert fingerprints(one, 4) == fingerprints(two, 4)
    assert checkpoint.latest_step(str(two)) == 4


@pytest.mark.slow
def test_semantic_levels_above_an_hdit_train_and_sample(tmp_path):
    out, _ = run_main(f"--workdir={tmp_path}", config="tests/helpers/tiny.py:hdit")
    assert "hierarchy.png" in out and "FD-EffLite0" in out
    assert any("cond_grid_proj_z2x2" in name for name in fingerprints(tmp_path, 4))
