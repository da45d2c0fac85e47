"""How a benchmark ends: its figures with device, versions and date, on the screen and as a JSON file."""

import json
import platform
import time

import flax
import jax

from nested.runtime.files import atomic_write


def report(figures: dict, out: str) -> None:
    """Prints the figures; with `out`, writes the same to that file."""
    device = jax.devices()[0]
    figures = figures | {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "versions": f"python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if out:
        atomic_write(out, text + "\n")
