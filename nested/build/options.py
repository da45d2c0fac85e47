"""Options: how parts declare them, and how a config's values become objects or an error of one line.

A part (a backbone, a sampler, an encoder, a source, a space, ...) is a dataclass; linen modules are dataclasses too. An
option is a field whose type is annotated with a comment of one line:

    width: Annotated[int, "channels of a token"] = 512
    empty: Annotated[Literal["token", "variable"], "what is learned in place of a dropped level"] = "token"

The field's default is the option's default, a Literal gives the values allowed, and a field without a comment is not an
option: something else in the config decides it. Nothing is registered; the tables of nested/build/parts.py name the
parts, and configs/common.py takes its defaults from them.

Every error names the option, the value found and the values allowed.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

Config = Any  # ml_collections.ConfigDict, whose stubs make every section a union of values without attributes


class Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a part.

    default: REQUIRED where it must be given. comment: what it does, in one line. type: what is written in front of the
    comment. allowed: the values that it may have; () where the type alone decides.
    """

    name: str
    default: Any
    comment: str
    type: Any
    allowed: tuple = ()


def declared(kind: Any) -> dict[str, Option]:
    """{name: Option} of the fields of the dataclass `kind` that are options, in their order; {} for a function."""
    result = {}
    for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        if typing.get_origin(field.type) is typing.Annotated:
            base, comment = typing.get_args(field.type)[:2]
            allowed = typing.get_args(base) if typing.get_origin(base) is typing.Literal else ()
            result[field.name] = Option(field.name, _default(field), comment, base, allowed)
    return result


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def default_values(kind: Any) -> dict[str, Any]:
    """{name: default} of the options of `kind` that have a default."""
    return {name: option.default for name, option in declared(kind).items() if option.default is not REQUIRED}


def declared_by_all(kinds: Iterable[Any]) -> dict[str, Option]:
    """The options of parts that share one section of the config, each once.

    Raises ValueError where two parts declare an option of the same name differently: it belongs in a common base class.
    """
    result: dict[str, Option] = {}
    for kind in kinds:
        for name, option in declared(kind).items():
            if result.setdefault(name, option) != option:
                raise ValueError(f"{kind.__name__} declares the option {name} unlike another part of its section")
    return result


def check_unread(key: str, options: Mapping[str, Any], chosen: str, table: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is set but that the part chosen from `table` does not read.

    key: the section, such as 'data'. options: its values. An option that no part of the table declares is not looked
    at: it belongs to the section itself.
    """
    read = declared(table[chosen])
    for name, option in declared_by_all(table.values()).items():
        if name not in read and options[name] != option.default:
            readers = [part for part, kind in table.items() if name in declared(kind)]
            raise ValueError(
                f"config.{key}.{name} is {options[name]!r}, but {chosen!r} does not read it, only "
                f"{', '.join(readers)}; set it to {option.default!r}"
            )


def choose(key: str, name: Any, table: Collection) -> Any:
    """table[name], or `name` where the table is a plain collection of names.

    Raises ValueError, naming the option `key` and the names allowed, for any other name.
    """
    if name not in table:
        raise ValueError(f"config.{key}: {name!r} given; choose from {', '.join(map(repr, table))}")
    return table[name] if isinstance(table, Mapping) else name


def construct(key: str, kind: Callable, options: Mapping[str, Any], derived: Mapping[str, Any]) -> Any:
    """kind(**options, **derived), where `derived` is what other parts of the config decide.

    An option whose type is a dataclass is given as a dict of that one's options.

    Raises ValueError, with `key` for where the options stand, for an option that `kind` does not have, that is decided
    elsewhere, that is missing or whose value is not allowed, and for whatever `kind` itself refuses.
    """
    if decided := [name for name in options if name in derived]:
        raise ValueError(f"config.{key}: {', '.join(decided)} is decided by other parts of the config; remove it here")
    known = declared(kind) or _parameters(kind)
    known = {name: option for name, option in known.items() if name not in derived}
    given = check_values(key, options, known)
    if missing := [name for name, option in known.items() if option.default is REQUIRED and name not in options]:
        raise ValueError(f"config.{key}: the option {', '.join(missing)} is missing")
    try:
        return kind(**given, **derived)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.{key}: {error}") from error


def check_values(key: str, options: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """The options, with those that are dataclasses made of the dicts that stand for them.

    Raises ValueError, with `key` for where they stand, for one that is not `known` and for a value not allowed.
    """
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"config.{key}: unknown option {', '.join(unknown)}; choose from {', '.join(known)}")
    return {name: _checked(f"{key}.{name}", value, known[name]) for name, value in options.items()}


def _checked(key: str, value: Any, option: Option) -> Any:
    """The value of an option, if it is allowed; where the option's type is a dataclass, or a tuple of one, made of the
    dict or dicts of its options."""
    if option.allowed:
        choose(key, value, option.allowed)
    if dataclasses.is_dataclass(option.type):
        return _made(key, value, option.type)
    if typing.get_origin(option.type) is tuple and dataclasses.is_dataclass(typing.get_args(option.type)[0]):
        return tuple(_made(f"{key}[{i}]", one, typing.get_args(option.type)[0]) for i, one in enumerate(value))
    return value


def _made(key: str, value: Any, kind: Any) -> Any:
    return construct(key, kind, dict(value), {}) if isinstance(value, (Mapping, ConfigDict)) else value


def _parameters(kind: Callable) -> dict[str, Option]:
    """The parameters of a constructor that declares no options."""
    parameters = inspect.signature(kind).parameters
    own = ("parent", "name") if "parent" in parameters else ()  # flax's, where `kind` is a linen module
    return {
        name: Option(name, REQUIRED if one.default is one.empty else one.default, "", one.annotation)
        for name, one in parameters.items()
        if name not in own
    }


def to_plain(config: Any) -> Any:
    """A config as dicts, lists and values (JSON): what is stored beside checkpoints and compared."""
    if isinstance(config, (ConfigDict, dict)):
        return {key: to_plain(value) for key, value in config.items()}
    return [to_plain(value) for value in config] if isinstance(config, (tuple, list)) else config


def from_plain(value: Any) -> Any:
    """The config that `to_plain` was given, back from JSON: dicts become ConfigDict, lists become tuples."""
    if isinstance(value, dict):
        return ConfigDict({key: from_plain(one) for key, one in value.items()})
    return tuple(from_plain(one) for one in value) if isinstance(value, list) else value


def override(config: Config, changes: Mapping[str, Any], key: str) -> None:
    """Sets in `config` what a nested dict of changes says.

    Raises ValueError for a name that config does not have, and for a section whose new value is not a dict.
    """
    for name, value in changes.items():
        if name not in config:
            raise ValueError(f"config.{key}.{name}: there is no such option; choose from {', '.join(config)}")
        if isinstance(config[name], ConfigDict):
            if not isinstance(value, (dict, ConfigDict)):
                raise ValueError(f"config.{key}.{name}: {value!r} given, expected a dict of its options")
            override(config[name], dict(value), f"{key}.{name}")
        else:
            with config.ignore_type():
                config[name] = value
