"""Reads options: the helpers that turn what a config says into objects, or into an error of one line.

Every error names the option, the value found and the values allowed.
"""

from typing import Any

from ml_collections import ConfigDict


def choose(key: str, name: str, table) -> Any:
    """table[name], or a one-line error that names the key, the value found and the values allowed."""
    if name not in table:
        raise ValueError(f"config.{key}: {name!r} given; choose from {', '.join(map(repr, table))}")
    return table[name]


def construct(key: str, constructor, options: dict, derived: dict):
    """constructor(**options, **derived); `derived` is what other parts of the config decide.

    Options that it does not take, that others decide or whose values it refuses are one-line errors at `key`."""
    decided = [name for name in options if name in derived]
    if decided:
        raise ValueError(f"config.{key}: {', '.join(decided)} is decided by other parts of the config; remove it here")
    try:
        return constructor(**options, **derived)
    except TypeError as error:
        raise ValueError(f"config.{key}: {error}; found options {', '.join(options)}") from error
    except ValueError as error:
        raise ValueError(f"config.{key}: {error}") from error


def to_plain(config):
    """A config as dicts, lists and values (JSON): what is stored beside checkpoints and compared."""
    if isinstance(config, (ConfigDict, dict)):
        return {key: to_plain(value) for key, value in config.items()}
    return [to_plain(value) for value in config] if isinstance(config, (tuple, list)) else config


def override(config, changes, key: str) -> None:
    """Sets what a nested dict of changes says; ValueError for a key that config does not have, or a part that is no
    dict."""
    for name, value in changes.items():
        if name not in config:
            raise ValueError(f"config.{key}.{name}: there is no such option; choose from {', '.join(config)}")
        if isinstance(config[name], ConfigDict):
            if not isinstance(value, (dict, ConfigDict)):
                raise ValueError(f"config.{key}.{name}: {value!r} given, expected a dict of its options")
            override(config[name], value, f"{key}.{name}")
        else:
            with config.ignore_type():
                config[name] = value
