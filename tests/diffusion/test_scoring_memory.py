"""What scoring adds to the memory of the transformer at the shapes of LLaDA-8B, read off the compiled programs; no weights are made."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from d1jax.config import LoraConfig, MeshConfig
from d1jax.config.parse import parse
from d1jax.diffusion.canvas import Canvas, completion_hidden
from d1jax.diffusion.likelihood import Views, score
from d1jax.models.sharding import make_mesh
from d1jax.models.token_logprobs import token_logprobs
from d1jax.models.transformer import Transformer, abstract_variables, hidden_states, project
from d1jax.training.setup import split

LLADA = Path(__file__).parents[2] / "configs" / "models" / "llada_8b.yaml"
ROWS, COMPLETION, PROMPT, VIEWS = 16, 256, 256, 3
GIB = 2**30


@pytest.fixture(scope="module")
def peak():
    """peak(head) -> bytes that the gradient of the sum of head(hidden states, ...) needs beside its arguments."""
    # Activations in fp32: XLA's CPU backend has no bf16 products and would count fp32 copies of all weights. Two layers of the 32:
    # what a layer needs is given back before the head runs, and the layers are one loop.
    config = dataclasses.replace(parse(["--model", str(LLADA)]).model, dtype="float32", param_dtype="float32", layers=2)
    model, mesh = Transformer(config, LoraConfig(rank=128)), make_mesh(MeshConfig())
    trainable, frozen = split(abstract_variables(model, mesh, ("params", "lora")))

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    canvas = Canvas(integers(ROWS, COMPLETION), integers(ROWS, PROMPT), integers(ROWS))
    weight_NBC = jax.ShapeDtypeStruct((VIEWS, ROWS, COMPLETION), jnp.float32)
    views = Views(integers(VIEWS, ROWS, COMPLETION), integers(VIEWS, ROWS, PROMPT), weight_NBC, (0, 0, 1))

    def bytes_of(total):
        def loss(trainable, frozen, canvas, views):
            return total(model, {**frozen, **trainable}, canvas, views)

        return (
            jax.jit(jax.grad(loss))
            .lower(trainable, frozen, canvas, views)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    return bytes_of


def over_views(of_hidden):
    """The sum over views of a number made from the hidden states of the completion."""

    def total(model, variables, canvas, views):
        def one(view):
            seen = canvas._replace(completion_BC=view[0], prompt_BP=view[1])
            hidden_BTD = hidden_states(model, variables, seen.tokens_BT, seen.positions_BT, seen.length_B)
            return of_hidden(completion_hidden(hidden_BTD, canvas, model.config.alignment), variables)

        return jax.lax.map(jax.checkpoint(one), (views.completion_NBC, views.prompt_NBP)).sum()

    return total


def head_alone(logp_of):
    """Bytes that the gradient of scores needs from given hidden states, the head being an argument."""
    hidden_BCD = jax.ShapeDtypeStruct((ROWS, COMPLETION, 4096), jnp.float32)
    head_DV = jax.ShapeDtypeStruct((4096, 126464), jnp.float32)
    targets_BC = jax.ShapeDtypeStruct((ROWS, COMPLETION), jnp.int32)
    program = jax.jit(jax.grad(lambda *inputs: logp_of(*inputs).sum())).lower(hidden_BCD, head_DV, targets_BC).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_scoring_adds_at_most_one_gibibyte_to_the_passes_through_the_layers(peak):
    trunk = peak(over_views(lambda hidden_BCD, variables: hidden_BCD.sum()))
    ours = peak(lambda model, variables, canvas, views: score(model, variables, canvas, views).logp.sum())
    assert ours - trunk <= GIB, f"{(ours - trunk) / GIB:.2f} GiB"


def test_the_head_needs_less_than_one_gibibyte_where_whole_logits_need_more():
    def plain(hidden_BCD, head_DV, targets_BC):
        logp_BCV = jax.nn.log_softmax(project(hidden_BCD, head_DV))
        return jnp.take_along_axis(logp_BCV, targets_BC[:, :, None], axis=2)

    ours = head_alone(lambda *inputs: token_logprobs(*inputs).logp)
    assert ours <= GIB < head_alone(plain), f"{ours / GIB:.2f} GiB"
