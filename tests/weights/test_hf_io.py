"""Weights in and out: every bit survives, on any mesh, in one file or many, and what stands beside them comes along."""

import dataclasses
import gc
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import d1jax
from d1jax.config import MeshConfig, ModelConfig, UserError
from d1jax.models.config_json import write_config
from d1jax.models.families import family_for
from d1jax.models.sharding import AXES, make_mesh
from d1jax.models.transformer import Transformer, abstract_variables
from d1jax.weights.hf_directory import open_checkpoint
from d1jax.weights.hf_io import companions_of, compare, in_memory, load_weights, save_native, save_weights
from d1jax.weights.names import entries, expected_shapes, leaf

FAMILY = {
    "llada": {"heads": 4, "kv_heads": 4},
    "dream": {"heads": 4, "kv_heads": 2, "alignment": "shifted", "qkv_bias": True, "rope_full_precision": False},
}
MESHES = {
    "one device": lambda: jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]),
    "data 2 x fsdp 2 x tensor 2": lambda: make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
}
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Loading collects garbage after every array; it need not look at all that other tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def published(tmp_path):
    """A checkpoint that d1jax did not write -> (its directory, its tensors): random numbers saved by safetensors."""

    def write(dtype="float32", shards=1, name="published", **changes):
        sizes = dict(width=16, layers=2, mlp_width=24, vocab_size=14, max_positions=64, param_dtype=dtype)
        config = ModelConfig(**{**sizes, **changes})
        folder, rng = tmp_path / name, np.random.default_rng(0)
        folder.mkdir()
        shapes = expected_shapes(config, family_for(config))
        tensors = {name: rng.standard_normal(shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}
        files = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
        place = {tensor: files[rng.integers(shards)] for tensor in tensors}
        for file in files if shards > 1 else ():
            save_file({tensor: tensors[tensor] for tensor in tensors if place[tensor] == file}, folder / file)
        if shards > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
        else:
            save_file(tensors, folder / "model.safetensors")
        text = json.dumps(write_config(config, {"mask_token_id": 12, "eos_token_id": 11}), indent=3)
        (folder / "config.json").write_text(text)  # an indentation that d1jax does not use
        return folder, tensors

    return write


def copy(source, out, mesh, dtype=None, shard_bytes=10**9):
    """source -> arrays on the mesh -> out."""
    checkpoint = open_checkpoint(source)
    config = dataclasses.replace(checkpoint.config, param_dtype=dtype or checkpoint.config.param_dtype)
    variables = load_weights(checkpoint, config, mesh)
    companions = companions_of(checkpoint, config.param_dtype)
    arrays = in_memory(variables, config, checkpoint.family)
    save_weights(arrays, config, checkpoint.family, out, companions, shard_bytes)
    return variables


# -- there and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "dtype, shard_bytes",
    [("float32", 10**9), ("float32", 1500), ("bfloat16", 1500), ("float16", 10**9)],
    ids=["float32", "float32 in shards", "bfloat16 in shards", "float16"],
)
@pytest.mark.parametrize("family", FAMILY)
def test_what_was_saved_loads_bit_for_bit_and_in_place(write_checkpoint, family, dtype, shard_bytes, mesh):
    sizes = dict(vocab_size=14, param_dtype=dtype)
    out, model, variables = write_checkpoint(shard_bytes=shard_bytes, **sizes, **FAMILY[family])
    assert (len(list(out.glob("model-*-of-*.safetensors"))) > 1) == (shard_bytes == 1500)
    checkpoint, mesh = open_checkpoint(out), MESHES[mesh]()
    loaded = load_weights(checkpoint, checkpoint.config, mesh)
    assert_same_bits(loaded, variables)
    like = abstract_variables(Transformer(checkpoint.config), mesh)
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, like)
    if mesh.size > 1:
        gate = loaded["params"]["blocks"]["ff_proj"]["kernel"]
        assert gate.addressable_shards[0].data.size == gate.size // 4, "fsdp and tensor cut it, data does not"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILY)
def test_every_byte_of_a_published_file_survives_loading_and_saving(published, tmp_path, family, dtype):
    source, tensors = published(dtype, shards=3, **FAMILY[family])
    copy(source, tmp_path / "out", make_mesh(MeshConfig(fsdp=2, tensor=2)))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), name
        assert written[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("changes", [{"tied_head": True}, {"layers": 1}, {"vocab_size": 13, "mlp_width": 25}], ids=str)
def test_tied_heads_single_layers_and_odd_sizes_survive_too(published, tmp_path, changes):
    source, tensors = published(**FAMILY["llada"], **changes)
    copy(source, tmp_path / "out", MESHES["data 2 x fsdp 2 x tensor 2"]())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: x.tobytes() for name, x in written.items()} == {name: x.tobytes() for name, x in tensors.items()}


def test_shards_are_those_of_the_index_and_small_enough(published, tmp_path):
    source, tensors = published(**FAMILY["dream"])
    copy(source, tmp_path / "out", MESHES["one device"](), shard_bytes=2000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}, "transformers refuses files without it"
        held |= dict.fromkeys(names, file.name)
        assert len(names) == 1 or sum(tensors[name].nbytes for name in names) <= 2000
    assert held == index["weight_map"] and set(held) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    "stored, wanted", [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_loading_into_another_dtype_rounds_to_the_nearest(published, tmp_path, stored, wanted):
    source, tensors = published(stored, **FAMILY["llada"])
    variables = copy(source, tmp_path / "out", MESHES["data 2 x fsdp 2 x tensor 2"](), dtype=wanted)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(wanted)}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.tobytes() == tensors[name].astype(jnp.dtype(wanted)).tobytes(), name
    assert open_checkpoint(tmp_path / "out").config.param_dtype == wanted


def test_an_existing_checkpoint_is_not_overwritten(published, tmp_path):
    source, _ = published(**FAMILY["llada"])
    before = {file: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(FileExistsError, match="published exists already"):
        copy(source, source, MESHES["one device"]())
    assert {file: file.read_bytes() for file in source.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


# -- the native form ------------------------------------------------------------------------------------------------------


@pytest.fixture
def native(write_checkpoint, tmp_path):
    def write(**changes):
        out, _, variables = write_checkpoint(vocab_size=14, **changes)
        checkpoint = open_checkpoint(out)
        arrays, companions = (
            in_memory(variables, checkpoint.config, checkpoint.family),
            companions_of(checkpoint, "float32"),
        )
        save_native(arrays, checkpoint.config, checkpoint.family, tmp_path / "native", companions)
        return tmp_path / "native", variables

    return write


def rewrite(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILY)
def test_native_form_loads_bit_for_bit_and_in_place(native, family, mesh):
    folder, variables = native(**FAMILY[family])
    checkpoint, mesh = open_checkpoint(folder), MESHES[mesh]()
    assert checkpoint.native and not list(folder.glob("*.safetensors"))
    loaded = load_weights(checkpoint, checkpoint.config, mesh)
    assert_same_bits(loaded, variables)
    like = abstract_variables(Transformer(checkpoint.config), mesh)
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, like)


def test_native_form_knows_its_dtype_and_casts(native):
    folder, variables = native(param_dtype="bfloat16", **FAMILY["llada"])
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.param_dtype == "bfloat16"
    config = dataclasses.replace(checkpoint.config, param_dtype="float32")
    loaded = load_weights(checkpoint, config, MESHES["one device"]())
    assert_same_bits(loaded, jax.tree.map(lambda x: x.astype("float32"), variables))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"mlp_hidden_size": 40},
            r"params/blocks\.ff_\w+\.kernel: has shape \(2, (16, 24|24, 16)\), config.json says \(2, (16, 40|40, 16)\)",
        ),
        ({"n_layers": 3}, r"has shape \(2, .*\), config.json says \(3, "),
        ({"weight_tying": True}, r"params/ff_out: is not expected"),
        ({"include_qkv_bias": True}, r"params/blocks\.k_proj\.bias: is missing"),
    ],
    ids=str,
)
def test_native_weights_that_disagree_with_their_config_are_named(native, changes, message):
    folder, _ = native(**FAMILY["llada"])
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("kept", ["nothing", "all but the description of the tree"])
def test_native_weights_that_orbax_cannot_read_are_named(native, kept):
    folder, _ = native(**FAMILY["llada"])
    for file in [file for file in (folder / "params").rglob("*") if file.is_file()]:
        if kept == "nothing" or file.name == "_METADATA":
            file.unlink()
    with pytest.raises(UserError, match=r"native/params/[a-z_.]+: not readable by Orbax"):
        open_checkpoint(folder)


# -- what stands beside ---------------------------------------------------------------------------------------------------

COPIED = {
    "tokenizer.json": b'{"a":  1}',
    "merges.txt": b"#version: 0.2\r\n",
    "tokenizer.model": b"\x00\xff",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b"{}\n\n",
    "modeling_llada.py": b"from pathlib import Path\nPath(__file__).with_name('EXECUTED').touch()\n",
    "LICENSE": b"Apache",
    "NOTICE.md": b"notice",
}
LEFT = {
    "README.md": b"# The original model",
    "pytorch_model.bin": b"\x80\x04stray",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.safetensors": b"stray",
    "model.gguf": b"stray",
    ".gitattributes": b"* lfs",
}


@pytest.fixture
def with_companions(published):
    folder, _ = published("bfloat16", shards=2, **FAMILY["llada"])
    for name, content in {**COPIED, **LEFT}.items():
        (folder / name).write_bytes(content)
    (folder / "folder.json").mkdir()
    return folder


def test_companions_are_copied_byte_for_byte_and_nothing_else_is(with_companions, tmp_path):
    copy(with_companions, tmp_path / "out", MESHES["one device"]())
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    del found["model.safetensors"]
    assert found == {**COPIED, "config.json": (with_companions / "config.json").read_bytes()}


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_dtype_is_all_that_changes_in_the_config_of_a_converted_checkpoint(with_companions, tmp_path, name):
    before = json.loads((with_companions / "config.json").read_text())
    before[name] = before.pop("torch_dtype")
    (with_companions / "config.json").write_text(json.dumps(before))
    copy(with_companions, tmp_path / "out", MESHES["one device"](), dtype="float32")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before[name] == "bfloat16" and after == {**before, name: "float32"}
    assert list(after) == list(before)


def test_remote_code_is_never_executed(write_checkpoint, tmp_path):
    folder, _, _ = write_checkpoint(vocab_size=14, max_positions=64)
    (folder / "modeling_llada.py").write_bytes(COPIED["modeling_llada.py"])
    code = {kind: "modeling_llada.Evil" for kind in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    rewrite(folder, auto_map=code)
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": [None, "modeling_llada.Evil"]}})
    )
    policy = d1jax.load_pretrained(folder)
    d1jax.save_pretrained(policy, tmp_path / "out")
    assert not list(tmp_path.rglob("EXECUTED"))
    assert (tmp_path / "out" / "modeling_llada.py").read_bytes() == COPIED["modeling_llada.py"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == code


# -- comparing ------------------------------------------------------------------------------------------------------------


def flip(file, tensor, element, bit):
    """Flips a bit of an element, in the file."""
    content = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + size])[tensor]
    width = {"F32": 4, "BF16": 2, "F16": 2}[entry["dtype"]]
    content[8 + size + entry["data_offsets"][0] + element * width + bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


BLOCK = "model.transformer.blocks.1."


@pytest.mark.parametrize(
    "dtype, tensor, path",
    [
        ("float32", BLOCK + "ff_out.weight", ("blocks", "ff_out", "kernel")),
        ("bfloat16", "model.transformer.ff_out.weight", ("ff_out",)),
        ("float16", "model.transformer.wte.weight", ("wte",)),
        ("bfloat16", BLOCK + "ff_norm.weight", ("blocks", "ff_norm", "scale")),
    ],
    ids=lambda x: "/".join(x) if isinstance(x, tuple) else "",
)
def test_one_flipped_bit_is_found_where_it_is(published, dtype, tensor, path):
    (one, _), (two, _) = (published(dtype, name=name, **FAMILY["llada"]) for name in ("one", "two"))
    flip(two / "model.safetensors", tensor, element=9, bit=0)
    found = compare(open_checkpoint(one), open_checkpoint(two), MESHES["data 2 x fsdp 2 x tensor 2"]())
    assert [entry.path for entry in found] == [path]


def test_a_flipped_sign_of_zero_is_found_and_nan_equals_itself(published):
    (one, tensors), (two, _) = (published(name=name, **FAMILY["dream"]) for name in ("one", "two"))
    norm, bias = "model.norm.weight", "model.layers.0.self_attn.k_proj.bias"
    tensors[norm][0], tensors[bias][3] = 0.0, np.nan
    save_file(tensors, one / "model.safetensors")
    tensors[norm][0] = -0.0
    save_file(tensors, two / "model.safetensors")
    found = compare(open_checkpoint(one), open_checkpoint(two), MESHES["one device"]())
    assert [entry.path for entry in found] == [("ln_f", "scale")]


def test_the_native_form_equals_the_published_one(native, tmp_path):
    folder, _ = native(**FAMILY["llada"])
    one, two = open_checkpoint(tmp_path / "checkpoint"), open_checkpoint(folder)
    assert compare(one, two, MESHES["one device"]()) == []


def test_every_entry_of_a_loaded_model_is_an_array_of_its_own(published):
    """What was read is deleted after its conversion; nothing that was returned may share its buffer."""
    source, _ = published(**FAMILY["llada"])
    checkpoint = open_checkpoint(source)
    variables = load_weights(checkpoint, checkpoint.config, MESHES["one device"]())
    arrays = [leaf(variables, entry.path) for entry in entries(checkpoint.config, checkpoint.family)]
    assert not any(array.is_deleted() for array in arrays)
