"""configs/coco.py, coco_iclr.py, imagenet100.py, rcg.py: the papers' numbers, and one real training step of each."""

import pytest
from helpers.refusals import refused
from helpers.shipped import get_config
from helpers.shrunk import check_two_steps, on_random_data

from configs import imagenet100
from nested.build.levels import build_levels
from nested.modes import summary

# --- the numbers of the papers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_coco_trains_as_the_paper(depth):
    """CVPR 2025 Sec. 4 (sigma .5, guidance 1, L = 2: 1x256) with U-ViT's COCO recipe (configs/mscoco_uvit_small.py)."""
    config = get_config("coco", f"L{depth}")
    assert (config.train.batch_size, config.train.steps) == (256, 323_000)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2) == (2e-4, 0.9, 0.9)
    assert (optimizer.weight_decay, optimizer.warmup_steps, optimizer.ema_decay) == (0.03, 5000, 0.9999)
    assert (config.hierarchy.cond_drop, config.evaluate.num_samples) == (0.1, 30_000)
    levels = build_levels(config)
    assert [level.shape for level in levels] == [(1, 1, 256), (2, 2, 128)][: depth - 1] + [(32, 32, 4)]
    assert levels[-1].cond_sigmas == (0.5,) * (depth - 1) and levels[-1].conditions == ("z1x1", "z2x2")[: depth - 1]
    for level in levels:
        assert (level.guidance, level.backbone.text_tokens, level.backbone.text_dim) == (1.0, 77, 768)
        assert (level.backbone.width, level.backbone.depth, level.num_classes) == (768, 12, 0)


@pytest.mark.parametrize("word, encoder", [("clip", "clip"), ("mae", "mae"), ("mocov3", "mocov3"), ("dino", "dino")])
def test_the_encoder_is_a_word(word, encoder):
    """CVPR Table 5."""
    assert get_config("coco", f"L3,{word}").encoder.name == f"{encoder}_vitb16"


@pytest.mark.parametrize(
    "name, argument, shapes, net, guidance",
    [
        ("coco_iclr", "L5", [(2, 2, 40), (4, 4, 48), (6, 6, 56), (8, 8, 64)], (512, 12), (0.0, 1.0, 1.0, 1.0, 1.0)),
        ("coco_iclr", "L2,text", [(8, 8, 64)], (512, 12), (1.0, 1.0)),
        ("coco_iclr", "L3,vae", [(6, 6, 4), (8, 8, 4)], (512, 12), (0.0, 1.0, 1.0)),
        ("imagenet100", "L4", [(2, 2, 16), (4, 4, 24), (6, 6, 32)], (768, 16), (0.0, 0.4, 0.4, 0.4)),
        ("imagenet100", "L2,class", [(6, 6, 32)], (768, 16), (0.4, 0.4)),
        ("imagenet100", "L1", [], (768, 16), (0.0,)),
        ("imagenet100", "L2,class,imagenet1k", [(6, 6, 32)], (1024, 20), (0.4, 0.4)),
    ],
)
def test_the_draft(name, argument, shapes, net, guidance):
    """ICLR draft Sec. 4.1: shapes, U-ViT-S / M / L, one guidance weight, 50 % drop, injection every two blocks."""
    config = get_config(name, argument)
    levels = build_levels(config)
    assert [level.shape for level in levels] == [*shapes, (32, 32, 4)]
    assert tuple(level.guidance for level in levels) == guidance
    for i, level in enumerate(levels):
        assert (level.backbone.width, level.backbone.depth) == net
        assert level.conditions == tuple(coarser.name for coarser in levels[max(i - 1, 0) : i])
        assert level.cond_drop == (0.5 if level.guidance else 0.0)
        assert (level.backbone.injection, level.backbone.inject_every) == ("deconv_concat", 2)
        kind = "codec" if "vae" in argument else "map"
        assert level.name == "x" or config.levels[i].source == f"{kind}{level.shape[0]}"


def test_the_draft_of_imagenet_1k_has_two_levels():
    refused(imagenet100.get_config, "L3,imagenet1k", match="config argument 'L3' with imagenet1k: the draft trained L1")


def test_the_depth_one_net_of_the_draft():
    """Table 1b, L = 1: 130.7 M parameters; 71.60 GFlops, which is near twice the multiply-accumulates (U-ViT-M)."""
    (level,) = summary.summarize_levels(build_levels(get_config("imagenet100", "L1")))
    assert level.parameters == pytest.approx(130.7e6, rel=0.006)
    assert 2 * level.macs == pytest.approx(71.60e9, rel=0.025)


# --- one step of every kind ------------------------------------------------------------------------------------------

SHRUNK = [("coco_iclr", "L3,text"), ("rcg", "dit")]
SLOW = [
    ("coco", "L3"), ("coco_iclr", "L5,vae"), ("imagenet", "L5,class"), ("imagenet100", "L4,class"),
    ("imagenet100", "L2,class,imagenet1k"), ("rcg", "rdm"), ("fashion_mnist", "L3,iclr,codec"), ("emoji64", "L3,text"),
]  # fmt: skip
SHRUNK += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize("name, argument", SHRUNK)
def test_a_step_of_every_kind(name, argument, tmp_path):
    """The shapes are those of the config; widths, depths and text are small."""
    config = get_config(name, argument)
    for level in config.levels:
        level.backbone.update(depth=2, width=32)
        if "num_heads" in level.backbone:
            level.backbone.num_heads = 2
    check_two_steps(on_random_data(config), tmp_path)
