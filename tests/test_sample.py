"""nested/sampling/generator.py and nested/evaluation/report.py: which sample is which, and what its score is."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest
from helpers.scoring import CLASSES, Pooler, fake_scoring, tiny_config
from ml_collections import ConfigDict
from PIL import Image

from configs import common
from nested import figures as pictures
from nested.build.levels import build_levels
from nested.diffusion import hierarchy
from nested.evaluation.features import pooled_features, rechunk, reference_features
from nested.evaluation.report import Score, score_generator, write_scores
from nested.modes import evaluate, sample
from nested.runtime import partition
from nested.sampling import generator as sampling
from nested.sampling import requests
from nested.spaces.pixels import to_images
from nested.spaces.space import equal_slices


@pytest.fixture(scope="module")
def mesh():
    return partition.make_mesh(1, 1)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Stands for Latents: scales, `most` rows at a time."""

    factor: float
    most: int = 99
    params = {}

    def decode(self, z, params):
        assert params == self.params and len(z) <= self.most
        return to_images(self.factor * z)

    def slices(self, rows, devices):
        assert devices == 1
        return equal_slices(rows, self.most)


def make_generator(config, mesh):
    """The latents' stand-in decodes a quarter of z: most of what an untrained net says is then within the range."""
    return sample.build_generator(config, build_levels(config), Decoder(0.25), mesh)


@pytest.fixture(scope="module")
def params():
    """Scaled up, so that conditions and labels matter before any training."""
    levels = build_levels(tiny_config())
    init = jax.jit(lambda key: hierarchy.init(levels, key), compiler_options={"xla_backend_optimization_level": 0})
    return jax.tree.map(lambda w: 3 * np.asarray(w), init(jax.random.key(0)))


@pytest.fixture(scope="module")
def drawn(params, mesh):
    generator = make_generator(tiny_config(), mesh)
    return generator, generator.images(params, 10, "tests")


def difference(a, b):
    """Largest difference in grey levels."""
    return np.abs(a.astype(int) - b.astype(int)).max()


# --- which sample is which -------------------------------------------------------------------------------------------


def test_sample_i_does_not_depend_on_the_batch_size(drawn, params, mesh):
    _, images = drawn
    assert images.shape == (10, 4, 4, 1) and images.dtype == np.uint8 and images.std() > 10
    other = make_generator(tiny_config(batch_size=7), mesh).images(params, 10, "tests")
    assert difference(images, other) <= 1


def test_batches_are_decoded_in_slices(drawn, params, mesh):
    generator, images = drawn
    slow = dataclasses.replace(generator, latents=Decoder(0.25, most=2)).with_levels(generator.levels)
    np.testing.assert_array_equal(slow.images(params, 4, "tests"), images[:4])


def test_batches_are_cut_to_the_number_asked_for(drawn, params):
    generator, images = drawn
    batches = list(generator.batches(params, 6, "tests"))
    assert [len(batch) for batch in batches] == [4, 2]
    np.testing.assert_array_equal(np.concatenate(batches), images[:6])


def test_samples_differ_by_index_and_by_seed(drawn, params, mesh):
    generator, images = drawn
    assert len({image.tobytes() for image in images}) == 10
    config = tiny_config()
    config.seed = 1
    other = make_generator(config, mesh).images(params, 4, "tests")
    assert difference(images[:4], other) > 10
    again = generator.images(params, 4, "tests")
    np.testing.assert_array_equal(again, images[:4])


def test_keys_and_labels_follow_the_index():
    keys = requests.sample_keys(5, [0, 7, 10**6])
    np.testing.assert_array_equal(
        jax.random.key_data(keys[1]), jax.random.key_data(jax.random.fold_in(jax.random.key(5), 7))
    )
    np.testing.assert_array_equal(requests.choose_labels(CLASSES, [0, 1, 2, 3, 7]), [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(requests.choose_labels(0, [0, 5]), [0, 0])  # no classes


def test_labels_reach_the_network(drawn, params):
    generator, images = drawn
    indices = dict.fromkeys(("top", "x"), np.arange(4))
    np.testing.assert_array_equal(generator.draw(params, indices, generator.context(range(4))), images[:4])
    relabelled = np.asarray(generator.draw(params, indices, generator.context([1, 1, 2, 0])))
    assert difference(relabelled[0], images[0]) > 2


def test_with_guidance_changes_the_weights_of_every_level(drawn, params):
    generator, images = drawn
    unguided = generator.with_guidance((0.0, 0.0))
    assert [level.guidance for level in unguided.levels] == [0.0, 0.0]
    assert [level.guidance for level in generator.levels] == [0.5, 0.3]
    assert difference(unguided.images(params, 4, "tests"), images[:4]) > 2
    with pytest.raises(ValueError):
        generator.with_guidance((0.0,))


def test_programs_that_read_different_arguments_differ():
    programs, values = sampling.Programs(), {name: np.float32(i + 1) for i, name in enumerate("abc")}
    add = {name: programs.program(lambda v, n=name: v["a"] + v[n], values, out_shardings=None) for name in "bc"}
    assert [float(add[name](values)) for name in "bc"] == [3.0, 4.0] and len(programs) == 2


def test_levels_of_equal_programs_are_compiled_once(mesh):
    """z_b sees z_a and z_c sees z_b, both 2x2x4 with one network: three programs for three levels and the decoder."""
    config = tiny_config()
    config.hierarchy.conditioning = "next_higher"
    net = dict(common.uvit(width=8, depth=0, num_heads=1), patch_size=1)
    equal = dict(config.levels[0], shape=(2, 2, 4), guidance=0.3, backbone=net)
    config.levels = tuple(ConfigDict(dict(equal, name=name)) for name in ("za", "zb", "zc"))
    config.hierarchy.label_levels = ("za", "zb", "zc")
    levels = build_levels(config)
    generator = sample.build_generator(config, levels, Decoder(1.0), mesh)
    init = jax.jit(lambda key: hierarchy.init(levels, key), compiler_options={"xla_backend_optimization_level": 0})
    params = init(jax.random.key(0))
    images = generator.images(params, 4, "tests")
    assert len(generator.programs) == 3
    keys = dict.fromkeys(("za", "zb", "zc"), requests.sample_keys(config.seed, range(4)))
    draw = jax.jit(functools.partial(hierarchy.sample, levels), compiler_options={"xla_backend_optimization_level": 0})
    expected = draw(params, keys, generator.context(range(4)))["zc"]
    assert difference(images, np.asarray(to_images(expected))) <= 1
    same = [dataclasses.replace(levels[0], guidance=0.7), *levels[1:]]
    generator.with_levels(same).images(params, 4, "tests")
    assert len(generator.programs) == 4


# --- the figure of the hierarchy -------------------------------------------------------------------------------------


def fake_generator(batch_size, names=("z3", "z2", "x")):
    """Its images say which sample each level was given and which label: z3, z2, x (mod 251) and the label."""

    def draw_variables(params, indices, context, fixed):
        assert all(of_level.shape == (batch_size,) for of_level in indices.values())
        parts = [indices[name] % 251 for name in names] + [context["label"]]
        return {names[-1]: np.stack(parts, axis=1).astype(np.uint8).reshape(batch_size, 2, 2, 1)}

    levels = tuple(types.SimpleNamespace(name=name) for name in names)
    return sampling.Generator(levels, None, None, 0, batch_size, CLASSES, draw_variables, lambda z: z)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_cascade_keeps_the_coarse_levels_and_resamples_the_rest(batch_size):
    rows = fake_generator(batch_size).cascade(None, firsts=(2, 4), number=6)
    captions = ["all levels resampled", "z3 fixed", "z3, z2 fixed"]
    assert [caption for caption, _ in rows] == captions * 2
    for group, first in ((rows[:3], 2), (rows[3:], 4)):
        own = [first] * 3 + [first % CLASSES]
        for kept, (_, images) in enumerate(group):
            assert images.shape == (6, 2, 2, 1) and images.dtype == np.uint8
            seen = images.reshape(6, 4)
            np.testing.assert_array_equal(seen[0], own)  # the first column is sample `first` in every row
            assert (seen[:, 3] == first % CLASSES).all()
            for level in range(3):
                different = len(set(seen[:, level]))
                assert different == 1 if level < kept else different >= 5, (kept, level)


def test_cascade_of_a_network_shares_what_it_says(drawn, params):
    generator, images = drawn
    (_, resampled), (_, kept) = generator.cascade(params, firsts=(2,), number=4)
    assert difference(resampled[0], images[2]) <= 1 and difference(kept[0], images[2]) <= 1
    assert difference(resampled[1], kept[1]) > 2  # the same key for x, another top level


# --- files -----------------------------------------------------------------------------------------------------------


def test_show_writes_the_pictures_of_a_run(drawn, params, tmp_path):
    generator, images = drawn
    (tmp_path / "metrics.jsonl").write_text("")  # a run that was complete when it was started again
    expected = [str(tmp_path / name) for name in ("samples.png", "hierarchy.png", "curves.png")]
    assert sample.save_run_pictures(tiny_config(), generator, params, str(tmp_path)) == expected[:2]
    grid = np.asarray(Image.open(expected[0]))
    np.testing.assert_array_equal(grid, pictures.image_grid(images[:6], columns=3, scale=1))
    assert Image.open(expected[1]).height > 4 * 4  # two groups of two rows
    config = tiny_config()
    config.train_levels = ("x",)  # the level that is not trained has no loss to draw
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/x": 1.0}\n{"step": 2, "loss/x": 0.5}\n')
    single = dataclasses.replace(
        generator,
        levels=generator.levels[1:],
        draw_variables=lambda *a: {"x": images[:4]},
        decode=lambda z: z,
    )
    paths = sample.save_run_pictures(config, single, params, str(tmp_path))
    assert paths == [expected[0], expected[2]]  # no hierarchy of one level
    assert Image.open(expected[2]).width > 100


def test_the_mode_sample_writes_a_grid_and_the_samples(drawn, params, tmp_path, monkeypatch):
    generator, images = drawn
    monkeypatch.setattr(sample, "restore_generator", lambda config, workdir: (generator, params, 7))
    sample.run(tiny_config(), str(tmp_path), 10, str(tmp_path / "mine.png"))
    with np.load(tmp_path / "mine.npz") as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], np.repeat(images, 3, axis=-1))
    assert Image.open(tmp_path / "mine.png").mode == "RGB"
    sample.run(tiny_config(), str(tmp_path), 4, "")
    assert (tmp_path / "samples_4.png").exists() and (tmp_path / "samples_4.npz").exists()


@pytest.mark.parametrize("number", [0, -3])
def test_sampling_nothing_is_refused(number):
    with pytest.raises(ValueError, match=f"{number} samples asked for: give --num_samples=N") as error:
        sample.run(tiny_config(), "", number, "")
    assert "\n" not in str(error.value)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_features_are_padded_to_one_batch_size():
    images = np.random.default_rng(1).integers(0, 256, (7, 4, 4, 1), dtype=np.uint8)
    pooler = Pooler()
    features = pooled_features(pooler, [images[:3], images[3:7]], 4)
    assert pooler.sizes == [4, 4] and features.shape == (7, 5)
    np.testing.assert_array_equal(features, Pooler().pooled(images))


def test_rechunk():
    chunks = list(rechunk([np.arange(5), np.arange(2)], 3))
    assert [chunk.tolist() for chunk in chunks] == [[0, 1, 2], [3, 4], [0, 1]]


def scored(config, generator, source, folder, step):
    scorer = evaluate.build_scorer(config, source, str(folder))
    return score_generator(scorer, generator, None, step, config.evaluate.unguided)


def test_the_data_score_zero_and_other_images_do_not(pooler, tmp_path):
    config, generator, source = fake_scoring(30)
    guided, unguided = scored(config, generator, source, tmp_path, step=9)
    assert guided.guided and guided.guidance == (0.5, 0.3) and not unguided.guided and unguided.guidance == (0.0, 0.0)
    assert abs(guided.fd) < 1e-9 and guided.num_samples == guided.num_reference == 30 and guided.step == 9
    shift = 50 / 255 * np.random.default_rng(0).normal(size=(16, 5)).sum(0)  # equal covariances: |mu_1 - mu_2|^2
    assert unguided.fd == pytest.approx(np.sum(shift**2), rel=1e-6)
    assert unguided.kid > guided.kid
    assert set(pooler.sizes) == {4}
    assert "FD-EffLite0 0.00" in str(guided) and "guidance (0.5, 0.3)" in str(guided) and "32 px" in str(guided)


@pytest.mark.parametrize("guidance, unguided", [((0.5, 0.3), False), ((0.0, 0.0), True)])
def test_the_unguided_score_only_where_asked_for_and_different(pooler, tmp_path, guidance, unguided):
    config, generator, source = fake_scoring(8, guidance, unguided)
    (score,) = scored(config, generator, source, tmp_path, step=1)
    assert score.guidance == guidance


def test_reference_features_are_kept(pooler, tmp_path):
    _, _, source = fake_scoring(30)
    features = reference_features(source, pooler, 10, 4, str(tmp_path))
    every_third = np.stack([record["image"] for record in source[::3]])
    np.testing.assert_array_equal(features, Pooler().pooled(every_third))
    assert [path.name for path in tmp_path.iterdir()] == ["reference-EffLite0-01234567-fedcba98-32px-10.npy"]
    pooler.sizes.clear()
    again = reference_features(source, pooler, 10, 4, str(tmp_path))
    np.testing.assert_array_equal(again, features)
    assert pooler.sizes == []


@pytest.mark.parametrize("key", ["num_samples", "num_reference"])
def test_too_few_to_score_is_refused(pooler, tmp_path, key):
    config, generator, source = fake_scoring(8)
    config.evaluate[key] = 1
    with pytest.raises(ValueError, match=f"{key} 1.* a distance needs 2 or more of each") as error:
        scored(config, generator, source, tmp_path, step=1)
    assert "\n" not in str(error.value)


def test_write_scores(tmp_path):
    score = Score(True, (0.5, 0.3), 12.5, 0.25, 10, 20, 32, 7)
    path = write_scores(str(tmp_path), [score])
    content = json.loads((tmp_path / "scores.json").read_text())
    assert path == str(tmp_path / "scores.json")
    expected = dict(guided=True, guidance=[0.5, 0.3], fd=12.5, kid=0.25, num_samples=10, num_reference=20)
    assert content == [expected | dict(input_size=32, step=7, clip=None, weights="")]


def test_the_mode_evaluate_restores_scores_and_writes(pooler, tmp_path, monkeypatch, capsys):
    config, generator, source = fake_scoring(8, unguided=False)
    monkeypatch.setattr(evaluate, "open_latents", lambda data, workdir, text: (source, None))
    monkeypatch.setattr(sample, "restore_generator", lambda config, workdir: (generator, None, 7))
    evaluate.run(config, str(tmp_path))
    assert json.loads((tmp_path / "scores.json").read_text())[0]["step"] == 7
    assert "FD-EffLite0 0.00" in capsys.readouterr().out
    config.evaluate.num_samples = 0
    with pytest.raises(ValueError, match="evaluate.num_samples is 0, so nothing would be scored"):
        evaluate.run(config, str(tmp_path))
