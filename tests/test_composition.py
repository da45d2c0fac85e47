"""Sources made of other sources: what maps, subsets and caches change, and what they leave as it is."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from input_pipeline import captions
from input_pipeline.composition import Cached, Mapped, RecordMap, Subset, select_fields
from input_pipeline.digits import Digits
from input_pipeline.in_memory import ImagesInMemory
from input_pipeline.transforms import resized

# Of Digits, two_images and what the first test makes of them, before maps took the place of wrapping classes.
RECORDED = [
    "10278baaa48533b5", "edbb6e078ad2c4d9", "d9be40e098aa5e48", "cf5cf87ec07d3910", "330551b099a4e170",
    "330551b099a4e170",
]  # fmt: skip
CAPTIONS = ["a dog", ("a cat", "eine Katze")]


class Letters:
    """A tokenizer of letters."""

    max_tokens, fingerprint = 4, "letters"

    def __call__(self, texts):
        ids = np.array([[ord(letter) for letter in f"{text:4}"[:4]] for text in texts], np.int32)
        return ids, ids != ord(" ")


@dataclass(frozen=True)
class Refuse(RecordMap):
    """Refuses one record."""

    index: int

    def __call__(self, record, index, generator):
        if index == self.index:
            raise ValueError(f"example {index} is refused")
        return record

    def check(self, source):
        for index in range(len(source)):
            self(source[index], index, None)


def two_images():
    pixels = np.arange(2 * 6 * 8 * 3, dtype=np.uint8).reshape(2, 6, 8, 3)
    return ImagesInMemory(pixels, np.array([0, 1]), 2, ("a", "b"), "two")


def test_fingerprints_are_those_that_latents_were_stored_with():
    images = two_images()
    small = resized(images, 4, "center", 1)
    captioned = captions.with_captions(small, CAPTIONS)
    tokenized = captions.tokenized(captioned, Letters())
    found = [Digits().open(), images, small, captioned, tokenized, select_fields(tokenized, ("label", "text_ids"))]
    assert [source.fingerprint for source in found] == RECORDED
    assert Cached(small).fingerprint == small.fingerprint
    subsets = [Subset(images, np.array(indices)) for indices in ((0, 1), (1, 0), (1,))]
    assert len({source.fingerprint for source in (images, *subsets)}) == 4


def test_maps_apply_in_order_and_keep_the_rest_of_the_source():
    captioned = captions.with_captions(resized(two_images(), 4, "center", 1), CAPTIONS)
    mapped = captions.tokenized(captioned, Letters())
    assert mapped[1].keys() == {"image", "label", "text_ids", "text_mask"} and mapped[1]["image"].shape == (4, 4, 1)
    assert (mapped.num_classes, mapped.class_names, mapped.image_shape) == (2, ("a", "b"), (4, 4, 1))
    assert mapped.describe() == (
        "two: 2 images 6x8x3, 2 classes, center to 4x4x1, with captions, captions of at most 4 tokens"
    )
    assert captioned.captions == tuple(CAPTIONS) and mapped.captions is None
    assert select_fields(captioned, ("label",)).captions is None
    assert select_fields(captioned, ("label", "caption")).captions == tuple(CAPTIONS)
    again = pickle.loads(pickle.dumps(Subset(mapped, np.array([1]))))
    np.testing.assert_array_equal(again[0]["text_ids"], [ord(letter) for letter in "a ca"])
    drawn = {bytes(again.draw(0, np.random.default_rng(seed))["text_ids"]) for seed in range(20)}
    assert len(drawn) == 2 and again.class_names == ("a", "b")


def test_a_refused_record_is_an_error_that_names_the_source():
    source = Mapped(two_images(), (Refuse(1),))
    message = r"^example 1 is refused \(two: 2 images 6x8x3, 2 classes\)$"
    assert source[0]["label"] == 0
    for read in (lambda: source[1], lambda: source.draw(1, np.random.default_rng(0)), source.check):
        with pytest.raises(ValueError, match=message):
            read()
    assert Mapped(two_images(), (Refuse(2),)).check() is None
    small = resized(two_images(), 7, "center", 1, small="refuse")
    with pytest.raises(ValueError, match="image 0 is 6x8x3, smaller than 7: remove it"):
        small.check()


def test_a_mapped_source_is_read_once_where_it_is_cached():
    images = two_images()
    cached = Cached(resized(images, 4, "center", 1))
    first = cached.draw(1, np.random.default_rng(0))
    images.images_NHWC[:] = 0
    np.testing.assert_array_equal(cached[1]["image"], first["image"])
    assert len(cached) == 2 and cached.image_shape == (4, 4, 1) and cached.check() is None
