"""A checkpoint that cannot be loaded is refused with one line that names the tensor or file, before a tensor is read."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from d1jax.config import MeshConfig, UserError
from d1jax.files import write_json
from d1jax.models.config_json import write_config
from d1jax.models.families import FAMILIES
from d1jax.models.sharding import make_mesh
from d1jax.weights.hf_directory import copy_companions, open_checkpoint, read_json
from d1jax.weights.hf_io import arrays_of, companions_of, in_memory, load_weights, save_native, save_weights
from d1jax.weights.names import entries

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
UP, NORM = "model.transformer.blocks.1.up_proj.weight", "model.transformer.ln_f.weight"

LLADA = FAMILIES["llada"]


@pytest.fixture
def single(write_checkpoint):
    return write_checkpoint()[0]


@pytest.fixture
def sharded(write_checkpoint):
    return write_checkpoint(shard_bytes=4000)[0]


def refusal(folder):
    """The message with which a directory is refused."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def edit_tensors(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_map(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return index["weight_map"]


# -- whole checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("alignment, family", [("same_position", "llada"), ("shifted", "dream")])
@pytest.mark.parametrize("shard_bytes", [10**9, 2000], ids=["one file", "shards"])
def test_headers_say_what_is_there(write_checkpoint, alignment, family, dtype, shard_bytes):
    folder, model, _ = write_checkpoint(
        shard_bytes=shard_bytes, alignment=alignment, param_dtype=dtype, max_positions=64
    )
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config == model.config and checkpoint.family is FAMILIES[family]
    assert not checkpoint.native and checkpoint.published == json.loads((folder / "config.json").read_text())
    assert checkpoint.files == sorted(folder.glob("*.safetensors"))
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {dtype}


def test_the_stored_dtype_counts_and_not_the_one_that_config_json_claims(single):
    published = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**published, "torch_dtype": "bfloat16"}))
    assert open_checkpoint(single).config.param_dtype == "float32"


# -- the directory and its config.json ------------------------------------------------------------------------------------


def test_no_directory(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"checkpoint '{tmp_path}/nowhere': no such directory"
    (tmp_path / "file").write_text("")
    assert "no such directory" in refusal(tmp_path / "file")


def test_no_config(single):
    (single / "config.json").unlink()
    assert "has no config.json; name the directory that holds it" in refusal(single)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not readable as JSON"),
        (b'{"model_type": "llada"', "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"d_model": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"[]", "expected an object, found list"),
        (b"null", "expected an object, found NoneType"),
        (b'{"d_model": 16, "n_layers": 2, "d_model": 32}', "key 'd_model' stands there twice"),
        (b'{"auto_map": {"AutoModel": "a", "AutoModel": "b"}}', "key 'AutoModel' stands there twice"),
        (b"{}", "model_type None"),
    ],
    ids=lambda x: str(x[:40]) if isinstance(x, bytes) else "",
)
def test_a_broken_config_is_named(single, content, message):
    (single / "config.json").write_bytes(content)
    assert refusal(single).startswith(f"{single / 'config.json'}: ") and message in refusal(single)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_json_that_is_an_object_is_read_as_python_reads_it(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps({"value": value}))
    assert read_json(tmp_path / "x.json") == {"value": value}


# -- missing files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stray", [[], ["pytorch_model.bin"], ["consolidated.safetensors", "model.gguf"]], ids=str)
def test_no_weights_and_what_is_there_instead(single, stray):
    (single / SINGLE).unlink()
    for name in stray:
        (single / name).write_bytes(b"")
    message = refusal(single)
    assert f"has neither {SINGLE} nor {INDEX} nor params/" in message
    assert message.endswith("; it has " + ", ".join(stray) if stray else "params/")


def test_a_missing_shard_is_named_with_a_tensor_that_it_held(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    shard = sorted(set(weight_map.values()))[1]
    (sharded / shard).unlink()
    message = refusal(sharded)
    owner = re.fullmatch(rf".*{INDEX}: names shard '{shard}' \(of tensor (\S+)\), which is not there", message)[1]
    assert weight_map[owner] == shard


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "folder/x.safetensors", "..", "", "."])
def test_an_index_cannot_name_a_file_elsewhere(sharded, place):
    shard = next(sharded.glob("model-*"))
    (sharded / "folder").mkdir()
    for outside in (sharded.parent, sharded / "folder"):
        (outside / "x.safetensors").write_bytes(shard.read_bytes())
    edit_map(sharded, lambda weight_map: weight_map.update({NORM: place}))
    assert refusal(sharded) == f"{sharded / INDEX}: names shard {place!r} (of tensor {NORM}), which is not there"


# -- broken files ---------------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_named_wherever_it_was_cut(single):
    file = single / SINGLE
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for size in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, 8 + header + 1, len(whole) - 1):
        file.write_bytes(whole[:size])
        message = refusal(single)
        assert message.startswith(f"{file}: not a whole safetensors file (") and "download it again" in message, size


def test_a_truncated_shard_is_the_one_that_is_named(sharded):
    shard = sorted(sharded.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert refusal(sharded).startswith(f"{shard}: not a whole safetensors file")


@pytest.mark.parametrize(
    "start, content",
    [(0, b"\xff" * 8), (0, struct.pack("<Q", 3)), (8, b"[["), (10, b"\xff\xfe"), (0, b"\x80\x04PyTorch")],
    ids=["huge header", "short header", "no object", "no UTF-8", "a pickle"],
)
def test_a_corrupted_header_is_named(single, start, content):
    whole = bytearray((single / SINGLE).read_bytes())
    whole[start : start + len(content)] = content
    (single / SINGLE).write_bytes(whole)
    assert refusal(single).startswith(f"{single / SINGLE}: not a whole safetensors file")


@given(st.data())
def test_no_byte_of_a_header_breaks_anything_but_the_message(single, data):
    whole = bytearray((single / SINGLE).read_bytes())
    (header,) = struct.unpack("<Q", whole[:8])
    at = data.draw(st.integers(0, 8 + header - 1))
    changed = whole.copy()
    changed[at] = data.draw(st.integers(0, 255))
    (single / SINGLE).write_bytes(changed)
    try:
        opened = open_checkpoint(single)
    except UserError as error:
        assert str(single) in str(error)
    else:  # the byte did not matter: white space, "pt", an equivalent header
        assert len(opened.tensors) == 21
    finally:
        (single / SINGLE).write_bytes(whole)


# -- an index that is wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}',
     '{"weight_map": {"a": 1, "b": "x"}}', '{"weight_map": {"a": null}}', "[]", "{"],
)  # fmt: skip
def test_an_index_without_a_map_is_named(sharded, content):
    (sharded / INDEX).write_text(content)
    assert refusal(sharded).startswith(f"{sharded / INDEX}: ")


def test_a_tensor_in_two_shards_is_named_with_both(sharded):
    one, two = sorted(sharded.glob("model-*"))[:2]
    tensors = load_file(one)
    name = min(tensors)
    edit_tensors(two, lambda others: others.update({name: tensors[name]}))
    assert f"tensor {name} is both in {one.name} and in {two.name}" in refusal(sharded)


def test_a_tensor_that_is_in_another_shard_than_the_index_says_is_named(sharded):
    files = sorted(file.name for file in sharded.glob("model-*"))
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    wrong = next(file for file in files if file != weight_map[UP])
    edit_map(sharded, lambda weight_map: weight_map.update({UP: wrong}))
    assert refusal(sharded) == f"{sharded / INDEX}: says that tensor {UP} is in {wrong}, which does not hold it"


def test_a_tensor_that_only_the_index_knows_is_named(sharded):
    shard = next(sharded.glob("model-*")).name
    edit_map(sharded, lambda weight_map: weight_map.update(ghost=shard))
    assert "says that tensor ghost is in" in refusal(sharded)


# -- tensors --------------------------------------------------------------------------------------------------------------


def change(name, value):
    return lambda tensors: tensors.update({name: value})


def remove(name):
    return lambda tensors: tensors.pop(name)


def cast(dtype):
    return lambda tensors: tensors.update({name: x.astype(dtype) for name, x in tensors.items()})


@pytest.mark.parametrize(
    "edit, message",
    [
        (remove(UP), f"missing tensors: {UP}"),
        (change("lm_head.weight", np.zeros((13, 16), np.float32)), "unexpected tensors: lm_head.weight"),
        (change(UP, np.zeros((16, 24), np.float32)), f"tensor {UP} has shape (16, 24), config.json says (24, 16)"),
        (change(NORM, np.zeros((16, 1), np.float32)), f"tensor {NORM} has shape (16, 1), config.json says (16,)"),
        (change(NORM, np.zeros(16, np.float16)), f"blocks.0.attn_norm.weight is float32, {NORM} is float16; store all in one"),
        (cast(np.int8), "weights are stored as I8; d1jax reads float32, bfloat16, float16"),
        (cast(np.float64), "weights are stored as F64; d1jax reads float32, bfloat16, float16"),
    ],
    ids=["missing", "unexpected", "transposed", "rank", "mixed dtypes", "int8", "float64"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["single", "sharded"])
def test_a_tensor_that_does_not_fit_is_named(request, form, edit, message):
    folder = request.getfixturevalue(form)
    if form == "sharded":  # one shard of all tensors, with an index
        tensors = {}
        for file in folder.glob("model-*"):
            tensors |= load_file(file)
            file.unlink()
        save_file(tensors, folder / "model-00001-of-00001.safetensors")
        edit_map(
            folder, lambda weight_map: weight_map.update(dict.fromkeys(weight_map, "model-00001-of-00001.safetensors"))
        )
    file = folder / {"single": SINGLE, "sharded": "model-00001-of-00001.safetensors"}[form]
    edit_tensors(file, edit)
    if form == "sharded":
        edit_map(folder, lambda weight_map: [weight_map.pop(UP)] if UP not in load_file(file) else None)
    assert message in refusal(folder) and str(folder) in refusal(folder)


def test_an_fp8_checkpoint_is_refused_by_its_dtype(single):
    file = single / SINGLE
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data, offset = json.loads(content[8 : 8 + size]), b"", 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = int(np.prod(entry["shape"]))
            entry.update(dtype="F8_E4M3", data_offsets=[offset, offset + count])
            data, offset = data + bytes(count), offset + count
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert f"{single}: weights are stored as F8_E4M3" in refusal(single)


@pytest.mark.parametrize("form", ["published", "native"])
def test_a_number_of_layers_that_is_not_there_is_refused_before_as_many_names_are_made(tiny, tmp_path, form):
    """With 10^9 names this would take hours, and the memory of the machine."""
    model, variables = tiny()
    companions = lambda beside: write_json(beside / "config.json", write_config(model.config, {}))  # noqa: E731
    save = save_native if form == "native" else save_weights
    save(in_memory(variables, model.config, LLADA), model.config, LLADA, tmp_path / "out", companions)
    file = tmp_path / "out" / "config.json"
    assert open_checkpoint(file.parent).config.layers == 2
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_layers": 10**9}))
    assert "n_layers = 1000000000" in refusal(file.parent)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ["published", "native"])
def test_a_weight_that_is_not_finite_is_refused_by_name(write_checkpoint, tmp_path, form, bad):
    folder, model, _ = write_checkpoint()
    edit_tensors(folder / SINGLE, lambda tensors: tensors[UP].__setitem__((3, 4), bad))
    mesh = make_mesh(MeshConfig())
    checkpoint = open_checkpoint(folder)
    if form == "native":  # a conversion moves bits, whatever they mean
        arrays = arrays_of(checkpoint, checkpoint.config, mesh, entries(checkpoint.config, LLADA))
        save_native(arrays, checkpoint.config, LLADA, tmp_path / "out", companions_of(checkpoint, "float32"))
        checkpoint = open_checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match=f"tensor {re.escape(UP)} holds NaN or infinite values"):
        load_weights(checkpoint, checkpoint.config, mesh)


# -- companions -----------------------------------------------------------------------------------------------------------


def test_a_link_out_of_the_checkpoint_is_refused_and_nothing_is_copied(single, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (single / "notes.txt").symlink_to(tmp_path / "secret.txt")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="notes.txt: links to .*secret.txt, outside of the checkpoint"):
        copy_companions(single, out)
    assert not (out / "notes.txt").exists()


def test_links_inside_the_checkpoint_and_into_the_hubs_cache_are_copied_as_files(single, tmp_path):
    (single / "readme.txt").symlink_to("config.json")
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (cache / "blobs" / "abc").write_text("a licence")
    shutil.copytree(single, cache / "snapshots" / "1f2e", symlinks=True)
    (cache / "snapshots" / "1f2e" / "LICENSE").symlink_to("../../blobs/abc")
    (tmp_path / "out").mkdir()
    copy_companions(cache / "snapshots" / "1f2e", tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "a licence"
    assert (tmp_path / "out" / "readme.txt").read_text() == (single / "config.json").read_text()
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


# -- saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["published", "native"])
@pytest.mark.parametrize("existed", [False, True], ids=["new", "empty directory"])
def test_a_failing_save_leaves_nothing_behind(tiny, tmp_path, form, existed):
    model, variables = tiny()
    out = tmp_path / "out"
    if existed:
        out.mkdir()

    def companions(beside):
        (beside / "config.json").write_text("{}")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        if form == "native":
            save_native(in_memory(variables, model.config, LLADA), model.config, LLADA, out, companions)
        else:
            save_weights(in_memory(variables, model.config, LLADA), model.config, LLADA, out, companions)
    assert sorted(tmp_path.rglob("*")) == [out] * existed


def test_a_save_that_fails_at_the_second_shard_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    model, variables = tiny()
    written = []

    def save(tensors, file, **_):
        if written:
            raise OSError("no space left on device")
        written.append(file)
        file.write_bytes(b"shard")

    monkeypatch.setattr("d1jax.weights.hf_io.save_file", save)
    with pytest.raises(OSError, match="no space left"):
        save_weights(
            in_memory(variables, model.config, LLADA), model.config, LLADA, tmp_path / "out", lambda _: None, 2000
        )
    assert written and not list(tmp_path.iterdir())
