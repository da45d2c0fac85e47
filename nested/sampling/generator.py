"""Sampling: whole hierarchies in batches of one size, coarse to fine, a compiled program per level.

Sample i is a function of (seed, i): its keys are fold_in(seed, i), its label is i modulo the number of classes and its
prompt the i-th in turn (requests.py), whatever the batch size, the number of devices and of hosts.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from nested.diffusion import conditioning, hierarchy
from nested.diffusion.level import Level, fold_rows
from nested.runtime import partition
from nested.runtime.writers import Progress
from nested.sampling.requests import Indices, PromptEncoder, choose_labels, choose_prompts, sample_keys

Tree = Any


class Decoder(Protocol):
    """What sampling asks of the latents of a run: the way from the finest level's variable to images."""

    @property
    def params(self) -> Tree:
        """Parameters of the decoder, an argument of compiled programs; {} if it has none."""
        ...

    def with_params(self, params: Tree) -> "Decoder":
        """The same decoder with its parameters somewhere else, such as on the devices of a mesh."""
        ...

    def decode(self, z: Tree, params: Tree = None) -> jax.Array:
        """The finest level's variable [B, ...] -> uint8 images [B, H, W, C], or clips [B, T, H, W, C]."""
        ...

    def resolutions(self, z: Tree, params: Tree = None) -> tuple[jax.Array, ...]:
        """As decode(), every resolution of the variable, coarse to fine."""
        ...

    def slices(self, rows: int, devices: int) -> Sequence[slice]:
        """The equal slices of `rows` rows that are decoded one after the other."""
        ...


class Programs:
    """Compiled programs, found by what they compute.

    Two levels of equal shapes, networks and samplers share one program, and a level whose options a sweep leaves alone
    keeps its own. Programs are equal if the text of their lowered form is; parameters are arguments of it.
    """

    def __init__(self) -> None:
        self._compiled: dict[str, Callable[..., Any]] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def program(self, function: Callable[..., Tree], *arguments: Tree, out_shardings: Any) -> Callable[..., Tree]:
        """`function` compiled for these arguments: trees of arrays, always of the same shapes and shardings."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = []

        def flat(*leaves: jax.Array) -> list[jax.Array]:  # without names of levels, which differ between equal levels
            results, shape = jax.tree.flatten(function(*structure.unflatten(leaves)))
            shapes.append(shape)
            return results

        # keep_unused: which of its arguments a function reads is then a part of its text
        lowered = jax.jit(flat, out_shardings=out_shardings, keep_unused=True).lower(*leaves)
        key = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if key not in self._compiled:
            self._compiled[key] = lowered.compile()
        compiled = self._compiled[key]
        return lambda *arguments: shapes[0].unflatten(compiled(*jax.tree.leaves(arguments)))


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A hierarchy that is ready to draw images. Inside, rows are split over the mesh; outside, every host has them all.

    Attributes:
      levels: the hierarchy, coarse to fine.
      latents: decodes the finest level's variable.
      mesh: the devices.
      seed: of the samples.
      batch_size: the one number of rows that is compiled, for all uses.
      num_classes: labels are 0 ... num_classes - 1; 0 for no labels.
      draw_variables: (params, {level: sample indices [B]}, context, {level: fixed variable}) -> {level: variable}.
        Fixed variables are taken as they are, all other levels are sampled.
      decode: the finest level's variable -> uint8 images [B, H, W, C], or clips [B, T, H, W, C].
      text, prompts: the encoder of the prompts, which the samples take in turn; None and () if no level sees text.
      programs: the compiled programs.
    """

    levels: tuple[Level, ...]
    latents: Decoder
    mesh: jax.sharding.Mesh
    seed: int
    batch_size: int
    num_classes: int
    draw_variables: Callable[..., dict[str, Tree]]
    decode: Callable[[Tree], np.ndarray]
    text: PromptEncoder | None = None
    prompts: tuple[str, ...] = ()
    programs: Programs = dataclasses.field(default_factory=Programs)

    def draw(self, params: Tree, indices: Mapping[str, Indices], context: Mapping[str, Any]) -> np.ndarray:
        """The images or clips with these indices, {level: [B]}."""
        return self.decode(self.draw_variables(params, indices, context, {})[self.levels[-1].name])

    def context(
        self, indices: Indices, labels: Sequence[int] | None = None, prompts: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The labels, and the features of the prompts, of the samples with these indices.

        Args:
          indices: numbers of samples [B].
          labels: one per sample; None for the classes in turn.
          prompts: one per sample; None for `self.prompts` in turn.

        Raises:
          ValueError: a label that is not a class, or labels or prompts that no level sees.
        """
        context = {"label": choose_labels(self.num_classes, indices, labels)}
        if self.text is None:
            if prompts is not None:
                raise ValueError("prompts given, but no level of this hierarchy sees text; leave them out")
            return context
        return context | self.text.encode(choose_prompts(self.prompts, indices) if prompts is None else prompts)

    def batches(self, params: Tree, number: int, what: str) -> Iterator[np.ndarray]:
        """Yields the images of samples 0 ... number - 1, at most `batch_size` at a time, uint8 [B, H, W, C].

        what: names the samples in the progress line.
        """
        size, progress = self.batch_size, Progress(what, number)
        for start in range(0, number, size):
            indices = np.arange(start, start + size)
            of_level = dict.fromkeys((level.name for level in self.levels), indices)
            yield np.asarray(self.draw(params, of_level, self.context(indices)))[: number - start]
            progress.update(min(start + size, number))

    def images(self, params: Tree, number: int, what: str) -> np.ndarray:
        """All of `batches`, [number, H, W, C]."""
        return np.concatenate(list(self.batches(params, number, what)))

    def cascade(self, params: Tree, firsts: Sequence[int], number: int = 8) -> list[tuple[str, np.ndarray]]:
        """Rows of Figure 1 of Nested Diffusion (CVPR): what stays when the coarsest levels are fixed.

        For each sample of `firsts` there is a row in which all levels are drawn anew, one in which the coarsest level
        is that of the sample, one in which the two coarsest levels are, and so on. The first column of every row is the
        sample itself; all of a row have its label. To share a level is to share its key.

        Returns:
          [(caption, uint8 images [number, H, W, C])], a pair per row.
        """
        names = [level.name for level in self.levels]
        captions: list[str] = []
        indices: dict[str, list[int]] = {name: [] for name in names}
        labels: list[int] = []
        for first in firsts:
            others = [first, *range(10**6 * (first + 1), 10**6 * (first + 1) + number - 1)]
            for kept in range(len(names)):
                captions.append(f"{', '.join(names[:kept])} fixed" if kept else "all levels resampled")
                labels += [first] * number
                for i, name in enumerate(names):
                    indices[name] += [first] * number if i < kept else others
        rows = []
        for start in range(0, len(labels), self.batch_size):
            take = np.arange(start, start + self.batch_size) % len(labels)
            of_level = {name: np.asarray(indices[name])[take] for name in names}
            rows.append(np.asarray(self.draw(params, of_level, self.context(np.asarray(labels)[take]))))
        images = np.concatenate(rows)[: len(labels)]
        return list(zip(captions, images.reshape(len(captions), number, *images.shape[1:]), strict=True))

    def with_guidance(self, weights: Sequence[float]) -> "Generator":
        """The same hierarchy with other guidance weights, coarse to fine.

        If all weights are 0, conditions are shown clean: generated conditions are noised only where guidance is on
        (CVPR Sec. 4.2).
        """
        gamma = {} if any(weights) else {"noise_gamma": math.inf}
        return self.with_levels(
            [dataclasses.replace(level, guidance=w, **gamma) for level, w in zip(self.levels, weights, strict=True)]
        )

    def with_levels(self, levels: Sequence[Level]) -> "Generator":
        """The same with levels that are sampled differently; programs that stay the same are not compiled again."""
        return self._replace(levels=tuple(levels))

    def with_seed(self, seed: int) -> "Generator":
        """The same with other samples."""
        return self._replace(seed=seed)

    def _replace(self, **changes: Any) -> "Generator":
        changed = dataclasses.replace(self, **changes)
        draw, decode = compile_draw(changed.seed, changed.levels, changed.latents, changed.mesh, changed.programs)
        return dataclasses.replace(changed, draw_variables=draw, decode=decode)

    def steps(self, params: Tree, index: int, number: int) -> list[tuple[np.ndarray, ...]]:
        """What the finest level makes of one sample at `number` of its network evaluations, evenly spaced.

        Args:
          params: {level: parameters}.
          index: number of the sample.
          number: how many evaluations to show; the first and the last are among them.

        Returns:
          For each of these evaluations, the estimate as uint8 images of every resolution, coarse to fine; of clips the
          first frame.
        """
        finest = self.levels[-1]
        evaluations = finest.sampler.nfe(finest.process)
        shown = tuple(int(k) for k in np.linspace(0, evaluations - 1, min(number, evaluations)).round())

        def draw(params, decoder_params, context):
            keys = {level.name: sample_keys(self.seed, [index]) for level in self.levels}
            variables = hierarchy.sample(self.levels[:-1], params, keys, context)
            cond = conditioning.conditions(finest, variables, context)
            rows = fold_rows(keys[finest.name], len(self.levels) - 1)
            _, estimates = hierarchy.sample_level(finest, params[finest.name], cond, rows, shown)
            return self.latents.resolutions(jax.tree.map(lambda leaf: leaf[:, 0], estimates), decoder_params)

        whole, arguments = partition.replicated(self.mesh), (params, self.latents.params, self.context([index]))
        resolutions = jax.jit(draw, out_shardings=whole)(*arguments)
        stills = [np.asarray(leaf[:, 0] if leaf.ndim == 5 else leaf) for leaf in resolutions]
        return [tuple(leaf[k] for leaf in stills) for k in range(len(shown))]


def make_generator(
    levels: Sequence[Level],
    latents: Decoder,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    batch_size: int,
    num_classes: int,
    text: PromptEncoder | None = None,
    prompts: Sequence[str] = (),
    negative_prompt: str = "",
) -> Generator:
    """A Generator for these levels.

    Args:
      levels: the hierarchy, coarse to fine.
      latents: decodes the finest level's variable.
      mesh: the devices.
      seed, batch_size, num_classes: see Generator.
      text: the encoder of prompts, None if no level sees text.
      prompts: what the samples show, in turn.
      negative_prompt: the text that guidance leads away from; '' is the empty caption of training.

    Raises:
      ValueError: batch_size does not divide by the number of devices.
    """
    if batch_size % mesh.size:
        raise ValueError(
            f"config.sample.batch_size {batch_size} does not divide by {mesh.size} devices; "
            f"use a multiple of {mesh.size}"
        )
    if text is not None:
        null = text.encode_one(negative_prompt)
        levels = [level if level.null_text is None else dataclasses.replace(level, null_text=null) for level in levels]
    if latents.params:
        latents = latents.with_params(jax.device_put(latents.params, partition.replicated(mesh)))
    levels, programs = tuple(levels), Programs()
    draw_variables, decode = compile_draw(seed, levels, latents, mesh, programs)
    return Generator(
        levels, latents, mesh, seed, batch_size, num_classes, draw_variables, decode, text, tuple(prompts), programs
    )


def compile_draw(
    seed: int, levels: tuple[Level, ...], latents: Decoder, mesh: jax.sharding.Mesh, programs: Programs
) -> tuple[Callable[..., dict[str, Tree]], Callable[[Tree], np.ndarray]]:
    """(Generator.draw_variables, Generator.decode): hierarchy.sample as a program per level, and one that decodes.

    Programs are compiled when they are first called.
    """
    split, whole = partition.batch_sharding(mesh), partition.replicated(mesh)
    ready: dict[str, Callable[..., Tree]] = {}

    def run(name: str, function: Callable[..., Tree], *arguments: Tree, out_shardings: Any) -> Tree:
        if name not in ready:
            ready[name] = programs.program(function, *arguments, out_shardings=out_shardings)
        return ready[name](*arguments)

    @functools.partial(jax.jit, out_shardings=split)
    def place(indices, context, fixed):
        keys = {level.name: fold_rows(sample_keys(seed, indices[level.name]), i) for i, level in enumerate(levels)}
        return keys, context, fixed

    def draw_variables(params, indices, context, fixed):
        keys, context, variables = place(indices, context, dict(fixed))
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
    def take_slice(z, start, rows):
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, rows), z)

    def decode(z):
        images = []
        for part in latents.slices(len(jax.tree.leaves(z)[0]), mesh.size):
            rows = take_slice(z, part.start, part.stop - part.start)
            images.append(run("", latents.decode, rows, latents.params, out_shardings=whole))
        return np.concatenate([np.asarray(some) for some in images])

    return draw_variables, decode
