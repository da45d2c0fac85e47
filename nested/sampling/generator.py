"""Sampling: batches of whole hierarchies, and the pictures people look at.

Sample i is a function of (config.seed, i): its keys are fold_in(seed, i) and its label is i modulo the number of
classes, whatever the batch size, the number of devices and of hosts.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nested.build import data as build_data
from nested.diffusion import conditioning, hierarchy
from nested.diffusion.level import Level, fold_rows
from nested.runtime import partition
from nested.runtime.writers import Progress
from nested.sampling.requests import sample_keys, sample_labels

Tree = Any


class Programs:
    """Compiled programs by what they compute: levels of equal shapes, networks and samplers share one, and so does a
    level whose options a sweep leaves alone. Equal is the text of the lowered program: parameters are arguments."""

    def __init__(self):
        self._compiled = {}

    def __len__(self):
        return len(self._compiled)

    def program(self, function: Callable, *arguments, out_shardings):
        """`function` compiled for these arguments (arrays in trees, always of the same shapes and shardings)."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = []

        def flat(*leaves):  # without the names of levels, which are those of parameters and conditions too
            results, shape = jax.tree.flatten(function(*structure.unflatten(leaves)))
            shapes.append(shape)
            return results

        # keep_unused: what a function reads of its arguments is a part of its text then
        lowered = jax.jit(flat, out_shardings=out_shardings, keep_unused=True).lower(*leaves)
        key = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if key not in self._compiled:
            self._compiled[key] = lowered.compile()
        compiled = self._compiled[key]
        return lambda *arguments: shapes[0].unflatten(compiled(*jax.tree.leaves(arguments)))


@dataclasses.dataclass(frozen=True)
class Generator:
    """A hierarchy ready to draw images. Rows are split over the mesh inside and whole on every host outside. One shape,
    config.sample.batch_size, is compiled for all uses, a program per level in `programs`.

    draw_variables: (params, {level: sample indices [B]}, context, {level: fixed variable}) -> {level: variable}; fixed
    variables are taken as they are, all other levels are sampled.
    decode: the finest level's variable -> uint8 images [B, H, W, C], or clips [B, T, H, W, C].
    text, prompts: the encoder of the prompts, which the samples have in turn; None and () where no level sees text."""

    config: Any
    levels: tuple[Level, ...]
    latents: Any
    mesh: Any
    draw_variables: Callable
    decode: Callable
    text: Any = None
    prompts: tuple[str, ...] = ()
    programs: Programs = dataclasses.field(default_factory=Programs)

    def draw(self, params: Tree, indices: Mapping[str, Sequence[int]], context: Mapping[str, Any]) -> np.ndarray:
        """The images or clips with these indices, {level: [B]}."""
        return self.decode(self.draw_variables(params, indices, context, {})[self.levels[-1].name])

    def context(
        self, indices: Sequence[int], labels: Sequence[int] | None = None, prompts: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The label, and the text, of the samples with these indices: those given, else the classes and the prompts in
        turn.

        Raises ValueError for a label that is no class, and for prompts that no level sees."""
        classes = self.config.data.num_classes
        if labels is None:
            labels = sample_labels(classes, indices)
        elif not classes:
            raise ValueError("labels given, but this hierarchy has no classes")
        elif wrong := [int(label) for label in labels if not 0 <= label < classes]:
            raise ValueError(f"label {wrong[0]} given; the classes are 0 to {classes - 1}")
        context = {"label": np.asarray(labels, np.int32)}
        if self.text is None:
            if prompts is not None:
                raise ValueError("prompts given, but this hierarchy takes no text")
            return context
        if prompts is None:
            prompts = [self.prompts[int(i) % len(self.prompts)] for i in indices]
        return context | self.text.encode(prompts)

    def batches(self, params: Tree, number: int, what: str) -> Iterator[np.ndarray]:
        """Images of samples 0 .. number - 1, uint8 [<= config.sample.batch_size, H, W, C] at a time, with a progress
        line that names `what`."""
        size, progress = self.config.sample.batch_size, Progress(what, number)
        for start in range(0, number, size):
            indices = np.arange(start, start + size)
            of_level = dict.fromkeys((level.name for level in self.levels), indices)
            yield np.asarray(self.draw(params, of_level, self.context(indices)))[: number - start]
            progress.update(min(start + size, number))

    def images(self, params: Tree, number: int, what: str) -> np.ndarray:
        """All of `batches`, [number, H, W, C]."""
        return np.concatenate(list(self.batches(params, number, what)))

    def cascade(self, params: Tree, firsts: Sequence[int], number: int = 8) -> list[tuple[str, np.ndarray]]:
        """Rows of the paper's Figure 1: for each sample of `firsts`, itself and number - 1 others that share its label
        and, row by row, none of its levels, its coarsest, its two coarsest ...: [(caption, uint8 [number, H, W, C])].

        The first column is the same sample in every row. Sharing a level is sharing its key."""
        names = [level.name for level in self.levels]
        captions, indices, labels = [], {name: [] for name in names}, []
        for first in firsts:
            others = [first, *range(10**6 * (first + 1), 10**6 * (first + 1) + number - 1)]
            for kept in range(len(names)):
                captions.append(f"{', '.join(names[:kept])} fixed" if kept else "all levels resampled")
                labels += [first] * number
                for i, name in enumerate(names):
                    indices[name] += [first] * number if i < kept else others
        rows, size = [], self.config.sample.batch_size
        for start in range(0, len(labels), size):
            take = np.arange(start, start + size) % len(labels)
            of_level = {name: np.asarray(indices[name])[take] for name in names}
            rows.append(np.asarray(self.draw(params, of_level, self.context(np.asarray(labels)[take]))))
        images = np.concatenate(rows)[: len(labels)]
        return list(zip(captions, images.reshape(len(captions), number, *images.shape[1:]), strict=True))

    def with_guidance(self, weights: Sequence[float]) -> "Generator":
        """The same hierarchy with other guidance weights, coarse to fine; with none at all, conditions are shown clean
        (CVPR Sec. 4.2: generated conditions are noised where guidance is on)."""
        gamma = {} if any(weights) else {"noise_gamma": math.inf}
        return self.with_levels(
            [dataclasses.replace(level, guidance=w, **gamma) for level, w in zip(self.levels, weights, strict=True)]
        )

    def with_levels(self, levels: Sequence[Level]) -> "Generator":
        """The same with levels that are sampled differently; programs that stay the same are not compiled again."""
        return make_generator(self.config, levels, self.latents, self.mesh, self.text, self.prompts, self.programs)

    def with_seed(self, seed: int) -> "Generator":
        """The same with other samples."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        return make_generator(config, self.levels, self.latents, self.mesh, self.text, self.prompts, self.programs)

    def steps(self, params: Tree, index: int, number: int) -> list[tuple[np.ndarray, ...]]:
        """What the finest level makes of sample `index` at `number` of its evaluations, evenly spaced, the first and
        the last among them: for each, uint8 images (of clips the first frame) of every resolution, coarse to fine."""
        finest = self.levels[-1]
        evaluations = finest.sampler.nfe(finest.process)
        shown = tuple(int(k) for k in np.linspace(0, evaluations - 1, min(number, evaluations)).round())

        def draw(params, codec_params, context):
            keys = {level.name: sample_keys(self.config.seed, [index]) for level in self.levels}
            variables = hierarchy.sample(self.levels[:-1], params, keys, context)
            cond = conditioning.conditions(finest, variables, context)
            keys = fold_rows(keys[finest.name], len(self.levels) - 1)
            _, estimates = hierarchy.sample_level(finest, params[finest.name], cond, keys, shown)
            return self.latents.resolutions(jax.tree.map(lambda leaf: leaf[:, 0], estimates), codec_params)

        whole, arguments = partition.replicated(self.mesh), (params, self.latents.params, self.context([index]))
        resolutions = jax.jit(draw, out_shardings=whole)(*arguments)
        stills = [np.asarray(leaf[:, 0] if leaf.ndim == 5 else leaf) for leaf in resolutions]
        return [tuple(leaf[k] for leaf in stills) for k in range(len(shown))]


def make_generator(
    config, levels: Sequence[Level], latents, mesh, text=None, prompts=(), programs: Programs | None = None
) -> Generator:
    """A Generator for these levels; `latents` decodes the finest level's variable, `text` (build_data.Text) encodes
    prompts: those given, or config.sample.prompts, or the data's captions. programs: where compiled ones may be found.

    Raises ValueError where config.sample.batch_size does not divide by the devices of the mesh."""
    if config.sample.batch_size % mesh.size:
        raise ValueError(
            f"config.sample.batch_size {config.sample.batch_size} does not divide by {mesh.size} devices; "
            f"use a multiple of {mesh.size}"
        )

    if text is not None:
        null = text.encode_one(config.sample.negative_prompt)
        levels = [level if level.null_text is None else dataclasses.replace(level, null_text=null) for level in levels]

    if text is not None and not prompts:
        prompts = tuple(config.sample.prompts) or build_data.some_captions(config, config.sample.num_samples)
    programs = Programs() if programs is None else programs
    if latents.params:
        latents = latents.with_params(jax.device_put(latents.params, partition.replicated(mesh)))
    draw_variables, decode = make_draw(config.seed, tuple(levels), latents, mesh, programs)
    return Generator(config, tuple(levels), latents, mesh, draw_variables, decode, text, prompts, programs)


def make_draw(seed: int, levels: tuple[Level, ...], latents, mesh, programs: Programs) -> tuple[Callable, Callable]:
    """Generator.draw_variables and Generator.decode: what hierarchy.sample does, a program per level, and one that
    decodes."""
    split, whole = partition.batch_sharding(mesh), partition.replicated(mesh)
    ready = {}

    def run(name, function, *arguments, out_shardings):
        if name not in ready:
            ready[name] = programs.program(function, *arguments, out_shardings=out_shardings)
        return ready[name](*arguments)

    @functools.partial(jax.jit, out_shardings=split)
    def prepare(indices, context, fixed):
        keys = {level.name: fold_rows(sample_keys(seed, indices[level.name]), i) for i, level in enumerate(levels)}
        return keys, context, fixed

    def draw_variables(params, indices, context, fixed):
        keys, context, variables = prepare(indices, context, dict(fixed))
        for level in levels:
            if level.name in variables:
                continue

            def sample_level(params, seen, context, keys, level=level):
                return hierarchy.sample_level(level, params, conditioning.conditions(level, seen, context), keys)

            seen = {name: variables[name] for name in level.conditions}
            arguments = (params[level.name], seen, context, keys[level.name])
            variables[level.name] = run(level.name, sample_level, *arguments, out_shardings=split)
        return variables

    @functools.partial(jax.jit, static_argnames="rows", out_shardings=split)
    def part(z, start, rows):
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, rows), z)

    def decode(z):
        images = []
        for at in latents.slices(len(jax.tree.leaves(z)[0]), mesh.size):
            rows = part(z, at.start, at.stop - at.start)
            images.append(run("", latents.decode, rows, latents.params, out_shardings=whole))
        return np.concatenate([np.asarray(some) for some in images])

    return draw_variables, decode
