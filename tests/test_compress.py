"""Streaming statistics against whole-data algebra, pooling against its definition, codecs against their inverses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested.encoders import grids
from nested.spaces import svd
from nested.spaces.features import fit_features
from nested.spaces.patch_pca import PatchSpace, patchify, unpatchify
from nested.spaces.pixels import DOWNSAMPLINGS, Images, Pyramid, normalise


def features(seed, images=60, grid=(3, 4), channels=7, offset=3.0):
    """Correlated features with a mean far from zero (what breaks sums of raw squares), neighbours alike."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels)) * 0.6 ** np.arange(channels)
    x = rng.normal(size=(images, *grid, channels)) + rng.normal(size=(images, 1, 1, channels))
    return (x @ mixing.T + offset).astype(np.float32)


def stream(x, batch=16, per_position=False):
    """Through CovarianceStream in batches of one size, the last filled up with junk."""
    sums = svd.CovarianceStream(per_position)
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        padded = np.concatenate([part, np.full((batch - len(part), *x.shape[1:]), np.nan, np.float32)])
        assert sums.add(jnp.asarray(padded), len(part)).all()
    return sums.result()


def test_streamed_basis_equals_svd_of_the_whole():
    x = features(0)
    basis = svd.fit_basis(stream(x), components=4)
    rows = x.reshape(-1, 7).astype(np.float64)
    _, singular, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(basis.mean[0], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(basis.variances[0], singular**2 / len(rows), rtol=2e-5)
    assert basis.vectors.shape == (1, 7, 4) and basis.components == 4
    (vectors,) = basis.vectors
    np.testing.assert_allclose(np.abs(np.sum(vectors * right[:4].T, 0)), 1.0, atol=1e-6)
    assert (vectors[np.abs(vectors).argmax(0), np.arange(4)] > 0).all()
    share = np.cumsum(singular**2)[:4] / np.sum(singular**2)
    np.testing.assert_allclose(basis.explained_variance(), share, rtol=1e-5)


def test_without_centring_the_svd_is_of_the_features_themselves():
    x = features(0)
    basis = svd.fit_basis(stream(x), 4, center=False)
    rows = x.reshape(-1, 7).astype(np.float64)
    _, singular, right = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_array_equal(basis.mean, np.zeros((1, 7)))
    np.testing.assert_allclose(basis.variances[0], singular**2 / len(rows), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(basis.vectors[0] * right[:4].T, 0)), 1.0, atol=1e-6)
    np.testing.assert_allclose(np.abs(svd.project(x, *floats(basis))), np.abs(x @ right[:4].T), atol=1e-4)


def floats(basis):
    return np.float32(basis.mean), np.float32(basis.vectors)


@pytest.mark.parametrize("center", [True, False])
def test_a_basis_per_position_is_the_svd_of_each_position(center):
    x = features(11)
    basis = svd.fit_basis(stream(x, per_position=True), 4, center)
    assert basis.vectors.shape == (12, 7, 4)
    total, projected = 0.0, np.asarray(svd.project(x, *floats(basis))).reshape(60, 12, 4)
    for position in range(12):
        rows = x.reshape(60, 12, 7)[:, position].astype(np.float64)
        rows = rows - rows.mean(0) * center
        _, singular, right = np.linalg.svd(rows, full_matrices=False)
        np.testing.assert_allclose(basis.variances[position], singular**2 / 60, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(np.abs(projected[:, position]), np.abs(rows @ right[:4].T), atol=2e-4)
        total += np.cumsum(singular**2)
    np.testing.assert_allclose(basis.explained_variance(), total[:4] / total[-1], rtol=1e-5)


def test_one_position_has_the_shared_basis():
    x = features(12, grid=(1, 1))
    shared, own = (svd.fit_basis(stream(x, per_position=some), 3) for some in (False, True))
    for one, other in zip(vars(shared).values(), vars(own).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_an_svd_projected_features_are_the_features():
    x = features(13)
    basis = svd.identity_basis(stream(x))
    np.testing.assert_array_equal(svd.project(x, *floats(basis)), x)
    rows = x.reshape(-1, 7).astype(np.float64)
    np.testing.assert_allclose(basis.variances[0], rows.var(0), rtol=1e-5)
    np.testing.assert_allclose(basis.explained_variance(), np.cumsum(rows.var(0)) / rows.var(0).sum(), rtol=1e-5)


@pytest.mark.parametrize("center", [True, False])
def test_a_basis_behind_a_linear_map(center):
    """The basis of y = (x - m) W, from the covariance of x: through() and after() undo each other."""
    rng = np.random.default_rng(14)
    x, shift, mixing = features(14), rng.normal(size=7), rng.normal(size=(7, 3))
    y = ((x - shift) @ mixing).astype(np.float32)
    expected = svd.fit_basis(stream(y), 2, center)
    found = svd.fit_basis(stream(x).through(shift, mixing), 2, center)
    np.testing.assert_allclose(found.variances, expected.variances, rtol=1e-4)
    behind = found.after(shift, mixing)
    np.testing.assert_allclose(svd.project(x, *floats(behind)), svd.project(y, *floats(expected)), atol=2e-3)


def test_a_large_offset_costs_no_accuracy():
    """The first batch's mean is subtracted before squares are summed: a mean of 1000 deviations still leaves 1e-4."""
    plain, shifted = stream(features(1, offset=0.0)), stream(features(1, offset=0.0) + np.float32(1000.0))
    np.testing.assert_allclose(shifted.scatter, plain.scatter, atol=1e-4 * np.abs(plain.scatter).max())


def test_merged_shards_equal_one_pass():
    x = features(2)
    whole = stream(x)
    parts = [stream(x[:16]), stream(x[16:21]), stream(x[21:])]
    merged = functools.reduce(svd.Covariance.merge, parts)
    assert merged.n == whole.n == 60 * 12
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-6)
    assert merged.scatter.shape == (1, 7, 7)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-4, atol=1e-4)
    rows = x.reshape(-1, 7).astype(np.float64)
    first, second, both = (exact(part) for part in (rows[:100], rows[100:], rows))
    np.testing.assert_allclose(first.merge(second).scatter, both.scatter, rtol=1e-12)


def exact(rows):
    return svd.Covariance(len(rows), rows.mean(0)[None], np.cov(rows.T, bias=True)[None] * len(rows))


def test_not_finite_images_are_reported():
    x = features(3, images=8)
    x[2, 1, 1, 0], x[5, 0, 0, 3] = np.nan, np.inf
    finite = svd.CovarianceStream().add(jnp.asarray(x), 6)
    assert np.flatnonzero(~finite).tolist() == [2, 5]


def test_explained_variance_of_constant_data():
    basis = svd.fit_basis(stream(np.full((4, 1, 1, 3), 2.0, np.float32)), 2)
    np.testing.assert_array_equal(basis.explained_variance(), [1.0, 1.0])


def test_hash_follows_the_basis():
    basis = svd.fit_basis(stream(features(0)), 3)
    assert basis.sha256() == svd.fit_basis(stream(features(0)), 3).sha256()
    assert basis.sha256() != svd.fit_basis(stream(features(1)), 3).sha256()


@pytest.mark.parametrize("size, pooled", [(14, 8), (14, 14), (7, 1), (5, 3), (4, 2)])
def test_adaptive_pooling_is_the_mean_of_its_window(size, pooled):
    x = np.random.default_rng(0).normal(size=size)
    windows = [(math.floor(i * size / pooled), math.ceil((i + 1) * size / pooled)) for i in range(pooled)]
    expected = [np.mean(x[start:stop]) for start, stop in windows]
    np.testing.assert_allclose(grids.pooling_matrix(size, pooled) @ x, expected, atol=1e-14)
    grid = np.outer(x, x[::-1]).astype(np.float32)[None, :, :, None]
    found = grids.adaptive_pool(grid, pooled)[0, :, :, 0]
    np.testing.assert_allclose(found, np.outer(expected, [np.mean(x[::-1][a:b]) for a, b in windows]), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 5), (2, 3, 2), (3, 1, 4)])
def test_pooled_standardisation_equals_brute_force(shape):
    z = features(4, channels=5).astype(np.float16)
    moments = svd.Moments.of_batch(z[:23]).merge(svd.Moments.of_batch(z[23:]))
    assert moments.n == 60
    transform = fit_features(moments, (3, 4), shape)
    rows, columns = grids.pooling_matrix(3, shape[0]), grids.pooling_matrix(4, shape[1])
    pooled = np.einsum("bhwk,ih,jw->bijk", z.astype(np.float64), rows, columns)[..., : shape[2]]
    np.testing.assert_allclose(transform.mean, pooled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(transform.std, pooled.std((0, 1, 2)), rtol=1e-10)
    y = np.asarray(jax.jit(lambda z: transform.variable({"": z}, None))(z))
    assert y.shape == (60, *shape) and y.dtype == np.float32
    np.testing.assert_allclose(y, (pooled - pooled.mean((0, 1, 2))) / pooled.std((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1.0, atol=1e-5)


def test_a_channel_without_variance_is_refused():
    z = features(5, channels=4)
    z[..., 2] = 1.5
    with pytest.raises(ValueError, match="channel 2 of 4 has no variance left.*use at most 2 channels"):
        fit_features(svd.Moments.of_batch(z), (3, 4), (1, 1, 4))


def test_information_is_the_mean_divergence():
    rng = np.random.default_rng(6)
    z = rng.normal(size=(1000, 5))
    z = (z - z.mean(0)) / z.std(0)
    for sigma in (0.3, 1.0, 2.0):  # KL(N(z, s^2 I) || N(0, I)) = (d s^2 + |z|^2 - d - d log s^2) / 2 nats
        nats = 0.5 * (5 * sigma**2 + (z**2).sum(1) - 5 - 5 * math.log(sigma**2))
        assert svd.information_bits(5, sigma) == pytest.approx(nats.mean() / math.log(2), rel=1e-12)
    assert svd.information_bits(5, 0) == math.inf


def test_patchify_round_trip_and_order():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    patches = patchify(x, 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(unpatchify(patches, 2), x)


def test_pixels_round_trip_and_clip():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    space = Images((16, 16, 1))
    z = space.variable({"image": images}, None)
    assert float(z.min()) == -1.0 and float(z.max()) == 1.0
    np.testing.assert_array_equal(space.decode(z, {}), images)
    np.testing.assert_array_equal(space.decode(jnp.array([-3.0, -0.001, 0.001, 3.0]), {}), [0, 127, 128, 255])


def variable(space, images):
    return jax.jit(lambda image: space.variable({"image": image}, None))(images)


def images_and_codec(channels, patch=4):
    """Smooth 16 x 16 colour images, and the codec fitted to them."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 256, (50, 4, 4, 3)).astype(np.float32)
    images = np.asarray(jax.image.resize(coarse, (50, 16, 16, 3), "bilinear")).round().astype(np.uint8)
    patches = patchify(normalise(images), patch)
    basis = svd.fit_basis(stream(np.asarray(patches)), channels)
    return images, PatchSpace.from_basis(basis, patch, (4, 4, channels)), basis


def test_patch_pca_is_exact_at_full_rank():
    images, codec, _ = images_and_codec(48)
    z = variable(codec, images)
    assert z.shape == (50, 4, 4, 48) and z.dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(codec.decode)(z, {}), images)


def test_patch_pca_keeps_what_it_says():
    """Truncated: the mean squared error is the sum of the dropped eigenvalues, and the variance of z over all is 1."""
    images, codec, basis = images_and_codec(8)
    z = np.asarray(variable(codec, images), np.float64)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0.0, atol=1e-5)
    assert np.mean(z**2) == pytest.approx(1.0, rel=1e-5)
    x = np.asarray(patchify(normalise(images), 4), np.float64)
    error = x - (z / codec.scale @ codec.vectors.T.astype(np.float64) + codec.mean)
    assert (error**2).sum(-1).mean() == pytest.approx(basis.variances[0, 8:].sum(), rel=1e-4)
    assert 0.5 < basis.explained_variance()[-1] < 1.0


def test_patch_pca_refuses_flat_images():
    basis = svd.fit_basis(stream(np.zeros((4, 1, 1, 4), np.float32)), 2)
    with pytest.raises(ValueError, match="images do not vary"):
        PatchSpace.from_basis(basis, 2, (1, 1, 2))


# --- resolutions of one image ----------------------------------------------------------------------------------------


def test_a_pyramid_averages_blocks():
    images = np.random.default_rng(8).integers(0, 256, (3, 8, 12, 2), np.uint8)
    pyramid = Pyramid(((2, 3, 2), (4, 6, 2), (8, 12, 2)))
    coarse, middle, fine = variable(pyramid, images)
    x = images / 127.5 - 1
    np.testing.assert_allclose(fine, x, atol=1e-6)
    np.testing.assert_allclose(middle[1, 2, 3], x[1, 4:6, 6:8].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(coarse[2, 1, 2], x[2, 4:8, 8:12].mean((0, 1)), atol=1e-6)
    np.testing.assert_array_equal(pyramid.decode((coarse, middle, fine), {}), images)


@pytest.mark.parametrize("factor", [2, 4])
def test_bilinear_looks_at_the_four_pixels_in_the_middle_of_a_block(factor):
    images = np.random.default_rng(9).integers(0, 256, (2, 8, 8, 1), np.uint8)
    side = 8 // factor
    found = variable(Pyramid((side, side, 1), "bilinear"), images)
    blocks = (images / 127.5 - 1).reshape(2, side, factor, side, factor, 1)
    middle = slice(factor // 2 - 1, factor // 2 + 1)
    np.testing.assert_allclose(found, blocks[:, :, middle][:, :, :, :, middle].mean((2, 4)), atol=1e-6)


def test_a_pyramid_of_a_clip_may_begin_with_its_first_frame():
    clips = np.random.default_rng(10).integers(0, 256, (2, 3, 4, 4, 1), np.uint8)
    for downsampling in DOWNSAMPLINGS:
        pyramid = Pyramid(((2, 2, 1), (3, 2, 2, 1), (3, 4, 4, 1)), downsampling)
        first, low, whole = variable(pyramid, clips)
        assert (first.shape, low.shape) == ((2, 2, 2, 1), (2, 3, 2, 2, 1))
        np.testing.assert_allclose(first, low[:, 0], atol=1e-6)
        np.testing.assert_allclose(low[1, 2, 0, 1], (clips[1, 2, :2, 2:] / 127.5 - 1).mean((0, 1)), atol=1e-6)
        np.testing.assert_array_equal(pyramid.decode((first, low, whole), {}), clips)


def test_a_pyramid_of_one_resolution():
    images = np.full((2, 4, 4, 1), 255, np.uint8)
    pyramid = Pyramid((2, 2, 1))
    z = variable(pyramid, images)
    np.testing.assert_array_equal(z, np.ones((2, 2, 2, 1)))
    np.testing.assert_array_equal(pyramid.decode(z, {}), images[:, :2, :2])


def test_unknown_downsampling():
    with pytest.raises(ValueError, match="downsampling 'bicubic' is not known: use one of .'average', 'bilinear'.$"):
        Pyramid((2, 2, 1), "bicubic")
