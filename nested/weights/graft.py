"""Weights taken over from another run: whole levels, or a network grafted where a larger one holds it.

A level is taken whole where the other run's has the same name, shape, backbone and conditions (fit.shared_levels).
Else its parameters are grafted at the deepest part of ours that has the same names, shapes and options: progressive
training of Matryoshka (arXiv 2310.15111, Sec. 3.3), where the 64-pixel model becomes the `inner_unet` of the nest, two
levels down where the nest has two new ones. Its new adapters start at zero, so what it computed it computes still.
"""

import itertools
import os
from collections.abc import Mapping

import jax
from absl import logging

from nested.build.options import to_plain
from nested.runtime.checkpoint import read_config, restore_subtree, saved_shapes
from nested.weights import exchange as export
from nested.weights.fit import shared_levels


def load_initial_weights(config, path: str, abstract: Mapping) -> dict:
    """{(level, key, ..., key): subtree of parameters} from the newest checkpoint of the run in `path`; or every level
    whole from the weight file `path` (nested/weights/exchange.py).

    abstract: {level: parameters}, the shapes and shardings wanted. Raises ValueError as `find_places` and
    export.load_parameters do.
    """
    if os.path.isfile(os.path.expanduser(path)):
        if config.init_from.weights != "ema":
            raise ValueError(
                f"init_from {path}: a weight file has no {config.init_from.weights!r} beside the weights; set "
                "config.init_from.weights to 'ema'"
            )
        asked = tuple(config.init_from.levels) or tuple(abstract)
        loaded = export.load_parameters(path, config, {name: abstract[name] for name in asked}, trained_on=True)
        logging.info("init_from %s: took %s; the rest starts fresh", path, ", ".join(asked))
        return {(name,): tree for name, tree in loaded.items()}
    other, weights, shapes = read_config(path), config.init_from.weights, saved_shapes(path)
    donors = {name: entries_below(shapes, f"{weights}/{name}/") for name in abstract}
    found = find_places(config, other, donors, abstract, path)
    wanted = {weights: {name: get_subtree(abstract, place) for name, place in found.items()}}
    restored = restore_subtree(path, wanted)[weights]
    shown = ", ".join(f"{name} into {'/'.join(place)}" for name, place in found.items())
    logging.info("init_from %s: took the %s of %s; the rest starts fresh", path, weights, shown)
    return {place: restored[name] for name, place in found.items()}


def find_places(config, other: Mapping, donors: Mapping[str, Mapping], abstract: Mapping, where: str) -> dict:
    """{level: keys to where the other run's level of that name goes} in the parameters `abstract` of this config.

    other: that run's config, as to_plain gives it. donors: {level: {leaf name: shape}} of its parameters. where: the
    run, for errors. Raises ValueError where nothing fits, or where a level that config.init_from.levels names does not.
    """
    asked, whole = tuple(config.init_from.levels), shared_levels(other, to_plain(config))
    theirs, ours = ({level["name"]: level for level in some["levels"]} for some in (other, to_plain(config)))
    result = {}
    for name in asked or tuple(abstract):
        if asked and name not in theirs:
            raise ValueError(f"init_from {where}: no level {name}, only {', '.join(theirs)}; change init_from.levels")
        place = (name,) if name in whole else find_graft_place(abstract, name, donors.get(name) or {})
        if place is not None and (
            name in whole or holds_same_network(ours[name]["backbone"], theirs[name]["backbone"], len(place) - 1)
        ):
            result[name] = place
        elif asked:
            shapes = [some[name]["shape"] for some in (theirs, ours) if name in some]
            differ = f" (its shape is {shapes[0]} there, {shapes[-1]} here)" if shapes[0] != shapes[-1] else ""
            raise ValueError(
                f"init_from {where}: level {name} fits nowhere{differ}: no part of this config's network has the names "
                "and shapes and options of that run's; check the level, or leave it out of config.init_from.levels"
            )
    if not result:
        raise ValueError(
            f"init_from {where}: none of its levels fits one of {', '.join(abstract)}, whole or as a part; check the "
            "backbones, or set config.init_from.path to '' to start from scratch"
        )
    return result


def holds_same_network(ours: Mapping, theirs: Mapping, depth: int) -> bool:
    """Whether a nested_unet is what another holds `depth` nets inside: the same options, those that leave no trace in
    the parameters included. How the input is normalised may differ, as it does in ml-mdm's 1024-pixel config."""
    if not depth or "nets" not in ours or "nets" not in theirs:
        return False

    def options(backbone, nets):
        rest = {key: value for key, value in backbone.items() if key != "nets"}
        return rest, [{key: v for key, v in net.items() if key != "normalize_input"} for net in nets]

    return options(ours, ours["nets"][:-depth]) == options(theirs, theirs["nets"])


def check_phases_fit(phases) -> None:
    """ValueError where a phase's network has no place for the one before it: said before the first phase trains.

    phases: [(name, config, {level: parameters as shapes})]."""
    for (name, before, donors), (_, config, abstract) in itertools.pairwise(phases):
        shapes = {level: leaf_shapes(tree) for level, tree in donors.items()}
        find_places(config, to_plain(before), shapes, abstract, f"phase {name}")


def entries_below(shapes: Mapping[str, tuple], prefix: str) -> dict[str, tuple]:
    """The entries below a prefix, named without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def find_graft_place(params: Mapping, name: str, donor: Mapping[str, tuple]) -> tuple[str, ...] | None:
    """Keys to the deepest dict in params[name] whose leaves have the donor's names and shapes; None where none has."""
    best = None

    def visit(place, tree):
        nonlocal best
        if leaf_shapes(tree) == donor and (best is None or len(place) > len(best)):
            best = place
        for key, value in tree.items():
            if isinstance(value, Mapping):
                visit((*place, key), value)

    visit((name,), params[name])
    return best


def leaf_shapes(tree: Mapping) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(entry.key for entry in path): tuple(leaf.shape) for path, leaf in leaves}


def get_subtree(tree: Mapping, place: tuple[str, ...]):
    for key in place:
        tree = tree[key]
    return tree


def replace_subtree(tree: Mapping, place: tuple[str, ...], new) -> Mapping:
    """`tree` with the subtree at `place` replaced."""
    if not place:
        return new
    return {**tree, place[0]: replace_subtree(tree[place[0]], place[1:], new)}
