"""Configs of earlier runs, as dicts read from config.json, from a checkpoint or from a weight file."""

import copy
from collections.abc import Mapping
from typing import Any

from nested.build.options import default_values, to_plain
from nested.build.parts import BACKBONES
from nested.build.sections import LevelOptions, default_options

RENAMED = {"hierarchy": {"cond_level": "cond_noise_step"}}  # section -> {name in earlier versions: name today}


def upgrade_saved_config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an earlier run as this version would have written it.

    Options that were renamed get today's names. An option that the run's version did not have gets its default, which
    is what that version did. Everything else, unknown options included, stays as it is.

    Raises ValueError if `saved` is not a config.
    """
    if "levels" not in saved:
        raise ValueError(f"not the config of a run: it has no levels, only {', '.join(saved)}")
    result = copy.deepcopy(dict(saved))
    for section, names in RENAMED.items():
        for old, new in names.items():
            if old in result.get(section, {}):
                result[section][new] = result[section].pop(old)
    _fill(result, to_plain(default_options()))
    for level in result["levels"]:
        _fill(level, to_plain(default_values(LevelOptions)))
        _fill(level["backbone"], to_plain(default_values(BACKBONES.get(level["backbone"].get("name")))))
    return result


def _fill(options: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Adds the options that are missing, also in the sections within."""
    for name, value in defaults.items():
        if isinstance(options.setdefault(name, copy.deepcopy(value)), dict) and isinstance(value, Mapping):
            _fill(options[name], value)
