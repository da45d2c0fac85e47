"""nested/build.py: what a config builds, and one line for each thing that it refuses."""

import json

import jax
import numpy as np
import pytest
import tiny

from configs import common, imagenet
from nested import build, denoiser, samplers, schedules, sigma_samplers, train


def changed(*changes):
    """The tiny config with each (path, value) set, as ("levels[1].sampler.steps", 3); a key may be new."""
    config = tiny.get_config()
    with config.unlocked():
        for path, value in changes:
            parent, _, key = path.replace("[", ".").replace("]", "").rpartition(".")
            place = config
            for part in parent.split(".") if parent else ():
                place = place[int(part)] if part.isdigit() else place[part]
            place[key] = value
    return config


def refused(function, *args, match):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        function(*args)
    assert match in str(error.value) and "\n" not in str(error.value)


# --- refusals of the model's part ------------------------------------------------------------------------------------

ALL = ("z1x1", "z2x2", "x")
REFUSED = [
    ([("levels", ())], "config.levels is empty: give at least one level"),
    ([("levels[1].name", "x")], "config.levels: names must differ, found z1x1, x, x"),
    ([("hierarchy.label_levels", ("z9",))], "label_levels / train_levels: 'z9' given; choose from 'z1x1', 'z2x2', 'x'"),
    ([("train_levels", ("y",))], "label_levels / train_levels: 'y' given; choose from 'z1x1', 'z2x2', 'x'"),
    ([("data.num_classes", 0)], "config.hierarchy.label_levels names levels but config.data.num_classes is 0"),
    ([("hierarchy.label_levels", ())], "config.levels[0].guidance is 0.5 but nothing conditions z1x1: set it to 0"),
    ([("hierarchy.cond_drop", 1.0)], "config.hierarchy.cond_drop: found 1.0, expected a number in [0, 1)"),
    ([("hierarchy.drop_mode", "both")], "hierarchy.drop_mode = 'both' is not known: use one of 'joint', 'independent'"),
    (
        [("hierarchy.conditioning", "lower")],
        "config.hierarchy.conditioning: 'lower' given; choose from 'all_higher', 'next_higher'",
    ),
    ([("levels[0].shape", (4, 4))], "config.levels[0].shape: found (4, 4), expected (height, width, channels)"),
    ([("levels[0].shape", (0, 1, 4))], "config.levels[0].shape: found (0, 1, 4)"),
    ([("levels[2].shape", (8, 6, 1))], "config.levels[2]: the shape (8, 6, 1) of x does not divide into patches of"),
    ([("levels[2].backbone.patch_size", 0)], "config.levels[2].backbone.patch_size: found 0, expected at least 1"),
    (
        [("levels[0].shape", (4, 1, 4))],
        "config.levels: the shapes do not nest: z1x1 (4, 1, 4) comes before z2x2 (2, 2, 4) but has the larger grid",
    ),
    ([("levels[1].shape", (2, 16, 4))], "the shapes do not nest: z2x2 (2, 16, 4) comes before x (8, 8, 1)"),
    ([("levels[2].threshold", "soft")], "config.levels[2].threshold: 'soft' given; choose from 'none', 'static', 'dyn"),
    ([("levels[1].backbone.name", "unet")], "config.levels[1].backbone.name: 'unet' given; choose from 'uvit'"),
    ([("levels[1].backbone.hidden", 3)], "config.levels[1].backbone: UViT.__init__() got an unexpected keyword arg"),
    ([("levels[1].backbone.num_classes", 3)], "config.levels[1].backbone: num_classes is decided by other parts"),
    ([("train.dtype", "float16")], "config.train.dtype: 'float16' given; choose from 'float32', 'bfloat16'"),
    ([("levels[0].process.schedule", "edm")], "config.levels[0].process.schedule: 'edm' given; choose from 'sd_"),
    ([("levels[0].process.shift", 3)], "config.levels[0].process: Process.__init__() got an unexpected keyword arg"),
    ([("levels[0].process.schedules", ())], "config.levels[0].process: schedules is decided by other parts"),
    (
        [("levels[2].process.parameterization", "score")],
        "config.levels[2].process: process.parameterization = 'score' is not known: use one of 'eps', 'x0', 'v'",
    ),
    ([("levels[2].process.t_min", 0.1)], "config.levels[2].process: process.t_min = 0.1 has no effect with"),
    ([("levels[1].sampler.name", "ode")], "config.levels[1].sampler.name: 'ode' given; choose from 'ddpm', 'dd"),
    ([("levels[1].sampler.order", 3)], "config.levels[1].sampler: DDIM.__init__() got an unexpected keyword arg"),
    ([("levels[1].sampler", dict(name="heun"))], "config.levels[1].sampler: Heun.__init__() missing 1 required posi"),
    ([("levels[1].sampler.eta", 2.0)], "config.levels[1].sampler: sampler.eta = 2.0: expected a number from 0 to 1"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[str(changes[0]) for changes, _ in REFUSED])
def test_levels_refuse(changes, message):
    refused(build.levels, changed(*changes), match=message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ([("optimizer.decay", "linear")], "config.optimizer: optimizer.decay: found 'linear', expected one of"),
        ([("optimizer.b1", 1.0)], "config.optimizer: optimizer.b1: found 1.0, expected a number in [0, 1)"),
        ([("optimizer.momentum", 0.9)], "config.optimizer: OptimizerConfig.__init__() got an unexpected key"),
        ([("optimizer.total_steps", 9)], "config.optimizer: total_steps is decided by other parts of the config"),
        (
            [("optimizer.decay", "cosine"), ("optimizer.warmup_steps", 4)],
            "config.train.steps is 4: cosine decay needs more than config.optimizer.warmup_steps, 4",
        ),
    ],
)
def test_optimizer_refuses(changes, message):
    refused(build.optimizer, changed(*changes), match=message)


def test_cosine_decay_ends_with_the_run():
    assert build.optimizer(changed(("optimizer.decay", "cosine"), ("train.steps", 70))).total_steps == 70
    assert build.optimizer(changed(("train.steps", 70))).total_steps is None


def test_batch_must_divide():
    build.check_batch(changed(("train.batch_size", 12), ("train.accumulate", 3)), devices=4)
    message = "config.train.batch_size 8 does not divide by 3 devices x config.train.accumulate 2; use a multiple of 6"
    refused(build.check_batch, changed(("train.accumulate", 2)), 3, match=message)
    refused(build.check_batch, changed(("train.accumulate", 0)), 1, match="config.train.accumulate 0")
    refused(build.check_batch, changed(("train.batch_size", 0)), 1, match="config.train.batch_size 0 does not")


# --- what is built ---------------------------------------------------------------------------------------------------


def conditions(config):
    return [level.conditions for level in build.levels(config)]


def test_conditioning_sees_all_coarser_levels_or_the_next_one():
    assert conditions(tiny.get_config()) == [(), ("z1x1",), ("z1x1", "z2x2")]
    markovian = changed(("hierarchy.conditioning", "next_higher"), ("levels[0].sigma", 0.25), ("levels[1].sigma", 1.0))
    assert conditions(markovian) == [(), ("z1x1",), ("z2x2",)]
    levels = build.levels(markovian)
    assert [level.cond_sigmas for level in levels] == [(), (0.25,), (1.0,)]
    assert levels[2].backbone.conditions == (("z2x2", markovian.levels[1].backbone.patch_size),)
    state = train.abstract_state(markovian)
    assert "cond_embed_z1x1" not in state.params["x"] and "cond_embed_z2x2" in state.params["x"]


def test_only_label_levels_see_the_label():
    config = changed(("hierarchy.label_levels", ("x",)), ("levels[0].guidance", 0.0))
    levels = build.levels(config)
    assert [level.num_classes for level in levels] == [0, 0, 10]
    assert [level.backbone.num_classes for level in levels] == [0, 0, 10]
    assert [level.cond_drop for level in levels] == [0.0, 0.1, 0.1]  # the top level has nothing to drop
    state = train.abstract_state(config)
    assert state.params["x"]["label_emb"]["embedding"].shape == (11, 16)
    assert "label_emb" not in state.params["z2x2"]


def test_options_reach_the_level():
    config = changed(
        ("hierarchy.drop_mode", "independent"), ("hierarchy.noise_gamma", 0.7), ("hierarchy.cond_drop", 0.2),
        ("levels[2].loss_weight", 3.0), ("levels[1].guidance", 0.25),
        ("train.dtype", "bfloat16"), ("train.remat", True),
    )  # fmt: skip
    top, middle, bottom = build.levels(config)
    assert (top.drop_mode, middle.noise_gamma, bottom.cond_drop) == ("independent", 0.7, 0.2)
    assert (bottom.loss_weight, middle.guidance, bottom.shape) == (3.0, 0.25, (8, 8, 1))
    assert (bottom.backbone.dtype, bottom.backbone.remat) == (jax.numpy.bfloat16, True)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(name="ddpm", steps=7), samplers.DDPM(7)),
        (dict(name="ddim", steps=7, eta=0.5), samplers.DDIM(7, 0.5)),
        (common.dpm_solver(6), samplers.DPMSolver(6)),
        (dict(name="euler_in_time", steps=7), samplers.EulerInTime(7)),
        (dict(name="heun", steps=7, t_end=0.01), sigma_samplers.Heun(7, t_end=0.01)),
        (common.sigma_sampler("dpmpp_2m_sde", 9, 0.02, 80.0, solver_type="heun", eta=0.0),
         sigma_samplers.DPMpp2MSDE(9, "karras", 0.02, 80.0, 7.0, eta=0.0, solver_type="heun")),
    ],
)  # fmt: skip
def test_samplers_take_their_options(options, expected):
    assert build.sampler(options, "levels[0].sampler") == expected


def test_every_sampler_by_its_name():
    kinds = dict(ddim=samplers.DDIM, euler=sigma_samplers.Euler, dpm2=sigma_samplers.DPM2, lms=sigma_samplers.LMS,
                 euler_ancestral=sigma_samplers.EulerAncestral, dpm2_ancestral=sigma_samplers.DPM2Ancestral,
                 dpmpp_2s_ancestral=sigma_samplers.DPMpp2SAncestral, dpmpp_sde=sigma_samplers.DPMppSDE,
                 dpmpp_2m=sigma_samplers.DPMpp2M, dpmpp_3m_sde=sigma_samplers.DPMpp3MSDE)  # fmt: skip
    for name, kind in kinds.items():
        assert build.sampler(dict(name=name, steps=3), "levels[0].sampler") == kind(3)
    assert set(build.SAMPLERS) == {*kinds, "ddpm", "dpm_solver", "euler_in_time", "heun", "dpmpp_2m_sde"}


@pytest.mark.parametrize("name", build.SCHEDULES)
def test_every_schedule_by_its_name(name):
    expected = dict(
        sd_scaled_linear=schedules.sd_scaled_linear(), cosine=schedules.cosine(), linear_vp=schedules.LinearVP(),
        ddpm_linear=schedules.PiecewiseVP(tuple(np.linspace(1e-4, 0.02, 1000).tolist())),
        exponential_ve=schedules.ExponentialVE(1e-3, 1e3),
    )  # fmt: skip
    built = build.build_process(dict(common.sd_process(), schedule=name, parameterization="v"), "levels[0].process")
    assert built.schedules == (expected[name],) and built.parameterization == "v"


@pytest.mark.parametrize("name, percentile", [("static", None), ("dynamic", 0.995)])
def test_thresholds(name, percentile):
    def wild(x, t, cond):
        return 3 * x

    x = np.linspace(-1, 1, 8).reshape(1, 2, 4, 1)
    limit = build.levels(changed(("levels[2].threshold", name)))[2].threshold
    result = limit(wild)(x, None, {})
    np.testing.assert_array_equal(result, denoiser.thresholded(wild, percentile)(x, None, {}))
    assert np.abs(result).max() <= 1
    assert build.levels(tiny.get_config())[2].threshold is None


def test_trained_levels():
    assert build.trained(tiny.get_config()) == ALL
    assert build.trained(changed(("train_levels", ("x", "z1x1")))) == ("z1x1", "x")


def test_plain_is_json_and_a_checkpoint_of_it_fits_itself():
    config = tiny.get_config()
    plain = build.plain(config)
    assert plain["levels"][2]["shape"] == [8, 8, 1] and set(build.STATE_KEYS) <= set(plain)
    assert build.shared_levels(json.loads(json.dumps(plain)), config) == ALL


# --- levels of another run -------------------------------------------------------------------------------------------


def test_a_deeper_hierarchy_reuses_the_coarse_levels():
    """CVPR Sec. 4: L - 1 levels of an L-level model exist already; the finest sees another hierarchy."""
    shallow, deep = (imagenet.get_config(depth) for depth in ("L3", "L4"))
    assert build.shared_levels(build.plain(shallow), deep) == ("z1x1", "z2x2")
    params = {name: train.abstract_state(config).params for name, config in (("shallow", shallow), ("deep", deep))}
    for name in ("z1x1", "z2x2"):
        assert params["shallow"][name] == params["deep"][name]
    assert params["shallow"]["x"]["pos_embed"] != params["deep"]["x"]["pos_embed"]


@pytest.mark.parametrize(
    "change, fitting",
    [
        (("levels[1].backbone.width", 32), ("z1x1", "x")),
        (("levels[1].backbone.patch_size", 2), ("z1x1",)),  # the finer level embeds it by its patches
        (("levels[0].shape", (1, 1, 3)), ()),
        (("hierarchy.conditioning", "next_higher"), ("z1x1", "z2x2")),
        (("hierarchy.label_levels", ("z1x1", "x")), ("z1x1", "x")),
        (("data.num_classes", 7), ()),
        (("levels[1].sigma", 0.9), ALL),  # sigma is not a matter of the network
    ],
)
def test_a_changed_network_does_not_fit(change, fitting):
    assert build.shared_levels(build.plain(tiny.get_config()), changed(change)) == fitting


def test_init_from_names_what_there_is():
    for key, value, found in (("weights", "both", "both"), ("levels", ("z9",), "z9")):
        refused(build.check_init_from, changed((f"init_from.{key}", value)), match=f"init_from.{key}: '{found}' given")
