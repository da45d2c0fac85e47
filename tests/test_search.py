"""nested/modes/search.py: what every run trains and takes, which sigma is kept, going on, and one search for real."""

import json
import os

import pytest
from helpers.command_line import refused_here
from helpers.refusals import refused
from helpers.small_runs import config_of
from helpers.trees import assert_equal

from nested.build.training import abstract_state
from nested.modes import search, train
from nested.runtime import checkpoint

SIGMAS = (0.0, 0.5, 1.0)
# FD by run: depth 2 keeps .5, depth 3 keeps 0; unguided scores are 200 less these, so that they would choose otherwise.
FD = {"L1": 90.0, "L2-sigma0": 50.0, "L2-sigma0.5": 40.0, "L2-sigma1": 60.0, "L3-sigma0": 20.0, "L3-sigma0.5": 20.125,
      "L3-sigma1": 30.0}  # fmt: skip


class Runs:
    """The place of training and scoring: says what was asked for, writes the scores of FD, stops where told."""

    def __init__(self, monkeypatch):
        self.configs, self.stop_in = {}, None
        monkeypatch.setattr(train, "run", self.train)
        monkeypatch.setattr(search, "latest_step", lambda folder: None if self.stop_in in folder else 1)

    def train(self, config, folder):
        self.configs[os.path.basename(folder)] = config
        self.stop_in = self.stop_in or "nowhere"
        fd, guided = FD[os.path.basename(folder)], any(level.guidance for level in config.levels)
        scores = [dict(guided=guided, fd=fd), dict(guided=False, fd=200 - fd)][: 1 + guided]
        with open(os.path.join(folder, "scores.json"), "w") as file:
            json.dump(scores, file)


@pytest.fixture
def runs(monkeypatch):
    return Runs(monkeypatch)


def rows_of(workdir):
    return json.loads((workdir / "search.json").read_text())["rows"]


# --- the plan --------------------------------------------------------------------------------------------------------


def test_every_run_trains_only_what_is_new():
    assert [str(run) for run in search.plan_trials(config_of(3, search__sigmas=(0.0, 0.5)))] == [
        "L1: trains x8",
        "L2-sigma0: trains x2, x8",
        "L2-sigma0.5: trains x8; takes x2 from L2-sigma0",
        "L3-sigma0: trains x4, x8; takes x2 from L2-sigma0",
        "L3-sigma0.5: trains x8; takes x2, x4 from L3-sigma0",
    ]


def test_runs_are_the_config_but_for_their_levels(runs, tmp_path):
    config = config_of(3, search__sigmas=SIGMAS)
    config.hierarchy.label_levels, config.levels[0].guidance = ("x4", "x8"), 0.0
    before = config.to_json()
    search.run(config, str(tmp_path))
    assert list(runs.configs) == list(FD) and config.to_json() == before
    own = runs.configs["L3-sigma0.5"]
    assert [level.name for level in own.levels] == ["x2", "x4", "x8"] and own.hierarchy.label_levels == ("x4", "x8")
    assert [level.sigma for level in own.levels] == [0.5, 0.5, 0.25]  # kept; tried; the finest has none
    assert own.train_levels == ("x8",) and own.init_from.levels == ("x2", "x4")
    assert own.init_from.path == str(tmp_path / "L3-sigma0") and own.latents_dir == str(tmp_path / "latents")
    assert [runs.configs[name].levels[0].sigma for name in FD if "L3" in name] == [0.5, 0.5, 0.5]
    first = runs.configs["L1"]
    assert first.hierarchy.label_levels == ("x8",) and first.init_from.path == "" and first.train_levels == ("x8",)
    guidance = [[level.guidance for level in runs.configs[name].levels] for name in ("L1", "L2-sigma1", "L3-sigma1")]
    assert guidance == [[0.0], [0.0, 0.4], [0.0, 0.4, 0.3]]


def test_the_smallest_score_is_kept_and_the_table_is_the_papers(runs, tmp_path, capsys):
    search.run(config_of(3, search__sigmas=SIGMAS), str(tmp_path))
    head, _, *lines = (tmp_path / "search.md").read_text().splitlines()[2:]
    kinds = [f"{kind} guidance, sigma {sigma}" for kind in ("without", "with") for sigma in ("0", "0.5", "1")]
    assert head == f"| L | {' | '.join(kinds)} | kept |"
    assert lines == [
        "| 1 | 110.00 | - | - | 90.00 | - | - | - |",
        "| 2 | 150.00 | 160.00 | **140.00** | 50.00 | **40.00** | 60.00 | x2 0.5 |",
        "| 3 | 180.00 | 179.88 | **170.00** | **20.00** | 20.12 | 30.00 | x4 0 |",
    ]
    assert [row["run"] for row in rows_of(tmp_path)] == list(FD)
    assert json.loads((tmp_path / "search.json").read_text())["kept"] == {"x2": 0.5, "x4": 0.0}
    assert (tmp_path / "search.png").stat().st_size > 5000
    *_, kept, options = capsys.readouterr().out.splitlines()
    assert kept == "kept:    sigma x2 0.5, x4 0: FD-EffLite0 20.00 in L3-sigma0"
    assert options == "options: '--config.levels[0].sigma=0.5' '--config.levels[1].sigma=0.0'"


def test_without_guidance_there_is_one_half_of_the_table(runs, tmp_path):
    config = config_of(2, search__sigmas=(0.5, 1.0))
    config.levels[0].guidance = config.levels[1].guidance = 0.0
    search.run(config, str(tmp_path))
    assert (tmp_path / "search.md").read_text().splitlines()[2:] == [
        "| L | without guidance, sigma 0.5 | without guidance, sigma 1 | kept |", "|---|---|---|---|",
        "| 1 | 90.00 | - | - |", "| 2 | **40.00** | 60.00 | x2 0.5 |",
    ]  # fmt: skip


def test_a_run_that_ends_with_its_scores_is_not_scored_twice(runs, tmp_path):
    search.run(config_of(2, search__sigmas=(0.5,), sample__num_samples=4), str(tmp_path))
    assert [row["scores"][0]["fd"] for row in rows_of(tmp_path)] == [90.0, 40.0]


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_search_that_was_stopped_goes_on_where_it_was(runs, tmp_path, capsys):
    config = config_of(3, search__sigmas=SIGMAS)
    runs.stop_in = "L3-sigma0"
    search.run(config, str(tmp_path))
    assert list(runs.configs)[-1] == "L3-sigma0" and capsys.readouterr().out == ""
    assert [row["run"] for row in rows_of(tmp_path)] == list(FD)[:4] and not (tmp_path / "search.md").exists()
    runs.configs, runs.stop_in = {}, None
    search.run(config, str(tmp_path))
    assert list(runs.configs) == ["L3-sigma0", "L3-sigma0.5", "L3-sigma1"]
    assert [level.sigma for level in runs.configs["L3-sigma1"].levels[:2]] == [0.5, 1.0]
    whole, runs.configs = (tmp_path / "search.md").read_text(), {}
    search.run(config, str(tmp_path))
    assert runs.configs == {} and (tmp_path / "search.md").read_text() == whole


def test_another_value_or_another_config_costs_its_own_runs(runs, tmp_path):
    search.run(config_of(2, search__sigmas=(0.0, 0.5)), str(tmp_path))
    runs.configs = {}
    search.run(config_of(2, search__sigmas=(0.0, 0.5, 1.0)), str(tmp_path))
    assert list(runs.configs) == ["L2-sigma1"]
    search.run(config_of(2, search__sigmas=(0.0, 0.5), evaluate__num_samples=9), str(tmp_path))
    assert list(runs.configs) == ["L2-sigma1", "L1", "L2-sigma0", "L2-sigma0.5"]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "depth, changes, message",
    [
        (1, {}, "the search of sigma needs 2 levels or more, config.levels has 1"),
        (2, dict(search__sigmas=()), "config.search.sigmas (): give different numbers of at least 0"),
        (2, dict(search__sigmas=(0.5, 0.5)), "config.search.sigmas (0.5, 0.5): give different numbers"),
        (2, dict(search__sigmas=(0.5, -1.0)), "config.search.sigmas (0.5, -1.0): give different numbers"),
        (2, dict(search__sigmas=("0", 1.0)), "config.search.sigmas ('0', 1.0): give different numbers"),
        (2, dict(evaluate__num_samples=0), "config.evaluate.num_samples is 0, so no sigma could be chosen"),
        (2, dict(hierarchy__cond_noise="diffused"), "config.hierarchy.cond_noise 'diffused' has no sigma to search"),
        (2, dict(phases=(dict(name="a"),)), "config.phases ({'name': 'a'},): a search makes its own runs"),
        (2, dict(train_levels=("x8",)), "config.train_levels ('x8',): a search makes its own runs"),
        (2, dict(init_from__path="runs/L1"), "config.init_from 'runs/L1': a search makes its own runs"),
        (2, dict(evaluate__sweep=(("guidance", (0, 1)),)), "config.evaluate.sweep (('guidance', (0, 1)),): a search"),
        (2, dict(data__source="synthetic"), "search, run L1: config.data.source is 'synthetic', whose latents have no"),
        (3, dict(hierarchy__cond_drop=2.0), "search, run L1: config.hierarchy.cond_drop: found 2.0"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_first_run(depth, changes, message, runs, tmp_path):
    refused(search.run, config_of(depth, **changes), str(tmp_path), match=message)
    assert runs.configs == {} and not any(tmp_path.iterdir())


def test_a_table_that_is_none_is_refused(runs, tmp_path):
    for content in ("[]", '{"option": "guidance"}', "half"):
        (tmp_path / "search.json").write_text(content)
        refused(search.run, config_of(2), str(tmp_path), match=f"{tmp_path}/search.json: not a table of this ver")


# --- for real --------------------------------------------------------------------------------------------------------


def state_of(path):
    shapes = abstract_state(config_of(2))
    return checkpoint.restore_subtree(path, {"params": shapes.params, "ema": shapes.ema})


def test_levels_that_are_taken_stay_what_they_were(searched):
    """L2-sigma0.5 has the average of L2-sigma0's coarse level, untrained; its finest level is its own."""
    first, second = state_of(searched[0] / "L2-sigma0"), state_of(searched[0] / "L2-sigma0.5")
    for kind in ("params", "ema"):
        assert_equal(second[kind]["x2"], first["ema"]["x2"])
    others = (first["params"]["x8"], first["ema"]["x8"], second["ema"]["x8"])
    assert all((second["params"]["x8"]["pos_embed"] != other["pos_embed"]).any() for other in others)


def test_a_search_scores_its_runs(searched):
    workdir, printed = searched
    rows = rows_of(workdir)
    for row in rows:
        assert row["scores"] == json.loads((workdir / row["run"] / "scores.json").read_text())
        assert row["scores"][0]["guided"] and row["scores"][0]["num_samples"] == 8
    assert [row["run"] for row in rows] == ["L1", "L2-sigma0", "L2-sigma0.5"]
    best = min(rows[1:], key=lambda row: row["scores"][0]["fd"])
    assert printed.splitlines()[-1] == f"options: '--config.levels[0].sigma={best['sigma']}'"


def test_main_has_the_modes(tmp_path):
    said = refused_here(f"--workdir={tmp_path / 's'}", "--mode=search", config="tests/helpers/tiny.py:L1")
    assert said.startswith("error: the search of sigma needs 2 levels or more, config.levels has 1")
    said = refused_here(f"--workdir={tmp_path / 'c'}", "--mode=compare", "--runs=a")
    assert said.startswith("error: --runs names 1 run(s): give the folders of two or more")
