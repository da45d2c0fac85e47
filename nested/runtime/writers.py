"""Reports of a running program: metrics as JSON lines and TensorBoard events, and a progress line.

`workdir/metrics.jsonl` is the record: one JSON object per line, {"step": 100, "loss": 0.5, ...}, in the order written.
JSON has no NaN or infinity: they are written as the strings "nan", "inf", "-inf", and read_metrics turns them back.
TensorBoard events (tensorboardX, no TensorFlow) go to `workdir/tensorboard`. Only process 0 writes.

A run resumed from step s repeats the steps after s. Lines of later steps are therefore dropped before the first new
one, and TensorBoard is told to hide its own, so that a curve never doubles back.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import TextIO

import numpy as np
import tensorboardX
from numpy.typing import ArrayLike

from nested.runtime.files import atomic_write

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricWriter:
    """Writes the metrics of a run that continues after `resumed_step` updates (0: a new one)."""

    def __init__(self, workdir: str | os.PathLike, process_index: int, resumed_step: int) -> None:
        self._file: TextIO | None = None
        self._tensorboard: tensorboardX.SummaryWriter | None = None
        if process_index != 0:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = _metrics_path(workdir)
        if path.exists():
            kept = [line for line in read_metrics(workdir) if 0 < resumed_step >= line["step"]]
            atomic_write(path, "".join(_json_line(line) for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  close() closes it
        self._tensorboard = tensorboardX.SummaryWriter(
            logdir=str(workdir / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else 0
        )

    def scalars(self, step: int, values: Mapping[str, ArrayLike]) -> None:
        """Writes the scalars of a step, {name: number or [] array}."""
        if self._file is None or self._tensorboard is None:
            return
        numbers = {name: float(np.asarray(value)) for name, value in values.items()}
        self._file.write(_json_line({"step": int(step), **numbers}))
        self._file.flush()
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, int(step))

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes pictures of a step, {name: uint8 [height, width, 1 or 3]}. Raises ValueError for any other array."""
        for name, picture in pictures.items():
            if picture.dtype != np.uint8 or picture.ndim != 3:
                raise ValueError(f"picture {name!r}: found {picture.dtype} {picture.shape}, expected uint8 [h, w, c]")
            if self._tensorboard is not None:
                self._tensorboard.add_image(name, picture, int(step), dataformats="HWC")

    def close(self) -> None:
        """Flushes everything; nothing may be written afterwards."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of `workdir/metrics.jsonl` as dicts, in order. A last line that a kill cut short is left out.

    Raises FileNotFoundError if there is no such file, ValueError if any other line is not JSON.
    """
    path = _metrics_path(workdir)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no metrics here; give the --workdir of a run that has trained")
    *lines, rest = path.read_text(encoding="utf-8").split("\n")  # what follows the last newline is a cut line, or empty
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); remove that line") from error
        metrics.append({name: NON_FINITE.get(v, v) if isinstance(v, str) else v for name, v in values.items()})
    return metrics


def _metrics_path(workdir: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(workdir) / "metrics.jsonl"


def _json_line(values: Mapping[str, float]) -> str:
    return json.dumps({k: v if math.isfinite(v) else str(v) for k, v in values.items()}, allow_nan=False) + "\n"


class Progress:
    """Progress with the time left: one line rewritten in place on a terminal, else a line every `interval` seconds.

    Args:
      what: the name of the things that are counted.
      total: how many there are.
      start: how many were done before this process began.
      interval: seconds between lines, on a stream that is not a terminal.
      stream: a text file; standard error by default.
    """

    def __init__(
        self, what: str, total: int, start: int = 0, interval: float = 30.0, stream: TextIO | None = None
    ) -> None:
        self._what, self._total, self._start, self._interval = what, total, start, interval
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._begun = time.monotonic()
        self._printed = -math.inf
        self._width = 0

    def update(self, done: int, text: str = "") -> None:
        """Reports that `done` of the total are done. text: shown beside it, such as losses; by default the rate."""
        now = time.monotonic()
        last = done >= self._total
        if now - self._printed < (0.1 if self._terminal else self._interval) and not last:
            return
        self._printed = now
        made, elapsed = done - self._start, now - self._begun
        eta = "?" if made <= 0 else duration(elapsed * (self._total - done) / made)
        text = text or f"{made / max(elapsed, 1e-9):,.1f}/s"
        line = f"{self._what} {done}/{self._total} ({done / max(self._total, 1):.0%})  ETA {eta}  {text}"
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if last else ""))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """7384 -> '2:03:04', 184 -> '3:04'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
