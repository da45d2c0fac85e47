"""Frechet distance between two sets of features, each described by its mean and covariance.

    d^2 = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))                 (Heusel et al. 2017, arXiv:1706.08500)

With Inception pool3 features this is FID; with others it carries the name of its extractor (FD-EffLite0), never FID.

The trace term: S1^(1/2) S2 S1^(1/2) is symmetric and has the eigenvalues of S1 S2, so tr((S1 S2)^(1/2)) is the sum of
the square roots of its eigenvalues, those that rounding made negative set to 0. The public code (guided-diffusion,
pytorch-fid) takes a general matrix square root and adds 1e-6 to the diagonals where that fails; the form here is always
real, needs no such branch, and is at least as close to the exact value. float64 throughout.

Statistics are summed batch by batch about each batch's own mean and merged by the pairwise formula of Chan, Golub and
LeVeque (1979), which subtracts no large numbers from each other; in any order and any split, to rounding.
"""

import dataclasses
import functools
import io
import os
import pathlib
import zipfile
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from nested.runtime.files import atomic_write


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of `count` feature vectors of one extractor; made by the functions below."""

    extractor: str  # whose features, e.g. "EffLite0"; distances between two extractors are refused
    count: int
    mu: np.ndarray  # [d] float64
    scatter: np.ndarray  # [d, d] float64, sum over samples of (x - mu)(x - mu)^T

    @property
    def sigma(self) -> np.ndarray:
        """Covariance [d, d], divided by count - 1 as numpy.cov and the public FID code do."""
        if self.count < 2:
            raise ValueError(f"covariance of {self.extractor} features: found {self.count} sample, need 2 or more")
        return self.scatter / (self.count - 1)

    def merge(self, other: "Statistics") -> "Statistics":
        """The exact statistics of both sets together. Raises ValueError for another extractor or dimension."""
        _check_comparable(self, other)
        count = self.count + other.count
        delta = other.mu - self.mu
        between = np.outer(delta, delta) * (self.count * other.count / count)
        mu = self.mu + delta * (other.count / count)
        return Statistics(self.extractor, count, mu, self.scatter + other.scatter + between)

    def save(self, path: str | os.PathLike) -> None:
        """Writes mu, sigma, n and extractor to an .npz file that is either complete or absent."""
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mu, sigma=self.sigma, n=np.int64(self.count), extractor=np.str_(self.extractor))
        atomic_write(path, buffer.getvalue())


def fit_statistics(features: ArrayLike, extractor: str) -> Statistics:
    """The statistics of features [N, d] of any real type. Raises ValueError if there are none, or one is not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{extractor} features: found shape {features.shape}, expected [samples > 0, dimension]")
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    if bad:
        raise ValueError(f"{extractor} features: {bad} of {len(features)} rows are not finite; check the images given")
    mu = features.mean(axis=0)
    centred = features - mu
    return Statistics(extractor, len(features), mu, centred.T @ centred)


def gather_statistics(batches: Iterable[ArrayLike], extractor: str) -> Statistics:
    """The statistics of a stream of feature batches [n, d]; n may vary. One batch is in memory at a time.

    Raises ValueError if there are no batches, and as fit_statistics does."""
    fitted = (fit_statistics(batch, extractor) for batch in batches)
    first = next(fitted, None)
    if first is None:
        raise ValueError(f"{extractor} features: no batches; check that the data set or sample file is not empty")
    return functools.reduce(Statistics.merge, fitted, first)


def load_statistics(path: str | os.PathLike) -> Statistics:
    """The statistics in a file of Statistics.save. Raises FileNotFoundError, or ValueError for any other file."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no feature statistics there; run --mode=evaluate once to make them")
    try:
        with np.load(path, allow_pickle=False) as archive:
            mu, sigma, count, extractor = (archive[name] for name in ("mu", "sigma", "n", "extractor"))
    except (KeyError, ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not feature statistics (.npz of mu, sigma, n, extractor): {error}") from error
    count = int(count)
    if mu.ndim != 1 or sigma.shape != mu.shape * 2 or count < 2:
        found = f"mu {mu.shape}, sigma {sigma.shape}, n {count}"
        raise ValueError(f"{path}: found {found}; expected mu [d], sigma [d, d], n of 2 or more")
    return Statistics(str(extractor), count, np.asarray(mu, np.float64), np.asarray(sigma, np.float64) * (count - 1))


def statistics_distance(first: Statistics, second: Statistics) -> float:
    """The Frechet distance of two Statistics, in squared feature units. Raises ValueError for different extractors."""
    _check_comparable(first, second)
    return frechet_distance(first.mu, first.sigma, second.mu, second.sigma)


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """The Frechet distance of N(mu1 [d], sigma1 [d, d]) and N(mu2, sigma2), in squared feature units, 0 or more.

    Its error against a 40-digit computation is 2e-14 of the trace for regular covariances, and 2e-8 for singular ones.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, np.float64) for array in (mu1, sigma1, mu2, sigma2))
    shapes = [array.shape for array in (mu1, sigma1, mu2, sigma2)]
    if shapes != [mu1.shape, mu1.shape * 2] * 2 or mu1.ndim != 1:
        raise ValueError(f"frechet_distance: found shapes {shapes}, expected [d], [d, d], [d], [d, d] of one d")
    eigenvalues, basis = np.linalg.eigh(sigma1)
    root = basis * np.sqrt(eigenvalues.clip(0)) @ basis.T
    eigenvalues = np.linalg.eigvalsh(root @ sigma2 @ root)
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues.clip(0)).sum()
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + trace))


def _check_comparable(first: Statistics, second: Statistics) -> None:
    if first.extractor != second.extractor:
        raise ValueError(
            f"statistics of different extractors: {first.extractor} and {second.extractor}; use one extractor for both"
        )
    if first.mu.shape != second.mu.shape:
        raise ValueError(
            f"{first.extractor} statistics of different dimensions: {len(first.mu)} and {len(second.mu)}; "
            "compute both at the same feature layer"
        )
