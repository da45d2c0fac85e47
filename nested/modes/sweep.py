"""Sweeps: every combination of some options of sampling scored on one checkpoint, as a table and a plot.

config.evaluate.sweep is a tuple of pairs (option, values), in the order of the table's columns. Options:

    guidance                     of every level that something conditions, the others keep 0; or a tuple, one per level
    hierarchy.cond_noise_step, hierarchy.noise_gamma, hierarchy.noise_scale, hierarchy.noise_resample
    sampler.OPTION               of every level whose sampler has it, as sampler.steps
    LEVEL.guidance, LEVEL.sampler.OPTION      of the one level of that name

"inf" stands for infinity, which a command line cannot spell. A row is what an ordinary evaluation scores with these
values in the config; so guidance 0 keeps noise_gamma, while the unguided score of scores.json shows conditions clean.
The paper's Table 3, gamma with and without guidance, is one command:

    python main.py --config=configs/imagenet_L5.py --workdir=DIR --mode=evaluate \\
      --config.evaluate.sweep='(("guidance", (0.0, 0.8)), ("hierarchy.noise_gamma", (0.0, 0.1, 0.3, 0.5, "inf")))'

sweep.json is written anew after every row. A repeated command takes over the rows that were made of the same checkpoint
step and the same config, so that a sweep that was killed goes on where it was, and a longer one costs its new rows.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from nested.build.levels import build_levels
from nested.build.options import Config, to_plain
from nested.diffusion.level import Level
from nested.evaluation.report import Score
from nested.figures import curves
from nested.runtime.files import atomic_write
from nested.runtime.writers import Progress
from nested.sampling.generator import Generator

Tree = Any

HIERARCHY = ("cond_noise_step", "noise_gamma", "noise_scale", "noise_resample")
CHOICES = (
    f"choose from guidance, {', '.join(f'hierarchy.{name}' for name in HIERARCHY)}, sampler.OPTION, LEVEL.guidance and "
    "LEVEL.sampler.OPTION, with an option that the level's sampler has"
)


@dataclasses.dataclass(frozen=True)
class Column:
    """A score of the table and the plot: its field of evaluation.report.Score, its name, digits after the point."""

    key: str
    title: str
    digits: int


SCORES = (Column("fd", "FD-EffLite0", 2), Column("kid", "KID", 4), Column("clip", "CLIP score", 2))


@dataclasses.dataclass(frozen=True)
class Combination:
    """values: {option: value}. levels: the hierarchy with them. config: the fingerprint of the config with them."""

    values: dict[str, Any]
    levels: tuple[Level, ...]
    config: str


def build_combinations(config: Config, generator: Generator) -> list[Combination]:
    """Every combination of the values in config.evaluate.sweep; those of the last option change fastest.

    Raises ValueError for an unknown option or level, a value that is not allowed, and an option without effect."""
    pairs = sweep_pairs(config)
    options = [option for option, _ in pairs]
    check_places(config, options)
    check_effects(generator.levels, options)
    null_text, result = None if generator.text is None else generator.text.encode_one(), []
    for values in itertools.product(*(values for _, values in pairs)):
        changed = copy.deepcopy(config)
        for option, value in zip(options, values, strict=True):
            set_option(changed, option, value, generator.levels)
        levels = build_levels(changed, null_text)
        result.append(Combination(dict(zip(options, values, strict=True)), levels, config_fingerprint(changed)))
    return result


def sweep_pairs(config: Config) -> list[tuple[str, tuple]]:
    """config.evaluate.sweep, checked: pairs of an option and two or more different values."""
    pairs = config.evaluate.sweep
    for pair in pairs:
        kinds = (str, (tuple, list))
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(isinstance, pair, kinds)):
            raise ValueError(
                f"config.evaluate.sweep: {pair!r} is not a pair (option, values); give pairs, as "
                '(("guidance", (0.0, 0.5)), ("sampler.steps", (10, 25)))'
            )
        if len(set(map(str, pair[1]))) < max(2, len(pair[1])):
            raise ValueError(f"config.evaluate.sweep: {pair[0]} has values {pair[1]}; give two or more different ones")
    return [(option, tuple(tuple(v) if isinstance(v, list) else v for v in values)) for option, values in pairs]


def check_places(config: Config, options: Sequence[str]) -> None:
    """Raises ValueError for an option that sets nothing, or sets what another option sets."""
    taken = {}
    for option in options:
        found = option_places(config, option)
        if not found:
            raise ValueError(f"config.evaluate.sweep: {option!r} given; {CHOICES}")
        for place, key in found:
            if (id(place), key) in taken:
                other = taken[id(place), key]
                raise ValueError(f"config.evaluate.sweep: {other} and {option} both set a level's {key}; give one")
            taken[id(place), key] = option


def check_effects(levels: Sequence[Level], options: Sequence[str]) -> None:
    """Raises ValueError for an option that changes nothing in this hierarchy."""
    for option in options:
        what = option.rpartition(".")[2]
        if what == "guidance" and not any(map(can_be_guided, levels)):
            raise ValueError(f"config.evaluate.sweep: {option} changes nothing, as nothing conditions any level")
        if what.startswith("noise_") and not any(any(level.cond_sigmas) for level in levels):
            raise ValueError(f"config.evaluate.sweep: {option} changes nothing, as no level sees one with a sigma")


def option_places(config: Config, option: str) -> list[tuple[Any, str]]:
    """[(section of the config, key)] that the option sets; [] for an unknown option."""
    first, _, rest = option.partition(".")
    levels = [level for level in config.levels if level.name == first]
    if levels:
        option = rest
    part, _, name = option.partition(".")
    if option == "guidance":
        return [(level, option) for level in levels or config.levels]
    if part == "sampler" and name != "name":
        return [(level.sampler, name) for level in levels or config.levels if name in level.sampler]
    return [(config.hierarchy, name)] if part == "hierarchy" and name in HIERARCHY and not levels else []


def set_option(config: Config, option: str, value: Any, levels: Sequence[Level]) -> None:
    """Sets an option of the config; `levels` says which levels a single guidance is for."""
    found = option_places(config, option)
    values = [value] * len(found)
    if option == "guidance" and isinstance(value, (tuple, list)):
        if len(value) != len(found):
            raise ValueError(f"config.evaluate.sweep: guidance {value} is for {len(value)} of {len(found)} levels")
        values = value
    elif option == "guidance":
        values = [value if can_be_guided(level) else 0.0 for level in levels]
    for (place, key), one in zip(found, values, strict=True):
        kind = float if key in ("guidance", "noise_gamma") else type(place[key])
        with place.ignore_type():
            place[key] = check_value(option, one, kind)


def can_be_guided(level: Level) -> bool:
    """Whether guidance has a condition to leave out: one that can be absent."""
    return bool(
        level.num_classes or level.null_text is not None or (level.conditions and level.condition_noise is None)
    )


def check_value(option: str, value: Any, kind: type) -> Any:
    """The value as a `kind`. Raises ValueError for a value of another type."""
    if option == "hierarchy.noise_gamma" and value == "inf":
        return math.inf
    allowed = (int, float) if kind is float else kind
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, allowed):
        raise ValueError(f"config.evaluate.sweep: {value!r} given for {option}, expected {kind.__name__}; {CHOICES}")
    return kind(value)


def config_fingerprint(config: Config) -> str:
    """12 hexadecimal digits of the whole config, but for what asks for more rows: evaluate.sweep and search."""
    kept = to_plain(config)
    kept = {**kept, "evaluate": {**kept["evaluate"], "sweep": []}, "search": {}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def read_rows(path: str) -> list[dict]:
    """The rows of an earlier sweep.json or search.json; [] if there is no file. Only process 0 reads them."""
    if jax.process_index() or not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a table of this version ({error}); move it away to start anew") from error


def write_rows(path: str, rows: Sequence[dict], **others: Any) -> None:
    """Process 0 writes the rows, and beside them what belongs to all of them."""
    if jax.process_index() == 0:
        atomic_write(path, json.dumps({**others, "rows": rows}, indent=2) + "\n")


def score_combinations(
    config: Config,
    generator: Generator,
    params: Tree,
    todo: Sequence[Combination],
    score: Callable[[Generator, Tree, int], Score],
    step: int,
    workdir: str,
    weights: str = "",
) -> list[str]:
    """Scores the combinations and writes sweep.json, sweep.md and sweep.png to `workdir`; returns their paths.

    Args:
      config: the run's config, with config.evaluate.sweep.
      generator, params: the hierarchy, and its parameters of `step`.
      todo: the combinations, from build_combinations().
      score: (generator, params, step) -> Score.
      step: the step of the checkpoint; 0 for a weight file.
      workdir: the folder of the run, which may hold rows of an earlier call.
      weights: the identity of a weight file, as in Score; '' for a checkpoint.
    """
    paths = [os.path.join(workdir, f"sweep.{kind}") for kind in ("json", "md", "png")]
    known = {row["config"]: row for row in read_rows(paths[0]) if (row["step"], row["weights"]) == (step, weights)}
    done = multihost_utils.broadcast_one_to_all(np.array([one.config in known for one in todo], np.int32))
    rows: dict[int, dict] = {i: known[one.config] for i, one in enumerate(todo) if one.config in known}
    before = int(done.sum())
    if before:
        logging.info("sweep: %d of %d rows taken from %s, made of this step and config", before, len(todo), paths[0])
    progress = Progress("sweep", len(todo), before, interval=0.0)
    for made, i in enumerate(np.flatnonzero(done == 0).tolist(), before + 1):
        result = score(generator.with_levels(todo[i].levels), params, step)
        rows[i] = {"config": todo[i].config, **dataclasses.asdict(result)}
        write_rows(paths[0], [row_with_values(todo[j], rows[j]) for j in sorted(rows)])
        progress.update(made, f"{format_values(todo[i].values)}: FD-EffLite0 {result.fd:.2f}")
    if jax.process_index() == 0:
        table = [rows[i] for i in range(len(todo))]
        write_rows(paths[0], [row_with_values(one, row) for one, row in zip(todo, table, strict=True)])
        atomic_write(paths[1], format_table(todo, table))
        plot_scores(config, table, paths[2])
    return paths


def row_with_values(one: Combination, row: dict) -> dict:
    """A row of sweep.json, with the values as they were asked for."""
    return {**row, "values": {option: "inf" if value == math.inf else value for option, value in one.values.items()}}


def format_value(value: Any) -> str:
    """0.5 -> '0.5', (0.0, 0.5) -> '(0, 0.5)'."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(format_value(one) for one in value)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_values(values: dict[str, Any]) -> str:
    """'guidance 0.5, sampler.steps 10'."""
    return ", ".join(f"{option} {format_value(value)}" for option, value in values.items())


def format_table(todo: Sequence[Combination], rows: Sequence[dict]) -> str:
    """The Markdown table, a column per option."""
    options = list(todo[0].values)
    scored = [score for score in SCORES if all(row[score.key] is not None for row in rows)]
    heads = [*options, *(score.title for score in scored)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one, row in zip(todo, rows, strict=True):
        cells = [format_value(value) for value in one.values.values()]
        cells += [f"{row[score.key]:.{score.digits}f}" for score in scored]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_scores(config: Config, rows: Sequence[dict], path: str) -> None:
    """The option with the most values along x, a curve per combination of the others; a panel for each score, and with
    CLIP scores one of FD against them (Matryoshka, Fig. 8)."""
    pairs = sweep_pairs(config)
    axis = max(range(len(pairs)), key=lambda i: len(pairs[i][1]))
    option, x = pairs.pop(axis)
    panels = {}
    others = itertools.product(*(values for _, values in pairs))
    names = [format_values(dict(zip((name for name, _ in pairs), values, strict=True))) for values in others]
    for score in SCORES:
        if all(row[score.key] is not None for row in rows):
            scores = np.reshape([row[score.key] for row in rows], [len(values) for _, values in sweep_pairs(config)])
            lines = np.moveaxis(scores, axis, -1).reshape(-1, len(x))
            panels[score.title] = dict(zip(names, lines, strict=True))
    against = ("CLIP score", "FD-EffLite0") if "CLIP score" in panels else ()
    curves.score_curves(
        [v if isinstance(v, (int, float)) else format_value(v) for v in x], panels, option, path, against
    )
