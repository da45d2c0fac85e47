"""The quick start made tiny, as a config file for main.py: --config=tests/helpers/tiny.py; and main.py run on it.

Digits seen by EfficientNet-Lite0 at 32 px; levels 1x1x4, 2x2x4 and 8x8x1 pixels in patches of 4; nets of width 16 and
depth 1, 1 and 2; batches of 8, DDIM in two steps. A step takes milliseconds, so that tests can afford whole runs.
"""

import os
import subprocess
import sys

from configs import common

sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))  # as a config of main.py

from helpers.processes import COMPILE_FAST, ROOT, finish  # noqa: E402

LEVELS = ("z1x1", "z2x2", "x")  # coarse to fine


def get_config(arg=""):
    """synthetic: random latents of the same shapes, and nothing to sample or score. L2: without the middle level; L1:
    the pixels alone. hdit: HDiT in an EDM process for the pixels."""
    kind, depth, backbone = common.parse(arg, ("digits", "synthetic"), ("L3", "L2", "L1"), ("uvit", "hdit"))
    config = common.default()
    config.data.update(source="digits", num_classes=10, holdout=8)
    config.encoder.update(input_size=32, map="stage4", features=("map",), components=(16,))
    small = common.uvit(width=16, depth=1, num_heads=2, final_conv=False)
    base = common.uvit(width=16, depth=2, num_heads=2)
    ddim = dict(name="ddim", steps=2, eta=0.0, t_end=1e-3)
    config.levels = (
        common.level("z1x1", "map", (1, 1, 4), 1, sigma=0.5, guidance=0.5, backbone=small, sampler=ddim),
        common.level("z2x2", "map", (2, 2, 4), 1, sigma=0.5, guidance=0.4, backbone=small, sampler=ddim),
        common.level("x", "pixels", (8, 8, 1), 4, guidance=0.3, backbone=base, sampler=ddim),
    )
    if backbone == "hdit":
        config.levels = (*config.levels[:-1], hdit_level())
    config.levels = config.levels[{"L3": slice(None), "L2": slice(None, None, 2), "L1": slice(2, None)}[depth]]
    config.hierarchy.update(label_levels=tuple(level.name for level in config.levels), noise_gamma=0.3)
    config.train.update(batch_size=8, steps=4, log_every=1, save_every=100, threads=1)
    # Gradients of float32 carry noise of 1e-8; an eps above that keeps AdamW's first steps from magnifying it to 1.
    config.optimizer.update(learning_rate=1e-3, eps=1e-3, ema_decay=0.9)
    config.sample.update(num_samples=8, batch_size=8, columns=4)
    config.evaluate.update(num_samples=16, num_reference=32, input_size=32, unguided=False)
    if kind == "synthetic":
        config.data.update(source="synthetic", num_examples=64)
        config.sample.num_samples = config.evaluate.num_samples = 0
    return config


def with_changes(*changes, config=None):
    """The tiny config, or another, with each (path, value) set, as ("levels[1].sampler.steps", 3); a key may be new."""
    config = config or get_config()
    with config.unlocked():
        for path, value in changes:
            parent, _, key = path.replace("[", ".").replace("]", "").rpartition(".")
            place = config
            for part in parent.split(".") if parent else ():
                place = place[int(part)] if part.isdigit() else place[part]
            place[key] = value
    return config


def hdit_level():
    """8x8x1 pixels: 4 x 4 tokens with neighborhoods of 3, 2 x 2 with global attention and dropout."""
    network = common.hdit(
        depths=(1, 1), widths=(16, 16), attentions=("neighborhood", "global"), windows=(3, 0), head_widths=8,
        dropouts=(0.0, 0.1), mapping_depth=1, mapping_width=16,
    )  # fmt: skip
    return common.level(
        "x", "pixels", (8, 8, 1), 2, guidance=0.3, backbone=network, process=common.edm_process(8),
        sampler=common.sigma_sampler("dpmpp_3m_sde", 3),
    )  # fmt: skip


def start_main(arguments, config="tests/helpers/tiny.py", devices=1, env=None):
    """Starts `python main.py --config=CONFIG arguments...` on `devices` fake CPU devices -> Popen (text).

    env: changes of environment variables, None to unset one.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}",
        "NPROC": "8",  # threads of XLA: with one per fake device, programs under way can wait for each other for ever
        "OPENBLAS_NUM_THREADS": "1",  # two threads on busy cores wait for each other in a loop: 30 times slower
        **(env or {}),
    }
    return subprocess.Popen(
        [sys.executable, "main.py", f"--config={config}", *arguments],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_main(*arguments, **options):
    """Runs it to the end -> (stdout, stderr); AssertionError with both where it fails."""
    return finish(start_main(arguments, **options), timeout=300)
