"""configs/imagenet.py with L1_wide: commands, cost and published scores are there. Arguments: class, synthetic."""

from configs import common, imagenet


def get_config(arg: str = "") -> common.Config:
    return imagenet.get_config(f"L1_wide,{arg}")
