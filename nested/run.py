"""A trained hierarchy in Python: sample from it, encode images into its levels and back, evaluate its denoisers.

    import nested

    run = nested.open_run("runs/quickstart")
    images = run.sample(16)  # uint8 [16, H, W, C], the first samples of the run
    variables = run.encode(images)  # {"z1x1": [16, 1, 1, C], ...}, a variable per level
    relatives = run.sample(fixed={"z1x1": variables["z1x1"]})  # other images with the same coarsest level

Sample i is a function of the seed, i, and its label or prompt: run.sample(16) gives the first sixteen images of
main.py --mode=sample.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from input_pipeline.in_memory import ImagesInMemory
from input_pipeline.latent_records import read_index
from nested.build.data import build_data
from nested.build.options import Config, from_plain
from nested.build.saved import upgrade_saved_config
from nested.diffusion.conditioning import conditions, null_cond
from nested.diffusion.denoiser import denoiser
from nested.diffusion.guidance import guided
from nested.diffusion.hierarchy import apply_network
from nested.diffusion.level import Level, is_shape, map_shape
from nested.latents.job import load_parts
from nested.latents.passes import encode_images
from nested.latents.store import latents_of_images, read_latents
from nested.modes import sample
from nested.modes.encode import encoding_job
from nested.runtime.checkpoint import read_config
from nested.sampling.generator import Generator
from nested.spaces.space import IMAGE
from nested.spaces.svd import Basis
from nested.weights import exchange, files

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The levels of a run and their weights, as open_run() and open_weights() return them.

    Images are uint8 [N, H, W, C] and clips uint8 [N, T, H, W, C]. A level's variable is float32 [N, h, w, c], with the
    frames after N for clips, or a tuple of such arrays where a level diffuses several resolutions together. `variables`
    is a dict {level name: variable}.

    Attributes:
        workdir: the folder of the run, with its encoded data.
        step: after how many training steps the weights were saved; 0 for a weight file.
        config: the config of the run.
        params: {level name: parameters}, the exponential moving average.
        generator: the sampler of the hierarchy.
    """

    workdir: str
    step: int
    config: Config = dataclasses.field(repr=False)
    params: Mapping[str, Tree] = dataclasses.field(repr=False)
    generator: Generator = dataclasses.field(repr=False)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels, coarse to fine."""
        return self.generator.levels

    def sample(
        self,
        number: int | None = None,
        *,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        seed: int | None = None,
        guidance: float | Sequence[float] | Mapping[str, float] | None = None,
        fixed: Mapping[str, Tree] | None = None,
    ) -> np.ndarray:
        """Samples images.

        Args:
            number: how many images. Leave it out if labels, prompts or fixed variables say it.
            labels: a class per image. By default sample i has class i modulo the number of classes.
            prompts: a text per image. By default the config's prompts take turns.
            seed: in place of the run's seed.
            guidance: weights of classifier-free guidance in place of the run's: a number for all levels, one per level
                from coarse to fine, or {level name: weight} for some. 0 turns guidance off.
            fixed: variables of levels that are taken as they are instead of being sampled.

        Returns:
            The images or clips.
        """
        return self.decode(
            self.sample_variables(number, labels=labels, prompts=prompts, seed=seed, guidance=guidance, fixed=fixed)
        )

    def sample_variables(
        self,
        number: int | None = None,
        *,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        seed: int | None = None,
        guidance: float | Sequence[float] | Mapping[str, float] | None = None,
        fixed: Mapping[str, Tree] | None = None,
    ) -> dict[str, Tree]:
        """Samples every level: the variables that `sample` decodes. Takes the arguments of `sample`."""
        fixed = {name: self._check_variable(name, variable) for name, variable in (fixed or {}).items()}
        number = _number_of_rows(number, labels, prompts, fixed)
        generator = self._with(seed, guidance)
        size, parts = generator.batch_size, []
        for start in range(0, number, size):
            indices = np.arange(start, start + size)
            rows = np.minimum(indices, number - 1)  # the last batch is filled up: one shape is compiled
            context = generator.context(
                indices,
                None if labels is None else [int(labels[row]) for row in rows],
                None if prompts is None else [prompts[int(row)] for row in rows],
            )
            of_level = {level.name: indices for level in self.levels}
            parts.append(generator.draw_variables(self.params, of_level, context, _take(fixed, rows)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:number], *parts)

    def encode(self, images: ArrayLike) -> dict[str, Tree]:
        """The variable of every level, coarse to fine: what training sees of these images, without noise.

        Args:
            images: uint8 images [N, H, W, C] or clips [N, T, H, W, C], of the size that the run was trained on. For a
                hierarchy with encoded levels the run's frozen encoder sees them, and the statistics of its encoded data
                bring them to each level's scale.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim not in (4, 5) or not len(images):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}: expected uint8 [N, H, W, C], or clips [N, T, H, W, C]"
            )
        data = build_data(self.config)
        if not data.needs_encoding:
            latents, records = latents_of_images(data.levels, images.shape[1:]), {IMAGE: images}
        else:
            directory = data.latents_dir(self.workdir)
            latents, expected = read_latents(directory, data.levels), read_index(directory)["image_shape"]
            if list(images.shape[1:]) != expected:
                raise ValueError(f"images are {list(images.shape)}: this run encodes [N, {str(expected)[1:]}")
            source = ImagesInMemory(images, np.zeros(len(images), np.int32), 0, (), "images to encode")
            job = encoding_job(data, directory, source)
            records = encode_images(job, load_parts(job.statistics_path, Basis, "basis/"))
        variables = jax.tree.map(np.asarray, jax.jit(latents.variables)(records, None))
        return {level.name: variables[level.name] for level in self.levels}

    def decode(self, variables: Mapping[str, Tree]) -> np.ndarray:
        """The images or clips of a hierarchy's variables, of which only the finest level's is used."""
        finest = self.levels[-1].name
        if finest not in variables:
            raise ValueError(f"variables of {', '.join(variables)} given: images are decoded from the level {finest}")
        variable = self._check_variable(finest, variables[finest])
        number, size, images = _rows(variable), self.generator.batch_size, []
        for start in range(0, number, size):
            rows = np.minimum(np.arange(start, start + size), number - 1)
            images.append(self.generator.decode(_take(variable, rows)))
        return np.concatenate(images)[:number]

    def denoise(
        self,
        level: str,
        x_t: Tree,
        t: ArrayLike,
        *,
        variables: Mapping[str, Tree] | None = None,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        guidance: float = 0.0,
    ) -> Tree:
        """Evaluates a level's denoiser: its estimate of the clean variable.

        Args:
            level: the name of the level.
            x_t: the noisy variable, with all its rows. A level with signal_scales is diffused, and estimated, divided
                by them.
            t: the time of each row, or of all rows: 0 is clean and 1 is noise.
            variables: the coarser variables that the level sees, shown to it as they are: add the noise that it is used
                to (Level.cond_sigmas). A variable, label or prompt that is left out is dropped as training drops it.
            labels: a class per row. prompts: a text per row.
            guidance: the weight of classifier-free guidance.

        Returns:
            The estimate of x_0, a tree like x_t.
        """
        chosen = {one.name: one for one in self.levels}
        if level not in chosen:
            raise ValueError(f"level {level!r} given; choose from {', '.join(chosen)}")
        x_t = self._check_variable(level, x_t)
        number = _rows(x_t)
        given = {name: self._check_variable(name, variable) for name, variable in (variables or {}).items()}
        _number_of_rows(number, labels, prompts, given)
        cond = self._conditions(chosen[level], number, given, labels, prompts)
        times = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (number,))
        estimate = _denoise(chosen[level], float(guidance), self.params[level], x_t, times, cond)
        return jax.tree.map(np.asarray, estimate)

    def _conditions(self, level: Level, number: int, given: Mapping[str, Tree], labels, prompts) -> dict[str, Any]:
        """What the level is conditioned on, with the null condition in place of what is not given."""
        shapes = {one.name: one.shape for one in self.levels}
        if level.condition_noise is not None and (missing := [name for name in level.conditions if name not in given]):
            raise ValueError(f"level {level.name} always sees {', '.join(missing)}: give it in `variables`")
        blank = {name: map_shape(lambda shape: jnp.zeros((number, *shape)), shapes[name]) for name in level.conditions}
        context = self.generator.context([0] * number, labels, prompts)
        cond = conditions(level, {**blank, **given}, context)
        if level.condition_noise is not None:
            cond |= {f"noise_step_{name}": jnp.zeros(number) for name in level.conditions}
        null = null_cond(level, cond)
        absent = {f"keep_{name}" for name in level.conditions if name not in given}
        absent |= {"label"} if labels is None else set()
        absent |= {"text", "text_mask"} if prompts is None else set()
        return {name: null[name] if name in absent else value for name, value in cond.items()}

    def _with(self, seed: int | None, guidance: float | Sequence[float] | Mapping[str, float] | None) -> Generator:
        """The generator with another seed and other guidance weights."""
        generator = self.generator
        if guidance is not None:
            names = [level.name for level in self.levels]
            weights = {level.name: level.guidance for level in self.levels}
            if isinstance(guidance, Mapping):
                if unknown := set(guidance) - set(names):
                    raise ValueError(f"guidance for {', '.join(sorted(unknown))}: the levels are {', '.join(names)}")
                weights |= guidance
            else:
                each = [guidance] * len(names) if isinstance(guidance, (int, float)) else list(guidance)
                if len(each) != len(names):
                    raise ValueError(f"{len(each)} guidance weights given: the levels are {', '.join(names)}")
                weights = dict(zip(names, each, strict=True))
            generator = generator.with_guidance([float(weights[name]) for name in names])
        return generator if seed is None else generator.with_seed(seed)

    def _check_variable(self, name: str, variable: Tree) -> Tree:
        """The variable as float32 arrays; ValueError if there is no such level, or if the shape is not the level's."""
        shapes = {level.name: level.shape for level in self.levels}
        if name not in shapes:
            raise ValueError(f"variable of {name!r} given; the levels are {', '.join(shapes)}")
        joint = not is_shape(shapes[name])
        arrays = tuple(np.asarray(leaf, np.float32) for leaf in (variable if joint else (variable,)))
        expected = shapes[name] if joint else (shapes[name],)
        if [array.shape[1:] for array in arrays] != list(expected) or len({len(array) for array in arrays}) != 1:
            found = ", ".join(str(list(array.shape)) for array in arrays)
            wanted = ", ".join(f"[N, {', '.join(map(str, shape))}]" for shape in expected)
            raise ValueError(f"the variable of {name} is {found}: expected {wanted}")
        return arrays if joint else arrays[0]


def _number_of_rows(
    number: int | None,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    variables: Mapping[str, Tree],
) -> int:
    """How many samples the arguments agree on."""
    given = {"number": number}
    given["labels"] = None if labels is None else len(labels)
    given["prompts"] = None if prompts is None else len(prompts)
    given |= {name: _rows(variable) for name, variable in variables.items()}
    counts = {name: count for name, count in given.items() if count is not None}
    if not counts:
        raise ValueError("say how many samples to draw: give number, labels, prompts or fixed variables")
    if len(set(counts.values())) > 1 or min(counts.values()) < 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"the numbers of samples must agree and be at least 1; found {found}")
    return next(iter(counts.values()))


def _rows(variable: Tree) -> int:
    return len(jax.tree.leaves(variable)[0])


def _take(variable: Tree, rows: np.ndarray) -> Tree:
    return jax.tree.map(lambda leaf: leaf[rows], variable)


def open_run(workdir: str | os.PathLike[str]) -> Run:
    """Opens the run in a folder: its config, and the averaged weights of its newest checkpoint that is whole.

    Raises:
        FileNotFoundError: if the folder holds no run, or no checkpoint.
    """
    workdir = os.path.abspath(os.path.expanduser(workdir))
    config = from_plain(upgrade_saved_config(read_config(workdir)))
    generator, params, step = sample.restore_generator(config, workdir)
    return Run(workdir, step, config, params, generator)


def open_weights(
    path: str | os.PathLike[str], config: Config | None = None, workdir: str | os.PathLike[str] = ""
) -> Run:
    """Opens a weight file: one that --mode=export wrote, or one that authors released.

    Args:
        path: the file, or a folder of several.
        config: the config of its networks, such as configs.uvit_release.get_config("imagenet256_huge"). A file that
            --mode=export wrote carries its own.
        workdir: a folder with the run's encoded data; not needed where pixels or an autoencoder's latents are sampled.
    """
    path = os.path.expanduser(os.fspath(path))
    if config is None:
        config = _config_of_weights(path)
    workdir = os.path.abspath(os.path.expanduser(workdir))
    generator, params, step = sample.open_generator(config, workdir, path)
    return Run(workdir, step, config, params, generator)


def _config_of_weights(path: str) -> Config:
    """The config that --mode=export wrote into a weight file."""
    first = files.find_weight_files(path)[0]
    notes = files.read_metadata(first) if first.endswith(exchange.SUFFIX) else {}
    if exchange.CONFIG not in notes:
        raise ValueError(f"{path}: carries no config; give the config of its networks")
    return from_plain(upgrade_saved_config(json.loads(notes[exchange.CONFIG])))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _denoise(level: Level, guidance: float, params: Tree, x_t: Tree, t: jax.Array, cond: dict[str, Any]) -> Tree:
    denoise = denoiser(apply_network(level, params, train=False), level.process)
    denoise = guided(denoise, lambda some: null_cond(level, some), guidance)
    return denoise(x_t, t, cond)
