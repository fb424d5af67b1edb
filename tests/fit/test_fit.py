"""`python -m d1jax.fit`: sizes are those of the arrays that training makes, work is what XLA counts, and what it suggests fits."""

import dataclasses
import importlib.util
import re
import shlex
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from d1jax import fit
from d1jax.config import LoraConfig, ModelConfig
from d1jax.fit import compiled as planned
from d1jax.fit import cost, suggest
from d1jax.fit.plan import judge, make_plan, read_config
from d1jax.fit.topology import GIB, parse_topology
from d1jax.models.sharding import make_mesh
from d1jax.models.transformer import Transformer, head_matrix, hidden_states, initialize, project
from d1jax.training.optimizer import make_optimizer, new_state

TINY = [
    "--config", "configs/quickstart.yaml", "--model.layers", "1", "--model.width", "32", "--model.mlp_width", "96",
    "--rl.prompts_per_step", "4", "--rl.num_generations", "4", "--sft.batch_size", "16", "--evaluation.batch_size", "16",
    "--mesh.data", "1", "--mesh.fsdp", "-1", "--rl.grad_accumulation_steps", "1",
]  # fmt: skip
SFT = [*TINY, "--stages", "[sft]"]


@pytest.fixture
def plan():
    return make_plan(read_config(TINY), parse_topology("cpu:8"))


def test_sizes_are_those_of_the_arrays_that_training_makes(plan):
    program = next(one for one in plan.programs if one.title == "rl update")
    mesh, model = plan.mesh, Transformer(dataclasses.replace(plan.config.model, vocab_size=program.vocabulary))
    with jax.set_mesh(mesh):
        state = new_state(make_optimizer(plan.config.rl.optimizer, 1), initialize(model, jax.random.key(0), mesh), mesh)
    held = {name: planned.device_bytes(tree) for name, tree in program.held.items()}
    assert held["weights"] == _bytes_on_one_device(state.trainable)
    assert held["optimizer"] == _bytes_on_one_device(state.optimizer)
    rows, columns = plan.config.rl.rollout_rows, plan.config.sampler.completion_length
    # Two int32 and an fp32 array [B, C], the prompts [B, P], their lengths and the rows' mask ids.
    assert held["rows"] == rows // 8 * 4 * (3 * columns + plan.prompt_columns + 2)


def test_the_compiler_s_arguments_are_the_sizes_that_are_told(plan):
    for program in plan.programs:
        arguments = program.lower().compile().memory_analysis().argument_size_in_bytes
        held = {name: planned.device_bytes(tree) for name, tree in program.held.items()}
        # A key is 8 bytes. Of the rows the compiler leaves out what nothing reads.
        left = arguments - 8 - planned.device_bytes(program.twice) - sum(held.values())
        assert -held["rows"] < left <= 0, program.title


def _bytes_on_one_device(tree):
    first = jax.devices()[0]
    shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == first]
    return sum(shard.data.nbytes for shard in shards)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=8)], ids=["full", "adapters"])
def test_flops_are_those_that_xla_counts_for_one_layer(lora):
    rows, length = 4, 64
    config = ModelConfig(width=64, layers=1, heads=4, kv_heads=2, mlp_width=192, vocab_size=512)
    model, mesh = Transformer(config, lora), make_mesh(read_config([]).mesh, jax.devices()[:1])
    variables = initialize(model, jax.random.key(0), mesh, ("params", "lora") if lora.rank else ("params",))
    tokens_BT, length_B = jnp.zeros((rows, length), jnp.int32), jnp.full(rows, length, jnp.int32)

    def forward(variables, tokens_BT):
        hidden_BTD = hidden_states(model, variables, tokens_BT, tokens_BT, length_B)
        return jnp.sum(project(hidden_BTD, head_matrix(variables)) ** 2)

    def trained(variables, tokens_BT):
        name = "lora" if lora.rank else "params"
        return jax.grad(lambda trained: forward({**variables, name: trained}, tokens_BT))(variables[name])

    base = cost.linear_flops(rows * length, cost.block_weights(config))
    adapters = cost.linear_flops(rows * length, cost.adapter_weights(config, lora))
    attention = cost.attention_flops(config, rows, length, length)
    head = cost.head_flops(config, rows * length)
    full = lora.rank == 0
    for function, expected in [
        (forward, base + adapters + attention + head),
        (trained, (2 + full) * base + 3 * adapters + 3 * attention + (2 + full) * head),
    ]:
        counted = jax.jit(function).lower(variables, tokens_BT).compile().cost_analysis()["flops"]
        assert expected == pytest.approx(counted, rel=0.1)  # norms, softmax and rotation are not counted by hand


def test_an_update_is_as_many_passes_as_it_makes():
    """A hand count: mu = 2 updates in parts, one score of the old policy, two of the reference."""
    flags = ["--stages", "[rl]", "--rl", "d1", "--rl.num_iterations", "2", "--rl.grad_accumulation_steps", "2"]
    plan = make_plan(read_config([*TINY, *flags]), parse_topology("cpu:8"), 12)
    update = next(program for program in plan.programs if program.name == "update")
    model = dataclasses.replace(plan.config.model, vocab_size=update.vocabulary)
    assert cost._calls(update) == (2, 1 + 2)
    length = 12 + update.columns
    one = cost.forward_flops(model, plan.config.lora, 16, length, length) + cost.head_flops(model, 16 * update.columns)
    # Scores are half of attention's work, and an update computes them once more on its way back.
    scores = cost.attention_flops(model, 16, length, length) / 2
    assert cost.work_of(update).flops == pytest.approx(3 * one + 2 * (3 * one + scores))


def test_completions_that_are_shown_alike_count_once():
    """Nine completions of eight problems: a pass of eight rows, one for each device, and not of the two that a rounded ninth would give."""
    flags = ["--stages", "[rl]", "--rl.prompts_per_step", "8", "--rl.num_generations", "9"]
    plans = [
        make_plan(read_config([*TINY, *flags, *more]), parse_topology("cpu:8"), 12)
        for more in ([], ["--rl.mask_sharing", "row"])
    ]
    alike, each = (next(program for program in plan.programs if program.name == "update") for plan in plans)
    assert (alike.views, each.views, alike.rows) == (Fraction(1, 9), 1, 72)
    assert cost.work_of(alike).flops == pytest.approx(cost.work_of(each).flops / 9)
    one = dataclasses.replace(each, rows=8)
    assert cost.estimated_temporaries(alike) == cost.estimated_temporaries(one)


def test_collectives_in_loops_count_as_often_as_the_loop_turns():
    mesh = make_mesh(read_config(["--mesh.data", "1", "--mesh.fsdp", "-1"]).mesh)
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))

    def function(x):
        return jax.lax.scan(lambda x, _: (x - jnp.sum(x) / 100.0, None), x, None, length=7)[0]

    x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=cut)
    text = jax.jit(function, out_shardings=cut).lower(x).compile().as_text()
    found, open_loops = planned.collectives_of(text)
    assert found == (planned.Collective("all-reduce", 7, 7 * 4),) and open_loops == 0


def test_what_does_not_fit_gets_a_suggestion_that_fits(capsys):
    asked = [*SFT, "--topology", "gpu:8x0.126GiB", "--sft.batch_size", "64", "--model.vocab_size", "4096"]
    asked += ["--model.layers", "24"]
    assert fit.main(asked) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "ESTIMATE" in out
    flags = re.search(r"it does with\n  (--.*)\n", out)[1].split()
    assert fit.main([*asked, *flags]) == 0
    assert "fits: at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v9:2x2"], "write one of v5e:2x4"),
        (["--topology", "v5e:8"], "a v5e has 2 axes"),
        (["--topology", "gpu:8"], "gpu:8x80GiB"),
        (["--topology", "cpu:0"], "write from 1"),
        (["--topology", "cpu:8", "--mesh.fsdp", "3"], "does not cover 8 devices"),
        (["--topology", "cpu:8", "--sft.batch_size", "12"], "does not divide over 8 devices"),
        (["--topology", "cpu:8", "--prompt_length", "x"], "is not a number"),
    ],
)
def test_a_mistake_is_said_and_exits_2(flags, message, capsys):
    assert fit.main([*SFT, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_tpu_without_its_compiler_says_what_to_install(capsys):
    assert fit.main([*SFT, "--topology", "v5e:2x4"]) == 2
    assert "pip install 'd1jax[tpu]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_tpu_compiler_refuses_what_is_too_large(capsys):
    assert fit.main([*SFT, "--topology", "v5e:2x4", "--suggest", "no"]) == 0
    huge = ["--model.width", "8192", "--model.layers", "80", "--model.mlp_width", "28672"]
    assert fit.main([*SFT, *huge, "--topology", "v5e:2x4", "--suggest", "no"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_no_program_holds_the_logits_of_a_whole_batch():
    """65,536 words: a chunk of logits is 512 positions, and a batch has 1,536."""
    flags = [
        "--model.vocab_size",
        "65536",
        "--model.width",
        "40",
        "--model.heads",
        "2",
        "--model.kv_heads",
        "2",
        "--mesh.fsdp",
        "1",
    ]
    flags += [
        "--stages",
        "[rl]",
        "--sampler.completion_length",
        "96",
        "--sampler.block_length",
        "48",
        "--sampler.steps",
        "4",
    ]
    plan = make_plan(read_config([*TINY, *flags]), parse_topology("cpu:1"), 21)
    for program in plan.programs:
        found = planned.positions_with_logits(judge(program, plan.topology).compiled)
        assert 0 < found <= 16 * 48 if program.name == "sampler" else 0 < found <= 512, program.title


def test_memory_of_a_gpu_is_as_it_is_written():
    topology = parse_topology("gpu:8x80GiB")
    assert (topology.count, topology.part.memory, topology.part.name) == (8, 80 * GIB, "H100 80 GiB")
    assert topology.doubled.text == "gpu:16x80GiB" and parse_topology("v5e:2x4").doubled.text == "v5e:4x4"


def tried(plan, title, **changes):
    """The settings of the rungs that go by the stage of a program, where that program, changed so, does not fit."""
    program = dataclasses.replace(next(one for one in plan.programs if one.title == title), **changes)
    rungs = list(suggest._ladder(plan, [SimpleNamespace(fits=False, program=program)]))
    return [
        option for options in rungs for option in options if isinstance(option, dict) and "model" not in str(option)
    ]


def test_micro_batches_are_made_smaller_and_never_larger(plan):
    made = [option for option in tried(plan, "sft update") if "grad_accumulation" in str(option)]
    assert made == [{"sft.grad_accumulation_steps": "2"}], "16 rows over 8 devices have two parts at most"
    assert not [option for option in tried(plan, "rl update", parts=4) if "grad_accumulation" in str(option)]


def test_what_a_stage_sets_for_itself_is_changed_there():
    """The stage has 32 rows where its section has 16, and no flag of the section moves what it sets itself."""
    own = "{name: wide, kind: rl, prompts_per_step: 8, grad_accumulation_steps: 2, rollout_batch_size: 32}"
    rows = "{name: rows, kind: rl, prompts_per_step: 8}"
    asked = [*TINY, "--stages", f"[sft, {own}, {rows}, {{name: plain, kind: rl}}]"]
    plan = make_plan(read_config(asked), parse_topology("cpu:8"), 12)
    parts = [option for option in tried(plan, "wide update") if "grad_accumulation" in str(option)]
    assert parts == [{"stages.wide.grad_accumulation_steps": "4"}]
    fewer = [option for option in tried(plan, "wide sampler") if "rollout_batch" in str(option)]
    assert [option["stages.wide.rollout_batch_size"] for option in fewer] == ["16", "8"]
    of_all = [option for option in tried(plan, "rows update") if "grad_accumulation" in str(option)]
    assert of_all == [{"rl.grad_accumulation_steps": "2"}, {"rl.grad_accumulation_steps": "4"}]

    change = suggest.Change((), plan.topology)
    for option in ({"lora.rank": "8"}, *parts, fewer[0], of_all[0]):
        change = change.with_(option)
    changed = make_plan(read_config([*asked, *change.flags(plan.config.stages)]), plan.topology, 12)
    updates = {program.stage: program.parts for program in changed.programs if program.name == "update"}
    calls = {program.stage: program.calls for program in changed.programs if program.name == "sampler"}
    assert updates == {"sft": 1, "wide": 4, "rows": 2, "plain": 2}
    assert calls == {"wide": 2, "rows": 1, "plain": 1}
    assert shlex.split(suggest.shown(change, plan)) == change.flags(plan.config.stages), "to be pasted into a shell"
