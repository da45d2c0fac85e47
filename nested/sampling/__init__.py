"""Sampling: requests for samples, and the generator that draws whole hierarchies in compiled batches.

Sample i is a function of the seed and i alone. The package takes plain arguments and no config; it may import
nested.diffusion and nested.runtime.
"""

from nested.sampling.generator import Decoder, Generator, Programs, make_generator
from nested.sampling.requests import PromptEncoder, choose_labels, choose_prompts, sample_keys

__all__ = [
    "Decoder",
    "Generator",
    "Programs",
    "PromptEncoder",
    "choose_labels",
    "choose_prompts",
    "make_generator",
    "sample_keys",
]
