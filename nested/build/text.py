"""Config -> the frozen text encoder of a run, before its weights are read."""

import dataclasses

from nested.build.options import Config, choose, construct
from nested.build.parts import TEXT_ENCODERS
from nested.build.sections import TextOptions
from nested.encoders.text_encoder import TextEncoder, TextNetwork, load_text_encoder


@dataclasses.dataclass(frozen=True)
class Text:
    """The text that levels see: its encoder, and how it is used."""

    network: TextNetwork
    options: TextOptions

    def open(self) -> TextEncoder:
        """Reads the weights and puts them on the device.

        Raises ValueError if the encoder gives features of another width than the option; as load_text_encoder.
        """
        options = self.options
        encoder = load_text_encoder(self.network, options.weights, options.max_tokens, options.dtype)
        if encoder.width != options.width:
            raise ValueError(
                f"config.text.width is {options.width} but {options.encoder} gives features of width {encoder.width}; "
                f"set it to {encoder.width}"
            )
        return encoder.on_devices()


def build_text(config: Config) -> Text | None:
    """The text of a run, None if config.text.encoder is ''."""
    options = construct("text", TextOptions, config.text, {})
    if not options.encoder:
        return None
    return Text(choose("text.encoder", options.encoder, TEXT_ENCODERS), options)
