"""Configs of earlier runs, as dicts read from config.json, from a checkpoint or from a weight file."""

import copy
from collections.abc import Mapping
from typing import Any

from nested.build.options import declared, declared_by_all, default_values, to_plain
from nested.build.parts import BACKBONES
from nested.build.sections import SECTIONS, LevelOptions, Section, default_options

RENAMED = {"hierarchy": {"cond_level": "cond_noise_step"}}  # section -> {name in earlier versions: name today}


def upgrade_saved_config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an earlier run as this version would have written it.

    Options that were renamed get today's names. An option that the run's version did not have gets its default, which
    is what that version did. So does an option that the chosen part does not read, as some earlier versions let those
    have other values. Everything else, unknown options included, stays as it is.

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
    for name, section in SECTIONS.items():
        result[name] |= to_plain(_unread_defaults(section, result[name]))
    for level in result["levels"]:
        _fill(level, to_plain(default_values(LevelOptions)))
        _fill(level["backbone"], to_plain(default_values(BACKBONES.get(level["backbone"].get("name")))))
    return result


def _unread_defaults(section: Section, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the options that the part chosen in a section does not read."""
    if not section.choice or saved[section.choice] not in section.parts:
        return {}
    read = declared(section.parts[saved[section.choice]])
    of_parts = declared_by_all(section.parts.values())
    return {name: option.default for name, option in of_parts.items() if name not in read}


def _fill(options: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Adds the options that are missing, also in the sections within."""
    for name, value in defaults.items():
        if isinstance(options.setdefault(name, copy.deepcopy(value)), dict) and isinstance(value, Mapping):
            _fill(options[name], value)
