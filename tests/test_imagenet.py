"""ImageNet from its tars: labels as those of TFDS and torchvision, subsets, what is damaged or lacks labels."""

import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import scipy.io
from helpers.data_sets import IMAGENET_TRAIN, class_file, write_imagenet_train
from helpers.tar_files import jpeg, levels, tar

from input_pipeline import devkit, loader, tars
from input_pipeline.imagenet import ImageNetTar

KIT_IDS = {1: "n02119789", 2: "n02100735", 3: "n01440764", 1001: "n00001740"}  # the real ones; 1001 is no leaf
VALIDATION = {f"ILSVRC2012_val_{number:08}.JPEG": jpeg(50 * number) for number in (3, 1, 2)}


def meta_mat(name="synsets", **options):
    """As scipy writes the struct array of data/meta.mat."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    cells = np.zeros((len(KIT_IDS), 1), [(field, object) for field in fields])
    for row, (number, wnid) in enumerate(KIT_IDS.items()):
        children = np.array([], np.uint8) if number < 1000 else np.array([2.0, 300.0])
        cells[row, 0] = (float(number), wnid, "kit fox, Vulpes macrotis", "größer", 0, children, 2)
    file = io.BytesIO()
    scipy.io.savemat(file, {"other": np.eye(3), name: cells}, **options)
    return file.getvalue()


def write_validation(folder, numbers=(1, 3, 2), mat=None):
    """Image 1 is of n02119789, 2 of n01440764, 3 of n02100735."""
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(VALIDATION))
    root = "ILSVRC2012_devkit_t12/data/"
    truth = "".join(f"{number}\n" for number in numbers).encode()
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        files = {"ILSVRC2012_validation_ground_truth.txt": truth, "meta.mat": meta_mat() if mat is None else mat}
        for name, data in files.items():
            info = tarfile.TarInfo(root + name)
            info.size = len(data)
            kit.addfile(info, io.BytesIO(data))
    return folder


def opened(folder, split="train", **options):
    return ImageNetTar(folder, split=split, index_dir=str(folder / "index"), **options).open()


def close(found, expected):
    return np.abs(np.array(found) - expected).max() <= 1  # JPEG


def test_training_images(tmp_path, monkeypatch):
    source = opened(write_imagenet_train(tmp_path))
    assert source.class_names == ("n01440764", "n02100735", "n02119789") and source.num_classes == 3
    assert close(levels(source), [10, 20, 40, 30])  # by class, then by file name
    assert [int(source[i]["label"]) for i in range(4)] == [0, 1, 2, 2] and source[0]["label"].dtype == np.int32
    assert source[0]["image"].shape == (4, 5, 3) and source.image_shape == (None, None, 3)
    assert source.shard_ends.tolist() == [1, 2, 4]
    assert source.describe() == f"ImageNet (train) in {tmp_path}/ILSVRC2012_img_train.tar: 4 images, 3 classes"
    monkeypatch.setattr(tars, "members", lambda *args: pytest.fail("the index is there"))
    again = pickle.loads(pickle.dumps(opened(tmp_path, channels=1)))
    assert again[3]["image"].shape == (4, 5, 1) and again.fingerprint != source.fingerprint
    assert source.fingerprint == opened(tmp_path).fingerprint
    batch = next(loader.in_order(source, 4))
    assert batch["label"].tolist() == [0, 1, 2, 2]


def test_a_changed_tar_is_walked_again(tmp_path):
    first = opened(write_imagenet_train(tmp_path)).fingerprint
    write_imagenet_train(
        tmp_path, IMAGENET_TRAIN | {"n01440764.tar": {"n01440764_5.JPEG": jpeg(11), "n01440764_6.JPEG": jpeg(12)}}
    )
    source = opened(tmp_path)
    assert len(source) == 5 and source.fingerprint != first and close(levels(source)[:2], [11, 12])


def test_subsets_of_the_classes(tmp_path):
    write_imagenet_train(tmp_path)
    source = opened(tmp_path, classes=class_file(tmp_path, "n02119789", "n01440764"))
    assert close(levels(source), [10, 40, 30]) and source.class_names == ("n01440764", "n02119789")
    assert [int(source[i]["label"]) for i in range(3)] == [0, 1, 1] and source.shard_ends.tolist() == [1, 3]
    assert source.fingerprint != opened(tmp_path).fingerprint
    with pytest.raises(ValueError, match="2 of 3 chosen classes are none of its 3: n00000001, n00000002; correct"):
        opened(tmp_path, classes=class_file(tmp_path, "n00000002", "n01440764", "n00000001"))


@pytest.mark.parametrize("labels", ["kit", "file"])
def test_validation_images_have_the_labels_of_training(tmp_path, labels):
    write_validation(tmp_path)
    if labels == "file":
        (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
        wnids = {1: "n02119789", 2: "n01440764", 3: "n02100735"}
        lines = [f"ILSVRC2012_val_{number:08}.JPEG  {wnid}" for number, wnid in wnids.items()]
        (tmp_path / "val_labels.txt").write_text("\n".join(lines) + "\n\n")
    source = opened(tmp_path, "validation")
    assert source.class_names == opened(write_imagenet_train(tmp_path)).class_names
    assert close(levels(source), [100, 150, 50])  # images 2, 3, 1: the classes in sorted order
    assert [int(source[i]["label"]) for i in range(3)] == [0, 1, 2]


def test_a_labels_file_counts_before_the_kit(tmp_path):
    write_validation(tmp_path)
    lines = [f"{name} n0000000{i}" for i, name in enumerate(sorted(VALIDATION))]
    (tmp_path / "val_labels.txt").write_text("\n".join(lines))
    assert opened(tmp_path, "validation").class_names == ("n00000000", "n00000001", "n00000002")
    other = lines[:1] + [lines[2][:-1] + "1", lines[1][:-1] + "2"]  # two labels are exchanged
    first = opened(tmp_path, "validation").fingerprint
    (tmp_path / "val_labels.txt").write_text("\n".join(other))
    exchanged = opened(tmp_path, "validation")
    assert exchanged.fingerprint != first and exchanged.class_names == ("n00000000", "n00000001", "n00000002")
    (tmp_path / "val_labels.txt").write_text("\n".join(lines).replace("n00000002", "n00000003"))
    assert opened(tmp_path, "validation").fingerprint not in (first, exchanged.fingerprint)
    (tmp_path / "val_labels.txt").write_text("\n".join(lines[:2]))
    with pytest.raises(ValueError, match="1 of 3 images have no label: ILSVRC2012_val_00000003.JPEG; check val_labels"):
        opened(tmp_path, "validation")
    for line in ("a.JPEG", "a.JPEG tench", "a.JPEG n01440764 3"):
        (tmp_path / "val_labels.txt").write_text(lines[0] + "\n" + line)
        with pytest.raises(ValueError, match=f"val_labels.txt line 2 is not 'NAME.JPEG n01440764': '{line}'"):
            opened(tmp_path, "validation")


@pytest.mark.parametrize("compressed", [False, True])
def test_the_kit_as_scipy_writes_it(compressed):
    assert devkit.synsets(meta_mat(do_compression=compressed)) == KIT_IDS
    assert devkit._matrix(b"") == ("", None)  # how MATLAB writes a cell that was never set


def test_random_bytes_in_the_kit_raise_the_errors_that_are_expected():
    rng, mat, refused = np.random.default_rng(0), meta_mat(), 0
    for _ in range(1000):
        changed = bytearray(mat)
        for position in rng.integers(128, len(mat), rng.integers(1, 5)):
            changed[position] = rng.choice([0, 1, 5, 9, 14, 16, 255])
        try:
            assert all(isinstance(wnid, str) for wnid in devkit.synsets(bytes(changed)).values())
        except devkit.ERRORS:
            refused += 1
    assert refused > 300


def test_damaged_kits(tmp_path, monkeypatch):
    write_validation(tmp_path)
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    whole = kit.read_bytes()
    assert devkit.validation_wnids(kit) == ["n02119789", "n01440764", "n02100735"]
    mat = meta_mat()
    damaged = [mat[:500], mat[:140], b"", b"MATLAB 7.3" * 30, meta_mat(name="classes"), mat.replace(b"WNID", b"XXXX")]
    for content in damaged:
        write_validation(tmp_path, mat=content)
        with pytest.raises(ValueError, match=f"{kit} is not ImageNet's development kit .*: copy it again") as error:
            devkit.validation_wnids(kit)
        assert "\n" not in str(error.value)
    bomb = zlib.compress(bytes(devkit.MAX_BYTES * 2))  # 128 MB in 130 kB
    write_validation(tmp_path, mat=mat[:128] + struct.pack("<II", devkit.COMPRESSED, len(bomb)) + bomb)
    tracemalloc.start()
    with pytest.raises(ValueError, match="data/meta.mat is cut off, or unpacks to more than 67,108,864 bytes"):
        devkit.validation_wnids(kit)
    assert tracemalloc.get_traced_memory()[1] < 2.5 * devkit.MAX_BYTES
    tracemalloc.stop()
    monkeypatch.setattr(devkit, "MAX_BYTES", len(mat) - 1)
    write_validation(tmp_path)
    with pytest.raises(ValueError, match=f"its data/meta.mat has {len(mat):,} bytes, at most {len(mat) - 1:,} are"):
        devkit.validation_wnids(kit)
    monkeypatch.undo()
    write_validation(tmp_path, numbers=(1, 4, 2))
    with pytest.raises(ValueError, match=r"data/meta.mat has no ILSVRC2012_ID 4 \(1 such\)"):
        devkit.validation_wnids(kit)
    for content in (whole[:200], b"<html>"):
        kit.write_bytes(content)
        with pytest.raises(ValueError, match="is not ImageNet's development kit"):
            devkit.validation_wnids(kit)
    with tarfile.open(kit, "w:gz"):
        pass
    with pytest.raises(ValueError, match="it has no data/ILSVRC2012_validation_ground_truth.txt"):
        devkit.validation_wnids(kit)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'validation'\], found 'val'"):
        opened(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=f"no ILSVRC2012_img_val.tar in {tmp_path}: set config.data.path"):
        opened(tmp_path, "validation")
    write_validation(tmp_path)
    os.remove(tmp_path / "ILSVRC2012_devkit_t12.tar.gz")
    with pytest.raises(FileNotFoundError, match="neither val_labels.txt nor ILSVRC2012_devkit_t12.tar.gz .* put one"):
        opened(tmp_path, "validation")
    (tmp_path / "val_labels.txt").write_text("a.JPEG n01440764")
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar({}))
    with pytest.raises(ValueError, match="img_val.tar: no images; check val_labels.txt"):
        opened(tmp_path, "validation")


def test_damaged_training_tars(tmp_path):
    for content, message in (
        ({"n01440764.tar": {}, "n02119789.tar": {"a": b""}}, "its member n01440764.tar holds no images"),
        ({"n01440764": {"a": b""}}, "expected tars of classes such as n01440764.tar, found n01440764$"),
        ({"cat.tar": {"a": b""}}, "found cat.tar$"),
        ({"n01440764.tar": {"../a": b""}}, r"has a member '../a', .* \(its member n01440764.tar\)"),
    ):
        write_imagenet_train(tmp_path, content)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path)
    inner = tar(IMAGENET_TRAIN["n02119789.tar"])
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar([("n02119789.tar", inner), ("n02119789.tar", inner)]))
    with pytest.raises(ValueError, match="img_train.tar has two members 'n02119789.tar': make the tar again"):
        opened(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar({"n02119789.tar": inner[:900]}))
    with pytest.raises(ValueError, match=r"cut off or damaged .* \(its member n02119789.tar\)"):
        opened(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar({}))
    with pytest.raises(ValueError, match="expected tars of classes such as n01440764.tar, found nothing"):
        opened(tmp_path)


def test_bad_images(tmp_path):
    write_imagenet_train(tmp_path, IMAGENET_TRAIN | {"n01440764.tar": {"n01440764_5.JPEG": jpeg(10)[:-40]}})
    message = r"1 of 4 images in .*img_train.tar are not whole images, .*max_bad_images is 0: n01440764_5.JPEG \("
    with pytest.raises(ValueError, match=message):
        opened(tmp_path).check()
    source = opened(tmp_path, max_bad_images=1)
    assert close(levels(source), [20, 20, 40, 30]) and source[0]["label"] == 1
