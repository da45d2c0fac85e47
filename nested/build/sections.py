"""The sections of a config: what each holds, with defaults, comments and allowed values.

Most sections are one dataclass, which is declared beside the code that reads it, or here if a driver in nested/modes
does. In a section that chooses a part by name (config.data.source, ...) the options of all parts of that kind stand
side by side, so that the command line can set any of them; those that the chosen part does not read are refused.

configs/common.py makes its defaults of SECTIONS, and nested/build/reference.py the page that documents them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from input_pipeline.options import DataOptions
from nested.build import options
from nested.build.options import REQUIRED, Config, Option
from nested.build.parts import ENCODERS, SOURCES, SPACES
from nested.latents.job import EncodingOptions
from nested.training.optimizer import OptimizerConfig
from nested.training.options import TrainOptions


@dataclasses.dataclass(frozen=True)
class HierarchyOptions:
    """config.hierarchy: what the levels see of each other, and of labels and text."""

    preset: Annotated[str, "cvpr | iclr: the options must be that paper's (nested/build/presets.py); '': any"] = ""
    conditioning: Annotated[
        str, "the coarser levels that a level sees: all_higher (CVPR) | next_higher (Markovian)"
    ] = "all_higher"
    cond_drop: Annotated[float, "share of training rows that are shown no condition"] = 0.1
    drop_mode: Annotated[Literal["joint", "independent"], "conditions are dropped together | each alone"] = "joint"
    noise_gamma: Annotated[
        float, "in sampling finer levels see z + (t/T)^(gamma/2) sigma n (CVPR Sec. 4.2); infinity is no noise"
    ] = math.inf
    noise_scale: Annotated[
        Literal["variance", "std"], "the noise above is scaled by (t/T)^(gamma/2) | by (t/T)^gamma (Table 3's caption)"
    ] = "variance"
    noise_resample: Annotated[bool, "n is drawn at every evaluation, not once per sample"] = False
    cond_noise: Annotated[
        Literal["sigma", "diffused"],
        "finer levels see z + sigma n | z at a random step 0 ... 1000 of the level's own schedule, as in a cascade",
    ] = "sigma"
    cond_noise_step: Annotated[int, "with 'diffused': the step that samples are shown (Saharia et al., Imagen)"] = 0
    label_levels: Annotated[tuple[str, ...], "names of the levels that see the label; () is unconditional"] = ()
    text_levels: Annotated[tuple[str, ...], "names of the levels that see the text"] = ()


@dataclasses.dataclass(frozen=True)
class LevelOptions:
    """One entry of config.levels."""

    name: Annotated[str, "names the level's parameters, and the level in other options"]
    source: Annotated[
        str,
        "pixels | patch_pca | sd_vae | map | mapN (pooled to N x N before the SVD) | crops1 | crops2 | crops4 | "
        "codec | codecN (of the codec's latents)",
    ]
    shape: Annotated[
        tuple, "(h, w, c), of clips (frames, h, w, c), or a tuple of them, coarse to fine, that are diffused together"
    ]
    backbone: Annotated[dict, "name of the network and its options"]
    process: Annotated[dict, "schedule, what is predicted, the weights of the loss"]
    sampler: Annotated[dict, "name of the sampler and its options"]
    sigma: Annotated[float, "noise on the variable where it conditions a finer level (the paper's sigma_l)"] = 0.0
    standardize: Annotated[
        Literal["channel", "sample", "none"], "over the data set | over each image's own numbers (RCG) | not at all"
    ] = "channel"
    guidance: Annotated[float, "weight w of classifier-free guidance; 0: none"] = 0.0
    threshold: Annotated[str, "limit on x0 while sampling: none | static | dynamic | dynamic_100 | deepfloyd"] = "none"
    loss_weight: Annotated[float, "factor on the level's loss"] = 1.0
    leaf_weights: Annotated[tuple[float, ...], "weights of the resolutions' losses; (): 1 each"] = ()
    mixed: Annotated[
        tuple[int, ...], "(4, 2, 1): of every 4 training rows 2 have the second resolution and 1 the third; (): all"
    ] = ()


@dataclasses.dataclass(frozen=True)
class InitFromOptions:
    """config.init_from: the weights that training starts from."""

    path: Annotated[str, "--workdir of another run, or a weight file, whose levels are taken whole; '': none"] = ""
    phase: Annotated[str, "name of a phase of this run"] = ""
    levels: Annotated[tuple[str, ...], "levels to take; (): every one that fits, whole or as a part of a network"] = ()
    weights: Annotated[Literal["ema", "params"], "the averaged parameters | the trained ones"] = "ema"


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """config.sample: what --mode=sample, and the end of training, draw."""

    num_samples: Annotated[int, "samples of a grid"] = 64
    batch_size: Annotated[int, "samples drawn at a time"] = 64
    columns: Annotated[int, "columns of the grid"] = 8
    scale: Annotated[int, "factor that a picture is enlarged by"] = 1
    prompts: Annotated[tuple[str, ...], "captions of the samples, in turn; (): the data's"] = ()
    negative_prompt: Annotated[str, "what guidance leads away from"] = ""
    steps_shown: Annotated[int, "steps of sampling in steps.png, with every resolution of the finest level"] = 0
    fps: Annotated[int, "frames per second of animations, if samples are clips"] = 8


@dataclasses.dataclass(frozen=True)
class ClipScoreOptions:
    """config.evaluate.clip."""

    name: Annotated[str, "the CLIP model"] = "clip_vitb16"
    weights: Annotated[str, "its folder in transformers' format; '': no CLIP score"] = ""


@dataclasses.dataclass(frozen=True)
class NeighborOptions:
    """config.evaluate.neighbors, of --mode=neighbors."""

    queries: Annotated[int, "images whose neighbors are drawn"] = 4
    nearest: Annotated[int, "neighbors of each"] = 8
    k: Annotated[int, "neighbors that vote in the k-NN accuracy"] = 20


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """config.evaluate: how samples are scored."""

    num_samples: Annotated[int, "samples to score; 0: none"] = 0
    num_reference: Annotated[int, "images that they are scored against"] = 10000
    split: Annotated[str, "of the images that samples are scored against, and of the captions; '': data.split"] = ""
    input_size: Annotated[int, "pixels per side of what EfficientNet-Lite0 sees"] = 64
    unguided: Annotated[bool, "also score samples without guidance"] = True
    sweep: Annotated[tuple, '(option, values) pairs of which all combinations are scored: (("guidance", (0, 1)),)'] = ()
    memorization: Annotated[int, "samples shown beside their nearest training images; 0: none"] = 0
    likelihood: Annotated[int, "held-out images whose bits per dimension are computed (one level of pixels)"] = 0
    likelihood_steps: Annotated[int, "Runge-Kutta steps of it, of four evaluations with derivatives each"] = 100
    likelihood_sigma_min: Annotated[float, "noise that the images are given; 0: .01, or the process's lowest"] = 0.0
    likelihood_sigma_max: Annotated[float, "noise level where it ends; 0: 80, or the process's highest"] = 0.0
    clip: Annotated[ClipScoreOptions, "the CLIP score"] = ClipScoreOptions()
    neighbors: Annotated[NeighborOptions, "of --mode=neighbors"] = NeighborOptions()


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """config.search, of --mode=search."""

    sigmas: Annotated[tuple[float, ...], "tried at every level (nested/modes/search.py)"] = (0.0, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """config.text: the frozen encoder of captions."""

    encoder: Annotated[str, "minilm | t5 | clip_vitl14: what the captions of the data go through; '': none"] = ""
    weights: Annotated[str, "folder of the weights and tokenizer.json; '': the file that minilm's package ships"] = ""
    dtype: Annotated[
        Literal["float32", "bfloat16"], "of the weights and of what is computed; bfloat16 takes half the memory"
    ] = "float32"
    max_tokens: Annotated[int, "tokens of a caption, the rest is cut off"] = 128
    width: Annotated[int, "of the encoder's features: 2048 for FLAN-T5 XL, 384 for minilm, 768 for CLIP"] = 2048
    stored: Annotated[bool, "features are made once, below the latents' directory; False: in every step"] = True
    batch_size: Annotated[int, "captions encoded at a time, if stored"] = 64


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What stands at the top of a config, beside the sections."""

    seed: Annotated[int, "of initial parameters, batches, noise and samples"] = 0
    latents_dir: Annotated[str, "where encoded data are kept; '': WORKDIR/latents"] = ""
    levels: Annotated[tuple, "coarse to fine, of common.level(...)"] = ()
    train_levels: Annotated[tuple[str, ...], "names of the levels to train; (): all of them"] = ()
    phases: Annotated[
        tuple, "what trains before, each from the one before it: dict(name=, levels=, train=dict(steps=), ...)"
    ] = ()


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the config.

    options: dataclass of its own options, if it has any. choice: the option that names one of `parts`, whose default is
    `default`; '': the section chooses no part.
    """

    options: type | None
    choice: str = ""
    default: str = ""
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def declared(self) -> dict[str, Option]:
        """All options by name: the choice, the section's own, then those of every part.

        Raises ValueError if the section and a part of it declare the same option.
        """
        own, of_parts = options.declared(self.options), options.declared_by_all(self.parts.values())
        if self.choice:
            own = {self.choice: Option(self.choice, self.default, "one of these parts", str, tuple(self.parts))} | own
        if twice := sorted(own.keys() & of_parts.keys()):
            raise ValueError(f"the section and a part of it declare the same option: {', '.join(twice)}")
        return own | of_parts

    def defaults(self) -> dict[str, Any]:
        """{option: default}; of an option that is itself a dataclass, a dict."""
        return {
            name: options.default_values(type(option.default))
            if dataclasses.is_dataclass(option.default)
            else option.default
            for name, option in self.declared().items()
            if option.default is not REQUIRED
        }


SECTIONS = {
    "data": Section(DataOptions, "source", "digits", SOURCES),
    "encoder": Section(EncodingOptions, "name", "efficientnet_lite0", ENCODERS),
    "text": Section(TextOptions),
    "codec": Section(None, "name", "pixels", SPACES),
    "hierarchy": Section(HierarchyOptions),
    "init_from": Section(InitFromOptions),
    "train": Section(TrainOptions),
    "optimizer": Section(OptimizerConfig),
    "sample": Section(SampleOptions),
    "evaluate": Section(EvaluateOptions),
    "search": Section(SearchOptions),
}


def default_options() -> dict[str, Any]:
    """Every option of a config with its default; `levels` is empty."""
    return options.default_values(RunOptions) | {name: section.defaults() for name, section in SECTIONS.items()}


def check_sections(config: Config) -> None:
    """Raise ValueError, in one line, for an option that its section does not have or a value that is not allowed."""
    for name, section in SECTIONS.items():
        options.check_values(name, config[name], section.declared())
