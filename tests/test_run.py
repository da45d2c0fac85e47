"""nested.open_run and nested.open_weights: a trained hierarchy in Python."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT
from helpers import tiny, tiny_mdm

import nested
from nested.diffusion import hierarchy
from nested.modes import export, sample, train
from nested.run import Run

SAMPLES, BATCH = 12, 8


def write_idx(path, array):
    """A file in the format of MNIST."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of tests/helpers/tiny.py on 40 random images, after one step."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    write_idx(folder / "train-images-idx3-ubyte", rng.integers(0, 256, (40, 8, 8), np.uint8))
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(40, dtype=np.uint8) % 10)
    config = tiny.get_config()
    config.data.update(source="idx", path=str(folder))
    config.train.steps = 1
    config.sample.update(num_samples=0, batch_size=BATCH)
    config.evaluate.num_samples = 0
    train.run(config, str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def run(workdir):
    return nested.open_run(workdir)


@pytest.fixture(scope="module")
def variables(run):
    return run.sample_variables(SAMPLES)


def test_the_readme_example_runs(workdir, capsys):
    """The lines of README.md, word for word but for the folder."""
    (code,) = re.findall(r"```python\n(.*?nested\.open_run.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 12
    names = {}
    exec(code.replace("runs/quickstart", str(workdir)), names)
    assert names["images"].shape == (16, 8, 8, 1) and names["images"].dtype == np.uint8
    np.testing.assert_array_equal(names["same"], names["images"])
    assert names["sevens"].shape == (4, 8, 8, 1) and (names["relatives"] != names["images"]).any()


def test_samples_are_those_of_the_mode_sample(run, workdir, tmp_path):
    sample.run(run.config, str(workdir), SAMPLES, str(tmp_path / "out.png"))
    images = np.load(tmp_path / "out.npz")["arr_0"]  # grey images are stored in three equal channels
    np.testing.assert_array_equal(np.repeat(run.sample(SAMPLES), 3, axis=-1), images)


def test_decoding_the_variables_gives_the_samples(run, variables):
    np.testing.assert_array_equal(run.decode(variables), run.sample(SAMPLES))
    assert {name: variable.shape for name, variable in variables.items()} == {
        "z1x1": (SAMPLES, 1, 1, 4), "z2x2": (SAMPLES, 2, 2, 4), "x": (SAMPLES, 8, 8, 1),
    }  # fmt: skip


def test_labels_and_seed_choose_the_samples(run):
    images = run.sample(SAMPLES)
    np.testing.assert_array_equal(run.sample(labels=np.arange(SAMPLES) % 10), images)
    others = run.sample(labels=[3] * SAMPLES)
    np.testing.assert_array_equal(others[3], images[3])
    assert (others != images).any((1, 2, 3)).sum() >= SAMPLES - 2
    assert (run.sample(SAMPLES, seed=1) != images).any((1, 2, 3)).all()
    np.testing.assert_array_equal(run.sample(SAMPLES, seed=run.config.seed), images)


def test_guidance_for_all_for_each_and_for_some(run):
    weights = [level.guidance for level in run.levels]
    images = run.sample(BATCH)
    np.testing.assert_array_equal(run.sample(BATCH, guidance=weights), images)
    np.testing.assert_array_equal(run.sample(BATCH, guidance={"x": weights[-1]}), images)
    assert (run.sample(BATCH, guidance=2.0) != images).any()


def test_fixed_levels_are_kept_and_finer_ones_follow(run, variables):
    again = run.sample_variables(fixed={name: variables[name] for name in ("z1x1", "z2x2")})
    jax.tree.map(np.testing.assert_array_equal, again, variables)  # the same keys, the same coarser levels
    moved = run.sample_variables(fixed={"z1x1": variables["z1x1"] + 1})
    np.testing.assert_array_equal(moved["z1x1"], variables["z1x1"] + 1)
    assert (moved["z2x2"] != variables["z2x2"]).any()


def test_encoding_gives_what_training_saw(run):
    from helpers.run_data import latents_of

    records, latents = latents_of(run.config, run.workdir)
    rows = [records[i] for i in range(BATCH)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    expected = latents.variables(batch, None)
    found = run.encode(batch["image"])
    assert list(found) == [level.name for level in run.levels]  # coarse to fine
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, dict(expected)))
    np.testing.assert_array_equal(run.decode(found), batch["image"])


def test_a_denoiser_sees_what_it_is_given(run, variables):
    x_t = np.random.default_rng(0).normal(size=(SAMPLES, 8, 8, 1)).astype(np.float32)
    labels = np.arange(SAMPLES) % 10
    coarser = {name: variables[name] for name in ("z1x1", "z2x2")}
    full = run.denoise("x", x_t, 0.5, variables=coarser, labels=labels)
    assert full.shape == x_t.shape
    null = run.denoise("x", x_t, np.full(SAMPLES, 0.5))
    guided = run.denoise("x", x_t, 0.5, variables=coarser, labels=labels, guidance=2.0)
    np.testing.assert_allclose(guided, full + 2 * (full - null), rtol=1e-4, atol=1e-4)
    assert (full != null).any() and (run.denoise("x", x_t, 0.5, labels=labels) != null).any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda run: run.sample(), "give number, labels, prompts or fixed"),
        (lambda run: run.sample(3, labels=[1, 2]), "found number 3, labels 2"),
        (lambda run: run.sample(labels=[10]), "label 10"),
        (lambda run: run.sample(prompts=["a cat"]), "no level of this hierarchy sees text"),
        (lambda run: run.sample(1, guidance={"y": 1.0}), "the levels are z1x1, z2x2, x"),
        (lambda run: run.sample(1, guidance=[1.0]), "1 guidance weights given"),
        (lambda run: run.sample(fixed={"z1x1": np.zeros((2, 4))}), r"expected \[N, 1, 1, 4\]"),
        (lambda run: run.decode({"z1x1": np.zeros((1, 1, 1, 4))}), "decoded from the level x"),
        (lambda run: run.encode(np.zeros((2, 9, 9, 1), np.uint8)), r"\[N, 8, 8, 1\]"),
        (lambda run: run.denoise("y", np.zeros((1, 8, 8, 1)), 0.5), "choose from z1x1, z2x2, x"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(run, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(run)
    assert "\n" not in str(error.value)


def test_a_weight_file_samples_as_its_run(run, workdir, tmp_path):
    path = str(tmp_path / "weights.safetensors")
    export.run(run.config, str(workdir), path)
    opened = nested.open_weights(path, workdir=workdir)
    np.testing.assert_array_equal(opened.sample(BATCH), run.sample(BATCH))


def untrained(config):
    """A run of a config whose variables are the images themselves, with initial parameters."""
    generator, _ = sample.prepare_generator(config, "")
    params = jax.jit(lambda key: hierarchy.init(generator.levels, key))(jax.random.key(0))
    return Run(workdir="", step=0, config=config, params=params, generator=generator)


def test_a_level_of_several_resolutions_is_a_tuple():
    run = untrained(tiny_mdm.get_config("nest"))
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    variables = run.encode(images)
    assert [leaf.shape for leaf in variables["x"]] == [(3, 2, 2, 1), (3, 4, 4, 1)]
    np.testing.assert_array_equal(run.decode(variables), images)
    estimate = run.denoise("x", variables["x"], 0.5, labels=[1, 2, 3])
    assert [leaf.shape for leaf in estimate] == [(3, 2, 2, 1), (3, 4, 4, 1)]
    with pytest.raises(ValueError, match=r"expected \[N, 2, 2, 1\], \[N, 4, 4, 1\]"):
        run.decode({"x": variables["x"][:1]})


def test_a_cascade_always_sees_its_coarser_image():
    run = untrained(tiny_mdm.get_config("cascade"))
    x_t, coarse = np.ones((2, 4, 4, 1), np.float32), np.ones((2, 2, 2, 1), np.float32)
    with pytest.raises(ValueError, match="level x4 always sees x2"):
        run.denoise("x4", x_t, 0.5)
    assert run.denoise("x4", x_t, 0.5, variables={"x2": coarse}).shape == x_t.shape
