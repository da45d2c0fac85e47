"""Frozen networks by their public weights: images or captions -> features, as pure functions.

efficientnet and vit encode images, into the grids of grids.py; t5, minilm and clip_text encode captions. Each declares
its options and reads its own files. Imports nested.weights and runtime, and input_pipeline.
"""

from nested.encoders.efficientnet import EfficientNetLite0, load_efficientnet
from nested.encoders.encoder import Encoder, EncoderOptions
from nested.encoders.text_encoder import TextEncoder, TextNetwork, load_text_encoder
from nested.encoders.vit import VitEncoder, load_vit

__all__ = [
    "EfficientNetLite0",
    "Encoder",
    "EncoderOptions",
    "TextEncoder",
    "TextNetwork",
    "VitEncoder",
    "load_efficientnet",
    "load_text_encoder",
    "load_vit",
]
