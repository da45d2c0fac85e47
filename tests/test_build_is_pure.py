"""nested/build makes objects of every shipped config without touching a file, a device or the terminal."""

import builtins
import io
import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT
from helpers import shipped

from nested import build
from nested.build.data import build_data

HEAVY = ("grain", "orbax", "matplotlib", "sklearn", "pyarrow", "cv2")


TOUCHING = (
    (builtins, "open"), (io, "open"), (os, "open"), (os, "listdir"), (os, "scandir"), (os, "mkdir"),
    (jax, "device_put"),
)  # fmt: skip


@pytest.mark.parametrize("file", shipped.ARGUMENTS)
def test_building_touches_nothing(file, monkeypatch, capfd):
    def refuse(*arguments, **options):
        raise AssertionError(f"nested/build touched {arguments[:1]}")

    configs = [shipped.get_config(name, argument) for name, argument in shipped.ALL if name == file]
    before = len(jax.live_arrays())
    with monkeypatch.context() as patch:
        for module, name in TOUCHING:
            patch.setattr(module, name, refuse)
        for config in configs:
            for _, phase in build.split_phases(config):
                build.build_levels(phase)
                build_data(phase)
                build.build_optimizer(phase)
                build.check_batch_size(phase, devices=1)
                build.check_images_exist(phase)
            build.upgrade_saved_config(build.to_plain(config))
    assert len(jax.live_arrays()) == before and tuple(capfd.readouterr()) == ("", "")


def test_reading_a_config_loads_no_library_that_only_running_needs():
    """So that main.py says what is wrong with an option within a second or two."""
    code = f"import sys, configs.quickstart; print(*[name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
