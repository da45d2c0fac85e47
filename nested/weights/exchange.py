"""The networks of a run as weight files, and weight files as parameters: what --mode=export writes, --weights reads.

`write_levels` writes FILE.safetensors with the weights of every level as this code names them, 'LEVEL.module.leaf' in
linen's layouts; its metadata hold the run's config and step. Beside it, FILE.LEVEL.safetensors holds one level each, in
torch's layouts and by the names of the authors' code, so that a U-ViT, HDiT, DiT, ResMLP or NestedUNet loads there.
Tensors that the authors' networks do not have (coarser levels as tokens, classes of a NestedUNet) keep our names.

`load_parameters` reads the first kind for any hierarchy, and the authors' names for a config of one level. Configs are
plain dicts here, as they are stored beside a checkpoint.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nested.runtime.checkpoint import config_differences
from nested.weights.files import (
    check_tensors,
    find_weight_files,
    from_torch,
    load_network,
    read_metadata,
    read_tensors,
    to_torch,
    torch_names,
    write_safetensors,
)
from nested.weights.fit import shared_levels

Tree = Any
Upgrade = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # the config of an earlier run -> as it would be today
SUFFIX = ".safetensors"
CONFIG = "nested_config"  # the metadata key of a run's config; k-diffusion's files have a "config" of their own
CONSTANTS = ("t_emb",)  # last names of tensors that a network's code computes: ml-mdm's frequencies of the time


def write_levels(path: str, params: Mapping[str, Tree], config: Mapping[str, Any], step: int) -> list[str]:
    """Writes the parameters of a run's levels as weight files.

    Args:
      path: the .safetensors file that gets every level; one file for each level is written beside it.
      params: {level: parameters}, arrays that this process holds whole.
      config: the run's config as a plain dict; it goes into the metadata, with `step`.
    Returns: the paths written: `path`, then one per level.
    Raises: OSError, in one line, if a file cannot be written.
    """
    base, suffix = os.path.splitext(path)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_by_name(params).items()}
    write_safetensors(path, arrays, {"step": str(step), CONFIG: json.dumps(config)})
    paths = [path]
    for name, tree in params.items():
        paths.append(f"{base}.{name}{suffix}")
        write_safetensors(paths[-1], to_torch(tree), {"step": str(step), "level": name})
    return paths


def load_parameters(
    path: str,
    config: Mapping[str, Any],
    abstract: Mapping[str, Tree],
    trained_on: bool = False,
    upgrade: Upgrade = dict,
) -> Tree:
    """Loads the parameters of every level of a config from a weight file, or from a folder of weight files.

    Args:
      path: the file or folder.
      config: the config that will use the parameters, as a plain dict.
      abstract: {level: parameters} as jax.ShapeDtypeStruct with shardings.
      trained_on: whether training only starts from the parameters. Otherwise they are sampled from, and an exported
        file must also agree with the config in its processes, variables and codec.
      upgrade: brings the config in a file that an earlier version made up to date (nested/build/saved.py).
    Returns: a tree like `abstract`, of arrays on the devices.
    Raises: what find_weight_files and load_network raise; ValueError, in one line, if the networks in the file are not
      those of the config (naming the options that differ, or the tensors that are missing, unknown or of another
      shape), or if a file with the authors' names is given for several levels.
    """
    files = find_weight_files(path)
    notes = read_metadata(files[0]) if files[0].endswith(SUFFIX) else {}
    if CONFIG in notes:
        saved = upgrade(json.loads(notes[CONFIG]))
        if not trained_on:
            check_same_process_and_space(files[0], saved, config, abstract)
        filled = read_exported_file(files[0], saved, config, abstract)
    elif len(abstract) > 1:
        raise ValueError(
            f"{path}: holds one network, by its authors' names, and the config has the levels {', '.join(abstract)}: "
            "give a file that --mode=export wrote for them"
        )
    else:
        filled = {name: read_authors_file(path, files, tree) for name, tree in abstract.items()}
    return jax.tree.map(place_on_devices, filled, abstract)


def option_differences(
    saved: Mapping[str, Any], config: Mapping[str, Any], keys: Sequence[str], name: str
) -> list[str]:
    """The differences between two dicts in the options `keys`, in the words of config_differences."""
    there, here = ({key: some.get(key) for key in keys} for some in (saved, config))
    return config_differences(there, here, name)


def levels_by_name(config: Mapping[str, Any]) -> dict[str, dict]:
    """{level: its options} of a config."""
    return {level["name"]: level for level in config["levels"]}


def check_same_process_and_space(
    path: str, saved: Mapping[str, Any], config: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Checks that the networks of these levels compute the same thing in the config `saved` as in `config`.

    Raises ValueError, naming all differences, if the process that they were trained in, their variable or the codec
    is another one."""
    there, here, found = levels_by_name(saved), levels_by_name(config), []
    for name in names:
        if name in there:
            found += option_differences(there[name], here[name], ("process", "source", "standardize"), name)
    found += option_differences(saved["codec"], config["codec"], ("name", "patch", "channels", "scale"), "codec")
    if found:
        raise ValueError(f"{path}: its networks mean something else ({'; '.join(found)}); give the config of its run")


def read_exported_file(
    path: str, saved: Mapping[str, Any], config: Mapping[str, Any], abstract: Mapping[str, Tree]
) -> Tree:
    """The parameters in a file that --mode=export wrote for a run with the config `saved`, as host arrays.

    Raises ValueError if a level of `abstract` is not in the file, or not with the network that `config` gives it."""
    fitting = shared_levels(saved, config)
    for name in abstract:
        if name not in fitting:
            there, here = levels_by_name(saved).get(name, {}), levels_by_name(config)[name]
            found = option_differences(there, here, ("shape", "backbone"), name) or ["its conditions, classes or text"]
            raise ValueError(f"{path}: no level {name} like this config's ({'; '.join(found)}); give the config of its "
                             "run")  # fmt: skip
    tensors, leaves = read_tensors(path), flatten_by_name(abstract)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    chosen = {name: tensors[name] for name in tensors if name in leaves or name.partition(".")[0] in abstract}
    chosen = check_tensors(chosen, shapes, path)
    filled = [np.array(chosen[name], leaf.dtype) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def read_authors_file(path: str, files: Sequence[str], template: Tree) -> Tree:
    """The parameters of one network from `files` with its authors' names, whatever wraps it there, as host arrays.

    If a file holds several such networks, the averaged weights are taken. Errors name `path`."""
    names = torch_names(template)
    # The longest names come first: 'conv_in.weight' is also the end of a name in an inner net.
    tensors = load_network(files, sorted(names, key=len, reverse=True))
    tensors = {name: array for name, array in tensors.items() if name.rpartition(".")[2] not in CONSTANTS}
    try:
        return from_torch(tensors, template)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def flatten_by_name(tree: Tree) -> dict[str, Any]:
    """{'level.module.leaf': leaf} of {level: parameters}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(entry.key for entry in path): leaf for path, leaf in leaves}


def place_on_devices(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Places a host array, the same in every process, with the sharding of `like`."""
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
