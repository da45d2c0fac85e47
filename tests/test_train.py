"""nested/training/loop.py on random latents of two tiny levels: what a step does, what it refuses, what it costs."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.steps import batch_of, make
from helpers.tiny import get_config
from helpers.trees import assert_close, assert_equal, copied

from configs import common
from input_pipeline import loader
from input_pipeline.synthetic import SyntheticLatents
from nested.diffusion import hierarchy
from nested.diffusion.level import row_keys
from nested.modes import summary, train
from nested.runtime import checkpoint
from nested.runtime.writers import read_metrics
from nested.training import loop as training_loop
from nested.training import optimizer
from nested.training import step as training
from nested.training.meter import Meter, NonFiniteError


@pytest.fixture(scope="session")
def base():
    """(run, records, its compiled step, its fresh state as numpy arrays)."""
    run, source = make()
    return run, source, training_loop.compile_step(run), copied(training_loop.fresh_state(run))


def on_mesh(run, state):
    """A copy of a state where a run has its own, so that its step is not traced once more."""
    return jax.device_put(jax.tree.map(jnp.array, state), run.shardings)


def steps(update, run, state, batches):
    """Takes steps -> ([state after each, as numpy arrays], [metrics of each])."""
    states, metrics = [], []
    state = on_mesh(run, state)
    for batch in batches:
        state, values = update(state, training_loop.to_device(run, batch), run.key)
        states.append(copied(state))
        metrics.append(jax.device_get(values))
    return states, metrics


# --- a step ------------------------------------------------------------------------------------------------------


def test_loss_goes_down(base):
    run, source, update, state = base
    batch, metrics = training_loop.to_device(run, batch_of(source)), []
    state = on_mesh(run, state)
    for _ in range(200):
        state, values = update(state, batch, run.key)
        metrics.append(jax.device_get(values))
    first, last = (np.mean([m["loss"] for m in part]) for part in (metrics[:20], metrics[-20:]))
    # eps ~ N(0, I) is all of the loss at first; N(0, I) data show alpha^2 of it: less than .6 of it over all times.
    assert first == pytest.approx(2.0, rel=0.2) and last < 0.75 * first
    assert all(m["finite"] for m in metrics)


def test_ema_follows_its_formula(base):
    run, source, update, state = base
    states, _ = steps(update, run, state, [batch_of(source, i) for i in range(3)])
    ema = state.params
    for after in states:
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, after.params)
        assert_close(after.ema, ema, 1e-6)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (ema, states[-1].params)), strict=True)) > 1e-4


def test_metrics_are_those_of_the_loss_and_its_gradient(base):
    """Against jax.grad of the plain mean of hierarchy.losses, and the update against the optimizer's own."""
    run, source, update, state = base
    batch = batch_of(source, 1)
    key = jax.random.fold_in(run.key, 0)
    keys = row_keys(key, 8)

    @jax.jit
    def expected(params):
        times = hierarchy.sample_times(run.step.levels, keys)
        means = hierarchy.losses(run.step.levels, params, batch, {"label": batch["label"]}, times, keys)
        return sum(loss.mean() for loss in means.values())

    loss, grads = jax.value_and_grad(expected)(state.params)
    (after,), (metrics,) = steps(update, run, state, [batch])
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    for name, norm in optimizer.gradient_norms(grads).items():
        assert metrics[f"gradient_norm/{name}"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["learning_rate"] == pytest.approx(1e-3)
    chain = optimizer.make_optimizer(run.step.optimizer)
    updates, _ = chain.update(grads, chain.init(state.params), state.params)
    assert_close(after.params, jax.tree.map(np.add, state.params, jax.device_get(updates)), 1e-6)


def test_a_nan_in_one_record_changes_nothing_but_the_step(base):
    run, source, update, state = base
    bad = batch_of(source, 1)
    bad["x"][3, 2, 2, 0] = np.nan
    states, metrics = steps(update, run, state, [batch_of(source), bad, batch_of(source, 2)])
    good, skipped, later = states
    assert [bool(m["finite"]) for m in metrics] == [True, False, True]
    assert_equal(skipped.replace(step=good.step), good)
    assert [int(s.step) for s in states] == [1, 2, 3]
    assert np.isfinite(metrics[2]["loss"]) and not np.array_equal(
        later.params["x"]["pos_embed"], good.params["x"]["pos_embed"]
    )


def test_accumulation_changes_nothing(base):
    run, source, update, state = base
    other, _ = make([("train.accumulate", 2)])
    batches = [batch_of(source, i) for i in range(3)]
    one, two = steps(update, run, state, batches), steps(training_loop.compile_step(other), other, state, batches)
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a["loss/x"], b["loss/x"], rtol=1e-5)
        np.testing.assert_allclose(a["gradient_norm/z1x1"], b["gradient_norm/z1x1"], rtol=1e-4)
    assert_close(one[0][-1].params, two[0][-1].params, 1e-6)


@pytest.mark.parametrize("name", ["z1x1", "x"])
def test_a_level_trained_alone_is_the_level_trained_jointly(base, name):
    run, source, update, state = base
    alone, _ = make([("train_levels", (name,)), ("optimizer.clip_norm", 0.0)])
    fresh = copied(training_loop.fresh_state(alone))
    assert_equal(fresh.params, state.params)
    batches = [batch_of(source, i) for i in range(3)]
    joint, _ = steps(update, run, state, batches)
    after, metrics = steps(training_loop.compile_step(alone), alone, fresh, batches)
    assert_close(after[-1].params[name], joint[-1].params[name], 1e-6)
    assert_close(after[-1].ema[name], joint[-1].ema[name], 1e-6)
    (other,) = {"z1x1", "x"} - {name}
    assert_equal(after[-1].params[other], state.params[other])
    assert_equal(after[-1].ema[other], state.ema[other])
    assert f"loss/{other}" not in metrics[0] and metrics[0]["loss"] == metrics[0][f"loss/{name}"]


def gradients(run, params, batch):
    return jax.device_get(jax.jit(lambda p: training.gradients(run.step, p, batch, run.key))(params))


def test_remat_changes_nothing_and_bfloat16_little(base):
    run, source, _, state = base
    batch = batch_of(source)
    grads, losses = gradients(run, state.params, batch)
    again, same = gradients(make([("train.remat", True)])[0], state.params, batch)
    assert_close(again, grads, 1e-6)
    rounded, near = gradients(make([("train.dtype", "bfloat16")])[0], state.params, batch)
    assert all(g.dtype == np.float32 and np.isfinite(g).all() for g in jax.tree.leaves(rounded))
    assert sorted(losses) == ["x", "z1x1"]
    for name, loss in losses.items():
        assert same[name] == pytest.approx(loss, rel=1e-6)
        assert near[name] == pytest.approx(loss, rel=0.02) and near[name] != loss


def test_validation_is_the_loss_at_its_times_without_drops(base):
    run, source, _, state = base
    batch = batch_of(source, 7)
    always = [dataclasses.replace(level, cond_drop=0.999) for level in run.step.levels]
    dropping = dataclasses.replace(run.step, levels=tuple(always))
    first, again = (
        jax.device_get(jax.jit(lambda p, s=s: training.validation_losses(s, p, batch, (0.1, 0.9)))(state.ema))
        for s in (run.step, dropping)
    )
    assert sorted(first) == [f"validation/{name}/t{t}" for name in ("x", "z1x1") for t in (0.1, 0.9)]
    assert first == again  # drops are training's
    keys = row_keys(jax.random.key(0), 8)
    times = {"z1x1": jnp.full(8, 0.9), "x": jnp.full(8, 0.9)}
    context = {"label": batch["label"]}
    plain = hierarchy.losses(run.step.levels, state.ema, batch, context, times, keys, train=False)
    assert first["validation/x/t0.9"] == pytest.approx(float(plain["x"].mean()), rel=1e-5)
    assert first["validation/x/t0.1"] != first["validation/x/t0.9"]


# --- what it costs -----------------------------------------------------------------------------------------------


def test_the_state_is_donated(base):
    run, source, update, _ = base
    compiled = update.lower(run.abstract, training_loop.to_device(run, batch_of(source)), run.key).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == summary.state_bytes(run.abstract)


def test_xla_counts_the_flops_of_the_model():
    """6 x multiply-accumulates x batch (2 forward, 4 backward) on one level wide enough for matmuls to count."""
    config = get_config("synthetic,L2")
    net = common.uvit(width=256, depth=4, num_heads=4)
    config.levels = (common.level("x", "pixels", (16, 16, 4), 2, backbone=net),)
    config.hierarchy.label_levels = ("x",)
    run, source = make(config=config)
    compiled = training_loop.compile_step(run).lower(run.abstract, batch_of(source), run.key).compile()
    (level,) = summary.summarize_levels(run.step.levels)
    assert 0.97 < compiled.cost_analysis()["flops"] / (6 * level.macs * 8) < 1.10


# --- a run -------------------------------------------------------------------------------------------------------


def test_meter_averages_good_steps_and_gives_up_on_bad_ones():
    meter = Meter(max_bad_steps=2)
    for step, (loss, finite) in enumerate([(1.0, True), (math.nan, False), (3.0, True)], 1):
        meter.add(step, {"loss": np.float32(loss), "finite": np.bool_(finite)})
    meter.rows = 24
    report = meter.report(macs_per_row=5.0)
    assert report["loss"] == 2.0 and report["skipped_steps"] == 1
    assert report["model_flops_per_second"] == pytest.approx(30 * report["images_per_second"]) and meter.sums == {}
    meter.add(4, {"loss": np.float32(math.inf), "finite": np.bool_(False)})
    with pytest.raises(NonFiniteError, match=r"2 steps in a row \(the last is 5\).*learning_rate") as error:
        meter.add(5, {"loss": np.float32(math.inf), "finite": np.bool_(False)})
    assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Spoilt:
    """Batches of `source`, all NaN from the given step on."""

    source: SyntheticLatents
    step: int

    def batches(self, *args, start_step, batch_size, **options):
        for i in range(start_step, 100):
            batch = batch_of(self.source, i, batch_size)
            yield batch if i < self.step else batch | {"x": np.full_like(batch["x"], np.nan)}


def test_bad_steps_in_a_row_stop_the_run_and_leave_the_last_good_state(base, tmp_path, monkeypatch):
    run, source, update, state = base
    config = get_config("synthetic,L2")
    config.train.update(steps=50, max_bad_steps=3, save_every=3)
    monkeypatch.setattr(training_loop, "compile_step", lambda other: update)  # of the same levels and optimizer
    monkeypatch.setattr(loader, "batches", Spoilt(source, 4).batches)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        train.run(config, str(tmp_path))
    last = max(line["step"] for line in read_metrics(tmp_path))
    assert 4 <= last <= 7
    deadline = time.monotonic() + 20
    while checkpoint.latest_step(tmp_path) != 6 and time.monotonic() < deadline:
        time.sleep(0.05)  # it is being written
    kept = checkpoint.restore_subtree(tmp_path, {"params": run.abstract.params, "opt_state": run.abstract.opt_state})
    good, _ = steps(update, run, state, [batch_of(source, i) for i in range(4)])
    assert_equal(kept, {"params": good[3].params, "opt_state": good[3].opt_state})


def test_a_deeper_run_takes_the_levels_of_a_shallower_one(tmp_path):
    shallow = get_config("synthetic,L2")
    shallow.levels, shallow.hierarchy.label_levels = shallow.levels[:1], ("z1x1",)
    shallow.train.update(steps=2, eval_every=2, eval_times=(0.5,))
    train.run(shallow, str(tmp_path / "shallow"))
    assert "validation/z1x1/t0.5" in read_metrics(tmp_path / "shallow")[-1]

    def taken(*changes):
        """(run, its initial state) with levels of the shallow run."""
        config = get_config("synthetic,L2")
        run, _ = make([("init_from.path", str(tmp_path / "shallow")), *changes], config)
        return run, train.initial_state(run, config)

    fresh, (run, state) = make()[0], taken()
    theirs = {name: {"z1x1": run.abstract.params["z1x1"]} for name in ("ema", "params")}
    theirs = checkpoint.restore_subtree(tmp_path / "shallow", theirs)
    assert_equal(state.params["z1x1"], theirs["ema"]["z1x1"])
    assert_equal(state.ema["z1x1"], theirs["ema"]["z1x1"])
    assert_equal(state.params["x"], training_loop.fresh_state(fresh).params["x"])
    assert_equal(taken(("init_from.weights", "params"))[1].params["z1x1"], theirs["params"]["z1x1"])

    def refused(changes, error, match):
        with pytest.raises(error, match=match) as caught:
            taken(*changes)
        assert "\n" not in str(caught.value)

    refused([("init_from.levels", ("x",))], ValueError, "no level x, only z1x1; change init_from.levels")
    refused([("init_from.path", str(tmp_path / "absent"))], FileNotFoundError, "give the --workdir of a run")
