"""nested/evaluation/nearest.py: against distances in float64 and votes counted one by one."""

import numpy as np
import pytest
from helpers.neighbors import by_definition

from nested.evaluation import nearest


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 points and 32 queries, so that 150 x 90 take several, padded at the end."""
    monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(nearest, "QUERY_ROWS", 32)


def test_nearest_is_the_definition(small_blocks):
    random = np.random.default_rng(0)
    queries, points = random.normal(size=(90, 3, 2)), random.normal(size=(150, 3, 2)).astype(np.float32)
    seen = []
    distances, indices = nearest.nearest_neighbors(queries.astype(np.float32), points, 7, report=seen.append)
    expected, places = by_definition(queries.astype(np.float32), points, 7)
    np.testing.assert_array_equal(indices, places)
    np.testing.assert_allclose(distances, expected, rtol=1e-6)
    assert seen == sorted(seen) and seen[-1] == 90 * 150 and len(seen) == 9


def test_a_query_is_not_its_own_neighbour(small_blocks):
    points = np.random.default_rng(1).normal(size=(150, 4)).astype(np.float32)
    own = np.arange(0, 150, 2)
    _, indices = nearest.nearest_neighbors(points[own], points, 3, own)
    np.testing.assert_array_equal(indices, by_definition(points[own], points, 3, own)[1])
    _, itself = nearest.nearest_neighbors(points[own], points, 1)
    np.testing.assert_array_equal(itself[:, 0], own)


def test_distances_far_below_the_norms_keep_their_digits():
    """Five points at 1e-4 |p| from each query, where |q|^2 + |p|^2 - 2 q.p has no digit left in float32."""
    random = np.random.default_rng(2)
    points = (100 * random.normal(size=(40, 50))).repeat(5, axis=0)
    points = (points + 1e-2 * random.normal(size=points.shape)).astype(np.float32)
    queries = points[::10] + (1e-2 * random.normal(size=(20, 50))).astype(np.float32)
    distances, indices = nearest.nearest_neighbors(queries, points, 2)
    expected, places = by_definition(queries, points, 2)
    np.testing.assert_array_equal(indices, places)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_equal_points_come_in_the_order_of_their_indices(small_blocks):
    """Also where they are in different blocks: 200 points of 5 kinds."""
    kinds = np.random.default_rng(3).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    points = kinds[np.arange(200) % 5]
    distances, indices = nearest.nearest_neighbors(kinds, points, 4)
    np.testing.assert_array_equal(indices, np.arange(5)[:, None] + [[0, 5, 10, 15]])
    assert not distances.any()


def test_a_stream_counts_on(small_blocks):
    random = np.random.default_rng(4)
    queries, points = random.integers(0, 256, (8, 5), np.uint8), random.integers(0, 256, (130, 5), np.uint8)
    stream = nearest.NearestStream(queries, 3, own=np.array([-1] * 7 + [100]))
    for part in np.split(points, [1, 70]):
        stream.add(part)
    distances, indices = stream.result()
    expected, places = by_definition(queries, points, 4)
    keep = [[i for i in row if (q, i) != (7, 100)][:3] for q, row in enumerate(places)]
    np.testing.assert_array_equal(indices, keep)
    np.testing.assert_allclose(distances[:7], expected[:7, :3], rtol=1e-6)


def test_what_there_is_too_little_of():
    points = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="3 asked for among 3 points; ask for fewer"):
        nearest.nearest_neighbors(points, points, 3, own=np.arange(3))
    with pytest.raises(ValueError, match="k is 0; give 1 or more"):
        nearest.NearestStream(points, 0)


def test_votes_and_ties():
    """Two of 1 and two of 2: the nearest of the four decides; three votes outweigh any nearness."""
    labels = np.array([[2, 1, 1, 2], [0, 1, 1, 2], [0, 2, 2, 0], [2, 1, 1, 1]])
    np.testing.assert_array_equal(nearest.majority_vote(labels, 3), [2, 1, 0, 1])


@pytest.mark.parametrize("k", [1, 4, 20])
def test_accuracy_is_the_definition(k):
    """Leave-one-out, one image at a time: the most votes, and of the tied the class that comes first."""
    random = np.random.default_rng(5)
    labels = random.integers(0, 3, 200)
    points = random.normal(size=(200, 4)) + labels[:, None]
    _, neighbours = by_definition(points, points, k, own=np.arange(200))
    right = 0
    for row, label in zip(labels[neighbours].tolist(), labels, strict=True):
        right += max(row, key=row.count) == label  # max() gives the first of those that are largest
    assert nearest.knn_accuracy(neighbours, labels, 3) == right / 200 > 0.5
