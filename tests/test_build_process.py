"""nested/build/process.py: samplers, schedules and limits by their names, and the schedules of joint resolutions."""

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.refusals import refused
from helpers.tiny import with_changes

from configs import common
from nested.build.levels import build_levels
from nested.build.parts import SAMPLERS, SCHEDULES
from nested.build.process import build_process, build_sampler, side_ratios
from nested.diffusion import denoiser, samplers, schedules
from nested.diffusion.samplers import k_diffusion as sigma_samplers


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(name="ddpm", steps=7), samplers.DDPM(7)),
        (dict(name="ddim", steps=7, eta=0.5), samplers.DDIM(7, eta=0.5)),
        (common.dpm_solver(6), samplers.DPMSolver(6)),
        (dict(name="euler_in_time", steps=7), samplers.EulerInTime(7)),
        (dict(name="heun", steps=7, t_end=0.01), sigma_samplers.Heun(7, t_end=0.01)),
        (common.sigma_sampler("dpmpp_2m_sde", 9, 0.02, 80.0, solver_type="heun", eta=0.0),
         sigma_samplers.DPMpp2MSDE(9, "karras", 0.02, 80.0, 7.0, eta=0.0, solver_type="heun")),
    ],
)  # fmt: skip
def test_samplers_take_their_options(options, expected):
    assert build_sampler(options, "levels[0].sampler") == expected


def test_every_sampler_by_its_name():
    kinds = dict(ddim=samplers.DDIM, euler_maruyama=samplers.EulerMaruyama, euler=sigma_samplers.Euler,
                 dpm2=sigma_samplers.DPM2, lms=sigma_samplers.LMS,
                 euler_ancestral=sigma_samplers.EulerAncestral, dpm2_ancestral=sigma_samplers.DPM2Ancestral,
                 dpmpp_2s_ancestral=sigma_samplers.DPMpp2SAncestral, dpmpp_sde=sigma_samplers.DPMppSDE,
                 dpmpp_2m=sigma_samplers.DPMpp2M, dpmpp_3m_sde=sigma_samplers.DPMpp3MSDE)  # fmt: skip
    for name, kind in kinds.items():
        assert build_sampler(dict(name=name, steps=3), "levels[0].sampler") == kind(3)
    assert set(SAMPLERS) == {*kinds, "ddpm", "dpm_solver", "euler_in_time", "heun", "dpmpp_2m_sde"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_by_its_name(name):
    expected = dict(
        sd_scaled_linear=schedules.sd_scaled_linear(), cosine=schedules.cosine(), linear_vp=schedules.LinearVP(),
        ddpm_linear=schedules.PiecewiseVP(tuple(np.linspace(1e-4, 0.02, 1000).tolist())),
        ldm_linear=schedules.ldm_linear(),
        cosine_log_snr=schedules.cosine_log_snr(), exponential_ve=schedules.ExponentialVE(1e-3, 1e3),
    )  # fmt: skip
    built = build_process(dict(common.sd_process("v"), schedule=name), (8, 8, 3), "levels[0].process")[0]
    assert built.schedules == (expected[name],) and built.parameterization == "v"


def test_the_betas_of_rcgs_representations():
    """mocov3vitb_simplemlp_l12_w1536.yaml of LTH14/rcg: linear_start .0015, linear_end .0195, 1,000 steps."""
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    alpha, _ = schedules.ldm_linear()(np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(alpha**2, np.cumprod(1 - betas), rtol=1e-9)


@pytest.mark.parametrize(
    "name, percentile, maximum",
    [("static", None, np.inf), ("dynamic", 0.995, np.inf), ("dynamic_100", 0.995, 100), ("deepfloyd", 0.95, 1.5)],
)
def test_thresholds(name, percentile, maximum):
    def wild(x, t, cond):
        return 300 * x

    x = np.linspace(-1, 1, 8).reshape(1, 2, 4, 1)
    limit = build_levels(with_changes(("levels[2].threshold", name)))[2].threshold
    result = limit(wild)(x, None, {})
    np.testing.assert_array_equal(result, denoiser.thresholded(wild, percentile, maximum)(x, None, {}))
    assert np.abs(result).max() <= 1
    assert build_levels(tiny.get_config())[2].threshold is None


JOINT = ((4, 4, 3), (8, 8, 3), (4, 8, 8, 3))


def test_side_ratios():
    """Frames count as a grid of images: 16 of them are 4 x 4."""
    assert side_ratios((8, 8, 3)) == (1.0,)
    assert side_ratios(((64, 64, 3), (256, 256, 3), (1024, 1024, 3))) == (1, 4, 16)
    assert side_ratios(((64, 64, 3), (16, 64, 64, 3), (16, 256, 256, 3))) == (1, 4, 16)
    assert side_ratios(JOINT) == (1, 2, 4)


def test_every_resolution_has_its_shifted_schedule():
    process, scales = build_process(common.mdm_process(2.0), JOINT, "p")
    base = schedules.cosine()
    assert process.schedules == tuple(schedules.Shifted(base, scale, 2.0) for scale in (1.0, 2.0, 4.0))
    assert scales == () and process.parameterization == "v" and process.loss_space == "eps"
    np.testing.assert_allclose(process.c_noise(jax.numpy.array([0.001, 1.0])), [0, 999], atol=1e-4)
    one = build_process(dict(common.mdm_process(), shift_scale=4.0), (8, 8, 3), "p")[0]
    assert one.schedules == (schedules.Shifted(base, 4.0, 1.0),)


def test_rescaled_signal_has_one_schedule():
    options = dict(common.mdm_process(0.0), rescale_signal=True)
    process, scales = build_process(options, JOINT, "p")
    assert process.schedules == (schedules.cosine(),) and scales == (1, 2, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rescale_signal=True), "set rescale_signal to False or shift_power to 0"),
        (dict(shift_power=0.0, shift_scale=2.0), "shift_scale 2.0 has no effect with shift_power 0: set it to 1"),
        (dict(shift_scale=-1.0), "Shifted: scale = -1.0: expected a positive number"),
    ],
)
def test_contradicting_shifts(change, message):
    refused(build_process, common.mdm_process() | change, JOINT, "p", match=message)
