"""The page that documents every option, from the declarations (docs/options.md)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nested.build import options
from nested.build.options import REQUIRED, Option
from nested.build.parts import BACKBONES, DENSITIES, SAMPLERS
from nested.build.sections import SECTIONS, LevelOptions, RunOptions
from nested.diffusion.process import Process

# What a level chooses by name: key of config.levels[i] -> table of parts.
LEVEL_PARTS = {"backbone": BACKBONES, "process": {"": Process}, "process.density": DENSITIES, "sampler": SAMPLERS}


def option_reference() -> str:
    """Every option of a config as a page of Markdown: default, values allowed, what it does."""
    lines = [
        "# Options",
        "",
        "Generated from the declarations in the code. On the command line: `--config.train.steps=100`,",
        "`--config.levels[0].sigma=0.5`.",
        "",
        "## Top level",
        "",
        *_table(options.declared(RunOptions)),
    ]
    for name, section in SECTIONS.items():
        lines += ["", f"## config.{name}", "", *_table(section.declared(), section.parts)]
    lines += ["", "## config.levels[i]", "", *_table(options.declared(LevelOptions))]
    for title, table in LEVEL_PARTS.items():
        lines += ["", f"## config.levels[i].{title}"]
        for name, kind in table.items():
            if declared := options.declared(kind):
                lines += ["", *([f"### {name}", ""] if name else []), *_table(declared)]
    return "\n".join(lines) + "\n"


def _table(declared: Mapping[str, Option], parts: Mapping[str, Any] | None = None) -> list[str]:
    """The rows of some options. parts: of a section that chooses one; an option then says which of them read it."""
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for name, option in declared.items():
        default = "required" if option.default is REQUIRED else f"`{_shown(option.default)}`"
        allowed = " | ".join(f"`{_shown(value)}`" for value in option.allowed)
        readers = [part for part, kind in (parts or {}).items() if name in options.declared(kind)]
        comment = option.comment + (f". One of {allowed}" if allowed else "")
        comment += f". Read by {', '.join(readers)}" if readers and len(readers) < len(parts or {}) else ""
        lines.append(f"| `{name}` | {default} | {comment.replace('|', chr(92) + '|')} |")
    return lines


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        inner = options.default_values(type(value)).items()
        return f"dict({', '.join(f'{name}={_shown(one)}' for name, one in inner)})"
    return repr(value).replace("'", '"')
