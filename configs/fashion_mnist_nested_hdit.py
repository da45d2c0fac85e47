"""Semantic levels above a pixel-space HDiT, the combination no paper has; Fashion-MNIST, two CPU cores.

    apt-get install dataset-fashion-mnist          (or --config.data.path=FOLDER with the four idx.gz files)
    python main.py --config=configs/fashion_mnist_nested_hdit.py --workdir=runs/fashion_nested_hdit

Levels: z1x1 and z2x2 of configs/fashion_mnist.py (EfficientNet-Lite0's map at 64 px, pooled, 32 components; U-ViT,
v-prediction), then the 28x28 pixels by the HDiT of configs/fashion_mnist_hdit.py, which sees them in its mapping
network and, z2x2, added to its tokens. One optimizer serves all levels, that of fashion_mnist_hdit.py; so the upper
levels are not trained as in fashion_mnist.py. Arguments: class (default), uncond.
Expect: README.md "HDiT" has the measured scores and pictures.
"""

from configs import common, fashion_mnist, fashion_mnist_hdit


def get_config(arg: str = "class") -> common.Config:
    (kind,) = common.parse(arg, ("class", "uncond"))
    config = fashion_mnist.get_config(f"L3,{kind}")
    finest = fashion_mnist_hdit.get_config("hdit")
    config.codec.update(common.default().codec)  # pixels
    config.encoder.features = ("map",)  # pixels have no latents to make levels of
    config.hierarchy.preset = ""  # CVPR's networks are U-ViTs
    guidance = 0.5 if kind == "class" else 0.8
    config.levels = (*config.levels[:-1], finest.levels[0].copy_and_resolve_references())
    config.levels[-1].guidance = guidance
    config.train.steps = finest.train.steps
    config.optimizer.update(finest.optimizer)
    return config
