"""nested/build/sections.py: the sections of a config, and the page that documents them."""

import dataclasses
from typing import Annotated

import pytest

from configs import common
from nested.build.options import declared, default_values, to_plain
from nested.build.parts import SOURCES
from nested.build.reference import option_reference
from nested.build.sections import SECTIONS, ClipScoreOptions, RunOptions, Section, default_options


def test_the_config_has_every_declared_option_and_no_other():
    config = to_plain(common.default())
    for name, section in SECTIONS.items():
        assert section.declared().keys() == config[name].keys(), name
    assert set(default_options()) <= set(config)


def test_a_section_that_is_an_option_is_a_dict():
    assert SECTIONS["evaluate"].defaults()["clip"] == default_values(ClipScoreOptions)


def test_the_choice_of_a_section_allows_its_parts():
    choice = SECTIONS["data"].declared()["source"]
    assert choice.allowed == tuple(SOURCES) and choice.default == "digits"


def test_an_option_is_declared_once_in_a_section():
    @dataclasses.dataclass(frozen=True)
    class Own:
        path: Annotated[str, "a folder"] = ""

    with pytest.raises(ValueError, match="the section and a part of it declare the same option: path"):
        Section(Own, "source", "digits", SOURCES).declared()


def test_every_option_has_a_comment_of_one_line():
    for kind in (RunOptions, *(section for section in SECTIONS.values())):
        options = kind.declared() if isinstance(kind, Section) else declared(kind)
        for name, option in options.items():
            assert option.comment.strip() and "\n" not in option.comment, name


def test_the_reference_names_every_option():
    text = option_reference()
    for name, section in SECTIONS.items():
        rows = text.partition(f"## config.{name}\n")[2].partition("\n## ")[0]
        for option in section.declared():
            assert f"| `{option}` | " in rows, (name, option)
    assert "| `frames` | `16` | frames of a clip" in text and "Read by clip_folder, webdataset_clips |" in text
    assert "| `noise_gamma` | `inf` | " in text and '| `clip` | `dict(name="clip_vitb16", weights="")` | ' in text
    assert all(line.replace("\\|", "").count("|") == 4 for line in text.splitlines() if line.startswith("|"))
