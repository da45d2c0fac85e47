"""nested/runtime/checkpoint.py: what is saved comes back bit for bit, damage is noticed, signals end a run in good
order."""

import json
import logging
import os
import signal
import sys
import types

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested.runtime import checkpoint

CONFIG = {
    "levels": [{"name": "z2", "width": 32}, {"name": "z1", "width": 64}],
    "optimizer": {"learning_rate": 1e-3, "betas": (0.9, 0.99)},
    "train": {"steps": 100},
}
COMPARE = ("levels", "optimizer")


class State(flax.struct.PyTreeNode):
    step: jax.Array
    params: dict
    ema: dict
    opt_state: tuple


def make_state(seed, width=64):
    rng = np.random.default_rng(seed)
    params = {
        name: {"w": jnp.asarray(rng.normal(size=(n, 16)), jnp.float32), "b": jnp.zeros(16), "none": {}}
        for name, n in (("z2", 32), ("z1", width))
    }
    ema = jax.tree.map(lambda x: x + 1, params)
    opt_state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    return State(jnp.int32(seed), params, ema, opt_state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def open_run(tmp_path):
    """open_run() -> Checkpoints of tmp_path/run; closed at the end."""
    opened = []

    def make(config=CONFIG, keep=2, save_every=10):
        opened.append(checkpoint.Checkpoints(tmp_path / "run", config, COMPARE, keep, save_every))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


@pytest.fixture
def saved(open_run, tmp_path):
    """The folder of a run with checkpoints 10 and 20, made by make_state(10) and make_state(20)."""
    run = open_run()
    assert run.restore(abstract(make_state(0))) is None
    for step in (10, 20):
        assert run.save(step, make_state(step))
    run.wait()
    return tmp_path / "run"


def steps_in(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_what_is_saved_comes_back(saved, open_run):
    assert_same(open_run().restore(abstract(make_state(0))), make_state(20))
    assert checkpoint.latest_step(saved) == 20 and checkpoint.latest_step(saved / "nowhere") is None
    assert checkpoint.read_config(saved) == json.loads(json.dumps(CONFIG))


def test_when_it_saves_and_what_it_keeps(open_run, tmp_path):
    run = open_run(keep=2, save_every=10)
    wrote = [step for step in range(0, 31) if run.save(step, make_state(step))]
    assert wrote == [0, 10, 20, 30]
    assert not run.save(30, make_state(1), force=True)  # there already: left as it is
    assert run.save(33, make_state(33), force=True)
    run.wait()
    assert steps_in(tmp_path / "run") == ["30", "33"]
    assert_same(open_run().restore(abstract(make_state(0))), make_state(33))


def test_the_state_may_be_donated_at_once(open_run):
    run = open_run()
    state = {"z1": jnp.arange(1 << 20, dtype=jnp.float32)}
    expected = np.arange(1 << 20, dtype=np.float32)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    run.save(10, state)
    for _ in range(3):
        state = overwrite(state)
    run.wait()
    wanted = {"z1": jax.ShapeDtypeStruct(expected.shape, jnp.float32)}
    np.testing.assert_array_equal(open_run().restore(wanted)["z1"], expected)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def empty_folder(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def truncate(folder):
    os.truncate(largest_file(folder), largest_file(folder).stat().st_size // 2)


def flip_a_bit(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def spoil_metadata(folder):
    (folder / "state" / "_METADATA").write_text("garbage")


def lose_manifest(folder):
    (folder / "state" / "manifest.ocdbt").unlink()


def lose_meta(folder):
    (folder / "meta" / "metadata").unlink()


@pytest.mark.parametrize("damage", [empty_folder, truncate, flip_a_bit, spoil_metadata, lose_manifest, lose_meta])
def test_a_damaged_checkpoint_is_passed_over(saved, open_run, caplog, damage):
    damage(saved / "checkpoints" / "20")
    run = open_run()
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert_same(run.restore(abstract(make_state(0))), make_state(10))
    lines = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("checkpoint 20 in ") and "\n" not in lines[0]
    assert steps_in(saved) == ["10", "20.corrupt"]
    assert run.save(20, make_state(21))  # the place is free again
    run.wait()
    assert_same(open_run().restore(abstract(make_state(0))), make_state(21))


def test_a_second_damaged_checkpoint_of_one_step_is_kept_too(saved, open_run):
    (saved / "checkpoints" / "20.corrupt").mkdir()
    flip_a_bit(saved / "checkpoints" / "20")
    open_run().restore(abstract(make_state(0)))
    assert steps_in(saved) == ["10", "20.corrupt", "20.corrupt2"]


def test_a_flipped_bit_is_blamed_on_its_array(saved, open_run, caplog):
    path = saved / "checkpoints" / "20" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["fingerprints"]["ema/z1/w"] ^= 1
    path.write_text(json.dumps(meta))
    with caplog.at_level(logging.WARNING, logger="absl"):
        open_run().restore(abstract(make_state(0)))
    assert "the values of ema/z1/w are not those that were saved" in caplog.text


def test_nothing_whole_is_an_error_and_changes_nothing(saved, open_run):
    for step in ("10", "20"):
        truncate(saved / "checkpoints" / step)
    with pytest.raises(ValueError, match=r"no checkpoint is whole \(20: .*; 10: .*\); nothing was changed") as caught:
        open_run().restore(abstract(make_state(0)))
    assert "\n" not in str(caught.value)
    assert steps_in(saved) == ["10", "20"]


def test_another_config_is_refused_with_its_keys(saved, open_run):
    config = json.loads(json.dumps(CONFIG))
    config["train"]["steps"] = 200  # not among COMPARE: may change
    assert_same(open_run(config).restore(abstract(make_state(0))), make_state(20))
    assert checkpoint.read_config(saved)["train"]["steps"] == 200
    config["levels"][1]["width"] = 512
    config["optimizer"]["clip"] = 1.0
    with pytest.raises(ValueError) as caught:
        open_run(config).restore(abstract(make_state(0)))
    assert str(caught.value) == (
        f"{saved}: checkpoint 20 was made with another config: levels[1].width: checkpoint 64, config 512; "
        f"optimizer.clip: checkpoint None, config 1.0; use a new --workdir, or config.init_from to take over weights"
    )
    assert steps_in(saved) == ["10", "20"] and checkpoint.read_config(saved)["levels"][1]["width"] == 64


def test_many_differences_are_cut_short(saved, open_run):
    config = json.loads(json.dumps(CONFIG))
    config["levels"].append({"name": "z3"})
    config["optimizer"] = {f"k{i:02}": i for i in range(20)}
    with pytest.raises(ValueError, match="levels: checkpoint 2 entries, config 3 entries; .*; and 11 more") as caught:
        open_run(config).restore(abstract(make_state(0)))
    assert "optimizer.k09: " in str(caught.value) and "optimizer.k10: " not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": jnp.zeros((65, 16))}, r"params/z1/w is float32\[64, 16\], the model .* needs float32\[65, 16\]"),
        ({"b": jnp.zeros(16, jnp.bfloat16)}, r"params/z1/b is float32\[16\], the model of this config needs bfloat16"),
        ({"new": jnp.zeros(2)}, "has no params/z1/new, which the model of this config needs"),
    ],
)
def test_another_model_is_not_damage(saved, open_run, change, message):
    state = make_state(0)
    state.params["z1"].update(change)
    with pytest.raises(ValueError, match=message):
        open_run().restore(abstract(state))
    assert steps_in(saved) == ["10", "20"]


def test_one_level_of_another_run(saved):
    state = make_state(20)
    part = checkpoint.restore_subtree(saved, {"ema": {"z1": abstract(state.ema["z1"])}})
    assert_same(part, {"ema": {"z1": state.ema["z1"]}})
    both = checkpoint.restore_subtree(saved, {"params": abstract(state.params)})
    assert_same(both, {"params": state.params})
    with pytest.raises(ValueError, match="20: has no ema/z3/b, which the model of this config needs"):
        checkpoint.restore_subtree(saved, {"ema": {"z3": abstract(state.ema["z1"])}})
    with pytest.raises(ValueError, match=r"ema/z1/w is float32\[64, 16\], the model of .* needs float32\[32, 16\]"):
        checkpoint.restore_subtree(saved, {"ema": {"z1": abstract(state.ema["z2"])}})


def test_another_run_is_never_changed(saved):
    flip_a_bit(saved / "checkpoints" / "20")
    wanted = {"params": abstract(make_state(0).params), "ema": abstract(make_state(0).ema)}
    part = checkpoint.restore_subtree(saved, wanted)
    assert_same(part["params"], make_state(10).params)
    assert steps_in(saved) == ["10", "20"]


def test_no_run_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoints: no checkpoint found; give the --workdir of a run"):
        checkpoint.restore_subtree(tmp_path, {"ema": {}})
    with pytest.raises(FileNotFoundError, match=r"config.json: not found; give the --workdir of a run"):
        checkpoint.read_config(tmp_path)


def test_bad_options_are_named(tmp_path):
    for change, message in (
        ({"keep": 0}, "checkpoint.keep: found 0, expected at least 1"),
        ({"save_every": 0}, "checkpoint.save_every: found 0, expected at least 1"),
        ({"compare": ("model",)}, r"compare: config has no key 'model', only \['levels', 'optimizer', 'train'\]"),
    ):
        options = {"compare": COMPARE, "keep": 1, "save_every": 1, **change}
        with pytest.raises(ValueError, match=message):
            checkpoint.Checkpoints(tmp_path, CONFIG, **options)
    with pytest.raises(OSError, match="/proc/nested: not writable"):
        checkpoint.Checkpoints("/proc/nested", CONFIG, COMPARE, 1, 1)


def fingerprint_by_hand(x):
    words = x.reshape(-1).view(f"u{min(4, x.dtype.itemsize)}")
    return sum(int(u) * (((2654435761 * i) % 2**32) | 1) for i, u in enumerate(words)) % 2**32


def test_fingerprints_follow_their_formula():
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.normal(size=(3, 5, 2)).astype(np.float32),
        "bf16": np.array(jnp.asarray(rng.normal(size=(7, 3)), jnp.bfloat16)),
        "i32": rng.integers(-9, 9, (4,)).astype(np.int32),
        "u8": rng.integers(0, 255, (6, 2)).astype(np.uint8),
        "bool": rng.integers(0, 2, 9).astype(bool),
        "number": np.float32(3.5).reshape(()),
    }
    for name, value in checkpoint.fingerprints(arrays).items():
        assert value == fingerprint_by_hand(arrays[name]), name


def test_fingerprints_of_float64(x64):
    x = np.random.default_rng(0).normal(size=(3, 4))
    assert checkpoint.fingerprints({"x": jnp.asarray(x)})["x"] == fingerprint_by_hand(x)


def test_every_flipped_bit_and_every_exchange_shows():
    x = np.random.default_rng(0).normal(size=8).astype(np.float32)
    original = checkpoint.fingerprints({"x": x})["x"]
    for bit in range(8 * 32):
        flipped = x.copy()
        flipped.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        assert checkpoint.fingerprints({"x": flipped})["x"] != original
    assert checkpoint.fingerprints({"x": x[[1, 0, 2, 3, 4, 5, 6, 7]]})["x"] != original


def test_only_abandoned_reads_are_hushed_and_only_after_a_failure(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    code = types.SimpleNamespace(co_filename="site-packages/orbax/checkpoint/serialization.py")
    read = types.SimpleNamespace(object=types.SimpleNamespace(cr_code=code), exc_value=GeneratorExit())
    callback = types.SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed"))
    other = types.SimpleNamespace(object=None, exc_value=RuntimeError("of the user"))
    with checkpoint._hushed_abandoned_reads("the folder"):
        pass
    sys.unraisablehook(read)
    assert reported == [read]
    with pytest.raises(KeyError), checkpoint._hushed_abandoned_reads("the folder"):
        raise KeyError
    for unraisable in (read, callback, other):
        sys.unraisablehook(unraisable)
    assert reported == [read, other]


def test_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.Preemption() as preemption:
        assert not preemption.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop(2) and preemption.should_stop(3)
    assert signal.getsignal(signal.SIGTERM) == before


def test_asyncio_is_quiet_about_reads_that_a_failed_restore_left_and_about_nothing_else(monkeypatch, caplog):
    """Its report comes when the garbage collector finds the futures: seldom, so here by hand."""
    asyncio_logger = logging.getLogger("asyncio")
    monkeypatch.setattr(asyncio_logger, "filters", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(KeyError), checkpoint._hushed_abandoned_reads("the folder"):
        raise KeyError("damaged")
    for file, message in (("orbax/reads.py", "future exception was never retrieved"), ("user.py", "never retrieved"),
                          ("orbax/reads.py", "slow callback")):  # fmt: skip
        try:
            exec(compile("raise ValueError('bad read')", file, "exec"))
        except ValueError as error:
            asyncio_logger.error(message, exc_info=error)
    asyncio_logger.error("never retrieved", exc_info=ValueError("read of the folder/state"))  # tensorstore's own
    asyncio_logger.error("no exception, never retrieved")
    heard = [record.getMessage() for record in caplog.records]
    assert heard == ["never retrieved", "slow callback", "no exception, never retrieved"]
