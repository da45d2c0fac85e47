"""Captions in the data pipeline, online and stored: tokens, features, what is missing, damaged or another's."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from helpers.text_encoders import CAPTIONS, T5_TOKENS, write_t5
from PIL import Image

from input_pipeline import captions as text
from input_pipeline import loader, tokens
from input_pipeline.composition import Subset, select_fields
from input_pipeline.image_files import ImageFolder
from input_pipeline.sources import draw
from input_pipeline.transforms import resized
from nested.encoders import t5
from nested.encoders.text_encoder import load_text_encoder
from nested.latents import captions as text_store


def image_folder(path, captions):
    path.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path / "a.png")
    lines = [json.dumps({"file": "a.png", "caption": caption}) for caption in captions]
    (path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ImageFolder(path).open()


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


@pytest.fixture
def folder(tmp_path, golden):
    """Of a T5 with a tokenizer of five words."""
    return write_t5(tmp_path / "t5", golden)


@pytest.fixture
def encoder(folder):
    return load_text_encoder(t5.NETWORK, folder, T5_TOKENS)


def test_captions_come_without_decoding(tmp_path):
    source = image_folder(tmp_path / "images", CAPTIONS)
    (tmp_path / "images" / "a.png").write_bytes(b"not an image")
    transformed = resized(source, 2, crop="center", channels=3)
    assert text.captions(source) == text.captions(transformed) == list(CAPTIONS)
    assert text.captions(Subset(transformed, (1, 2))) == list(CAPTIONS[1:3])
    (tmp_path / "images" / "captions.jsonl").unlink()
    assert ImageFolder(tmp_path / "images").open().captions is None
    assert Subset(Records(CAPTIONS), (0, 1)).captions is None
    assert text.captions(Subset(Records(CAPTIONS), (1, 2))) == list(CAPTIONS[1:3])


def test_absent_captions_are_named(encoder, tmp_path):
    source = Records(("a", None, " ", "", "red", None, None, None))
    message = "6 of 8 examples have no caption or an empty one, such as 1, 2, 3, 5, 6, ...: .*records of a test"
    with pytest.raises(ValueError, match=message):
        text.captions(source)
    tokenized = text.tokenized(source, encoder.tokenize)
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
    text_store.store_captions(encoder, text.every_text(several), tmp_path / "store", batch_size=4)
    for converted in (text.tokenized(source, encoder.tokenize), text.with_stored_text(source, tmp_path / "store")):
        name = "text_ids" if "text_ids" in converted[0] else "text"
        _, convert = converted.maps
        fields = {said: convert({"caption": said}, 0, None)[name] for said in text.every_text(several)}
        for index, first in enumerate(("a red apple", "green circle", "red")):
            np.testing.assert_array_equal(converted[index][name], fields[first])
        generator = np.random.default_rng(0)
        rows = [draw(select_fields(converted, (name,)), 0, generator)[name] for _ in range(60)]
        counts = [sum(np.array_equal(row, fields[said]) for row in rows) for said in several[0]]
        assert sum(counts) == 60 and min(counts) > 8
        state = generator.bit_generator.state
        np.testing.assert_array_equal(draw(converted, 1, generator)[name], fields["green circle"])
        np.testing.assert_array_equal(draw(converted, 2, generator)[name], fields["red"])
        assert generator.bit_generator.state == state
    with pytest.raises(ValueError, match="no features for 1 of 5 captions, such as 'b'"):
        text.with_stored_text(Records((*several[:1], ("red", "b"))), tmp_path / "store")
    for empty in ((), ("a", " "), ("", "a")):
        with pytest.raises(ValueError, match="1 of 2 examples have no caption or an empty one, such as 1"):
            text.captions(Records(("a", empty)))
    captioned = text.with_captions(Records("abc"), several)
    assert captioned[0]["caption"] == several[0] and text.captions(captioned) == list(several)
    fingerprints = {text.with_captions(Records("abc"), captions).fingerprint for captions in (several, ("a", "b", "c"))}
    assert len(fingerprints) == 2


def test_tokenized_records(encoder, tmp_path):
    source = image_folder(tmp_path / "images", CAPTIONS)
    tokenized = pickle.loads(pickle.dumps(text.tokenized(source, encoder.tokenize)))
    batch = next(loader.in_order(tokenized, 4))
    ids, mask = encoder.tokenize(list(CAPTIONS))
    assert batch.keys() == {"image", "label", "text_ids", "text_mask"}
    np.testing.assert_array_equal(batch["text_ids"], ids)
    np.testing.assert_array_equal(batch["text_mask"], mask)
    assert len(tokenized) == 4 and tokenized.num_classes == 0
    assert tokenized.describe() == f"{source.describe()}, captions of at most 5 tokens"
    longer = dataclasses.replace(encoder.tokenize, fingerprint="of another")
    assert len({tokenized.fingerprint, source.fingerprint, text.tokenized(source, longer).fingerprint}) == 3


def test_store_round_trip(encoder, tmp_path, capsys, monkeypatch):
    source = image_folder(tmp_path / "images", CAPTIONS)
    said = []
    monkeypatch.setattr(tokens.logging, "log_first_n", lambda *values: said.append(values))
    monkeypatch.setattr(text_store.logging, "warning", lambda message, *values: said.append(message % values))
    index = text_store.store_captions(encoder, text.captions(source), tmp_path / "store", batch_size=3)
    assert said == ["1 of 4 captions are cut to max_tokens 5"]  # counted, and said once
    assert index["distinct"] == 4 and index["cut"] == 1  # with the empty caption
    stored_tokens = 4 + 3 + 5 + 1
    assert index["bytes"] == {"keys": 128 + 4 * 32, "starts": 128 + 5 * 8, "features": 128 + stored_tokens * 48 * 2}
    assert "captions, encoding 4/4" in capsys.readouterr().err
    stored = text.with_stored_text(source, tmp_path / "store", encoder.fingerprint)
    assert pickle.dumps(stored) and len(pickle.dumps(stored)) < len(pickle.dumps(source)) + 2000
    stored = pickle.loads(pickle.dumps(stored))
    batch = next(loader.in_order(stored, 4))
    assert batch.keys() == {"image", "label", "text", "text_mask"} and batch["text"].dtype == np.float16
    ids, mask = encoder.tokenize(list(CAPTIONS))
    np.testing.assert_array_equal(batch["text_mask"], mask)
    np.testing.assert_allclose(batch["text"], encoder.features(ids, mask), rtol=1e-3, atol=1e-5)
    assert (batch["text"][~mask] == 0).all()
    ids, mask = encoder.tokenize([""])
    np.testing.assert_array_equal(stored.maps[-1].look_up("")["text_mask"], mask[0])
    np.testing.assert_allclose(
        stored.maps[-1].look_up("")["text"], encoder.features(ids, mask)[0], rtol=1e-3, atol=1e-5
    )
    assert stored.describe() == f"{source.describe()}, features of t5 5x48 from {tmp_path / 'store'}"
    assert stored.fingerprint != source.fingerprint and text.LookUpText(tmp_path / "store").index == index
    unused = dataclasses.replace(encoder, network=None)  # a finished store is not made again
    assert text_store.store_captions(unused, text.captions(source), tmp_path / "store", batch_size=3) == index


def test_a_killed_run_leaves_no_store(encoder, tmp_path):
    source, directory, calls = Records(CAPTIONS), tmp_path / "store", []

    def killed(params, ids, mask):
        calls.append(ids)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encoder.network(params, ids, mask)

    with pytest.raises(KeyboardInterrupt):
        text_store.store_captions(dataclasses.replace(encoder, network=killed), CAPTIONS, directory, batch_size=2)
    assert (directory / "features.npy").exists()
    with pytest.raises(FileNotFoundError, match="text.json: not found: the text features were not .completely. made"):
        text.with_stored_text(source, directory)
    text_store.store_captions(encoder, CAPTIONS, directory, batch_size=2)
    assert text.with_stored_text(source, directory)[1]["text_mask"].sum() == 3


def test_other_encoders_and_captions_are_refused(encoder, tmp_path):
    directory = tmp_path / "store"
    text_store.store_captions(encoder, CAPTIONS, directory, batch_size=4)
    other = dataclasses.replace(encoder, fingerprint="f" * 64)
    with pytest.raises(ValueError, match="store: holds text features of other origin: 'encoder' is "):
        text_store.store_captions(other, CAPTIONS, directory, batch_size=4)
    with pytest.raises(ValueError, match="other origin: 'captions' is "):
        text_store.store_captions(encoder, CAPTIONS[:2], directory, batch_size=4)
    with pytest.raises(ValueError, match="made by t5 with 5 tokens, fingerprint .*, this run's encoder is f{16}:"):
        text.with_stored_text(Records(CAPTIONS), directory, other.fingerprint)
    with pytest.raises(ValueError, match="no features for 2 of 3 captions, such as 'a', 'apple': remove"):
        text.with_stored_text(Records(("apple", "a", "green circle")), directory)


def test_damaged_stores_are_refused(encoder, tmp_path):
    directory, source = tmp_path / "store", Records(CAPTIONS)
    text_store.store_captions(encoder, CAPTIONS, directory, batch_size=4)
    file = directory / "features.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=f"features.npy: has {len(whole) - 2} bytes, {len(whole)} were written"):
        text.with_stored_text(source, directory)
    file.unlink()
    with pytest.raises(ValueError, match="features.npy: is missing; remove the folder"):
        text.with_stored_text(source, directory)
    (directory / "text.json").write_text("{")
    with pytest.raises(ValueError, match="text.json: not valid JSON"):
        text.with_stored_text(source, directory)


def test_store_refuses_what_float16_cannot_hold(encoder, tmp_path):
    def large(params, ids, mask):
        features = np.array(encoder.network(params, ids, mask))
        features[(ids == 6).any(1), 0, 0] = 1e5
        return features

    with pytest.raises(ValueError, match="t5: a feature of 'green circle' is NaN, infinite or beyond float16"):
        text_store.store_captions(
            dataclasses.replace(encoder, network=large), CAPTIONS[:3], tmp_path / "store", batch_size=2
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not writable"):
        text_store.store_captions(encoder, CAPTIONS, tmp_path / "file", batch_size=2)
    (tmp_path / "taken" / "keys.npy").mkdir(parents=True)
    with pytest.raises(OSError, match="keys.npy: not written: Is a directory"):
        text_store.store_captions(encoder, CAPTIONS, tmp_path / "taken", batch_size=2)
