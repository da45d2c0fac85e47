"""nested/evaluation/clip_score.py: the score against torchmetrics, a whole small CLIP, and where it is reported."""

import dataclasses
import re
import tracemalloc
import types

import numpy as np
import pytest
from helpers.small_runs import config_of
from helpers.text_encoders import hugging_face_clip, small_clip, write_clip_tokenizer
from safetensors.numpy import load_file, save_file

from nested.build.data import Data
from nested.encoders import clip_text, vit, vit_files
from nested.evaluation import clip_score
from nested.figures import curves as plots
from nested.modes import evaluate, sweep

TINY = dict(width=16, depth=1, heads=2, patch=4, grid=2, hidden=16, projector=(8,))


def test_equals_torchmetrics(golden):
    """CLIPScore.compute() of torchmetrics: the mean of 100 cos over the pairs, clipped at 0 after the mean."""
    data = golden("eval_is_kid_clip.npz")
    images, texts = data["in/clip_img"], data["in/clip_txt"]
    assert clip_score.mean_clip_score(images, texts) == pytest.approx(
        float(data["out/clip_score_torchmetrics"]), rel=1e-6
    )
    for i, expected in enumerate(data["out/clip_score_pairs"]):
        assert clip_score.mean_clip_score(images[i : i + 1], 7 * texts[i : i + 1]) == pytest.approx(
            max(expected, 0), rel=2e-5
        )
    assert clip_score.mean_clip_score(images, -np.abs(images) * np.sign(images)) == 0


@pytest.fixture
def network():
    return small_clip()


@pytest.fixture
def folder(network, tmp_path, monkeypatch):
    """A whole CLIP as transformers saves it."""
    small = dataclasses.replace(vit.VARIANTS["clip_vitb16"], **TINY)
    monkeypatch.setitem(vit.VARIANTS, "clip_vitb16", small)
    monkeypatch.setitem(clip_score.INPUT_SIZE, "clip_vitb16", 8)
    random = np.random.default_rng(1)
    shapes = vit_files.shapes(small, vit_files.TRANSFORMERS, True)
    tensors = hugging_face_clip(network, "") | {
        name: random.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items()
    }
    save_file(tensors | {"logit_scale": np.ones((), np.float32)}, tmp_path / "model.safetensors")
    write_clip_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path


IMAGES = np.random.default_rng(2).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def test_vectors_of_images_and_texts(folder, network):
    clip = clip_score.load_clip("clip_vitb16", folder)
    x = vit.prepare(IMAGES, clip.images.vit, 8)
    expected = vit.forward(clip.images.params, x, clip.images.vit, ("projected",))["projected"]
    np.testing.assert_allclose(clip.image_vectors(IMAGES), expected, rtol=1e-5, atol=1e-6)
    texts = ["a red apple", "apple", "a red apple", "red"]
    found = clip.text_vectors(texts)
    ids, _ = clip.tokenize(texts)
    assert found.shape == (4, 8) and np.array_equal(found[0], found[2]) and not np.allclose(found[0], found[1])
    np.testing.assert_allclose(found, clip_text.clip_text_embeds(network, ids), rtol=1e-4, atol=1e-4)


def test_one_long_text_does_not_make_all_of_them_long(folder):
    """500 texts of the longest's length would be 80 MB."""
    clip = clip_score.load_clip("clip_vitb16", folder)
    texts = ["red " * 10_000] + ["red"] * 500
    clip.text_vectors(texts[:2])  # compiled before it is measured
    tracemalloc.start()
    found = clip.text_vectors(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (501, 8) and peak < 2**24


def test_load_refuses(folder):
    with pytest.raises(ValueError, match="evaluate.clip.name: 'mae_vitb16' given; choose from 'clip_vitb16', 'clip_v"):
        clip_score.load_clip("mae_vitb16", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[clip_text.PROJECTION]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the text tower of clip_vitb16: tensor 'text_projection.weight' \(8, 64\)"):
        clip_score.load_clip("clip_vitb16", folder)
    save_file({"a": np.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="evaluate.clip.weights .*: 2 weight files; give the folder of a whole CLIP"):
        clip_score.load_clip("clip_vitb16", folder)


def test_only_images_with_prompts_are_scored(monkeypatch):
    config = config_of(2)
    assert evaluate.load_clip_scorer(config) is None
    config.evaluate.clip.weights = "a folder"
    with pytest.raises(ValueError, match=re.escape("prompts: this config has no text (config.text.encoder); set it")):
        evaluate.load_clip_scorer(config)
    config.text.encoder = "minilm"
    monkeypatch.setattr(Data, "has_clips", True)
    with pytest.raises(ValueError, match="prompts: this config has clips; set it"):
        evaluate.load_clip_scorer(config)


def test_an_evaluation_holds_every_sample_to_its_own_prompt(monkeypatch):
    """Prompts go round, batches are cut and padded: sample i is scored with prompt i mod their number."""
    seen = {}

    class Clip:
        def image_vectors(self, images):
            assert len(images) == 2  # one shape is compiled
            return images.reshape(len(images), -1)[:, :1].astype(float) * [[1, 0]] + [[0, 1]]

        def text_vectors(self, texts):
            seen["texts"] = texts
            return np.array([[0.0, 1.0]] * len(texts))

    pooler = types.SimpleNamespace(
        pooled=lambda images: images.reshape(len(images), -1)[:, :3] / 255, fingerprint="0" * 8, input_size=8
    )
    config = config_of(2, evaluate__num_samples=5, sample__batch_size=2)
    monkeypatch.setattr(evaluate, "load_score_encoder", lambda config: pooler)
    monkeypatch.setattr(evaluate, "scored_against", lambda config, source: (config, source))
    monkeypatch.setattr(evaluate, "image_source", lambda data, source: source)
    monkeypatch.setattr(evaluate, "reference_features", lambda *arguments: np.random.default_rng(0).random((9, 3)))
    monkeypatch.setattr(evaluate, "load_clip_scorer", lambda config: Clip())
    images = IMAGES.copy()
    images[:, 0, 0, 0] = range(5)

    @dataclasses.dataclass(frozen=True)
    class Gen:
        levels: tuple = ()
        prompts: tuple = ("one", "two")

        def batches(self, params, number, what):
            yield from (images[:2], images[2:4], images[4:])

    score = evaluate.build_scorer(config, None, "").score(Gen(), None, 3)
    assert seen["texts"] == ["one", "two", "one", "two", "one"]
    assert score.clip == pytest.approx(100 * np.mean([1 / np.hypot(1, i) for i in range(5)]))
    assert f"KID {score.kid:.4f}  CLIP score {score.clip:.2f}  guidance" in str(score)
    monkeypatch.setattr(evaluate, "load_clip_scorer", lambda config: None)
    score = evaluate.build_scorer(config, None, "").score(Gen(), None, 3)
    assert score.clip is None and "CLIP" not in str(score)


def test_a_sweep_lists_the_scores_that_there_are():
    todo = [types.SimpleNamespace(values={"guidance": w}) for w in (0.0, 1.0)]
    rows = [{"fd": 3.0, "kid": 0.1, "clip": None}, {"fd": 2.0, "kid": 0.2, "clip": None}]
    assert sweep.format_table(todo, rows).splitlines()[0] == "| guidance | FD-EffLite0 | KID |"
    rows = [row | {"clip": 20.125} for row in rows]
    head, line, first, _ = sweep.format_table(todo, rows).splitlines()
    assert head == "| guidance | FD-EffLite0 | KID | CLIP score |" and line == "|---|---|---|---|"
    assert first == "| 0 | 3.00 | 0.1000 | 20.12 |"


def test_a_sweep_draws_one_score_over_the_other(tmp_path):
    """Matryoshka's Figure 8: FD over the CLIP score, a point per guidance weight."""
    panels = {"FD-EffLite0": {"": [3.0, 2.0]}, "KID": {"": [0.1, 0.2]}, "CLIP score": {"": [20.0, 25.0]}}
    plots.score_curves([0.0, 1.0], panels, "guidance", tmp_path / "a.png", ("CLIP score", "FD-EffLite0"))
    plots.score_curves([0.0, 1.0], panels, "guidance", tmp_path / "b.png")
    from PIL import Image

    wide, narrow = (Image.open(tmp_path / name).size[0] for name in ("a.png", "b.png"))
    assert wide > narrow * 1.25
