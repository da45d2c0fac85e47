"""The start of a process: jax.distributed where it is asked for, and a compilation cache that outlives the process."""

import os

import jax


def start_jax(
    workdir: str,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes, and sets up the compilation cache. Call it before anything that can fail alone.

    Args:
      workdir: the folder of the run; the cache is in WORKDIR/compilation_cache unless JAX_COMPILATION_CACHE_DIR is set.
      coordinator_address: HOST:PORT of process 0; None for JAX_COORDINATOR_ADDRESS or, if that is not set either, for a
        single process.
      num_processes, process_id: how many processes there are and which one this is; None where jax finds them out.
    """
    if coordinator_address or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"{workdir}/compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
