"""The default config, and the helpers that configs are written with.

Every option is declared, with its default, beside the code that reads it; docs/options.md lists them all. Here they are
composed into a config, and the recipes of the papers have names.

A config file has get_config(arg) -> ConfigDict; `--config=configs/fashion_mnist.py:L3,uncond` passes "L3,uncond".
Any value can be overridden on the command line: --config.train.steps=100, --config.levels[0].sigma=0.5.
"""

from ml_collections import ConfigDict

from configs.backbones import dit, hdit, nested_unet, net, res_mlp, uvit  # noqa: F401  configs use them as common.uvit(...)
from nested.build.options import Config, default_values
from nested.build.sections import LevelOptions, default_options


def default() -> Config:
    """A config with every option at its default; the caller sets `levels`."""
    return ConfigDict(default_options())


def parse(arg: str, *choices: tuple[str, ...]) -> list[str]:
    """The word of each group of `choices` that `arg` names ("L3,uncond"), or the first of a group if it names none.

    Raises ValueError for a word that is in no group and for two words of one group."""
    words = [word for word in arg.split(",") if word]
    unknown = [word for word in words if not any(word in group for group in choices)]
    if unknown:
        allowed = "; ".join(" | ".join(group) for group in choices)
        raise ValueError(f"config argument {unknown[0]!r} is not one of: {allowed}")
    chosen = []
    for group in choices:
        named = [word for word in words if word in group]
        if len(named) > 1:
            raise ValueError(f"config argument {arg!r} names both {named[0]} and {named[1]}; give one")
        chosen.append(named[0] if named else group[0])
    return chosen


def level(
    name: str,
    source: str,
    shape: tuple,
    patch_size: int | tuple[int, int] | None,
    *,
    sigma: float = LevelOptions.sigma,
    guidance: float = LevelOptions.guidance,
    backbone: Config | dict,
    process: dict | None = None,
    sampler: dict | None = None,
    threshold: str = LevelOptions.threshold,
    standardize: str = LevelOptions.standardize,
) -> Config:
    """One level; nested/build/sections.py LevelOptions says what its options mean and which others there are.

    patch_size: of the backbone's tokens; None for a backbone without, such as nested_unet.
    process, sampler: sd_process() and dpm_solver() if not given.
    """
    return ConfigDict(
        default_values(LevelOptions)
        | dict(
            name=name,
            source=source,
            shape=shape,
            sigma=sigma,
            standardize=standardize,
            guidance=guidance,
            threshold=threshold,
            backbone=dict(backbone) if patch_size is None else dict(backbone, patch_size=patch_size),
            process=process or sd_process(),
            sampler=sampler or dpm_solver(),
        )
    )


def pooled_levels(shapes: tuple, backbone: dict, sigma: float, features: str = "map", **how) -> tuple[Config, ...]:
    """The draft's semantic levels, coarse to fine: one feature map pooled to each of `shapes` (side, side, channels),
    then the SVD. features: map, or codec for its latents (the VAE ablation), whose channels cut those of the shapes."""
    return tuple(
        level(f"z{side}x{side}", f"{features}{side}", (side, side, channels), 1, sigma=sigma, backbone=backbone, **how)
        for side, _, channels in shapes
    )


def synthetic(config: Config, num_examples: int) -> Config:
    """The config on random latents, which have no images to draw or score."""
    config.data.update(source="synthetic", split=default().data.split, num_examples=num_examples, flip=False)
    config.train.sample_every = config.sample.num_samples = 0
    config.evaluate.num_samples = config.evaluate.memorization = 0
    return config


def use_preset(config: Config, name: str) -> None:
    """Sets hierarchy.preset and the options that it means (nested/build/presets.py), also those of every level's
    network."""
    from nested.build import presets

    config.hierarchy.update(preset=name, **presets.HIERARCHY[name])
    for level in config.levels:
        level.backbone.update(presets.BACKBONE[name])


def sd_process(parameterization: str = "eps") -> dict:
    """Stable Diffusion's scaled-linear betas, 1,000 discrete steps; eps as in U-ViT's H and COCO configs, or v, which
    learns the high noise levels sooner and suits short runs."""
    return dict(
        schedule="sd_scaled_linear",  # or ldm_linear | linear_vp | cosine | cosine_log_snr | ddpm_linear
        parameterization=parameterization,  # eps | v | x0 | edm: what the network predicts
        loss_space=parameterization,  # where its squared error is taken
        weighting="uniform",
        time_sampling="uniform",
        discrete_steps=1000,
        t_min=0.0,
        time_scale=1000.0,
    )


def dpm_solver(steps: int = 50) -> dict:
    """DPM-Solver++ 'fast' order 3 on a uniform time grid down to 1/1000, as U-ViT's H and COCO configs sample."""
    return dict(
        name="dpm_solver",
        steps=steps,
        order=3,
        algorithm="dpm_solver++",
        method="fast",
        grid="time_uniform",
        intermediate="grid",
        solver_type="dpm_solver",
        t_end=1e-3,
    )


def decaying_guidance(num_levels: int, start: float = 0.5, step: float = 0.1) -> tuple[float, ...]:
    """Coarse to fine w_L, ..., w_1 = start, start - step, ... (CVPR Sec. 4.2: .5 .4 .3 .2 .1, the first L used)."""
    return tuple(round(max(start - step * i, 0.0), 6) for i in range(num_levels))


def edm_process(image_size: int, *, sigma_data: float = 0.5, weighting: str = "soft_min_snr", **changes) -> dict:
    """EDM's preconditioning and HDiT's density of noise levels, stratified over the global batch (arXiv 2401.11605)."""
    options = dict(
        schedule="exponential_ve",
        parameterization="edm",
        loss_space="edm",
        weighting=weighting,  # uniform | karras | snr | min_snr | soft_min_snr
        time_sampling="stratified",
        discrete_steps=0,
        t_min=0.0,
        noise_input="log_sigma",
        time_scale=0.25,  # the network is told log(sigma) / 4
        sigma_data=sigma_data,
        density=dict(
            name="cosine_interpolated",
            image_size=image_size,
            sigma_data=sigma_data,
            noise_low=32,
            noise_high=image_size,
            sigma_min=1e-3,
            sigma_max=1e3,
        ),
    )
    return options | changes


def hdit_groups() -> tuple[dict, ...]:
    """k-diffusion's parameter groups: the mapping network and what reads it at a third of the rate; gains, embeddings
    and their projections, and positions, without decay."""
    undecayed = "/(time_in_proj|aug_in_proj|class_emb|mapping_cond_in_proj|cond_in_proj_[^/]*|out_norm)/"
    return (
        dict(pattern="/mapping/.*gain$", learning_rate=1 / 3, weight_decay=0.0),
        dict(pattern="/mapping/|/norm/linear/", learning_rate=1 / 3, weight_decay=1.0),
        dict(
            pattern=undecayed + "|/self_attn/gain$|/fac$|/empty_[^/]*$|/pos_embed$", learning_rate=1.0, weight_decay=0.0
        ),
    )


def hdit_optimizer() -> dict:
    """AdamW as HDiT trains (Table 6): parameter groups, clipping at 1, EMA that warms up."""
    return dict(
        learning_rate=5e-4, b1=0.9, b2=0.95, weight_decay=1e-2, clip_norm=1.0, ema_decay=0.9999, ema_power=0.75,
        groups=hdit_groups(),
    )  # fmt: skip


def sigma_sampler(name: str, steps: int, sigma_min: float = 1e-2, sigma_max: float = 160.0, **options) -> dict:
    """A k-diffusion sampler on Karras' noise levels; the range is that of the public 256-pixel config, as HDiT's paper
    does not give its own. 'dpmpp_3m_sde' with 50 steps is the paper's."""
    return dict(name=name, steps=steps, grid="karras", sigma_min=sigma_min, sigma_max=sigma_max, rho=7.0, **options)


def mdm_process(shift_power: float = 1.0, loss_space: str = "eps") -> dict:
    """Matryoshka's: the cosine schedule of every resolution shifted by (its side ratio to the coarsest)^shift_power, v
    predicted, the squared error of eps (or v), 1,000 discrete steps that the network counts from 0."""
    return sd_process("v") | dict(
        schedule="cosine", loss_space=loss_space, time_offset=-1.0, shift_scale=1.0, shift_power=shift_power,
        rescale_signal=False,
    )  # fmt: skip


def mdm_optimizer(preset: str = "paper") -> dict:
    """Adam, clip 2, constant after the warm-up, EMA .9999: the paper's rates, or those of the released configs."""
    rates = dict(learning_rate=1e-4, warmup_steps=30_000, b1=0.9, b2=0.99)
    if preset == "released":
        rates = dict(learning_rate=5e-5, warmup_steps=10_000, b1=0.9, b2=0.999)
    return dict(rates, warmup_start=1, eps=1e-8, weight_decay=0.0, clip_norm=2.0, ema_decay=0.9999)


def mdm_sampler(name: str = "ddpm", steps: int = 250, **options) -> dict:
    """DDPM (the paper: 250 steps) or DDIM (eta=) on the time grid of the public code ('released'), or 'trailing'."""
    return dict(name=name, steps=steps) | dict(grid="released") | options


def ddpm_process(learned_variance: bool = False) -> dict:
    """DDPM's linear betas, 1,000 discrete steps, eps; with DiT's and ADM's learned variance where asked."""
    return sd_process() | dict(schedule="ddpm_linear", learned_variance=learned_variance)
