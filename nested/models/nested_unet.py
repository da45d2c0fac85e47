"""Matryoshka's NestedUNet: the network of several resolutions of one image or clip (Gu et al., arXiv 2310.15111).

    net r:  temb = mlp(sin/cos(c_noise)) + cond_emb(pooled text) + class + sum of mlp(sin/cos(micro-conditioning))
            x    = conv_in(z_r) + f_r                                  f_r from the next finer net
            x    = down stages (push every output);  f_{r-1} = in_adapter(x)
            outputs of the coarser nets, y = net r - 1(z_{r-1}, f_{r-1}, ...)
            x    = up stages(x + out_adapter(y)) (pop);  output r = conv_out(silu(GN(x)))
    innermost net: ResNet + attention + ResNet in place of the adapters and the net inside: a UNet

Sec. 3.2, App. A; ml_mdm/models/unet.py, nested_unet.py at de8cde2, whose state dicts load with
nested.weights.files.from_torch. The blocks are in unet_blocks.py, the options of a net in unet_nets.py. The tree of
parameters below `inner_unet` is that of the smaller model, so that its parameters fit there. All outputs and the
adapters are 0 at the start: the nets inside compute what they would on their own.
Text goes through lm_proj and lm_layers in the innermost net; its mean is added to temb in every net, and every
attention layer attends to its tokens.

Video [B, T, H, W, C]: frames are rows of the batch. A net of kind 'temporal' resamples the frames, by convolutions over
time, down to one, which goes to the net inside; in its temporal attention a pixel attends to itself over time.

Departures from the authors' code: clips are arrays of frames instead of grids of them, so that adapters do not reach
into a neighbouring frame; nets are listed coarse to fine. Additions to it: classes (App. E), coarser levels of a
hierarchy as further channels with their noise steps (the cascade of App. E), inner nets without low resolutions as
inputs, resolutions that are not halved, and fewer rows of a finer resolution, spread over the batch
(nested/ops/mixed_rows.py). As there, a clip's input is normalised frame by frame, a row of text whose mask is all False
gives NaN, and the norms of attention have 32 groups whatever the ResNets have.
"""

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nested.models import unet_blocks as blocks
from nested.models.backbone import Backbone, Shape
from nested.models.unet_nets import Net, check_shapes
from nested.ops.attention import Attention, at_least_float32
from nested.ops.mixed_rows import fill_rows, take_rows


def _variants(preset: Literal["paper", "released"]) -> dict[str, dict[str, Any]]:
    """The models of App. A and D, as the paper has them or as ml-mdm's cc12m_*.yaml do.

    'released' goes beyond those three files by analogy. The text is FLAN-T5 XL's vectors.
    """
    released = preset == "released"
    text = dict(text_width=2048, text_proj=1024, lm_layers=2, masked_cross_attention=True)
    if released:
        text = dict(text_width=2048, text_proj=2048, lm_layers=0, masked_cross_attention=False)

    def net(side: int, channels: tuple[int, ...], resnets: tuple[int, ...], **options: Any) -> dict[str, Any]:
        micro = (("scale", float(side)),) if released else ()
        return dict(channels=channels, resnets=resnets, micro=micro, **options)

    s64 = net(64, (256, 512, 768), (2, 2, 2), attention=(0, 1, 5), attention_ffn=True)
    s128, s256 = net(128, (128, 256), (2, 1)), net(256, (64, 128), (2, 1))
    s256_on_64, s1024_on_256 = net(256, (64, 128, 256), (2, 2, 1)), net(1024, (32, 32, 64), (2, 2, 1))
    s512, s1024 = net(512, (32, 64), (2, 1)), net(1024, (32, 32), (2, 1))
    clip = dict(channels=(256,) * 5, resnets=(2, 2, 2, 2, 1), temporal_attention=(1, 1, 1, 1, 0), kind="temporal")
    clip256 = dict(s256_on_64, micro=())
    all_nets = {
        "s64": (s64,),
        "s64s256": (s64, s256_on_64),
        "s64s128s256": (s64, s128, s256),
        "s64s256s1024": (s64, dict(s256_on_64, normalize_input=released), s1024_on_256),
        "s64s128s256s512s1024": (s64, s128, s256, s512, s1024),
        "s64t16": (s64, clip),
        "s64t16s256": (s64, clip, clip256),
    }
    return {name: dict(nets=nets_, **text) for name, nets_ in all_nets.items()}


PRESETS = {"paper": _variants("paper"), "released": _variants("released")}
VARIANTS = {name: {preset: PRESETS[preset][name] for preset in PRESETS} for name in PRESETS["paper"]}


class Signals(NamedTuple):
    """The conditions of all nets, each array with the rows of the coarsest resolution.

    numbers: 'micro_NAME' and 'noise_step_NAME' [B]. vector_BD: of class and text, added to temb. text_BLD: the text's
    tokens, or None; mask_BL: which of them are attended to, None for all. conditions: {name: (variable, keep [B] or
    None)} of coarser levels.
    """

    c_noise_B: jax.Array
    numbers: dict[str, jax.Array]
    vector_BD: jax.Array
    text_BLD: jax.Array | None
    mask_BL: jax.Array | None
    keys_B: jax.Array | None
    conditions: dict[str, tuple[jax.Array, jax.Array | None]]


def as_leaves(x: Any) -> tuple[Any, ...]:
    """Return the resolutions of a variable, or of a shape."""
    several = isinstance(x, (tuple, list)) and not isinstance(x[0], int)
    return tuple(x) if several else (x,)


class NestedUNet(Backbone):
    """The backbone of a level whose variable is one image [B, H, W, C], or a tuple of them, coarse to fine; or clips.

    text_width: width of the text encoder's vectors; 0: no text.
    low_res_inputs: without them the inner nets see the features of the outermost only (App. E's nested UNet of a single
        resolution); they have outputs all the same.
    num_classes: labels are 0..num_classes-1 and null is num_classes; 0: no label.
    conditions: (name, None) of each coarser level of the hierarchy.
    remat: whether each ResNet and attention layer is recomputed in the backward pass. dtype: of convolutions, matrix
        products and activations; None is that of the input. Parameters are float32.
    """

    nets: Annotated[tuple[Net, ...], "the nets, innermost (coarsest) first"] = ()
    time_width: Annotated[int, "channels of the time embedding"] = 1024
    num_heads: Annotated[int, "heads of image and text attention"] = 8
    text_width: int = 0
    text_proj: Annotated[int, "width that the text is first projected to; 0: it is not"] = 0
    lm_layers: Annotated[int, "transformer layers over the text"] = 0
    masked_cross_attention: Annotated[bool, "whether attention to the text, and in it, leaves out padding"] = True
    low_res_inputs: Annotated[bool, "whether the inner nets see their own resolution"] = True
    num_classes: int = 0
    conditions: tuple[tuple[str, int | None], ...] = ()
    attention: Annotated[Attention, "its implementation; cudnn is fused, for NVIDIA GPUs in bfloat16"] = "xla"
    remat: bool = False
    dtype: DTypeLike | None = None

    buffers: ClassVar[tuple[str, ...]] = (r"/pos_emb/freqs$",)
    takes_text: ClassVar[bool] = True
    sees_noise_steps: ClassVar[bool] = True

    @classmethod
    def text_options(cls, width: int, max_tokens: int) -> dict[str, int]:
        return dict(text_width=width)

    @property
    def has_dropout(self) -> bool:
        """Whether training needs cond['dropout'], a key for each row."""
        return any(net.dropout for net in self.nets)

    def setup(self) -> None:
        if len(self.nets) > 1:
            self.inner_unet = self.clone(nets=self.nets[:-1], conditions=(), parent=None, name=None)
            return
        if self.text_width:
            if self.text_proj:
                self.lm_proj = blocks.linear(self.text_proj, dtype=self.dtype)
            layer = blocks.TokenBlock
            self.lm_head = [layer(self.num_heads, self.attention, self.dtype) for _ in range(self.lm_layers)]
            self.cond_emb = blocks.exact_linear(self.time_width, use_bias=False)
        if self.num_classes:
            self.class_emb = nn.Embed(self.num_classes + 1, self.time_width, embedding_init=nn.initializers.normal(1.0))

    def __call__(self, x: Any, c_noise_B: jax.Array, cond: Mapping[str, Any], *, train: bool) -> Any:
        """Return the outputs, like x and with the same rows.

        Args:
            x: the noisy resolutions, coarse to fine. A leaf may have fewer rows than the coarsest, those of take_rows.
            c_noise_B: the time, t - 1 in 0..999.
            cond: with the rows of the coarsest resolution, 'label' [B] int if there are classes; 'text' [B, L, D] if
                there is text and, optional, 'text_mask' [B, L] (each row has a token); 'micro_NAME' [B]; each condition
                by its name [B, h, w, c] and, optional, 'keep_NAME' [B] bool and 'noise_step_NAME' [B], 0..1000 (its
                layer is made if it is there at initialisation).
            train: whether there is dropout, whose keys are then cond['dropout'] [B].

        Raises:
            ValueError: if a condition is missing or unknown, or shapes do not fit the nets.
        """
        leaves = as_leaves(x)
        self.check_call(leaves, c_noise_B, cond, train)
        keys_B = cond["dropout"] if train and self.has_dropout else None
        vector_BD, text_BLD, mask_BL = self.condition(cond, self.dtype or leaves[0].dtype, c_noise_B.shape[0])
        numbers = {name: value for name, value in cond.items() if name.startswith(("micro_", "noise_step_"))}
        conditions = {name: (cond[name], cond.get(f"keep_{name}")) for name, _ in self.conditions}
        signals = Signals(c_noise_B, numbers, vector_BD, text_BLD, mask_BL, keys_B, conditions)
        outputs, _ = self.denoise(leaves, None, signals)
        outputs = tuple(out.astype(leaf.dtype) for out, leaf in zip(outputs, leaves, strict=True))
        return outputs if isinstance(x, (tuple, list)) else outputs[0]

    def condition(
        self, cond: Mapping[str, Any], dtype: DTypeLike, batch: int
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Return (what is added to temb [B, D], the text's tokens [B, L, C], which are attended to [B, L]).

        The tokens are None without text, and the mask is None if all of them are attended to.
        """
        if len(self.nets) > 1:
            return self.inner_unet.condition(cond, dtype, batch)
        wide = at_least_float32(dtype)
        vector_BD, text_BLD, mask_BL = jnp.zeros((batch, self.time_width), wide), None, None
        if self.num_classes:
            vector_BD = vector_BD + self.class_emb(cond["label"])
        if self.text_width:
            text_BLD = cond["text"].astype(dtype)
            mask_BL = cond["text_mask"] != 0 if "text_mask" in cond else None
            if self.text_proj:
                text_BLD = self.lm_proj(text_BLD)
            for layer in self.lm_head:
                text_BLD = layer(text_BLD, mask_BL if self.masked_cross_attention else None)
            padding_counts = not self.masked_cross_attention and self.lm_layers > 0
            where = None if mask_BL is None or padding_counts else mask_BL[..., None]
            vector_BD = vector_BD + self.cond_emb(jnp.mean(text_BLD.astype(wide), axis=1, where=where))
        return vector_BD, text_BLD, mask_BL if self.masked_cross_attention else None

    @nn.compact
    def denoise(
        self, leaves: tuple[jax.Array, ...], feature_RHWC: jax.Array | None, signals: Signals
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return (the outputs, coarse to fine, the last features of this net).

        feature_RHWC: the features from the net around this one.
        """
        net, rows = self.nets[-1], [leaf.shape[0] for leaf in leaves]
        own = jax.tree.map(lambda value: take_rows(value, *rows), signals)
        temb_BD = self.time_embedding(own)
        x_RHWC = self.entered(leaves[-1], feature_RHWC, own)
        context = blocks.Context(temb_BD, own.text_BLD, own.mask_BL, own.keys_B)

        last, skips = len(net.channels) - 1, [x_RHWC]
        for i in range(last + 1):
            stage = self.stage(f"down_blocks_{i}", i, net.resnets[i], "down" if i < last else "")
            x_RHWC, pushed = stage(x_RHWC, context)
            skips += pushed
        lows, x_RHWC = self.middle(leaves, x_RHWC, context, signals)
        for i in range(last + 1):
            level = last - i
            count = net.resnets[level] + 1
            stage = self.stage(f"up_blocks_{i}", level, count, "up" if level else "")
            x_RHWC, _ = stage(x_RHWC, context, skips[: -count - 1 : -1])
            del skips[-count:]

        h_RHWC = nn.silu(blocks.group_norm(net.groups, self.dtype, "norm_out")(x_RHWC))
        out_RHWC = blocks.Conv(leaves[-1].shape[-1], zero=True, dtype=self.dtype, name="conv_out")(h_RHWC)
        return (*lows, out_RHWC.reshape(leaves[-1].shape)), x_RHWC

    def time_embedding(self, own: Signals) -> jax.Array:
        """Return [B, D] float32 or better, which every ResNet of this net reads."""
        net, width = self.nets[-1], self.time_width
        hidden_BD = blocks.exact_linear(width, name="temb_layer1")(blocks.sinusoid(own.c_noise_B, width // 4))
        temb_BD = blocks.exact_linear(width, name="temb_layer2")(nn.silu(hidden_BD)) + own.vector_BD
        numbers = {}
        for name, default in net.micro:
            value_B = own.numbers.get(f"micro_{name}", jnp.full_like(own.c_noise_B, default))
            numbers[name] = jnp.minimum(value_B / default, 1) * default if name == "scale" else value_B * 1000
        for name, _ in self.conditions:
            if f"noise_step_{name}" in own.numbers:
                numbers[f"level_{name}"] = own.numbers[f"noise_step_{name}"]  # the name that checkpoints have
        return temb_BD + blocks.NumberEmbeddings(width, name="cond_layers")(numbers) if numbers else temb_BD

    def entered(self, x: jax.Array, feature_RHWC: jax.Array | None, own: Signals) -> jax.Array:
        """Return the net's first features: of its own resolution, of the coarser levels and of the net around it."""
        if feature_RHWC is not None and not self.low_res_inputs:
            return feature_RHWC
        net = self.nets[-1]
        x_RHWC = x if x.ndim == 4 else blocks.join_rows(x)
        if net.normalize_input:
            wide = x_RHWC.astype(at_least_float32(x.dtype))
            x_RHWC = (wide / jnp.std(wide, axis=(1, 2, 3), ddof=1, keepdims=True)).astype(x.dtype)
        for name, _ in self.conditions:
            z_BhwC, keep_B = own.conditions[name]
            z_BHWC = jax.image.resize(z_BhwC, (len(z_BhwC), *x_RHWC.shape[1:3], z_BhwC.shape[-1]), "bilinear")
            if keep_B is not None:
                z_BHWC = z_BHWC * keep_B[:, None, None, None]
            z_RHWC = blocks.repeat_rows(z_BHWC, len(x_RHWC)).astype(x_RHWC.dtype)
            x_RHWC = jnp.concatenate([x_RHWC, z_RHWC], axis=-1)
        x_RHWC = blocks.Conv(net.channels[0], dtype=self.dtype, name="conv_in")(x_RHWC)
        return x_RHWC if feature_RHWC is None else x_RHWC + feature_RHWC

    def middle(
        self, leaves: tuple[jax.Array, ...], x_RHWC: jax.Array, context: blocks.Context, signals: Signals
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return (outputs of the nets inside, features).

        The nets inside stand between two adapters; the innermost net has stages of its own instead.
        """
        if len(self.nets) == 1:
            last = len(self.nets[-1].channels) - 1
            x_RHWC, _ = self.stage("mid_blocks_0", last, 1, "", attention=1)(x_RHWC, context)
            x_RHWC, _ = self.stage("mid_blocks_1", last, 1, "", attention=0)(x_RHWC, context)
            return (), x_RHWC
        few, many = len(leaves[-1]), len(leaves[-2])
        feature_RHWC = self.adapter("in_adapter", self.nets[-2].channels[0], x_RHWC)
        feature_RHWC = blocks.join_rows(fill_rows(blocks.split_rows(feature_RHWC, few), many))
        lows, y_RHWC = self.inner_unet.denoise(leaves[:-1], feature_RHWC, signals)
        y_RHWC = blocks.join_rows(take_rows(blocks.split_rows(y_RHWC, many), few))
        return lows, x_RHWC + self.adapter("out_adapter", self.nets[-1].channels[-1], y_RHWC)

    def adapter(self, name: str, features: int, x_RHWC: jax.Array) -> jax.Array:
        """Return the convolution between two nets, frame by frame; 0 at the start."""
        return blocks.Conv(features, zero=True, dtype=self.dtype, name=name)(x_RHWC)

    def stage(self, name: str, level: int, resnets: int, resample: str, attention: int | None = None) -> blocks.Stage:
        """Return the stage at resolution `level` of this net. attention: layers after each ResNet; None: the net's."""
        net, own_resample = self.nets[-1], self.nets[-1].per_resolution("resample")
        if resample and not own_resample[level if resample == "down" else level - 1]:
            resample = "same"
        options = blocks.Options(
            width=net.channels[level],
            groups=net.groups,
            attention=net.per_resolution("attention")[level] if attention is None else attention,
            temporal_attention=net.per_resolution("temporal_attention")[level],
            ffn=net.attention_ffn,
            num_heads=self.num_heads,
            temporal=net.kind == "temporal",
            rotary=net.rotary,
            dropout=net.dropout,
            implementation=self.attention,
            remat=self.remat,
            dtype=self.dtype,
        )
        return blocks.Stage(options, resnets, resample, name=name)

    def check_shape(self, shape: Shape) -> None:
        """Raise ValueError if options contradict each other or a shape, without batch, does not fit the nets."""
        if self.time_width % 8:
            raise ValueError(f"NestedUNet: time_width {self.time_width}, expected a multiple of 8")
        if not self.text_width and (self.text_proj or self.lm_layers or not self.masked_cross_attention):
            raise ValueError(f"NestedUNet: text_proj {self.text_proj}, lm_layers {self.lm_layers}, "
                             f"masked_cross_attention {self.masked_cross_attention} without text: set 0, 0, True, or "
                             "give the level text")  # fmt: skip
        if self.lm_layers and (self.text_proj or self.text_width) % self.num_heads:
            raise ValueError(f"NestedUNet: text of width {self.text_proj or self.text_width} does not divide into "
                             f"num_heads {self.num_heads}")  # fmt: skip
        if not self.low_res_inputs and len(self.nets) == 1:
            raise ValueError("NestedUNet: low_res_inputs is False but there is only one net; set it to True")
        check_shapes(self.nets, as_leaves(shape), self.num_heads)

    def check_call(self, leaves: tuple[Any, ...], c_noise_B: jax.Array, cond: Mapping[str, Any], train: bool) -> None:
        """Raise ValueError, in one line, for inputs that do not fit: flax and XLA would say it at length."""
        self.check_shape(tuple(leaf.shape[1:] for leaf in leaves))
        rows = [len(leaf) for leaf in leaves]
        if rows[0] != len(c_noise_B) or any(few > many for many, few in itertools.pairwise(rows)):
            raise ValueError(f"NestedUNet: resolutions of {rows} rows, coarse to fine, and {len(c_noise_B)} times; "
                             "expected as many of the first as times, and no more of a finer one")  # fmt: skip
        names = [name for name, _ in self.conditions]
        required = ["label"] * (self.num_classes > 0) + ["text"] * (self.text_width > 0) + names
        optional = {"dropout", *(f"{what}_{name}" for name in names for what in ("keep", "noise_step"))}
        optional |= {"text_mask"} if self.text_width else set()
        optional |= {f"micro_{name}" for net in self.nets for name, _ in net.micro}
        missing = [name for name in required if name not in cond]
        unknown = sorted(set(cond) - set(required) - optional)
        if missing or unknown:
            raise ValueError(f"NestedUNet: cond has {sorted(cond)}, expected {required} (optional {sorted(optional)}): "
                             f"missing {missing}, unknown {unknown}; see num_classes, text_width, conditions, "
                             "micro")  # fmt: skip
        if train and self.has_dropout and "dropout" not in cond:
            raise ValueError("NestedUNet: training with dropout needs cond['dropout'], a key for each row")
        B, tokens = rows[0], cond["text"].shape[1:2] if self.text_width else ()
        shapes = {"text": (B, *tokens, self.text_width), "text_mask": (B, *tokens)}
        for name, shape in sorted((name, value.shape) for name, value in cond.items()):
            found = f"NestedUNet: cond[{name!r}] has shape {shape}, expected"
            if name in names and (len(shape) != 4 or shape[0] != B):
                raise ValueError(f"{found} ({B}, height, width, channels)")
            if name not in names and shape != shapes.get(name, (B,)):
                raise ValueError(f"{found} {shapes.get(name, (B,))}")
