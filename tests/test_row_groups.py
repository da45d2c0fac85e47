"""nested/ops/mixed_rows.py: which rows have a finer resolution, and that a split batch stays where it is."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processes import run_python

from nested.ops.mixed_rows import fill_rows, take_rows


def kept(batch, *counts):
    """Numbers of the rows that take_rows keeps."""
    return take_rows(jnp.arange(batch), *counts).tolist()


@pytest.mark.parametrize(
    "batch, counts, rows",
    [
        (4, (4, 3, 2), [0, 1]),  # of 0, 1, 2 the first two
        (8, (8, 6, 4), [0, 1, 4, 5]),
        (6, (6, 3), [0, 2, 4]),  # 3 of 6 is 1 of 2
        (6, (6, 3, 2), [0, 2]),
        (12, (12, 6, 4), [0, 2, 6, 8]),
        (6, (6, 6), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_rows_of_a_chain(batch, counts, rows):
    assert kept(batch, *counts) == rows


@pytest.mark.parametrize("batch, count", [(7, 3), (8, 5), (5, 5)])
def test_one_group_of_the_whole_batch_has_its_leading_rows(batch, count):
    """Where q = B: ml-mdm's mixed batches, diffusion.py:308-313."""
    assert kept(batch, count) == list(range(count))


@pytest.mark.parametrize("counts", [(4, 3, 2), (6, 3, 2), (6, 6, 1), (2, 1)])
@pytest.mark.parametrize("groups", [1, 3])
def test_fill_puts_rows_back_where_they_were_taken(counts, groups):
    counts = tuple(groups * count for count in counts)
    x = np.random.default_rng(0).normal(size=(counts[0], 2, 3)).astype(np.float32)
    taken = take_rows(x, *counts)
    assert taken.shape == (counts[-1], 2, 3)
    filled = fill_rows(taken, *counts[-2::-1])
    has = np.isin(np.arange(counts[0]), kept(counts[0], *counts))
    np.testing.assert_array_equal(filled, np.where(has[:, None, None], x, 0))
    np.testing.assert_array_equal(take_rows(filled, *counts), taken)


def test_every_group_is_alike():
    """So a row's resolutions do not depend on the batch that the group is in."""
    groups = np.reshape(kept(12, 12, 6, 4), (2, 2))
    np.testing.assert_array_equal(groups[0] + 6, groups[1])


@pytest.mark.parametrize("count", [0, 9])
def test_impossible_counts(count):
    for function, rows, number in ((take_rows, 8, count), (fill_rows, count, 8)):
        with pytest.raises(
            ValueError, match=f"mixed batch: {count} of 8 rows hold a resolution; expected 1 to 8"
        ) as error:
            function(jnp.zeros((rows, 1)), number)
        assert "\n" not in str(error.value)


ON_FOUR_DEVICES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from nested.ops.mixed_rows import fill_rows, take_rows
rows = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
x = jax.device_put(np.arange(48.0, dtype=np.float32).reshape(24, 2), rows)
both = jax.jit(lambda x: (take_rows(x, 12, 8), fill_rows(take_rows(x, 12, 8), 12, 24)), out_shardings=rows)
text = both.lower(x).compile().as_text()
moved = [name for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if name in text]
taken, filled = both(x)
print(len(jax.devices()), moved, np.asarray(taken[:, 0]).tolist(), np.asarray(filled[:, 0]).tolist())
"""


def test_rows_split_over_devices_stay_where_they_are():
    """q = 6 divides the 6 rows of each of 4 devices: nothing is sent, and the rows are those of one device."""
    x = jnp.arange(48.0).reshape(24, 2)
    taken, filled = take_rows(x, 12, 8), fill_rows(take_rows(x, 12, 8), 12, 24)
    assert run_python(ON_FOUR_DEVICES).strip() == f"4 [] {taken[:, 0].tolist()} {filled[:, 0].tolist()}"
