"""Frechet and kernel distances: public implementations' recorded values, closed forms, streams, files, bad input."""

import dataclasses
import json

import numpy as np
import pytest

from nested.evaluation import frechet
from nested.evaluation import kernel as scores

PAIRS = [
    "full_rank_d2", "full_rank_d16", "full_rank_d48", "identical", "mean_shift_only", "diagonal", "rank_deficient",
    "rank_deficient_identical", "near_singular", "one_zero_cov", "both_zero_cov", "large_scale", "tiny_scale",
]  # fmt: skip


@pytest.fixture(scope="module")
def features():
    """500 samples of 6 correlated features with an offset a thousand times their spread."""
    random = np.random.default_rng(0)
    return 1000.0 + random.normal(size=(500, 6)) @ random.normal(size=(6, 6))


@pytest.mark.parametrize("pair", PAIRS)
def test_frechet_distance_is_the_40_digit_value(golden, pair):
    data = golden("eval_frechet.npz")
    arguments = [data[f"in/{pair}/{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    found = frechet.frechet_distance(*arguments)
    trace = np.trace(arguments[1]) + np.trace(arguments[3])
    assert isinstance(found, float) and found >= 0
    assert abs(found - data[f"out/{pair}/fd_exact"]) <= 1e-7 * trace
    assert found == pytest.approx(frechet.frechet_distance(*arguments[2:], *arguments[:2]), abs=1e-7 * trace)


def test_every_recorded_pair_is_tested(golden):
    assert {key.split("/")[1] for key in golden("eval_frechet.npz") if key.endswith("mu1")} == set(PAIRS)


def test_frechet_distance_of_one_dimension_is_the_closed_form():
    found = frechet.frechet_distance([1.0], [[4.0]], [3.0], [[25.0]])
    assert found == pytest.approx((1 - 3) ** 2 + (2 - 5) ** 2, rel=1e-14)


def test_statistics_are_numpys_and_the_recorded_ones(golden, features):
    fitted = frechet.fit_statistics(features, "toy")
    np.testing.assert_allclose(fitted.mu, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(fitted.sigma, np.cov(features, rowvar=False, ddof=1), rtol=1e-12)
    data = golden("eval_frechet.npz")
    fitted = frechet.fit_statistics(data["in/stats/features"], "toy")
    np.testing.assert_allclose(fitted.mu, data["out/stats/mu"], rtol=1e-13)
    np.testing.assert_allclose(fitted.sigma, data["out/stats/sigma"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sizes", [(500,), (1, 1, 498), (64,) * 7 + (52,), (499, 1)])
def test_streamed_statistics_do_not_depend_on_the_batches(features, sizes):
    batches = np.split(features, np.cumsum(sizes)[:-1])
    streamed = frechet.gather_statistics(iter(batches), "toy")
    halves = frechet.gather_statistics(
        batches[1::2] + batches[::2], "toy"
    )  # another order, as other processes would merge
    for found in (streamed, halves):
        assert (found.count, found.extractor) == (500, "toy")
        np.testing.assert_allclose(found.mu, features.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), rtol=1e-11)


def test_float16_features_are_summed_in_float64():
    features = np.full((4000, 1), 100.0, np.float16)
    features[::2] += 1
    fitted = frechet.gather_statistics(np.split(features, 40), "toy")
    assert fitted.mu[0] == pytest.approx(100.5, rel=1e-15)
    assert fitted.sigma[0, 0] == pytest.approx(0.25 * 4000 / 3999, rel=1e-12)


def test_saved_statistics_load_and_compare(tmp_path, features):
    first, second = frechet.fit_statistics(features[:200], "toy"), frechet.fit_statistics(features[200:], "toy")
    first.save(tmp_path / "first.npz")
    loaded = frechet.load_statistics(tmp_path / "first.npz")
    assert (loaded.count, loaded.extractor) == (200, "toy")
    np.testing.assert_array_equal(loaded.mu, first.mu)
    np.testing.assert_allclose(loaded.sigma, first.sigma, rtol=1e-15)
    expected = frechet.frechet_distance(first.mu, first.sigma, second.mu, second.sigma)
    assert frechet.statistics_distance(loaded, second) == pytest.approx(expected, rel=1e-9)
    merged = loaded.merge(second)
    np.testing.assert_allclose(merged.sigma, np.cov(features, rowvar=False), rtol=1e-11)
    with np.load(tmp_path / "first.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"mu", "sigma", "n", "extractor"}


def test_statistics_that_do_not_belong_together_are_refused(features):
    first = frechet.fit_statistics(features, "EffLite0")
    for join in (frechet.statistics_distance, frechet.Statistics.merge):
        with pytest.raises(ValueError, match="different extractors: EffLite0 and Inception; use one"):
            join(first, dataclasses.replace(first, extractor="Inception"))
        with pytest.raises(ValueError, match="EffLite0 statistics of different dimensions: 6 and 4;"):
            join(first, frechet.fit_statistics(features[:, :4], "EffLite0"))


def test_features_that_give_no_statistics_are_refused(features):
    with pytest.raises(ValueError, match="toy features: no batches"):
        frechet.gather_statistics([], "toy")
    for shape in ((0, 4), (4,), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"toy features: found shape .* expected \[samples > 0, dimension\]"):
            frechet.fit_statistics(np.zeros(shape), "toy")
    one = frechet.fit_statistics(features[:1], "toy")
    with pytest.raises(ValueError, match="covariance of toy features: found 1 sample, need 2 or more"):
        frechet.statistics_distance(one, frechet.fit_statistics(features, "toy"))
    broken = features.copy()
    broken[3, 1], broken[7] = np.nan, np.inf
    with pytest.raises(ValueError, match="toy features: 2 of 500 rows are not finite"):
        frechet.fit_statistics(broken, "toy")
    with pytest.raises(ValueError, match=r"found shapes .*expected \[d\], \[d, d\]"):
        frechet.frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))


def test_files_that_hold_no_statistics_are_refused(tmp_path, features):
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no feature statistics there; run --mode=evaluate"):
        frechet.load_statistics(tmp_path / "none.npz")
    frechet.fit_statistics(features, "toy").save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    contents = {"empty": b"", "text": b"<html>moved</html>", "truncated": whole[: len(whole) // 2]}
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.savez(tmp_path / "keys.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.save(tmp_path / "array.npy", np.zeros(2))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], object), sigma=np.eye(2), n=2, extractor="toy")
    for name in [*contents, "keys", "array", "pickle"]:
        with pytest.raises(ValueError, match=rf"{name}\.npz: not feature statistics .*: .") as error:
            frechet.load_statistics(tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)
    for size, count in ((3, 2), (2, 1)):
        np.savez(tmp_path / "shapes.npz", mu=np.zeros(size), sigma=np.eye(2), n=count, extractor="toy")
        with pytest.raises(ValueError, match=rf"shapes\.npz: found mu \({size},\), sigma \(2, 2\), n {count}; exp"):
            frechet.load_statistics(tmp_path / "shapes.npz")


def test_kernel_distance_is_torch_fidelitys(golden):
    data = golden("eval_is_kid_clip.npz")
    assert "polynomial_mmd degree 3, gamma 1/d, coef 1, unbiased" in json.loads(str(data["meta"]))["what"]
    x, y = data["in/kid_x"], data["in/kid_y"]
    found = scores.kernel_distance(x, y[:150], subset_size=150)
    assert found.mean == pytest.approx(data["out/kid_full_unbiased_n150"], rel=2e-6)
    result = scores.kernel_distance(x, y, subsets=20, subset_size=60)
    assert result.mean == pytest.approx(data["out/kid_subsets20x60_mean"], rel=2e-5)
    assert result.std == pytest.approx(data["out/kid_subsets20x60_std"], rel=2e-5)
    assert (result.subsets, result.subset_size, result.note) == (20, 60, "")


def mean_over_pairs(x, y):
    """MMD^2 by its definition, pair by pair."""

    def kernel(a, b):
        return (np.dot(a, b) / len(a) + 1) ** 3

    within = [np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


@pytest.mark.parametrize(("tile", "n", "m"), [(2048, 10, 13), (3, 10, 13), (3, 13, 10)])
def test_kernel_distance_is_the_mean_over_pairs_of_drawn_subsets(monkeypatch, tile, n, m):
    monkeypatch.setattr(scores, "TILE", tile)
    random = np.random.default_rng(1)
    x, y = random.normal(size=(n, 3)), random.normal(size=(m, 3))
    draws, values = np.random.RandomState(5), []
    for _ in range(4):
        rows_x, rows_y = draws.choice(n, 6, replace=False), draws.choice(m, 6, replace=False)
        values.append(mean_over_pairs(x[rows_x], y[rows_y]))
    found = scores.kernel_distance(x, y, subsets=4, subset_size=6, seed=5)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values), rel=1e-12)


def test_kernel_distance_is_unbiased_and_grows_with_the_shift():
    random = np.random.default_rng(2)
    x, y = random.normal(size=(2, 3000, 8))
    same = scores.kernel_distance(x, y, subsets=100, subset_size=200)
    assert abs(same.mean) < 0.2 * same.std  # a biased estimate would be near k(x, x) / 200, several std
    shifted = [scores.kernel_distance(x, y + shift, subsets=10, subset_size=200).mean for shift in (0.2, 0.5, 1.0)]
    assert same.mean + same.std < shifted[0] < shifted[1] < shifted[2]


def test_kernel_distance_is_a_function_of_its_seed():
    random = np.random.default_rng(3)
    x, y = random.normal(size=(2, 50, 4))
    first, again, other = (scores.kernel_distance(x, y, 5, 10, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.mean != other.mean


def test_kernel_distance_of_few_samples_says_so():
    random = np.random.default_rng(4)
    x, y = random.normal(size=(30, 4)), random.normal(size=(40, 4))
    fewer = scores.kernel_distance(x, y, subsets=3, subset_size=1000)
    assert (fewer.subsets, fewer.subset_size) == (3, 30) and fewer.std > 0
    assert fewer.note == "subsets of 30 samples instead of 1000: there are no more"
    whole = scores.kernel_distance(x, y[:30], subsets=3, subset_size=1000)
    assert (whole.subsets, whole.subset_size, whole.std) == (1, 30, 0)
    assert whole.mean == pytest.approx(mean_over_pairs(x, y[:30]), rel=1e-10)
    assert whole.note == "one subset of all 30 samples: there are no more, so no spread is known"


def test_features_without_a_kernel_distance_are_refused():
    x = np.zeros((5, 3))
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\), expected \[N, d\] and \[M, d\] of one d"):
        scores.kernel_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="need 2 or more samples of each"):
        scores.kernel_distance(x, x[:1])
    for subsets, size in ((0, 2), (1, 1)):
        with pytest.raises(ValueError, match=f"{subsets} subsets of {size}; need"):
            scores.kernel_distance(x, x, subsets, size)
    with pytest.raises(ValueError, match="not finite"):
        scores.kernel_distance(x, x + np.nan)
