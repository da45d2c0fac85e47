"""What runs need from the machine: files, checkpoints, meshes and shardings, metrics, progress, and starting JAX.

The package imports nothing else of ours and knows no config, model or image. The names below are cheap to import;
import nested.runtime.checkpoint (orbax) and nested.runtime.writers (tensorboardX) by name.
"""

from nested.runtime.files import atomic_write, check_writable, local_path
from nested.runtime.launch import start_jax
from nested.runtime.partition import (
    abstract,
    batch_sharding,
    local_devices,
    make_mesh,
    replicated,
    shardings,
    split_rows,
    to_global,
)

__all__ = [
    "abstract",
    "atomic_write",
    "batch_sharding",
    "check_writable",
    "local_devices",
    "local_path",
    "make_mesh",
    "replicated",
    "shardings",
    "split_rows",
    "start_jax",
    "to_global",
]
