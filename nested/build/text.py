"""Config -> the frozen text encoder of a run: the table of text encoders, and the only reader of config.text's part of
it."""

from nested.build.options import Config, choose
from nested.build.sources import source_kind
from nested.encoders import clip_text, minilm, t5, text_encoder
from nested.encoders.text_encoder import TextEncoder

TEXT_ENCODERS = {network.name: network for network in (minilm.NETWORK, t5.NETWORK, clip_text.NETWORK)}


def load_text_encoder(config: Config) -> TextEncoder | None:
    """The text encoder of a run, its parameters on the device; None if config.text.encoder is '' or the data are
    random. Raises ValueError if it gives features of another width than config.text.width."""
    options = config.text
    if not options.encoder or source_kind(config).synthetic:
        return None
    network = choose("text.encoder", options.encoder, TEXT_ENCODERS)
    encoder = text_encoder.load_text_encoder(network, options.weights, options.max_tokens, options.dtype)
    if encoder.width != options.width:
        raise ValueError(
            f"config.text.width is {options.width} but {options.encoder} gives features of width {encoder.width}; "
            f"set it to {encoder.width}"
        )
    return encoder.on_devices()
