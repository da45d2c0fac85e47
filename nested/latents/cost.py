"""What encoding a data set will cost, measured on its first images, before anything is written.

    python main.py --config=configs/imagenet_L5.py --workdir=... --mode=encode --plan [--out=plan.json]

Storage is exact but for the few bytes of the shards' indices. Time is that of the slower of two things that overlap,
reading images and running the networks, at the rates of a few batches: processes and devices are taken to work at equal
rates, and the disk to keep up. The images of the SVD's basis pass twice (nested/latents/passes.py).
"""

import dataclasses
import json
import math
import os
import shutil
import time

import jax
from absl import logging

from nested.latents import job as encoding
from nested.latents import passes as encode
from nested.runtime.files import atomic_write

BATCHES = 3  # timed, after one that compiles
DEVICES = 8  # of the second estimate


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a plan says. images: of the data set; fitted: how many of them pass twice; field_bytes: per record; shards;
    free_bytes: on the latents' disk; processes, devices: of this run, devices of one process; reading: images/s of one
    process; encoding: images/s of one device, mirrored images included where they are stored."""

    images: int
    fitted: int
    field_bytes: dict
    shards: int
    free_bytes: int
    processes: int
    devices: int
    reading: float
    encoding: float

    @property
    def total_bytes(self):
        return self.images * sum(self.field_bytes.values())

    def seconds(self, processes, devices):
        """Of all images with so many processes of so many devices each."""
        return (self.images + self.fitted) / (processes * min(self.reading, devices * self.encoding))


def measure(job) -> Cost:
    """Reads and encodes the first batches of the data of an encoding.Job; nothing is written."""
    size = job.config.batch_size
    stop = min(len(job.source), (BATCHES + 1) * size)
    began = time.perf_counter()
    batches = [images for _, images, _ in encode.batches(job, 0, stop)]
    reading = stop / (time.perf_counter() - began)
    jax.block_until_ready(encode.raw(job, batches[0]))  # compiled, and warm
    began = time.perf_counter()
    for images in batches[-BATCHES:]:
        jax.block_until_ready(encode.raw(job, images))
    rate = len(batches[-BATCHES:]) * size / (time.perf_counter() - began)
    devices = len(jax.local_devices())
    return Cost(
        images=len(job.source),
        fitted=encode.seen_twice(job),
        field_bytes={field.name: field.nbytes for field in job.fields},
        shards=job.num_shards,
        free_bytes=shutil.disk_usage(_existing(job.directory)).free,
        processes=job.process_count,
        devices=devices,
        reading=reading,
        encoding=rate / devices,
    )


def _existing(directory):
    """The directory, or the nearest one above it that exists."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def text(job, cost: Cost) -> str:
    """The plan in words."""
    fields = ", ".join(f"{name} {size:,}" for name, size in cost.field_bytes.items())
    short = "" if cost.free_bytes > cost.total_bytes else ": NOT ENOUGH, choose another config.latents_dir"
    twice = f"; {cost.fitted:,} of them pass twice, for the SVD's basis (encoder.fit_images)" if cost.fitted else ""
    first = min(cost.images, (BATCHES + 1) * job.config.batch_size)
    mirrored = ", each with its mirror image" if job.flip else ""
    lines = [
        f"data:    {job.source.describe()}",
        f"stored:  {sum(cost.field_bytes.values()):,} bytes per image ({fields}): {in_bytes(cost.total_bytes)} in "
        f"{cost.shards:,} shards; {in_bytes(cost.free_bytes)} are free in {job.directory}{short}",
        f"work:    {cost.images:,} images{mirrored}{twice}",
        f"rates:   reading {cost.reading:,.1f} images/s per process of {os.cpu_count()} cores, encoding "
        f"{cost.encoding:,.1f} images/s per device ({jax.devices()[0].device_kind}), both measured on the first "
        f"{first:,} images",
        _time(cost, cost.processes, cost.devices),
    ]
    if cost.devices != DEVICES:
        lines.append(_time(cost, cost.processes, DEVICES))
    return "\n".join(lines)


def _time(cost, processes, devices):
    bound = "encoding" if devices * cost.encoding < cost.reading else "reading"
    return (
        f"time:    {_duration(cost.seconds(processes, devices))} with {processes} process(es) of {devices} device(s) "
        f"each; {bound} is what takes it"
    )


def in_bytes(number):
    """'62 GB'."""
    power = min(int(math.log10(max(number, 1))) // 3, 4)
    return f"{number / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(seconds):
    minutes = seconds / 60
    if minutes < 90:
        return f"{max(minutes, 0.1):.1f} minutes"
    return f"{minutes / 60:.1f} hours" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


def plan(job: encoding.Job, out: str) -> Cost:
    """Prints what `job` will cost, and writes it to `out` as JSON unless that is ''. Process 0 reports."""
    cost = measure(job)
    if job.process_index == 0:
        print(text(job, cost), flush=True)
        if out:
            atomic_write(out, json.dumps(dataclasses.asdict(cost) | {"total_bytes": cost.total_bytes}, indent=1) + "\n")
            logging.info("plan: %s", out)
    return cost
