"""Matryoshka Diffusion (ICLR 2024): every architecture of App. A and D, and the runs of App. E with their phases.

    python main.py --config=configs/mdm.py:cc12m256 --workdir=/shared/runs/cc12m256     S64, then S64S256 from its EMA
    python main.py --config=configs/mdm.py:imagenet256 --workdir=...                    classes, no text
    python main.py --config=configs/mdm.py:s64s256s1024,released --mode=summary         sizes
    python main.py --config=configs/mdm.py:s64s256,paper,synthetic --workdir=...        random data: speed only
    python main.py --config=configs/mdm.py:s64s256,released --workdir=OUT --mode=sample --weights=vis_model_256x256.pth
        --config.text.weights=FLAN_T5_XL --config.sample.prompts="('a chair',)"         the released weights

Runs: imagenet256, cc12m64, cc12m256, cc12m1024, webvid (16 frames, 256 px). Architectures, trained in one phase with
the batch of their resolution: s64, s64s256, s64s128s256, s64s256s1024, s64s128s256s512s1024, s64t16, s64t16s256.
Presets: paper (default: text projected to 1024, two layers on it, Adam 1e-4, betas (.9, .99), 30k warm-up steps) and
released (ml-mdm's cc12m_*.yaml: projection to 2048, no such layers, cross-attention unmasked, micro-conditioning, 5e-5,
(.9, .999), 10k; sampling as its demo: DDIM, scale 7.5, DeepFloyd's threshold). Both make matrix products in bfloat16,
in sampling too; the release trained 64 and 256 px in float32: --config.train.dtype=float32. Texts are padded to 128
tokens, in the release to the longest of the batch, and where cross-attention is unmasked padding counts:
--config.text.max_tokens=N, the tokens of the longest prompt, gives the release's input for one batch.
Schedules: cosine shifted by the side ratio; by its square at 1024 px in `released`. Batches and steps: CC12M 64 / 256 /
1024 px 2048 / 1024 / 768, 500k / 500k / 100k; ImageNet 512 / 256, 300k / 500k; video 2048 / 512 / 128, 500k / 500k /
300k.
Ablations: --config.phases[0].train.steps (Fig. 8a, where progression starts), the architecture (8b, how many nests),
--config.levels[0].leaf_weights="(0.0, 1.0)" (Fig. 4, the finest loss alone),
--config.evaluate.sweep='(("guidance", (0.0, 0.2, 0.5)),)' (8c).

Data: ImageNet prepared by TFDS; CC12M and WebVid as WebDataset tars with captions, WebVid's clips as .mp4 (OpenCV).

Published: ImageNet-256 FID-50k 8.92, guided (scale 1.2, here guidance .2) 6.62; COCO zero-shot FID-30k 18.35, guided
(1.35) 13.43. S64 takes 190 to 193 GMACs per image, S64S256 302 to 305, S64S256S1024 517 to 520.
Nothing here has been trained by us: we have neither the data nor FLAN-T5 XL's weights (config.text.weights) nor pods.
Captions and labels are dropped with probability .1 for guidance; the public code drops no captions and the paper no
labels (--config.hierarchy.cond_drop=0).
"""

from configs import common

CLIPS = ("s64t16", "s64t16s256")
SIDES = {
    "s64": (64,),
    "s64s256": (64, 256),
    "s64s128s256": (64, 128, 256),
    "s64s256s1024": (64, 256, 1024),
    "s64s128s256s512s1024": (64, 128, 256, 512, 1024),
}
SHAPES = {
    **{name: tuple((side, side, 3) for side in sides) for name, sides in SIDES.items()},
    "s64t16": ((64, 64, 3), (16, 64, 64, 3)),
    "s64t16s256": ((64, 64, 3), (16, 64, 64, 3), (16, 256, 256, 3)),
}
RUNS = {  # name -> (its architectures, one per phase; batch sizes; steps)
    "cc12m256": (("s64", "s64s256"), (2048, 1024), (500_000, 500_000)),
    "cc12m64": (("s64",), (2048,), (500_000,)),
    "cc12m1024": (("s64", "s64s256", "s64s256s1024"), (2048, 1024, 768), (500_000, 500_000, 100_000)),
    "imagenet256": (("s64", "s64s256"), (512, 256), (300_000, 500_000)),
    "webvid": (("s64", "s64t16", "s64t16s256"), (2048, 512, 128), (500_000, 500_000, 300_000)),
}
DEMO = {"s64": (50, 0.0), "s64s256": (100, 0.0), "s64s256s1024": (250, 1.0)}  # steps and eta of DDIM
BATCHES = {64: 2048, 256: 1024, 1024: 768} | {"s64t16": 512, "s64t16s256": 128}  # of one architecture: images by side


def get_config(arg: str = "cc12m256") -> common.Config:
    name, preset, kind = common.parse(arg, (*RUNS, *SHAPES), ("paper", "released"), ("data", "synthetic"))
    architectures, batches, steps = RUNS.get(name) or ((name,), (batch_of(name),), (500_000,))
    classes = name == "imagenet256"
    config = common.default()
    if classes:
        config.data.update(source="tfds", num_classes=1000)
        config.hierarchy.label_levels = ("x",)
    else:
        config.text.update(encoder="t5", max_tokens=128, width=2048, stored=False)
        config.hierarchy.text_levels = ("x",)
        config.data.update(source="webdataset_clips" if architectures[-1] in CLIPS else "webdataset")
        config.data.update(flip=architectures[-1] in CLIPS)  # WebVid alone is mirrored
    config.train.update(
        dtype="bfloat16", remat="1024" in name or architectures[-1] in CLIPS, log_every=100, eval_every=10_000,
        sample_every=10_000, save_every=5000,
    )  # fmt: skip
    config.data.update(channels=3, holdout=min(1024, *batches), check=False)
    config.optimizer.update(common.mdm_optimizer(preset))
    config.sample.update(num_samples=64, batch_size=64, steps_shown=8)
    config.evaluate.update(num_samples=50_000 if classes else 30_000, num_reference=50_000)
    phases = [
        dict(
            name=architecture,
            levels=(level(architecture, preset, classes),),
            data=dict(image_size=SHAPES[architecture][-1][-2]) | frames_of(architecture, architectures[-1]),
            train=dict(batch_size=batch, steps=number),
            evaluate=dict(num_samples=0),
        )
        for architecture, batch, number in zip(architectures, batches, steps, strict=True)
    ]
    last = phases.pop()  # the one that is scored
    config.levels = last["levels"]
    config.data.update(last["data"])
    config.train.update(last["train"])
    config.phases = tuple(phases)
    if kind == "synthetic":
        config.data.update(source="synthetic", num_examples=10_000, flip=False)
        config.train.sample_every = config.sample.num_samples = config.evaluate.num_samples = 0
        config.phases = ()
    return config


def frames_of(architecture: str, last: str) -> dict:
    """config.data.frames of a phase, in a run that ends with the architecture `last`; {} where the data are images."""
    if last not in CLIPS:
        return {}
    return dict(frames=16 if architecture in CLIPS else 1)


def batch_of(architecture: str) -> int:
    """The paper's batch size for a model of this resolution."""
    return BATCHES[architecture if architecture in CLIPS else SHAPES[architecture][-1][-2]]


def level(architecture: str, preset: str, classes: bool = False, **changes) -> common.Config:
    """The one level of a Matryoshka model."""
    options = dict(text_proj=0, lm_layers=0, masked_cross_attention=True) if classes else {}
    shapes = SHAPES[architecture]
    power = 2.0 if preset == "released" and "1024" in architecture else 1.0
    return common.level(
        "x", "pixels", shapes if len(shapes) > 1 else shapes[0], None,
        backbone=common.nested_unet(architecture, preset, **options | changes),
        process=common.mdm_process(power),
        **sampling(architecture, preset, classes),
    )  # fmt: skip


def sampling(architecture: str, preset: str, classes: bool) -> dict:
    """Guidance, sampler and threshold: of the paper, or of the demo for the three models whose weights are released."""
    if preset == "released" and architecture in DEMO and not classes:
        steps, eta = DEMO[architecture]
        return dict(guidance=6.5, sampler=common.mdm_sampler("ddim", steps, eta=eta), threshold="deepfloyd")
    sampler = common.mdm_sampler("ddpm", 250)
    return dict(guidance=0.2 if classes else 6.0, sampler=sampler, threshold="dynamic_100")
