"""Rate of encoding as a share of the encoder network's own, and the rates of its parts.

    python -m benchmarks.encode [--images=4096] [--rounds=4] [--parts=False] [--out=FILE]

whole: nested/latents/passes.py on random images of 64 x 64 in memory (EfficientNet-Lite0's map at 64 px, patch_pca),
both passes, SVD and writing included, against the network alone on a batch that lies on the device. 'small data': all
raw features fit into memory between the passes, so that the network sees an image once. 'large data': none does, and
the basis is fitted to one of eight shards, so that the share cannot exceed 8/9. The share must be .70 or more. What is
compared runs in turn, `rounds` times, and the median of the rounds' shares counts, since other work on the machine
comes and goes; the share in CPU seconds of all threads depends less on it.

parts: the streamed SVD (float32 Gram matrices, float64 sums) against numpy's of the same centred matrix, and whether
their leading subspaces agree; the network at 64 and 128 px; latent records read back in random order.
"""

import dataclasses
import json
import os
import resource
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.report import report
from input_pipeline import latent_records as records
from nested.encoders import efficientnet
from nested.latents import passes
from nested.latents.job import EncodingOptions, plan_job
from nested.spaces.patch_pca import PatchPCA
from nested.spaces.svd import CovarianceStream, fit_basis

FLAGS = flags.FLAGS
flags.DEFINE_integer("images", 4096, "images that are encoded")
flags.DEFINE_integer("rounds", 4, "repetitions of what is compared")
flags.DEFINE_bool("parts", True, "the rates of the parts as well")
flags.DEFINE_string("out", "", "the figures as JSON")

SIDE, BATCH = 64, 64
TOKENS, CHANNELS, SVD_BATCH, COMPONENTS = 36, 768, 256, 32  # the 6x6x768 pooled maps of a ViT-B/16


class Images:
    """Blocks of random colours."""

    num_classes, fingerprint = 10, "random"

    def __init__(self, count):
        blocks = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
        self.images = blocks.repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": i % self.num_classes}

    def check(self):
        pass


def rounded(value):
    return float(f"{value:.4g}")


def cost(call):
    """(wall seconds, CPU seconds of all threads) of one call."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds(call, repeats=3):
    """Best wall time of `repeats` calls."""
    return min(cost(call)[0] for _ in range(repeats))


def whole(count, rounds):
    """Rates of the network and of encoding, and the shares."""
    source = Images(count)
    network = efficientnet.load_efficientnet("", input_size=SIDE, map="stage4", features=("map",))
    codec, cache = PatchPCA(4, 16), passes.FEATURE_CACHE_BYTES
    config = EncodingOptions(fit_images=0, batch_size=BATCH, shard_images=count)
    batch = jax.device_put(source.images[:BATCH])

    def alone():
        for _ in range(count // BATCH):
            last = network.features(batch)
        jax.block_until_ready(last)

    def encoded(config, cache_bytes):
        passes.FEATURE_CACHE_BYTES = cache_bytes
        with tempfile.TemporaryDirectory() as folder:
            passes.encode(plan_job(source, network, config, codec, folder))

    in_shards = dataclasses.replace(config, fit_images=count // 8, shard_images=count // 8)
    runs = {
        "network": alone,
        "small data": lambda: encoded(config, cache),
        "large data": lambda: encoded(in_shards, 0),
    }
    runs["small data"]()  # compiles
    costs = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            costs[name].append(cost(call))
    walls, cpus = ({name: np.array(of)[:, column] for name, of in costs.items()} for column in (0, 1))

    def shares(spent):
        return {
            name: round(float(np.median(spent["network"] / of)), 3) for name, of in spent.items() if name != "network"
        }

    rates = {name: [rounded(count / wall) for wall in of] for name, of in walls.items()}
    figures = {"images": count, "images_per_second_by_round": rates}
    return figures | {"share_of_network": shares(walls), "share_of_network_in_cpu_seconds": shares(cpus)}


def svd():
    """Images per second, and the sine of the largest angle between the two leading subspaces."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(CHANNELS, CHANNELS)).astype(np.float32) * 0.98 ** np.arange(CHANNELS, dtype=np.float32)
    x = rng.normal(size=(SVD_BATCH, 6, 6, CHANNELS)).astype(np.float32) @ mixing.T + np.float32(3.0)
    batch = jnp.asarray(x)
    rows = x.reshape(-1, CHANNELS)
    centred = rows - rows.mean(0)
    right = np.linalg.svd(centred.astype(np.float64), full_matrices=False)[2][:COMPONENTS].T
    full = seconds(lambda: np.linalg.svd(centred, full_matrices=False), repeats=1)

    stream = CovarianceStream()
    stream.add(batch, SVD_BATCH)  # compiles

    def add():
        stream.add(batch, SVD_BATCH)
        stream.result()

    streamed = seconds(add)
    (vectors,) = fit_basis(stream.result(), COMPONENTS).vectors
    outside = right - vectors @ (vectors.T @ right)
    return {
        "full_images_per_second": rounded(SVD_BATCH / full),
        "streamed_images_per_second": rounded(SVD_BATCH / streamed),
        "ratio": rounded(full / streamed),
        "eigh_seconds": rounded(seconds(lambda: fit_basis(stream.result(), COMPONENTS))),
        "subspace_error": rounded(np.linalg.norm(outside, 2)),
    }


def network():
    """Images per second of EfficientNet-Lite0's map and vector, by input size."""
    rates = {}
    for size in (64, 128):
        net = efficientnet.load_efficientnet("", input_size=size, map="stage4", features=("crops1", "map"))
        images = np.zeros((32, size, size, 3), np.uint8)
        jax.block_until_ready(net.features(images))
        took = seconds(lambda net=net, images=images: jax.block_until_ready(net.features(images)), repeats=5)
        rates[f"{size} px"] = rounded(len(images) / took)
    return rates


def latent_records():
    """Records per second in random order, of 32x32x4 float16 latents (8 kB), one thread."""
    count, shape = 4096, (32, 32, 4)
    field = records.Field("z", "float16", shape)
    data = records.pack({"z": np.zeros(shape)}, (field,))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/latents.array_record"
        records.write_shard(path, [data] * count)
        index = {"fingerprint": "", "num_classes": 0, "image_shape": [], "fields": [field.to_json()]}
        index["shards"] = [{"file": "latents.array_record", "records": count, "bytes": os.path.getsize(path)}]
        with open(f"{folder}/{records.INDEX_FILE}", "w") as file:
            json.dump(index, file)
        source, order = records.LatentRecords(folder), np.random.default_rng(0).permutation(count)
        took = seconds(lambda: [source[int(i)] for i in order])
    return rounded(count / took)


def main(argv):
    del argv
    figures = {"command": f"python -m benchmarks.encode --images={FLAGS.images} --rounds={FLAGS.rounds}"}
    figures["whole"] = whole(FLAGS.images, FLAGS.rounds)
    figures["load_average"] = rounded(os.getloadavg()[0])
    if FLAGS.parts:
        figures["svd"] = svd()
        figures["efficientnet_lite0_images_per_second"] = network()
        figures["latent_records_per_second"] = latent_records()
    report(figures, FLAGS.out)


if __name__ == "__main__":
    app.run(main)
