"""configs/imagenet.py with L1_wide: commands, cost and published scores are there. Arguments: class, synthetic."""

from configs import imagenet


def get_config(arg: str = ""):
    return imagenet.get_config(f"L1_wide,{arg}")
