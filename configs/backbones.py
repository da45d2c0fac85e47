"""The options of every backbone, by its function: those of a named variant, with changes. Used as common.uvit(...)."""

from collections.abc import Mapping


def with_changes(what: str, options: dict, variant: Mapping, changes: dict) -> dict:
    """A backbone's options with those of a variant, then with changes. ValueError: a change that is no option."""
    unknown = sorted(set(changes) - set(options))
    if unknown:
        raise ValueError(f"{what}() has no option {', '.join(unknown)}; it has {', '.join(options)}")
    return options | dict(variant) | changes


def uvit(variant: str = "", **changes) -> dict:
    """U-ViT's options: those of a named variant (nested/models/uvit.py VARIANTS), with changes."""
    from nested.models.uvit import VARIANTS

    options = dict(
        name="uvit",
        width=512,
        depth=12,
        num_heads=8,
        mlp_ratio=4,
        qkv_bias=False,
        injection="append_tokens",  # append_tokens | deconv_concat: how coarser levels enter (CVPR | ICLR)
        inject_every=0,  # deconv_concat: after every so many blocks, ICLR: 2
        inject_layers=0,  # deconv_concat: linear layers at each place, ICLR: 2
        empty="token",  # token | variable: what is learned in place of a dropped level
        time_mlp=False,
        skip=True,
        final_conv=True,
        attention="xla",
    )
    return with_changes("uvit", options, VARIANTS[variant] if variant else {}, changes)


def hdit(variant: str = "", **changes) -> dict:
    """HDiT's options: those of a named variant (nested/models/hdit.py VARIANTS), with changes.

    `windows` follows from `attentions` where neither names it: kernels of 7, windows of 8."""
    from nested.models.hdit import VARIANTS

    options = dict(
        name="hdit",
        depths=(2, 4),
        widths=(256, 512),
        attentions=("neighborhood", "global"),
        windows=(),
        head_widths=64,
        ff_widths=None,
        dropouts=0.0,
        mapping_depth=2,
        mapping_width=256,
        mapping_ff_width=None,
        mapping_dropout=0.0,
        position="rope",  # rope | additive
        feed_forward="geglu",  # geglu | gelu
        skip="lerp",  # lerp | add | concat
        attention="xla",
        neighborhood="auto",  # auto | reference | blocked
    )
    options = with_changes("hdit", options, VARIANTS[variant] if variant else {}, changes)
    sizes = {"neighborhood": 7, "shifted_window": 8}
    options["windows"] = options["windows"] or tuple(sizes.get(kind, 0) for kind in options["attentions"])
    return options


def dit(variant: str = "", **changes) -> dict:
    """DiT's options: those of a named variant (nested/models/dit.py VARIANTS), with changes."""
    from nested.models.dit import VARIANTS

    options = dict(
        name="dit",
        width=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4,
        tanh_gelu=True,
        empty="variable",  # variable | token: what is learned in place of a dropped level
        learn_variance=False,
        attention="xla",
    )
    return with_changes("dit", options, VARIANTS[variant] if variant else {}, changes)


def res_mlp(variant: str = "", **changes) -> dict:
    """ResMLP's options: those of a named variant (nested/models/res_mlp.py VARIANTS), with changes."""
    from nested.models.res_mlp import VARIANTS

    options = dict(name="res_mlp", width=1536, depth=12, time_width=256, mid_width=1536, label_width=512)
    return with_changes("res_mlp", options, VARIANTS[variant] if variant else {}, changes)


def nested_unet(variant: str = "", preset: str = "paper", **changes) -> dict:
    """NestedUNet's options: those of a named variant (nested/models/nested_unet.py VARIANTS) in the preset 'paper' or
    'released', with changes. `nets` is innermost first."""
    options = dict(
        name="nested_unet",
        nets=(),  # net(...), innermost first
        time_width=1024,
        num_heads=8,
        text_proj=0,
        lm_layers=0,
        masked_cross_attention=True,
        low_res_inputs=True,
        attention="xla",
    )
    chosen = {}
    if variant:
        from nested.models.nested_unet import VARIANTS

        chosen = dict(VARIANTS[variant][preset])
        chosen.pop("text_width")  # config.text.width
        chosen["nets"] = tuple(net(**options) for options in chosen["nets"])
    return with_changes("nested_unet", options, chosen, changes)


def net(channels: tuple, resnets: tuple, attention: tuple = (), **changes) -> dict:
    """One nesting level of nested_unet, resolutions fine to coarse (nested/models/nested_unet.py Net)."""
    options = dict(
        channels=channels,
        resnets=resnets,
        attention=attention,  # attention layers after each ResNet, per resolution; () is none
        temporal_attention=(),
        kind="spatial",  # spatial | temporal (resamples frames)
        resample=(),
        normalize_input=False,
        attention_ffn=False,
        micro=(),
        groups=32,
        dropout=0.0,
        rotary=False,
    )
    return with_changes("net", options, {}, changes)
