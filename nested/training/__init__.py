"""Training: the options, the optimizer, one step as a pure function, and the loop that runs steps to the end.

A step is built from levels, latents and an optimizer, and knows neither a config nor a data set. The package may import
nested.diffusion, nested.runtime and input_pipeline; import nested.training.loop by name, because it loads orbax.
"""

from nested.training.optimizer import Group, OptimizerConfig, make_optimizer
from nested.training.options import TrainOptions
from nested.training.step import Step, TrainState, init_state, train_step, validation_losses

__all__ = [
    "Group",
    "OptimizerConfig",
    "Step",
    "TrainOptions",
    "TrainState",
    "init_state",
    "make_optimizer",
    "train_step",
    "validation_losses",
]
