"""RCG, the two-level ancestor of Nested Diffusion (Li, Katabi & He, arXiv 2312.03701; LTH14/rcg), ImageNet-1k 256x256.

    python main.py --config=configs/rcg.py:rdm --workdir=/shared/runs/rdm
    python main.py --config=configs/rcg.py:dit --workdir=/shared/runs/rcg --config.init_from.path=/shared/runs/rdm
    python main.py --config=configs/rcg.py --mode=summary
    python main.py --config=configs/rcg.py:dit,synthetic --workdir=...                random latents: speed only

Arguments: rdm (default) or dit, the part that is trained, each with its own optimizer; dit_xl (default), dit_l or
dit_b; uncond (default) or class, where the representation's network sees the label and the other does not; data
(default) or synthetic. The run of `dit` takes the representation's network from init_from and samples both levels.
Levels: MoCo-v3's 256-vector of the whole image, each standardised over its own 256 numbers; the SD autoencoder's
32x32x4 latent. rep: 12 residual blocks, 1536 wide, x0-prediction, DDIM with 250 steps and eta 1; batch 512, 200 epochs
(500,400 steps), AdamW 1e-6 * 512, weight decay .01. x: DiT-XL/2 with the exact GELU, DDPM's betas, learned variance,
250 steps; batch 2048, 400 epochs (250,000 steps), AdamW 1e-4, b2 .95, no decay; 10 % of the vectors are replaced by a
learned one, the fake latent that guidance subtracts: --config.levels[1].guidance (RCG's cfg - 1). EMA .9999 in both.

Published FID-50k of DiT-XL/2, unconditional: 4.89 (README, 400 epochs, no guidance in its command). By arithmetic, not
measured, an image costs 63 MMACs for the representation and 119 GMACs for DiT-XL/2, in training .4 and 710 GFLOP.
The vector is that of MoCo-v3's projector, of its base encoder, not the class token (768 channels). The frozen networks'
files are named by encoder.weights (vit-b-300ep.pth.tar) and codec.weights; summary and synthetic latents work without
them. Not run by us.

Departures: the image is resized for MoCo-v3 with antialiasing, theirs without; guidance leads all channels, theirs the
first three; they crop at random, latents are of the centre crop; DDIM runs at times 997, 993, ... 4 of 1,000 and then
to clean data, theirs at 998, 994, ... 2 and then to 1; DiT is sampled with the posterior's variance, not the learned
one; the average of rep does not warm up in its first steps; the label's embedding has a null class, which is not used.
"""

from configs import common

PARTS = {"rdm": "rep", "dit": "x"}  # what they call a part: the level that it is


def get_config(arg: str = "rdm") -> common.Config:
    part, size, label, data = common.parse(
        arg, tuple(PARTS), ("dit_xl", "dit_l", "dit_b"), ("uncond", "class"), ("data", "synthetic")
    )
    config = common.default()
    config.data.update(source="tfds", num_classes=1000, image_size=256, channels=3, holdout=1024)
    config.encoder.update(
        name="mocov3_vitb16", input_size=224, map="last", vector="projected", features=("crops1",), components=(256,),
        svd="none",
    )  # fmt: skip
    config.codec.update(name="sd_vae", patch=8, channels=4, scale=0.18215)
    from_zero = dict(time_offset=-1.0)  # both networks count the steps from 0 to 999
    network = common.dit(size.removeprefix("dit_").upper(), learn_variance=True, tanh_gelu=False)
    config.levels = (
        common.level(
            "rep", "crops1", (1, 1, 256), 1, standardize="sample", backbone=common.res_mlp("l12_w1536"),
            process=common.sd_process("x0") | dict(schedule="ldm_linear") | from_zero,
            sampler=dict(name="ddim", steps=250, eta=1.0, grid="released"),
        ),
        common.level(
            "x", "sd_vae", (32, 32, 4), 2, backbone=network,
            process=common.ddpm_process(learned_variance=True) | from_zero,
            sampler=dict(name="ddpm", steps=250, t_end=1e-3),
        ),
    )  # fmt: skip
    config.train_levels = (PARTS[part],)
    config.hierarchy.label_levels = ("rep",) if label == "class" else ()
    config.train.update(log_every=100, save_every=5000, eval_every=10_000)
    config.evaluate.update(num_samples=50_000, num_reference=50_000)
    if part == "rdm":
        config.hierarchy.cond_drop = 0.0  # nothing to drop but the label, which they keep
        config.train.update(batch_size=512, steps=500_400)
        config.optimizer.update(learning_rate=1e-6 * 512, weight_decay=0.01)
    else:
        config.hierarchy.cond_drop = 0.1
        config.init_from.levels = ("rep",)
        config.train.update(batch_size=2048, steps=250_000, sample_every=10_000)
        config.optimizer.update(learning_rate=1e-4, b2=0.95, weight_decay=0.0)
    if part == "rdm":  # the representation alone makes no pictures
        config.sample.num_samples = config.evaluate.num_samples = 0
    if data == "synthetic":
        config.init_from.levels = ()
        return common.synthetic(config, 100_000)
    return config
