"""What the outer levels of a nest cost: a train step of the inner UNet alone and of the nest around it.

    python -m benchmarks.nested_unet --scale=8 --batch=8 [--out=FILE]         CPU: an eighth of the paper's channels
    python -m benchmarks.nested_unet --scale=1 --batch=64 --dtype=bfloat16    the paper's S64 and S64S256, one GPU

Both steps run in one process at one batch size, by turns. Printed for each: seconds per step, multiply-accumulates of
the forward pass, seconds per 10^12 of them, and their ratio: 1 means that the outer levels cost what their
multiply-accumulates say. `blocks` times the forward and backward pass of one ResNet of every resolution of the outer
net, where a ratio has to be explained. Random data, text of 128 tokens, one phase.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import matmul
from benchmarks.report import report
from configs import mdm
from input_pipeline.loader import collate
from nested.build.data import build_data
from nested.models import unet_blocks
from nested.modes import summary, train
from nested.modes.encode import open_latents
from nested.runtime import partition
from nested.training import loop as training_loop

FLAGS = flags.FLAGS
flags.DEFINE_integer("scale", 8, "the paper's channels are divided by this, and resolutions by 4 where it is above 1")
flags.DEFINE_integer("batch", 8, "rows of a step")
flags.DEFINE_integer("steps", 10, "timed steps of each")
flags.DEFINE_string("dtype", "float32", "of matmuls: float32 | bfloat16")
flags.DEFINE_string("out", "", "the figures as JSON")


def scaled(name: str, scale: int):
    """configs/mdm.py's architecture with random data, smaller by `scale`."""
    config = mdm.get_config(f"{name},paper,synthetic")
    config.train.update(batch_size=FLAGS.batch, dtype=FLAGS.dtype)
    config.data.num_examples = FLAGS.batch
    if scale > 1:
        level = config.levels[0]
        shrunk = [(side // 4, side // 4, 3) for side in mdm.SIDES[name]]
        level.shape = tuple(shrunk) if len(shrunk) > 1 else shrunk[0]
        level.backbone.update(time_width=1024 // scale, text_proj=1024 // scale)
        level.backbone.nets = tuple(
            dict(net, channels=tuple(width // scale for width in net["channels"]), groups=min(net["groups"], 8))
            for net in level.backbone.nets
        )
    return config


class Timed:
    """A compiled train step with its state and data."""

    def __init__(self, config):
        source, latents = open_latents(build_data(config), "")
        self.run = train.make_run(config, latents)
        self.raw = partition.to_global(collate([source[i] for i in range(FLAGS.batch)]), self.run.mesh)
        begin = time.perf_counter()
        self.update = training_loop.compile_step(self.run).lower(self.run.abstract, self.raw, self.run.key).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.state, self.seconds = training_loop.fresh_state(self.run), []

    def step(self):
        begin = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.update(self.state, self.raw, self.run.key))
        self.seconds.append(time.perf_counter() - begin)

    def figures(self) -> dict:
        macs = sum(level.macs for level in summary.summarize_levels(self.run.step.levels))
        seconds = statistics.median(self.seconds[1:])
        return {
            "macs_per_image": macs,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.run.abstract.params)),
            "compile_seconds": round(self.compile_seconds, 1),
            "step_seconds": round(seconds, 4),
            "images_per_second": round(FLAGS.batch / seconds, 2),
            "seconds_per_tera_mac": round(seconds / (FLAGS.batch * macs / 1e12), 3),
            "gflops_per_second": round(6 * macs * FLAGS.batch / seconds / 1e9, 1),
        }


def block_seconds(width: int, side: int, groups: int, dtype) -> dict:
    """One ResNet forward and backward: seconds per 10^12 multiply-accumulates of its two convolutions."""
    options = unet_blocks.Options(
        width=width, groups=groups, attention=0, temporal_attention=0, ffn=False, num_heads=8, temporal=False,
        rotary=False, dropout=0.0, implementation="xla", remat=False, dtype=dtype,
    )  # fmt: skip
    block = unet_blocks.ResNet(options)
    x, temb = jnp.ones((FLAGS.batch, side, side, width), dtype), jnp.ones((FLAGS.batch, 128), jnp.float32)
    params = block.init(jax.random.key(0), x, temb, None)
    loss = jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.square(block.apply(p, x, temb, None))), argnums=(0, 1)))
    jax.block_until_ready(loss(params, x))
    times = []
    for _ in range(FLAGS.steps):
        begin = time.perf_counter()
        jax.block_until_ready(loss(params, x))
        times.append(time.perf_counter() - begin)
    macs = 2 * 9 * width**2 * side**2 * FLAGS.batch
    return {
        "side": side,
        "width": width,
        "seconds": round(statistics.median(times), 4),
        "seconds_per_tera_mac": round(statistics.median(times) / macs * 1e12, 2),
    }


def main(argv):
    del argv
    configs = [scaled(name, FLAGS.scale) for name in ("s64", "s64s256")]
    timed = [Timed(config) for config in configs]
    for _ in range(FLAGS.steps + 1):
        for one in timed:
            one.step()
    inner, nest = (one.figures() for one in timed)
    level, dtype = configs[1].levels[0], jnp.dtype(FLAGS.dtype)
    sides = [level.shape[1][0] // 2**i for i in range(3)]
    outer = level.backbone.nets[1]
    blocks = [
        block_seconds(width, side, outer["groups"], dtype) for width, side in zip(outer["channels"], sides, strict=True)
    ]
    figures = {
        "batch": FLAGS.batch,
        "scale": FLAGS.scale,
        "dtype": FLAGS.dtype,
        "inner": inner,
        "nest": nest,
        "nest_over_inner_per_mac": round(nest["seconds_per_tera_mac"] / inner["seconds_per_tera_mac"], 3),
        "outer_over_inner_per_mac": round(
            (nest["step_seconds"] - inner["step_seconds"])
            / (nest["macs_per_image"] - inner["macs_per_image"])
            / (inner["step_seconds"] / inner["macs_per_image"]),
            3,
        ),
        "blocks_of_the_outer_net": blocks,
        "matmul_gflops_per_second": round(matmul.matmul_rate(FLAGS.dtype), 1),
    }
    report(figures, FLAGS.out)


if __name__ == "__main__":
    app.run(main)
