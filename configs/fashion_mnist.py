"""Fashion-MNIST: 60,000 real product photographs, 28x28 grey, ten classes; L = 1, 2, 3 at equal cost, two CPU cores.

    apt-get install dataset-fashion-mnist          (or --config.data.path=FOLDER with the four idx.gz files)
    python main.py --config=configs/fashion_mnist.py:L3 --workdir=runs/fashion_L3
    python main.py --config=configs/fashion_mnist.py:L3,uncond --workdir=runs/fashion_L3_uncond

    python main.py --config=configs/fashion_mnist.py:L3,uncond --mode=search --workdir=runs/search       sigma, greedily

Arguments: L3 (default), L2, L1; class (default), uncond; cvpr (default), iclr (the draft's preset: the next coarser
level only, by transposed convolution, half of the rows without it); semantic (default), codec (the coarser levels made
of the patch-PCA latents by the same compression). Give the runs one --config.latents_dir to encode only once.
Levels: the EfficientNet-Lite0 feature map (64 px, stage 4) pooled to 1x1 and 2x2, 32 SVD components each, then a
patch-PCA latent of the image (7x7x8 of 28x28: 97.4 % of the variance). The finest network is the same at every depth,
and so are images seen, batch and solver evaluations. v-prediction and small nets, for a run of minutes.
Expect: README.md "Does depth help?" has the measured scores, minutes and pictures.
"""

from typing import Any

from configs import common


def get_config(arg: str = "L3") -> common.Config:
    words = (("L3", "L1", "L2"), ("class", "uncond"), ("cvpr", "iclr"), ("semantic", "codec"))
    depth, kind, preset, features = common.parse(arg, *words)
    depth, conditional = int(depth[1]), kind == "class"
    config = common.default()
    config.data.update(
        source="idx", path="/usr/share/datasets/fashion-mnist", split="train", num_classes=10, holdout=256
    )
    config.encoder.update(input_size=64, map="stage4", components=(64,), fit_images=10000)
    config.encoder.features = ("map", "map1", "map2", "codec1", "codec2")  # one encoding serves every argument
    config.codec.update(name="patch_pca", patch=4, channels=8)  # 8 of 16 components: 97.4 % of the pixels' variance
    how: dict[str, Any] = dict(process=common.sd_process("v"), sampler=common.dpm_solver(20))
    small = common.uvit(width=96, depth=4, num_heads=3, time_mlp=True, final_conv=False)
    base = common.uvit(width=128, depth=2, num_heads=4, time_mlp=True)
    if features == "codec":
        upper = common.pooled_levels(((1, 1, 8), (2, 2, 8)), small, 0.5, "codec", **how)
    elif preset == "iclr":
        upper = common.pooled_levels(((1, 1, 32), (2, 2, 32)), small, 0.5, **how)
    else:  # one SVD for both grids
        upper = tuple(
            common.level(f"z{side}x{side}", "map", (side, side, 32), 1, sigma=0.5, backbone=small, **how)
            for side in (1, 2)
        )
    finest = common.level("x", "patch_pca", (7, 7, 8), 1, backbone=base, **how)
    config.levels = upper[: depth - 1] + (finest,)
    if (preset, features) != ("cvpr", "codec"):  # CVPR has no levels of the codec's latents
        common.use_preset(config, preset)
    for i, level in enumerate(config.levels):
        level.guidance = 0.8 if conditional or i else 0.0
    config.hierarchy.update(
        label_levels=tuple(level.name for level in config.levels) if conditional else (), noise_gamma=0.3
    )
    config.train.update(batch_size=32, steps=2000, eval_every=500, save_every=500, log_every=100)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=100, decay="cosine", ema_decay=0.995, weight_decay=0.03)
    config.sample.update(num_samples=100, batch_size=100, columns=10, scale=2)
    config.evaluate.update(num_samples=1000, num_reference=10000)
    return config
