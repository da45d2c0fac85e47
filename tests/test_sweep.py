"""nested/modes/sweep.py and nested/figures/curves.py: which combinations, what each sets, going on, and rows against
evaluations."""

import copy
import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from helpers.refusals import refused
from helpers.run_data import decoder_of
from helpers.scoring import Pooler
from helpers.small_runs import config_of
from matplotlib.figure import Figure
from PIL import Image

from nested.build.levels import build_levels
from nested.evaluation.report import Score
from nested.figures import curves as plots
from nested.modes import evaluate, sample, sweep
from nested.runtime import partition


def generator(config):
    return sample.build_generator(config, build_levels(config), decoder_of(config, ""), partition.make_mesh(1, 1))


def swept(*pairs, depth=2, **changes):
    """A config with this sweep."""
    return config_of(depth, evaluate__sweep=pairs, **changes)


def unlabelled(config):
    """Nothing conditions the coarsest level."""
    config.hierarchy.label_levels, config.levels[0].guidance = (), 0.0
    return config


class Measure:
    """The place of drawing and scoring: FD grows by one with every row; after `limit` rows it is killed."""

    def __init__(self, limit=99):
        self.levels, self.limit = [], limit

    def __call__(self, gen, ema, step):
        if len(self.levels) == self.limit:
            raise KeyboardInterrupt
        self.levels.append(gen.levels)
        fd = float(len(self.levels))
        return Score(True, tuple(level.guidance for level in gen.levels), fd, fd / 100, 8, 8, 32, step)


def run(config, measure, workdir, step=1):
    """Scores the sweep of a config -> the rows of sweep.json."""
    gen = generator(config)
    sweep.score_combinations(config, gen, None, sweep.build_combinations(config, gen), measure, step, str(workdir))
    return rows_of(workdir)


def rows_of(workdir):
    return json.loads((workdir / "sweep.json").read_text())["rows"]


# --- combinations ----------------------------------------------------------------------------------------------------


def test_every_combination_is_scored_in_order(tmp_path):
    config = swept(
        ("guidance", (0.0, (1, 0.25))), ("hierarchy.noise_gamma", (0, 0.3, "inf")), ("sampler.steps", (2, 3))
    )
    measure = Measure()
    rows = run(config, measure, tmp_path)
    found = [(a.guidance, b.guidance, a.noise_gamma, a.sampler.steps) for a, b in measure.levels]
    assert found == [(*w, gamma, n) for w in ((0, 0), (1, 0.25)) for gamma in (0, 0.3, np.inf) for n in (2, 3)]
    assert [row["fd"] for row in rows] == list(range(1, 13))
    assert rows[-1]["values"] == {"guidance": [1, 0.25], "hierarchy.noise_gamma": "inf", "sampler.steps": 3}
    head, _, *lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert head == "| guidance | hierarchy.noise_gamma | sampler.steps | FD-EffLite0 | KID |" and len(lines) == 12
    assert lines[-1] == "| (1, 0.25) | inf | 3 | 12.00 | 0.1200 |" and lines[0] == "| 0 | 0 | 2 | 1.00 | 0.0100 |"


def test_scores_of_another_weight_file_are_not_taken_over(tmp_path):
    """Every weight file is step 0 of the same config."""
    config = swept(("sampler.steps", (2, 3)))
    gen = generator(config)
    todo = sweep.build_combinations(config, gen)
    for file, fds in (("aa", [1.0, 2.0]), ("bb", [1.0, 2.0]), ("bb", [1.0, 2.0])):
        measure = Measure()

        def measured(*arguments, measure=measure, file=file):
            return dataclasses.replace(measure(*arguments), weights=file)

        sweep.score_combinations(config, gen, None, todo, measured, 0, str(tmp_path), file)
        assert [(row["fd"], row["weights"]) for row in rows_of(tmp_path)] == [(fd, file) for fd in fds]
    assert measure.levels == []  # the third took over the rows of the second


def values(option, value, config):
    """What a value of an option makes of (guidance, steps, eta) of every level."""
    levels = build_levels(config)
    config = copy.deepcopy(config)
    sweep.set_option(config, option, value, levels)
    return [(one.guidance, one.sampler.steps, getattr(one.sampler, "eta", None)) for one in build_levels(config)]


def test_an_option_sets_the_levels_that_it_means():
    config = config_of(2)
    assert values("guidance", 2, config) == [(2.0, 2, 0.0), (2.0, 2, 0.0)]
    assert values("guidance", 2, unlabelled(config_of(2))) == [(0.0, 2, 0.0), (2.0, 2, 0.0)]
    assert values("guidance", (0, 1.5), config) == [(0.0, 2, 0.0), (1.5, 2, 0.0)]
    assert values("x8.guidance", 2, config) == [(0.5, 2, 0.0), (2.0, 2, 0.0)]
    assert values("x2.sampler.steps", 5, config) == [(0.5, 5, 0.0), (0.4, 2, 0.0)]
    config.levels[1].sampler = dict(name="ddpm", steps=2, t_end=1e-3)
    assert values("sampler.eta", 1.0, config) == [(0.5, 2, 1.0), (0.4, 2, None)]
    assert values("sampler.steps", 4, config) == [(0.5, 4, 0.0), (0.4, 4, None)]


def test_what_can_be_guided_can_lose_a_condition():
    coarse, fine = build_levels(unlabelled(config_of(2)))
    assert [sweep.can_be_guided(one) for one in (coarse, fine)] == [False, True]
    assert sweep.can_be_guided(dataclasses.replace(coarse, num_classes=10))
    assert sweep.can_be_guided(dataclasses.replace(coarse, null_text={}))
    assert not sweep.can_be_guided(dataclasses.replace(fine, condition_noise=object()))


def test_noise_options_reach_the_levels():
    config = swept(("hierarchy.noise_scale", ("variance", "std")), ("hierarchy.noise_resample", (False, True)))
    gen = generator(config)
    todo = sweep.build_combinations(config, gen)
    found = [(one.levels[1].noise_scale, one.levels[1].noise_resample) for one in todo]
    assert found == [("variance", False), ("variance", True), ("std", False), ("std", True)]
    assert gen.levels[1].noise_scale == "variance"  # the generator's own levels stay


@pytest.mark.parametrize(
    "pairs, message",
    [
        (("guidance",), "config.evaluate.sweep: 'guidance' is not a pair (option, values); give pairs, as "),
        ((("guidance", 0.5),), "config.evaluate.sweep: ('guidance', 0.5) is not a pair (option, values)"),
        ((("guidance", (0.5,)),), "config.evaluate.sweep: guidance has values (0.5,); give two or more different ones"),
        ((("guidance", (0.5, 0.5)),), "guidance has values (0.5, 0.5); give two or more different ones"),
        (((3, (1, 2)),), "config.evaluate.sweep: (3, (1, 2)) is not a pair (option, values)"),
        ((("guidance", (0.5, "inf")),), "config.evaluate.sweep: 'inf' given for guidance, expected float"),
        ((("guidance", (0.5, "1")),), "config.evaluate.sweep: '1' given for guidance, expected float; choose from gui"),
        ((("guidance", (0.5, True)),), "config.evaluate.sweep: True given for guidance, expected float"),
        ((("guidance", ((0.5,), (1.0,))),), "config.evaluate.sweep: guidance (0.5,) is for 1 of 2 levels"),
        ((("x8.guidance", (0.5, (1.0, 0.0))),), "config.evaluate.sweep: (1.0, 0.0) given for x8.guidance, expected f"),
        ((("guidance", (0, 1)), ("x8.guidance", (0, 1))), "guidance and x8.guidance both set a level's guidance; give"),
        ((("x9.guidance", (0, 1)),), "config.evaluate.sweep: 'x9.guidance' given; choose from guidance, hierarchy.con"),
        ((("sampler.stesp", (2, 3)),), "'sampler.stesp' given; choose from guidance, hierarchy.cond_noise_step, "),
        ((("sampler.name", ("ddpm", "ddim")),), "config.evaluate.sweep: 'sampler.name' given"),
        ((("x8.sampler.name", ("ddpm", "ddim")),), "config.evaluate.sweep: 'x8.sampler.name' given"),
        ((("x8.hierarchy.noise_gamma", (0, 1)),), "config.evaluate.sweep: 'x8.hierarchy.noise_gamma' given"),
        ((("hierarchy.cond_drop", (0.1, 0.2)),), "config.evaluate.sweep: 'hierarchy.cond_drop' given"),
        ((("train.steps", (1, 2)),), "config.evaluate.sweep: 'train.steps' given"),
        ((("sampler.steps", (2, 2.5)),), "config.evaluate.sweep: 2.5 given for sampler.steps, expected int"),
        ((("hierarchy.noise_resample", (False, 1)),), "1 given for hierarchy.noise_resample, expected bool"),
        ((("hierarchy.noise_scale", ("std", "log")),), "hierarchy.noise_scale"),
        ((("sampler.eta", (0.0, 2.0)),), "config.levels[0].sampler: sampler.eta = 2.0: expected a number from 0 to 1"),
    ],
)
def test_sweeps_are_refused_before_anything_is_drawn(pairs, message, monkeypatch):
    config = config_of(2, evaluate__sweep=pairs)
    gen = types.SimpleNamespace(levels=build_levels(config), text=None)
    monkeypatch.setattr(sample, "restore_generator", lambda config, workdir: (gen, None, 1))
    monkeypatch.setattr(evaluate, "open_latents", lambda data, workdir, text: (None, None))
    monkeypatch.setattr(evaluate, "build_scorer", None)
    refused(evaluate.run, config, "unused", match=message)


@pytest.mark.parametrize(
    "pair, message",
    [
        (("guidance", (0, 1)), "config.evaluate.sweep: guidance changes nothing, as nothing conditions any level"),
        (("hierarchy.noise_gamma", (0, 1)), "hierarchy.noise_gamma changes nothing, as no level sees one with a sigma"),
    ],
)
def test_sweeps_of_what_changes_nothing_are_refused(pair, message):
    config = unlabelled(config_of(1, evaluate__sweep=(pair,)))
    gen = types.SimpleNamespace(levels=build_levels(config), text=None)
    refused(sweep.build_combinations, config, gen, match=message)


def test_a_level_that_nothing_conditions_is_not_guided_by_name():
    config = unlabelled(config_of(2, evaluate__sweep=(("x2.guidance", (0.0, 0.5)),)))
    message = "config.levels[0].guidance is 0.5 but nothing conditions x2: set it to 0"
    refused(sweep.build_combinations, config, generator(config), match=message)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_sweep_that_was_killed_keeps_its_rows(tmp_path):
    config = swept(("guidance", (0.0, 1.0)), ("sampler.steps", (2, 3)))
    with pytest.raises(KeyboardInterrupt):
        run(config, Measure(limit=3), tmp_path)
    assert [row["fd"] for row in rows_of(tmp_path)] == [1, 2, 3] and not (tmp_path / "sweep.md").exists()
    measure = Measure()
    rows = run(config, measure, tmp_path)
    ((coarse, fine),) = measure.levels
    assert (coarse.guidance, fine.sampler.steps) == (1.0, 3)
    assert [row["fd"] for row in rows] == [1, 2, 3, 1] and len((tmp_path / "sweep.md").read_text().splitlines()) == 6
    measure = Measure()
    assert run(config, measure, tmp_path) == rows and measure.levels == []
    same = swept(("sampler.steps", (2, 3)), ("guidance", ((0, 0), (1, 1))))  # the same configs in other words
    found = run(same, measure, tmp_path)
    assert [row["fd"] for row in found] == [1, 3, 2, 1] and measure.levels == []
    assert found[-1]["values"] == {"sampler.steps": 3, "guidance": [1, 1]}


def test_only_rows_of_the_same_step_and_config_are_taken(tmp_path):
    pair = ("sampler.steps", (2, 3))
    run(swept(pair), Measure(), tmp_path)
    for config, step, new in (
        (swept(("sampler.steps", (3, 4, 2))), 1, [4]),  # a value more
        (swept(pair), 2, [2, 3]),
        (swept(pair, evaluate__num_samples=9), 2, [2, 3]),
        (swept(pair, evaluate__num_samples=9, hierarchy__noise_gamma=0.5), 2, [2, 3]),
        (swept(pair, evaluate__num_samples=9, hierarchy__noise_gamma=0.5, search__sigmas=()), 2, []),
    ):
        measure = Measure()
        run(config, measure, tmp_path, step)
        assert [coarse.sampler.steps for coarse, _ in measure.levels] == new


# --- the plot --------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been rendered."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format: drawn.append(figure))
    return drawn


def test_the_option_with_the_most_values_lies_along_x(tmp_path, figures):
    config = swept(("guidance", (0.0, 1.0)), ("sampler.steps", (2, 5, 9)), ("hierarchy.noise_gamma", (0.0, "inf")))
    rows = run(config, Measure(), tmp_path)
    for axis, key in zip(figures[0].axes, ("fd", "kid"), strict=True):
        assert axis.get_xlabel() == "sampler.steps"
        scores = np.reshape([row[key] for row in rows], (2, 3, 2))
        for line, (i, j) in zip(axis.lines, np.ndindex(2, 2), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [2, 5, 9])
            np.testing.assert_allclose(line.get_ydata(), scores[i, :, j])
    assert [axis.get_title(loc="left") for axis in figures[0].axes] == ["FD-EffLite0", "KID"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        f"guidance {w}, hierarchy.noise_gamma {gamma}" for w in (0, 1) for gamma in (0, "inf")
    ]


def test_values_that_are_no_numbers_stand_at_equal_distances(tmp_path, figures):
    plots.score_curves([0.1, 5, "inf"], {"FD": {"": [1.0, 2.0, np.nan]}}, "gamma", tmp_path / "unused.png")
    (axis,) = figures[0].axes
    assert list(axis.lines[0].get_xdata()) == [0, 1, 2] and not figures[0].legends
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "5", "inf"]


# --- for real --------------------------------------------------------------------------------------------------------


def test_a_row_is_what_an_evaluation_scores_with_its_values(searched, tmp_path, monkeypatch, capsys):
    """Table 3 in small. The weights are scaled up, so that guidance and noise matter after one step."""
    pooler, restored, path = Pooler(), sample.restore_generator, searched[0] / "L2-sigma0.5"
    monkeypatch.setattr(evaluate, "load_score_encoder", lambda config: pooler)

    def scaled_up(config, workdir):
        gen, ema, step = restored(config, str(path))
        return gen, jax.tree.map(lambda w: 3 * w, ema), step

    monkeypatch.setattr(sample, "restore_generator", scaled_up)
    pairs = (("guidance", (0.0, 2.0)), ("hierarchy.noise_gamma", (0.0, "inf")))
    evaluate.run(config_of(2, evaluate__sweep=pairs), str(tmp_path))
    paths = [tmp_path / f"sweep.{kind}" for kind in ("json", "md", "png")]
    assert capsys.readouterr().out.splitlines() == [f"sweep:   {path}" for path in paths]
    assert min(Image.open(paths[2]).size) > 100
    rows = rows_of(tmp_path)
    assert len({row["fd"] for row in rows}) == 4 and [row["guided"] for row in rows] == [False, False, True, True]
    config = config_of(2, hierarchy__noise_gamma=0.0)
    config.levels[0].guidance = config.levels[1].guidance = 0.0
    evaluate.run(config, str(tmp_path))
    (expected,) = json.loads((tmp_path / "scores.json").read_text())
    assert {key: rows[0][key] for key in expected} == expected
