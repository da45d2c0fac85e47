"""Encoding a data set once: what is expensive is stored, and read back as the variables of the levels.

job plans a run of encoding, passes does the work, cost measures it beforehand, store reads the result, and captions
stores the features of texts. Imports nested.spaces, encoders and runtime, and input_pipeline.
"""

from nested.latents.captions import store_captions
from nested.latents.job import EncodingOptions, Job, plan_job
from nested.latents.passes import encode
from nested.latents.store import Latents, format_report, latents_of_images, read_latents

__all__ = [
    "EncodingOptions",
    "Job",
    "Latents",
    "encode",
    "format_report",
    "latents_of_images",
    "plan_job",
    "read_latents",
    "store_captions",
]
