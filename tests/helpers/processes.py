"""Python in processes of its own: fake devices, several processes on one machine, signals."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Flags that compile in the least time; code of the older emitters takes half as long, and jax 0.11 has them no more.
COMPILE_FAST = "--xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"


def start_python(code, arguments=(), devices=1, env=None):
    """Starts `python -c code arguments...` from the repository's root on `devices` fake CPU devices -> Popen (text).

    env: further environment variables. The parent's compilation cache is shared.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **(env or {}),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=120, returncode=0):
    """Waits -> (stdout without gloo's chatter, stderr). AssertionError with both where it ended with another code."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n--- stdout\n{out}\n--- stderr\n{err}") from None
    out = re.sub(r"\[Gloo\][^\n]*\n", "", out)
    if process.returncode != returncode:
        raise AssertionError(f"ended with {process.returncode}\n--- stdout\n{out}\n--- stderr\n{err}")
    return out, err


def run_python(code, arguments=(), devices=4, env=None, timeout=120):
    """Runs it to the end -> stdout; AssertionError with its output where it fails."""
    return finish(start_python(code, arguments, devices, env), timeout)[0]


def free_port():
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition, process, timeout=60):
    """Polls condition() until it is true; AssertionError where the process ends first or time runs out."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"ended early with {process.returncode}\n--- stdout\n{out}\n--- stderr\n{err}")
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"waited {timeout} s in vain\n{process.communicate()}")
        time.sleep(0.02)
