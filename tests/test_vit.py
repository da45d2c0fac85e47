"""The frozen vision transformers against the authors' code, file by file, and what their loader refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import toy_encoding, weight_files

from nested.encoders import vit, vit_files
from nested.weights import files as weights

# Widths of the recorded networks; what else distinguishes them is the variant's.
TINY = {
    "mocov3_vitb16": dict(width=48, depth=3, heads=4, grid=3, hidden=96),
    "dino_vitb16": dict(width=48, depth=3, heads=4, patch=8, grid=4, hidden=96),
    "dinov2_vitb14": dict(width=48, depth=2, heads=4, grid=4, hidden=96),
    "clip_vitb16": dict(width=48, depth=3, heads=4, patch=8, grid=4, hidden=96, projector=(24,)),
    "dinov2_vitb14_reg": dict(width=16, depth=2, heads=2, patch=4, grid=7, hidden=32, registers=3),
    "mae_vitb16": dict(width=16, depth=1, heads=2, patch=4, grid=3, hidden=32),
}
# golden, variant, input, {output of ours: (theirs, which of its tokens)}
CLS, PATCHES = np.s_[:, 0], np.s_[:, 1:]
CASES = [
    ("enc_mocov3", "mocov3_vitb16", "x", dict(cls=("tokens", CLS), last=("tokens", PATCHES))),
    ("enc_dino", "dino_vitb16", "x_rect", dict(cls=("last_1_rect", CLS), last=("last_1_rect", PATCHES))),
    ("enc_dinov2", "dinov2_vitb14", "x_rect", dict(cls=("rect_clstoken", ...), last=("rect_patchtokens", ...))),
    (
        "enc_clip_vision", "clip_vitb16", "pixel_values",
        dict(cls=("post_ln_tokens", CLS), last=("post_ln_tokens", PATCHES), projected=("image_embeds", ...)),
    ),
    ("enc_dinov2_registers", "dinov2_vitb14_reg", "x", dict(cls=("x", CLS), last=("x", np.s_[:, 4:]))),
    ("enc_dinov2_registers", "dinov2_vitb14_reg", "rect", dict(cls=("rect", CLS), last=("rect", np.s_[:, 4:]))),
    ("enc_mae", "mae_vitb16", "x", dict(cls=("x", CLS), last=("x", PATCHES))),
]  # fmt: skip


def tiny(name):
    return dataclasses.replace(vit.VARIANTS[name], **TINY[name])


def weights_of(recorded):
    return {name[2:]: np.asarray(array, np.float32) for name, array in recorded.items() if name.startswith("w/")}


def openai_names(tensors):
    """CLIP's tower by OpenAI's names: queries, keys and values as one tensor, the projection transposed."""
    words = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.patch_embedding": "conv1", "vision_model.pre_layrnorm": "ln_pre",
        "vision_model.post_layernorm": "ln_post", "vision_model.encoder.layers": "transformer.resblocks",
        "self_attn.out_proj": "attn.out_proj", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    renamed = {"visual.proj": tensors["visual_projection.weight"].T}
    for name, array in tensors.items():
        if "q_proj" in name:
            array = np.concatenate([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for old, new in words.items():
            name = name.replace(old, new)
        if "k_proj" not in name and "v_proj" not in name and name != "visual_projection.weight":
            renamed[f"visual.{name}"] = array
    return renamed


def layout_of(network):
    return vit_files.FAMILIES[network.family].layouts[0]


def close(found, wanted, message, tolerance=1e-5):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    atol = tolerance * np.abs(wanted).max()
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=0, atol=atol, err_msg=message)


# --- the network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, name, image, outputs", CASES)
def test_equals_the_authors_code(golden, file, name, image, outputs):
    """enc_*.npz (tests/golden/README.md): tokens to 1e-5 of the largest, square images and others."""
    recorded, network = golden(f"{file}.npz"), tiny(name)
    tensors = weights_of(recorded)
    tensors = {key: tensors[key] for key in vit_files.shapes(network, layout_of(network), "projected" in outputs)}
    params = vit_files.params(tensors, network, layout_of(network), "projected" in outputs, "float32")
    x_BHWC = recorded[f"in/{image}"].astype(np.float32).transpose(0, 2, 3, 1)
    found = vit.forward(params, x_BHWC, network, tuple(outputs))
    for output, (theirs, tokens) in outputs.items():
        assert found[output].dtype == jnp.float32
        close(found[output], recorded[f"out/{theirs}"][tokens], f"{file} {image} {output}")
    pooled = vit.forward(params, x_BHWC, network, ("pool", "last"))
    close(pooled["pool"], pooled["last"].mean((1, 2)), "pool is the mean of the patches")


def test_openai_names_are_the_same_network(golden):
    tensors, network = weights_of(golden("enc_clip_vision.npz")), tiny("clip_vitb16")
    trees = [
        vit_files.params(by_name, network, layout, True, "float32")
        for by_name, layout in ((tensors, vit_files.TRANSFORMERS), (openai_names(tensors), vit_files.OPENAI))
    ]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_mocov3_projector_equals_torch(golden):
    """enc_vit_parts.npz: three layers with batch norms in evaluation, as RCG takes MoCo-v3's vectors."""
    recorded = golden("enc_vit_parts.npz")
    network = dataclasses.replace(tiny("mae_vitb16"), projector=(12, 12, 6))
    layers = vit_files._projector(weights_of(recorded), network, vit_files.TIMM, "float32")
    x = recorded["in/cls"]
    for i, layer in enumerate(layers):
        x = vit._linear(layer, jax.nn.relu(x) if i else x)
    close(x, recorded["out/projected"], "projector")


def test_computes_in_float64_where_asked(golden, x64):
    recorded, network = golden("enc_mae.npz"), tiny("mae_vitb16")
    params = vit_files.params(weights_of(recorded), network, vit_files.TIMM, False, "float32")
    params = jax.tree.map(lambda array: array.astype(np.float64), params)
    x_BHWC = recorded["in/x"].astype(np.float64).transpose(0, 2, 3, 1)
    found = vit.forward(params, x_BHWC, network, ("cls",))["cls"]
    assert found.dtype == jnp.float64
    close(found, recorded["out/x"][:, 0], "cls")
    assert vit.prepare(np.zeros((1, 4, 4, 3)), network, 8).dtype == jnp.float64


def test_bfloat16_products_and_float32_sums(golden):
    recorded, network = golden("enc_mae.npz"), tiny("mae_vitb16")
    params = vit_files.params(weights_of(recorded), network, vit_files.TIMM, False, "bfloat16")
    dtypes = {"/".join(key.key for key in path): leaf.dtype for path, leaf in jax.tree.leaves_with_path(params)}
    products = {name for name in dtypes if name.endswith("weight") and "norm" not in name}
    assert {name for name, dtype in dtypes.items() if dtype == jnp.bfloat16} == products and len(products) == 5
    found = vit.forward(params, recorded["in/x"].astype(np.float32).transpose(0, 2, 3, 1), network, ("last",))["last"]
    assert found.dtype == jnp.float32
    close(found, recorded["out/x"][:, 1:], "bfloat16", tolerance=2e-2)
    with pytest.raises(AssertionError):
        close(found, recorded["out/x"][:, 1:], "it is not float32", tolerance=1e-4)


def test_positions_of_the_native_grid_are_as_they_are():
    """DINO's offset would move them: its code does not interpolate there."""
    network = tiny("dino_vitb16")
    table_NC = jnp.asarray(np.random.default_rng(0).normal(size=(17, 48)), jnp.float32)
    np.testing.assert_array_equal(vit._positions(table_NC, network, 4, 4), table_NC)
    assert np.abs(vit.interpolation(4, 4, 0.1, False) - np.eye(4)).max() > 0.01
    np.testing.assert_array_equal(vit.interpolation(4, 4, 0.0, False), np.eye(4))
    np.testing.assert_allclose(vit.interpolation(4, 9, 0.0, True).sum(1), 1.0)


def test_images_are_resized_as_torch_does(golden):
    """enc_vit_parts.npz: torch.nn.functional.interpolate, bicubic with antialias, up and down, of 18 x 12 pixels."""
    recorded, network = golden("enc_vit_parts.npz"), vit.VARIANTS["clip_vitb16"]
    images = recorded["in/image"].transpose(0, 2, 3, 1)
    for size in (7, 12, 25):
        wanted = recorded[f"out/resized{size}"].transpose(0, 2, 3, 1) / 255
        wanted = (wanted - np.asarray(network.mean)) / np.asarray(network.std)
        close(vit.prepare(images, network, size), wanted, str(size), tolerance=2e-6)
    grey = vit.prepare(images[..., :1], network, 7)
    np.testing.assert_array_equal(grey, vit.prepare(np.repeat(images[..., :1], 3, 3), network, 7))


@pytest.mark.parametrize(
    "name, millions",
    [
        ("mocov3_vits16", 21.665_664), ("mocov3_vitb16", 85.798_656), ("dino_vits16", 21.665_664),
        ("dino_vitb16", 85.798_656), ("mae_vitb16", 85.798_656), ("dinov2_vitb14", 86.580_480 - 0.000_768),
        ("dinov2_vitl14", 304.368_640 - 0.001_024), ("dinov2_vitb14_reg", 86.583_552 - 0.000_768),
        ("dinov2_vitl14_reg", 304.372_736 - 0.001_024), ("clip_vitb16", 86.192_640), ("clip_vitl14", 303.966_208),
    ],
)  # fmt: skip
def test_full_size(name, millions):
    """Parameters as the public counts (timm, transformers), DINOv2 without its mask token; shapes at 224 pixels."""
    network = vit.VARIANTS[name]
    projected = network.family == "clip"
    shapes = vit_files.shapes(network, layout_of(network), projected)
    assert sum(np.prod(shape) for shape in shapes.values()) == round(millions * 1e6)
    structs = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
    params = jax.eval_shape(lambda t: vit_files.params(t, network, layout_of(network), projected, "float32"), structs)
    names = ("cls", "pool", "last") + (("projected",) if projected else ())
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), np.uint8)
    found = jax.eval_shape(lambda p, x: vit.forward(p, vit.prepare(x, network, 224), network, names), params, images)
    side, width = 224 // network.patch, network.width
    wanted = {"cls": (2, width), "pool": (2, width), "last": (2, side, side, width)}
    wanted |= {"projected": (2, {768: 512, 1024: 768}[width])} if projected else {}
    assert {key: value.shape for key, value in found.items()} == wanted
    assert network.heads == (12 if width < 1024 else 16) - 6 * (name == "dino_vits16")


# --- the files ---------------------------------------------------------------------------------------------------


def save(path, content):
    """A torch zip of nested dicts of arrays and other values."""
    storages, kinds = {}, {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}

    def stored(value):
        if isinstance(value, dict):
            return {key: stored(part) for key, part in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        key, array = str(len(storages)), np.ascontiguousarray(value)
        storages[key] = array
        strides = tuple(step // array.itemsize for step in array.strides)
        return weight_files.tensor(kinds[array.dtype], key, array.size, 0, array.shape, strides)

    weight_files.write_zip(path, stored(content), storages)
    return path


def behind(prefix, tensors):
    return {prefix + name: array for name, array in tensors.items()}


def head(width):
    """MoCo-v3's projector as in its checkpoint."""
    rng, layers, width_in = np.random.default_rng(1), {}, width
    for i, out in enumerate((12, 12, 6)):
        layers[f"head.{3 * i}.weight"] = rng.normal(size=(out, width_in)).astype(np.float32)
        for leaf in ("weight", "bias", "running_mean", "running_var")[2 * (i == 2) :]:
            layers[f"head.{3 * i + 1}.{leaf}"] = rng.uniform(0.5, 1, out).astype(np.float32)
        layers[f"head.{3 * i + 1}.num_batches_tracked"] = np.asarray(7)
        width_in = out
    return layers


@pytest.fixture(scope="module")
def files(tmp_path_factory, golden):
    """{variant: (released layout of its file, its tensors)}, of the recorded networks."""
    folder, found = tmp_path_factory.mktemp("vits"), {}
    own = {name: weights_of(golden(f"{file}.npz")) for file, name, *_ in CASES}
    own["mocov3_vitb16"] = {k: v for k, v in own["mocov3_vitb16"].items() if not k.startswith("head")}
    zeros = {name: {key: np.zeros_like(value) for key, value in part.items()} for name, part in own.items()}
    extra = np.zeros((2, 2), np.float32)
    moco, momentum = "module.base_encoder.", "module.momentum_encoder."
    trees = {
        "mocov3_vitb16": {
            "epoch": 300, "arch": "vit_base", "optimizer": {"state": {0: {"momentum_buffer": extra}}},
            "state_dict": behind(moco, own["mocov3_vitb16"] | head(48))
            | behind(momentum, zeros["mocov3_vitb16"] | head(48))
            | {"module.predictor.0.weight": extra},
        },
        "dino_vitb16": {
            "student": behind("module.backbone.", zeros["dino_vitb16"]) | {"module.head.mlp.0.weight": extra},
            "teacher": behind("backbone.", own["dino_vitb16"]) | {"head.last_layer.weight_v": extra},
            "optimizer": {"state": {}}, "epoch": 400, "dino_loss": {"center": extra},
        },
        "mae_vitb16": {"model": own["mae_vitb16"] | {"mask_token": extra, "decoder_blocks.0.norm1.weight": extra[0]}},
        "dinov2_vitb14": own["dinov2_vitb14"],
        "dinov2_vitb14_reg": own["dinov2_vitb14_reg"],
        "clip_vitb16": own["clip_vitb16"] | {
            "text_model.final_layer_norm.weight": extra[0], "text_projection.weight": extra,
            "logit_scale": np.ones((), np.float32), "vision_model.embeddings.position_ids": np.arange(17)[None],
        },
    }  # fmt: skip
    for name, tree in trees.items():
        found[name] = save(folder / vit.VARIANTS[name].released, tree), own[name]
    openai = behind("", openai_names(own["clip_vitb16"])) | {
        "transformer.resblocks.0.ln_1.weight": extra[0], "token_embedding.weight": extra, "ln_final.weight": extra[0],
        "positional_embedding": extra, "text_projection": extra, "logit_scale": np.ones((), np.float32),
    }  # fmt: skip
    return found, save(folder / "openai.pt", openai)


@pytest.fixture
def tiny_variants(monkeypatch):
    for name in TINY:
        monkeypatch.setitem(vit.VARIANTS, name, tiny(name))
    monkeypatch.setitem(
        vit.VARIANTS, "mocov3_vitb16", dataclasses.replace(tiny("mocov3_vitb16"), projector=(12, 12, 6))
    )


def load(name, path, **changes):
    patch = vit.VARIANTS[name].patch
    options = dict(input_size=3 * patch, map="last", vector="cls", features=("map",), prefix="", dtype="float32")
    return vit.load_vit(name, path, **options | changes)


@pytest.mark.parametrize("name", TINY)
def test_reads_the_file_as_it_was_released(files, tiny_variants, name):
    """Behind its wrapper, beside what the network does not need: the right one of several, nothing else."""
    (path, tensors), network = files[0][name], vit.VARIANTS[name]
    encoder = load(name, path)
    tensors = {key: tensors[key] for key in vit_files.shapes(network, layout_of(network), False)}
    wanted = vit_files.params(tensors, network, layout_of(network), False, "float32")
    jax.tree.map(np.testing.assert_array_equal, encoder.params, wanted)
    assert len(encoder.fingerprint) == 64 and encoder.name == name


def test_reads_openais_file(files, tiny_variants):
    found = [load("clip_vitb16", path, vector="projected") for path in (files[0]["clip_vitb16"][0], files[1])]
    jax.tree.map(np.testing.assert_array_equal, *(encoder.params for encoder in found))


def test_the_prefix_takes_the_other_encoder(files, tiny_variants):
    path = files[0]["mocov3_vitb16"][0]
    assert np.any(np.asarray(load("mocov3_vitb16", path).params["cls"]["tokens"]))
    momentum = load("mocov3_vitb16", path, prefix="state_dict.module.momentum_encoder.")
    assert not np.any(np.asarray(momentum.params["cls"]["tokens"]))
    with pytest.raises(ValueError, match=r"no 'state_dict.ema.cls_token'; the file has it behind 'state_dict.mod"):
        load("mocov3_vitb16", path, prefix="state_dict.ema")


def test_a_folder_is_read_whole(files, tiny_variants, tmp_path):
    """As transformers saves a model, in two shards: both count for the fingerprint."""
    tensors, whole = files[0]["clip_vitb16"][1], load("clip_vitb16", files[0]["clip_vitb16"][0])
    shards = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, path in enumerate(shards):
        weights.write_safetensors(path, dict(list(tensors.items())[i::2]), {})
    encoder = load("clip_vitb16", str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, encoder.params, whole.params)
    assert encoder.fingerprint == "-".join(map(weights.sha256, shards))


def test_features_are_grids_of_vectors_and_of_the_map(files, tiny_variants):
    encoder = load(
        "mocov3_vitb16", files[0]["mocov3_vitb16"][0], vector="projected", features=("crops1", "crops2", "map", "map2")
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), np.uint8)
    found = encoder.features(images)
    shapes = {"crops1": (2, 1, 1, 6), "crops2": (2, 2, 2, 6), "map": (2, 3, 3, 48), "map2": (2, 2, 2, 48)}
    assert {name: grid.shape for name, grid in found.items()} == shapes
    assert all(grid.dtype == jnp.float32 for grid in found.values())
    crop = dataclasses.replace(encoder, feature_names=("crops1",)).features(images[:, :10, 10:])
    np.testing.assert_allclose(found["crops2"][:, 0, 1], crop["crops1"][:, 0, 0], rtol=1e-5, atol=1e-6)
    by_hand = vit.forward(encoder.params, vit.prepare(images, encoder.vit, 48), encoder.vit, ("projected", "last"))
    np.testing.assert_allclose(found["crops1"][:, 0, 0], by_hand["projected"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["map"], by_hand["last"], rtol=1e-5, atol=1e-6)
    last = dataclasses.replace(encoder, vector="pool", feature_names=("crops1",)).features(images)["crops1"]
    np.testing.assert_allclose(last[:, 0, 0], by_hand["last"].mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_encodes_and_tells_its_options_apart(files, tiny_variants, tmp_path):
    """A run of nested/latents/passes.py; products in bfloat16, or another encoder of the same file, make other
    latents."""
    path = files[0]["mocov3_vitb16"][0]
    config = dataclasses.replace(toy_encoding.CONFIG, features=("crops1", "map2"), components=(4,))

    def encode(**changes):
        encoder = load("mocov3_vitb16", path, vector="projected", features=config.features, **changes)
        toy_encoding.run(tmp_path, encoder=encoder, config=config)

    encode()
    rows = toy_encoding.batch(tmp_path)
    assert (rows["crops1"].shape, rows["map2"].shape) == ((44, 1, 1, 4), (44, 2, 2, 4))
    for changes, message in (
        ({"dtype": "bfloat16"}, "were made with encoder.dtype float32, config says bfloat16"),
        ({"prefix": "state_dict.module.momentum_encoder"}, "made with encoder.prefix , config says state_dict.module"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_size": 50}, "encoder.input_size: 50 given; mocov3_vitb16 takes positive multiples of its patch, 16"),
        ({"input_size": 0}, "encoder.input_size: 0 given"),
        ({"map": "stage4"}, "encoder.map: 'stage4' given; mocov3_vitb16 takes 'last'"),
        ({"vector": "mean"}, "encoder.vector: 'mean' given; mocov3_vitb16 takes 'cls', 'pool', 'projected'"),
        ({"dtype": "float16"}, "encoder.dtype: 'float16' given; mocov3_vitb16 takes 'float32', 'bfloat16'"),
        ({"features": ("crops3",)}, "encoder.features: 'crops3' given"),
    ],
)
def test_refuses_options(changes, message):
    refused(message, "mocov3_vitb16", "absent.pth", **changes)


def refused(message, name, path, error=ValueError, **changes):
    with pytest.raises(error) as raised:
        load(name, path, **changes)
    assert message in str(raised.value) and "\n" not in str(raised.value), str(raised.value)


def test_networks_without_a_projection_say_so():
    for name in ("dino_vits16", "dinov2_vitl14_reg", "mae_vitb16"):
        refused(f"'projected' given; {name} takes 'cls', 'pool'", name, "absent.pth", vector="projected")


def test_no_file():
    message = "mae_vitb16 comes in no package: give its weight file, such as mae_pretrain_vit_base.pth, in config"
    refused(message, "mae_vitb16", "", FileNotFoundError)
    refused("absent.pth: no such weight file", "mae_vitb16", "absent.pth", FileNotFoundError)


def test_refuses_another_networks_file(files, tiny_variants, tmp_path):
    found, _ = files
    (clip, _), (dino, tensors) = found["clip_vitb16"], found["dino_vitb16"]
    refused("no tensor is called 'cls_token', with or without a prefix; it has", "dino_vitb16", clip)
    refused("no tensor is called 'vision_model.embeddings.class_embedding'", "clip_vitb16", dino)
    refused("not the weights of mae_vitb16: tensor 'blocks.1.norm1.weight' (48,) is unknown", "mae_vitb16", dino)
    refused("not the weights of dinov2_vitb14: tensor 'blocks.0.ls1.gamma' (48,) is missing", "dinov2_vitb14", dino)
    path = save(tmp_path / "dino.pth", found["mocov3_vitb16"][1])
    refused("tensor 'head.0.weight' (12, 48) is missing", "mocov3_vitb16", path, vector="projected")
    save(path, tensors | {"pos_embed": np.zeros((1, 10, 48), np.float32)})
    refused("tensor 'pos_embed' has shape (1, 10, 48), expected (1, 17, 48)", "dino_vitb16", path)
    save(path, {name: array for name, array in tensors.items() if name != "norm.bias"})
    refused("tensor 'norm.bias' (48,) is missing", "dino_vitb16", path)
