"""The order of the data, and what a transform draws, are pure functions of (seed, step, row)."""

import itertools
import time

import numpy as np
import pytest

from input_pipeline import loader
from input_pipeline.augment import Augmentation
from input_pipeline.composition import Subset, select_fields
from input_pipeline.in_memory import ImagesInMemory
from input_pipeline.sources import shard_ends
from input_pipeline.synthetic import SyntheticLatents


class Numbers:
    """Record i is {"number": i}; remembers what was read."""

    num_classes = 0
    fingerprint = "0"

    def __init__(self, size):
        self.size = size
        self.read = []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return {"number": np.int64(index)}

    def describe(self):
        return f"{self.size} numbers"


def take(count, size=10, **options):
    """The first `count` batches of range(size), as [count, rows]."""
    options = {"seed": 0, "batch_size": 4, "threads": 0, **options}
    iterator = loader.batches(Numbers(size), **options)
    result = np.stack([batch["number"] for batch in itertools.islice(iterator, count)])
    iterator.close()
    return result


def test_every_epoch_is_another_permutation():
    epochs = take(15).reshape(6, 10)  # 15 batches of 4 are 6 epochs of 10: batches span epochs
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_row_depends_on_its_position_not_on_the_batch_size():
    np.testing.assert_array_equal(take(15).reshape(-1), take(4, batch_size=15).reshape(-1))


def test_seed_and_shuffle():
    assert (take(5) != take(5, seed=1)).any()
    # Seed 1 is not seed 0 one epoch later, as it would be were epochs seeded by seed + epoch.
    assert (take(5, seed=1).reshape(2, 10)[0] != take(5, seed=0).reshape(2, 10)[1]).any()
    np.testing.assert_array_equal(take(5, shuffle=False).reshape(-1), np.tile(np.arange(10), 2))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_hosts_hold_the_rows_of_one_global_batch(process_count):
    hosts = [take(6, batch_size=8, process_index=index, process_count=process_count) for index in range(process_count)]
    np.testing.assert_array_equal(np.concatenate(hosts, axis=1), take(6, batch_size=8))


def test_a_host_reads_only_its_rows():
    source = Numbers(100)
    iterator = loader.batches(source, seed=0, batch_size=8, process_index=1, process_count=4, threads=0)
    rows = np.concatenate([next(iterator)["number"] for _ in range(5)])
    assert source.read == rows.tolist() and len(rows) == 5 * 2


@pytest.mark.parametrize("step", [1, 7])
def test_starting_at_a_step_equals_skipping_to_it(step):
    np.testing.assert_array_equal(take(4, start_step=step), take(4 + step)[step:])


def test_any_step_costs_the_same():
    source = Numbers(1000)
    began = time.monotonic()
    far = loader.batches(source, seed=0, batch_size=4, start_step=10**12, threads=0)
    near = loader.batches(source, seed=0, batch_size=4, start_step=10**12 - 1, threads=0)
    next(near)
    np.testing.assert_array_equal(next(far)["number"], next(near)["number"])
    assert time.monotonic() - began < 5 and len(source.read) == 12


def test_threads_and_workers_change_nothing():
    expected = take(7, batch_size=6, start_step=2)
    np.testing.assert_array_equal(expected, take(7, batch_size=6, start_step=2, threads=3))
    np.testing.assert_array_equal(expected, take(7, batch_size=6, start_step=2, threads=1, workers=2))


def add_draw(record, generator):
    return {**record, "draw": generator.random()}


def test_each_row_has_its_own_generator():
    options = {"seed": 3, "batch_size": 4, "threads": 0, "transform": add_draw}
    iterator = loader.batches(Numbers(10), start_step=2, **options)
    found = np.concatenate([next(iterator)["draw"] for _ in range(2)])
    expected = [np.random.default_rng((3, position)).random() for position in range(8, 16)]
    np.testing.assert_array_equal(found, expected)  # whatever the example
    host = loader.batches(Numbers(10), start_step=2, process_index=1, process_count=2, **options)
    np.testing.assert_array_equal(next(host)["draw"], expected[2:4])


def augmented(count, **options):
    """The first `count` batches of two images of 6 pixels, all rows augmented: images and conditions as one vector."""
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    source = ImagesInMemory(images, np.zeros(2, np.int32), 0, (), "two images")
    options = {"batch_size": 4, "threads": 0, **options}
    iterator = loader.batches(source, seed=0, transform=Augmentation(prob=0.5), **options)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    assert {key: value.dtype for key, value in batches[0].items()} == {"image": "f4", "label": "i4", "augment": "f4"}
    return np.stack([np.concatenate([b["image"].reshape(len(b["image"]), -1), b["augment"]], 1) for b in batches])


def test_augmented_rows_depend_on_seed_step_and_row_only():
    expected = augmented(5)
    np.testing.assert_array_equal(augmented(3, start_step=2), expected[2:])
    np.testing.assert_array_equal(augmented(5, threads=3), expected)
    np.testing.assert_array_equal(augmented(3, start_step=2, threads=1, workers=2), expected[2:])
    hosts = [augmented(5, process_index=index, process_count=2) for index in range(2)]
    np.testing.assert_array_equal(np.concatenate(hosts, axis=1), expected)
    np.testing.assert_array_equal(augmented(2, batch_size=10).reshape(expected.shape), expected)
    assert len(np.unique(expected.reshape(20, -1), axis=0)) > 15  # 2 examples, 10 times each


def test_batch_larger_than_the_data():
    batch = take(1, size=3, batch_size=9)[0].reshape(3, 3)
    assert (np.sort(batch, axis=1) == np.arange(3)).all()


def test_epochs_end_with_full_batches():
    source = Numbers(10)
    result = list(itertools.islice(loader.batches(source, seed=0, batch_size=4, epochs=2, start_step=1), 9))
    assert [len(batch["number"]) for batch in result] == [4] * 4  # 2 * 10 // 4 - 1


@pytest.mark.parametrize(
    "size, options, message",
    [
        (0, {}, "the data set is empty: 0 numbers; check config.data.path"),
        (10, {"batch_size": 6, "process_count": 4}, "batch_size 6 is not divisible by the 4 processes"),
        (10, {"process_index": 2, "process_count": 2}, r"process_index must be in 0..1 .*found 2"),
        (10, {"batch_size": 0}, "batch_size must be at least 1, found 0"),
        (10, {"threads": -1}, "threads must be at least 0, found -1"),
        (10, {"workers": -1}, "workers must be at least 0, found -1"),
        (10, {"start_step": -1}, "start_step must be at least 0, found -1"),
        (10, {"batch_size": 12, "epochs": 1}, "no batch at start_step 0: 1 epochs of 10 examples hold 0 batches"),
        (10, {"seed": -1}, "seed must be at least 0, found -1"),
    ],
)
def test_bad_requests(size, options, message):
    with pytest.raises(ValueError, match=message) as error:
        take(1, size=size, **options)
    assert "\n" not in str(error.value)


def numbers_in_order(size=10, **options):
    return [batch["number"].tolist() for batch in loader.in_order(Numbers(size), 4, **options)]


def test_in_order_is_one_pass_with_a_short_last_batch():
    assert numbers_in_order() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert numbers_in_order(start=3, stop=8, threads=0) == [[3, 4, 5, 6], [7]]
    assert numbers_in_order(size=8) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("part", [{"start": 4, "stop": 4}, {"stop": 11}, {"start": -1}])
def test_in_order_refuses_parts_that_are_not_there(part):
    with pytest.raises(ValueError, match="no examples .* in a source of 10: 10 numbers"):
        numbers_in_order(**part)


def test_collate():
    batch = loader.collate([{"label": np.int32(3), "caption": "a cat"}, {"label": np.int32(1), "caption": "katzen"}])
    assert batch["label"].dtype == np.int32 and batch["label"].tolist() == [3, 1]
    assert batch["caption"].dtype == "<U6" and batch["caption"].tolist() == ["a cat", "katzen"]
    with pytest.raises(ValueError, match=r"'image' of different shapes, such as \(2, 2, 3\) and \(2, 4, 3\)"):
        loader.collate([{"image": np.zeros((2, 4, 3))}, {"image": np.zeros((2, 2, 3))}])
    with pytest.raises(ValueError, match="different keys: .'a'. and .'a', 'b'."):
        loader.collate([{"a": 0}, {"a": 0, "b": 0}])


class Broken(Numbers):
    def __getitem__(self, index):
        raise ValueError("cat.png is not an image")


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_of_the_source_reaches_the_caller(threads):
    with pytest.raises(ValueError, match="^cat.png is not an image"):
        next(loader.batches(Broken(10), seed=0, batch_size=4, threads=threads))


def test_batches_of_several_arrays():
    source = SyntheticLatents(levels=(("z2", (1, 1, 8)), ("z1", (4, 4, 2))), num_examples=6, num_classes=3, seed=0)
    batch = next(loader.batches(source, seed=0, batch_size=5))
    assert {key: value.shape for key, value in batch.items()} == {"label": (5,), "z2": (5, 1, 1, 8), "z1": (5, 4, 4, 2)}
    assert batch["z1"].dtype == np.float32


class Shards(Numbers):
    """Numbers in shards of 3, 1, 4, 2."""

    shard_ends = np.array([3, 4, 8, 10])

    def __init__(self):
        super().__init__(10)


def take_shards(count, window=4, **options):
    options = {"seed": 0, "batch_size": 5, "threads": 0, "shard_window": window, **options}
    iterator = loader.batches(Shards(), **options)
    result = np.stack([batch["number"] for batch in itertools.islice(iterator, count)])
    iterator.close()
    return result


def test_shards_come_one_after_the_other_in_another_order_each_epoch():
    one_by_one = take_shards(40, window=1).reshape(20, 10)  # epochs of 10; nothing is shuffled within
    orders = set()
    for epoch in one_by_one:
        shards = np.searchsorted(Shards.shard_ends, epoch, side="right")
        order = [int(shard) for i, shard in enumerate(shards) if i == 0 or shard != shards[i - 1]]
        assert sorted(order) == [0, 1, 2, 3]
        np.testing.assert_array_equal(epoch, np.concatenate([np.split(np.arange(10), [3, 4, 8])[i] for i in order]))
        orders.add(tuple(order))
    assert len(orders) > 10


def test_records_are_shuffled_within_windows_of_the_shards_sequence():
    sequence, shuffled = take_shards(40, window=1).reshape(20, 10), take_shards(40, window=4).reshape(20, 10)
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        np.testing.assert_array_equal(np.sort(sequence[:, start:stop]), np.sort(shuffled[:, start:stop]))
    moved = (sequence != shuffled).mean()
    assert 0.55 < moved < 0.85  # 3/4 of the windows of four, 1/2 of that of two
    assert len({tuple(row.argsort()) for row in shuffled[:, :4]}) > 8  # not one permutation for all
    places = (sequence[:, :8, None] == shuffled[:, None, :8]).argmax(1).reshape(20, 2, 4) % 4  # where each came from
    assert (places[:, 0] != places[:, 1]).any(1).sum() > 15  # nor one for the windows of an epoch
    whole = take_shards(40, window=100).reshape(20, 10)
    assert (np.sort(whole) == np.arange(10)).all()


def test_the_order_of_shards_is_a_function_of_seed_and_position():
    expected = take_shards(8)
    np.testing.assert_array_equal(take_shards(5, start_step=3), expected[3:])
    np.testing.assert_array_equal(take_shards(4, batch_size=10).reshape(8, 5), expected)
    np.testing.assert_array_equal(take_shards(8, threads=3), expected)
    hosts = [take_shards(4, batch_size=10, process_index=i, process_count=2) for i in range(2)]
    np.testing.assert_array_equal(np.stack(hosts, axis=1).reshape(8, 5), expected)
    assert (take_shards(8, seed=1) != expected).any()
    assert len(list(loader.batches(Shards(), seed=0, batch_size=4, shard_window=3, epochs=2))) == 5
    order = loader.ShardOrder(Shards.shard_ends, seed=0, window=4)
    assert sorted(order[10**12 + i] for i in range(10)) == list(range(10))  # any epoch costs the same


def test_a_part_has_what_is_left_of_the_shards():
    part = Subset(select_fields(Shards(), ("number",)), np.array([0, 2, 3, 5, 8]))
    assert shard_ends(part).tolist() == [2, 3, 4, 5]
    batch = next(loader.batches(part, seed=0, batch_size=5, shard_window=2))
    assert sorted(batch["number"]) == [0, 2, 3, 5, 8]
    assert (
        shard_ends(Subset(Shards(), np.array([2, 0]))) is None and shard_ends(Subset(Numbers(3), np.arange(2))) is None
    )


@pytest.mark.parametrize(
    "source, options, message",
    [
        (Numbers(10), {}, r"shard_window 4 \(data.shuffle 'shards'\): 10 numbers has no shards; set data.shuffle to"),
        (Shards(), {"shuffle": False}, "shuffle is False; set data.shuffle to 'global'"),
        (Shards(), {"shard_window": -1}, "shard_window must be at least 0, found -1"),
    ],
)
def test_shard_windows_that_cannot_be(source, options, message):
    with pytest.raises(ValueError, match=message):
        loader.batches(source, **{"seed": 0, "batch_size": 4, "shard_window": 4, **options})


class Drawn(Numbers):
    """A record that training sees with a number drawn for it."""

    def draw(self, index, generator):
        return {"number": np.int64(index), "first": generator.random()}


def test_what_a_source_draws_comes_before_the_transform():
    batches = loader.batches(select_fields(Drawn(10), ("first",)), seed=0, batch_size=4, threads=0, transform=add_draw)
    found = [next(batches) for _ in range(2)]
    generators = [np.random.default_rng((0, position)) for position in range(8)]
    expected = [(generator.random(), generator.random()) for generator in generators]
    np.testing.assert_array_equal(np.concatenate([batch["first"] for batch in found]), [one for one, _ in expected])
    np.testing.assert_array_equal(np.concatenate([batch["draw"] for batch in found]), [two for _, two in expected])
    source = Drawn(10)
    next(loader.in_order(source, 10))
    assert source.read == list(range(10))  # nothing is drawn where records are read in order
