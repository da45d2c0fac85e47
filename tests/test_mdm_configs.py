"""configs/mdm.py and its kin: the paper's numbers, and one real training step of each, shrunk in place."""

import numpy as np
import pytest
from helpers.shipped import get_config
from helpers.shrunk import check_two_steps, on_random_data

from configs import mdm
from nested.build.levels import build_levels
from nested.build.training import split_phases
from nested.diffusion import samplers

# --- the numbers of the paper ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, names, sides, batches, steps",
    [
        ("imagenet256", ["s64", ""], [64, 256], [512, 256], [300_000, 500_000]),
        ("cc12m64", [""], [64], [2048], [500_000]),
        ("cc12m256", ["s64", ""], [64, 256], [2048, 1024], [500_000, 500_000]),
        ("cc12m1024", ["s64", "s64s256", ""], [64, 256, 1024], [2048, 1024, 768], [500_000, 500_000, 100_000]),
        ("webvid", ["s64", "s64t16", ""], [64, 64, 256], [2048, 512, 128], [500_000, 500_000, 300_000]),
    ],
)
def test_phases_train_as_the_paper(name, names, sides, batches, steps):
    """ICLR 2024, App. B and E."""
    phases = split_phases(get_config("mdm", name))
    assert [phase_name for phase_name, _ in phases] == names
    assert [phase.data.image_size for _, phase in phases] == sides
    assert [phase.train.batch_size for _, phase in phases] == batches
    assert [phase.train.steps for _, phase in phases] == steps
    assert [phase.init_from.phase for _, phase in phases] == ["", *names[:-1]]
    for _, phase in phases:
        optimizer = phase.optimizer
        assert (optimizer.learning_rate, optimizer.b1, optimizer.b2, optimizer.eps) == (1e-4, 0.9, 0.99, 1e-8)
        assert (optimizer.warmup_steps, optimizer.weight_decay, optimizer.clip_norm) == (30_000, 0.0, 2.0)
        remat = name in ("cc12m1024", "webvid")
        assert (optimizer.ema_decay, phase.train.dtype, phase.train.remat) == (0.9999, "bfloat16", remat)
        (level,) = build_levels(phase)
        assert level.sampler == samplers.DDPM(250, grid="released") and set(level.leaf_weights) == {1.0}
        assert (level.null_text is None) == (name == "imagenet256") == (level.num_classes == 1000)
        assert level.process.parameterization == "v" and level.process.loss_space == "eps"
    assert [phase.data.frames for _, phase in phases] == ([1, 16, 16] if name == "webvid" else [16] * len(phases))


@pytest.mark.parametrize(
    "architecture, preset, scales",
    [
        ("s64s256", "paper", (1, 4)), ("s64s256", "released", (1, 4)), ("s64s128s256", "paper", (1, 2, 4)),
        ("s64s256s1024", "paper", (1, 4, 16)), ("s64s256s1024", "released", (1, 16, 256)),
        ("s64t16", "paper", (1, 4)), ("s64t16s256", "paper", (1, 4, 16)),
    ],
)  # fmt: skip
def test_schedules_are_shifted(architecture, preset, scales):
    """SNR divided by 4 at 256 px, by 16 and 256 at 1024 px in the released config; 16 frames count as 4."""
    (level,) = build_levels(get_config("mdm", f"{architecture},{preset}"))
    base = level.process.schedules[0]
    for schedule, scale in zip(level.process.schedules, scales, strict=True):
        ratio = np.exp(2 * (base.log_snr(0.5) - schedule.log_snr(0.5)))
        assert ratio == pytest.approx(scale)


def test_the_released_preset():
    config = get_config("mdm", "cc12m1024,released")
    assert (config.optimizer.learning_rate, config.optimizer.b2, config.optimizer.warmup_steps) == (5e-5, 0.999, 10_000)
    (level,) = build_levels(config)
    network = level.backbone
    assert (network.text_proj, network.lm_layers, network.masked_cross_attention) == (2048, 0, False)
    assert [net.micro for net in network.nets] == [(("scale", side),) for side in (64, 256, 1024)]
    assert [net.normalize_input for net in network.nets] == [False, True, False]  # skip_normalization false at 256


def test_the_nested_baseline_has_no_low_resolution():
    (level,) = build_levels(get_config("mdm_baselines", "simple_nested"))
    assert level.leaf_weights == (0.0, 1.0) and not level.backbone.low_res_inputs


def test_the_cascade_is_two_levels():
    low, high = build_levels(get_config("mdm_baselines", "cascaded"))
    assert high.conditions == ("x64",) and high.condition_noise.noise_step == 600 and high.condition_noise.steps == 1000
    assert high.condition_noise.schedule == high.process.schedules[0]
    assert low.condition_noise is None and (low.num_classes, high.num_classes) == (1000, 1000)


# --- one step of every kind ------------------------------------------------------------------------------------------

SHRUNK = [("fashion_mnist_mdm", "progressive")]
SLOW = [  # 20 to 100 s each on two busy cores, of compilation
    ("mdm", "imagenet256"), ("mdm", "cc12m1024,released"), ("mdm", "webvid"), ("mdm", "s64s128s256s512s1024"),
    ("mdm_baselines", "latent_f8"),
    ("mdm_baselines", "simple_nested"), ("mdm_baselines", "cascaded"), ("emoji_mdm", "mixed"), ("emoji_video", ""),
]  # fmt: skip
SHRUNK += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


def shrink(config, factor):
    """Sides divided, one ResNet and at most one attention layer a resolution, 32 channels, random data."""
    for level in config.levels:
        joint = not isinstance(level.shape[0], int)
        shapes = [(*s[:-3], s[-3] // factor, s[-2] // factor, s[-1]) for s in (level.shape if joint else [level.shape])]
        level.shape = tuple(shapes) if joint else shapes[0]
        level.backbone.update(time_width=32, num_heads=4, text_proj=min(level.backbone.text_proj, 16))
        level.backbone.nets = tuple(
            dict(net, channels=(32,) * len(net["channels"]), resnets=(1,) * len(net["resnets"]), groups=8,
                 attention=tuple(min(count, 1) for count in net["attention"]))
            for net in level.backbone.nets
        )  # fmt: skip
    return on_random_data(config)


@pytest.mark.parametrize("name, argument", SHRUNK)
def test_a_step_of_every_kind(name, argument, tmp_path):
    config = shrink(get_config(name, argument), 1 if name.startswith("fashion") else 8)
    check_two_steps(config, tmp_path)


def test_every_architecture_has_a_config():
    from nested.models.nested_unet import VARIANTS

    assert set(mdm.SHAPES) == set(VARIANTS)
