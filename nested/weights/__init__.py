"""Weight files in and out: reading foreign files safely, exporting a run, taking over parameters from another run.

The package may import nested.runtime only; networks are trees of shapes to it, and configs are plain dicts. The names
below read and write files; import nested.weights.exchange and nested.weights.graft by name, because they load orbax.
"""

from nested.weights.files import (
    check_tensors,
    find_weight_files,
    from_torch,
    load_network,
    read_metadata,
    read_tensors,
    sha256,
    to_torch,
    torch_names,
    write_safetensors,
)

__all__ = [
    "check_tensors",
    "find_weight_files",
    "from_torch",
    "load_network",
    "read_metadata",
    "read_tensors",
    "sha256",
    "to_torch",
    "torch_names",
    "write_safetensors",
]
