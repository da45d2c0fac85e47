"""Rates of encoding's parts: streamed SVD against a full SVD, encoder, latent records read back.

    python -m benchmarks.encoding                 about a minute on 2 cores; prints one JSON line per figure

The streamed basis (float32 Gram matrices, float64 sums, subtracted mean: nested/encoders/compress.py) must be at least
20 times as fast per image as numpy's SVD of the same centred matrix, and its leading subspace must agree; records must
come at 10,000/s or more from one core.
"""

import json
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import latents as records
from nested.encoders import compress, efficientnet

TOKENS, CHANNELS, BATCH, COMPONENTS = 36, 768, 256, 32  # the 6x6x768 pooled maps of a ViT-B/16


def report(name, **figures):
    print(json.dumps({"benchmark": name, **{key: float(f"{value:.4g}") for key, value in figures.items()}}), flush=True)


def seconds(call, repeats=3):
    """Best wall time of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def svd():
    """Images per second, and the sine of the largest angle between the two leading subspaces."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(CHANNELS, CHANNELS)).astype(np.float32) * 0.98 ** np.arange(CHANNELS, dtype=np.float32)
    x = rng.normal(size=(BATCH, 6, 6, CHANNELS)).astype(np.float32) @ mixing.T + np.float32(3.0)
    batch = jnp.asarray(x)
    rows = x.reshape(-1, CHANNELS)
    centred = rows - rows.mean(0)
    right = np.linalg.svd(centred.astype(np.float64), full_matrices=False)[2][:COMPONENTS].T
    full = seconds(lambda: np.linalg.svd(centred, full_matrices=False), repeats=1)

    stream = compress.CovarianceStream()
    stream.add(batch, BATCH)  # compiles
    streamed = seconds(lambda: stream.add(batch, BATCH))
    basis = compress.fit_basis(stream.result(), COMPONENTS)
    outside = right - basis.vectors @ (basis.vectors.T @ right)
    report(
        "svd",
        full_images_per_second=BATCH / full,
        streamed_images_per_second=BATCH / streamed,
        ratio=full / streamed,
        eigh_seconds=seconds(lambda: compress.fit_basis(stream.result(), COMPONENTS)),
        subspace_error=float(np.linalg.norm(outside, 2)),
    )


def encoder():
    """Images per second of EfficientNet-Lite0's map and vector."""
    for size in (64, 128):
        net = efficientnet.load("", input_size=size, map="stage4", vector="pool", features=("crops1", "map"))
        images = np.zeros((32, size, size, 3), np.uint8)
        jax.block_until_ready(net.features(images))
        took = seconds(lambda net=net, images=images: jax.block_until_ready(net.features(images)), repeats=5)
        report(f"efficientnet_lite0_{size}px", images_per_second=len(images) / took)


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
    report("latent_records", records_per_second=count / took)


if __name__ == "__main__":
    svd()
    encoder()
    latent_records()
