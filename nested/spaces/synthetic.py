"""Random variables in the place of data: records hold a level's variable itself, leaf by leaf."""

import dataclasses

import jax

from nested.spaces.space import Arrays, Encoded, ImageSpace, LevelSource, Params, Shape, Tree, is_joint


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """The source of a level whose variable is random."""

    name = "synthetic"
    needs_encoding = False
    reads_images = False
    is_image = False

    def fit(self, level: LevelSource, encoded: Encoded) -> "SyntheticSpace":
        return SyntheticSpace(level.shape, level.name)


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticSpace(ImageSpace):
    """The variable is the field of the level's name, and of several resolutions the fields 'level.0', 'level.1', ..."""

    level: str

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(f"{self.level}.{i}" for i in range(len(self.shape))) if is_joint(self.shape) else (self.level,)

    def variable(self, raw: Arrays, key: jax.Array | None) -> Tree:
        leaves = tuple(raw[field] for field in self.fields)
        return leaves if is_joint(self.shape) else leaves[0]

    def decode(self, z: Tree, params: Params) -> jax.Array:
        raise ValueError("synthetic latents have no images: there is nothing to sample or to score")


def random_fields(level: LevelSource) -> tuple[tuple[str, Shape], ...]:
    """(field, shape) of each resolution of a level's variable: what a source of random records has to have."""
    space = SyntheticSpace(level.shape, level.name)
    shapes = level.shape if is_joint(level.shape) else (level.shape,)
    return tuple(zip(space.fields, shapes, strict=True))
