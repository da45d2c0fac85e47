"""nested/build/levels.py: what a config builds, and one line for each thing that it refuses."""

import json

import jax
import pytest
from helpers import tiny, tiny_mdm
from helpers.refusals import refused
from helpers.tiny import with_changes

from configs import common, imagenet, rcg
from nested.build.levels import build_levels, trained_level_names
from nested.build.options import to_plain
from nested.build.training import STATE_KEYS, abstract_state, build_optimizer, check_batch_size, check_init_from
from nested.weights.fit import shared_levels

# --- refusals of the model's part ------------------------------------------------------------------------------------

REFUSED = [
    ([("levels", ())], "config.levels is empty: give at least one level"),
    ([("levels[1].name", "x")], "config.levels: names must differ, found z1x1, x, x"),
    ([("hierarchy.label_levels", ("z9",))], "text_levels / train_levels: 'z9' given; choose from 'z1x1', 'z2x2', 'x'"),
    ([("train_levels", ("y",))], "text_levels / train_levels: 'y' given; choose from 'z1x1', 'z2x2', 'x'"),
    ([("data.num_classes", 0)], "config.hierarchy.label_levels names levels but config.data.num_classes is 0"),
    ([("hierarchy.label_levels", ())], "config.levels[0].guidance is 0.5 but nothing conditions z1x1: set it to 0"),
    ([("hierarchy.cond_drop", 1.0)], "config.hierarchy.cond_drop: found 1.0, expected a number in [0, 1)"),
    ([("hierarchy.drop_mode", "both")], "config.hierarchy.drop_mode: 'both' given; choose from 'joint', 'independent'"),
    (
        [("hierarchy.conditioning", "lower")],
        "config.hierarchy.conditioning: 'lower' given; choose from 'all_higher', 'next_higher'",
    ),
    ([("levels[0].shape", (4, 4))], "config.levels[0] (z1x1): shape: found (4, 4), expected (height, width, channels)"),
    ([("levels[0].shape", (0, 1, 4))], "config.levels[0] (z1x1): shape: found (0, 1, 4)"),
    ([("levels[2].shape", (8, 6, 1))], "config.levels[2] (x): the shape (8, 6, 1) does not divide into patches of 4"),
    ([("levels[2].backbone.patch_size", 0)], "config.levels[2] (x): backbone.patch_size: found 0, expected at least 1"),
    (
        [("levels[0].shape", (4, 1, 4))],
        "config.levels: the shapes do not nest: z1x1 (4, 1, 4) comes before z2x2 (2, 2, 4) but has the larger grid",
    ),
    ([("levels[1].shape", (2, 16, 4))], "the shapes do not nest: z2x2 (2, 16, 4) comes before x (8, 8, 1)"),
    ([("levels[2].threshold", "soft")], "config.levels[2].threshold: 'soft' given; choose from 'none', 'static', 'dyn"),
    ([("levels[1].backbone.name", "unet")], "config.levels[1].backbone.name: 'unet' given; choose from 'uvit'"),
    ([("levels[1].backbone.hidden", 3)], "config.levels[1].backbone: unknown option hidden; choose from"),
    ([("levels[1].backbone.num_classes", 3)], "config.levels[1].backbone: num_classes is decided by other parts"),
    ([("train.dtype", "float16")], "config.train.dtype: 'float16' given; choose from 'float32', 'bfloat16'"),
    ([("levels[0].process.schedule", "edm")], "config.levels[0].process.schedule: 'edm' given; choose from 'sd_"),
    ([("levels[0].process.shift", 3)], "config.levels[0].process: unknown option shift; choose from"),
    ([("levels[0].process.schedules", ())], "config.levels[0].process: schedules is decided by other parts"),
    (
        [("levels[2].process.parameterization", "score")],
        "config.levels[2].process.parameterization: 'score' given; choose from 'eps', 'x0', 'v', 'edm'",
    ),
    ([("levels[2].process.t_min", 0.1)], "config.levels[2].process: process.t_min = 0.1 has no effect with"),
    ([("levels[1].sampler.name", "ode")], "config.levels[1].sampler.name: 'ode' given; choose from 'ddpm', 'dd"),
    ([("levels[1].sampler.order", 3)], "config.levels[1].sampler: unknown option order; choose from steps, t_end, "),
    ([("levels[1].sampler", dict(name="heun"))], "config.levels[1].sampler: the option steps is missing"),
    ([("levels[1].sampler.eta", 2.0)], "config.levels[1].sampler: sampler.eta = 2.0: expected a number from 0 to 1"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[str(changes[0]) for changes, _ in REFUSED])
def test_levels_refuse(changes, message):
    refused(build_levels, with_changes(*changes), match=message)


DIFFUSED = ("hierarchy.cond_noise", "diffused")
REFUSED_NESTS = [
    ("nest", [("levels[0].shape", ((2, 2, 1), (5, 5, 1)))],
     "config.levels[0] (x): NestedUNet: nets[1], shape (5, 5, 1): (5, 5) does not halve"),
    ("nest", [("levels[0].shape", ((2, 2, 1), (8, 8, 1)))],
     "config.levels[0] (x): NestedUNet: nets[0], shape (2, 2, 1): nets[1] around it ends at (4, 4)"),
    ("nest", [("levels[0].shape", (4, 4, 1)), ("levels[0].mixed", ())], "config.levels[0] (x): NestedUNet: 1 resoluti"),
    ("nest", [("levels[0].backbone.nets[1].width", 3)], "config.levels[0].backbone.nets[1]: unknown option width"),
    ("nest", [("levels[0].backbone.text_width", 3)], "config.levels[0].backbone: text_width is decided by other parts"),
    ("nest", [("levels[0].leaf_weights", (1.0,))], "config.levels[0].leaf_weights (1.0,): give 2 number(s) of at leas"),
    ("nest", [("levels[0].leaf_weights", (0, 0))], "config.levels[0].leaf_weights (0.0, 0.0): give 2 number(s)"),
    ("nest", [("levels[0].leaf_weights", (1, -1))], "config.levels[0].leaf_weights (1.0, -1.0): give 2 number(s)"),
    ("nest", [("levels[0].mixed", (4, 2, 1))], "config.levels[0].mixed (4, 2, 1): give 2 row count(s) that do not ris"),
    ("nest", [("levels[0].mixed", (1, 2))], "config.levels[0].mixed (1, 2): give 2 row count(s) that do not rise"),
    ("nest", [("levels[0].mixed", (1, 0))], "config.levels[0].mixed (1, 0): give 2 row count(s)"),
    ("nest", [("hierarchy.text_levels", ("x",))], "is ('x',), config.text.encoder '': give both, or neither"),
    ("nest", [("text.encoder", "minilm")], "text_levels is (), config.text.encoder 'minilm': give both, or neither"),
    ("nest", [("sample.prompts", ("a cat",))], "config.sample.prompts and negative_prompt need text"),
    ("nest", [("sample.negative_prompt", "grey")], "config.sample.prompts and negative_prompt need text"),
    ("nest", [("hierarchy.cond_noise", "diffused")], "'diffused': a single level has no conditions: 'sigma'"),
    ("cascade", [("hierarchy.label_levels", ())], "guidance is 0.5 but nothing conditions x2: set it to 0"),
    ("nest", [("hierarchy.text_levels", ("y",))], "text_levels / train_levels: 'y' given; choose from 'x'"),
    ("cascade", [("levels[0].sigma", 0.5)], "config.hierarchy.cond_noise 'diffused' with sigma of x2 and noise_gamma"),
    ("cascade", [("hierarchy.noise_gamma", 1.0)], "'diffused' with sigma of no level and noise_gamma 1.0: both belong"),
    ("cascade", [("hierarchy.cond_noise", "sigma")], "config.hierarchy.cond_noise_step 100 has no effect with"),
    ("cascade", [("hierarchy.cond_noise", "both")], "config.hierarchy.cond_noise: 'both' given; choose from 'sigma', "),
    ("cascade", [("hierarchy.cond_noise_step", 1001)], "config.hierarchy: condition noise: noise_step 1001 is out"),
    ("cascade", [("levels[0].shape", ((2, 2, 1), (4, 4, 1))), ("levels[0].backbone", tiny_mdm.nest(2).backbone)],
     "config.levels[1]: sees x2, whose variable is several resolutions; only one can be seen"),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes, message", REFUSED_NESTS, ids=[str(case[1][0]) for case in REFUSED_NESTS])
def test_nests_and_cascades_refuse(kind, changes, message):
    refused(build_levels, with_changes(*changes, config=tiny_mdm.get_config(kind)), match=message)


def test_backbones_that_do_not_take_what_the_hierarchy_gives():
    diffused = with_changes(DIFFUSED, ("hierarchy.noise_gamma", float("inf")), ("levels[0].sigma", 0.0),
                       ("levels[1].sigma", 0.0))  # fmt: skip
    refused(build_levels, diffused, match="levels[1].backbone cannot be told how noisy its conditions are; use nested_")
    text = with_changes(("text.encoder", "minilm"), ("hierarchy.text_levels", ("z2x2",)))
    assert build_levels(text)[1].backbone.text_tokens == text.text.max_tokens
    assert [level.backbone.text_dim for level in build_levels(text)] == [0, text.text.width, 0]
    with text.unlocked():
        text.levels[1].backbone = dict(common.hdit(), patch_size=1)
    refused(build_levels, text, match="config.hierarchy.text_levels: levels[1].backbone 'hdit' does not take text")


@pytest.mark.parametrize(
    "preset, changes, message",
    [
        ("best", [], "config.hierarchy.preset 'best': choose from cvpr, iclr, or '' for any options"),
        ("iclr", [], "config.hierarchy.conditioning is 'all_higher' but hierarchy.preset is 'iclr', which means"),
        ("cvpr", [("hierarchy.cond_drop", 0.5)], "config.hierarchy.cond_drop is 0.5 but hierarchy.preset is 'cvpr'"),
        ("cvpr", [("levels[1].backbone.injection", "deconv_concat")], "levels[1].backbone.injection is 'deconv_"),
        ("cvpr", [("levels[0].source", "codec")], "config.levels[0].source is 'codec' but hierarchy.preset is"),
    ],
)
def test_a_preset_holds_the_options_to_its_paper(preset, changes, message):
    refused(build_levels, with_changes(("hierarchy.preset", preset), *changes), match=message)


def test_the_presets_options_make_its_hierarchy():
    """CVPR: all coarser levels as tokens, 10 % drop. The draft: the next coarser one, two layers every two blocks."""
    config = tiny.get_config()
    common.use_preset(config, "iclr")
    top, middle, bottom = build_levels(config)
    assert (top.conditions, middle.conditions, bottom.conditions) == ((), ("z1x1",), ("z2x2",))
    assert (bottom.cond_drop, bottom.backbone.injection, bottom.backbone.inject_every) == (0.5, "deconv_concat", 2)
    assert bottom.backbone.inject_layers == 2
    common.use_preset(config, "cvpr")
    bottom = build_levels(config)[2]
    assert (bottom.conditions, bottom.cond_drop) == (("z1x1", "z2x2"), 0.1)
    assert (bottom.backbone.injection, bottom.backbone.inject_every) == ("append_tokens", 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (("hierarchy.noise_gamma", -1.0), "config.hierarchy.noise_gamma: found -1.0, expected at least 0, or infinity"),
        (("hierarchy.noise_gamma", float("nan")), "config.hierarchy.noise_gamma: found nan, expected at least 0"),
        (("levels[1].sigma", -0.5), "config.levels[1].sigma: found -0.5, expected at least 0"),
    ],
)
def test_noise_on_conditions_is_not_negative(change, message):
    refused(build_levels, with_changes(change), match=message)


def test_levels_to_take_need_a_run_to_take_them_from():
    """A run of configs/rcg.py:dit that forgets init_from.path would sample from a network that never trained."""
    message = "config.init_from.levels ('rep',) without a run to take them from: give config.init_from.path, the --work"
    refused(check_init_from, rcg.get_config("dit"), match=message)
    check_init_from(rcg.get_config("rdm"))
    check_init_from(rcg.get_config("dit,synthetic"))


def test_levels_that_see_other_text_do_not_fit():
    config = with_changes(("text.encoder", "minilm"), ("hierarchy.text_levels", ("x",)))
    other = to_plain(config)
    assert shared_levels(other, to_plain(config)) == ("z1x1", "z2x2", "x")
    for key, value in (("encoder", "t5"), ("max_tokens", 7), ("width", 8)):
        assert shared_levels({**other, "text": {**other["text"], key: value}}, to_plain(config)) == ("z1x1", "z2x2")


@pytest.mark.parametrize("option, value", [("noise_scale", "std"), ("noise_resample", True)])
def test_how_conditions_are_noised_is_refused_where_they_are_not(option, value):
    config = with_changes(("hierarchy.noise_gamma", float("inf")), (f"hierarchy.{option}", value))
    refused(build_levels, config, match="with gamma infinity conditions are shown without noise")
    config.hierarchy.noise_gamma = 0.5
    assert getattr(build_levels(config)[2], option) == value


@pytest.mark.parametrize(
    "changes, message",
    [
        ([("optimizer.decay", "linear")], "config.optimizer.decay: 'linear' given; choose from 'constant', 'cosine'"),
        ([("optimizer.b1", 1.0)], "config.optimizer: optimizer.b1: found 1.0, expected a number in [0, 1)"),
        ([("optimizer.momentum", 0.9)], "config.optimizer: unknown option momentum; choose from learning_rate"),
        ([("optimizer.total_steps", 9)], "config.optimizer: total_steps is decided by other parts of the config"),
        (
            [("optimizer.decay", "cosine"), ("optimizer.warmup_steps", 4)],
            "config.train.steps is 4: cosine decay needs more than config.optimizer.warmup_steps, 4",
        ),
    ],
)
def test_optimizer_refuses(changes, message):
    refused(build_optimizer, with_changes(*changes), match=message)


def test_cosine_decay_ends_with_the_run():
    assert build_optimizer(with_changes(("optimizer.decay", "cosine"), ("train.steps", 70))).total_steps == 70
    assert build_optimizer(with_changes(("train.steps", 70))).total_steps is None


def test_batch_must_divide():
    check_batch_size(with_changes(("train.batch_size", 12), ("train.accumulate", 3)), devices=4)
    message = "config.train.batch_size 8 does not divide by 3 devices x config.train.accumulate 2; use a multiple of 6"
    refused(check_batch_size, with_changes(("train.accumulate", 2)), 3, match=message)
    refused(check_batch_size, with_changes(("train.accumulate", 0)), 1, match="config.train.accumulate 0")
    refused(check_batch_size, with_changes(("train.batch_size", 0)), 1, match="config.train.batch_size 0 does not")
    mixed = with_changes(("levels[0].mixed", (4, 1)), ("train.accumulate", 2), ("train.batch_size", 24),
                    config=tiny_mdm.get_config("nest"))  # fmt: skip
    check_batch_size(mixed, devices=3)
    message = "config.levels[0].mixed (4, 1): the 6 rows per device of config.train.batch_size 24 do not divide into gr"
    refused(check_batch_size, mixed, 2, match=message)


# --- what is built ---------------------------------------------------------------------------------------------------


def conditions(config):
    return [level.conditions for level in build_levels(config)]


def test_conditioning_sees_all_coarser_levels_or_the_next_one():
    assert conditions(tiny.get_config()) == [(), ("z1x1",), ("z1x1", "z2x2")]
    markovian = with_changes(
        ("hierarchy.conditioning", "next_higher"), ("levels[0].sigma", 0.25), ("levels[1].sigma", 1.0)
    )
    assert conditions(markovian) == [(), ("z1x1",), ("z2x2",)]
    levels = build_levels(markovian)
    assert [level.cond_sigmas for level in levels] == [(), (0.25,), (1.0,)]
    assert levels[2].backbone.conditions == (("z2x2", markovian.levels[1].backbone.patch_size),)
    state = abstract_state(markovian)
    assert "cond_embed_z1x1" not in state.params["x"] and "cond_embed_z2x2" in state.params["x"]


def test_only_label_levels_see_the_label():
    config = with_changes(("hierarchy.label_levels", ("x",)), ("levels[0].guidance", 0.0))
    levels = build_levels(config)
    assert [level.num_classes for level in levels] == [0, 0, 10]
    assert [level.backbone.num_classes for level in levels] == [0, 0, 10]
    assert [level.cond_drop for level in levels] == [0.0, 0.1, 0.1]  # the top level has nothing to drop
    state = abstract_state(config)
    assert state.params["x"]["label_emb"]["embedding"].shape == (11, 16)
    assert "label_emb" not in state.params["z2x2"]


def test_options_reach_the_level():
    config = with_changes(
        ("hierarchy.drop_mode", "independent"), ("hierarchy.noise_gamma", 0.7), ("hierarchy.cond_drop", 0.2),
        ("levels[2].loss_weight", 3.0), ("levels[1].guidance", 0.25),
        ("train.dtype", "bfloat16"), ("train.remat", True),
    )  # fmt: skip
    top, middle, bottom = build_levels(config)
    assert (top.drop_mode, middle.noise_gamma, bottom.cond_drop) == ("independent", 0.7, 0.2)
    assert (bottom.loss_weight, middle.guidance, bottom.shape) == (3.0, 0.25, (8, 8, 1))
    assert (bottom.backbone.dtype, bottom.backbone.remat) == (jax.numpy.bfloat16, True)


def test_trained_levels():
    assert trained_level_names(tiny.get_config()) == tiny.LEVELS
    assert trained_level_names(with_changes(("train_levels", ("x", "z1x1")))) == ("z1x1", "x")


def test_plain_is_json_and_a_checkpoint_of_it_fits_itself():
    config = tiny.get_config()
    plain = to_plain(config)
    assert plain["levels"][2]["shape"] == [8, 8, 1] and set(STATE_KEYS) <= set(plain)
    assert shared_levels(json.loads(json.dumps(plain)), plain) == tiny.LEVELS


# --- levels of another run -------------------------------------------------------------------------------------------


def test_a_deeper_hierarchy_reuses_the_coarse_levels():
    """CVPR Sec. 4: L - 1 levels of an L-level model exist already; the finest sees another hierarchy."""
    shallow, deep = (imagenet.get_config(depth) for depth in ("L3", "L4"))
    assert shared_levels(to_plain(shallow), to_plain(deep)) == ("z1x1", "z2x2")
    params = {name: abstract_state(config).params for name, config in (("shallow", shallow), ("deep", deep))}
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
        (("levels[1].sigma", 0.9), tiny.LEVELS),  # sigma is not a matter of the network
    ],
)
def test_a_changed_network_does_not_fit(change, fitting):
    assert shared_levels(to_plain(tiny.get_config()), to_plain(with_changes(change))) == fitting


def test_init_from_names_what_there_is():
    for key, value, found in (("weights", "both", "both"), ("levels", ("z9",), "z9")):
        config = with_changes(("init_from.path", "run"), (f"init_from.{key}", value))
        refused(check_init_from, config, match=f"init_from.{key}: '{found}' given")
