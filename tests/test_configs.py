"""configs/: every file with every argument builds; ImageNet's hold the papers' numbers; what a config refuses."""

import math

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from helpers.command_line import run_here
from helpers.shipped import ALL, ARGUMENTS, DEPTHS, get_config

from configs import common, imagenet
from nested.build.data import build_data
from nested.build.levels import build_levels
from nested.build.training import abstract_state, build_optimizer, check_batch_size, split_phases
from nested.diffusion import samplers
from nested.encoders import grids, vit


def test_every_file_is_here():
    others = {"backbones", "common", "__init__"}
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == {*ARGUMENTS, *others}


def check_encoder(config):
    """Its options are taken: what is missing is the file that comes in no package."""
    if all(map(grids.is_codec_feature, config.encoder.features)):
        assert build_data(config).open_encoder() is None
    elif config.encoder.name in vit.VARIANTS:
        with pytest.raises(FileNotFoundError, match=f"{config.encoder.name} comes in no package"):
            build_data(config).open_encoder()
    if "crops1" in config.encoder.features:
        expected = {"mocov3_vitb16": "cls", "clip_vitb16": "projected", "efficientnet_lite0": "pool"}
        projected = [level for level in config.levels if level.standardize == "sample"]  # RCG
        assert config.encoder.vector == ("projected" if projected else expected.get(config.encoder.name, "cls"))


@pytest.mark.parametrize("name, argument", ALL)
def test_every_config_builds(name, argument):
    config = get_config(name, argument)
    check_encoder(config)
    assert set(config) == set(common.default())
    levels = build_levels(config)
    assert {level.source for level in config.levels[:-1]} <= {"pixels", *config.encoder.features}
    assert config.levels[-1].source == config.codec.name
    assert build_optimizer(config).learning_rate == config.optimizer.learning_rate
    check_batch_size(config, devices=1)
    for _, phase in split_phases(config):
        build_levels(phase)
    assert all(level.sampler.nfe(level.process) > 1 for level in levels)
    for i, level in enumerate(levels):
        coarser = tuple(other.name for other in levels[:i])
        assert level.conditions == (coarser if config.hierarchy.conditioning == "all_higher" else coarser[-1:])
    if name in ("quickstart", "fashion_mnist") or (name == "imagenet" and argument.endswith("data")):
        state = abstract_state(config)  # the others' levels are those of configs/imagenet.py
        assert set(state.params) == {level.name for level in levels}
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("words", ["", "class", "synthetic", "class,synthetic"])
def test_the_named_files_are_the_arguments(depth, words):
    assert get_config(f"imagenet_{depth}", words) == imagenet.get_config(f"{depth},{words}")


@pytest.mark.parametrize("words", ["R1,add", "R2,concat", "R4,add", "R1,min_snr_4"])
def test_hdit_rows_refuse_what_they_do_not_have(words):
    with pytest.raises(ValueError, match=f"config argument {words.split(',')[1]!r}: R"):
        get_config("hdit", words)


# --- the numbers of the papers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_imagenet_trains_as_the_paper(depth, kind):
    """CVPR 2025 Sec. 4 with U-ViT's ImageNet recipe (configs/imagenet256_uvit_huge.py of its repository)."""
    config = imagenet.get_config(f"{depth},{kind}")
    assert (config.train.batch_size, config.train.steps) == (1024, 500_000)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2) == (2e-4, 0.99, 0.99)
    assert (optimizer.weight_decay, optimizer.warmup_steps, optimizer.decay) == (0.03, 5000, "constant")
    assert (optimizer.ema_decay, optimizer.clip_norm) == (0.9999, 0.0)
    assert (config.hierarchy.cond_drop, config.hierarchy.conditioning) == (0.1, "all_higher")
    assert config.hierarchy.noise_gamma == 0.3
    assert (config.data.num_classes, config.data.image_size) == (1000, 256)
    for level in build_levels(config):
        net = level.backbone
        assert (net.width, net.num_heads, net.time_mlp, net.qkv_bias) == (768, 12, True, False)
        assert net.depth == (16 if depth == "L1_wide" else 12)
        assert net.num_classes == level.num_classes == (1000 if kind == "class" else 0)
        assert level.process.discrete_steps == 1000 and level.process.parameterization == "eps"
        sampler = samplers.DPMSolver(steps=50, order=3, algorithm="dpm_solver++", method="fast", t_end=1e-3)
        assert level.sampler == sampler
        alpha, sigma = level.process.schedules[0](1 / 1000)  # the first beta of Stable Diffusion is .00085
        assert sigma**2 == pytest.approx(0.00085) and alpha**2 == pytest.approx(1 - 0.00085)


SHAPES = [("z1x1", (1, 1, 256), 1), ("z2x2", (2, 2, 128), 1), ("z4x4", (4, 4, 64), 2), ("z8x8", (8, 8, 32), 2)]


@pytest.mark.parametrize("depth", range(1, 6))
@pytest.mark.parametrize(
    "kind, sigmas, guidance",
    [
        ("uncond", (0.5, 0.5, 0.5, 1.0), (0.0, 0.8, 0.8, 0.8, 0.8)),  # nothing conditions the top level
        ("class", (0.5, 0.5, 1.0, 1.0), (0.5, 0.4, 0.3, 0.2, 0.1)),
    ],
)
def test_imagenet_levels(depth, kind, sigmas, guidance):
    """Shapes, sigma_l and guidance weights, coarse to fine (CVPR Sec. 4.2 and Table 1)."""
    config = imagenet.get_config(f"L{depth},{kind}")
    expected = [*SHAPES[: depth - 1], ("x", (32, 32, 4), 2)]
    assert [(level.name, level.shape, level.backbone.patch_size) for level in config.levels] == expected
    levels = build_levels(config)
    assert levels[-1].cond_sigmas == sigmas[: depth - 1]
    assert tuple(level.guidance for level in levels) == guidance[:depth]
    assert config.hierarchy.label_levels == (tuple(name for name, *_ in expected) if kind == "class" else ())


def test_decaying_guidance():
    """CVPR Sec. 4.2: .5 at the top, .1 less for each finer level, never below 0."""
    assert common.decaying_guidance(5) == (0.5, 0.4, 0.3, 0.2, 0.1)
    assert common.decaying_guidance(2) == (0.5, 0.4)
    assert common.decaying_guidance(4, start=0.3, step=0.2) == (0.3, 0.1, 0.0, 0.0)


def test_rcg_trains_as_its_repository():
    """README of LTH14/rcg, config/rdm/mocov3vitb_simplemlp_l12_w1536.yaml, main_rdm.py and main_dit.py."""
    rdm, dit = (get_config("rcg", part) for part in ("rdm", "dit"))
    rep, x = build_levels(dit)
    assert (rdm.levels, rdm.train_levels, dit.train_levels) == (dit.levels, ("rep",), ("x",))
    assert (rep.shape, rep.conditions, x.shape, x.conditions) == ((1, 1, 256), (), (32, 32, 4), ("rep",))
    assert (x.cond_drop, x.cond_sigmas, x.backbone.empty, x.backbone.tanh_gelu) == (0.1, (0.0,), "variable", False)
    assert (rep.process.parameterization, rep.process.loss_space, rep.guidance) == ("x0", "x0", 0.0)
    assert (rdm.train.batch_size, rdm.train.steps) == (512, 200 * (1_281_167 // 512))
    assert (rdm.optimizer.learning_rate, rdm.optimizer.weight_decay, rdm.optimizer.b2) == (5.12e-4, 0.01, 0.999)
    assert (dit.train.batch_size, dit.train.steps) == (2048, 400 * (1_281_167 // 2048))
    assert (dit.optimizer.learning_rate, dit.optimizer.weight_decay, dit.optimizer.b2) == (1e-4, 0.0, 0.95)
    first, last = (rep.process.schedules[0](jnp.asarray(t))[1] ** 2 for t in (1e-3, 1.0))
    betas = [(0.0015**0.5 + (0.0195**0.5 - 0.0015**0.5) * i / 999) ** 2 for i in range(1000)]
    assert float(first) == pytest.approx(0.0015, rel=1e-5)
    assert 1 - float(last) == pytest.approx(math.prod(1 - beta for beta in betas), rel=1e-3)
    assert x.process.learned_variance and x.process.schedules[0](1e-3)[1] ** 2 == pytest.approx(1e-4)
    for level in (rep, x):
        assert level.process.c_noise(jnp.asarray([1e-3, 1.0])).tolist() == pytest.approx([0, 999], abs=1e-3)
        assert level.sampler.nfe(level.process) == 250
    assert rep.sampler.eta == 1
    by_class = build_levels(get_config("rcg", "rdm,class"))
    assert [level.num_classes for level in by_class] == [1000, 0] and by_class[0].cond_drop == 0


# --- refusals --------------------------------------------------------------------------------------------------------


def test_parse():
    groups = (("L3", "L1"), ("class", "uncond"))
    assert common.parse("", *groups) == ["L3", "class"]
    assert common.parse("uncond,L1", *groups) == ["L1", "uncond"]
    assert common.parse(",L1,", *groups) == ["L1", "class"]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("L7", "config argument 'L7' is not one of: L3 | L1; class | uncond"),
        ("L3,L1", "config argument 'L3,L1' names both L3 and L1; give one"),
        ("class,L1,uncond", "config argument 'class,L1,uncond' names both class and uncond; give one"),
    ],
)
def test_parse_refuses(argument, message):
    with pytest.raises(ValueError) as error:
        common.parse(argument, ("L3", "L1"), ("class", "uncond"))
    assert str(error.value) == message


def test_uvit_options():
    assert common.uvit("H")["width"] == 1152 and not common.uvit("H")["final_conv"]
    assert common.uvit("H", final_conv=True)["final_conv"]
    with pytest.raises(ValueError, match="has no option hight; it has name, width") as error:
        common.uvit(hight=3)
    assert "\n" not in str(error.value)


def test_defaults_are_built_anew():
    """A config that is changed does not change the next one."""
    common.default().train.steps = 3
    assert common.default().train.steps == 1000
    config = imagenet.get_config("L2")
    config.levels[0].backbone.width = 3
    assert config.levels[1].backbone.width == imagenet.get_config("L2").levels[0].backbone.width == 768


def test_a_value_of_a_level_is_reached_by_its_index():
    deeper = "--config.levels[2].backbone.depth=12"
    code, out, _ = run_here("--mode=summary", deeper, config="configs/quickstart.py")
    assert code == 0 and "z1x1" in out
    config = get_config("quickstart")
    assert config.levels[2].backbone.depth < 12
    config.levels[2].backbone.depth = 12
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_state(config).params))
    assert int(out.split("total")[1].split()[0].replace(",", "")) == parameters
