"""Starting JAX: several processes as one program, and a compilation cache that outlives the process."""

import os

import jax


def start_jax(
    workdir: str,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to the others of a run, if there are others, and sets the compilation cache.

    Call it before anything else uses JAX, and before anything can fail: a process that ends before it has met the
    others leaves them waiting.

    Args:
      workdir: the run's folder. The cache is its subfolder compilation_cache, unless the environment variable
        JAX_COMPILATION_CACHE_DIR names another folder.
      coordinator_address: HOST:PORT of process 0. It is only needed if JAX cannot find it out by itself; with None the
        process joins others if JAX_COORDINATOR_ADDRESS is set.
      num_processes, process_id: how many processes there are, and the number of this one; with coordinator_address.
    """
    if coordinator_address or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"{workdir}/compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
