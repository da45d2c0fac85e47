"""One run on one, two and four devices and in two processes: the same losses and samples; no process is left behind."""

import json
import time

import numpy as np
import pytest
from helpers.processes import finish, free_port
from helpers.tiny import run_main, start_main
from PIL import Image

from input_pipeline.latent_records import LatentRecords
from nested.runtime.writers import read_metrics

TRAIN = ("--config.train.steps=3", "--config.train.fsdp_min_bytes=1024", "--config.evaluate.num_samples=0")


def losses(workdir):
    return np.array([[v for k, v in line.items() if k.startswith("loss")] for line in read_metrics(workdir)])


def samples(workdir):
    return np.asarray(Image.open(workdir / "samples.png")).astype(int)


def is_split(workdir):
    """Whether some of the checkpoint's arrays were split over more than one device of the axis 'fsdp'."""
    placements = json.loads((workdir / "checkpoints" / "3" / "state" / "_sharding").read_text()).values()
    placements = [json.loads(placement) for placement in placements]
    return any("fsdp" in placement["partition_spec"] and placement["shape"][1] > 1 for placement in placements)


def check_same(workdir, other):
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=1e-5)
    np.testing.assert_allclose(samples(workdir), samples(other), atol=1)


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """The workdir of the run on one device."""
    workdir = tmp_path_factory.mktemp("one")
    run_main(f"--workdir={workdir}", *TRAIN, config="tests/helpers/tiny.py:L2")
    assert losses(workdir).shape == (3, 3) and not is_split(workdir)
    return workdir


@pytest.mark.parametrize("data, fsdp", [pytest.param(1, 2, marks=pytest.mark.slow), (2, 2)])
def test_devices_make_no_difference(one, tmp_path, data, fsdp):
    options = (f"--config.latents_dir={one / 'latents'}", f"--config.train.mesh_fsdp={fsdp}", *TRAIN)
    run_main(f"--workdir={tmp_path}", *options, config="tests/helpers/tiny.py:L2", devices=data * fsdp)
    assert is_split(tmp_path)
    check_same(tmp_path, one)


def test_a_batch_is_encoded_on_all_devices(one, tmp_path):
    run_main(f"--workdir={tmp_path}", "--mode=encode", config="tests/helpers/tiny.py:L2", devices=4)
    records, expected = LatentRecords(tmp_path / "latents"), LatentRecords(one / "latents")
    assert len(records) == len(expected) and records.fields == expected.fields
    for i in (0, 63, 64, len(records) - 1):
        assert records[i]["label"] == expected[i]["label"]
        np.testing.assert_array_equal(records[i]["image"], expected[i]["image"])
        np.testing.assert_allclose(records[i]["map"], expected[i]["map"], rtol=0, atol=0.02)


def start_two(workdir, *options, config="tests/helpers/tiny.py:L2", of_the_second=()):
    """Two processes of one run, with options `of_the_second` for the second only."""
    address = ("--coordinator_address=127.0.0.1:" + str(free_port()), "--num_processes=2")
    options = (f"--workdir={workdir}", *address, *options)
    return [start_main([*options, f"--process_id={i}", *(of_the_second if i else ())], config=config) for i in range(2)]


def test_processes_make_no_difference(one, tmp_path):
    options = (f"--config.latents_dir={one / 'latents'}", "--config.train.mesh_fsdp=2", *TRAIN)
    options += ("--config.evaluate.num_samples=16", "--config.evaluate.memorization=8")
    outs = [finish(process, timeout=300)[0] for process in start_two(tmp_path, *options)]
    assert is_split(tmp_path)
    check_same(tmp_path, one)
    assert outs[1] == "" and f"picture: {tmp_path / 'samples.png'}" in outs[0]
    said = json.loads((tmp_path / "memorization.json").read_text())
    assert said["num_samples"] == 8 and (tmp_path / "memorization.png").exists()


def test_a_mistake_in_one_process_ends_both(tmp_path):
    options = ("--config.train.threads=-1",)
    first, second = start_two(tmp_path, config="tests/helpers/tiny.py:synthetic,L2", of_the_second=options)
    _, err = finish(second, timeout=60, returncode=1)
    assert err.splitlines()[-1] == "error: threads must be at least 0, found -1"
    begin = time.monotonic()
    finish(first, timeout=30, returncode=1)
    assert time.monotonic() - begin < 20
