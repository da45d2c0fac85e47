"""Images per second of the frozen networks that data are encoded with, and their share of the machine's matmul rate.

    python -m benchmarks.encoders [--names=mocov3_vitb16,sd_vae_encoder] [--batch=64] [--dtypes=float32,bfloat16]
        [--rounds=3] [--out=FILE]

names: those of nested/encoders/vit.py, and sd_vae_encoder and sd_vae_decoder, Stable Diffusion's f8 autoencoder.
Weights are random: the time does not depend on them. A ViT takes uint8 images of 256 pixels, resizes them to 224 and
gives its class token and map; the autoencoder goes from 256 pixels to moments, and from latents back.
Multiply-accumulates are counted as in `--mode=summary`, the resizing not among them. The share is of
benchmarks/matmul.py's rate in the same type: JAX's default for float32, TF32 on NVIDIA GPUs, while these networks'
float32 is exact; for bfloat16 products with bfloat16 results, which XLA makes at an eighth of the rate of those with
float32 results on a CPU with AMX, so that a ViT's share is above 1 there.
"""

import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.matmul import matmul_rate
from benchmarks.report import report
from nested.encoders import vit, vit_files
from nested.modes import summary
from nested.spaces import autoencoder_kl

FLAGS = flags.FLAGS
AUTOENCODER = {"sd_vae_encoder": autoencoder_kl.moments, "sd_vae_decoder": autoencoder_kl.decode}
flags.DEFINE_list("names", [*vit.VARIANTS, *AUTOENCODER], "what is timed")
flags.DEFINE_integer("batch", 64, "images at a time")
flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of the products")
flags.DEFINE_integer("rounds", 3, "timed batches, of which the median counts")
flags.DEFINE_string("out", "", "the figures as JSON")

IMAGE, INPUT = 256, 224
F8 = autoencoder_kl.Layout((128, 256, 512, 512), 2, 4, 3, ("quant_conv", "post_quant_conv"))


def random_tensors(shapes):
    """{name: float32 array} of those shapes: small numbers, repeated."""
    numbers = np.random.default_rng(0).normal(size=1 << 16).astype(np.float32) * 0.02
    return {name: np.resize(numbers, shape) for name, shape in shapes.items()}


def of_vit(name, dtype, batch):
    """(call of one batch, multiply-accumulates of one image)."""
    network, outputs = vit.VARIANTS[name], ("cls", vit.MAP)
    layout = vit_files.FAMILIES[network.family].layouts[0]
    tensors = random_tensors(vit_files.shapes(network, layout, False))
    params = vit_files.params(tensors, network, layout, False, dtype)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, IMAGE, IMAGE, 3), np.uint8))
    one = jax.ShapeDtypeStruct((1, INPUT, INPUT, 3), np.float32)
    macs = summary.count_macs(lambda params, x: vit.forward(params, x, network, outputs), params, one)
    return lambda: vit.forward(params, vit.prepare(images, network, INPUT), network, outputs), macs


def of_autoencoder(name, dtype, batch):
    """The same of Stable Diffusion's."""
    function, side = AUTOENCODER[name], IMAGE // F8.patch
    shape = (side, side, F8.channels) if name == "sd_vae_decoder" else (IMAGE, IMAGE, F8.image_channels)
    network = autoencoder_kl.Network(random_tensors(F8.shapes()), F8, ())
    params = network.decoder if name == "sd_vae_decoder" else network.encoder
    params = {key: jnp.asarray(array, dtype) for key, array in params.items()}
    x = jax.random.normal(jax.random.key(0), (batch, *shape), dtype)
    macs = summary.count_macs(function, params, jax.ShapeDtypeStruct((1, *shape), x.dtype))
    return lambda: function(params, x), macs


def measure(name, dtype, batch, rounds, rate):
    """The figures of one network. rate: the machine's, GFLOP/s in that dtype."""
    call, macs = (of_autoencoder if name in AUTOENCODER else of_vit)(name, dtype, batch)
    times = []
    for _ in range(rounds + 1):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    figures = {
        "images_per_second": float(f"{batch / seconds:.4g}"),
        "by_round": [float(f"{batch / took:.4g}") for took in times[1:]],
        "gmacs_per_image": round(macs / 1e9, 2),
        "first_call_seconds": round(times[0], 2),
        "gflops_per_second": round(2e-9 * macs * batch / seconds, 1),
        "share_of_matmul_rate": round(2e-9 * macs * batch / seconds / rate, 3),
    }
    print(name, dtype, figures, flush=True)
    return figures


def main(argv):
    del argv
    networks = (*vit.VARIANTS, *AUTOENCODER)
    for name in FLAGS.names:
        if name not in networks:
            raise ValueError(f"--names: {name!r} given; choose from {', '.join(networks)}")
    figures = {"command": f"python -m benchmarks.encoders --names={','.join(FLAGS.names)} --batch={FLAGS.batch}"}
    figures["load_average_before"] = round(os.getloadavg()[0], 2)
    rates = {dtype: matmul_rate(jnp.dtype(dtype)) for dtype in FLAGS.dtypes}
    figures["matmul_gflops_per_second"] = {dtype: round(rate, 1) for dtype, rate in rates.items()}
    figures["networks"] = {
        name: {dtype: measure(name, dtype, FLAGS.batch, FLAGS.rounds, rate) for dtype, rate in rates.items()}
        for name in FLAGS.names
    }
    report(figures, FLAGS.out)


if __name__ == "__main__":
    app.run(main)
