"""configs/imagenet.py with L5: commands, cost and published scores are there. Arguments: class, synthetic."""

from configs import common, imagenet


def get_config(arg: str = "") -> common.Config:
    return imagenet.get_config(f"L5,{arg}")
