"""The rate at which this machine multiplies square matrices: the ceiling that other benchmarks are a share of.

    python -m benchmarks.matmul

An n x n product is 2 n^3 operations. Sizes double until one product takes a tenth of a second; every size is timed in
interleaved rounds of about that long; a size's rate is the median over rounds, the machine's is the best size's.
Precision is JAX's default for the type: float32 means TF32 on NVIDIA GPUs.
"""

import json
import os
import statistics
import time

import jax
import jax.numpy as jnp

SIZES = (512, 1024, 2048, 4096, 8192, 16384)


def matmul_rate(dtype, sizes=SIZES, rounds=7, seconds=0.1):
    """Measured GFLOP/s (a float) of `dtype` matrix products on the first device, at the best of `sizes`.

    sizes: ascending; those after the first whose product takes longer than `seconds` are not tried. seconds: the time
    of one round of one size. With the defaults: 2 to 10 seconds in all.
    """
    product = jax.jit(jnp.matmul)
    operands, calls = {}, {}
    for size in sizes:
        operands[size] = jax.random.normal(jax.random.key(size), (2, size, size), dtype)
        product(*operands[size]).block_until_ready()  # compiles
        once = _seconds(product, operands[size], 1)
        calls[size] = max(1, round(seconds / once))
        if once > seconds:
            break
    times = {size: [] for size in calls}
    for _ in range(rounds):
        for size, number in calls.items():
            times[size].append(_seconds(product, operands[size], number) / number)
    return max(2e-9 * size**3 / statistics.median(values) for size, values in times.items())


def _seconds(product, pair, number):
    """Wall time of `number` products in a row."""
    left, right = pair
    start = time.perf_counter()
    for _ in range(number):
        result = product(left, right)
    result.block_until_ready()
    return time.perf_counter() - start


def main():
    rates = {jnp.dtype(dtype).name: round(matmul_rate(dtype), 1) for dtype in (jnp.float32, jnp.bfloat16)}
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "cpus": os.cpu_count(), "matmul_gflops": rates}))


if __name__ == "__main__":
    main()
