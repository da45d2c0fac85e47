"""The greedy search of sigma, level by level from the coarsest (CVPR Sec. 4.2): a run per depth and value.

    python main.py --mode=search --config=configs/fashion_mnist.py:L3 --workdir=DIR --config.search.sigmas="(0.0, 0.5)"

Depth d is the hierarchy of the config's d - 1 coarsest levels and its finest one, with the guidance of the config's d
coarsest levels (CVPR Sec. 4.2: the first of the list). At every depth the newest level's sigma is searched:

    depth 1   L1             trains the finest level, which nothing coarser conditions
    depth d   Ld-sigmaS      S the first value: trains the newest level and the finest one, takes the others from the
                             runs of depth d - 1, with the sigmas that were kept there
              Ld-sigmaS      every other value: trains the finest level, takes all others from the run above

A level's own network does not depend on its sigma, so that the newest one trains once per depth; a level's training
does not depend on what trains beside it. The value of the smallest FD-EffLite0 is kept, guided where guidance is on.
Every run is an ordinary one in a folder of its own, with its pictures and scores.json. A repeated command goes on where
an earlier one stopped: search.json names the runs that are scored, the one under way resumes from its checkpoint. Give
all values from the start: where a value added later wins at one depth, the folders of the next depth hold runs with the
earlier winner, and are refused.

The paper's Table 1 has unguided and guided scores side by side; so has search.md. Scores of few samples are noisy, and
so is the choice between close ones.
"""

import copy
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from nested.build.data import build_data
from nested.build.levels import build_levels
from nested.build.options import Config
from nested.build.training import check_images_exist
from nested.figures import curves
from nested.modes import sweep, train
from nested.runtime.checkpoint import latest_step
from nested.runtime.files import atomic_write

KINDS = {"without guidance": False, "with guidance": True}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the search. sigma: of the newest level; None at depth 1, which has none.

    trains, takes: names of levels, coarse to fine. source: the run that those in `takes` come from; '' for none."""

    name: str
    depth: int
    sigma: float | None
    trains: tuple[str, ...]
    takes: tuple[str, ...]
    source: str

    def __str__(self):
        taken = f"; takes {', '.join(self.takes)} from {self.source}" if self.takes else ""
        return f"{self.name}: trains {', '.join(self.trains)}{taken}"


def plan_trials(config: Config) -> list[Trial]:
    """All runs, in order. What is trained and taken does not depend on the scores."""
    *upper, finest = (level.name for level in config.levels)
    runs, source = [Trial("L1", 1, None, (finest,), (), "")], ""
    for depth in range(2, len(config.levels) + 1):
        older, newest = tuple(upper[: depth - 2]), upper[depth - 2]
        names = [f"L{depth}-sigma{sigma:g}" for sigma in config.search.sigmas]
        first, *others = (float(sigma) for sigma in config.search.sigmas)
        runs.append(Trial(names[0], depth, first, (newest, finest), older, source))
        source = names[0]
        for name, sigma in zip(names[1:], others, strict=True):
            runs.append(Trial(name, depth, sigma, (finest,), (*older, newest), source))
    return runs


def trial_config(config: Config, trial: Trial, kept: Mapping[str, float], workdir: str) -> Config:
    """The config of one run. kept: {level: sigma} of the older levels."""
    result = copy.deepcopy(config)
    result.levels = (*result.levels[: trial.depth - 1], result.levels[-1])
    for level, other in zip(result.levels, config.levels, strict=False):
        level.guidance = other.guidance
        level.sigma = kept.get(level.name, level.sigma)
    if trial.sigma is not None:
        result.levels[-2].sigma = trial.sigma
    names = [level.name for level in result.levels]
    for key in ("label_levels", "text_levels"):
        result.hierarchy[key] = tuple(name for name in config.hierarchy[key] if name in names)
    result.train_levels = trial.trains
    result.init_from.update(path=trial.source and os.path.join(workdir, trial.source), levels=trial.takes)
    result.latents_dir = build_data(config).latents_dir(workdir)
    return result


def check_search(config: Config, workdir: str) -> None:
    """Raises ValueError, before the first run, for whatever is wrong with any of them."""
    sigmas, some = tuple(config.search.sigmas), config.init_from
    if len(config.levels) < 2:
        raise ValueError(f"the search of sigma needs 2 levels or more, config.levels has {len(config.levels)}")
    numbers = {f"{sigma:g}" for sigma in sigmas if isinstance(sigma, (int, float)) and sigma >= 0}
    if not sigmas or len(numbers) < len(sigmas):
        raise ValueError(f"config.search.sigmas {sigmas}: give different numbers of at least 0")
    if not config.evaluate.num_samples:
        raise ValueError("config.evaluate.num_samples is 0, so no sigma could be chosen: give a number of samples")
    if config.hierarchy.cond_noise != "sigma":
        raise ValueError(f"config.hierarchy.cond_noise {config.hierarchy.cond_noise!r} has no sigma to search: 'sigma'")
    decided = {
        "phases": config.phases, "train_levels": config.train_levels, "evaluate.sweep": config.evaluate.sweep,
        "init_from": some.path or some.phase or some.levels,
    }  # fmt: skip
    for key, value in decided.items():
        if value:
            raise ValueError(f"config.{key} {value!r}: a search makes its own runs and has no place for it; empty it")
    for trial in plan_trials(config):
        own = trial_config(config, trial, {}, workdir)
        try:
            build_levels(own)
            check_images_exist(own)
        except ValueError as error:
            raise ValueError(f"search, run {trial.name}: {error}") from error


def run(config: Config, workdir: str) -> None:
    """Makes the runs, writes search.json, search.md and search.png, and prints the options to train with."""
    check_search(config, workdir)
    paths = [os.path.join(workdir, f"search.{kind}") for kind in ("json", "md", "png")]
    known = {row["config"]: row for row in sweep.read_rows(paths[0])}
    rows: list[dict] = []
    kept: dict[str, float] = {}
    chosen: dict = {}
    for depth, trials in itertools.groupby(plan_trials(config), key=lambda trial: trial.depth):
        tried = []
        for trial in trials:
            row = train_and_score(trial, trial_config(config, trial, kept, workdir), workdir, known)
            if row is None:
                logging.info("search: stopped by a signal in %s; run the same command again to go on", trial.name)
                return
            tried.append(row)
            sweep.write_rows(paths[0], rows + tried, kept=kept)
        rows += tried
        best = best_trial(tried)
        chosen = tried[best]
        if depth > 1:
            kept[config.levels[depth - 2].name] = float(config.search.sigmas[best])
    if jax.process_index() == 0:
        sweep.write_rows(paths[0], rows, kept=kept)
        atomic_write(paths[1], format_table(rows, config.search.sigmas, kept))
        plot_scores(rows, config.search.sigmas, paths[2])
        print("\n".join([*(f"search:  {path}" for path in paths), *format_conclusion(config, kept, chosen)]))


def train_and_score(trial: Trial, config: Config, workdir: str, known: Mapping[str, dict]) -> dict | None:
    """The row of one run, which is trained and scored unless that has been done; None if a signal stopped it.

    known: rows of search.json by the fingerprint of their configs; only process 0 needs them, and gives rows back."""
    made_from, folder = sweep.config_fingerprint(config), os.path.join(workdir, trial.name)
    if multihost_utils.broadcast_one_to_all(np.int32(made_from in known)):
        logging.info("%s: scored before, as search.json says", trial.name)
        return known.get(made_from, {})
    logging.info("%s", trial)
    os.makedirs(folder, exist_ok=True)
    train.run(config, folder)  # which ends with the scores
    if (latest_step(folder) or 0) < config.train.steps:
        return None
    if jax.process_index():
        return {}
    with open(os.path.join(folder, "scores.json"), encoding="utf-8") as file:
        scores = json.load(file)
    return {"run": trial.name, "depth": trial.depth, "sigma": trial.sigma, "config": made_from, "scores": scores}


def best_trial(rows: Sequence[dict]) -> int:
    """The index of the row with the smallest FD, the guided FD if guidance is on. Process 0 decides for all."""
    best = np.argmin([row["scores"][0]["fd"] for row in rows]) if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(best)))


def scores_by_kind(rows: Sequence[dict]) -> dict[str, dict[tuple, float]]:
    """{"without guidance": {(depth, sigma): FD}, "with guidance": ...}, of the kinds that there are."""
    found = {
        kind: {(r["depth"], r["sigma"]): s["fd"] for r in rows for s in r["scores"] if s["guided"] == guided}
        for kind, guided in KINDS.items()
    }
    return {kind: scores for kind, scores in found.items() if scores}


def format_table(rows: Sequence[dict], sigmas: Sequence[float], kept: Mapping[str, float]) -> str:
    """Markdown in the layout of the paper's Table 1: a row per depth, a column per sigma, the best of a row bold."""
    kinds = scores_by_kind(rows)
    head = ["L", *(f"{kind}, sigma {sigma:g}" for kind in kinds for sigma in sigmas), "kept"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    names = dict(enumerate(kept, 2))
    for depth in sorted({row["depth"] for row in rows}):
        cells = [str(depth)]
        for scores in kinds.values():
            found = [scores.get((depth, sigma)) for sigma in sigmas]
            if depth == 1:
                found[0] = scores.get((1, None))
            best = min((fd for fd in found if fd is not None), default=None) if depth > 1 else None
            cells += ["-" if fd is None else f"**{fd:.2f}**" if fd == best else f"{fd:.2f}" for fd in found]
        cells.append(f"{names[depth]} {kept[names[depth]]:g}" if depth > 1 else "-")
        lines.append(f"| {' | '.join(cells)} |")
    note = "FD-EffLite0 by depth L and the sigma of the newest level; L = 1 has none. Bold: the smallest of a row."
    return "\n".join([note, "", *lines]) + "\n"


def plot_scores(rows: Sequence[dict], sigmas: Sequence[float], path: str) -> None:
    """FD against sigma, a curve per depth; that of depth 1 is level."""
    depths = sorted({row["depth"] for row in rows})
    panels = {
        f"FD-EffLite0 {kind}": {
            f"L = {depth}": [scores.get((depth, sigma), scores.get((depth, None), np.nan)) for sigma in sigmas]
            for depth in depths
        }
        for kind, scores in scores_by_kind(rows).items()
    }
    curves.score_curves(sigmas, panels, "sigma of the newest level", path)


def format_conclusion(config: Config, kept: Mapping[str, float], best: dict) -> list[str]:
    """The sigmas that were kept, and how to train with them."""
    places = {level.name: i for i, level in enumerate(config.levels)}
    options = " ".join(f"'--config.levels[{places[name]}].sigma={sigma}'" for name, sigma in kept.items())
    chosen = ", ".join(f"{name} {sigma:g}" for name, sigma in kept.items())
    score = best["scores"][0]
    return [f"kept:    sigma {chosen}: FD-EffLite0 {score['fd']:.2f} in {best['run']}", f"options: {options}"]
