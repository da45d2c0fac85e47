"""nested/modes/summary.py: Table 6 of Nested Diffusion (appendix A.1) from the shipped configs, by shapes alone."""

import functools
import importlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet
from nested.build.levels import build_levels
from nested.build.training import abstract_state
from nested.models.hdit import HDiT
from nested.modes import summary

TABLE_6 = {  # depth: (million parameters, GMACs)
    "L1": (104, 26.82),
    "L2": (208, 27.13),
    "L3": (313, 28.17),
    "L4": (417, 29.61),
    "L5": (523, 33.98),
    "L1_wide": (135, 35.11),
}


@functools.cache
def table_6_rows(depth):
    return summary.summarize_levels(build_levels(imagenet.get_config(depth)))


@pytest.mark.parametrize(
    "depth", [pytest.param(d, marks=pytest.mark.slow) if d in ("L2", "L3", "L4") else d for d in TABLE_6]
)
def test_table_6(depth):
    parameters, gmacs = TABLE_6[depth]
    rows = table_6_rows(depth)
    assert sum(row.parameters for row in rows) / 1e6 == pytest.approx(parameters, rel=0.005)
    assert sum(row.macs for row in rows) / 1e9 == pytest.approx(gmacs, rel=0.001)


HDIT = {  # row of HDiT's Table 1: (GFLOP printed, GMACs by the authors' counter) at 128, 256 and 512 pixels
    "R1": ((106, 106.458), (657, 657.627), (6341, 6341.228)),
    "R2": ((106, 106.420), (657, 657.476), (6341, 6340.624)),
    "R3": ((106, 106.395), (657, 657.451), (6341, 6340.599)),
    "R4": ((106, 106.395), (657, 657.451), (6341, 6340.599)),
    "A": ((32, 32.169), (114, 114.024), (1060, 1059.909)),
    "B1": ((29, 29.149), (60, 60.269), (185, 184.742)),
    "B2": ((29, 29.102), (60, 60.033), (184, 183.751)),
    "C": ((31, 31.369), (65, 64.716), (198, 198.097)),
    "D": ((31, 31.369), (65, 64.716), (198, 198.097)),
    "E": ((31, 31.369), (65, 64.716), (198, 198.097)),
}
PARAMETERS = {  # millions, without positions, at 128, 256 and 512 pixels
    "A": (108.16, 118.77, 129.39), "B1": (108.16, 118.77, 129.39), "B2": (108.16, 118.77, 129.39), "R3": (104.65,),
    "C": (117.00, 128.21, 139.42), "D": (117.00, 128.21, 139.42),
}  # fmt: skip
EXACT = {  # (config, arguments): parameters and multiply-accumulates by the authors' code (k-diffusion at 4601bf08)
    ("hdit", "E"): (117_003_805, 31_369_003_008),
    ("hdit", "E,256"): (128_210_486, 64_716_079_104),
    ("hdit", "E,512"): (139_417_167, 198_097_305_600),
    ("hdit_imagenet256", ""): (557_416_522, 197_586_845_696),
    ("hdit_ffhq1024", ""): (85_079_300, 206_075_854_848),
}


COUNTED = {}  # (network, shape of its variable): its LevelSummary; some rows differ in the loss alone


def only_row(name, arguments):
    (level,) = build_levels(importlib.import_module(f"configs.{name}").get_config(arguments))
    key = (level.backbone, level.shape)
    if key not in COUNTED:
        (COUNTED[key],) = summary.summarize_levels((level,))
    return COUNTED[key]


@pytest.mark.parametrize("place, side", [(0, "128"), (1, "256"), pytest.param(2, "512", marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", HDIT)
def test_table_1_of_hdit(row, place, side):
    printed, counted = HDIT[row][place]
    found = only_row("hdit", f"{row},{side}")
    width = 768 if row[0] == "R" else 384  # of the finest level
    norms = summary.LAYER_NORM_MACS * 25 * found.tokens * width if row in ("R1", "R2") else 0  # the paper has none
    assert (found.macs - norms) / 1e9 == pytest.approx(counted, abs=6e-4)
    assert counted == pytest.approx(printed, abs=0.64)  # 657.63 is printed as 657
    if row in PARAMETERS and place < len(PARAMETERS[row]):
        positions = found.tokens * width if row in ("A", "B1", "B2", "C", "R3") else 0
        assert (found.parameters - positions) / 1e6 == pytest.approx(PARAMETERS[row][place], abs=6e-3)


@pytest.mark.parametrize("name, arguments", EXACT)
def test_hdit_to_the_unit(name, arguments):
    row = only_row(name, arguments)
    assert (row.parameters, row.macs) == EXACT[name, arguments]


def test_neighborhood_attention_counts_its_keys_and_constants_are_no_parameters():
    """Closed form of papers' appendix A, per token of one level: 4 d^2 + 2 k^2 d + 9 d^2, with k^2 = 15 keys."""
    model = HDiT(2, (1,), (16,), ("neighborhood",), ((3, 5),), 8, mapping_depth=0, mapping_width=16)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 12, 14, 1), (1,))]
    params = jax.eval_shape(lambda x, c: model.init(jax.random.key(0), x, c, {}, train=False), *shapes)
    macs = summary.count_macs(lambda p, x, c: model.apply(p, x, c, {}, train=False), params, *shapes)
    patches, mapping = 2 * 42 * 4 * 16, 2 * 16 * 16 + 2 * 16 * 16  # in and out; time, augmentation; two adaptive norms
    assert macs == patches + mapping + 42 * (13 * 16**2 + 2 * 15 * 16)


def test_table_6_tokens_and_levels_of_the_deepest():
    rows = table_6_rows("L5")
    assert [row.tokens for row in rows] == [1, 4, 4, 16, 256]
    expected = (0.204, 0.602, 1.002, 2.603, 29.575)  # the closed form, which also decodes the condition tokens
    np.testing.assert_allclose([row.macs / 1e9 for row in rows], expected, rtol=3e-3)  # one token more adds .1


def test_macs_are_those_of_a_hand_count():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), feature_group_count=2)(x)  # 8 * 8 * 6 * (9 * 4 / 2)
            x = nn.LayerNorm()(x)  # 5 * 8 * 8 * 6
            return nn.Dense(5)(x)  # 8 * 8 * 6 * 5

    x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    params = jax.eval_shape(Net().init, jax.random.key(0), x)
    hand = 64 * 6 * 18 + 5 * 64 * 6 + 64 * 6 * 5
    assert summary.count_macs(Net().apply, params, x) == hand


def test_macs_of_a_scan_count_every_turn_and_remat_counts_once():
    w = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    scanned = lambda w: jax.lax.scan(lambda x, _: (w @ x, None), jnp.ones((4, 2)), length=7)[0]  # noqa: E731
    assert summary.count_macs(scanned, w) == 7 * 4 * 4 * 2
    assert summary.count_macs(jax.checkpoint(lambda w: w @ w), w) == 64


def test_json_holds_what_the_table_shows(tmp_path):
    config = imagenet.get_config("L2")
    out = tmp_path / "summary.json"
    text = summary.write_summary(build_levels(config), abstract_state(config), str(out))
    content = json.loads(out.read_text())
    assert [level["name"] for level in content["levels"]] == ["z1x1", "x"]
    assert content["levels"][1]["shape"] == [32, 32, 4] and content["levels"][1]["tokens"] == 256
    assert content["total"]["parameters"] == sum(level["parameters"] for level in content["levels"])
    assert content["state_bytes"] == pytest.approx(16 * content["total"]["parameters"], rel=1e-6)  # p, ema, m, v
    assert f"{content['total']['parameters']:,}" in text
