"""Frozen vision transformers of public code: MoCo-v3, DINO, DINOv2, CLIP's image tower and MAE, as pure functions.

One network (Dosovitskiy et al. 2021); VARIANTS holds what each code does differently. Tokens: a class token, registers
(DINOv2 with registers), one per patch; positions P are added to the class token and the patches, before the registers
come in. The class token's is P_0, the patches' are the table's grid, interpolated where the image has another:

    x <- x + s1 Attention(LN(x)),   x <- x + s2 W2 f(W1 LN(x)),   LN(x) at the end

f is gelu (exact), in CLIP x sigmoid(1.702 x); s1 and s2 are DINOv2's LayerScale, 1 elsewhere; CLIP also has an LN
before the first block, and no bias on its patches. Outputs:

    cls        the class token after the last norm
    pool       the mean of the patch tokens after it
    projected  cls through the head: CLIP's projection (not normalised); MoCo-v3's three layers with batch norm, RCG's
               256 channels
    last       the patch tokens after the last norm. CLIP's own code normalises its class token alone: the map here is
               that norm applied to the patches as well

Positions (torch's bicubic, a = -.75, edges repeated, no antialiasing) are sampled with the step grid / (size + offset),
where DINO and DINOv2 have the offset .1; with registers DINOv2 antialiases instead (a = -.5, the kernel widened by the
step). The others' code has one size; here they are brought to another like transformers' CLIP: offset 0.

Departures: images are resized in float on the device with the antialiased bicubic kernel of Pillow and torch, not
rounded to 8 bits nor clipped to 0..255. MoCo-v3's own evaluation resizes bilinearly and cuts the centre out; RCG, as
here, takes the whole image, bicubic (without antialiasing). Products are float32 whatever the accelerator's default, or
bfloat16 with float32 sums; norms, softmax and the residual stream are float32 in both.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nested.encoders import grids, precision, vit_files
from nested.encoders.encoder import EncoderOptions
from nested.runtime.partition import local_devices
from nested.weights import files as weights

Params = Mapping[str, Any]  # nested dicts of arrays

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAP, VECTORS, DTYPES = "last", ("cls", "pool", "projected"), ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Vit:
    """One network. grid: side of its table of positions, in patches; hidden: width of its MLPs; offset, antialias: how
    the positions are interpolated; projector: widths of the head's layers, () for none; mean, std: of images in 0..1;
    family: whose files it is read from (nested/encoders/vit_files.py); released: the name of such a file."""

    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    hidden: int
    family: str
    released: str
    eps: float = 1e-6
    quick_gelu: bool = False
    pre_norm: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    registers: int = 0
    offset: float = 0.0
    antialias: bool = False
    projector: tuple[int, ...] = ()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def _variants() -> dict[str, Vit]:
    small: dict[str, Any] = dict(width=384, depth=12, heads=6, hidden=1536)
    base: dict[str, Any] = dict(width=768, depth=12, heads=12, hidden=3072)
    large: dict[str, Any] = dict(width=1024, depth=24, heads=16, hidden=4096)
    twelve_heads: dict[str, Any] = dict(heads=12)
    mocov3: dict[str, Any] = dict(patch=16, grid=14, family="mocov3", projector=(4096, 4096, 256))
    dino: dict[str, Any] = dict(patch=16, grid=14, family="dino", offset=0.1)
    dinov2: dict[str, Any] = dict(patch=14, grid=37, family="dinov2", layer_scale=True)
    plain: dict[str, Any] = {**dinov2, "offset": 0.1}
    registers: dict[str, Any] = {**dinov2, "antialias": True, "registers": 4}
    clip: dict[str, Any] = dict(
        family="clip", eps=1e-5, quick_gelu=True, pre_norm=True, patch_bias=False, mean=CLIP_MEAN, std=CLIP_STD
    )
    return {
        "mocov3_vits16": Vit(**small | mocov3 | twelve_heads, released="vit-s-300ep.pth.tar"),
        "mocov3_vitb16": Vit(**base | mocov3, released="vit-b-300ep.pth.tar"),
        "dino_vits16": Vit(**small | dino, released="dino_deitsmall16_pretrain.pth"),
        "dino_vitb16": Vit(**base | dino, released="dino_vitbase16_pretrain.pth"),
        "dinov2_vitb14": Vit(**base | plain, released="dinov2_vitb14_pretrain.pth"),
        "dinov2_vitl14": Vit(**large | plain, released="dinov2_vitl14_pretrain.pth"),
        "dinov2_vitb14_reg": Vit(**base | registers, released="dinov2_vitb14_reg4_pretrain.pth"),
        "dinov2_vitl14_reg": Vit(**large | registers, released="dinov2_vitl14_reg4_pretrain.pth"),
        "clip_vitb16": Vit(**base | clip, patch=16, grid=14, projector=(512,), released="ViT-B-16.pt"),
        "clip_vitl14": Vit(**large | clip, patch=14, grid=16, projector=(768,), released="ViT-L-14.pt"),
        "mae_vitb16": Vit(**base, patch=16, grid=14, family="mae", released="mae_pretrain_vit_base.pth"),
    }


VARIANTS = _variants()


# --- the network -------------------------------------------------------------------------------------------------


def interpolation(native: int, size: int, offset: float, antialias: bool) -> np.ndarray:
    """One dimension of torch's bicubic interpolation of `native` points to `size`, float64 [size, native].

    offset: as in DINO's scale_factor (size + offset) / native, 0 where the size itself was given; antialias: torch's.
    """
    step = native / (size + offset)
    centers, matrix = step * (np.arange(size) + 0.5), np.zeros((size, native))
    if antialias:
        stretch = max(step, 1.0)
        first = np.maximum(np.floor(centers - 2 * stretch + 0.5), 0).astype(int)
        stop = np.minimum(np.floor(centers + 2 * stretch + 0.5), native).astype(int)
        for i, center in enumerate(centers):
            taps = np.arange(first[i], stop[i])
            row = _cubic((taps + 0.5 - center) / stretch, -0.5)
            matrix[i, taps] = row / row.sum()
        return matrix
    below = np.floor(centers - 0.5).astype(int)
    for tap in range(-1, 3):
        at = np.clip(below + tap, 0, native - 1)
        np.add.at(matrix, (np.arange(size), at), _cubic(centers - 0.5 - (below + tap), -0.75))
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel of support 2."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _positions(table_NC: jax.Array, vit: Vit, height: int, width: int) -> jax.Array:
    """[1 + grid^2, C] -> [1 + height * width, C]."""
    if (height, width) == (vit.grid, vit.grid):
        return table_NC
    rows, columns = (
        interpolation(vit.grid, size, vit.offset, vit.antialias).astype(table_NC.dtype) for size in (height, width)
    )
    grid_HWC = table_NC[1:].reshape(vit.grid, vit.grid, -1)
    grid_HWC = jnp.einsum("ih,jw,hwc->ijc", rows, columns, grid_HWC, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table_NC[:1], grid_HWC.reshape(height * width, -1)])


def _linear(p: Params, x: jax.Array) -> jax.Array:
    """x [..., in] -> [..., out]: the product in the weights' dtype, the sum in that of x."""
    w = p["weight"]
    y = jnp.matmul(x.astype(w.dtype), w, precision=precision.product_precision(w.dtype), preferred_element_type=x.dtype)
    return y + jnp.expand_dims(p["bias"], range(y.ndim - 1)) if "bias" in p else y


def _layer_norm(p: Params, x_BLC: jax.Array, eps: float) -> jax.Array:
    x_BLC = x_BLC - x_BLC.mean(-1, keepdims=True)
    x_BLC = x_BLC * jax.lax.rsqrt(jnp.square(x_BLC).mean(-1, keepdims=True) + eps)
    return x_BLC * p["weight"][None, None] + p["bias"][None, None]


def _attention(p: Params, vit: Vit, x_BLC: jax.Array) -> jax.Array:
    (batch, length, width), dtype = x_BLC.shape, p["qkv"]["weight"].dtype
    products: dict[str, Any] = dict(precision=precision.product_precision(dtype), preferred_element_type=x_BLC.dtype)
    qkv_BLSHD = _linear(p["qkv"], x_BLC).reshape(batch, length, 3, vit.heads, width // vit.heads).astype(dtype)
    q_BHLD, k_BHLD, v_BHLD = qkv_BLSHD.transpose(2, 0, 3, 1, 4)
    logits_BHLM = jnp.matmul(q_BHLD, k_BHLD.swapaxes(2, 3), **products) * (width // vit.heads) ** -0.5
    weights_BHLM = jax.nn.softmax(logits_BHLM, -1).astype(dtype)
    y_BHLD = jnp.matmul(weights_BHLM, v_BHLD, **products)
    return _linear(p["out"], y_BHLD.swapaxes(1, 2).reshape(x_BLC.shape))


def _block(p: Params, vit: Vit, x_BLC: jax.Array) -> jax.Array:
    y_BLC = _attention(p, vit, _layer_norm(p["norm1"], x_BLC, vit.eps))
    x_BLC += y_BLC * p["scale1"]["gamma"][None, None] if vit.layer_scale else y_BLC
    y_BLC = _linear(p["fc1"], _layer_norm(p["norm2"], x_BLC, vit.eps))
    y_BLC = y_BLC * jax.nn.sigmoid(1.702 * y_BLC) if vit.quick_gelu else jax.nn.gelu(y_BLC, approximate=False)
    y_BLC = _linear(p["fc2"], y_BLC)
    return x_BLC + (y_BLC * p["scale2"]["gamma"][None, None] if vit.layer_scale else y_BLC)


def _tokens(params: Params, vit: Vit, x_BHWC: jax.Array) -> jax.Array:
    """[B, 1 + registers + patches, C] before the blocks."""
    batch, height, width = x_BHWC.shape[0], *(size // vit.patch for size in x_BHWC.shape[1:3])
    x = x_BHWC.reshape(batch, height, vit.patch, width, vit.patch, -1).swapaxes(2, 3)
    x_BNC = _linear(params["patch"], x.reshape(batch, height * width, -1))
    table_NC = _positions(params["positions"]["tokens"], vit, height, width)
    first = [params["cls"]["tokens"] + table_NC[:1]]
    first += [params["registers"]["tokens"]] if vit.registers else []
    first_FC = jnp.concatenate(first)
    first_BFC = jnp.broadcast_to(first_FC[None], (batch, *first_FC.shape))
    x_BLC = jnp.concatenate([first_BFC, x_BNC + table_NC[None, 1:]], 1)
    return _layer_norm(params["pre_norm"], x_BLC, vit.eps) if vit.pre_norm else x_BLC


@functools.partial(jax.jit, static_argnames=("vit", "names"))
def forward(params: Params, x_BHWC: jax.Array, vit: Vit, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """The network. params: vit_files.params; x_BHWC: float [B, H, W, 3] as prepare() gives it, H and W multiples of
    vit.patch, of any ratio.

    names: which of 'cls' [B, C], 'pool' [B, C], 'projected' [B, vit.projector[-1]], 'last' [B, H / patch, W / patch, C]
    to return (a dict), in the dtype of x."""
    x_BLC, _ = jax.lax.scan(lambda x, p: (_block(p, vit, x), None), _tokens(params, vit, x_BHWC), params["blocks"])
    x_BLC = _layer_norm(params["norm"], x_BLC, vit.eps)
    cls_BC, patches_BNC = x_BLC[:, 0], x_BLC[:, 1 + vit.registers :]
    outputs = {"cls": cls_BC, "pool": patches_BNC.mean(1)}
    outputs["last"] = patches_BNC.reshape(len(x_BHWC), x_BHWC.shape[1] // vit.patch, x_BHWC.shape[2] // vit.patch, -1)
    if "projected" in names:
        outputs["projected"] = _linear(params["projector"][0], cls_BC)
        for layer in params["projector"][1:]:
            outputs["projected"] = _linear(layer, jax.nn.relu(outputs["projected"]))
    return {name: outputs[name] for name in names}


@functools.partial(jax.jit, static_argnames=("vit", "size"))
def prepare(images: jax.Array, vit: Vit, size: int) -> jax.Array:
    """Images [B, H, W, 1 or 3], 0..255 -> network input [B, size, size, 3]: antialiased bicubic (a = -.5), / 255, minus
    vit.mean, over vit.std."""
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    x = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "bicubic", antialias=True)
    mean, std = (jnp.asarray(part, x.dtype)[None, None, None] for part in (vit.mean, vit.std))
    return (jnp.broadcast_to(x, (*x.shape[:3], 3)) / 255 - mean) / std


# --- the encoder -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class VitEncoder:
    """Encoder: images -> the feature grids to store (see nested/latents/passes.py).

    params: from load_vit(). fingerprint: sha256 of the weight files. input_size: every image or crop is resized to it.
    vector: which output the vector of an image or a crop is. feature_names: the grids that features() returns.
    """

    name: str
    vit: Vit
    params: Params
    fingerprint: str
    input_size: int
    vector: str
    feature_names: tuple[str, ...]
    prefix: str = ""
    dtype: str = "float32"

    @property
    def made_from(self) -> dict[str, Any]:
        """The options that the features depend on."""
        options = {"input_size": self.input_size, "map": MAP, "vector": self.vector}
        return {**options, "prefix": self.prefix, "dtype": self.dtype}

    def features(self, images: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """uint8 or float images [B, H, W, 1 or 3], 0..255 -> {name: float32 [B, h, w, C]}: the grids of
        nested/encoders/grids.py, of the encoder's vectors and of its map of one token per patch."""
        return grids.feature_grids(self._outputs, images, self.feature_names)

    def vectors(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Images as features() -> the vectors of the whole images, float32 [B, C]."""
        return self._outputs(images, ("vector",))["vector"]

    def _outputs(self, images: Any, parts: tuple[str, ...]) -> dict[str, jax.Array]:
        names = {"vector": self.vector, "map": MAP}
        x_BHWC = prepare(images, self.vit, self.input_size)
        found = forward(self.params, x_BHWC, self.vit, tuple(names[part] for part in parts))
        return {part: found[names[part]] for part in parts}


def load_vit(
    name: str, path: str, *, input_size: int, map: str, vector: str, features: Sequence[str], prefix: str, dtype: str
) -> VitEncoder:
    """Reads a vision transformer.

    Args:
      name: a key of VARIANTS.
      path: its weight file, or a folder with it (nested.weights).
      input_size: a positive multiple of the patch (pixels).
      map: 'last'.
      vector: 'cls' | 'pool' | 'projected' (CLIP, MoCo-v3).
      features: names of nested/encoders/grids.py, not those of the codec.
      prefix: start of the network's names in the file; '' finds it (vit_files.read_vit).
      dtype: of the products, 'float32' | 'bfloat16'.

    Raises, in one line: ValueError for another option or a foreign weight file, FileNotFoundError if there is none.
    """
    vit = VARIANTS[name]
    if input_size < 1 or input_size % vit.patch:
        raise ValueError(
            f"encoder.input_size: {input_size} given; {name} takes positive multiples of its patch, {vit.patch}"
        )
    grids.require_one_of("encoder.map", map, (MAP,), name)
    grids.require_one_of("encoder.vector", vector, VECTORS if vit.projector else VECTORS[:2], name)
    grids.require_one_of("encoder.dtype", dtype, DTYPES, name)
    for feature in features:
        grids.parse_feature(feature)
    if not path:
        raise FileNotFoundError(
            f"{name} comes in no package: give its weight file, such as {vit.released}, in config.encoder.weights"
        )
    files = weights.find_weight_files(path)
    params = vit_files.read_vit(files, vit, name, prefix=prefix, projected=vector == "projected", dtype=dtype)
    fingerprint = "-".join(weights.sha256(file) for file in files)
    return VitEncoder(name, vit, params, fingerprint, input_size, vector, tuple(features), prefix, dtype)


@dataclasses.dataclass(frozen=True)
class VitOptions(EncoderOptions):
    """A vision transformer of VARIANTS, by its name."""

    vector: Annotated[str, "the vector of an image or a crop: pool | cls | projected (CLIP, MoCo-v3)"] = "pool"
    prefix: Annotated[str, "start of the network's names in a file that holds several; '': found, '.': nothing"] = ""
    dtype: Annotated[Literal["float32", "bfloat16"], "of the products"] = "float32"

    def open(self, features: tuple[str, ...]) -> VitEncoder:
        found = load_vit(
            self.name, self.weights, input_size=self.input_size, map=self.map, vector=self.vector, features=features,
            prefix=self.prefix, dtype=self.dtype,
        )  # fmt: skip
        return dataclasses.replace(found, params=jax.device_put(found.params, local_devices()))
