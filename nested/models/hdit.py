"""HDiT, the hourglass diffusion transformer (Crowson et al., ICML 2024, arXiv 2401.11605).

    x = patch_in(image)                                           tokens of p_h x p_w pixels
    for each level but the last:   x = its layers(x);  push x;  x = merge(x)        2 x 2 tokens -> 1
    x = the last level's layers(x)
    for each level upwards:        x = skip(pop, split(x));  x = its other layers(x)
    output = patch_out(RMSNorm(x))                                like the image; exactly 0 at the start

    skip: lerp  s + f (u - s), f learned, .5 at the start (the paper's Eq. 6 with 1 - f);  add  s + u;  concat  W [s, u]
    cond = mapping(W_t fourier(c_noise) + W_a fourier(augment) + class + W_m mapping + sum over coarser levels)

The blocks are in hdit_blocks.py. Names and layouts are those of the authors' code (ImageTransformerDenoiserModelV2 of
k_diffusion/models/image_transformer_v2.py at 4601bf08), so its state dicts load with nested.weights.files.from_torch.
An EDM process gives the network log(sigma) / 4 and c_in x_t (nested/diffusion/process.py).

Not in the authors' code, but built from the paper's text: additive positions (learned, added after patch_in), plain
GELU feed-forwards, add and concat skips. Ours: coarser levels as conditions. The variable z [h, w, c] of such a level
is flattened, projected and added in the mapping network; if it is larger than 1 x 1, it is also projected, resized
bilinearly and added to the tokens. For a dropped level a learned vector takes the first place and 0 the second.
A condition `augment` of zeros changes the output (cos 0 = 1): sampling uses it, and it is the default.
"""

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nested.models import hdit_blocks as blocks
from nested.models.backbone import TokenBackbone
from nested.ops.attention import Attention, at_least_float32

Skip = Literal["lerp", "add", "concat"]
Position = Literal["rope", "additive"]
AUGMENT_WIDTH = 9
NEIGHBORHOOD = "neighborhood"
WINDOWS = {"neighborhood": 7, "shifted_window": 8}  # the default kernels and windows

# Widths and depths of the paper's models. At most 16 x 16 tokens attend globally (32 x 32 too in ffhq1024).
VARIANTS = types.MappingProxyType({
    "imagenet128": types.MappingProxyType(dict(
        depths=(2, 11), widths=(384, 768), attentions=(NEIGHBORHOOD, "global"), mapping_depth=1, mapping_width=768,
    )),
    "imagenet256": types.MappingProxyType(dict(
        depths=(2, 2, 16), widths=(384, 768, 1536), attentions=(NEIGHBORHOOD, NEIGHBORHOOD, "global"),
    )),
    "ffhq1024": types.MappingProxyType(dict(
        depths=(2,) * 5, widths=(128, 256, 384, 768, 1024), attentions=(NEIGHBORHOOD,) * 3 + ("global",) * 2,
        dropouts=(0.0, 0.0, 0.0, 0.0, 0.1),
    )),
})  # fmt: skip


def default_windows(attentions: Sequence[str]) -> tuple[int, ...]:
    """Return the windows of levels with these attentions: kernels of 7, windows of 8, and 0 if there are none."""
    return tuple(WINDOWS.get(kind, 0) for kind in attentions)


def merge_tokens(x_BHWC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Return [B, H / h, W / w, h w C]: the cells of each h x w block of [B, H, W, C] side by side, rows first."""
    B, H, W, C = x_BHWC.shape
    h, w = size
    return x_BHWC.reshape(B, H // h, h, W // w, w, C).swapaxes(2, 3).reshape(B, H // h, W // w, h * w * C)


def split_tokens(x_BHWE: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Return the inverse of merge_tokens."""
    B, H, W, E = x_BHWE.shape
    h, w = size
    return x_BHWE.reshape(B, H, W, h, w, -1).swapaxes(2, 3).reshape(B, H * h, W * w, E // (h * w))


class TokenMerge(nn.Module):
    """Blocks of tokens or pixels, projected: [B, H, W, C] -> [B, H / h, W / w, width]."""

    width: int
    size: tuple[int, int]
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x_BHWE = merge_tokens(x_BHWC, self.size)
        return blocks.linear(self.width, x_BHWE.shape[-1], "proj", self.dtype)(x_BHWE)


class TokenSplit(nn.Module):
    """Projected and cut up: [B, H, W, D] -> [B, H h, W w, width]; with a skip, merged with it (HDiT.skip)."""

    width: int
    size: tuple[int, int]
    skip: str | None
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x_BHWD: jax.Array, skip_BHWC: jax.Array | None = None) -> jax.Array:
        features = self.width * self.size[0] * self.size[1]
        x_BHWE = blocks.linear(features, x_BHWD.shape[-1], "proj", self.dtype, zero=self.skip is None)(x_BHWD)
        x_BHWC = split_tokens(x_BHWE, self.size)
        if self.skip is None or skip_BHWC is None:
            return x_BHWC
        if self.skip == "concat":
            both_BHWE = jnp.concatenate([skip_BHWC, x_BHWC], axis=-1)
            return blocks.linear(self.width, 2 * self.width, "skip_proj", self.dtype)(both_BHWE)
        if self.skip == "add":
            return skip_BHWC + x_BHWC
        fac_1 = self.param("fac", nn.initializers.constant(0.5), (1,)).astype(x_BHWC.dtype)
        return skip_BHWC + fac_1[0] * (x_BHWC - skip_BHWC)


class HDiT(TokenBackbone):
    """The backbone of a level whose variable is one array [B, H, W, C].

    Tuples have one entry per level, finest tokens first.
    depths: layers on the way down, and as many on the way up; those of the last level are run once.
    windows: kernels, an int or (rows, columns) each, or window sizes; 0 if attention is 'global' or 'none'.
    mapping_cond_dim: width of a vector cond['mapping'], as in the authors' code, which trains no model with one either;
        for callers of the module, not for configs; 0: none.
    num_classes: labels are 0..num_classes-1 and null is num_classes; 0: no label.
    conditions: (name, patch size, which is not used) of each coarser level.
    remat: whether each block is recomputed in the backward pass. dtype: of matrix products and the residual stream;
        None is that of the input. Parameters are float32.
    """

    patch_size: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]  wider: patches may be oblong here
        int | tuple[int, int], "side of a token's patch, in positions of the level's variable, or (rows, columns)"
    ]
    depths: Annotated[tuple[int, ...], "layers of each level, finest tokens first"] = (2, 4)
    widths: Annotated[tuple[int, ...], "channels of each level"] = (256, 512)
    attentions: Annotated[tuple[str, ...], "of each level, neighborhood | shifted_window | global | none"] = (
        "neighborhood",
        "global",
    )
    windows: Annotated[
        tuple[int | tuple[int, int], ...],
        "kernel or window of each level, 0 if there is none; (): kernels of 7, windows of 8",
    ] = ()
    head_widths: Annotated[
        int | tuple[int, ...], "channels of a head, multiples of 8; one number stands for all levels"
    ] = 64
    ff_widths: Annotated[
        tuple[int, ...] | None, "channels inside feed-forwards; None: 3 (geglu) or 4 (gelu) times width"
    ] = None
    dropouts: Annotated[float | tuple[float, ...], "dropout rates; one number stands for all levels"] = 0.0
    mapping_depth: Annotated[int, "blocks of the mapping network"] = 2
    mapping_width: Annotated[int, "channels of the mapping network"] = 256
    mapping_ff_width: Annotated[int | None, "channels inside its feed-forwards; None: 3 times mapping_width"] = None
    mapping_dropout: Annotated[float, "dropout rate in the mapping network"] = 0.0
    mapping_cond_dim: int = 0
    num_classes: int = 0
    conditions: tuple[tuple[str, int], ...] = ()
    position: Annotated[Position, "positions: rotary | learned and added to the tokens"] = "rope"
    feed_forward: Annotated[blocks.FeedForwardKind, "activation of the feed-forwards"] = "geglu"
    skip: Annotated[Skip, "how the way up is merged with the way down"] = "lerp"
    attention: Annotated[Attention, "of global and window attention; cudnn is fused, for NVIDIA GPUs in bfloat16"] = (
        "xla"
    )
    neighborhood: Annotated[Literal["auto", "reference", "blocked"], "how neighborhood attention is computed"] = "auto"
    remat: bool = False
    dtype: DTypeLike | None = None

    buffers: ClassVar[tuple[str, ...]] = (r"(^|/)(time_emb|aug_emb)/weight$", r"/pos_emb/freqs$")
    inputs: ClassVar[tuple[str, ...]] = ("augment",)

    @property
    def has_dropout(self) -> bool:
        """Whether training needs cond['dropout'], a key for each row."""
        return any(self.per_level(self.dropouts)) or self.mapping_dropout > 0

    @property
    def patch(self) -> tuple[int, int]:
        """(rows, columns) of a token's patch."""
        rows, columns = (self.patch_size,) * 2 if isinstance(self.patch_size, int) else self.patch_size
        return rows, columns

    def per_level(self, value: Any) -> tuple:
        """Return an option as one entry for each level."""
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(self.depths)

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, c_noise_B: jax.Array, cond: Mapping[str, Any], *, train: bool) -> jax.Array:
        """Return [B, H, W, C] like x.

        Args:
            x_BHWC: the noisy image.
            c_noise_B: log(sigma) / 4.
            cond: 'label' [B] int if there are classes, 'mapping' [B, n] if there is a mapping_cond_dim, each condition
                by its name [B, h, w, c]; optional 'augment' [B, 9] and 'keep_NAME' [B] bool.
            train: whether there is dropout, whose keys are then cond['dropout'] [B].

        Raises:
            ValueError: if a condition is missing or unknown, or if image, windows, kernels or merges do not fit.
        """
        self.check(x_BHWC.shape, cond)
        if train and self.has_dropout and "dropout" not in cond:
            raise ValueError("HDiT: training with dropout needs cond['dropout'], a key for each row")
        x_BHWD = TokenMerge(self.widths[0], self.patch, self.dtype, name="patch_in")(x_BHWC)
        grid = x_BHWD.shape[1:3]
        if self.position == "additive":
            added = self.param("pos_embed", nn.initializers.normal(0.02), (1, *grid, self.widths[0]))
            x_BHWD = x_BHWD + added.astype(x_BHWD.dtype)
        x_BHWD = self.add_grids(x_BHWD, cond)
        keys_B = cond.get("dropout") if train else None
        cond_BM = self.mapping(c_noise_B, cond, keys_B)
        x_BHWD = self.hourglass(x_BHWD, cond_BM, keys_B)
        x_BHWD = blocks.RMSNorm(name="out_norm")(x_BHWD)
        out = TokenSplit(x_BHWC.shape[-1], self.patch, None, self.dtype, name="patch_out")(x_BHWD)
        return out.astype(x_BHWC.dtype)

    def hourglass(self, x_BHWD: jax.Array, cond_BM: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """Return the tokens after all levels, down and up again."""
        last = len(self.depths) - 1
        positions = [blocks.axial_positions(*x_BHWD.shape[1:3])]
        options = [self.level_options(level) for level in range(last + 1)]
        skips, index = [], 0

        def layers(x: jax.Array, level: int, name: str, numbers: Iterable[int]) -> jax.Array:
            nonlocal index
            for i, number in enumerate(numbers):
                layer = blocks.Layer(options[level], number, index, name=f"{name}_{i}")
                x = layer(x, positions[level], cond_BM, keys_B)
                index += 1
            return x

        for level in range(last):
            x_BHWD = layers(x_BHWD, level, f"down_levels_{level}", range(self.depths[level]))
            skips.append(x_BHWD)
            x_BHWD = TokenMerge(self.widths[level + 1], (2, 2), self.dtype, name=f"merges_{level}")(x_BHWD)
            positions.append(blocks.halved(positions[-1]))
        x_BHWD = layers(x_BHWD, last, "mid_level", range(self.depths[last]))
        for level in reversed(range(last)):
            split = TokenSplit(self.widths[level], (2, 2), self.skip, self.dtype, name=f"splits_{level}")
            x_BHWD = split(x_BHWD, skips.pop())
            depth = self.depths[level]
            x_BHWD = layers(x_BHWD, level, f"up_levels_{level}", range(depth, 2 * depth))
        return x_BHWD

    def level_options(self, level: int) -> blocks.LevelOptions:
        """Return what the layers of one level share."""
        hidden = self.ff_widths or tuple(blocks.FEED_FORWARDS[self.feed_forward] * width for width in self.widths)
        return blocks.LevelOptions(
            attention=self.per_level(self.attentions)[level],
            window=(self.windows or default_windows(self.per_level(self.attentions)))[level],
            head_width=self.per_level(self.head_widths)[level],
            hidden=hidden[level],
            feed_forward=self.feed_forward,
            rope=self.position == "rope",
            dropout=self.per_level(self.dropouts)[level],
            implementation=self.attention,
            neighborhood=self.neighborhood,
            remat=self.remat,
            dtype=self.dtype,
        )

    def mapping(self, c_noise_B: jax.Array, cond: Mapping[str, Any], keys_B: jax.Array | None) -> jax.Array:
        """Return [B, M] float32 or better, which every AdaRMSNorm reads."""
        width, B = self.mapping_width, c_noise_B.shape[0]
        c_noise_B = c_noise_B.astype(at_least_float32(c_noise_B.dtype))
        augment = cond.get("augment", jnp.zeros((B, AUGMENT_WIDTH), c_noise_B.dtype))
        time_BM = blocks.FourierFeatures(width, name="time_emb")(c_noise_B[:, None])
        augment_BM = blocks.FourierFeatures(width, name="aug_emb")(augment.astype(c_noise_B.dtype))
        total = blocks.linear(width, width, "time_in_proj", precision=blocks.EXACT)(time_BM)
        total = total + blocks.linear(width, width, "aug_in_proj", precision=blocks.EXACT)(augment_BM)
        if self.num_classes:
            embed = nn.Embed(self.num_classes + 1, width, embedding_init=nn.initializers.normal(1.0), name="class_emb")
            total = total + embed(cond["label"])
        if self.mapping_cond_dim:
            project = blocks.linear(width, self.mapping_cond_dim, "mapping_cond_in_proj", precision=blocks.EXACT)
            total = total + project(cond["mapping"].astype(c_noise_B.dtype))
        for name, _ in self.conditions:
            flat_BN = cond[name].reshape(B, -1).astype(c_noise_B.dtype)
            seen_BM = blocks.linear(width, flat_BN.shape[-1], f"cond_in_proj_{name}", precision=blocks.EXACT)(flat_BN)
            empty_M = self.param(f"empty_{name}", nn.initializers.normal(1.0), (width,))
            if f"keep_{name}" in cond:
                seen_BM = jnp.where(cond[f"keep_{name}"][:, None], seen_BM, empty_M[None].astype(seen_BM.dtype))
            total = total + seen_BM
        hidden = self.mapping_ff_width or 3 * width
        network = blocks.MappingNetwork(
            self.mapping_depth, hidden, self.feed_forward, self.mapping_dropout, name="mapping"
        )
        return network(total, keys_B)

    def add_grids(self, x_BHWD: jax.Array, cond: Mapping[str, Any]) -> jax.Array:
        """Return the tokens plus every coarser variable with a layout, projected and resized to them."""
        B, H, W, D = x_BHWD.shape
        for name, _ in self.conditions:
            z_BhwC = cond[name].astype(x_BHWD.dtype)
            if z_BhwC.shape[1:3] == (1, 1):
                continue
            z_BhwD = blocks.linear(D, z_BhwC.shape[-1], f"cond_grid_proj_{name}", self.dtype)(z_BhwC)
            if f"keep_{name}" in cond:
                z_BhwD = z_BhwD * cond[f"keep_{name}"][:, None, None, None]
            x_BHWD = x_BHWD + jax.image.resize(z_BhwD, (B, H, W, D), "bilinear")
        return x_BHWD

    def check(self, shape: tuple[int, ...], cond: Mapping[str, Any]) -> None:
        """Raise ValueError, in one line, for inputs that do not fit: flax and XLA would say it at length."""
        levels = len(self.depths)
        for name in ("widths", "attentions", "windows", "head_widths", "dropouts", "ff_widths"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)) and len(value) != levels:
                raise ValueError(f"HDiT: {name} {tuple(value)} has {len(value)} entries, depths {self.depths} {levels}")
        numbers = [*self.depths, *self.widths, *self.patch, self.mapping_width, *self.per_level(self.head_widths)]
        if min(numbers) < 1:
            raise ValueError(f"HDiT: depths {self.depths}, widths {self.widths}, patch_size {self.patch_size}, "
                             f"mapping_width {self.mapping_width}, head_widths {self.head_widths}: expected 1 or "
                             "more")  # fmt: skip
        if not all(0 <= rate < 1 for rate in (*self.per_level(self.dropouts), self.mapping_dropout)):
            raise ValueError(f"HDiT: dropouts {self.dropouts}, mapping_dropout {self.mapping_dropout}: expected rates "
                             "in [0, 1)")  # fmt: skip
        choices = {"position": get_args(Position), "feed_forward": blocks.FEED_FORWARDS, "skip": get_args(Skip)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"HDiT: {name} {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if len(shape) != 4 or shape[1] % self.patch[0] or shape[2] % self.patch[1]:
            raise ValueError(f"HDiT: an input of shape {shape}, expected (batch, height, width, channels), height and "
                             f"width divisible by patch_size {self.patch_size}")  # fmt: skip
        if self.mapping_width % 2:
            raise ValueError(f"HDiT: mapping_width {self.mapping_width} is odd; Fourier features come in pairs")
        height, width = shape[1] // self.patch[0], shape[2] // self.patch[1]
        for level in range(levels):
            self.check_level(level, height >> level, width >> level)
            if level < levels - 1 and ((height >> level) % 2 or (width >> level) % 2):
                raise ValueError(f"HDiT: level {level} has {height >> level}x{width >> level} tokens, which do not "
                                 "merge 2x2: change the image or patch size, or use fewer levels")  # fmt: skip
        self.check_cond(cond, shape[0])

    def check_level(self, level: int, height: int, width: int) -> None:
        """Raise ValueError if a level's options do not fit its height x width tokens."""
        options = self.level_options(level)
        where = f"HDiT: level {level} ({height}x{width} tokens)"
        if options.attention not in blocks.ATTENTIONS:
            kinds = ", ".join(blocks.ATTENTIONS)
            raise ValueError(f"{where}: attention {options.attention!r}, expected one of {kinds}")
        if options.attention != "none" and (options.head_width % 8 or self.widths[level] % options.head_width):
            raise ValueError(f"{where}: head width {options.head_width} must be a multiple of 8 that divides the width "
                             f"{self.widths[level]}")  # fmt: skip
        window = options.window
        sizes = (window, window) if isinstance(window, int) else tuple(window)
        if len(sizes) != 2:
            raise ValueError(f"{where}: window {window}, expected a number or (rows, columns)")
        if options.attention in ("global", "none"):
            if any(sizes):
                raise ValueError(f"{where}: windows has {window}, {options.attention!r} attention has none; set 0")
        elif options.attention == "neighborhood":
            if min(sizes) < 1 or sizes[0] > height or sizes[1] > width:
                raise ValueError(f"{where}: kernel {window} must be at least 1 and at most the level's side; change "
                                 "windows")  # fmt: skip
        elif not isinstance(window, int) or window < 1 or height % window or width % window:
            raise ValueError(f"{where}: window {window} must be a number that divides both sides; change windows")

    def check_cond(self, cond: Mapping[str, Any], batch: int) -> None:
        """Raise ValueError for conditions that are missing, unknown or of another shape."""
        names = [name for name, _ in self.conditions]
        required = ["label"] * (self.num_classes > 0) + ["mapping"] * (self.mapping_cond_dim > 0) + names
        optional = {"augment", "dropout", *(f"keep_{name}" for name in names)}
        missing = [name for name in required if name not in cond]
        unknown = sorted(set(cond) - set(required) - optional)
        if missing or unknown:
            raise ValueError(f"HDiT: cond has {sorted(cond)}, expected {required} (optional {sorted(optional)}): "
                             f"missing {missing}, unknown {unknown}; see num_classes, mapping_cond_dim, "
                             "conditions")  # fmt: skip
        expected = {"label": (batch,), "mapping": (batch, self.mapping_cond_dim), "augment": (batch, AUGMENT_WIDTH)}
        for name, shape in expected.items():
            if name in cond and cond[name].shape != shape:
                raise ValueError(f"HDiT: cond['{name}'] has shape {cond[name].shape}, expected {shape}")
        for name in names:
            if getattr(cond[name], "ndim", 0) != 4 or cond[name].shape[0] != batch:
                raise ValueError(f"HDiT: the condition {name} must be one array (batch {batch}, height, width, "
                                 "channels)")  # fmt: skip
