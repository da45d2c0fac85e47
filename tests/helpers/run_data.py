"""The data of a config, opened as the modes do."""

from nested.build.data import build_data
from nested.modes import encode


def latents_of(config, workdir, text=None):
    """(records, Latents) as the mode train opens them."""
    return encode.open_latents(build_data(config), str(workdir), text)


def decoder_of(config, workdir):
    """The Latents that samples are decoded with."""
    return build_data(config).open_decoder(str(workdir))


def split_of(config, source):
    """(records to train on, held-out batch)."""
    return encode.split_records(build_data(config), source)
