"""CLIP's text encoder against transformers, by every file's names, and its padding through tokens and the store."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.text_encoders import CLIP_SPECIAL, hugging_face_clip, small_clip, write_clip_tokenizer
from safetensors.numpy import save_file

from input_pipeline import captions as text
from nested.encoders import clip_text, minilm, t5
from nested.encoders.clip_text import PROJECTION
from nested.encoders.text_encoder import load_text_encoder
from nested.latents import captions as text_store

HEADS, END = 4, 98  # of the recording: 32 wide, short texts filled up with 98


@pytest.fixture
def recorded(golden):
    """(parameters by our names, ids, the recording)."""
    data = golden("enc_clip_text.npz")
    tensors = {name[2:].removeprefix("text_model."): array for name, array in data.items() if name.startswith("w/")}
    return {name: array.astype(np.float32) for name, array in tensors.items()}, data["in/input_ids"], data


def test_equals_transformers(recorded):
    """CLIPTextModelWithProjection of transformers 5.23.0: quick_gelu, a causal mask and none for the padding."""
    params, ids, data = recorded
    found, wanted = clip_text.clip_text(params, ids, heads=HEADS), data["out/last_hidden_state"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    found, wanted = clip_text.clip_text_embeds(params, ids, heads=HEADS), data["out/text_embeds"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_token_sees_those_before_it_and_padding_is_text(recorded):
    params, ids, _ = recorded
    features = np.asarray(clip_text.clip_text(params, ids, heads=HEADS))
    other = ids.copy()
    other[:, 6] = 50
    changed = np.asarray(clip_text.clip_text(params, other, jnp.zeros(ids.shape, bool), heads=HEADS)) - features
    assert np.abs(changed[:, :6]).max() < 1e-6 and np.abs(changed[:, 6:]).max(2).min() > 1e-3


def test_keeps_the_dtype(recorded, x64):
    params, ids, data = recorded
    wanted = data["out/last_hidden_state"]
    double = clip_text.clip_text({name: array.astype(np.float64) for name, array in params.items()}, ids, heads=HEADS)
    half = clip_text.clip_text({name: jnp.asarray(array, jnp.bfloat16) for name, array in params.items()}, ids,
                               heads=HEADS)  # fmt: skip
    assert double.dtype == jnp.float64 and half.dtype == jnp.bfloat16
    np.testing.assert_allclose(double, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(np.asarray(half, np.float64), wanted, rtol=0, atol=0.1 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype, highest", [(np.float32, 2), (jnp.bfloat16, 0)])
def test_products_of_float32_are_float32_on_accelerators(dtype, highest, recorded, golden):
    """The precision of every product of the lowered text, of each of the three networks."""
    clip, ids, _ = recorded
    t5_params = {name[2:]: array for name, array in golden("enc_t5.npz").items() if name.startswith("w/")}
    minilm_params = {name: np.empty(shape) for name, shape in minilm.shapes({}).items()}
    mask = np.ones(ids.shape, bool)
    for network, tensors, arguments in (
        (functools.partial(clip_text.clip_text_embeds, heads=HEADS), clip, (ids,)),
        (minilm.minilm, minilm_params, (ids, mask)),
        (t5.t5, t5_params, (ids, mask)),
    ):
        params = {name: jax.ShapeDtypeStruct(array.shape, dtype) for name, array in tensors.items()}
        lines = jax.jit(network).lower(params, *arguments).as_text().splitlines()
        products = [line for line in lines if "dot_general" in line]
        assert len(products) > 8
        assert all(line.count("HIGHEST") == highest for line in products)  # of both factors


# --- files -------------------------------------------------------------------------------------------------------


def openai(params):
    """Parameters by OpenAI's names, with what else a whole CLIP of theirs holds."""
    result = {
        "token_embedding.weight": params[clip_text.EMBEDDING],
        "positional_embedding": params[clip_text.POSITION],
        "ln_final.weight": params["final_layer_norm.weight"],
        "ln_final.bias": params["final_layer_norm.bias"],
        "text_projection": params[PROJECTION].T,
    }
    for i in range(clip_text.num_layers(params)):
        theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [params[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            result[f"{theirs}.attn.in_proj_{kind}"] = np.concatenate(parts)
            result[f"{theirs}.attn.out_proj.{kind}"] = params[f"{ours}.self_attn.out_proj.{kind}"]
            for name, own in (("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                result[f"{theirs}.{name}.{kind}"] = params[f"{ours}.{own}.{kind}"]
            for number in (1, 2):
                result[f"{theirs}.ln_{number}.{kind}"] = params[f"{ours}.layer_norm{number}.{kind}"]
        result[f"{theirs}.attn_mask"] = np.zeros((12, 12), np.float32)
    others = {"visual.conv1.weight": (2, 3), "visual.transformer.resblocks.0.ln_1.weight": (2,), "logit_scale": ()}
    return result | {name: np.zeros(shape, np.float32) for name, shape in others.items()}


def test_openai_names(recorded):
    params, _, _ = recorded
    theirs = openai(params)
    found = clip_text.renamed({name: array for name, array in theirs.items() if "visual" not in name})
    assert found.keys() - {"logit_scale"} == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(found[name], array, name)
    assert clip_text.renamed(params) == params


@pytest.fixture
def network():
    return small_clip()


@pytest.fixture
def encoder(network, tmp_path):
    write_clip_tokenizer(tmp_path / "tokenizer.json")
    save_file(hugging_face_clip(network, ""), tmp_path / "model.safetensors")
    return load_text_encoder(clip_text.NETWORK, tmp_path, 77)


def test_every_layout_loads_alike(network, encoder, tmp_path):
    ours = network.keys() - {PROJECTION}
    assert encoder.params.keys() == ours and encoder.width == 64
    files = {"sd.npz": hugging_face_clip(network, "cond_stage_model.transformer."), "openai.npz": openai(network)}
    for name, tensors in files.items():
        np.savez(tmp_path / name, **tensors)
        found = load_text_encoder(clip_text.NETWORK, tmp_path / name, 77)
        assert found.params.keys() == ours
        for key in ours:
            np.testing.assert_array_equal(found.params[key], network[key], key)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_model.encoder.layers.0.mlp.fc2.bias": None}, r"'encoder.layers.0.mlp.fc2.bias' \(64,\) is missing"),
        ({"text_model.encoder.layers.1.mlp.fc1.bias": np.zeros(3)}, r"'encoder.layers.1.mlp.fc1.bias' \(3,\) is unkno"),
        ({"text_model.final_layer_norm.bias": np.zeros(3)}, r"'final_layer_norm.bias' has shape \(3,\), expected"),
        ({"text_model.embeddings.token_embedding.weight": None}, "no tensor is called 'embeddings.token_embedding"),
    ],
)
def test_other_weights_are_refused(network, tmp_path, change, message):
    tensors = hugging_face_clip(network, "") | change
    np.savez(tmp_path / "w.npz", **{name: array for name, array in tensors.items() if array is not None})
    with pytest.raises(ValueError, match=message) as error:
        load_text_encoder(clip_text.NETWORK, tmp_path / "w.npz", 77)
    assert "\n" not in str(error.value)


def test_short_texts_are_filled_with_the_end_of_text_and_stored_whole(encoder, network, tmp_path):
    ids, mask = encoder.tokenize(["a red apple", "", "apple " * 90])
    start, end = CLIP_SPECIAL.values()
    assert ids[0].tolist() == [start, 1, 2, 3] + [end] * 73 and mask.all() and mask.shape == (3, 77)
    assert ids[1].tolist() == [start] + [end] * 76
    assert ids[2].tolist() == [start] + [3] * 75 + [end]  # transformers cuts alike: the end stays
    features = encoder.features(ids, mask)
    np.testing.assert_allclose(features, clip_text.clip_text(network, ids), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="max_tokens: 78 given; clip_vitl14 has positions for 77"):
        load_text_encoder(clip_text.NETWORK, tmp_path, 78)

    index = text_store.store_captions(encoder, ["a red apple"], tmp_path / "store", 2)
    assert index["bytes"]["features"] == 128 + 2 * 77 * 64 * 2
    stored = text.with_stored_text(Records(), tmp_path / "store", encoder.fingerprint)
    assert stored[0]["text_mask"].all()
    np.testing.assert_allclose(stored[0]["text"], features[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(stored.maps[-1].look_up("")["text"], features[1], rtol=1e-3, atol=1e-3)


class Records:
    """One captioned record."""

    captions = ["a red apple"]
    num_classes, fingerprint = 0, "records"

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"caption": self.captions[index]}
