"""Backbones: the networks of the levels, each a linen module whose annotated fields are its options.

uvit, hdit, dit, nested_unet and res_mlp hold one network each, with its published variants (VARIANTS); backbone holds
their base classes, the other modules their blocks. Imports nested.ops and nothing else of ours.
"""

from nested.models.backbone import Backbone, TokenBackbone
from nested.models.dit import DiT
from nested.models.hdit import HDiT
from nested.models.nested_unet import NestedUNet
from nested.models.res_mlp import ResMLP
from nested.models.unet_nets import Net
from nested.models.uvit import UViT

__all__ = ["Backbone", "DiT", "HDiT", "Net", "NestedUNet", "ResMLP", "TokenBackbone", "UViT"]
