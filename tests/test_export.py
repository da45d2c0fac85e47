"""The networks of a run as weight files and back: the same images, bit for bit, and the authors' names."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from helpers import small_runs
from helpers.run_data import latents_of
from helpers.scoring import Pooler
from helpers.weight_files import write_safetensors, write_state
from safetensors.numpy import load_file

from nested.build.options import to_plain
from nested.build.training import abstract_state
from nested.modes import evaluate, export, sample, train
from nested.runtime import checkpoint, partition
from nested.weights import exchange
from nested.weights import files as weights

NUMBER = 8


def config_of(**changes):
    """Digits at 2 and 8 pixels; in the names of options that are changed a dot is two underscores."""
    return small_runs.config_of(2, evaluate__num_samples=0, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of one step."""
    workdir = tmp_path_factory.mktemp("run")
    train.run(config_of(), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def exported(run):
    """Its EMA weights in out/weights.safetensors, and level by level."""
    path = run / "out" / "weights.safetensors"
    export.run(config_of(), str(run), str(path))
    return path


def abstract(config):
    """{level: parameters} as shapes, to be whole on every device."""
    shapes, whole = abstract_state(config).ema, partition.replicated(partition.make_mesh(-1, 1))
    return partition.abstract(shapes, jax.tree.map(lambda _: whole, shapes))


def ema_of(run):
    return checkpoint.restore_subtree(run, {"ema": abstract(config_of())})["ema"]


def test_what_is_written(run, exported):
    assert sorted(os.listdir(exported.parent)) == [
        "weights.safetensors", "weights.x2.safetensors", "weights.x8.safetensors"
    ]  # fmt: skip
    notes, ema = weights.read_metadata(exported), ema_of(run)
    assert json.loads(notes["nested_config"]) == checkpoint.read_config(run) and notes["step"] == "1"
    tensors = load_file(exported)  # by the public library
    assert tensors.keys() == exchange.flatten_by_name(ema).keys()
    attention = ema["x8"]["mid_block"]["attn"]
    np.testing.assert_array_equal(tensors["x8.mid_block.attn.qkv.kernel"], attention["qkv"]["kernel"])


def test_the_authors_names_are_those_of_torch(run, exported):
    """That to_torch gives what their load_state_dict takes is tested on the recorded state dicts: U-ViT's in
    test_weights.py, the others' in test_hdit.py, test_dit.py, test_nested_unet.py and test_res_mlp.py."""
    ema = ema_of(run)
    for name, params in ema.items():
        path = exported.with_name(f"weights.{name}.safetensors")
        state = load_file(path)
        assert weights.read_metadata(path)["level"] == name
        assert {"pos_embed", "patch_embed.proj.weight", "mid_block.attn.qkv.weight", "label_emb.weight"} < state.keys()
        assert state["mid_block.attn.qkv.weight"].shape == (48, 16)  # out, in
        assert state["patch_embed.proj.weight"].shape[:2] == (16, 1)
        back = weights.from_torch(state, jax.eval_shape(lambda params=params: params))
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_samples_of_the_file_are_those_of_the_checkpoint_bit_for_bit(run, exported, tmp_path):
    config = config_of()
    sample.run(config, str(run), NUMBER, str(tmp_path / "checkpoint.png"))
    elsewhere = tmp_path / "no_run"
    elsewhere.mkdir()
    sample.run(config, str(elsewhere), NUMBER, str(tmp_path / "file.png"), str(exported))
    drawn = {name: np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("checkpoint", "file")}
    np.testing.assert_array_equal(drawn["file"], drawn["checkpoint"])
    assert drawn["file"].shape == (NUMBER, 8, 8, 3) and drawn["file"].std() > 1


def test_a_file_is_scored_as_step_0(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_score_encoder", lambda config: Pooler())
    config = config_of()
    config.evaluate.num_samples = NUMBER
    evaluate.run(config, str(tmp_path), str(exported))
    (score,) = json.loads((tmp_path / "scores.json").read_text())
    assert score["step"] == 0 and score["num_samples"] == NUMBER and "FD-EffLite0" in capsys.readouterr().out


def refused(message, path, config, shapes=None):
    with pytest.raises(ValueError, match=message) as error:
        exchange.load_parameters(str(path), to_plain(config), abstract(config) if shapes is None else shapes)
    assert "\n" not in str(error.value)


def test_the_file_must_be_of_the_configs_networks(exported, run, tmp_path):
    config = config_of()
    config.levels[1].backbone.num_heads = 4  # of which the shapes know nothing
    refused("no level x8 like this config's .x8.backbone.num_heads: checkpoint 2, config 4.; give", exported, config)
    config = config_of(hierarchy__label_levels=("x2",))
    refused("no level x8 like this config's .its conditions, classes or text.", exported, config)
    config = config_of()
    config.levels[0].name = "a"
    config.hierarchy.label_levels = ("a", "x8")
    refused("no level a like this config's .*a.shape: checkpoint None, config", exported, config)
    tensors, notes = weights.read_tensors(exported), weights.read_metadata(exported)
    weights.write_safetensors(tmp_path / "w.safetensors", dict(list(tensors.items())[1:]), notes)
    refused(r"w.safetensors: tensor 'x2\..*' .* is missing", tmp_path / "w.safetensors", config_of())
    weights.write_safetensors(tmp_path / "w.safetensors", tensors | {"x8.more": np.zeros(2, np.float32)}, notes)
    refused(r"w.safetensors: tensor 'x8.more' \(2,\) is unknown", tmp_path / "w.safetensors", config_of())
    one = exported.with_name("weights.x8.safetensors")
    refused("holds one network, by its authors' names, and the config has the levels x2, x8: give", one, config_of())
    for out in ("weights.npz", "", "weights"):
        with pytest.raises(ValueError, match=f"--out={out}: give the name of a .safetensors file"):
            export.run(config_of(), str(run), out)
    with pytest.raises(FileNotFoundError, match="no checkpoint found"):
        export.run(config_of(), str(tmp_path), str(tmp_path / "w.safetensors"))
    with pytest.raises(FileNotFoundError, match="no checkpoint found; .* or --weights=FILE"):
        sample.restore_generator(config_of(), str(tmp_path))


def test_a_file_of_another_process_is_not_sampled_from(exported):
    """The networks are the same: what they predict, of what variable, at which time, is not."""
    for change, message in (
        ({"process": {"parameterization": "v"}}, "x8.process.parameterization: checkpoint eps, config v"),
        ({"process": {"schedule": "cosine"}}, "x8.process.schedule: checkpoint sd_scaled_linear, config cosine"),
        ({"source": "patch_pca"}, "x8.source: checkpoint pixels, config patch_pca"),
        ({"standardize": "none"}, "x8.standardize: checkpoint channel, config none"),
    ):
        config = config_of()
        config.levels[1].update(change)
        refused(f"its networks mean something else .{message}.; give the config of its run", exported, config)
        exchange.load_parameters(str(exported), to_plain(config), abstract(config), trained_on=True)
    config = config_of(codec__scale=0.5)
    config.levels[0].process.parameterization = "v"
    refused("x2.process.parameterization: .*; codec.scale: checkpoint 0.0, config 0.5.; give", exported, config)


def test_the_step_noted_is_the_one_that_was_restored(run, tmp_path):
    """The newest of two checkpoints is damaged."""
    workdir = shutil.copytree(run, tmp_path / "run")
    newest = shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "2")
    shutil.rmtree(newest / "meta")
    export.run(config_of(), str(workdir), str(tmp_path / "w.safetensors"))
    assert [weights.read_metadata(tmp_path / name)["step"] for name in ("w.safetensors", "w.x2.safetensors")] == [
        "1",
        "1",
    ]


def single():
    """The 8 pixels alone, without conditions."""
    return small_runs.config_of(1, evaluate__num_samples=0)


@pytest.fixture(scope="module")
def state():
    """Random weights of that network by the authors' names."""
    random, (shapes,) = np.random.default_rng(0), abstract(single()).values()
    drawn = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    return weights.to_torch(drawn)


def test_the_authors_names_load_from_all_that_they_save(state, tmp_path):
    np.savez(tmp_path / "a.npz", **state)
    write_safetensors(tmp_path / "b.safetensors", {f"module.{name}": array for name, array in state.items()})
    write_state(tmp_path / "nnet_ema.pth", state)
    write_state(tmp_path / "c.pth", state, lambda content: {"state_dict": content, "epoch": 3})
    both = {f"nnet.{name}": array + 1 for name, array in state.items()}
    both |= {f"nnet_ema.{name}": array for name, array in state.items()}
    write_state(tmp_path / "d.pth", both)
    write_state(tmp_path / "e.pth", state | {"t_emb": np.zeros((1, 4), np.float32)})
    kdiffusion = {"config": json.dumps({"model": {"type": "image_transformer_v2"}})}  # their files for inference
    weights.write_safetensors(tmp_path / "f.safetensors", state, kdiffusion)
    config = single()
    for name in ("a.npz", "b.safetensors", "nnet_ema.pth", "c.pth", "d.pth", "e.pth", "f.safetensors"):
        loaded = exchange.load_parameters(str(tmp_path / name), to_plain(config), abstract(config))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
        for key, array in weights.to_torch(loaded["x8"]).items():
            np.testing.assert_array_equal(array, state[key], f"{name} {key}")


def test_every_tensor_of_an_authors_file_is_accounted_for(state, tmp_path):
    path, config = tmp_path / "w.npz", single()
    np.savez(path, **{name: array for name, array in state.items() if name != "norm.bias"}, more=np.zeros(3))
    refused("w.npz: the weights do not fit the model. missing: norm.bias; unexpected: more. Check", path, config)
    np.savez(path, **state | {"pos_embed": np.zeros((1, 7, 16))})
    refused(r"pos_embed \(found \(1, 7, 16\), expected \(1, 6, 16\)\)", path, config)
    np.savez(path, a=np.zeros(3))
    refused("no tensor is called", path, config)


def test_training_goes_on_from_a_file(run, exported, tmp_path):
    ema = ema_of(run)
    config = config_of(init_from__path=str(exported))
    assert_starts_from(config, tmp_path, ema)
    config = config_of(init_from__path=str(exported), init_from__levels=("x2",))
    made = assert_starts_from(config, tmp_path, {"x2": ema["x2"]})
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (made["x8"], ema["x8"])), strict=True))
    with pytest.raises(ValueError, match="a weight file has no 'params' beside the weights; set"):
        start(config_of(init_from__path=str(exported), init_from__weights="params"), tmp_path)


def start(config, workdir):
    _, latents = latents_of(config, str(workdir))
    return train.initial_state(train.make_run(config, latents), config, str(workdir))


def assert_starts_from(config, workdir, expected):
    state = start(config, workdir)
    for name, tree in expected.items():
        jax.tree.map(np.testing.assert_array_equal, state.params[name], tree)
        jax.tree.map(np.testing.assert_array_equal, state.ema[name], tree)
    return state.params
