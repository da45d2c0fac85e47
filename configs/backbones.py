"""The options of every backbone, by its function: those of a named variant, with changes. Used as common.uvit(...).

Defaults are those that the networks in nested/models declare; patch_size is an argument of common.level().
"""

from collections.abc import Mapping
from typing import Any

from nested.build.options import default_values
from nested.build.parts import BACKBONES
from nested.models import dit as dit_network
from nested.models import hdit as hdit_network
from nested.models import nested_unet as nested_unet_network
from nested.models import res_mlp as res_mlp_network
from nested.models import uvit as uvit_network
from nested.models.unet_nets import Net


def with_changes(what: str, options: dict, variant: Mapping[str, Any], changes: dict) -> dict:
    """A backbone's options with those of a variant, then with changes. ValueError: a change that is not an option."""
    unknown = sorted(set(changes) - set(options))
    if unknown:
        raise ValueError(f"{what}() has no option {', '.join(unknown)}; it has {', '.join(options)}")
    return options | dict(variant) | changes


def defaults(name: str) -> dict[str, Any]:
    """The options of the backbone `name` as its class declares them, without patch_size."""
    declared = {option: value for option, value in default_values(BACKBONES[name]).items() if option != "patch_size"}
    return dict(name=name, **declared)


def uvit(variant: str = "", **changes: Any) -> dict:
    """U-ViT's options: those of a named variant (nested/models/uvit.py VARIANTS), with changes."""
    return with_changes("uvit", defaults("uvit"), uvit_network.VARIANTS[variant] if variant else {}, changes)


def hdit(variant: str = "", **changes: Any) -> dict:
    """HDiT's options: those of a named variant (nested/models/hdit.py VARIANTS), with changes.

    `windows` follows from `attentions` if neither names it: kernels of 7, windows of 8."""
    chosen = hdit_network.VARIANTS[variant] if variant else {}
    options = with_changes("hdit", defaults("hdit"), chosen, changes)
    options["windows"] = options["windows"] or hdit_network.default_windows(options["attentions"])
    return options


def dit(variant: str = "", **changes: Any) -> dict:
    """DiT's options: those of a named variant (nested/models/dit.py VARIANTS), with changes."""
    return with_changes("dit", defaults("dit"), dit_network.VARIANTS[variant] if variant else {}, changes)


def res_mlp(variant: str = "", **changes: Any) -> dict:
    """ResMLP's options: those of a named variant (nested/models/res_mlp.py VARIANTS), with changes."""
    return with_changes("res_mlp", defaults("res_mlp"), res_mlp_network.VARIANTS[variant] if variant else {}, changes)


def nested_unet(variant: str = "", preset: str = "paper", **changes: Any) -> dict:
    """NestedUNet's options: those of a named variant (nested/models/nested_unet.py VARIANTS) in the preset 'paper' or
    'released', with changes. `nets` is innermost first."""
    chosen = {}
    if variant:
        chosen = dict(nested_unet_network.VARIANTS[variant][preset])
        chosen.pop("text_width")  # config.text.width
        chosen["nets"] = tuple(net(**options) for options in chosen["nets"])
    return with_changes("nested_unet", defaults("nested_unet"), chosen, changes)


def net(channels: tuple, resnets: tuple, attention: tuple = (), **changes: Any) -> dict:
    """One nesting level of nested_unet, resolutions fine to coarse (nested/models/unet_nets.py Net)."""
    options = dict(channels=channels, resnets=resnets) | default_values(Net)
    return with_changes("net", options, dict(attention=attention), changes)
