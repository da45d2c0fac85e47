"""A backbone from outside of nested/: two layers per pixel, told of the time, the label and coarser levels' means."""

from typing import Annotated, Any

import flax.linen as nn

from nested.models import Backbone


class ToyBackbone(Backbone):
    """The network of a level whose variable is one array [B, h, w, c]."""

    width: Annotated[int, "channels of the hidden layer"] = 8
    num_classes: int = 0
    conditions: tuple[tuple[str, int | None], ...] = ()
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x, c_noise, cond, *, train):
        told = nn.Dense(self.width, name="time")(c_noise[:, None] / 1000)
        if self.num_classes:
            told += nn.Embed(self.num_classes + 1, self.width, name="label")(cond["label"])
        for name, _ in self.conditions:
            kept = cond[name].mean((1, 2)) * cond[f"keep_{name}"][:, None]
            told += nn.Dense(self.width, name=f"condition_{name}")(kept)
        hidden = nn.silu(nn.Dense(self.width, name="first")(x) + told[:, None, None])
        return nn.Dense(x.shape[-1], name="last")(hidden)
