"""nested/build/options.py: parts declare their options as fields; what is wrong with a value is said in one line."""

import dataclasses
from typing import Annotated, Literal

import flax.linen as nn
import pytest

from nested.build import options
from nested.build.options import Option, construct, declared


@dataclasses.dataclass(frozen=True)
class Common:
    path: Annotated[str, "a folder"] = ""


@dataclasses.dataclass(frozen=True)
class Folder(Common):
    stride: Annotated[int, "every stride-th file"] = 4
    workers: int = 2


@dataclasses.dataclass(frozen=True)
class Archive(Common):
    index: Annotated[Literal["first", "last"], "where the index stands"] = "last"


class Network(nn.Module):
    width: Annotated[int, "channels"]
    heads: Annotated[tuple[int, ...], "per stage"] = ()
    num_classes: int = 0


SOURCES = {"folder": Folder, "archive": Archive}


def test_options_are_the_fields_with_a_comment():
    assert declared(Folder) == {
        "path": Option("path", "", "a folder", str),
        "stride": Option("stride", 4, "every stride-th file", int),
    }
    assert declared(Archive)["index"].allowed == ("first", "last")
    assert list(declared(Network)) == ["width", "heads"]
    assert declared(Network)["width"].default is options.REQUIRED and declared(len) == {}
    assert options.default_values(Network) == {"heads": ()}


def test_construct_gives_a_part_its_options_and_what_is_decided_elsewhere():
    network = construct("backbone", Network, dict(width=8), dict(num_classes=10))
    assert (network.width, network.heads, network.num_classes) == (8, (), 10)


@pytest.mark.parametrize(
    "kind, given, message",
    [
        (Network, dict(), "config.part: the option width is missing"),
        (Network, dict(width=8, depth=2), "config.part: unknown option depth; choose from width, heads"),
        (Network, dict(width=8, num_classes=2), "config.part: num_classes is decided by other parts of the config"),
        (Archive, dict(index="middle"), "config.part.index: 'middle' given; choose from 'first', 'last'"),
        (Folder, dict(workers=3), "config.part: unknown option workers; choose from path, stride"),
    ],
)
def test_construct_refuses(kind, given, message):
    with pytest.raises(ValueError) as error:
        construct("part", kind, given, dict(num_classes=1) if kind is Network else {})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_within_an_option_are_constructed():
    @dataclasses.dataclass(frozen=True)
    class Ensemble:
        first: Annotated[Archive, "tried first"] = Archive()
        others: Annotated[tuple[Archive, ...], "tried in turn"] = ()

    made = construct("part", Ensemble, dict(first=dict(index="first"), others=(dict(path="x"), Archive())), {})
    assert made == Ensemble(Archive(index="first"), (Archive(path="x"), Archive()))
    message = r"config.part.others\[1\]: unknown option stride; choose from path, index"
    with pytest.raises(ValueError, match=message):
        construct("part", Ensemble, dict(others=(dict(), dict(stride=1))), {})


def test_an_option_that_is_set_but_not_read_is_refused():
    section = dict(path="x", stride=4, index="last")
    options.check_unread("data", section, "folder", SOURCES)
    message = "config.data.stride is 5, but 'archive' does not read it, only folder; set it to 4"
    with pytest.raises(ValueError, match=message):
        options.check_unread("data", dict(section, stride=5), "archive", SOURCES)


def test_parts_of_one_section_agree_on_an_option():
    @dataclasses.dataclass(frozen=True)
    class Other:
        stride: Annotated[int, "every stride-th file"] = 5

    assert list(options.declared_by_all(SOURCES.values())) == ["path", "stride", "index"]
    with pytest.raises(ValueError, match="Other declares the option stride unlike another part"):
        options.declared_by_all((Folder, Other))
