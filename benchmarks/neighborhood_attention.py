"""What neighborhood attention costs: the blocked form beside a gather of every window and the masked dense form.

    python -m benchmarks.neighborhood_attention [--sides=32,64,128,256] [--batch=1] [--rounds=7] [--out=FILE]

Forms: 'blocked' and 'reference' (masked dense) of nested/ops/neighborhood_attention.py; 'gather', which copies the keys
and values of each query's window; 'flex', PyTorch's compiled flex_attention, where torch with CUDA is installed. A form
with more than --max_gb of temporaries is left out. The forms of one grid are timed in interleaved rounds of about a
tenth of a second each: medians over rounds, with the smallest and largest. GFLOP/s count the products of the windows
alone: 4 x kernel^2 x head width per query and head forward, three times that forward and backward.
Temporaries are XLA's count. On CPU they are those of a second compilation without XLA's YNN fusions: what such a fusion
allocates is not counted (masked dense forward at 64 x 64: counted 19 MB, the process grew by 880).
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import matmul
from benchmarks.report import report
from nested.ops.neighborhood_attention import neighborhood_attention, window_starts

FLAGS = flags.FLAGS
flags.DEFINE_list("sides", ["32", "64", "128", "256"], "grids are side x side tokens")
flags.DEFINE_integer("batch", 1, "images")
flags.DEFINE_integer("heads", 6, "heads")
flags.DEFINE_integer("head_width", 64, "channels of a head")
flags.DEFINE_integer("kernel", 7, "keys per axis")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of q, k and v")
flags.DEFINE_integer("rounds", 7, "timed rounds")
flags.DEFINE_float("max_gb", 4, "a form with more temporaries than this is left out")
flags.DEFINE_string("out", "", "the figures as JSON")


def gather_attention(q_BHWND, k_BHWND, v_BHWND, kernel, scale):
    """The plain form: the kernel^2 keys and values of every query, copied, then a softmax over them."""
    B, H, W, N, D = q_BHWND.shape
    rows_HK, columns_WK = (window_starts(np.arange(size), size, kernel)[:, None] + np.arange(kernel) for size in (H, W))
    index_LM = (rows_HK[:, None, :, None] * W + columns_WK[None, :, None, :]).reshape(H * W, kernel * kernel)
    q_BLND, k_BLND, v_BLND = (x.reshape(B, H * W, N, D) for x in (q_BHWND, k_BHWND, v_BHWND))
    logits_BLNM = jnp.einsum("BLND,BLMND->BLNM", q_BLND, k_BLND[:, index_LM], preferred_element_type=jnp.float32)
    weights_BLNM = jax.nn.softmax(scale * logits_BLNM, axis=-1).astype(v_BLND.dtype)
    return jnp.einsum("BLNM,BLMND->BLND", weights_BLNM, v_BLND[:, index_LM]).reshape(q_BHWND.shape)


def jax_forms(kernel):
    """Name -> (q, k, v) -> out."""

    def ours(implementation):
        return lambda q, k, v: neighborhood_attention(q, k, v, kernel, 1.0, implementation)

    return {
        "blocked": ours("blocked"),
        "gather": lambda q, k, v: gather_attention(q, k, v, kernel, 1.0),
        "reference": ours("reference"),
    }


def least_bytes(name, shape, kernel):
    """A lower bound of a form's temporaries, so that what cannot fit is not even compiled."""
    B, H, W, N, D = shape
    return {"blocked": 0, "gather": 4 * B * H * W * N * kernel**2 * D, "reference": 4 * B * N * (H * W) ** 2}[name]


def with_gradients(attend):
    def run(q, k, v, cotangent):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(cotangent)

    return run


def temporary_bytes(lowered):
    """XLA's count of a lowered function's temporaries, all of them (see above)."""
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else None
    return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes


def compiled_forms(shape, kernel, dtype, backward, max_bytes):
    """-> (name -> a call that waits for its result, name -> megabytes of temporaries)."""
    inputs = [jax.random.normal(jax.random.key(i), shape, dtype) for i in range(4 if backward else 3)]
    calls, megabytes = {}, {}
    for name, attend in jax_forms(kernel).items():
        if least_bytes(name, shape, kernel) > max_bytes:
            continue
        lowered = jax.jit(with_gradients(attend) if backward else attend).lower(*inputs)
        temporaries = temporary_bytes(lowered)
        if temporaries <= max_bytes:
            compiled = lowered.compile()
            calls[name] = lambda compiled=compiled: jax.block_until_ready(compiled(*inputs))
            megabytes[name] = round(temporaries / 1e6, 1)
    return calls, megabytes


def flex_form(shape, kernel, dtype, backward):
    """PyTorch's flex_attention on the same GPU, its tokens already in the order of 8 x 16 tiles (its blocks of 128).

    {} where torch or CUDA is missing or the tiles do not divide the grid.
    """
    B, H, W, N, D = shape
    try:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return {}
    if not torch.cuda.is_available() or H % 8 or W % 16:
        return {}

    def position(token):
        tile, inside = token // 128, token % 128
        return tile // (W // 16) * 8 + inside // 16, tile % (W // 16) * 16 + inside % 16

    def in_window(batch, head, query, key):
        (query_row, query_column), (key_row, key_column) = position(query), position(key)
        row = (query_row - kernel // 2).clamp(0, H - kernel)
        column = (query_column - kernel // 2).clamp(0, W - kernel)
        rows_fit = (row <= key_row) & (key_row < row + kernel)
        return rows_fit & (column <= key_column) & (key_column < column + kernel)

    mask = create_block_mask(in_window, None, None, H * W, H * W, device="cuda", _compile=True)
    attend = torch.compile(flex_attention)
    dtype = getattr(torch, dtype)
    q, k, v, cotangent = (torch.randn(B, N, H * W, D, device="cuda", dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(backward)

    def call():
        out = attend(q, k, v, block_mask=mask, scale=1.0)
        if backward:
            torch.autograd.grad(out, (q, k, v), cotangent)
        torch.cuda.synchronize()

    return {"flex": call}


def rounds_of(calls, rounds, seconds=0.1):
    """Name -> milliseconds of one call in each round; the rounds of the forms interleave."""
    numbers = {}
    for name, call in calls.items():
        call()
        numbers[name] = max(1, round(seconds / _seconds(call, 1)))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_seconds(call, numbers[name]) / numbers[name] * 1e3)
    return times


def _seconds(call, number):
    start = time.perf_counter()
    for _ in range(number):
        call()
    return time.perf_counter() - start


def measure(shape, kernel, dtype, backward, rounds, max_bytes):
    """The figures of one grid in one direction, a dict of plain numbers."""
    B, H, W, N, D = shape
    calls, megabytes = compiled_forms(shape, kernel, dtype, backward, max_bytes)
    times = rounds_of(calls | flex_form(shape, kernel, dtype, backward), rounds)
    flops = 4 * kernel**2 * D * B * H * W * N * (3 if backward else 1)
    figures = {}
    for name, values in times.items():
        median = statistics.median(values)
        figures[name] = {
            "milliseconds": round(median, 3),
            "smallest_largest": [round(min(values), 3), round(max(values), 3)],
            "microseconds_per_token": round(1e3 * median / (B * H * W), 4),
            "window_gflops_per_second": round(flops / median / 1e6, 1),
            "times_blocked": round(median / statistics.median(times["blocked"]), 2),
        }
        if name in megabytes:
            figures[name]["temporaries_mb"] = megabytes[name]
    return figures


def main(argv):
    del argv
    grids = {}
    for side in map(int, FLAGS.sides):
        shape = (FLAGS.batch, side, side, FLAGS.heads, FLAGS.head_width)
        grids[f"{side}x{side}"] = {
            direction: measure(shape, FLAGS.kernel, FLAGS.dtype, backward, FLAGS.rounds, FLAGS.max_gb * 1e9)
            for direction, backward in (("forward", False), ("forward_backward", True))
        }
    first, last = (f"{side}x{side}" for side in (FLAGS.sides[0], FLAGS.sides[-1]))
    growth = {
        direction: round(last_figures["blocked"]["microseconds_per_token"]
                         / grids[first][direction]["blocked"]["microseconds_per_token"], 2)
        for direction, last_figures in grids[last].items()
    }  # fmt: skip
    report(
        {
            "command": "python -m benchmarks.neighborhood_attention " + " ".join(sys.argv[1:]),
            "batch": FLAGS.batch,
            "heads": FLAGS.heads,
            "head_width": FLAGS.head_width,
            "kernel": FLAGS.kernel,
            "dtype": FLAGS.dtype,
            "matmul_gflops_per_second": round(matmul.matmul_rate(FLAGS.dtype), 1),
            "grids": grids,
            f"time_per_token_{last}_over_{first}": growth,
        },
        FLAGS.out,
    )


if __name__ == "__main__":
    app.run(main)
