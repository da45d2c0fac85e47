"""The networks of a run as weight files, and networks out of weight files: --mode=export and --weights.

FILE.safetensors holds the EMA weights of every level as this code has them, 'LEVEL.module.leaf' in linen's layouts,
with the run's config and step in its metadata. FILE.LEVEL.safetensors beside it holds those of one level in torch's
layouts by the authors' names, so that a U-ViT, HDiT, DiT, ResMLP or NestedUNet loads into their code: what is not in it
(coarser levels as tokens, classes of a NestedUNet) has names of ours.
Read are the first kind, for any hierarchy, and the authors' names, for a config of one level.
"""

import json
import os

import jax
import numpy as np
from absl import logging

from nested.build.levels import build_levels
from nested.build.options import to_plain
from nested.diffusion import hierarchy
from nested.runtime import partition
from nested.runtime.checkpoint import config_differences, read_config, restore_part
from nested.weights import files as weights
from nested.weights.fit import shared_levels

SUFFIX = ".safetensors"
CONFIG = "nested_config"  # the key of a run's config in a file's metadata: others have a "config" there, as k-diffusion
CONSTANTS = ("t_emb",)  # what a network's code computes, by its last name: ml-mdm's frequencies of the time


def export(config, workdir: str, out: str) -> None:
    """The mode `export`: writes OUT and OUT's name with each level before the suffix, by process 0.

    Raises ValueError where `out` is no .safetensors; FileNotFoundError where the run has no checkpoint."""
    base, suffix = os.path.splitext(os.path.expanduser(out))
    if suffix != SUFFIX:
        raise ValueError(f"--out={out}: give the name of a {SUFFIX} file to export to")
    levels, mesh = build_levels(config), partition.make_mesh(-1, 1)
    shapes = jax.eval_shape(lambda key: hierarchy.init(levels, key), jax.random.key(0))
    whole = jax.tree.map(lambda _: partition.replicated(mesh), shapes)
    state, step = restore_part(workdir, {"ema": partition.abstract(shapes, whole)})
    if jax.process_index():
        return
    ema, notes = state["ema"], {"step": str(step), CONFIG: json.dumps(read_config(workdir))}
    weights.write_safetensors(
        base + suffix, {name: np.asarray(leaf) for name, leaf in flatten_by_name(ema).items()}, notes
    )
    for name, params in ema.items():
        path = f"{base}.{name}{suffix}"
        weights.write_safetensors(path, weights.to_torch(params), {"step": notes["step"], "level": name})
        logging.info("export: level %s by its authors' names in %s", name, path)
    logging.info("export: step %s of %s in %s", notes["step"], workdir, base + suffix)


def load_parameters(path: str, config, abstract, trained_on: bool = False):
    """The parameters of every level of `config` from the weight file or folder `path`.

    abstract: {level: parameters} as shapes and shardings. trained_on: they are only where training starts; else they
    are sampled from, and a file of ours must be of the config's processes, variables and codec too. Raises, in one
    line: as find_weight_files and load_network; ValueError where the file's networks are not those of the config (the
    options that differ, or the tensors that are missing, left over or of another shape, are named), or of a file by an
    author's names where there are levels.
    """
    files = weights.find_weight_files(path)
    notes = weights.read_metadata(files[0]) if files[0].endswith(SUFFIX) else {}
    if CONFIG in notes:
        saved = json.loads(notes[CONFIG])
        if not trained_on:
            check_same_process_and_space(files[0], saved, to_plain(config), abstract)
        filled = read_exported_file(files[0], saved, config, abstract)
    elif len(abstract) > 1:
        raise ValueError(
            f"{path}: holds one network, by its authors' names, and the config has the levels {', '.join(abstract)}: "
            "give a file that --mode=export wrote for them"
        )
    else:
        filled = {name: read_authors_file(path, files, tree) for name, tree in abstract.items()}
    return jax.tree.map(place_on_devices, filled, abstract)


def option_differences(saved: dict, config: dict, keys: tuple[str, ...], name: str) -> list[str]:
    """Where these options of two dicts differ, as config_differences says it."""
    return config_differences(*({key: some.get(key) for key in keys} for some in (saved, config)), name)


def levels_by_name(config: dict) -> dict[str, dict]:
    return {level["name"]: level for level in config["levels"]}


def check_same_process_and_space(path: str, saved: dict, config: dict, names) -> None:
    """ValueError where what the networks of these levels compute is something else in the config `saved`: the process
    that they were trained in, the variable, the codec. All that differs is named."""
    there, here, found = levels_by_name(saved), levels_by_name(config), []
    for name in names:
        if name in there:
            found += option_differences(there[name], here[name], ("process", "source", "standardize"), name)
    found += option_differences(saved["codec"], config["codec"], ("name", "patch", "channels", "scale"), "codec")
    if found:
        raise ValueError(f"{path}: its networks mean something else ({'; '.join(found)}); give the config of its run")


def read_exported_file(path: str, saved: dict, config, abstract):
    """Of a file of the first kind, whose run had the config `saved`."""
    fitting = shared_levels(saved, to_plain(config))
    for name in abstract:
        if name not in fitting:
            there, here = levels_by_name(saved).get(name, {}), levels_by_name(to_plain(config))[name]
            found = option_differences(there, here, ("shape", "backbone"), name) or ["its conditions, classes or text"]
            raise ValueError(f"{path}: no level {name} like this config's ({'; '.join(found)}); give the config of its "
                             "run")  # fmt: skip
    tensors, leaves = weights.read_tensors(path), flatten_by_name(abstract)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    chosen = {name: tensors[name] for name in tensors if name in leaves or name.partition(".")[0] in abstract}
    chosen = weights.check_tensors(chosen, shapes, path)
    filled = [np.array(chosen[name], leaf.dtype) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def read_authors_file(path: str, files: list[str], template):
    """Of one network by its authors' names, whatever wraps it in the file; averaged weights where there are others."""
    names = weights.torch_names(template)
    # The longest names first: 'conv_in.weight' is also the end of what an inner net has.
    tensors = weights.load_network(files, sorted(names, key=len, reverse=True))
    tensors = {name: array for name, array in tensors.items() if name.rpartition(".")[2] not in CONSTANTS}
    try:
        return weights.from_torch(tensors, template)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def flatten_by_name(tree) -> dict:
    """{'level.module.leaf': leaf} of {level: parameters}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(entry.key for entry in path): leaf for path, leaf in leaves}


def place_on_devices(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A host array, the same in every process, with the sharding of `like`."""
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
