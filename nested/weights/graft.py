"""Parameters taken over from another run: whole levels, or a network grafted into a larger one that contains it.

A level is taken whole if the other run has one of the same name, shape, backbone and conditions (fit.shared_levels).
Otherwise its parameters are grafted at the deepest part of our network that has the same names, shapes and options.
This is the progressive training of Matryoshka (arXiv 2310.15111, Sec. 3.3): the 64-pixel model becomes the `inner_unet`
of the nest, two levels down if the nest has two new ones. The new adapters start at zero, so the grafted network
computes what it computed before.

Configs are plain dicts here, as they are stored beside a checkpoint.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from nested.runtime.checkpoint import read_config, restore_subtree, saved_shapes
from nested.weights.exchange import Upgrade, levels_by_name, load_parameters
from nested.weights.fit import shared_levels

Tree = Any
Place = tuple[str, ...]  # the keys (level, module, ..., module) of a subtree of the parameters


def load_initial_weights(
    config: Mapping[str, Any], path: str, abstract: Mapping[str, Tree], upgrade: Upgrade = dict
) -> dict[Place, Tree]:
    """Loads the parameters that config.init_from takes over from another run or from a weight file.

    Args:
      config: this run's config as a plain dict; its init_from says which levels and which weights are taken.
      path: the --workdir of the other run, whose newest checkpoint is read, or a weight file (nested/weights/
        exchange.py), whose levels are taken whole.
      abstract: {level: parameters} of this run as jax.ShapeDtypeStruct with shardings.
      upgrade: brings the config of a run that an earlier version made up to date (nested/build/saved.py).
    Returns: {place: subtree}, to be put into the parameters with replace_subtree.
    Raises: ValueError as find_places and load_parameters do; FileNotFoundError if there is no run.
    """
    options = config["init_from"]
    if os.path.isfile(os.path.expanduser(path)):
        if options["weights"] != "ema":
            raise ValueError(
                f"init_from {path}: a weight file has no {options['weights']!r} beside the weights; set "
                "config.init_from.weights to 'ema'"
            )
        names = tuple(options["levels"]) or tuple(abstract)
        loaded = load_parameters(
            path, config, {name: abstract[name] for name in names}, trained_on=True, upgrade=upgrade
        )
        logging.info("init_from %s: took %s; the rest starts fresh", path, ", ".join(names))
        return {(name,): tree for name, tree in loaded.items()}
    other, weights, shapes = upgrade(read_config(path)), options["weights"], saved_shapes(path)
    donors = {name: entries_below(shapes, f"{weights}/{name}/") for name in abstract}
    found = find_places(config, other, donors, abstract, path)
    restored = restore_subtree(path, {weights: {name: get_subtree(abstract, place) for name, place in found.items()}})
    shown = ", ".join(f"{name} into {'/'.join(place)}" for name, place in found.items())
    logging.info("init_from %s: took the %s of %s; the rest starts fresh", path, weights, shown)
    return {place: restored[weights][name] for name, place in found.items()}


def find_places(
    config: Mapping[str, Any],
    other: Mapping[str, Any],
    donors: Mapping[str, Mapping[str, tuple]],
    abstract: Mapping[str, Tree],
    where: str,
) -> dict[str, Place]:
    """Finds where each level of another run belongs in this run's parameters.

    Args:
      config, other: the configs of this run and of the other one, as plain dicts.
      donors: {level: {leaf name: shape}} of the other run's parameters.
      abstract: {level: parameters} of this run.
      where: the name of the other run in errors.
    Returns: {level: place} for the levels of config.init_from.levels, or for every level that fits.
    Raises: ValueError if nothing fits, or if a level that config.init_from.levels names does not.
    """
    named, whole = tuple(config["init_from"]["levels"]), shared_levels(other, config)
    there, here = levels_by_name(other), levels_by_name(config)
    result = {}
    for name in named or tuple(abstract):
        if named and name not in there:
            raise ValueError(f"init_from {where}: no level {name}, only {', '.join(there)}; change init_from.levels")
        place = (name,) if name in whole else find_graft_place(abstract, name, donors.get(name) or {})
        if place is not None and (
            name in whole or holds_same_network(here[name]["backbone"], there[name]["backbone"], len(place) - 1)
        ):
            result[name] = place
        elif named:
            shapes = [some[name]["shape"] for some in (there, here) if name in some]
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


def holds_same_network(outer: Mapping[str, Any], inner: Mapping[str, Any], depth: int) -> bool:
    """Whether the nested_unet with the options `outer` contains the one with the options `inner`, `depth` nets inside.

    All options must agree, including those that leave no trace in the parameters, except for how the input is
    normalised, which also differs in ml-mdm's 1024-pixel config."""
    if not depth or "nets" not in outer or "nets" not in inner:
        return False

    def options(backbone, nets):
        rest = {key: value for key, value in backbone.items() if key != "nets"}
        return rest, [{key: v for key, v in net.items() if key != "normalize_input"} for net in nets]

    return options(outer, outer["nets"][:-depth]) == options(inner, inner["nets"])


def check_phases_fit(phases: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Tree]]]) -> None:
    """Checks, before the first phase trains, that every phase's network has a place for the one before it.

    phases: (name, config as a plain dict, {level: parameters as shapes}) triples in order. Raises ValueError."""
    for (name, before, donors), (_, config, abstract) in itertools.pairwise(phases):
        shapes = {level: leaf_shapes(tree) for level, tree in donors.items()}
        find_places(config, before, shapes, abstract, f"phase {name}")


def entries_below(shapes: Mapping[str, tuple], prefix: str) -> dict[str, tuple]:
    """The entries whose names start with a prefix, named without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def find_graft_place(params: Mapping[str, Tree], name: str, donor: Mapping[str, tuple]) -> Place | None:
    """The place of the deepest dict in params[name] whose leaves have the donor's names and shapes; None if none has.

    donor: {leaf name: shape}, as leaf_shapes gives them."""
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


def leaf_shapes(tree: Tree) -> dict[str, tuple]:
    """{'module/leaf': shape} of nested dicts of arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(entry.key for entry in path): tuple(leaf.shape) for path, leaf in leaves}


def get_subtree(tree: Tree, place: Place) -> Tree:
    """The subtree at `place`."""
    for key in place:
        tree = tree[key]
    return tree


def replace_subtree(tree: Tree, place: Place, new: Tree) -> Tree:
    """A copy of nested dicts in which the subtree at `place` is `new`; everything else is shared with `tree`."""
    if not place:
        return new
    return {**tree, place[0]: replace_subtree(tree[place[0]], place[1:], new)}
