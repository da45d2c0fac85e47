"""What encoding asks of a frozen image encoder."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np


class Encoder(Protocol):
    """A frozen network: images -> the feature grids to store.

    features() can be traced by jax: its shapes are looked up before any work is done. nested/encoders/grids.py makes
    the grids out of an encoder's vector and map.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """The sha256 of the weights."""
        ...

    @property
    def params(self) -> Any:
        """Arrays, on the devices that features() is to run on."""
        ...

    @property
    def made_from(self) -> Mapping[str, Any]:
        """The options of config.encoder, by their names, that the features depend on."""
        ...

    def features(self, images: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """uint8 [B, H, W, C] -> {name: float32 [B, h, w, C']}, of every feature that the encoder was opened for."""
        ...
