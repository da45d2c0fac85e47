"""What encoding a data set costs, measured on its first images before anything is written.

    python main.py --config=configs/imagenet_L5.py --workdir=... --mode=encode --plan [--out=plan.json]

Storage is exact except for the few bytes of the shards' indices. Reading images and running the networks overlap, so
the slower of them decides the time. Their rates are measured on a few batches, assuming that all processes and devices
are equally fast and that the disk keeps up. The images of the SVD's basis pass twice (nested/latents/passes.py).
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import time

import jax
from absl import logging

from nested.latents import passes
from nested.latents.job import Job
from nested.runtime.files import atomic_write

BATCHES = 3  # timed, after one that compiles
DEVICES = 8  # of the second estimate


@dataclasses.dataclass(frozen=True)
class Cost:
    """The costs of a job.

    images: of the data set; fitted: how many of them pass twice; field_bytes: of a record; free_bytes: on the latents'
    disk; processes: of this run; devices: of one process; reading: images/s of one process; encoding: images/s of one
    device, counting an image with its mirror image once if both are stored.
    """

    images: int
    fitted: int
    field_bytes: dict[str, int]
    shards: int
    free_bytes: int
    processes: int
    devices: int
    reading: float
    encoding: float

    @property
    def total_bytes(self) -> int:
        return self.images * sum(self.field_bytes.values())

    def seconds(self, processes: int, devices: int) -> float:
        """The time for all images with this number of processes of `devices` devices each."""
        return (self.images + self.fitted) / (processes * min(self.reading, devices * self.encoding))


def measure_cost(job: Job) -> Cost:
    """Reads and encodes the first batches of a job's data; nothing is written."""
    size = job.options.batch_size
    stop = min(len(job.source), (BATCHES + 1) * size)
    began = time.perf_counter()
    batches = [images for _, images, _ in passes.batches(job, 0, stop)]
    reading = stop / (time.perf_counter() - began)
    jax.block_until_ready(passes.run_networks(job, batches[0]))  # compiled, and warm
    began = time.perf_counter()
    for images in batches[-BATCHES:]:
        jax.block_until_ready(passes.run_networks(job, images))
    rate = len(batches[-BATCHES:]) * size / (time.perf_counter() - began)
    devices = len(jax.local_devices())
    return Cost(
        images=len(job.source),
        fitted=passes.images_seen_twice(job),
        field_bytes={field.name: field.nbytes for field in job.fields},
        shards=job.num_shards,
        free_bytes=shutil.disk_usage(_existing(job.directory)).free,
        processes=job.process_count,
        devices=devices,
        reading=reading,
        encoding=rate / devices,
    )


def _existing(directory: pathlib.Path) -> pathlib.Path:
    """The directory, or the nearest one above it that exists."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def format_cost(job: Job, cost: Cost) -> str:
    """The costs in words."""
    fields = ", ".join(f"{name} {size:,}" for name, size in cost.field_bytes.items())
    short = "" if cost.free_bytes > cost.total_bytes else ": NOT ENOUGH, choose another config.latents_dir"
    twice = f"; {cost.fitted:,} of them pass twice, for the SVD's basis (encoder.fit_images)" if cost.fitted else ""
    first = min(cost.images, (BATCHES + 1) * job.options.batch_size)
    mirrored = ", each with its mirror image" if job.flip else ""
    lines = [
        f"data:    {job.source.describe()}",
        f"stored:  {sum(cost.field_bytes.values()):,} bytes per image ({fields}): {format_bytes(cost.total_bytes)} in "
        f"{cost.shards:,} shards; {format_bytes(cost.free_bytes)} are free in {job.directory}{short}",
        f"work:    {cost.images:,} images{mirrored}{twice}",
        f"rates:   reading {cost.reading:,.1f} images/s per process of {os.cpu_count()} cores, encoding "
        f"{cost.encoding:,.1f} images/s per device ({jax.devices()[0].device_kind}), both measured on the first "
        f"{first:,} images",
        _time(cost, cost.processes, cost.devices),
    ]
    if cost.devices != DEVICES:
        lines.append(_time(cost, cost.processes, DEVICES))
    return "\n".join(lines)


def _time(cost: Cost, processes: int, devices: int) -> str:
    bound = "encoding" if devices * cost.encoding < cost.reading else "reading"
    return (
        f"time:    {_duration(cost.seconds(processes, devices))} with {processes} process(es) of {devices} device(s) "
        f"each; bottleneck: {bound}"
    )


def format_bytes(number: float) -> str:
    """62 * 10**9 -> '62 GB'."""
    power = min(int(math.log10(max(number, 1))) // 3, 4)
    return f"{number / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 90:
        return f"{max(minutes, 0.1):.1f} minutes"
    return f"{minutes / 60:.1f} hours" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


def report_cost(job: Job, out: str) -> Cost:
    """Prints what a job will cost, and writes it to `out` as JSON unless that is ''. Process 0 reports."""
    cost = measure_cost(job)
    if job.process_index == 0:
        print(format_cost(job, cost), flush=True)
        if out:
            atomic_write(out, json.dumps(dataclasses.asdict(cost) | {"total_bytes": cost.total_bytes}, indent=1) + "\n")
            logging.info("plan: %s", out)
    return cost
