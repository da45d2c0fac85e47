"""HDiT's ablation (arXiv 2401.11605, Tables 1, 2 and 5): every row, ImageNet at 128, 256 or 512 pixels, in pixel space.

    python main.py --config=configs/hdit.py:E --workdir=runs/hdit_E --config.data.path=IMAGENET/train
    python main.py --config=configs/hdit.py:B1,256 --mode=summary

Arguments (the first of each group where none is named):
    row     E | D | C | B2 | B1 | A | R1 | R2 | R3 | R4     E is HDiT-B/4; the others take one thing after another away
    side    128 | 256 | 512                      one more neighborhood level of width 384 per doubling
    skip    lerp | add | concat                  Table 2
    loss    default | min_snr_4 | min_snr_5      Table 5 (default: the row's; soft-min-SNR in E and R4, SNR elsewhere)
    data    imagenet | synthetic                 synthetic: random images, to measure speed without data

The rows, each adding one thing: A global attention, plain GELU, additive positions, SNR weighting; B1 shifted windows
of 8, or B2 neighborhoods of 7; C GEGLU; D RoPE; E soft-min-SNR. R1 is DiT-B/4 with DDPM's process and learned
variance, R2 DiT-B/4 in E's process with SNR weighting, R3 one level of A's blocks, R4 that with soft-min-SNR. The
mapping network is plain where the feed-forward is, and A's attention is cosine like the others' (the paper says
neither).

Published FID (50k samples, 50 steps of DPM++ 3M SDE, no guidance; R1 250 DDPM steps) at 128 px: E 27.74, D 41.41, and
for R1-R4 42.03, 69.86, 42.49, 30.71; Table 2: concat 33.75, add 28.37, lerp 27.74. E took 15 h on 4 A100. None of these
has been trained with this code; sizes and multiply-accumulates are tested against the paper. At 512 pixels A and R1-R4
attend over 16,384 tokens at once: without a fused kernel (backbone.attention='cudnn') they are there for `summary`.

Departures: images are cropped as ADM does it (box halving, then bicubic), k-diffusion scales by bicubic alone; R1 is
sampled with the posterior's variance, not the learned one, and trains in bfloat16 here.
"""

from typing import Any

from configs import common

SIDES = ("128", "256", "512")


def get_config(arg: str = "E") -> common.Config:
    row, side, skip, loss, data = common.parse(
        arg,
        ("E", "D", "C", "B2", "B1", "A", "R1", "R2", "R3", "R4"),
        SIDES,
        ("lerp", "add", "concat"),
        ("default", "min_snr_4", "min_snr_5"),
        ("imagenet", "synthetic"),
    )
    if row[0] == "R" and skip != "lerp":
        raise ValueError(f"config argument {skip!r}: {row} has one level and no skips; leave it out")
    if row == "R1" and loss != "default":
        raise ValueError(f"config argument {loss!r}: R1 trains with DDPM's own loss; leave it out")
    size, extra = int(side), SIDES.index(side)
    config = common.default()
    if data == "imagenet":
        config.data.update(source="image_folder", path="", num_classes=1000, image_size=size, channels=3)
    else:
        config.data.update(source="synthetic", num_classes=1000, num_examples=4096)
    is_dit = row in ("R1", "R2")
    backbone = common.dit("B", learn_variance=row == "R1") if is_dit else network(row, extra, skip)
    how = process(row, size, loss)
    sampler = common.sigma_sampler("dpmpp_3m_sde", 50)
    if row == "R1":
        sampler = dict(name="ddpm", steps=250, t_end=1e-3)
    config.levels = (common.level("x", "pixels", (size, size, 3), 4, backbone=backbone, process=how, sampler=sampler),)
    config.hierarchy.label_levels = ("x",)
    config.train.update(
        batch_size=256, steps=400_000, dtype="bfloat16", remat=extra > 0, log_every=100, save_every=5000, workers=8
    )
    config.sample.batch_size = 64 >> 2 * extra
    config.optimizer.update(common.hdit_optimizer())
    if is_dit:  # DiT's own AdamW; R2 keeps the clipping and the averaging of the other rows
        config.optimizer.update(learning_rate=1e-4, b2=0.999, weight_decay=0.0, groups=())
    if row == "R1":
        config.optimizer.update(clip_norm=0.0, ema_power=0.0)
        config.data.flip = data == "imagenet"
    if data == "synthetic":
        config.sample.num_samples = 0
    return config


def network(row: str, extra: int, skip: str) -> dict:
    """HDiT's options of a row, with `extra` more levels than at 128 pixels."""
    plain = row in ("A", "B1", "B2", "R3", "R4")
    changes: dict[str, Any] = dict(
        skip=skip,
        feed_forward="gelu" if plain else "geglu",
        position="additive" if plain or row == "C" else "rope",
        mapping_depth=1,
        mapping_width=768,
    )
    if row in ("R3", "R4"):
        return common.hdit(depths=(12,), widths=(768,), attentions=("global",), **changes)
    local = {"A": "global", "B1": "shifted_window"}.get(row, "neighborhood")
    return common.hdit(
        depths=(2,) * extra + (2, 11),
        widths=(384,) * extra + (384, 768),
        attentions=(local,) * (extra + 1) + ("global",),
        **changes,
    )


def process(row: str, size: int, loss: str) -> dict:
    """The process of a row, with the loss weighting `loss`."""
    if row == "R1":
        return common.ddpm_process(learned_variance=True)
    weighting, gamma = ("soft_min_snr" if row in ("E", "R4") else "snr"), {}
    if loss != "default":
        weighting, gamma = "min_snr", dict(gamma=float(loss[-1]))
    how = common.edm_process(size, weighting=weighting, **gamma)
    return how | dict(time_scale=250.0) if row == "R2" else how  # DiT's sinusoids want times of hundreds
