"""nested/weights/graft.py and the phases of nested/training/loop.py: progressive training, in one go and with stops."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_mdm
from helpers.exact import OPTIMIZED
from helpers.refusals import refused
from helpers.run_data import latents_of
from helpers.trees import assert_equal

from configs import common
from nested.build.levels import as_shape, build_levels
from nested.build.options import to_plain
from nested.build.training import abstract_state, split_phases
from nested.diffusion import hierarchy
from nested.diffusion.level import row_keys
from nested.modes import train
from nested.runtime import checkpoint
from nested.runtime.writers import read_metrics
from nested.training import loop as training_loop
from nested.weights import graft as transfer

PHASES = {"s2": 2, "s4": 3, "": 2}  # their steps


def config_of(*changes, kind="progressive"):
    config = tiny_mdm.get_config(kind)
    config.update_from_flattened_dict(dict(changes))
    return config


def other_nest():
    """A network that tiny_mdm's nest has no place for."""
    level = tiny_mdm.nest(1)
    level.backbone.time_width = 64
    return level


def folder(workdir, phase):
    return workdir / "phases" / phase if phase else workdir


def bits(workdir, phase):
    """{leaf: fingerprint of its bits} of a phase's last checkpoint."""
    meta = folder(workdir, phase) / "checkpoints" / str(PHASES[phase]) / "meta" / "metadata"
    return json.loads(meta.read_text())["fingerprints"]


def state_of(path, config):
    """The train state in the newest checkpoint of the run in `path`."""
    return checkpoint.restore_subtree(path, vars(abstract_state(config)))


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """The step of a network is traced once for all runs here."""
    with pytest.MonkeyPatch.context() as patch:
        steps, compile_step = {}, training_loop.compile_step
        patch.setattr(
            training_loop, "compile_step", lambda run: steps.setdefault(str(run.step.levels), compile_step(run))
        )
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The workdir of three phases in one go."""
    workdir = tmp_path_factory.mktemp("straight")
    train.run(config_of(), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def grafted(straight):
    """(config of the phase s2, its EMA, config of the nest, the nest's state before its first step)."""
    (_, first), (_, second), _ = split_phases(config_of())
    _, latents = latents_of(second, str(straight))
    state = train.initial_state(train.make_run(second, latents), second, str(straight))
    return first, state_of(folder(straight, "s2"), first)["ema"]["x"], second, state


# --- phases ----------------------------------------------------------------------------------------------------------


def test_each_phase_is_a_run_of_its_own(straight):
    for phase, steps in PHASES.items():
        assert checkpoint.latest_step(folder(straight, phase)) == steps
        saved = checkpoint.read_config(folder(straight, phase))
        assert len(as_shape(saved["levels"][0]["shape"])) == (3 if phase == "s2" else 2)
        losses = [line for line in read_metrics(folder(straight, phase)) if "loss/x" in line]
        assert [line["step"] for line in losses] == list(range(1, steps + 1))
        assert all(np.isfinite(line["loss/x"]) and not line["skipped_steps"] for line in losses)
    assert [checkpoint.read_config(folder(straight, p))["init_from"]["phase"] for p in PHASES] == ["", "s2", "s4"]
    assert sorted(os.listdir(straight / "phases")) == ["s2", "s4"]


def stop_after(monkeypatch, steps):
    """A signal comes after so many steps, of whatever phases."""
    taken = []
    should_stop = lambda preemption, step: taken.append(step) or len(taken) == steps  # noqa: E731
    monkeypatch.setattr(checkpoint.Preemption, "should_stop", should_stop)


def test_stopped_in_every_phase_it_ends_bit_for_bit_as_in_one_go(straight, tmp_path, monkeypatch):
    reached = []
    for steps in (1, 2, 3, 99):  # in the middle of s2, of s4, of the last
        stop_after(monkeypatch, steps)
        train.run(config_of(), str(tmp_path))
        reached.append([checkpoint.latest_step(folder(tmp_path, phase)) for phase in PHASES])
    assert reached == [[1, None, None], [2, 1, None], [2, 3, 1], [2, 3, 2]]
    assert all(bits(tmp_path, phase) == bits(straight, phase) for phase in PHASES)


def test_finished_phases_are_not_repeated(straight, monkeypatch):
    """Called again, it says so, trains nothing, and takes nothing over: phases with other weights change nothing."""
    before = bits(straight, "")
    monkeypatch.setattr(train, "initial_state", None)
    monkeypatch.setattr(training_loop, "compile_step", None)
    trained = []
    original = train.train_phase
    monkeypatch.setattr(train, "train_phase", lambda *args: trained.append(args[1]) or original(*args))
    train.run(config_of(), str(straight))
    assert trained == [str(straight)] and bits(straight, "") == before


def test_a_signal_on_the_last_step_of_a_phase_stops_the_run(tmp_path, monkeypatch):
    stop_after(monkeypatch, PHASES["s2"])
    train.run(config_of(), str(tmp_path))
    assert checkpoint.latest_step(folder(tmp_path, "s2")) == 2
    assert checkpoint.latest_step(folder(tmp_path, "s4")) is None


def test_a_phase_starts_from_the_average_of_the_one_before(grafted):
    """A fresh optimizer, and an average that begins as the parameters; the rest is the nest's own initialisation."""
    _, ema, config, state = grafted
    assert_equal(state.params["x"]["inner_unet"], ema)
    assert_equal(state.ema, state.params)
    assert int(state.step) == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.opt_state))
    assert not state.params["x"]["in_adapter"]["kernel"].any() and state.params["x"]["conv_in"]["kernel"].any()


def test_the_last_phase_takes_the_same_network_whole(straight):
    """From s4, of the same shapes: its first step starts from s4's average, so it differs from s4's last."""
    _, (_, second), (_, last) = split_phases(config_of())
    abstract = abstract_state(last).params
    taken = transfer.load_initial_weights(to_plain(last), str(folder(straight, "s4")), abstract)
    assert list(taken) == [("x",)]
    assert_equal(taken[("x",)], state_of(folder(straight, "s4"), second)["ema"]["x"])


@pytest.mark.parametrize(
    "phases, message",
    [
        ((dict(name="a", optimiser=dict()),), "config.phases[0].optimiser: there is no such option; choose from "),
        ((dict(name="a"), dict(name="b", train=dict(step=3))), "config.phases[1].train.step: there is no such option"),
        ((dict(name="a"), dict(name="a")), "config.phases[1].name: 'a' given; each needs a name of its own"),
        ((dict(train=dict(steps=3)),), "config.phases[0].name: '' given; each needs a name of its own, such as s64"),
        ((dict(name="a/b"),), "config.phases[0].name: 'a/b' given"),
        ((dict(name="a", levels=(other_nest(),)),), "init_from phase a: none of its levels fits one of x"),
        ((dict(name=".."),), "config.phases[0].name: '..' given"),
        ((dict(name="a", train=3),), "config.phases[0].train: 3 given, expected a dict of its options"),
        ((dict(name="a"), dict(name="b", init_from=dict(path="x"))), "config.phases[1].init_from: decided by the"),
        ((dict(name="a", latents_dir="x"),), "config.phases[0].latents_dir: decided by the order of the phases"),
        ((dict(name="a"), dict(name="b", levels=())), "config.levels is empty"),
        ((dict(name="a"), dict(name="b", optimizer=dict(decay="cosine", warmup_steps=9))), "config.train.steps is 2"),
        ((dict(name="a"), dict(name="b", train=dict(batch_size=5))), "config.levels[0].mixed (2, 1): the 5 rows per"),
        ((dict(name="a"), dict(name="b", init_from=dict(weights="best"))), "config.init_from.weights: 'best' given"),
        (
            (dict(name="a"), dict(name="b", data=dict(source="synthetic"), sample=dict(num_samples=8))),
            "config.data.source is 'synthetic', whose latents have no images",
        ),
    ],
)
def test_wrong_phases_are_refused_before_any_trains(phases, message, tmp_path):
    config = config_of(kind="nest")
    config.phases = phases
    refused(train.run, config, str(tmp_path), match=message)
    assert not any(tmp_path.iterdir())


def test_a_phase_differs_in_what_it_says_alone():
    config = config_of(("init_from.path", "/elsewhere"), kind="nest")
    config.phases = (dict(name="a", train=dict(steps=7), data=dict(flip=True)), dict(name="b"))
    (_, a), (_, b), (name, last) = split_phases(config)
    assert (a.train.steps, a.train.batch_size, a.data.flip, a.data.source) == (7, 8, True, "digits")
    assert (b.train.steps, b.data.flip, name, last.phases) == (2, False, "", ())
    assert [phase.init_from.path for phase in (a, b, last)] == ["/elsewhere", "", ""]
    assert [phase.init_from.phase for phase in (a, b, last)] == ["", "a", "b"]
    assert config.train.steps == 2 and config.init_from.phase == ""


# --- grafting --------------------------------------------------------------------------------------------------------


def test_two_new_levels_put_it_two_levels_down(straight, grafted):
    config = config_of(("init_from.path", str(folder(straight, "s2"))), kind="deep")
    abstract = abstract_state(config).params
    ((place, tree),) = transfer.load_initial_weights(to_plain(config), config.init_from.path, abstract).items()
    assert place == ("x", "inner_unet", "inner_unet")
    assert_equal(tree, grafted[1])
    replaced = transfer.replace_subtree(abstract, place, tree)
    assert replaced["x"]["inner_unet"]["inner_unet"] is tree
    assert replaced["x"]["inner_unet"]["conv_in"] is abstract["x"]["inner_unet"]["conv_in"]
    assert abstract["x"]["inner_unet"]["inner_unet"] is not tree


def test_a_level_that_the_other_run_lacks_is_named(straight):
    config = config_of(("init_from.path", str(folder(straight, "s2"))), ("init_from.levels", ("y",)), kind="deep")
    message = "no level y, only x; change init_from.levels"
    refused(
        transfer.load_initial_weights,
        to_plain(config),
        config.init_from.path,
        abstract_state(config).params,
        match=message,
    )


def test_the_deepest_of_several_places_is_taken():
    net = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    params = {"x": {"outer": net, "inner": {"own": net, "adapter": {}}, "kernel": net["kernel"]}}
    assert transfer.find_graft_place(params, "x", {"kernel": (2, 3)}) == ("x", "inner", "own")
    assert transfer.find_graft_place(params, "x", {"kernel": (3, 2)}) is None


def test_weights_before_the_average_where_asked_for(straight, grafted):
    config = config_of(("init_from.path", str(folder(straight, "s2"))), ("init_from.weights", "params"), kind="nest")
    taken = transfer.load_initial_weights(to_plain(config), config.init_from.path, abstract_state(config).params)
    own = state_of(folder(straight, "s2"), grafted[0])["params"]["x"]
    assert_equal(taken[("x", "inner_unet")], own)
    assert not np.array_equal(own["conv_out"]["kernel"], grafted[1]["conv_out"]["kernel"])


def drawn(config, params, sampler, options):
    """The variables of four samples, compiled with these options."""
    config = config.copy_and_resolve_references()
    config.levels[0].sampler = sampler
    levels = build_levels(config)
    keys = {"x": row_keys(jax.random.key(5), 4)}

    def draw(params):
        return hierarchy.sample(levels, {"x": params}, keys, {"label": jnp.arange(4)})["x"]

    return jax.jit(draw, compiler_options=options)(params)


@pytest.mark.parametrize("name, options", [("ddim", dict(eta=0.0)), ("ddpm", {})])
def test_the_first_sample_of_a_nest_is_the_smaller_models_bit_for_bit(grafted, name, options):
    """The adapters are 0: the coarsest image of the nest is that of the phase before, given the same keys.

    The arithmetic is the same, operation by operation. XLA's fusions sum the norms of the larger program in another
    order (an ulp), so its optimizations are off here; with them, the images are the same to rounding."""
    first, ema, second, state = grafted
    sampler = common.mdm_sampler(name, 3, **options)
    plain = {"xla_backend_optimization_level": 0}
    small, nest = drawn(first, ema, sampler, plain), drawn(second, state.ema["x"], sampler, plain)
    assert np.abs(small).max() > 0.1
    np.testing.assert_array_equal(nest[0], small)
    if name == "ddpm":
        np.testing.assert_allclose(drawn(second, state.ema["x"], sampler, OPTIMIZED)[0], small, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"levels[0].backbone.time_width": 64}, "none of its levels fits one of x, whole or as a part; check the back"),
        ({"levels[0].backbone.num_heads": 1}, "none of its levels fits one of x"),  # shapes are equal, results are not
        (
            {"init_from.levels": ("x",), "levels[0].backbone.time_width": 64},
            "level x fits nowhere (its shape is [2, 2, 1] there, [[2, 2, 1], [4, 4, 1]] here): no part of this",
        ),
        ({"levels[0].name": "y", "hierarchy.label_levels": ("y",)}, "none of its levels fits one of y"),
        ({"init_from.path": "nowhere"}, "nowhere/config.json: not found; give the --workdir of a run"),
    ],
)
def test_what_fits_nowhere_is_refused(straight, changes, message):
    """And not trained from scratch."""
    config = config_of(("init_from.path", str(folder(straight, "s2"))), kind="nest")
    for path, value in changes.items():
        place, (*parts, key) = config, path.replace("[0]", ".0").split(".")
        for part in parts:
            place = place[int(part)] if part.isdigit() else place[part]
        place[key] = value
    abstract = abstract_state(config).params
    refused(transfer.load_initial_weights, to_plain(config), config.init_from.path, abstract, match=message)
