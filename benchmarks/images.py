"""Rate of decoding images: JPEGs of 500 x 375 pixels to centre crops of 256, in one process and through the loader.

    python -m benchmarks.images [--images=256] [--workers=0,1,2] [--out=FILE]
    python -m benchmarks.images --index=1281167 [--out=FILE]

The JPEGs are made here, of gradients and noise, at quality 90: some 110 kB each, as ImageNet's are. `alone`: one thread
decodes and crops them (transforms.decode_image, center_crop); the rate per CPU second depends least on other work on
the machine. `decoding_share`: of that time, the rest is the crop. `loader_by_workers`: batches of 32 from a folder of
them by loader.batches with that many worker processes (0: this process reads, with two threads), after their start and
the first batches, which are not counted; and what an image costs the process that is fed, in CPU milliseconds.

--index times opening ImageNet's tar of that many images in 1,000 classes instead: `walk_seconds`, where its index has
to be made, and `again_seconds`, where it is kept. The headers are real, the images holes of INDEXED bytes in a sparse
file of the folder for temporary files, where 1,281,167 of them take 5 GB; writing and removing it, minutes.
"""

import itertools
import os
import pathlib
import tarfile
import tempfile
import time

import numpy as np
from absl import app, flags
from PIL import Image

from benchmarks.report import report
from input_pipeline import image_files, imagenet, loader, tars, transforms

FLAGS = flags.FLAGS
flags.DEFINE_integer("images", 256, "different JPEGs")
flags.DEFINE_list("workers", ["0", "1", "2"], "numbers of the loader's worker processes")
flags.DEFINE_integer("batches", 24, "of 32 images, that are timed with the loader")
flags.DEFINE_integer("index", 0, "measure the index of a tar of so many images, and nothing else")
flags.DEFINE_string("out", "", "the figures as JSON")

WIDTH, HEIGHT, SIZE, QUALITY, NOISE, BATCH, THREADS = 500, 375, 256, 90, 32, 32, 2
CLASSES, INDEXED = 1000, 110_080  # bytes of an image, whole blocks


def write_jpegs(folder: pathlib.Path, number: int) -> float:
    """Writes the JPEGs; their mean size in bytes."""
    rows, columns = np.mgrid[0 : 1 : HEIGHT * 1j, 0 : 1 : WIDTH * 1j]
    for i in range(number):
        generator = np.random.default_rng(i)
        slopes, offsets = generator.normal(size=(2, 3)), generator.uniform(60, 200, 3)
        gradients = 80 * (rows[..., None] * slopes[0] + columns[..., None] * slopes[1]) + offsets
        noise = generator.normal(scale=NOISE, size=(HEIGHT, WIDTH, 1)) + generator.normal(size=(HEIGHT, WIDTH, 3))
        pixels = np.clip(gradients + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05}.jpg", "JPEG", quality=QUALITY)
    return float(np.mean([path.stat().st_size for path in folder.iterdir()]))


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def alone(folder: pathlib.Path) -> dict:
    """Images per second of one thread, and decoding's share of the time."""
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    transforms.center_crop(transforms.decode_image(files[0]), SIZE)
    begin, cpu, decoding = time.perf_counter(), time.process_time(), 0.0
    for data in files:
        start = time.perf_counter()
        image = transforms.decode_image(data)
        decoding += time.perf_counter() - start
        transforms.center_crop(image, SIZE)
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    rates = {"images_per_second": rounded(len(files) / took), "images_per_cpu_second": rounded(len(files) / cpu)}
    return rates | {"decoding_share": rounded(decoding / took)}


def through_loader(source, workers: int, number: int) -> dict:
    """Images per second of loader.batches, once it runs, and what one image costs this process, in CPU milliseconds."""
    batches = loader.batches(source, seed=0, batch_size=BATCH, threads=THREADS, workers=workers)
    warm = 4 * THREADS * max(workers, 1)  # as many as may lie ready
    for _ in itertools.islice(batches, warm):
        pass
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(batches, number):
        pass
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    batches.close()
    images = number * BATCH
    return {"images_per_second": rounded(images / took), "own_cpu_ms_per_image": rounded(1000 * cpu / images)}


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def write_headers(path: pathlib.Path, number: int) -> None:
    """ILSVRC2012_img_train.tar of `number` images that are holes in the file."""
    counts = [len(part) for part in np.array_split(np.arange(number), CLASSES)]
    with open(path, "wb") as file:
        for label, count in enumerate(counts):
            wnid = f"n{label:08}"
            file.write(header(f"{wnid}.tar", count * (tars.BLOCK + INDEXED) + 2 * tars.BLOCK))
            for image in range(count):
                file.write(header(f"{wnid}_{image}.JPEG", INDEXED))
                file.seek(INDEXED, os.SEEK_CUR)
            file.seek(2 * tars.BLOCK, os.SEEK_CUR)
        file.truncate(file.tell() + 2 * tars.BLOCK)


def opening(number: int) -> dict:
    """Seconds to open a tar of `number` images, without and with its index."""
    with tempfile.TemporaryDirectory() as folder:
        write_headers(pathlib.Path(folder) / imagenet.TARS["train"], number)
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            source = imagenet.ImageNetTar(folder, split="train", index_dir=folder).open()
            seconds.append(rounded(time.perf_counter() - begin))
        (index,) = pathlib.Path(folder).glob("*.npz")
        size = index.stat().st_size
    return {"images": len(source), "walk_seconds": seconds[0], "again_seconds": seconds[1], "index_bytes": size}


def main(argv):
    del argv
    if FLAGS.index:
        report({"command": f"python -m benchmarks.images --index={FLAGS.index}", **opening(FLAGS.index)}, FLAGS.out)
        return
    workers = [int(count) for count in FLAGS.workers]
    figures = {"command": f"python -m benchmarks.images --images={FLAGS.images} --workers={','.join(FLAGS.workers)}"}
    figures["load_average_before"] = rounded(os.getloadavg()[0])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        figures["bytes_per_image"] = round(write_jpegs(folder, FLAGS.images))
        figures["alone"] = alone(folder)
        source = transforms.resized(image_files.ImageFolder(folder).open(), SIZE, "center", 3)
        figures["loader_by_workers"] = {str(count): through_loader(source, count, FLAGS.batches) for count in workers}
    figures["cpu_cores"] = os.cpu_count()
    report(figures, FLAGS.out)


if __name__ == "__main__":
    app.run(main)
