"""Compression of encoder features: streamed SVD basis, pooling, truncation, standardisation (Nested Diffusion, 3.3).

A FEATURE is a grid [B, h, w, C]: an encoder vector of the whole image is 1x1xC, of M x M crops MxMxC, a feature map
g x g x C, image patches (H/f)x(W/f)x(f f C). One path serves all of them:

    x - mean -> basis [C, K]                 leading right singular vectors of the centred data (Covariance -> Basis)
      -> adaptive average pooling to (h', w')                        -> the first d of the K channels
      -> (. - m_k) / s_k                     per-channel statistics over images and positions (Moments)

The basis needs the covariance over all images and positions: Gram matrices in float32 on the device per batch, about
the mean of the first batch, summed in float64 on the host (float32 sums lose the trailing components). The statistics
m, s of ANY pooling and truncation follow in closed form from the second moments between positions,

    y_p' = sum_p A_p'p x_p,   E[y_k] = mean_p' (A S1_k),   E[y_k^2] = mean_p' (A S2_k A^T)_p'p',

so a level's shape can change without encoding again. Both kinds of sums merge: any number of shards gives one result.

The paper does not say whether CVPR's basis is shared between positions or whether features are centred, nor repeats
the standardisation of the ICLR version. All three are options: a basis per position is a group of its own in the sums
(G groups: 1, or as many as positions), without centring the SVD is of the second moment about zero, and without SVD the
channels stay as they are. The default is shared, centred and standardised, because sigma in {0, .5, 1} presupposes unit
variance. RCG standardises each image's vector by itself (ddpm.py:573-581: unbiased variance, no epsilon). Host
arithmetic is numpy float64 throughout.
"""

import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np

# --- pass 1: covariance and basis --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Covariance:
    """Sums over n vectors of C channels in each of G groups, float64: n, mean [G, C] and
    scatter [G, C, C] = sum (x - mean)(x - mean)^T."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    def merge(self, other: "Covariance") -> "Covariance":
        """The same sums over both sets (Chan, Golub & LeVeque 1979)."""
        n = self.n + other.n
        delta = other.mean - self.mean
        between = _outer(delta) * (self.n * other.n / n)
        return Covariance(n, self.mean + delta * (other.n / n), self.scatter + other.scatter + between)

    def through(self, mean_C: np.ndarray, vectors_CK: np.ndarray) -> "Covariance":
        """The sums of (x - mean) @ vectors in place of x."""
        return Covariance(self.n, (self.mean - mean_C) @ vectors_CK, vectors_CK.T @ self.scatter @ vectors_CK)


def _outer(x_GC: np.ndarray) -> np.ndarray:
    return x_GC[:, :, None] * x_GC[:, None, :]


def _groups(x_BhwC, per_position):
    """[B, h, w, C] -> [G, N, C]: one group of all vectors, or one per position."""
    channels = x_BhwC.shape[-1]
    if per_position:
        return x_BhwC.reshape(len(x_BhwC), -1, channels).swapaxes(0, 1)
    return x_BhwC.reshape(1, -1, channels)


@functools.partial(jax.jit, static_argnames=("per_position",))
def _gram(x_BhwC, shift_GC, mask_B, per_position):
    """Sum [G, C] and Gram matrix [G, C, C] of x - shift over the images of mask 1, float32; and which are finite."""
    finite = jnp.isfinite(x_BhwC).all((1, 2, 3)) | (mask_B == 0)
    mask = jnp.broadcast_to(mask_B[:, None, None, None], (*x_BhwC.shape[:3], 1))
    # a padding image adds 0, also where its features are not finite
    x = jnp.where(_groups(mask, per_position) > 0, _groups(x_BhwC, per_position) - shift_GC[:, None], 0.0)
    gram = jnp.einsum("gnc,gnd->gcd", x, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return x.sum(1), gram, finite


class CovarianceStream:
    """Adds batches of features up to a Covariance: Gram matrices on the device, sums in float64 on the host, which
    takes a batch's when the next one is on its way. per_position: a group for every position."""

    def __init__(self, per_position: bool = False):
        self._per_position = per_position
        self._shift: np.ndarray | None = None
        self._vectors = 0
        self._sum: np.ndarray | float = 0.0
        self._gram: np.ndarray | float = 0.0
        self._on_device: tuple[jax.Array, jax.Array] | None = None

    def add(self, x_BhwC: jax.Array, valid: int) -> jax.Array:
        """x_BhwC: features [B, h, w, C], of which the first `valid` images count. Returns which of those are finite:
        bool [B], true for the others, still on the device."""
        if self._shift is None:
            mean = _groups(np.asarray(x_BhwC[:valid], np.float64), self._per_position).mean(1)
            self._shift = np.where(np.isfinite(mean), mean, 0.0).astype(np.float32)
        mask = (np.arange(x_BhwC.shape[0]) < valid).astype(np.float32)
        total, gram, finite = _gram(x_BhwC, self._shift, mask, self._per_position)
        self._collect()
        self._on_device = total, gram
        self._vectors += valid * (1 if self._per_position else x_BhwC.shape[1] * x_BhwC.shape[2])
        return finite

    def _collect(self) -> None:
        if self._on_device:
            total, gram = self._on_device
            self._sum = self._sum + np.asarray(total, np.float64)
            self._gram = self._gram + np.asarray(gram, np.float64)
            self._on_device = None

    def result(self) -> Covariance:
        """The sums over everything that was added. Raises ValueError if nothing was."""
        self._collect()
        if self._shift is None:
            raise ValueError("the covariance of no features at all: add some first")
        n, mean = self._vectors, np.asarray(self._sum / self._vectors)
        return Covariance(n, self._shift.astype(np.float64) + mean, self._gram - n * _outer(mean))


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """A linear map of features (x - mean) @ vectors in each of G groups, float64.

    mean [G, C]; vectors [G, C, K], orthonormal columns, leading first (of a codec's latents: of the latents);
    variances [G, D]: along all of the D >= K axes, the kept ones first (about zero where features are not centred).
    """

    mean: np.ndarray
    vectors: np.ndarray
    variances: np.ndarray

    @property
    def components(self) -> int:
        return self.vectors.shape[2]

    def explained_variance(self) -> np.ndarray:
        """Share of the variance kept by the first 1, 2, ..., K channels, [K]; 1 for data that do not vary at all."""
        total = self.variances.sum()
        kept = np.cumsum(self.variances.sum(0)[: self.components])
        return kept / total if total > 0 else np.ones_like(kept)

    def share(self, channels: int) -> float:
        """The share of the variance that the first `channels` channels keep."""
        return float(self.explained_variance()[channels - 1])

    def after(self, mean_C: np.ndarray, vectors_CD: np.ndarray) -> "Basis":
        """The basis of D channels made from (x - mean) @ vectors, as one of x. vectors: of full column rank."""
        mean = mean_C + self.mean @ np.linalg.pinv(vectors_CD)
        return Basis(mean, vectors_CD @ self.vectors, self.variances)

    def sha256(self) -> str:
        """The sha256 of the three arrays, in hex."""
        digest = hashlib.sha256()
        for array in (self.mean, self.vectors, self.variances):
            digest.update(np.ascontiguousarray(array, "<f8").tobytes())
        return digest.hexdigest()


def fit_basis(covariance: Covariance, components: int, center: bool = True) -> Basis:
    """The leading min(components, C) eigenvectors; the largest entry of each is positive, so that signs are fixed."""
    mean = covariance.mean if center else np.zeros_like(covariance.mean)
    moment = covariance.scatter / covariance.n
    eigenvalues, vectors = np.linalg.eigh(moment if center else moment + _outer(covariance.mean))
    eigenvalues, vectors = np.maximum(eigenvalues[:, ::-1], 0.0), vectors[:, :, ::-1][:, :, :components]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], 1)
    return Basis(mean, vectors * np.where(largest < 0, -1.0, 1.0), eigenvalues)


def identity_basis(covariance: Covariance) -> Basis:
    """All channels as they are: no rotation, no mean."""
    groups, channels = covariance.mean.shape
    vectors = np.tile(np.eye(channels), (groups, 1, 1))
    return Basis(np.zeros_like(covariance.mean), vectors, np.einsum("gcc->gc", covariance.scatter) / covariance.n)


@jax.jit
def project(x_BhwC: jax.Array, mean_GC: np.ndarray, vectors_GCK: np.ndarray) -> jax.Array:
    """(x - mean) @ vectors in float32: [B, h, w, C] -> [B, h, w, K]."""
    batch, height, width, channels = x_BhwC.shape
    x = x_BhwC.astype(jnp.float32).reshape(batch, -1, channels) - mean_GC[None]
    if len(mean_GC) == 1:
        z = jnp.einsum("bpc,ck->bpk", x, vectors_GCK[0], precision=jax.lax.Precision.HIGHEST)
    else:
        z = jnp.einsum("bpc,pck->bpk", x, vectors_GCK, precision=jax.lax.Precision.HIGHEST)
    return z.reshape(batch, height, width, -1)


# --- pass 2: moments between positions ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Sums over n images of a grid of P = h w positions and K channels: first [K, P], second [K, P, P], float64."""

    n: int
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def of_batch(cls, z_BhwK: np.ndarray) -> "Moments":
        """The moments of one batch of projected features (numpy, any float type)."""
        z_KBP = np.ascontiguousarray(z_BhwK.reshape(len(z_BhwK), -1, z_BhwK.shape[-1]).transpose(2, 0, 1), np.float64)
        return cls(len(z_BhwK), z_KBP.sum(1), z_KBP.transpose(0, 2, 1) @ z_KBP)

    def merge(self, other: "Moments") -> "Moments":
        """The same sums over both sets."""
        return Moments(self.n + other.n, self.first + other.first, self.second + other.second)


def standardisation(moments: Moments, pooling: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and standard deviation [d] of each of the first d channels after pooling [P', P], over images and
    positions, float64. Raises ValueError for a channel that does not vary (it carries nothing: fewer channels)."""
    mean = (moments.first[:channels] @ pooling.T).mean(1) / moments.n
    square = np.einsum("ip,kpq,iq->k", pooling, moments.second[:channels], pooling, optimize=True)
    square = square / (moments.n * len(pooling))
    variance = square - mean**2
    dead = np.flatnonzero(variance <= 1e-10 * np.maximum(square.max(), np.finfo(np.float64).tiny))
    if dead.size:
        raise ValueError(
            f"channel {dead[0]} of {channels} has no variance left after pooling to {len(pooling)} position(s); "
            f"use at most {dead[0]} channels (without an SVD: standardize 'sample' or 'none')"
        )
    return mean, np.sqrt(variance)


# --- information -------------------------------------------------------------------------------------------------


def information_bits(dimensions: int, sigma: float) -> float:
    """Bits per image that pass through z + sigma noise: KL(N(z, sigma^2 I) || N(0, I)) averaged over standardised z
    of `dimensions` numbers in all = d (sigma^2 - log sigma^2) / (2 log 2); inf at sigma = 0 (nothing is hidden)."""
    if sigma == 0:
        return math.inf
    return 0.5 * dimensions * (sigma**2 - math.log(sigma**2)) / math.log(2)
