"""Quick start: 1,797 real handwritten digits (8x8, from scikit-learn), a three-level nested diffusion, two CPU cores.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

Levels: the digit's EfficientNet-Lite0 feature map (64 px, stage 4, 4x4x112) pooled to 1x1 and to 2x2, 32 and 16 SVD
components, then the 8x8 pixels; class labels at every level; the paper's sigma, decaying guidance and noise on
generated conditions. Departures, for a run of minutes: v-prediction, static thresholding of pixels, nets of .7 M
parameters, 20 solver evaluations. Expect: see README.md "Quick start".
"""

from typing import Any

from configs import common


def get_config() -> common.Config:
    config = common.default()
    config.data.update(source="digits", num_classes=10, holdout=128)
    config.encoder.update(input_size=64, map="stage4", features=("map",), components=(64,))
    small = common.uvit(width=96, depth=4, num_heads=3, time_mlp=True, final_conv=False)
    base = common.uvit(width=128, depth=2, num_heads=4, time_mlp=True)
    how: dict[str, Any] = dict(process=common.sd_process("v"), sampler=common.dpm_solver(20))
    config.levels = (
        common.level("z1x1", "map", (1, 1, 32), 1, sigma=0.5, guidance=0.5, backbone=small, **how),
        common.level("z2x2", "map", (2, 2, 16), 1, sigma=0.5, guidance=0.4, backbone=small, **how),
        common.level("x", "pixels", (8, 8, 1), 2, guidance=0.3, backbone=base, threshold="static", **how),
    )
    config.hierarchy.update(label_levels=("z1x1", "z2x2", "x"), noise_gamma=0.3)
    config.train.update(batch_size=64, steps=1200, eval_every=200, sample_every=0, save_every=500, log_every=50, keep=2)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=50, decay="cosine", ema_decay=0.99, weight_decay=0.03)
    config.sample.update(num_samples=100, batch_size=100, columns=10, scale=6)
    config.evaluate.update(num_samples=500, num_reference=1797)
    return config
