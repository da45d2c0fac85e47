"""nested/modes/evaluate.py beyond a run of its own: weight files, and what is refused before anything is trained."""

import json
import types

import numpy as np
import pytest
from helpers.scoring import fake_scoring

from nested.evaluation.report import weights_identity
from nested.modes import evaluate, sample


def test_a_weight_file_is_scored_without_encoding(pooler, tmp_path, monkeypatch, capsys):
    """Against the images of the split that scores are against; the file is named by its content."""
    config, generator, source = fake_scoring(8, unguided=False)
    config.data.source, config.evaluate.split = "coco", "val2014"
    file, opened = tmp_path / "w.npz", []
    np.savez(file, a=np.zeros(1))

    def fake_opened(config, workdir, weights):
        opened.append((config.data.split, weights))
        return generator, None, 0

    def read(config):
        assert config.data.split == "val2014"
        return source

    monkeypatch.setattr(evaluate, "build_images", lambda config: types.SimpleNamespace(open=lambda: read(config)))
    monkeypatch.setattr(evaluate, "open_latents", None)  # would encode
    monkeypatch.setattr(sample, "open_generator", fake_opened)
    evaluate.run(config, str(tmp_path), str(file))
    assert opened == [("val2014", str(file))]
    row = json.loads((tmp_path / "scores.json").read_text())[0]
    assert row["step"] == 0 and row["weights"] == weights_identity(str(file)) and len(row["weights"]) == 16
    np.savez(file, a=np.ones(1))
    assert weights_identity(str(file)) != row["weights"]


def test_what_cannot_be_scored_is_said_before_training(monkeypatch, tmp_path):
    config = fake_scoring(8, unguided=False)[0]
    evaluate.check_evaluation(config)
    config.evaluate.split = "no such"

    def read(config):
        raise FileNotFoundError("no folder of it")

    monkeypatch.setattr(evaluate, "build_images", lambda config: types.SimpleNamespace(open=lambda: read(config)))
    with pytest.raises(ValueError, match="config.evaluate.split 'no such': no folder of it"):
        evaluate.check_evaluation(config)
    config.evaluate.split, config.text.encoder = "", "minilm"
    config.evaluate.clip.weights = str(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent: no such weight file"):
        evaluate.check_evaluation(config)
