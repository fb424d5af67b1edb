"""d1jax convert: every sub-command, and what it says of mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from d1jax import convert
from d1jax.config import LoraConfig, MeshConfig
from d1jax.models import lora
from d1jax.models.families import family_for
from d1jax.models.sharding import make_mesh
from d1jax.weights.hf_directory import open_checkpoint
from d1jax.weights.hf_io import load_weights
from d1jax.weights.names import to_published
from d1jax.weights.peft import save_adapter


@pytest.fixture
def run(capsys):
    """`run("inspect", path)` -> (exit code, standard output, standard error)."""

    def call(*arguments):
        code = convert.main([*map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.mark.parametrize("changes", [{}, {"alignment": "shifted", "param_dtype": "bfloat16"}], ids=["llada", "dream"])
def test_there_and_back_is_equal_bit_for_bit(run, write_checkpoint, tmp_path, changes):
    source, native, back = write_checkpoint(shard_bytes=4000, **changes)[0], tmp_path / "native", tmp_path / "back"
    assert len(list(source.glob("*.safetensors"))) > 2
    assert run("to-orbax", source, native)[0] == run("to-hf", native, back)[0] == 0
    for one, two in ((source, back), (source, native), (native, back)):
        code, out, _ = run("verify", one, two)
        assert code == 0 and "equal bit for bit" in out
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_verify_names_what_differs(run, write_checkpoint):
    source, other = (write_checkpoint(name)[0] for name in ("one", "two"))
    tensors = load_file(other / "model.safetensors")
    name = "model.transformer.blocks.1.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint32)[3, 5] ^= 1
    save_file(tensors, other / "model.safetensors")
    code, out, _ = run("verify", source, other)
    assert code == 3 and "blocks/up_proj/kernel" in out and "they differ" in out and out.count("different:") == 1


def test_verify_of_different_models_names_the_sizes(run, write_checkpoint):
    code, out, _ = run("verify", write_checkpoint("one")[0], write_checkpoint("two", layers=3)[0])
    assert code == 3 and "layers 2 and 3" in out


def test_another_dtype_can_be_written(run, write_checkpoint, tmp_path):
    source, out = write_checkpoint()[0], tmp_path / "out"
    assert run("to-hf", source, out, "--dtype", "bfloat16")[0] == 0
    assert open_checkpoint(out).config.param_dtype == "bfloat16"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in load_file(source / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(out / "model.safetensors")[name], jnp.asarray(tensor, jnp.bfloat16))


def test_merge_adds_the_adapter_to_the_weights(run, write_checkpoint, tiny, tmp_path):
    settings = LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "ff_out"))
    source = write_checkpoint()[0]
    model, variables = tiny(lora=settings)
    save_adapter(variables["lora"], settings, model.config, family_for(model.config), tmp_path / "adapter")
    code, _, _ = run("merge", source, tmp_path / "adapter", tmp_path / "merged")
    assert code == 0
    checkpoint = open_checkpoint(tmp_path / "merged")
    merged = load_weights(checkpoint, checkpoint.config, make_mesh(MeshConfig()))
    base = load_weights(open_checkpoint(source), model.config, make_mesh(MeshConfig()))
    expected = lora.merge({**base, "lora": variables["lora"]}, settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)
    changed = {
        name
        for name, tensor in to_published(merged, model.config, checkpoint.family).items()
        if not np.array_equal(tensor, to_published(base, model.config, checkpoint.family)[name])
    }
    assert changed == {f"model.transformer.blocks.{i}.{m}.weight" for i in range(2) for m in ("q_proj", "ff_out")}


def test_inspect_says_family_sizes_dtype_and_keys(run, write_checkpoint):
    source, model, _ = write_checkpoint(alignment="shifted", heads=4)
    code, out, _ = run("inspect", source)
    assert code == 0
    for words in ("family dream (shifted)", "width: 16", "heads: 4", "param_dtype: float32", "self_attn.k_proj.bias"):
        assert words in out
    count = sum(tensor.size for tensor in load_file(source / "model.safetensors").values())
    assert f"{count:,} parameters" in out


def test_inspect_of_an_adapter_lists_its_tensors(run, tiny, tmp_path):
    settings = LoraConfig(rank=2, targets=("v_proj",))
    model, variables = tiny(lora=settings)
    save_adapter(variables["lora"], settings, model.config, family_for(model.config), tmp_path / "adapter")
    code, out, _ = run("inspect", tmp_path / "adapter")
    assert code == 0 and out.count("v_proj.lora_A.weight") == out.count("v_proj.lora_B.weight") == 2


def test_names_of_tensors_cannot_speak_to_the_terminal(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"evil\x1b]0;pwn\x07": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    code, out, _ = run("inspect", tmp_path)
    assert code == 0 and "evil" in out and "\x1b" not in out and "\x07" not in out


def test_a_broken_native_array_is_a_mistake_and_not_a_difference(run, write_checkpoint, tmp_path):
    source, native = write_checkpoint()[0], tmp_path / "native"
    assert run("to-orbax", source, native)[0] == 0
    for file in (native / "params" / "blocks.up_proj.kernel").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:20])
    for command in (("verify", source, native), ("to-hf", native, tmp_path / "back")):
        code, _, err = run(*command)
        assert code == 2 and "blocks.up_proj.kernel: not readable by Orbax" in err
    assert not (tmp_path / "back").exists()


def test_a_place_that_cannot_be_written_to_is_told_first(run, write_checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run("to-hf", write_checkpoint()[0], tmp_path / "file" / "out")
    assert code == 2 and "is not a directory that may be written to" in err


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_nothing_that_exists_is_written_over(run, write_checkpoint, tmp_path, command):
    source, out = write_checkpoint()[0], tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    code, _, err = run(command, source, out)
    assert code == 2 and "exists already" in err
    assert [file.name for file in out.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("command", [("inspect",), ("to-orbax", "out"), ("to-hf", "out"), ("merge", "adapter", "out")])
def test_a_source_that_is_not_there_is_named(run, tmp_path, command):
    name, *others = command
    code, _, err = run(name, tmp_path / "nowhere", *(tmp_path / other for other in others))
    assert code == 2 and "nowhere" in err
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_nothing_reads_is_refused(run, small_run, tmp_path):
    code, _, err = run("to-hf", small_run, tmp_path / "out", "--adapter-only", "--dtype", "bfloat16")
    assert code == 2 and "--dtype bfloat16: without effect here" in err
