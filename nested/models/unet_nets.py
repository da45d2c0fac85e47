"""The nets of a NestedUNet (nested/models/nested_unet.py) as data, and their checks.

Shapes must halve into one another, and norms and heads must divide the channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from nested.models.unet_blocks import ATTENTION_GROUPS, TEMPORAL_HEAD_WIDTH

Kind = Literal["spatial", "temporal"]


@dataclasses.dataclass(frozen=True)
class Net:
    """One net of the nest, with its own resolutions fine to coarse.

    A 'temporal' net resamples frames, a 'spatial' one pixels; only the first has temporal attention.
    Raises ValueError for options that do not fit each other.
    """

    channels: Annotated[tuple[int, ...], "channels of each resolution, fine to coarse"]
    resnets: Annotated[tuple[int, ...], "ResNets of each resolution on the way down; there is one more on the way up"]
    attention: Annotated[tuple[int, ...], "attention layers after each ResNet, per resolution; (): none"] = ()
    temporal_attention: Annotated[tuple[int, ...], "the same for attention over time, in temporal nets"] = ()
    kind: Annotated[Kind, "what is resampled: pixels | frames"] = "spatial"
    resample: Annotated[tuple[bool, ...], "whether each resolution halves to the next; (): all do"] = ()
    normalize_input: Annotated[bool, "whether each image or frame is divided by its standard deviation"] = False
    attention_ffn: Annotated[bool, "whether attention has a feed-forward"] = False
    micro: Annotated[tuple[tuple[str, float], ...], "(name, default) of numbers that condition the net"] = ()
    groups: Annotated[int, "groups of the ResNets' norms"] = 32
    dropout: Annotated[float, "dropout rate in the ResNets"] = 0.0
    rotary: Annotated[bool, "whether temporal attention has rotary positions"] = False

    def __post_init__(self) -> None:
        count = len(self.channels)
        if not count or min((*self.channels, *self.resnets, self.groups)) < 1:
            raise ValueError(f"channels {self.channels}, resnets {self.resnets}, groups {self.groups}: expected 1 or "
                             "more of each")  # fmt: skip
        lengths = dict(resnets=count, attention=count, temporal_attention=count, resample=count - 1)
        for name, expected in lengths.items():
            value = getattr(self, name)
            if len(value) != expected and (value or name == "resnets"):
                raise ValueError(f"{name} {value} has {len(value)} entries, expected {expected} for channels "
                                 f"{self.channels}")  # fmt: skip
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        if self.kind == "spatial" and any(self.temporal_attention):
            raise ValueError(f"temporal_attention {self.temporal_attention} in a net of kind 'spatial': expected ()")
        if self.rotary and not any(self.temporal_attention):
            raise ValueError("rotary is True but the net has no temporal_attention; set it to False")
        if dict(self.micro).get("scale", 1) <= 0:
            raise ValueError(f"micro {self.micro}: the default of 'scale' is the largest it can be, expected above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}, expected a rate in [0, 1)")

    def per_resolution(self, name: str) -> tuple:
        """Return attention, temporal_attention or resample, with () spelt out."""
        default = dict(resample=(True,) * (len(self.channels) - 1))
        return getattr(self, name) or default.get(name, (0,) * len(self.channels))


def check_shapes(nets: Sequence[Net], shapes: Sequence[tuple[int, ...]], num_heads: int) -> None:
    """Raise ValueError unless the shapes fit the nets: each net ends where the one inside it begins.

    shapes: (height, width, channels) or (frames, height, width, channels), coarse to fine.
    """
    if len(shapes) != len(nets):
        raise ValueError(f"NestedUNet: {len(shapes)} resolution(s) {tuple(shapes)} for {len(nets)} nets; give one each")
    end = None
    for i, (net, shape) in reversed(list(enumerate(zip(nets, shapes, strict=True)))):
        where, shape = f"NestedUNet: nets[{i}], shape {tuple(shape)}", tuple(shape)
        dimensions = (3,) if i == 0 else (4,) if net.kind == "temporal" else (3, 4)
        if len(shape) not in dimensions or not all(isinstance(size, int) and size > 0 for size in shape):
            expected = {3: "(height, width, channels)", 4: "(frames, height, width, channels)"}
            raise ValueError(f"{where}: expected {' or '.join(expected[n] for n in dimensions)}, for kind {net.kind!r}"
                             f"{' innermost' if i == 0 else ''}")  # fmt: skip
        if end is not None and shape[:-1] != end:
            raise ValueError(f"{where}: nets[{i + 1}] around it ends at {end}; change the shape or that net's channels")
        check_channels(net, i == 0, num_heads, where)
        end = end_of(net, shape[:-1], where)


def end_of(net: Net, grid: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Return the grid (a shape without channels) of the net's last resolution, without a temporal net's one frame.

    Raises ValueError, beginning with `where`, for a grid that does not halve as the net needs it.
    """
    temporal = net.kind == "temporal"
    if any(net.temporal_attention) and (grid[1] % 2 or grid[2] % 2):
        raise ValueError(f"{where}: temporal attention halves height and width; expected even ones")
    for halves in net.per_resolution("resample"):
        sizes = grid[:1] if temporal else grid[-2:]
        if halves and any(size % 2 for size in sizes):
            raise ValueError(f"{where}: {grid} does not halve; change the shape, or the net's resample or channels")
        if halves:
            sizes = tuple(size // 2 for size in sizes)
        grid = (*sizes, *grid[1:]) if temporal else (*grid[:-2], *sizes)
    if temporal and grid[0] != 1:
        raise ValueError(f"{where}: frames end at {grid[0]}, expected 1; give the net more or fewer resolutions")
    return grid[1:] if temporal else grid


def check_channels(net: Net, innermost: bool, num_heads: int, where: str) -> None:
    """Raise ValueError, beginning with `where`, if norms or heads do not divide a resolution's channels."""
    attention, temporal_attention = list(net.per_resolution("attention")), net.per_resolution("temporal_attention")
    attention[-1] += innermost  # the layer in the middle
    for channels, layers, temporal in zip(net.channels, attention, temporal_attention, strict=True):
        divisors = {f"groups {net.groups}": net.groups}
        if layers:
            divisors |= {f"the {ATTENTION_GROUPS} groups of attention": ATTENTION_GROUPS, "num_heads": num_heads}
        if temporal:
            divisors[f"temporal attention's heads of {TEMPORAL_HEAD_WIDTH}"] = TEMPORAL_HEAD_WIDTH
        wrong = [name for name, divisor in divisors.items() if channels % divisor]
        if wrong:
            raise ValueError(f"{where}: {channels} channels do not divide by {', '.join(wrong)}")
    if net.attention_ffn and not any(attention):
        raise ValueError(f"{where}: attention_ffn is True but the net has no attention; set it to False")
