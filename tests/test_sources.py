"""Data sets: what they hold, and one-line refusals of what is damaged, missing or out of range."""

import gzip
import pickle

import numpy as np
import pytest

from input_pipeline.composition import Cached, Subset
from input_pipeline.digits import Digits
from input_pipeline.idx import FASHION_MNIST_CLASSES, Idx
from input_pipeline.in_memory import ImagesInMemory
from input_pipeline.sources import fingerprint_of
from input_pipeline.synthetic import SyntheticLatents


def test_digits():
    digits = Digits().open()
    assert len(digits) == 1797 and digits.image_shape == (8, 8, 1) and digits.num_classes == 10
    assert digits.images_NHWC.min() == 0 and digits.images_NHWC.max() == 255 and digits.images_NHWC.dtype == np.uint8
    # The first digit of the set is a zero; grey level 5 of 16 is round(79.7) = 80.
    assert digits[0]["label"] == 0 and digits[0]["image"][0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert digits[0]["label"].dtype == np.int32
    assert digits.describe() == "digits of scikit-learn: 1797 images 8x8x1, 10 classes"
    assert digits.check() is None
    again = pickle.loads(pickle.dumps(digits))
    assert again.fingerprint == digits.fingerprint and len(digits.fingerprint) == 16


def in_memory(images=None, labels=(0, 1, 1), num_classes=2, class_names=("cat", "dog")):
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1) if images is None else images
    return ImagesInMemory(images, np.array(labels), num_classes, class_names, "three")


def test_fingerprint_is_of_the_content():
    variants = [in_memory(), in_memory(np.ones((3, 2, 2, 1), np.uint8)), in_memory(labels=(0, 1, 0))]
    variants += [in_memory(np.arange(12, dtype=np.uint8).reshape(3, 1, 4, 1)), in_memory(num_classes=3, class_names=())]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert in_memory().fingerprint == variants[0].fingerprint
    assert fingerprint_of(("ab", "c")) != fingerprint_of(("a", "bc"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": (0, 2, -1)}, r"three: label 2 of example 1 is out of range 0..1 \(2 such labels\)"),
        ({"num_classes": 0, "class_names": ()}, "label 1 of example 1 is out of range 0..0"),
        ({"labels": (0, 1)}, r"3 images but labels of shape \(2,\)"),
        ({"class_names": ("cat",)}, "1 class names for 2 classes"),
        ({"images": np.zeros((0, 2, 2, 1), np.uint8)}, "three: the data set is empty"),
        ({"images": np.zeros((3, 2, 2), np.uint8)}, r"must be uint8 \[N, H, W, C\], found uint8 \(3, 2, 2\)"),
        ({"images": np.zeros((3, 2, 2, 1))}, "must be uint8 .*, found float64"),
    ],
)
def test_images_in_memory_refuse(options, message):
    with pytest.raises(ValueError, match=message) as error:
        in_memory(**options)
    assert "\n" not in str(error.value)


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


IMAGES = np.arange(4 * 3 * 5, dtype=np.uint8).reshape(4, 3, 5)
LABELS = np.array([9, 0, 3, 3], np.uint8)


@pytest.fixture
def idx_directory(tmp_path):
    """A training split gzipped, a test split (the first two) plain."""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(IMAGES)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(LABELS)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES[:2]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:2]))
    return tmp_path


def test_idx(idx_directory):
    train = Idx(idx_directory, split="train", class_names=FASHION_MNIST_CLASSES).open()
    np.testing.assert_array_equal(train.images_NHWC, IMAGES[..., None])
    assert [int(train[i]["label"]) for i in range(4)] == LABELS.tolist()
    assert train.image_shape == (3, 5, 1) and train.class_names[9] == "Ankle boot"
    test = Idx(str(idx_directory), split="test").open()
    np.testing.assert_array_equal(test[1]["image"], IMAGES[1, ..., None])
    assert len(test) == 2 and test.class_names == () and test.fingerprint != train.fingerprint
    assert pickle.loads(pickle.dumps(test))[0]["label"] == 9


@pytest.mark.parametrize(
    "data, message",
    [
        (idx_bytes(IMAGES[0]), "not an idx file of 3 dimensions .* starts with 0x00000802, expected 0x00000803"),
        (b"\0\0\x0d\3" + idx_bytes(IMAGES)[4:], "starts with 0x00000d03"),
        (idx_bytes(IMAGES)[:9], "16 bytes of header"),
        (b"", "starts with 0x,"),
        (idx_bytes(IMAGES)[:-1], r"holds 59 values but its header says \(4, 3, 5\), 60: copy it again"),
        (idx_bytes(IMAGES) + b"\0", "holds 61 values"),
        (idx_bytes(IMAGES[:3]), "3 images but labels of shape"),
        (idx_bytes(IMAGES[:0]), "the data set is empty"),
    ],
)
def test_damaged_idx(idx_directory, data, message):
    (idx_directory / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match=message) as error:
        Idx(idx_directory, split="train").open()
    assert str(idx_directory) in str(error.value) and "\n" not in str(error.value)


def test_damaged_gzip(idx_directory):
    file = idx_directory / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for damaged in (whole[:-9], b"<html>", whole[:15] + b"\xff\xff\xff" + whole[18:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz is not a whole gzip file .* copy it again"):
            Idx(idx_directory, split="train").open()


def test_idx_that_is_not_there(idx_directory):
    (idx_directory / "t10k-labels-idx1-ubyte").unlink()
    for directory, name in ((idx_directory, "t10k-labels-idx1-ubyte"), (idx_directory / "no", "t10k-images")):
        with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist.*/usr/share") as error:
            Idx(directory, split="test").open()
        message = str(error.value)
        assert f"no {name}" in message and f" in {directory}: set config.data.path" in message and "\n" not in message
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\], found 'val'"):
        Idx(idx_directory, split="val").open()


def test_idx_labels_out_of_range(idx_directory):
    with pytest.raises(ValueError, match=r"label 9 of example 0 is out of range 0..4 \(1 such labels\)"):
        Idx(idx_directory, split="train", num_classes=5).open()


def synthetic(**options):
    levels = (("z2", (1, 1, 64)), ("z1", (8, 8, 4)))
    return SyntheticLatents(**{"levels": levels, "num_examples": 500, "num_classes": 7, "seed": 0, **options})


def test_synthetic_latents():
    source = synthetic()
    records = [source[i] for i in range(len(source))]
    z1, z2 = (np.stack([record[name] for record in records]) for name in ("z1", "z2"))
    assert z1.shape == (500, 8, 8, 4) and z2.shape == (500, 1, 1, 64) and z1.dtype == np.float32
    assert abs(z1.mean()) < 0.02 and abs(z1.std() - 1) < 0.02
    assert abs(np.corrcoef(z1[:, 0, 0, 0], z2[:, 0, 0, 0])[0, 1]) < 0.15  # the levels are not copies of one draw
    assert {int(record["label"]) for record in records} == set(range(7)) and records[0]["label"].dtype == np.int32
    np.testing.assert_array_equal(synthetic()[3]["z1"], z1[3])
    assert (synthetic(seed=1)[3]["z1"] != z1[3]).all() and (z1[2] != z1[3]).all()
    assert (synthetic(seed=1)[2]["z1"] != z1[3]).all()  # seeds are not shifts of each other
    assert synthetic(num_classes=0)[5]["label"] == 0
    assert source.describe() == "synthetic latents: 500 examples of z2 1x1x64, z1 8x8x4, 7 classes"
    assert synthetic().fingerprint == source.fingerprint != synthetic(seed=1).fingerprint
    with pytest.raises(IndexError):
        source[500]
    with pytest.raises(ValueError, match="num_examples must be at least 1, found 0"):
        synthetic(num_examples=0).open()


def test_subset():
    part = Subset(in_memory(), np.array([2, 1]))
    assert len(part) == 2 and part.describe() == "2 examples of three: 3 images 2x2x1, 2 classes"
    assert [int(part[i]["image"][0, 0, 0]) for i in range(2)] == [8, 4]
    with pytest.raises(IndexError):
        part[2]
    for numbers in ([], [0, 3], [-1, 2]):
        with pytest.raises(ValueError, match=f"a subset of {len(numbers)} examples: give .* numbers from 0 to 2"):
            Subset(in_memory(), numbers)


class Slow:
    """Counts how often each record is read."""

    def __init__(self):
        self.reads, self.captions, self.fingerprint = [], ("a", "b"), "f"

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.reads.append(index)
        return {"image": np.full((1, 1, 1), index, np.uint8)}


def test_a_cached_source_reads_each_record_once():
    slow = Slow()
    cached = Cached(slow)
    for index in (1, 0, 1, 1):
        record = cached[index]
        assert record["image"][0, 0, 0] == index
        record["image"] = None  # the caller's own dict
    assert slow.reads == [1, 0] and len(cached) == 2
    assert (cached.captions, cached.fingerprint) == (("a", "b"), "f")
    with pytest.raises(AttributeError, match="'Cached' object has no attribute 'depth'"):
        cached.depth  # noqa: B018
    again = pickle.loads(pickle.dumps(cached))
    assert again.fingerprint == "f" and len(pickle.dumps(cached)) == len(pickle.dumps(Cached(slow)))
    again[1]
    assert again.source.reads == [1, 0, 1] and slow.reads == [1, 0]
