"""What a training run reports about itself: means of the metrics, rates, skipped steps."""

import time
from collections.abc import Mapping

import jax
from absl import logging


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class Meter:
    """Averages the metrics of the steps since the last report, and counts the time that was spent waiting for data.

    max_bad_steps: so many non-finite steps in a row raise NonFiniteError.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps, self.bad_in_a_row, self.skipped = max_bad_steps, 0, 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything since the last report."""
        self.sums: dict[str, float] = {}
        self.good = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves everything that was done so far out of the rates."""
        self.rows, self.waited, self.start = 0, 0.0, time.perf_counter()

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of one step, which are already computed. Raises NonFiniteError after too many bad steps."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values.pop("finite"):
            self.bad_in_a_row = 0
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.good += 1
            return
        self.bad_in_a_row += 1
        self.skipped += 1
        logging.warning("step %d: loss %g is not finite or its gradient is not; update skipped", step, values["loss"])
        if self.bad_in_a_row >= self.max_bad_steps:
            raise NonFiniteError(
                f"{self.bad_in_a_row} steps in a row (the last is {step}) had a non-finite loss or gradient; the state "
                "is that of the last good step: look at loss/* in metrics.jsonl, lower optimizer.learning_rate"
            )

    def report(self, macs_per_row: float) -> dict[str, float]:
        """Means since the last report, with images/s, model FLOP/s (6 x multiply-accumulates) and the data wait."""
        elapsed, rows = time.perf_counter() - self.start, self.rows
        result = {name: total / max(self.good, 1) for name, total in self.sums.items()}
        if rows:  # there are none if the only step since is the run's first, which compiles and is not timed
            result["images_per_second"] = rows / elapsed
            result["model_flops_per_second"] = 6 * macs_per_row * rows / elapsed
            result["data_wait_share"] = self.waited / elapsed
        result["skipped_steps"] = self.skipped
        self.reset()
        return result
