"""The shipped configs: every file of configs/ with every argument."""

import importlib
import itertools

from configs import coco, mdm, mdm_baselines, uvit_release

DEPTHS = ("L1", "L2", "L3", "L4", "L5", "L1_wide")
ARGUMENTS = {  # file of configs/ -> its groups of words; None: get_config takes no argument
    "quickstart": None,
    "fashion_mnist": (("L1", "L2", "L3"), ("class", "uncond"), ("cvpr", "iclr"), ("semantic", "codec")),
    "coco": (("L1", "L2", "L3"), tuple(coco.ENCODERS)),
    "coco_iclr": (("L1", "L2", "L3", "L4", "L5"), ("uncond", "text"), ("semantic", "vae")),
    "imagenet100": (("L1", "L2", "L3", "L4"), ("uncond", "class"), ("semantic", "vae")),
    "imagenet": (DEPTHS, ("uncond", "class"), ("data", "synthetic")),
    "fashion_mnist_hdit": (("hdit", "uvit"),),
    "fashion_mnist_nested_hdit": (("class", "uncond"),),
    "emoji64": (("L1", "L2", "L3"), ("uncond", "class", "text")),
    "emoji_hdit": (("64", "128"),),
    "emoji_mdm": (("progressive", "nest", "mixed"),),
    "emoji_video": None,
    "fashion_mnist_mdm": (("progressive", "nest", "simple", "cascade"),),
    "mdm": ((*mdm.RUNS, *mdm.SHAPES), ("paper", "released")),
    "mdm_baselines": (mdm_baselines.KINDS,),
    "rcg": (("rdm", "dit"), ("uncond", "class"), ("data", "synthetic")),
    "uvit_release": (tuple(uvit_release.MODELS),),
    "hdit_ffhq1024": (("ffhq", "synthetic"),),
    "hdit_imagenet256": (("imagenet", "synthetic"),),
    "hdit": (("E", "D", "C", "B2", "B1", "A", "R1", "R2", "R3", "R4"), ("128", "256", "512")),
    **{f"imagenet_{depth}": (("uncond", "class"), ("data", "synthetic")) for depth in DEPTHS},
}
ALL = [(name, ",".join(words)) for name, groups in ARGUMENTS.items() for words in itertools.product(*groups or ())]
ALL += [("mdm", f"{name},synthetic") for name in ("cc12m256", "imagenet256", "s64t16s256")]
ALL += [("rcg", f"dit,{size}") for size in ("dit_l", "dit_b")]
ALL += [("mdm_baselines", f"{kind},synthetic") for kind in mdm_baselines.KINDS]
ALL += [("hdit", words) for words in ("add", "concat", "min_snr_4", "A,min_snr_5", "synthetic", "R1,synthetic")]


def get_config(name, argument=""):
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(argument) if ARGUMENTS[name] else module.get_config()
