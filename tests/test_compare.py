"""nested/modes/compare.py: runs of several depths side by side, configs read back, and what cannot be compared."""

import json
import shutil

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.small_runs import config_of
from PIL import Image

from nested import figures as pictures
from nested.build.levels import build_levels
from nested.build.options import to_plain
from nested.modes import compare, sample
from nested.runtime import checkpoint


@pytest.fixture(scope="module")
def compared(searched, tmp_path_factory):
    """(runs, folder of the comparison): three samples of the runs L1 and L2-sigma0.5 with seed 7."""
    runs, out = [str(searched[0] / name) for name in ("L1", "L2-sigma0.5")], tmp_path_factory.mktemp("compared")
    compare.run(config_of(3, seed=7, sample__batch_size=3), str(out), runs, 3)
    return runs, out


def test_a_row_is_the_samples_of_its_run(compared):
    """Those that the run's own config draws with the seed given, at eight times their size, behind the captions."""
    runs, out = compared
    picture = np.asarray(Image.open(out / "compare.png"))
    gen, ema, _ = sample.restore_generator(config_of(1, seed=7), runs[0])
    row = pictures.image_grid(gen.images(ema, 3, "tests"), columns=3)
    height, width, _ = row.shape
    np.testing.assert_array_equal(picture[:height, -width:], row)
    assert (picture[-height:, -width:] != row).any() and picture.shape[0] > 2 * height - 4
    assert (picture[:, :-width] != 255).any() and picture.shape[1] > width + 100


def test_the_file_says_what_is_seen(compared):
    runs, out = compared
    content = json.loads((out / "compare.json").read_text())
    assert (content["seed"], content["num_samples"]) == (7, 3)
    assert [(row["run"], row["levels"], row["step"]) for row in content["runs"]] == [(runs[0], 1, 1), (runs[1], 2, 1)]
    for row, run in zip(content["runs"], runs, strict=True):
        with open(f"{run}/scores.json") as file:
            assert row["scores"] == json.load(file)


def test_captions():
    scores = [dict(guided=True, fd=12.346), dict(guided=False, fd=20.0)]
    expected = "L3-sigma0\nL = 3, step 2,000\nFD-EffLite0 12.35\nFD-EffLite0 20.00 unguided"
    assert compare.format_caption("/runs/L3-sigma0", 3, 2000, scores) == expected


def test_scores_of_another_step_are_left_out(tmp_path):
    assert compare.read_scores_of_step(str(tmp_path), 4) == []
    (tmp_path / "scores.json").write_text(json.dumps([dict(step=3, fd=1.0)]))
    assert compare.read_scores_of_step(str(tmp_path), 4) == [] and compare.read_scores_of_step(str(tmp_path), 3) == [
        dict(step=3, fd=1.0)
    ]


def test_a_config_that_was_stored_is_the_config(compared):
    """But for its seed and its samples' part, which are those of the config given."""
    run, config = compared[0][1], config_of(3, seed=7, sample__batch_size=3)
    found, saved = to_plain(compare.load_run_config(run, config)), checkpoint.read_config(run)
    assert found == saved | dict(seed=7, sample=to_plain(config.sample)) and found["hierarchy"]["noise_gamma"] == 0.3
    assert compare.load_run_config(run, config).train.eval_times == (0.1, 0.3, 0.5, 0.7, 0.9)
    levels = build_levels(compare.load_run_config(run, config))
    assert [level.sampler for level in levels] == [level.sampler for level in build_levels(config_of(2))]
    assert levels[1].backbone == build_levels(config_of(2))[1].backbone


def copy_of(run, folder, change):
    """A copy of a run, its stored config changed."""
    shutil.copytree(run, folder)
    saved = json.loads((folder / "config.json").read_text())
    change(saved)
    (folder / "config.json").write_text(json.dumps(saved))
    return str(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda saved: saved["data"].update(num_classes=9), "--runs: data.num_classes differ, so samples "),
        (lambda saved: saved.pop("levels"), "not the config of a run: it has no levels, only"),
    ],
)
def test_runs_that_do_not_compare_are_refused(compared, tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(sample, "restore_generator", None)
    runs = [compared[0][0], copy_of(compared[0][0], tmp_path / "other", change)]
    refused(compare.run, config_of(3), str(tmp_path), runs, 3, match=message)


def test_images_of_other_shapes_are_refused(compared, tmp_path, monkeypatch):
    class Drawn:
        levels, images = (), staticmethod(lambda ema, number, what: np.zeros((3, 4 + ("L1" in what), 4, 1), np.uint8))

    monkeypatch.setattr(sample, "restore_generator", lambda config, run: (Drawn, None, 1))
    expected = "--runs: images differ in shape: L1 (5, 4, 1), L2-sigma0.5 (4, 4, 1)"
    refused(compare.run, config_of(3), str(tmp_path), compared[0], 3, match=expected)


def test_clips_are_shown_by_their_first_frames(compared, tmp_path, monkeypatch):
    clips = np.random.default_rng(0).integers(0, 255, (2, 5, 64, 64, 3), np.uint8)

    class Drawn:
        levels, images = (), staticmethod(lambda ema, number, what: clips)

    monkeypatch.setattr(sample, "restore_generator", lambda config, run: (Drawn, None, 9))
    compare.run(config_of(3), str(tmp_path), compared[0], 2)
    picture = np.asarray(Image.open(tmp_path / "compare.png"))
    np.testing.assert_array_equal(picture[-68:, -134:], pictures.image_grid(clips[:, 0], columns=2))


def test_folders_that_are_no_runs_are_refused(compared, tmp_path):
    (run, _), out = compared[0], str(tmp_path)
    few = "give the folders of two or more different ones, --runs=A,B"
    for runs in ([], [run], [run, run + "/"]):
        refused(compare.run, config_of(3), out, runs, 3, match=f"--runs names {len(runs)} run(s): {few}")
    refused(compare.run, config_of(3), out, [run, out], 3, match=f"{out}/config.json: not found; give the")
    unsaved = copy_of(run, tmp_path / "unsaved", lambda saved: None)
    shutil.rmtree(f"{unsaved}/checkpoints")
    refused(compare.run, config_of(3), out, [run, unsaved], 3, match="unsaved/checkpoints: no checkpoint found")
