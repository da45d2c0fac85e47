"""The parts that a config chooses by name: one table per kind. Adding a part is one file and one line here.

Values are what `construct` calls with the options that stand beside the name; nothing else in nested/build depends on
which of them was chosen.
"""

import functools

from input_pipeline.clips import ClipFolder
from input_pipeline.coco import Coco
from input_pipeline.digits import Digits
from input_pipeline.idx import Idx
from input_pipeline.image_files import ImageFolder, Tfds
from input_pipeline.imagenet import ImageNetTar
from input_pipeline.parquet import Parquet
from input_pipeline.synthetic import SyntheticLatents
from input_pipeline.webdataset import WebDataset, WebDatasetClips
from nested.diffusion import denoiser, schedules
from nested.diffusion.samplers import ddpm, dpm_solver, k_diffusion
from nested.encoders import clip_text, minilm, t5
from nested.encoders.efficientnet import NAME, EfficientNetOptions
from nested.encoders.vit import VARIANTS, VitOptions
from nested.models.dit import DiT
from nested.models.hdit import HDiT
from nested.models.nested_unet import NestedUNet
from nested.models.res_mlp import ResMLP
from nested.models.uvit import UViT
from nested.spaces.autoencoder_kl import AutoencoderKL
from nested.spaces.patch_pca import PatchPCA
from nested.spaces.pixels import Pixels
from nested.weights.fit import CONDITIONINGS as CONDITIONINGS

BACKBONES = {"uvit": UViT, "hdit": HDiT, "dit": DiT, "nested_unet": NestedUNet, "res_mlp": ResMLP}
SCHEDULES = {
    "sd_scaled_linear": schedules.sd_scaled_linear,
    "ldm_linear": schedules.ldm_linear,
    "cosine": schedules.cosine,
    "cosine_log_snr": schedules.cosine_log_snr,
    "ddpm_linear": schedules.ddpm_linear,
    "linear_vp": schedules.LinearVP,
    "exponential_ve": schedules.ExponentialVE,
}
DENSITIES = {
    "lognormal": schedules.LogNormal,
    "loglogistic": schedules.LogLogistic,
    "loguniform": schedules.LogUniform,
    "v_diffusion": schedules.VDiffusion,
    "cosine_interpolated": schedules.CosineInterpolated,
}
SAMPLERS = {
    "ddpm": ddpm.DDPM,
    "ddim": ddpm.DDIM,
    "dpm_solver": dpm_solver.DPMSolver,
    "euler_in_time": ddpm.EulerInTime,
    "euler_maruyama": ddpm.EulerMaruyama,
    "euler": k_diffusion.Euler,
    "heun": k_diffusion.Heun,
    "dpm2": k_diffusion.DPM2,
    "lms": k_diffusion.LMS,
    "euler_ancestral": k_diffusion.EulerAncestral,
    "dpm2_ancestral": k_diffusion.DPM2Ancestral,
    "dpmpp_2s_ancestral": k_diffusion.DPMpp2SAncestral,
    "dpmpp_sde": k_diffusion.DPMppSDE,
    "dpmpp_2m": k_diffusion.DPMpp2M,
    "dpmpp_2m_sde": k_diffusion.DPMpp2MSDE,
    "dpmpp_3m_sde": k_diffusion.DPMpp3MSDE,
}
THRESHOLDS = {
    "none": None,
    "static": functools.partial(denoiser.thresholded, percentile=None),
    "dynamic": functools.partial(denoiser.thresholded, percentile=0.995),
    "dynamic_100": functools.partial(denoiser.thresholded, percentile=0.995, maximum=100.0),
    "deepfloyd": functools.partial(denoiser.thresholded, percentile=0.95, maximum=1.5),
}
SOURCES = {
    "digits": Digits,
    "idx": Idx,
    "image_folder": ImageFolder,
    "clip_folder": ClipFolder,
    "tfds": Tfds,
    "imagenet_tar": ImageNetTar,
    "coco": Coco,
    "webdataset": WebDataset,
    "webdataset_clips": WebDatasetClips,
    "parquet": Parquet,
    "synthetic": SyntheticLatents,
}
SPACES = {codec.name: codec for codec in (Pixels, PatchPCA, AutoencoderKL)}
ENCODERS = {NAME: EfficientNetOptions} | dict.fromkeys(VARIANTS, VitOptions)
TEXT_ENCODERS = {network.name: network for network in (minilm.NETWORK, t5.NETWORK, clip_text.NETWORK)}
