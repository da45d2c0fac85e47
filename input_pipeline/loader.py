"""Batches of examples as a pure function of (seed, step, row).

With N examples, seed k and global batch B, let pi_e be the permutation of epoch e, drawn from (k, e) by grain's shuffle
(an index cipher: pi_e(j) costs O(1) and no table). Row r of the global batch of step s is the example

    pi_e(j),  where  e, j = divmod(s * B + r, N),

so a batch may span two epochs. Host p of P holds the rows p*B/P <= r < (p+1)*B/P of every batch, in order, and reads no
others. A row depends on nothing else: threads, worker processes, the number of hosts and the step a run starts from
change only which process does the work. There is therefore no iterator state to save: resuming at step s is
`start_step=s`.

With a `shard_window` of W, pi_e is made for data that lie in shards (sources.shard_ends), which are read best one after
the other. The shards of an epoch come in a random order; in the sequence of their records every window of W is shuffled
(window w of epoch e by a generator seeded with (k, e, w)). This is a function of (k, e, j) too, whose cost grows with
the number of shards, and with W for the first row of a window. An example only meets those of its own window, so W
should be many times the batch size, and span several shards.

A caption of several texts (sources.draw) and a `transform` of the records, such as augment.Augmentation, draw in this
order from one generator per row, seeded by (k, s * B + r): an example is changed in another way each time it comes, and
the above stays true. No noise is drawn here; that belongs in the jitted step, whose keys also depend on (seed, step,
row) only.

A batch is a dict of numpy arrays with the rows stacked on a new first axis. Numbers keep their dtype. Captions become
one numpy unicode array ('<U' as wide as the longest of the batch), so that they pass through worker processes without
pickling objects; they have to be tokenised before they reach jax.

grain's own batching is not used, because it batches the rows of one shard, not those of one host.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from input_pipeline.sources import Record, Source, draw, shard_ends

Transform = Callable[[Record, np.random.Generator], Record]


class Batches(Protocol):
    """An iterator of batches; close() ends the threads and processes that read ahead."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


def collate(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Stacks records with the same keys and shapes: {"image": [H, W, C]} * B -> {"image": [B, H, W, C]}.

    Raises: ValueError, which names the key, if records disagree in keys or shapes.
    """
    keys = records[0].keys()
    for record in records:
        if record.keys() != keys:
            raise ValueError(f"records of one batch have different keys: {sorted(keys)} and {sorted(record)}")
    batch = {}
    for key in keys:
        values = [np.asarray(record[key]) for record in records]
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise ValueError(
                f"records of one batch have {key!r} of different shapes, such as {shapes[0]} and {shapes[1]}: "
                "give all images one size with input_pipeline.transforms.resized"
            )
        batch[key] = np.stack(values)
    return batch


SHARDS, WINDOW = 1, 2  # in a generator's seed: which of the two shuffles it is for
WINDOWS_KEPT = 8


@functools.lru_cache(maxsize=WINDOWS_KEPT)
def _permutation(seed: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


@dataclass(frozen=True, eq=False)
class ShardOrder:
    """position -> index of the example, with shards in a random order and records shuffled within windows.

    ends: where the records of each shard end, int [shards].
    seed, window: k and W of the module's docstring.
    epochs: passes over the data, None for no end.
    """

    ends: np.ndarray
    seed: int
    window: int
    epochs: int | None = None

    def __len__(self) -> int:
        return int(self.ends[-1]) * (2**31 if self.epochs is None else self.epochs)

    def __getitem__(self, position: int) -> int:
        size = int(self.ends[-1])
        epoch, place = divmod(position, size)
        window, row = divmod(place, self.window)
        start = window * self.window
        rows = _permutation((WINDOW, self.seed, epoch, window), min(self.window, size - start))
        shards = _permutation((SHARDS, self.seed, epoch), len(self.ends))
        starts = np.concatenate([[0], self.ends[:-1]])
        ends = np.cumsum((self.ends - starts)[shards])  # of the shards in the epoch's order
        place = start + rows[row]
        shard = np.searchsorted(ends, place, side="right")  # in the epoch's order
        return int(self.ends[shards[shard]] - (ends[shard] - place))


Order = grain.MapDataset | ShardOrder | range  # position in the repeated, shuffled data -> index of the example


@dataclass(frozen=True)
class _HostRows:
    """step -> this host's rows of the global batch of that step."""

    source: Source
    order: Order
    batch_size: int  # of the global batch
    first_row: int
    end_row: int
    offset: int = 0
    seed: int | None = None  # None: nothing is drawn, and records are not transformed
    transform: Transform | None = None

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        start = self.offset + int(step) * self.batch_size
        end = min(start + self.end_row, len(self.order))
        positions = range(start + self.first_row, end)
        return collate([self.record(position) for position in positions])

    def record(self, position: int) -> Record:
        number: Any = self.order[position]  # a MapDataset of numbers, annotated as of anything
        index = int(number)
        if self.seed is None:
            return self.source[index]
        generator = np.random.default_rng((self.seed, position))
        record = draw(self.source, index, generator)
        return record if self.transform is None else self.transform(record, generator)


def _iterate(steps: range, read: _HostRows, threads: int, workers: int) -> grain.DatasetIterator:
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(read)
    # A thread or a worker reads whole batches, so that the order of batches cannot depend on their number.
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return iter(batches)


def _check(source: Source, *bounds: tuple[str, int, int]) -> None:
    """Raises ValueError for an empty source, and for a value below its bound. bounds: (name, value, least value)."""
    if len(source) == 0:
        raise ValueError(f"the data set is empty: {source.describe()}; check config.data.path")
    for name, value, least in bounds:
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")


def _check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1} (process_count - 1), found {process_index}")
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {process_count} processes: "
            f"choose a multiple of {process_count}"
        )


def _order(source: Source, seed: int, shuffle: bool, window: int, epochs: int | None) -> Order:
    if not window:
        order = grain.MapDataset.range(len(source)).seed(seed)
        return (order.shuffle() if shuffle else order).repeat(epochs)
    ends = shard_ends(source)
    if ends is None or not shuffle:
        reason = "shuffle is False" if not shuffle else f"{source.describe()} has no shards"
        raise ValueError(f"shard_window {window} (data.shuffle 'shards'): {reason}; set data.shuffle to 'global'")
    return ShardOrder(ends, seed, window, epochs)


def batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    transform: Transform | None = None,
    start_step: int = 0,
    offset: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    workers: int = 0,
    shuffle: bool = True,
    shard_window: int = 0,
    epochs: int | None = None,
) -> Batches:
    """This host's rows of the global batches of the steps start_step, start_step + 1, ...

    Args:
      source: random access to the examples; picklable when workers > 0.
      seed: of the order of the examples, of the texts drawn and of the transform's draws, 0 or more. Nothing else is
        random.
      batch_size: B, rows of the global batch; it may exceed len(source).
      transform: (record, numpy generator) -> record, applied to each row as it is read, drawing from the generator
        alone; picklable when workers > 0. None leaves the records as they are.
      start_step: the first step; starting later costs nothing.
      offset: added to s * B + r. A run that changes its batch size at step s continues with (old B - new B) * s.
      process_index, process_count: p and P; this host gets the rows p*B/P to (p+1)*B/P.
      threads: batches read at a time in one process, with 2 * threads prefetched (0: read on demand, no prefetch).
      workers: processes that read, each with its own threads (0: this process reads). They are spawned: a script needs
        `if __name__ == "__main__"`, absl's flags must have been parsed, and close() should be called at the end.
      shuffle: a new permutation each epoch; False keeps the source's order in every epoch.
      shard_window: W of the module's docstring, for sources with shards; 0 for a permutation of all examples.
      epochs: passes over the data before the iterator ends, None for no end. Rows that do not fill the last global
        batch are dropped: every batch has B rows.

    Returns: an iterator of {name: [B/P, ...] array} with a method close().

    Raises: ValueError (one line) for an empty source, a batch size that process_count does not divide, fewer examples
      than one batch with finite epochs, a process, step, thread or worker number out of range, and a shard_window with
      a source without shards or without a shuffle.
    """
    bounds = (("seed", seed, 0), ("batch_size", batch_size, 1), ("start_step", start_step, 0))
    _check(source, *bounds, ("threads", threads, 0), ("workers", workers, 0), ("shard_window", shard_window, 0))
    _check_processes(batch_size, process_index, process_count)
    order = _order(source, seed, shuffle, shard_window, epochs)
    steps = range(start_step, (len(order) - offset) // batch_size)
    if not steps:
        raise ValueError(
            f"no batch at start_step {start_step}: {epochs} epochs of {len(source)} examples hold {steps.stop} batches "
            f"of {batch_size}"
        )
    rows = batch_size // process_count
    first_row = process_index * rows
    read = _HostRows(source, order, batch_size, first_row, first_row + rows, offset, seed, transform)
    return _iterate(steps, read, threads, workers)


def in_order(
    source: Source,
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
    threads: int = 2,
    workers: int = 0,
) -> Batches:
    """One pass over the examples start, ..., stop - 1 in order, for encoding and evaluation.

    The last batch may be short. Nothing is drawn, and records are not transformed.

    Args:
      source, threads, workers: as for batches().
      batch_size: rows of a batch.
      start, stop: the part of the source to read; stop None is len(source).

    Returns: an iterator of {name: [batch_size or fewer, ...] array} with a method close().

    Raises: ValueError (one line) for an empty source, and a part that is empty or not within the source.
    """
    _check(source, ("batch_size", batch_size, 1), ("threads", threads, 0), ("workers", workers, 0))
    stop = len(source) if stop is None else stop
    if not 0 <= start < stop <= len(source):
        raise ValueError(f"no examples {start} to {stop} in a source of {len(source)}: {source.describe()}")
    steps = range(0, -(-(stop - start) // batch_size))
    return _iterate(steps, _HostRows(source, range(start, stop), batch_size, 0, batch_size), threads, workers)
