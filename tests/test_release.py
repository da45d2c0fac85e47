"""configs/uvit_release.py and ml-mdm's files: the released networks by their numbers, and from a file to images.

The released files were not at hand: random weights are written as they lay theirs out, for networks made small."""

import importlib

import jax
import numpy as np
import pytest
from helpers.text_encoders import hugging_face_clip, small_clip, write_clip_tokenizer
from helpers.tiny import run_main
from helpers.weight_files import Call, write_state
from PIL import Image
from safetensors.numpy import save_file

from configs import uvit_release
from nested.build.levels import build_levels
from nested.build.options import to_plain
from nested.build.training import abstract_state
from nested.diffusion import samplers, schedules
from nested.modes import sample, summary
from nested.runtime import partition
from nested.weights import files as weights
from nested.weights.exchange import load_parameters


@pytest.fixture
def network():
    return small_clip()


# --- the numbers of the releases ---------------------------------------------------------------------------------

COUNTS = {  # million parameters, GMACs of matrix products and norms; null: ours, of the same networks at other sizes
    "imagenet256_large": (286.76, 76.51),
    "imagenet256_huge": (500.83, 133.28),
    "coco_small": (44.69, 16.25),
    "coco_deep": (58.35, 21.27),
    "cifar10": (44.26, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_those_that_were_counted_on_the_authors_code(name):
    parameters, macs = COUNTS[name]
    (row,) = summary.summarize_levels(build_levels(uvit_release.get_config(name)))
    assert row.parameters / 1e6 == pytest.approx(parameters, abs=0.01)
    assert macs is None or row.macs / 1e9 == pytest.approx(macs, abs=0.01)
    assert row.tokens == 256


def shapes_of(config):
    """{name in torch: shape} of the config's only level."""
    (template,) = abstract_state(config).ema.values()
    return {name: array.shape for name, array in random_state(template).items()}


def random_state(template, scale=0.0):
    random = np.random.default_rng(0)
    return weights.to_torch(
        jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape) if not scale else
                     (scale * random.normal(size=leaf.shape)).astype(np.float32), template)
    )  # fmt: skip


def test_names_and_shapes_of_the_huge_model():
    shapes = shapes_of(uvit_release.get_config("imagenet256_huge"))
    expected = {
        "label_emb.weight": (1001, 1152), "pos_embed": (1, 258, 1152), "patch_embed.proj.weight": (1152, 4, 2, 2),
        "in_blocks.13.attn.qkv.weight": (3456, 1152), "mid_block.mlp.fc1.bias": (4608,),
        "out_blocks.13.skip_linear.weight": (1152, 2304), "decoder_pred.weight": (16, 1152), "norm.bias": (1152,),
    }  # fmt: skip
    assert shapes | expected == shapes
    assert not [name for name in shapes if name.startswith(("final_layer", "time_embed", "in_blocks.14"))]
    assert not [name for name in shapes if name.endswith("qkv.bias")]
    large = shapes_of(uvit_release.get_config("imagenet512_large"))
    assert large["final_layer.weight"] == (4, 4, 3, 3) and large["patch_embed.proj.weight"] == (1024, 4, 4, 4)


@pytest.mark.parametrize("name", uvit_release.MODELS)
def test_sampling_is_that_of_the_release(name):
    """configs/*.py, eval.py, eval_ldm.py, eval_ldm_discrete.py and eval_t2i_discrete.py of U-ViT."""
    config = uvit_release.get_config(name)
    (level,) = build_levels(config)
    process, pixels = level.process, name in ("cifar10", "celeba64")
    if "large" in name or pixels:
        assert process.schedules == (schedules.LinearVP(0.1, 20.0),)
        assert (process.discrete_steps, process.time_scale, process.time_offset) == (0, 999.0, 0.0)
        old = samplers.DPMSolver(50, 3, "dpm_solver", "fast", "log_snr", "log_snr", t_end=1e-4)
        assert level.sampler == (samplers.EulerMaruyama(1000, 1e-3) if pixels else old)
    else:
        assert process.schedules == (schedules.sd_scaled_linear(),)
        assert (process.discrete_steps, process.time_scale) == (1000, 1000.0)
        assert level.sampler == samplers.DPMSolver(50, 3, "dpm_solver++", "fast", t_end=1e-3)
    assert (process.parameterization, process.loss_space, level.threshold) == ("eps", "eps", None)
    assert level.guidance == (1.0 if "coco" in name else 0.0 if pixels else 0.7 if "512" in name else 0.4)
    assert level.num_classes == (1000 if "imagenet" in name else 0)
    assert level.cond_drop == (0.0 if pixels else 0.15 if "large" in name else 0.1)
    assert config.codec.scale == (0.0 if pixels else 0.23010 if "coco" in name else 0.18215)


TRAINING = {  # steps, batch size, betas, warm-up steps, mirrored: configs/*.py of U-ViT and its data sets
    "imagenet256_large": (300_000, 1024, 0.99, 0.99, 5000, True),
    "imagenet256_huge": (500_000, 1024, 0.99, 0.99, 5000, True),
    "imagenet512_large": (500_000, 1024, 0.99, 0.99, 5000, True),
    "imagenet512_huge": (500_000, 1024, 0.99, 0.99, 5000, True),
    "coco_small": (1_000_000, 256, 0.9, 0.9, 5000, False),
    "coco_deep": (1_000_000, 256, 0.9, 0.9, 5000, False),
    "cifar10": (500_000, 128, 0.99, 0.999, 2500, True),
    "celeba64": (500_000, 128, 0.99, 0.99, 5000, True),
}


@pytest.mark.parametrize("name", uvit_release.MODELS)
def test_training_is_that_of_the_release(name):
    config = uvit_release.get_config(name)
    train_, some = config.train, config.optimizer
    found = (train_.steps, train_.batch_size, some.b1, some.b2, some.warmup_steps, config.data.flip)
    assert found == TRAINING[name]
    assert (some.learning_rate, some.weight_decay, some.ema_decay, train_.dtype) == (2e-4, 0.03, 0.9999, "float32")


@pytest.mark.parametrize("name, steps, eta", [("s64", 50, 0.0), ("s64s256", 100, 0.0), ("s64s256s1024", 250, 1.0)])
def test_ml_mdm_samples_as_its_demo(name, steps, eta):
    config = importlib.import_module("configs.mdm").get_config(f"{name},released")
    (level,) = build_levels(config)
    assert config.train.dtype == "bfloat16"
    assert level.sampler == samplers.DDIM(steps, eta=eta, grid="released") and level.guidance == 6.5
    assert level.threshold.keywords == dict(percentile=0.95, maximum=1.5)


# --- from a file to images ---------------------------------------------------------------------------------------


def shrunk(config, shape, steps, weights=""):
    """The config with a small U-ViT, a small autoencoder (2x2 pixels a position) and few steps."""
    level = config.levels[0]
    level.shape = shape
    level.backbone.update(width=32, depth=2, num_heads=2)
    level.sampler.steps = steps
    config.sample.update(num_samples=4, batch_size=4, columns=4)
    if config.codec.name == "sd_vae":
        config.codec.update(patch=2, weights=weights, batch_size=4)
    return config


def abstract(config):
    shapes, whole = abstract_state(config).ema, partition.replicated(partition.make_mesh(-1, 1))
    return partition.abstract(shapes, jax.tree.map(lambda _: whole, shapes))


def released(config, path, around=lambda content: content):
    """A file of random weights as a release lays them out; what it holds, as parameters."""
    (template,) = abstract_state(config).ema.values()
    state = random_state(template, 0.1)
    write_state(path, state, around)
    return {config.levels[0].name: weights.from_torch(state, template)}


@pytest.fixture(scope="module")
def autoencoder(golden, tmp_path_factory):
    """The file of a small autoencoder, recorded from diffusers."""
    path = tmp_path_factory.mktemp("codec") / "vae.npz"
    np.savez(path, **{name[2:]: x for name, x in golden("enc_sd_vae.npz").items() if name.startswith("w/")})
    return str(path)


def check_samples(config, params, workdir, side):
    """The mode sample with the weight file WORKDIR/w.pth draws what the parameters in it give."""
    sample.run(config, str(workdir), 4, "", str(workdir / "w.pth"))
    with np.load(workdir / "samples_4.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (4, side, side, 3) and images.std() > 2
    assert np.asarray(Image.open(workdir / "samples_4.png")).size >= images.size
    generator, _, step = sample.open_generator(config, str(workdir), str(workdir / "w.pth"))
    np.testing.assert_array_equal(images, generator.images(jax.tree.map(jax.numpy.asarray, params), 4, "samples"))
    assert step == 0


def test_imagenet_from_a_file_to_images(autoencoder, tmp_path):
    config = shrunk(uvit_release.get_config("imagenet256_huge"), (8, 8, 4), 3, autoencoder)
    check_samples(config, released(config, tmp_path / "w.pth"), tmp_path, 16)
    assert not (tmp_path / "latents").exists()  # nothing was encoded, no data were needed


def test_coco_from_a_file_to_images(autoencoder, network, tmp_path):
    write_clip_tokenizer(tmp_path / "tokenizer.json")
    save_file(hugging_face_clip(network, ""), tmp_path / "model.safetensors")
    config = shrunk(uvit_release.get_config("coco_small"), (8, 8, 4), 3, autoencoder)
    config.text.update(weights=str(tmp_path), width=64)
    config.sample.prompts = ("a red apple", "apple")
    check_samples(config, released(config, tmp_path / "w.pth"), tmp_path, 16)
    lines = (tmp_path / "samples_4.txt").read_text().splitlines()
    assert lines == ["0\ta red apple", "1\tapple", "2\ta red apple", "3\tapple"]


def test_the_command_line_takes_a_file(tmp_path):
    """python main.py --mode=sample --weights=FILE in a process of its own."""
    options = {"width": 32, "depth": 2, "num_heads": 2}
    config = shrunk(uvit_release.get_config("cifar10"), (32, 32, 3), 4)
    released(config, tmp_path / "w.pth")
    run_main(
        f"--workdir={tmp_path}", "--mode=sample", "--num_samples=4", f"--weights={tmp_path / 'w.pth'}",
        f"--out={tmp_path / 'drawn.png'}", "--config.sample.batch_size=4", "--config.levels[0].sampler.steps=4",
        *(f"--config.levels[0].backbone.{key}={value}" for key, value in options.items()),
        config="configs/uvit_release.py:cifar10",
    )  # fmt: skip
    with np.load(tmp_path / "drawn.npz") as archive:
        assert archive["arr_0"].shape == (4, 32, 32, 3) and archive["arr_0"].std() > 2


@pytest.mark.parametrize("name", ["s64", "s64s256"])
def test_ml_mdm_files_load(name, tmp_path):
    """vis_model_64x64.pth: the EMA under 'state_dict', beside options as objects of ml-mdm's classes."""
    config = importlib.import_module("configs.mdm").get_config(f"{name},released")
    level = config.levels[0]
    level.backbone.update(time_width=32, text_proj=8)
    level.backbone.nets = tuple(
        dict(net, channels=(32,) * len(net["channels"]), resnets=(1,) * len(net["resnets"]),
             attention=tuple(min(count, 1) for count in net["attention"]))
        for net in level.backbone.nets
    )  # fmt: skip
    args = Call("argparse Namespace", Call("models.nested_unet NestedUNetConfig", "x"))
    params = released(config, tmp_path / "w.pth", lambda content: {"state_dict": content, "args": args, "loss": 0.1})
    loaded = load_parameters(str(tmp_path / "w.pth"), to_plain(config), abstract(config))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {"lm_proj.weight", "cond_emb.weight", "cond_layers.scale.0.weight"} <= {
        name.removeprefix("inner_unet.") for name in weights.to_torch(params["x"])
    }
