"""main.py as people run it: every mode in a process of its own on tests/helpers/tiny.py, and one line for what goes
wrong."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from helpers.command_line import refused_here, run_here
from helpers.processes import finish, wait_for
from helpers.tiny import run_main, start_main
from PIL import Image

from nested import figures as pictures
from nested.runtime import checkpoint
from nested.runtime.writers import read_metrics

TINY = "tests/helpers/tiny.py"
QUIET = ("--config.sample.num_samples=0", "--config.evaluate.num_samples=0")  # training only


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """The digits encoded by --mode=encode, with the compilation cache where main.py puts it."""
    workdir = tmp_path_factory.mktemp("encode")
    run_main(f"--workdir={workdir}", "--mode=encode", env={"JAX_COMPILATION_CACHE_DIR": None})
    return workdir / "latents"


@pytest.fixture(scope="session")
def trained(latents, tmp_path_factory):
    """(workdir, stdout) of a whole run of four steps."""
    workdir = tmp_path_factory.mktemp("trained")
    out, _ = run_main(f"--workdir={workdir}", f"--config.latents_dir={latents}")
    return workdir, out


def train(workdir, latents, *options):
    """A training run without pictures and scores -> stderr."""
    return run_main(f"--workdir={workdir}", f"--config.latents_dir={latents}", *QUIET, *options)[1]


def losses(workdir):
    """{step: every loss of it} of metrics.jsonl."""
    return {line["step"]: {k: v for k, v in line.items() if k.startswith("loss")} for line in read_metrics(workdir)}


def weights(workdir, step):
    """{leaf: fingerprint of its bits} of the checkpoint of `step`, as it was written."""
    meta = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    assert len(meta["fingerprints"]) > 50
    return meta["fingerprints"]


# --- modes -------------------------------------------------------------------------------------------------------


def test_encode_writes_latents_and_the_compilation_cache_is_in_the_workdir(latents):
    assert json.loads((latents / "latents.json").read_text())["num_records"] == 1797
    levels = json.loads((latents.parent / "levels.json").read_text())
    assert [level["name"] for level in levels] == ["z1x1", "z2x2", "x"]
    assert any((latents.parent / "compilation_cache").iterdir())


def test_train_ends_with_pictures_and_a_score(trained):
    workdir, out = trained
    *shown, score, last = out.splitlines()
    assert shown == [f"picture: {workdir / name}.png" for name in ("samples", "hierarchy", "curves")]
    assert score.startswith("score:   FD-EffLite0 ") and "16 samples against 32 images" in score
    assert last == f"scores:  {workdir / 'scores.json'}"
    found = {path.name for path in workdir.iterdir()}
    files = {"samples.png", "hierarchy.png", "curves.png", "scores.json", "metrics.jsonl", "config.json", "levels.json"}
    assert found == files | {"tensorboard", "checkpoints"}
    assert any((workdir / "tensorboard").iterdir())
    assert checkpoint.latest_step(workdir) == 4 and checkpoint.read_config(workdir)["train"]["steps"] == 4
    assert list(losses(workdir)) == [1, 2, 3, 4]
    assert json.loads((workdir / "scores.json").read_text())[0]["step"] == 4
    assert np.asarray(Image.open(workdir / "samples.png")).std() > 10


def test_sample_writes_a_grid_and_an_archive(trained, latents, tmp_path):
    workdir, _ = trained
    options = ("--mode=sample", "--num_samples=10", f"--out={tmp_path / 'drawn.png'}")
    run_main(f"--workdir={workdir}", f"--config.latents_dir={latents}", *options)
    with np.load(tmp_path / "drawn.npz") as archive:
        images = archive["arr_0"]
    assert archive.files == ["arr_0"] and images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    grid = np.asarray(Image.open(tmp_path / "drawn.png"))
    np.testing.assert_array_equal(grid, pictures.image_grid(images[..., :1], columns=4, scale=1).squeeze())
    at_the_end = pictures.image_grid(images[:8, ..., :1], columns=4, scale=1).squeeze()
    np.testing.assert_array_equal(np.asarray(Image.open(workdir / "samples.png")), at_the_end)


def test_evaluate_repeats_the_score_of_training(trained, latents):
    workdir, out = trained
    before = json.loads((workdir / "scores.json").read_text())
    (workdir / "scores.json").unlink()
    printed, _ = run_main(f"--workdir={workdir}", f"--config.latents_dir={latents}", "--mode=evaluate")
    assert printed.strip() in out
    (after,) = json.loads((workdir / "scores.json").read_text())
    assert after == before[0] | {"fd": pytest.approx(before[0]["fd"], rel=1e-6), "kid": after["kid"]}
    assert after["kid"] == pytest.approx(before[0]["kid"], rel=1e-6)


def test_summary_needs_no_workdir(tmp_path):
    code, out, _ = run_here("--mode=summary", f"--out={tmp_path / 'summary.json'}")
    assert code == 0
    content = json.loads((tmp_path / "summary.json").read_text())
    assert [level["tokens"] for level in content["levels"]] == [1, 4, 4]
    assert f"{content['total']['parameters']:,}" in out and "GMACs" in out


# --- going on ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stopped(latents, tmp_path_factory):
    """(workdir, step) of a run that SIGTERM stopped."""
    workdir = tmp_path_factory.mktemp("stopped")
    options = (f"--config.latents_dir={latents}", "--config.train.steps=100000", *QUIET)
    process = start_main([f"--workdir={workdir}", *options])
    metrics = workdir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process)
    step = checkpoint.latest_step(workdir)
    assert f"stopped by a signal at step {step}; run the same command again to go on" in err
    return workdir, step


@pytest.fixture(scope="session")
def straight(stopped, latents, tmp_path_factory):
    """(workdir, step) of a run that was never stopped, to some steps after `stopped`; with a checkpoint at step 8."""
    workdir, steps = tmp_path_factory.mktemp("straight"), max(stopped[1] + 3, 8)
    train(workdir, latents, f"--config.train.steps={steps}", "--config.train.save_every=8", "--config.train.keep=99")
    return workdir, steps


def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit(stopped, straight, latents):
    (workdir, step), (other, steps) = stopped, straight
    assert 3 <= step < steps
    err = train(workdir, latents, f"--config.train.steps={steps}")
    assert f"resumed at step {step} from {workdir}" in err
    assert losses(workdir) == losses(other) and len(losses(other)) == steps
    assert weights(workdir, steps) == weights(other, steps) != weights(workdir, step)


def test_a_finished_run_does_not_train_again_but_goes_on_to_more_steps(trained, straight, latents, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "copy")
    before = (workdir / "metrics.jsonl").read_bytes()
    err = train(workdir, latents)
    assert "resumed at step 4" in err and "first step done" not in err
    assert (workdir / "metrics.jsonl").read_bytes() == before
    err = train(workdir, latents, "--config.train.steps=8")
    assert "resumed at step 4" in err and "first step done" in err
    assert losses(workdir) == {step: values for step, values in losses(straight[0]).items() if step <= 8}
    assert weights(workdir, 8) == weights(straight[0], 8)


# --- one line for each mistake -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, message",
    [
        ("--config.train.stepz=3", "error: option or config: Did you mean"),
        ("--runs=a", "error: --runs only applies to --mode=compare"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(option, message):
    """In a process of its own, after what was logged; what the line says of other mistakes is tested in this one."""
    out, err = finish(start_main([option]), returncode=1)
    assert out == "" and "Traceback" not in err and err.count("error") == 1, err
    assert err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    "config, option, message",
    [
        (TINY, "--config.train.stepz=3", 'Did you mean "steps" instead of "stepz"?'),
        (TINY, "--config.nokey=3", "'nokey'"),
        (TINY, "--config.levels[7].sigma=3", "tuple index out of range"),
        (TINY, "--config.train.steps=many", "flag --config.train.steps=many: invalid literal for int()"),
        (TINY, "--nosuch=3", "Unknown command line flag 'nosuch'"),
        (TINY, "config.seed=3", "unknown argument 'config.seed=3'; options start with --"),
        (f"{TINY}:L9", "--mode=train", "ValueError: config argument 'L9' is not one of: digits | synthetic; L3"),
        ("tests/nofile.py", "--mode=train", "[Errno 2] No such file or directory: 'tests/nofile.py'"),
    ],
)
def test_wrong_options(config, option, message):
    assert refused_here(option, config=config).startswith(f"error: option or config: {message}")


def test_a_workdir_that_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = f"{tmp_path / 'file'}: not writable: a file of that name is in the way; give another folder (--workdir)"
    assert message in refused_here(f"--workdir={tmp_path / 'file'}")


def test_a_workdir_is_needed():
    assert refused_here() == "error: --mode=train needs --workdir, the folder of the run"


def test_weights_are_of_sampling_and_scoring():
    message = "error: --weights only applies to --mode=sample and --mode=evaluate, not to encode; remove it"
    assert refused_here("--mode=encode", "--weights=w.npz") == message


def test_resuming_with_another_model(trained, latents):
    workdir, _ = trained
    options = ("--config.levels[2].backbone.width=32", "--config.optimizer.b2=0.99")
    said = refused_here(f"--workdir={workdir}", f"--config.latents_dir={latents}", *options)
    assert said.startswith(f"error: {workdir}: checkpoint 4 was made with another config: ")
    assert "levels[2].backbone.width: checkpoint 16, config 32; optimizer.b2: checkpoint 0.999, config 0.99; " in said


def test_sampling_before_training(latents, tmp_path):
    said = refused_here(f"--workdir={tmp_path}", f"--config.latents_dir={latents}", "--mode=sample")
    assert said.startswith(f"error: {tmp_path / 'checkpoints'}: no checkpoint found; give the --workdir of a run")


def test_fashion_mnist_that_is_not_installed(tmp_path):
    options = (f"--config.data.path={tmp_path / 'absent'}", f"--workdir={tmp_path / 'run'}")
    said = refused_here(*options, config="configs/fashion_mnist.py:L3")
    assert str(tmp_path / "absent") in said and "dataset-fashion-mnist" in said
    assert not os.path.exists(tmp_path / "absent")
