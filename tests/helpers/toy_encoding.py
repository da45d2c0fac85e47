"""A tiny data set and encoder for the tests of encoding and of reading latents."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from input_pipeline import latent_records as records
from nested.encoders import grids
from nested.encoders.encoder import EncoderOptions
from nested.latents import passes
from nested.latents.job import EncodingOptions, plan_job
from nested.spaces.features import Feature
from nested.spaces.patch_pca import PatchPCA, patchify
from nested.spaces.pixels import Pixels
from nested.spaces.space import LevelSource

IMAGES = 44  # 3 shards of 16, 16, 12; batches of 6: every shard ends in a padded batch
CONFIG = EncodingOptions(features=("crops1", "map"), components=(5,), fit_images=0, batch_size=6, shard_images=16)
CODEC = PatchPCA(patch=2, channels=12)
PIXELS = Pixels()


def level(name, source, shape, **options):
    """A LevelSource by the word of a config."""
    found = {codec.name: codec for codec in (CODEC, PIXELS)}.get(source) or Feature(source, CODEC)
    return LevelSource(name, found, shape, **options)


LEVELS = (level("z3", "crops1", (1, 1, 4)), level("z2", "map", (2, 3, 3)), level("z1", "patch_pca", (4, 4, 12)))


class Killed(BaseException):
    """As if the process had been killed here."""


class Source:
    """Random colour images of 8 x 8, labels 0..3. damage {i: example} replaces some; killed_at {i: n}: read n kills."""

    num_classes, fingerprint = 4, "a1b2"

    def check(self):
        pass

    def describe(self):
        return "toys"

    def __init__(self, count=IMAGES, damage=None, killed_at=None, size=8):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        self.labels = rng.integers(0, 4, count)
        self.damage, self.killed_at = damage or {}, killed_at or {}
        self.reads = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.reads.append(i)
        if i in self.killed_at and self.reads.count(i) == self.killed_at[i]:
            raise Killed
        return {"image": self.images[i], "label": np.int32(self.labels[i])} | self.damage.get(i, {})


@dataclasses.dataclass(frozen=True)
class Toy:
    """A random linear encoder of 2 x 2 patches, its vector the mean of their tanh; NaN or huge features for images that
    begin with the value given."""

    name: str = "toy"
    fingerprint: str = "cafe"
    nan_at: int = -1
    huge_at: int = -1
    feature_names: tuple = ("crops1", "map")
    params: tuple = ()
    input_size: int = 32

    @property
    def made_from(self):
        return {"input_size": self.input_size, "map": "stage4", "vector": "pool", "prefix": "", "dtype": "float32"}

    def features(self, images):
        return grids.feature_grids(self._outputs, images, self.feature_names)

    def _outputs(self, images, parts):
        x = jnp.asarray(images).astype(jnp.float32) / 127.5
        first = jnp.asarray(images)[:, 0, 0, 0].astype(jnp.int32)
        bad = jnp.where(first == self.nan_at, jnp.nan, 1.0)
        bad = jnp.where(first == self.huge_at, 3e4, bad)[:, None, None, None]
        weights = np.random.default_rng(1).normal(size=(12, 9)).astype(np.float32)
        maps = patchify(x, 2) @ weights * bad
        outputs = {"map": maps, "vector": (jnp.tanh(maps).mean((1, 2), keepdims=True) * bad)[:, 0, 0]}
        return {part: outputs[part] for part in parts}


def encoder_kind(open_encoder):
    """An encoder for ENCODERS whose open(features) is that function."""

    @dataclasses.dataclass(frozen=True)
    class Kind(EncoderOptions):
        def open(self, features):
            return open_encoder(features)

    return Kind


def run(directory, source=None, encoder=None, config=CONFIG, codec=CODEC, **processes):
    source = Source() if source is None else source
    encoder = encoder or Toy(feature_names=tuple(name for name in config.features if not grids.is_codec_feature(name)))
    return passes.encode(plan_job(source, encoder, config, codec, directory, **processes))


def content(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def batch(directory, fields=None):
    source = records.LatentRecords(directory, fields)
    rows = [source[i] for i in range(len(source))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def one_line(error):
    return "\n" not in str(error.value)
