"""Config -> objects: the only package beside modes that reads a config. It allocates, writes and reads nothing.

Parts declare their options as annotated fields (options.py), parts.py has one table of parts per kind, and sections.py
says what a config holds. It may import every package below it: all but nested.modes.
"""

from nested.build.levels import build_backbone, build_level, build_levels, trained_level_names
from nested.build.options import Config, Option, construct, declared, default_values, from_plain, to_plain
from nested.build.presets import check_preset
from nested.build.process import build_process, build_sampler
from nested.build.reference import option_reference
from nested.build.saved import upgrade_saved_config
from nested.build.sections import SECTIONS, check_sections, default_options
from nested.build.sources import build_data_options, build_images, build_source
from nested.build.training import (
    STATE_KEYS,
    batch_spans,
    build_optimizer,
    check_batch_size,
    check_images_exist,
    check_init_from,
    split_phases,
)

__all__ = [
    "SECTIONS",
    "STATE_KEYS",
    "Config",
    "Option",
    "batch_spans",
    "build_backbone",
    "build_data_options",
    "build_images",
    "build_level",
    "build_levels",
    "build_optimizer",
    "build_process",
    "build_sampler",
    "build_source",
    "check_batch_size",
    "check_images_exist",
    "check_init_from",
    "check_preset",
    "check_sections",
    "construct",
    "declared",
    "default_options",
    "default_values",
    "from_plain",
    "option_reference",
    "split_phases",
    "to_plain",
    "trained_level_names",
    "upgrade_saved_config",
]
