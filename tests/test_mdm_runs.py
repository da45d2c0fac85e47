"""Whole runs of tests/helpers/tiny_mdm.py: a cascade of two nets and its sweep, sampling with the steps shown,
main.py."""

import json

import numpy as np
import pytest
from helpers import tiny_mdm
from helpers.processes import finish
from helpers.refusals import refused
from helpers.run_data import decoder_of
from helpers.tiny import start_main
from PIL import Image

from nested.build.levels import build_levels
from nested.modes import evaluate, sample, sweep, train
from nested.runtime import partition
from nested.runtime.writers import read_metrics


def config_of(kind, *changes):
    config = tiny_mdm.get_config(kind)
    config.update_from_flattened_dict(dict(changes))
    return config


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """The workdir of a cascade after its two steps."""
    workdir = tmp_path_factory.mktemp("cascade")
    train.run(config_of("cascade"), str(workdir))
    return workdir


# --- a cascade and its sweeps ----------------------------------------------------------------------------------------


def test_a_cascade_trains_both_nets(cascade):
    first, last = read_metrics(cascade)
    for line in (first, last):
        assert all(np.isfinite(line[f"{what}/{name}"]) for what in ("loss", "gradient_norm") for name in ("x2", "x4"))
    assert first["gradient_norm/x2"] > 0 and last["gradient_norm/x4"] > 0 and last["skipped_steps"] == 0


def test_a_sweep_of_the_noise_level_writes_its_table_and_plot(cascade, pooler, capsys):
    config = config_of("cascade", ("evaluate.num_samples", 8))
    config.evaluate.sweep = (("hierarchy.cond_noise_step", (0, 900)),)
    evaluate.run(config, str(cascade))
    paths = [cascade / f"sweep.{kind}" for kind in ("json", "md", "png")]
    assert capsys.readouterr().out.splitlines() == [f"sweep:   {path}" for path in paths]
    clean, noisy = json.loads(paths[0].read_text())["rows"]
    assert [row["values"] for row in (clean, noisy)] == [{"hierarchy.cond_noise_step": level} for level in (0, 900)]
    assert clean["fd"] != noisy["fd"] and clean["num_samples"] == 8 and clean["guidance"] == [0.5, 0.5]
    head, _, *rows = paths[1].read_text().splitlines()
    assert head == "| hierarchy.cond_noise_step | FD-EffLite0 | KID |"
    expected = [f"| {level} | {row['fd']:.2f} | {row['kid']:.4f} |" for level, row in ((0, clean), (900, noisy))]
    assert rows == expected
    assert min(Image.open(paths[2]).size) > 100
    assert not (cascade / "scores.json").exists()


def test_a_noise_level_that_there_is_not_is_refused():
    config = config_of("cascade", ("evaluate.sweep", (("hierarchy.cond_noise_step", (0, 2000)),)))
    gen = sample.build_generator(config, build_levels(config), decoder_of(config, ""), partition.make_mesh(1, 1))
    refused(sweep.build_combinations, config, gen, match="condition noise: noise_step 2000 is outside 0 to 1000")


# --- main.py ---------------------------------------------------------------------------------------------------------


def main(workdir, *options, kind="nest", returncode=0):
    process = start_main([f"--workdir={workdir}", *options], config=f"tests/helpers/tiny_mdm.py:{kind}")
    return finish(process, timeout=300, returncode=returncode)


def test_train_and_sample_a_nest_with_its_steps(tmp_path):
    """The last step shown of DDIM is the sample, the row above it the image at half the side."""
    options = ("--config.sample.num_samples=4", "--config.sample.steps_shown=2", "--config.train.eval_every=2")
    out, err = main(tmp_path, *options)
    assert out.splitlines() == [f"picture: {tmp_path / name}.png" for name in ("samples", "steps", "curves")]
    assert "nothing is encoded" in err and not (tmp_path / "latents").exists()
    assert "validation/x/t0.5" in read_metrics(tmp_path)[-1]
    config = config_of("nest", ("sample.steps_shown", 2))
    sample.run(config, str(tmp_path), 4, str(tmp_path / "mine.png"))
    with np.load(tmp_path / "mine.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (4, 4, 4, 3) and images.std() > 10
    gen, ema, step = sample.restore_generator(config, str(tmp_path))
    (first, last) = gen.steps(ema, 0, 2)
    assert step == 2 and [image.shape for image in last] == [(2, 2, 1), (4, 4, 1)]
    assert np.abs(last[1].astype(int) - images[0, ..., :1]).max() <= 1 and (first[1] != last[1]).any()
    assert Image.open(tmp_path / "mine_steps.png").size == Image.open(tmp_path / "steps.png").size


def test_a_graft_that_fits_nothing_is_one_line_and_no_run(tmp_path, cascade):
    _, err = main(tmp_path, f"--config.init_from.path={cascade}", returncode=1)
    message = f"error: init_from {cascade}: none of its levels fits one of x, whole or as a part; check the backbones"
    assert err.splitlines()[-1].startswith(message) and "Traceback" not in err
    assert not (tmp_path / "checkpoints" / "2").exists()
