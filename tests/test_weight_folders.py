"""Weight files as downloads have them: shards, TorchScript, training checkpoints; mapped, not loaded."""

import gc
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from helpers.weight_files import Call, Global, opcodes, pickled, tensor, write_legacy, write_safetensors, write_zip

from nested.weights import files as weights

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
SIX = np.arange(6, dtype=np.float32)


# --- TorchScript and training checkpoints ------------------------------------------------------------------------


def test_torchscript_is_read_by_attribute_path(golden):
    """torch.jit.save under torch 2.13.0: two nested modules, a list of numbers, a half tensor, an integer buffer."""
    expected = golden("ckpt_torchscript_expected.npz")  # its state_dict()
    found = weights.read_tensors(GOLDEN / "ckpt_torchscript.pt")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], name)


def test_code_beside_the_modules_of_torchscript_is_refused(tmp_path):
    write_zip(tmp_path / "w.pt", {"a": Call("__torch__.evil Net"), "b": Call("os getcwd")}, {})
    with pytest.raises(ValueError, match="its pickle asks for 'os.getcwd', which no plain checkpoint needs"):
        weights.read_tensors(tmp_path / "w.pt")
    lists = {"w": tensor(), "sizes": Call("torch.jit._pickle build_intlist", (1, 2))}
    write_zip(tmp_path / "w.pt", lists | {"typed": Call("torch.jit._pickle restore_type_tag", "x", "str")}, {"0": SIX})
    assert list(weights.read_tensors(tmp_path / "w.pt")) == ["w"]
    write_zip(tmp_path / "w.pt", {"w": tensor(), "x": Call("torch.jit._pickle unknown", 1)}, {"0": SIX})
    with pytest.raises(ValueError, match="'torch.jit._pickle.unknown'"):
        weights.read_tensors(tmp_path / "w.pt")


def test_options_of_training_scripts_are_skipped(tmp_path):
    """ml-mdm's vis_model_*.pth: {'state_dict': ..., 'args': its options as objects of its own classes, ...}."""
    args = Call("argparse Namespace", Call("models.unet UNetConfig", Call("samplers ThresholdType", 2)))
    content = {"state_dict": {"w": tensor()}, "args": args, "path": Call("pathlib PosixPath", "a"), "batch_num": 3}
    write_zip(tmp_path / "w.pth", content, {"0": SIX})
    assert list(weights.load_network([tmp_path / "w.pth"], "w")) == ["w"]


def test_what_lightning_saves_beside_the_weights_is_skipped(tmp_path):
    """Stable Diffusion's .ckpt: {'state_dict': ..., 'callbacks': {the class ModelCheckpoint: ...}}, and objects that
    are dicts and lists of their own kinds, filled after they are made; nothing of it is imported."""
    made = b"cpytorch_lightning.utilities.parsing\nAttributeDict\n)\x81" + opcodes("a") + opcodes(1) + b"s"
    made += b"}b" + b"clightning.fabric\nL\n)\x81(" + opcodes(1) + opcodes(2) + b"e" + opcodes(3) + b"a"
    kind = opcodes(Global("pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint"))
    other = opcodes({"dtype": Global("torch float32"), "state_dict": {"w": tensor()}, "epoch": 3})[:-1]
    content = other + opcodes("callbacks") + b"}" + kind + opcodes({"best": 0.1}) + b"s" + opcodes("more") + b"("
    with zipfile.ZipFile(tmp_path / "w.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + made + b"tu.")
        archive.writestr("archive/data/0", SIX.tobytes())
    assert list(weights.load_network([tmp_path / "w.ckpt"], "w")) == ["w"]
    assert not {"pytorch_lightning", "lightning"} & sys.modules.keys()


# --- few bytes that would become many ----------------------------------------------------------------------------


def refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        weights.read_tensors(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("opcode", [b"r" + (2**28).to_bytes(4, "little"), b"p268435456\n"])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_memo_longer_than_the_pickle_is_refused(kind, opcode, tmp_path):
    hostile = b"\x80\x02]" + opcode + b"."
    if kind == "legacy":
        (tmp_path / "w.pth").write_bytes(hostile)
    else:
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            archive.writestr("archive/data.pkl", hostile)
    refused(tmp_path / "w.pth", "w.pth: its pickle gives an object the number 268435456 at byte 3; the file is hostile")


def test_containers_that_are_shared_may_not_multiply(tmp_path, monkeypatch):
    """60 lists, each of which holds the one before it twice: 2^60 paths."""
    monkeypatch.setattr(weights.torch_pickle, "ITEMS", 2**12)
    lists = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"."
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("archive/data.pkl", lists)
    refused(tmp_path / "w.pth", "hold more than 4096 items, shared ones again; the file is hostile")


def test_compressed_members_have_the_size_that_is_expected(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.torch_pickle, "PICKLE_BYTES", 2**16)

    def write(pickle_bytes, storage, kind=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "w.pth", "w", kind) as archive:
            archive.writestr("archive/data.pkl", pickle_bytes)
            archive.writestr("archive/data/0", storage)

    write(pickled({"w": tensor(), "more": "x" * 2**17}), SIX.tobytes())
    refused(tmp_path / "w.pth", "data.pkl' is damaged .131... bytes when decompressed, expected at most 65536.")
    write(pickled({"w": tensor()}), bytes(2**20))
    refused(tmp_path / "w.pth", "'archive/data/0' is damaged .1048576 bytes when decompressed, expected at most 24.")
    write(pickled({"w": tensor()}), SIX.tobytes(), zipfile.ZIP_BZIP2)
    refused(tmp_path / "w.pth", "is damaged .compression 12, expected none or deflate.")
    write(pickled({"w": tensor()}), SIX.tobytes())
    assert weights.read_tensors(tmp_path / "w.pth")["w"].sum() == 15


def test_a_container_within_itself_is_refused(tmp_path):
    cycle = []
    cycle.append(cycle)
    write_zip(tmp_path / "w.pth", {}, {})
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(cycle, 2))
    with pytest.raises(ValueError, match="holds a container within itself"):
        weights.read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "wrapper", ["", "module.", "state_dict.", "nnet_ema.", "model_ema.", "teacher.backbone.", "momentum_encoder."]
)
def test_prefixes_are_recognised_beside_the_weights_that_were_not_averaged(wrapper, tmp_path):
    tree = {"norm.weight": SIX, "head.weight": SIX}
    content = {f"{wrapper}{name}": array for name, array in tree.items()} | {"optimizer.state.0.exp_avg": SIX}
    if wrapper.split(".")[0] in (*weights.AVERAGED, "nnet_ema"):
        content |= {f"student.{name}": -array for name, array in tree.items()}
    write_safetensors(tmp_path / "w.safetensors", content)
    found = weights.load_network([tmp_path / "w.safetensors"], "norm.weight", unused=("head.", "optimizer."))
    assert list(found) == ["norm.weight"] and found["norm.weight"][1] == 1


# --- folders -----------------------------------------------------------------------------------------------------


def names(paths) -> list[str]:
    return [os.path.basename(path) for path in paths]


def test_files_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file in it \(model\*.safetensors, .*pytorch_model\*.bin"):
        weights.find_weight_files(tmp_path)
    for name in ("pytorch_model-2.bin", "pytorch_model-1.bin", "training.bin"):
        (tmp_path / name).touch()
    assert names(weights.find_weight_files(tmp_path)) == ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "training.bin"}}))
    assert names(weights.find_weight_files(tmp_path)) == ["training.bin"]
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert names(weights.find_weight_files(tmp_path)) == ["diffusion_pytorch_model.fp16.safetensors"]
    for name in ("model.safetensors", "model.fp16.safetensors"):
        (tmp_path / name).touch()
    assert weights.find_weight_files(tmp_path) == [str(tmp_path / "model.safetensors")]
    assert weights.find_weight_files(tmp_path / "training.bin") == [str(tmp_path / "training.bin")]
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: a folder, expected a weight file; give the file in it"):
        weights.read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent.bin: no such weight file"):
        weights.find_weight_files(tmp_path / "absent.bin")


def sharded(folder, index) -> pathlib.Path:
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_an_index_is_followed(tmp_path):
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"a": SIX})
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {"b": SIX + 1, "c": SIX})
    write_safetensors(tmp_path / "model-stale.safetensors", {"a": SIX + 9})
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"metadata": {"total_size": 72}, "weight_map": {"c": shards[1], "b": shards[1], "a": shards[0]}}
    paths = weights.find_weight_files(sharded(tmp_path, index))
    assert names(paths) == shards
    assert {name: array[0] for name, array in weights.load_network(paths, "a").items()} == {"a": 0, "b": 1, "c": 0}
    (tmp_path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1]}: this shard is missing, model.*index.json lists 2"):
        weights.find_weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "sub/a", "..", "", 3])
def test_an_index_may_not_leave_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match="names the shard .*, expected a file of its own folder"):
        weights.find_weight_files(sharded(tmp_path, {"weight_map": {"w": name}}))


@pytest.mark.parametrize("weight_map, message", [({}, "lists no weight files"), ({"a": 3, "b": "w"}, "the shard 3, ")])
def test_an_index_without_names(weight_map, message, tmp_path):
    with pytest.raises(ValueError, match=f"model.safetensors.index.json: .*{message}") as error:
        weights.find_weight_files(sharded(tmp_path, {"weight_map": weight_map}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_damaged_indices(text, tmp_path):
    with pytest.raises(ValueError, match="not an index of weight files") as error:
        weights.find_weight_files(sharded(tmp_path, text))
    assert "\n" not in str(error.value)


# --- memory ------------------------------------------------------------------------------------------------------

READER = """
import resource, sys
from nested.weights import files as weights
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
tensors = weights.load_network(weights.find_weight_files(sys.argv[1]), "shard0.used")
assert len(tensors) == 8 and float(tensors["shard0.used"].sum()) == 0
print(peak() - before)
"""


def test_what_is_not_used_takes_no_memory(tmp_path):
    """Four shards of 64 MB, holes in the file system, of which one tensor of 4 MB is used."""
    weight_map = {}
    for shard in range(4):
        name = f"model-{shard}.safetensors"
        entries = {f"shard{shard}.used": [0, 2**22], f"shard{shard}.other": [2**22, 2**26]}
        header = {
            key: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
            for key, (start, end) in entries.items()
        }
        text = json.dumps(header).encode()
        with open(tmp_path / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 2**26)
        weight_map |= dict.fromkeys(header, name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = sharded(tmp_path, {"weight_map": weight_map})
    done = subprocess.run([sys.executable, "-c", READER, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24, f"{done.stdout} MB more than before"


@pytest.mark.parametrize("kind", ["w.safetensors", "zip.pth", "legacy.pth"])
def test_arrays_are_views_of_the_file(kind, tmp_path):
    """What changes in the file shows in the arrays; and they are all that keeps it open."""
    path, content = tmp_path / kind, {"w": tensor()}
    if kind == "w.safetensors":
        write_safetensors(path, {"w": SIX.reshape(2, 3)})
    else:
        (write_zip if kind == "zip.pth" else write_legacy)(path, content, {"0": SIX})
    array = weights.read_tensors(path)["w"]
    position = path.read_bytes().index(SIX.tobytes())
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(np.float32(7).tobytes())
    assert array[0, 0] == 7
    opened = pathlib.Path("/proc/self/fd")
    if opened.is_dir():
        array = None
        gc.collect()
        assert str(path) not in [os.path.realpath(link) for link in opened.iterdir()]


def test_compressed_members_are_read_all_the_same(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({"w": tensor(dtype="BFloat16Storage")}))
        archive.writestr("archive/data/0", SIX.astype(ml_dtypes.bfloat16).tobytes())
    found = weights.read_tensors(tmp_path / "w.pth")["w"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), SIX.reshape(2, 3))


def test_a_member_whose_sizes_disagree_is_refused(tmp_path):
    """The directory of the zip says that the storage goes on into the next member."""
    write_zip(tmp_path / "w.pth", {"w": tensor(size=7)}, {"0": SIX})
    whole = bytearray((tmp_path / "w.pth").read_bytes())
    entry = whole.rindex(b"archive/data/0") - 46  # the central directory's entry
    whole[entry + 24 : entry + 28] = (28).to_bytes(4, "little")  # size without compression
    (tmp_path / "w.pth").write_bytes(whole)
    with pytest.raises(ValueError, match="member 'archive/data/0' is damaged"):
        weights.read_tensors(tmp_path / "w.pth")


# --- writing -----------------------------------------------------------------------------------------------------


def test_write_and_read(tmp_path):
    from safetensors.numpy import load_file

    tensors = {
        "a.weight": SIX.reshape(2, 3).T, "half": SIX.astype(np.float16), "count": np.int64(5), "none": SIX[:0],
        "flag": np.array([True]),
    }  # fmt: skip
    path = tmp_path / "sub" / "w.safetensors"
    weights.write_safetensors(path, tensors, {"config": '{"seed": 1}'})
    assert weights.read_metadata(path) == {"config": '{"seed": 1}'}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # the data are aligned
    for found in (weights.read_tensors(path), load_file(path)):
        assert found.keys() == tensors.keys()
        for name, array in tensors.items():
            assert found[name].dtype == array.dtype, name
            np.testing.assert_array_equal(found[name], array, name)
    weights.write_safetensors(path, {"b": SIX.astype(ml_dtypes.bfloat16)}, {})
    assert weights.read_tensors(path)["b"].dtype == ml_dtypes.bfloat16 and weights.read_metadata(path) == {}
    with pytest.raises(OSError, match="not written: Is a directory"):
        weights.write_safetensors(tmp_path / "sub", tensors, {})
    assert os.listdir(tmp_path) == ["sub"]
    with pytest.raises(ValueError, match="ckpt_badheader.safetensors: bad safetensors header"):
        weights.read_metadata(GOLDEN / "ckpt_badheader.safetensors")


# --- one network among what a file holds --------------------------------------------------------------------------


def saved(path, **trees):
    """A .npz with {prefix.name: array} of each tree."""
    np.savez(path, **{f"{prefix}.{name}": array for prefix, tree in trees.items() for name, array in tree.items()})
    return path


def test_load_finds_the_network_behind_its_wrapper(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(weights.logging, "info", lambda message, *values: said.append(message % values))
    tree = {"cls_token": SIX, "head.weight": SIX + 1, "norm.bias": SIX + 2}
    bare = tmp_path / "bare.npz"
    np.savez(bare, **tree)
    assert list(weights.load_network([bare], "cls_token", unused=("head.",))) == ["cls_token", "norm.bias"]
    wrapped = saved(tmp_path / "a.npz", **{"state_dict.module.base_encoder": tree, "optimizer": {"step": SIX}})
    assert list(weights.load_network([wrapped], "cls_token")) == list(tree)
    later = {name: array + 10 for name, array in tree.items()}
    both = saved(tmp_path / "b.npz", **{"student.module.backbone": tree, "teacher.backbone": later})
    np.testing.assert_array_equal(weights.load_network([both], "cls_token")["cls_token"], SIX + 10)
    assert len(said) == 1 and "takes the weights behind 'teacher.backbone.', of 'student.module" in said[0]
    for prefix in ("student.module.backbone", "student.module.backbone."):
        np.testing.assert_array_equal(weights.load_network([both], "cls_token", prefix=prefix)["cls_token"], SIX)
    np.testing.assert_array_equal(weights.load_network([both], "cls_token", prefer=("student",))["cls_token"], SIX)
    shard = saved(tmp_path / "c.npz", **{"teacher.backbone": {"extra": SIX}})
    assert list(weights.load_network([both, shard], "cls_token")) == [*tree, "extra"]


def test_load_refuses_what_it_cannot_tell_apart(tmp_path):
    tree = {"cls_token": SIX}
    path = saved(tmp_path / "a.npz", first=tree, second=tree)
    with pytest.raises(ValueError, match="a.npz: holds more than one such network: give one of 'first.', 'second.'"):
        weights.load_network([path], "cls_token")
    with pytest.raises(ValueError, match="a.npz: no 'third.cls_token'; the file has it behind 'first.', 'second.'"):
        weights.load_network([path], "cls_token", prefix="third")
    np.savez(tmp_path / "b.npz", **tree, **{"aux.cls_token": SIX + 1, "aux.more": SIX})
    with pytest.raises(ValueError, match="b.npz: holds more than one such network: give one of '.', 'aux.' as prefix"):
        weights.load_network([tmp_path / "b.npz"], "cls_token")
    assert list(weights.load_network([tmp_path / "b.npz"], "cls_token", prefix=".")) == ["cls_token"]
    assert list(weights.load_network([tmp_path / "b.npz"], "cls_token", prefix="aux")) == ["cls_token", "more"]
    with pytest.raises(ValueError, match="a.npz: no tensor is called 'token', with or without a prefix; it has first"):
        weights.load_network([path], "token")  # a part of a name is none
    with pytest.raises(ValueError, match="a.npz and 1 more: first.cls_token, .* in more than one shard"):
        weights.load_network([path, path], "cls_token")


def test_checked_accounts_for_every_tensor():
    shapes = {"a": (6,), "b": (2, 3)}
    tensors = {"b": SIX.reshape(2, 3), "a": SIX}
    assert list(weights.check_tensors(tensors, shapes, "w")) == ["a", "b"]
    for wrong, message in (
        ({"a": SIX}, r"w: tensor 'b' \(2, 3\) is missing; give"),
        (tensors | {"c": SIX}, r"w: tensor 'c' \(6,\) is unknown; give"),
        (tensors | {"b": SIX}, r"w: tensor 'b' has shape \(6,\), expected \(2, 3\); give"),
        ({"c": SIX}, r"w: tensor 'a' \(6,\) is missing \(3 such problems\); give"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.check_tensors(wrong, shapes, "w")
