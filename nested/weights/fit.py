"""Which levels of another run fit a config: a comparison of two configs as plain dicts, as checkpoints store them.

A level of a shallower hierarchy fits a deeper one where its network is the same (CVPR Sec. 4: L levels reuse L - 1).
"""

from collections.abc import Callable, Mapping
from typing import Any

# config.hierarchy.conditioning -> the coarser levels, of all of them in order, that a level sees.
CONDITIONINGS: dict[str, Callable[[tuple], tuple]] = {
    "all_higher": lambda coarser: coarser,
    "next_higher": lambda coarser: coarser[-1:],
}


def shared_levels(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the levels of `ours` whose networks are those of `theirs`: same name, shape, backbone, conditions,
    classes and text.

    Args: two whole configs as plain dicts (nested.build.options.to_plain), brought up to date if they were saved.
    """
    there, here = networks(theirs), networks(ours)
    return tuple(name for name in here if there.get(name) == here[name])


def networks(config: Mapping[str, Any]) -> dict[str, tuple]:
    """{level: everything in the config that its network's parameters and inputs depend on}."""
    hierarchy, coarser, result = config["hierarchy"], (), {}
    for level in config["levels"]:
        classes = config["data"]["num_classes"] if level["name"] in hierarchy["label_levels"] else 0
        text = config["text"] if level["name"] in hierarchy["text_levels"] else {}
        text = [text.get(key) for key in ("encoder", "max_tokens", "width")]
        seen = CONDITIONINGS[hierarchy["conditioning"]](coarser)
        noise = hierarchy["cond_noise"] if seen else ""
        result[level["name"]] = (level["shape"], level["backbone"], seen, classes, text, noise)
        coarser += ((level["name"], level["shape"], level["backbone"].get("patch_size")),)
    return result
