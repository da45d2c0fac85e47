"""The matmul benchmark: its arithmetic against a clock that is known, and once for real, small."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import matmul


def test_the_rate_is_the_best_sizes_median(monkeypatch):
    """A pretended machine: a product takes 1 ms at size 8, 2 ms at 16, 300 ms at 32; two rounds in five ten fold."""
    cost, timed = {8: 1e-3, 16: 2e-3, 32: 0.3, 64: 0.0}, []

    def pretended(product, pair, number):
        size = pair.shape[-1]
        timed.append((size, number))
        slow = 10 if sum(seen == size for seen, _ in timed) in (3, 5) else 1
        return cost[size] * number * slow

    monkeypatch.setattr(matmul, "_seconds", pretended)
    rate = matmul.matmul_rate(jnp.float32, sizes=(8, 16, 32, 64), rounds=5)
    assert rate == pytest.approx(2 * 16**3 / 2e-3 / 1e9)
    assert timed[:6] == [(8, 1), (16, 1), (32, 1), (8, 100), (16, 50), (32, 1)]  # 64 is not tried; rounds interleave


def test_a_rate_is_measured_and_printed(monkeypatch, capsys):
    assert 0 < matmul.matmul_rate(jnp.float32, sizes=(64,), rounds=2, seconds=1e-3) < 1e6
    monkeypatch.setattr(matmul, "matmul_rate", lambda dtype: {"float32": 12.34, "bfloat16": 5.0}[jnp.dtype(dtype).name])
    matmul.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["matmul_gflops"] == {"float32": 12.3, "bfloat16": 5.0}
    assert printed["device"] and printed["cpus"] >= 1
