"""The autoencoder of latent diffusion (Rombach et al. 2022; Stable Diffusion's), frozen, as pure functions.

    mean, logvar = moments(x),   z = scale (mean + exp(logvar / 2) n),   x = decode(z / scale),   x in [-1, 1]

logvar is clamped to [-30, 20]. f8 has 4 levels (128, 256, 512, 512 channels) and 4 latent channels, f4 has 3 levels
(128, 256, 512) and 3; both 2 residual blocks per level, 84 and 55 million parameters. A residual block is

    x + conv(silu(norm(conv(silu(norm(x)))))),   GroupNorm of 32 groups, eps 1e-6, 3x3 convolutions

with a 1x1 convolution of x where widths differ; the middle has one more before and after a single attention head over
all positions. A level ends in a 3x3 convolution of stride 2 that is padded on the right and at the bottom only, or in
a doubling of every pixel and a 3x3 convolution. The decoder has one residual block more per level.

The scale brings the latents to unit variance: .18215 (SD), .23010 on COCO (U-ViT), or 1 / std of the data's latents.
U-ViT's release encodes with one set of weights and decodes with the average of it: any two files can be used.

Parameters have the names of diffusers' files and torch's layouts. load_autoencoder() also reads diffusers' older
names and CompVis', whose up blocks are counted from the finest and whose attention is of 1x1 convolutions. Widths,
blocks and channels are read off the tensors; the 32 groups are not in them.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from input_pipeline import latent_records as records
from nested.runtime.partition import local_devices
from nested.spaces.pixels import normalise, to_images
from nested.spaces.space import (
    Arrays,
    Encoded,
    Grid,
    LatentGrid,
    LevelSource,
    Params,
    PatchOptions,
    Shape,
    equal_slices,
)
from nested.spaces.svd import Basis, Covariance, Moments, standardisation
from nested.weights import files as weights

Shapes = dict[str, tuple[int, ...]]

GROUPS, EPS = 32, 1e-6
LOGVAR = (-30.0, 20.0)
ANCHOR = "encoder.conv_in.weight"
UNUSED = ("loss.", "model_ema.")  # of training: the discriminator, the average's counters
PRECISION = jax.lax.Precision.HIGHEST  # float32 is float32 on accelerators too
FIELD = "sd_vae"  # the record field of the moments, and the key of what latents.json says of them


# --- the network -------------------------------------------------------------------------------------------------


def _conv(params: Params, name: str, x_BHWC: jax.Array, stride: int = 1, padding: Any = ((1, 1), (1, 1))) -> jax.Array:
    w_OIHW = params[f"{name}.weight"].astype(x_BHWC.dtype)
    layouts = ("NHWC", "OIHW", "NHWC")
    y = jax.lax.conv_general_dilated(
        x_BHWC, w_OIHW, (stride, stride), padding, dimension_numbers=layouts, precision=PRECISION
    )
    return y + params[f"{name}.bias"].astype(x_BHWC.dtype)[None, None, None]


def _norm(params: Params, name: str, x_BHWC: jax.Array) -> jax.Array:
    batch, height, width, channels = x_BHWC.shape
    dtype = jnp.promote_types(x_BHWC.dtype, jnp.float32)
    x = x_BHWC.astype(dtype).reshape(batch, height, width, GROUPS, channels // GROUPS)
    mean = x.mean((1, 2, 4), keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean((1, 2, 4), keepdims=True) + EPS)
    gain, bias = (params[f"{name}.{leaf}"].astype(dtype)[None, None, None] for leaf in ("weight", "bias"))
    return (x.reshape(x_BHWC.shape) * gain + bias).astype(x_BHWC.dtype)


def _resnet(params: Params, name: str, x_BHWC: jax.Array) -> jax.Array:
    y = _conv(params, f"{name}.conv1", jax.nn.silu(_norm(params, f"{name}.norm1", x_BHWC)))
    y = _conv(params, f"{name}.conv2", jax.nn.silu(_norm(params, f"{name}.norm2", y)))
    shortcut = f"{name}.conv_shortcut"
    return y + (_conv(params, shortcut, x_BHWC, padding="VALID") if f"{shortcut}.weight" in params else x_BHWC)


def _attention(params: Params, name: str, x_BHWC: jax.Array) -> jax.Array:
    batch, height, width, channels = x_BHWC.shape
    x_BNC = _norm(params, f"{name}.group_norm", x_BHWC).reshape(batch, height * width, channels)

    def linear(leaf: str, x_BNC: jax.Array) -> jax.Array:
        w_OI, bias = (params[f"{name}.{leaf}.{part}"].astype(x_BNC.dtype) for part in ("weight", "bias"))
        return jnp.einsum("bni,oi->bno", x_BNC, w_OI, precision=PRECISION) + bias[None, None]

    q_BNC, k_BNC, v_BNC = (linear(leaf, x_BNC) for leaf in ("to_q", "to_k", "to_v"))
    logits_BNM = jnp.einsum("bnc,bmc->bnm", q_BNC, k_BNC, precision=PRECISION) * channels**-0.5
    dtype = jnp.promote_types(x_BHWC.dtype, jnp.float32)
    weights_BNM = jax.nn.softmax(logits_BNM.astype(dtype), axis=-1).astype(x_BHWC.dtype)
    y_BNC = linear("to_out.0", jnp.einsum("bnm,bmc->bnc", weights_BNM, v_BNC, precision=PRECISION))
    return x_BHWC + y_BNC.reshape(x_BHWC.shape)


def _middle(params: Params, name: str, x_BHWC: jax.Array) -> jax.Array:
    x = _resnet(params, f"{name}.resnets.0", x_BHWC)
    return _resnet(params, f"{name}.resnets.1", _attention(params, f"{name}.attentions.0", x))


def _resnets(params: Params, name: str, x_BHWC: jax.Array) -> jax.Array:
    for i in range(_count(params, f"{name}.resnets.")):
        x_BHWC = _resnet(params, f"{name}.resnets.{i}", x_BHWC)
    return x_BHWC


def _head(params: Params, part: str, x_BHWC: jax.Array) -> jax.Array:
    return _conv(params, f"{part}.conv_out", jax.nn.silu(_norm(params, f"{part}.conv_norm_out", x_BHWC)))


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow the prefix in these names: the number of levels or blocks."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


@jax.jit
def moments(params: Params, x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and clamped log-variance [B, H/f, W/f, c] of the latents of images in [-1, 1], in the images' dtype."""
    x = _conv(params, "encoder.conv_in", x_BHWC)
    for i in range(_count(params, "encoder.down_blocks.")):
        x = _resnets(params, f"encoder.down_blocks.{i}", x)
        down = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        if f"{down}.weight" in params:
            x = _conv(params, down, x, stride=2, padding=((0, 1), (0, 1)))
    x = _head(params, "encoder", _middle(params, "encoder.mid_block", x))
    if "quant_conv.weight" in params:
        x = _conv(params, "quant_conv", x, padding="VALID")
    mean, logvar = jnp.split(x, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR)


@jax.jit
def decode(params: Params, z_BhwC: jax.Array) -> jax.Array:
    """Unscaled latents [B, h, w, c] -> images [B, f h, f w, C] in about [-1, 1], in the latents' dtype."""
    x = z_BhwC
    if "post_quant_conv.weight" in params:
        x = _conv(params, "post_quant_conv", x, padding="VALID")
    x = _middle(params, "decoder.mid_block", _conv(params, "decoder.conv_in", x))
    for i in range(_count(params, "decoder.up_blocks.")):
        x = _resnets(params, f"decoder.up_blocks.{i}", x)
        up = f"decoder.up_blocks.{i}.upsamplers.0.conv"
        if f"{up}.weight" in params:
            x = _conv(params, up, x.repeat(2, axis=1).repeat(2, axis=2))
    return _head(params, "decoder", x)


# --- the codec ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AutoencoderKL(PatchOptions):
    """The codec `sd_vae`: records hold the moments of the latents in place of the image, and a latent is drawn from
    them anew in every step.

    Moments are stored as float16, means before log-variances, where U-ViT stores float32: a relative rounding of 5e-4.
    Encoding also measures the scale: 1 / std of all numbers of all latents, whose variance is that of the means plus
    the mean of the variances.
    """

    name = "sd_vae"
    needs_encoding = True
    reads_images = False
    is_image = False

    weights: Annotated[str, "a file, or a folder that diffusers saved the autoencoder to"] = ""
    prefix: Annotated[str, "start of its names in a file that holds more; '': found, '.': nothing"] = ""
    scale: Annotated[float, "multiplies latents: .18215 SD's, .23010 U-ViT's on COCO; 0: 1 / std of these data's"] = 0.0
    decoder_weights: Annotated[str, "another file to decode with, such as an average; '': weights"] = ""
    batch_size: Annotated[int, "images at a time on each device: memory does not grow with the samples"] = 16
    dtype: Annotated[Literal["float32", "bfloat16"], "of decoding; encoding is float32"] = "float32"

    def __post_init__(self):
        if self.scale < 0 or self.batch_size < 1:
            raise ValueError(
                f"scale {self.scale}, batch_size {self.batch_size} given; the scale is positive, or 0 to measure it, "
                "and at least one image is decoded at a time"
            )

    def open(self) -> "OpenAutoencoder":
        return OpenAutoencoder(self, self._load(self.weights, self.prefix, "config.codec.weights"))

    def fit(self, level: LevelSource, encoded: Encoded) -> "LatentSpace":
        if FIELD not in encoded.fields:
            level.refuse_absent_source(encoded)
        level.require_standardize_channel()
        stored = encoded.index[FIELD]
        level.require_shape((*stored["grid"], stored["channels"]), "the autoencoder")
        if not self.scale:
            logging.info("codec.scale 0: the measured one, %.5f", self.latent_scale(encoded))
        return self._space(level, self.latent_scale(encoded))

    def fit_without_data(self, level: LevelSource) -> "LatentSpace | None":
        """The space of a scale that is given, else None."""
        if not self.scale:
            return None
        level.require_standardize_channel()
        level.require_shape((*level.shape[:2], self.channels), "the autoencoder")
        return self._space(level, self.scale)

    def latent_scale(self, encoded: Encoded) -> float:
        return self.scale or encoded.index[FIELD]["measured_scale"]

    def report(self, index: Mapping[str, Any]) -> str:
        scale = index[FIELD]["measured_scale"]
        return (
            f"codec.scale: 1 / std of these latents is {scale:.5f}, the config has {self.scale:g} (0: the measured "
            f"one); --config.codec.scale={scale:.5f} fixes it for all later runs"
        )

    def _space(self, level: LevelSource, scale: float) -> "LatentSpace":
        if self.decoder_weights:
            network = self._load(self.decoder_weights, "", "config.codec.decoder_weights")
        else:
            network = self._load(self.weights, self.prefix, "config.codec.weights")
        return LatentSpace(tuple(level.shape), scale, self.batch_size, self.dtype, network.decoder)

    def _load(self, path: str, prefix: str, what: str) -> "Network":
        return load_autoencoder(path, prefix=prefix, patch=self.patch, channels=self.channels, what=what)


@dataclasses.dataclass(frozen=True)
class OpenAutoencoder:
    """The codec with its weights, for encoding."""

    codec: AutoencoderKL
    network: "Network"
    stores_images = False

    @property
    def name(self) -> str:
        return self.codec.name

    @property
    def made_from(self) -> dict[str, Any]:
        return {
            "codec.patch": self.codec.patch,
            "codec.channels": self.codec.channels,
            "codec.weights_sha256": self.network.fingerprint,
            "codec.prefix": self.codec.prefix,
        }

    @functools.cached_property
    def _params(self) -> Params:
        """The encoder's parameters, on every device."""
        return jax.device_put(self.network.encoder, local_devices())

    def latent_grid(self, image_shape: Grid) -> LatentGrid:
        """The grid of the means, without the scale."""
        return LatentGrid(self.network.grid(image_shape), self.codec.channels)

    def statistics(self, image_shape: Grid) -> dict[str, Grid]:
        return {}

    def fields(self, image_shape: Grid) -> tuple[records.Field, ...]:
        height, width, channels = self.network.grid(image_shape)
        return (records.Field(FIELD, "float16", (height, width, 2 * channels)),)

    def encode(self, images: np.ndarray, rows: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
        return {FIELD: stored_moments(self._params, images, self.codec.batch_size, rows)}

    def latents(self, encoded: Mapping[str, jax.Array]) -> jax.Array:
        return encoded[FIELD][..., : self.codec.channels]

    def bases(self, covariances: Mapping[str, Covariance]) -> dict[str, Basis]:
        return {}

    def projection(self, bases: Mapping[str, Basis]) -> None:
        return None

    def moments(self, field: str, stored: np.ndarray) -> Moments:
        """The moments of all numbers of the latents drawn from stored moments, as of one position of one channel."""
        mean, logvar = np.split(stored.astype(np.float64), 2, axis=-1)
        square = np.square(mean).sum() + np.exp(logvar).sum()
        return Moments(mean.size, mean.sum().reshape(1, 1), square.reshape(1, 1, 1))

    def summary(self, image_shape: Grid, moments: Mapping[str, Moments]) -> dict[str, Any]:
        """The grid of the latents, and the scale that brings them to variance 1 about their mean."""
        _, std = standardisation(moments[FIELD], np.eye(1), 1)
        *grid, channels = self.network.grid(image_shape)
        return {FIELD: {"grid": grid, "channels": channels, "measured_scale": float(1 / std[0])}}


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSpace:
    """The fitted space: a latent is drawn from its stored moments and multiplied by the scale.

    rows_at_once: images that each device decodes at a time. dtype: of decoding, 'float32' | 'bfloat16'. params: of the
    decoder.
    """

    shape: Shape
    scale: float
    rows_at_once: int
    dtype: str
    params: Params
    fields = (FIELD,)
    explained_variance = 1.0
    standardised = True

    def variable(self, raw: Arrays, key: jax.Array | None) -> jax.Array:
        """Stored moments [B, h, w, 2 c] -> float32 latents [B, h, w, c] times the scale.

        Row i is drawn from (key, i), so that devices and hosts do not matter; without a key it is the mean.
        """
        mean, logvar = jnp.split(jnp.asarray(raw[FIELD]).astype(jnp.float32), 2, axis=-1)
        if key is None:
            return self.scale * mean
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(mean)))
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return self.scale * (mean + jnp.exp(0.5 * logvar) * noise)

    def decode(self, z: jax.Array, params: Params) -> jax.Array:
        """Latents [B, h, w, c] -> uint8 images."""
        x_BHWC = decode(params, (z / self.scale).astype(self.dtype))
        return to_images(x_BHWC.astype(jnp.float32))

    def resolutions(self, z: jax.Array, params: Params) -> tuple[jax.Array, ...]:
        return (self.decode(z, params),)


def stored_moments(params: Params, images: np.ndarray, batch_size: int, rows: jax.sharding.NamedSharding) -> jax.Array:
    """uint8 images [B, H, W, C] -> float32 [B, H/f, W/f, 2 c], means before log-variances.

    The images are encoded in equal_slices(B, batch_size, number of devices); the devices of `rows` share each slice.
    """
    slices = equal_slices(len(images), batch_size, rows.mesh.size)
    parts = [moments(params, normalise(jax.device_put(images[some], rows))) for some in slices]
    return jnp.concatenate([jnp.concatenate(part, -1) for part in parts])


# --- weights -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the tensors' shapes say: channels of the levels, fine to coarse, residual blocks per level, channels of
    latents and images, and which of the two 1x1 convolutions about the latents there are."""

    widths: tuple[int, ...]
    blocks: int
    channels: int
    image_channels: int
    quant: tuple[str, ...]

    @property
    def patch(self) -> int:
        """Side of the image patch that one latent position stands for."""
        return 2 ** (len(self.widths) - 1)

    def shapes(self) -> Shapes:
        """{name: shape} of all parameters."""
        found: Shapes = {}
        widths, c = self.widths, self.channels
        for part, order, blocks in (("encoder", widths, self.blocks), ("decoder", widths[::-1], self.blocks + 1)):
            block, sampler = ("down_blocks", "downsamplers") if part == "encoder" else ("up_blocks", "upsamplers")
            width = order[0]
            _add_conv(found, f"{part}.conv_in", self.image_channels if part == "encoder" else c, width, 3)
            for i, wider in enumerate(order):
                for j in range(blocks):
                    _add_resnet(found, f"{part}.{block}.{i}.resnets.{j}", width, wider)
                    width = wider
                if i < len(order) - 1:
                    _add_conv(found, f"{part}.{block}.{i}.{sampler}.0.conv", width, width, 3)
            _add_middle(found, f"{part}.mid_block", widths[-1])
            _add_norm(found, f"{part}.conv_norm_out", width)
            _add_conv(found, f"{part}.conv_out", width, 2 * c if part == "encoder" else self.image_channels, 3)
        for name in self.quant:
            size = 2 * c if name == "quant_conv" else c
            _add_conv(found, name, size, size, 1)
        return found


def _add_conv(found: Shapes, name: str, width_in: int, width_out: int, kernel: int) -> None:
    found.update({f"{name}.weight": (width_out, width_in, kernel, kernel), f"{name}.bias": (width_out,)})


def _add_norm(found: Shapes, name: str, width: int) -> None:
    found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})


def _add_resnet(found: Shapes, name: str, width_in: int, width_out: int) -> None:
    for i, width in enumerate((width_in, width_out), 1):
        _add_norm(found, f"{name}.norm{i}", width)
        _add_conv(found, f"{name}.conv{i}", width, width_out, 3)
    if width_in != width_out:
        _add_conv(found, f"{name}.conv_shortcut", width_in, width_out, 1)


def _add_middle(found: Shapes, name: str, width: int) -> None:
    for i in range(2):
        _add_resnet(found, f"{name}.resnets.{i}", width, width)
    _add_norm(found, f"{name}.attentions.0.group_norm", width)
    for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
        linear = f"{name}.attentions.0.{leaf}"
        found.update({f"{linear}.weight": (width, width), f"{linear}.bias": (width,)})


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The weights of one download, {name: float32 array} on the host, and what their shapes say."""

    params: Params
    layout: Layout
    files: tuple[str, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the file, or of each of its shards."""
        return "-".join(map(weights.sha256, self.files))

    @property
    def encoder(self) -> Params:
        """What moments() needs."""
        return {name: x for name, x in self.params.items() if name.startswith(("encoder.", "quant_conv."))}

    @property
    def decoder(self) -> Params:
        """What decode() needs."""
        return {name: x for name, x in self.params.items() if name.startswith(("decoder.", "post_quant_conv."))}

    def grid(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of this shape."""
        height, width, channels = image_shape
        patch, wanted = self.layout.patch, self.layout.image_channels
        if channels != wanted or height % patch or width % patch:
            raise ValueError(
                f"codec.name: 'sd_vae' given, whose weights take images of {wanted} channel(s) and sides that {patch} "
                f"divides, found {height}x{width}x{channels}; set data.image_size and data.channels"
            )
        return height // patch, width // patch, self.layout.channels


def load_autoencoder(path: str, *, prefix: str, patch: int, channels: int, what: str) -> Network:
    """The autoencoder in a weight file, or in a folder that diffusers saved it to.

    prefix: what stands before the names, such as 'first_stage_model.' in a file of all of Stable Diffusion; '' finds
    it. patch, channels: what the weights must turn out to have. what: the option that gives the path, for errors.
    Raises ValueError / FileNotFoundError in one line: as find_weight_files and load_network; a tensor that is missing,
    unknown or of another shape (named); another patch or other channels.
    """
    if not path:
        raise ValueError(
            f"{what} is '': sd_vae needs the autoencoder's weights; give a file (.safetensors, .pth, .ckpt) or a "
            "folder that diffusers saved it to"
        )
    files = weights.find_weight_files(path)
    found = weights.load_network(files, ANCHOR, prefix=prefix, unused=UNUSED)
    levels = max(_count(found, "encoder.down_blocks."), _count(found, "encoder.down."))
    tensors = {_public_name(name, levels): array for name, array in found.items()}
    # 1x1 convolutions of CompVis' attention are matrices here
    tensors = {name: x[..., 0, 0] if ".attentions." in name and x.ndim == 4 else x for name, x in tensors.items()}
    layout = _layout(tensors, f"{what} {files[0]}")
    tensors = weights.check_tensors(tensors, layout.shapes(), f"{what} {files[0]}")
    if (layout.patch, layout.channels) != (patch, channels):
        raise ValueError(
            f"{what} {files[0]}: latents of {layout.channels} channels, one position for "
            f"{layout.patch}x{layout.patch} pixels; codec.patch is {patch}, codec.channels {channels}: set them to "
            f"{layout.patch} and {layout.channels}, or give another file"
        )
    params = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    return Network(params, layout, tuple(files))


_RENAMED = (  # of CompVis', then of older diffusers' files
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up_blocks\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up_blocks\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)


def _public_name(name: str, levels: int) -> str:
    """The name in diffusers' files today."""
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _layout(tensors, where: str) -> Layout:
    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != 4:
            raise ValueError(f"{where}: tensor {name!r} of four axes is missing; give the file of an autoencoder")
        return tensors[name].shape

    levels = _count(tensors, "encoder.down_blocks.")
    widths = tuple(shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels))
    if not widths or any(width % GROUPS for width in widths):
        raise ValueError(f"{where}: levels of {widths} channels, expected multiples of {GROUPS}; give another file")
    return Layout(
        widths=widths,
        blocks=_count(tensors, "encoder.down_blocks.0.resnets."),
        channels=shape("decoder.conv_in.weight")[1],
        image_channels=shape(ANCHOR)[1],
        quant=tuple(name for name in ("quant_conv", "post_quant_conv") if f"{name}.weight" in tensors),
    )
