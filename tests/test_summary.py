"""nested/summary.py: Table 6 of Nested Diffusion (appendix A.1) from the shipped configs, by shapes alone."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet
from nested import build, summary, train

TABLE_6 = {  # depth: (million parameters, GMACs)
    "L1": (104, 26.82),
    "L2": (208, 27.13),
    "L3": (313, 28.17),
    "L4": (417, 29.61),
    "L5": (523, 33.98),
    "L1_wide": (135, 35.11),
}


@pytest.mark.parametrize("depth", TABLE_6)
def test_table_6(depth):
    parameters, gmacs = TABLE_6[depth]
    rows = summary.levels(build.levels(imagenet.get_config(depth)))
    assert sum(row.parameters for row in rows) / 1e6 == pytest.approx(parameters, rel=0.005)
    assert sum(row.macs for row in rows) / 1e9 == pytest.approx(gmacs, rel=0.001)


def test_table_6_tokens_and_levels_of_the_deepest():
    rows = summary.levels(build.levels(imagenet.get_config("L5")))
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
    text = summary.summary(build.levels(config), train.abstract_state(config), str(out))
    content = json.loads(out.read_text())
    assert [level["name"] for level in content["levels"]] == ["z1x1", "x"]
    assert content["levels"][1]["shape"] == [32, 32, 4] and content["levels"][1]["tokens"] == 256
    assert content["total"]["parameters"] == sum(level["parameters"] for level in content["levels"])
    assert content["state_bytes"] == pytest.approx(16 * content["total"]["parameters"], rel=1e-6)  # p, ema, m, v
    assert f"{content['total']['parameters']:,}" in text
