"""The two versions of Nested Diffusion as options: what config.hierarchy.preset requires of a config.

                    cvpr (arXiv 2412.05984)                     iclr (its earlier anonymous draft)
    a level sees    all coarser levels                          the next coarser one (Markovian)
    as              tokens, appended once at the input          features on its own grid by transposed convolution,
                                                                joined every two blocks, then two linear layers
    dropped         10 % of training rows                       50 %
    features        a vector of each of M x M crops,            one feature map, pooled to every level's grid
                    a pooled map for crops below 64 px

The options are independent: with preset '' any mixture trains. Guidance, a choice of sampling, is not compared: the
draft uses one weight at all levels, and CVPR Sec. 4.2 weights that decay towards the finest.
"""

import types

from nested.build.options import Config

HIERARCHY = types.MappingProxyType({
    "cvpr": types.MappingProxyType(dict(conditioning="all_higher", cond_drop=0.1, cond_noise="sigma")),
    "iclr": types.MappingProxyType(dict(conditioning="next_higher", cond_drop=0.5, cond_noise="sigma")),
})  # fmt: skip
BACKBONE = types.MappingProxyType({
    "cvpr": types.MappingProxyType(dict(injection="append_tokens", inject_every=0, inject_layers=0)),
    "iclr": types.MappingProxyType(dict(injection="deconv_concat", inject_every=2, inject_layers=2)),
})  # fmt: skip
FEATURES = types.MappingProxyType({"cvpr": ("crops", "map"), "iclr": ("map", "codec")})  # how sources' names begin


def check_preset(config: Config) -> None:
    """Raise ValueError, naming the option, if the config contradicts its hierarchy.preset; '' allows everything."""
    name = config.hierarchy.preset
    if not name:
        return
    if name not in HIERARCHY:
        raise ValueError(f"config.hierarchy.preset {name!r}: choose from {', '.join(HIERARCHY)}, or '' for any options")
    for option, value in HIERARCHY[name].items():
        _must_be(name, f"hierarchy.{option}", config.hierarchy[option], value)
    for i, level in enumerate(config.levels):
        for option, value in BACKBONE[name].items():
            _must_be(name, f"levels[{i}].backbone.{option}", level.backbone.get(option, "absent"), value)
        if i < len(config.levels) - 1 and not level.source.startswith(FEATURES[name]):
            kinds = " or ".join(f"{kind}..." for kind in FEATURES[name])
            _must_be(name, f"levels[{i}].source", level.source, kinds)


def _must_be(preset, option, found, expected):
    if found != expected:
        raise ValueError(
            f"config.{option} is {found!r} but hierarchy.preset is {preset!r}, which means {expected!r}: change one of "
            "them; preset '' allows any mixture"
        )
