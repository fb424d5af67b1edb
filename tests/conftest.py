"""Eight virtual CPU devices, strict numerics, and the models that tests share."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# What several tests, workers or the runs that they start compile is compiled once: half the time of the run tests. Inherited.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="d1jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Most of the time of the tests is compilation, a third of it in XLA's newer emitters; programs are too small to be cut for several threads,
# which each worker would start. jaxlib 0.11 has no such choice. Inherited.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}"

import jax

# Before anything touches a device.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # arrays are tiny: the time of a test is compilation
# Tracing leaves millions of objects that live as long as their program: looking through them again and again took 8 % of the time.
gc.set_threshold(200_000, 10, 10)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import linen as nn  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from d1jax import train  # noqa: E402
from d1jax.config import LoraConfig, MeshConfig, ModelConfig  # noqa: E402
from d1jax.config.parse import parse  # noqa: E402
from d1jax.data.tokenizers import CharacterTokenizer, SpecialTokens  # noqa: E402
from d1jax.models.config_json import read_config  # noqa: E402
from d1jax.models.families import FAMILIES, family_for  # noqa: E402
from d1jax.models.sharding import make_mesh  # noqa: E402
from d1jax.models.transformer import Transformer, initialize  # noqa: E402
from d1jax.training.stage_log import StageLog  # noqa: E402
from d1jax.weights.hf_io import in_memory, save_weights  # noqa: E402
from d1jax.weights.names import from_published  # noqa: E402
from d1jax.weights.tokenizer_files import write_new_companions  # noqa: E402

settings.register_profile(
    "d1jax",
    deadline=None,  # the first example compiles
    max_examples=20,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("d1jax")

# Modules that compile or run for more than a few seconds: what `make test-fast` leaves out.
SLOW = {
    "adapt/test_bits.py", "adapt/test_loop.py", "adapt/test_loss.py", "benchmarks/test_methods_benchmark.py",
    "diffusion/test_canvas.py", "diffusion/test_estimators.py", "diffusion/test_masked_columns.py",
    "diffusion/test_predictions.py", "diffusion/test_sampler.py", "diffusion/test_sampler_oracle.py",
    "diffusion/test_scoring_memory.py", "diffusion/test_unmasking.py", "evaluation/test_benchmark.py",
    "evaluation/test_estimators.py", "fit/test_fit.py", "inference/test_infill.py", "inference/test_lm_eval.py",
    "inference/test_policy.py", "models/test_transformer.py", "notebook/test_stages.py", "rl/test_loss.py",
    "rl/test_method_equations.py", "rl/test_methods.py", "rl/test_update.py", "sft/test_loss.py", "sft/test_update.py",
    "test_audit.py", "test_generate.py", "test_metrics_page.py", "test_readme.py", "test_recipes.py", "test_train.py",
    "tools/test_convert_weights.py", "training/test_damage.py", "training/test_longer.py", "training/test_optimizer.py",
    "training/test_setup.py", "weights/test_generation_config.py", "weights/test_gguf.py", "weights/test_hf_directory.py",
    "weights/test_hf_io.py",
}  # fmt: skip


# Methods whose update is compiled in `make test-all` alone: d1, coupled_grpo, spg, espo and d2 stand for them (one mask, pairs, an upper
# bound, a ratio of a text, a trajectory).
OTHER_METHODS = (
    "cispo", "cj_grpo", "coupled_decoupled", "d1_fixed_mask", "decoupled", "full_mask", "gdpo", "gdsd", "grpo", "grpo_lines",
    "grpo_process", "igpo", "just_grpo", "online_rft", "ppo", "ppo_kl", "rspo", "stable_drl", "strata", "tracerl", "unigrpo", "wd1",
)  # fmt: skip
# A decoder's schedule and its cache: each of the first without one, and two of each with the others.
OTHER_DECODERS = (
    "chance-prefix", "chance-dual", "time-prefix", "time-dual", "entropy_bound-prefix", "entropy_bound-dual", "factor-prefix",
    "factor-dual", "klass-prefix", "threshold-dual",
)  # fmt: skip

# What `make test` leaves out and `make test-all` runs: a claim that another test makes of fewer methods, meshes, dtypes or signals.
THOROUGH = (
    "test_recipes.py::test_every_stage_of_a_pipeline_lowers",
    "rl/test_methods.py::test_any_split_of_a_batch_gives_the_same_update",
    "rl/test_methods.py::test_a_run_in_bf16_with_rematerialisation_passes_its_own_start_check",
    "rl/test_update.py::test_update_does_not_depend_on_the_mesh",
    "rl/test_update.py::test_inner_updates_meet_different_prompt_masks_for_every_accumulation",
    "models/test_processes.py::test_two_processes_learn",  # both of them
    "models/test_attention.py::test_a_kernel_that_computes_something_else_is_refused",
    "preference/test_pairs.py::test_a_stage_learns_from_stored_pairs",
    "reward_model/test_loop.py::test_a_stopped_stage_ends_with_the_same_weights",
    "test_own_data.py::test_the_tutorial_runs",
    "test_readme.py::test_the_line_about_preferences_works",
    "test_readme.py::test_the_line_about_an_adapter_gives_one_that_exports",
    "test_train.py::test_a_pipeline_of_stages_with_rows_and_weights",
    "test_train.py::test_every_way_of_the_loop_learns_and_resumes_exactly[process rewards",
    "test_train.py::test_the_checkpoint_is_selected_on_validation",
    "models/test_processes.py::test_devices_that_are_cut",
    "models/test_processes.py::test_two_processes_evaluate",
    "models/test_processes.py::test_a_run_that_was_cut",
    "models/test_processes.py::test_one_that_is_asked",
    "models/test_processes.py::test_a_task_that_fails",
    "models/test_processes.py::test_a_program_that_joins",
    "diffusion/test_sampler.py::test_eight_devices_decode_what_one_decodes",
    "diffusion/test_estimators.py::test_views_of_a_group_are_disjoint_and_share_the_head_without_changing_a_score",
    "diffusion/test_predictions.py::test_over_a_wide_vocabulary_the_entropy_of_the_draws_is_that_of_the_distribution",
    "sft/test_update.py::test_a_curve_with_bf16_weights_lies_on_that_of_fp32",
    "test_train.py::test_another_mesh_learns_the_same",
    "test_train.py::test_a_cut_run_goes_on_on_another_mesh",
    "test_train.py::test_signal_saves_and_leaves[2]",
    "test_train.py::test_killed_run_resumes_bit_for_bit[sft-3]",
    "test_train.py::test_every_way_of_the_loop_learns_and_resumes_exactly[preferences of the policy's own]",
    "test_train.py::test_every_way_of_the_loop_learns_and_resumes_exactly[penalty in the reward]",
    "rl/test_update.py::test_update_does_not_depend_on_micro_batches[8]",
    "tools/test_convert_weights.py::test_there_and_back_is_equal_bit_for_bit[dream]",
    "tasks/grading/test_sandbox.py::test_hostile[bwrap",
    "tasks/grading/test_sandbox.py::test_hostile[limits",
    "tasks/grading/test_sandbox.py::test_ten_thousand_hostile_programs_leave_nothing",
    "tasks/test_code.py::test_published_solutions_pass_and_broken_ones_do_not[mbpp/mbpp-",
    "tasks/test_code.py::test_published_solutions_pass_and_broken_ones_do_not[humaneval/HumanEvalPlus",
    "tasks/test_code.py::test_published_solutions_pass_and_broken_ones_do_not[mbpp/MbppPlus",
    "tasks/test_code.py::test_published_solutions_pass_and_broken_ones_do_not[mbpp/sanitized",
    "inference/test_lm_eval.py::test_the_command_prints_the_harness_s_table",
    "inference/test_lm_eval.py::test_log_likelihoods_depend_on_the_request_alone",
    "inference/test_lm_eval.py::test_what_is_no_checkpoint_and_no_template_is_said",
    "inference/test_lm_eval.py::test_drawn_texts_differ_between_repeats_and_not_between_batches",
    "inference/test_lm_eval.py::test_greedy_is_what_the_sampler_writes",
    "benchmarks/",
    "reward_model/test_loop.py::test_rl_with_its_scores_equals_rl_with_the_same_numbers_from_a_file",
    "reward_model/test_steps.py::test_micro_batches_change_nothing",
    "reward_model/test_steps.py::test_a_stage_learns_which_lines_are_right_and_resumes_exactly",
    "fit/test_fit.py::test_the_compiler_s_arguments_are_the_sizes_that_are_told",
    "rl/test_value_model.py::test_a_stopped_run_ends_with_the_same_policy_and_the_same_values",
    "rl/test_value_model.py::test_a_value_model_that_cannot_be_updated_ends_the_run",
    "adapt/test_loop.py::test_micro_batches_and_devices_change_nothing",
    "weights/test_adapted.py::test_the_same_command_finds_the_finished_run",
    "adapt/test_loop.py::test_the_longer_run_measures_again",
    "adapt/test_loop.py::test_an_adapter_is_trained_beside_the_adapted_weights",
    "models/test_mixture_of_experts.py::test_a_fresh_model_is_finite_and_its_bias_zero",
    "weights/test_mixtures.py::test_a_mixture_decodes[lladamoe-prefix]",
    "weights/test_mixtures.py::test_a_mixture_decodes[lladamoe-dual]",
    "weights/test_mixtures.py::test_a_mixture_decodes[llada2-none]",
    *(f"rl/test_methods.py::test_the_ratio_is_one_at_the_first_inner_update[{name}]" for name in OTHER_METHODS),
    *(
        f"rl/test_methods.py::test_groups_of_equal_rewards_leave_the_weights_as_they_are[{name}]"
        for name in OTHER_METHODS
    ),
    *(
        f"rl/test_method_equations.py::test_the_loss_is_that_of_the_paper[{name}]"
        for name in (*OTHER_METHODS, "full_mask")
    ),
    *(
        "diffusion/test_sampler_oracle.py::test_the_compiled_sampler_equals_a_python_loop_token_for_token_and_step_for_step"
        f"[{name}]"
        for name in OTHER_DECODERS
    ),
    "diffusion/test_sampler.py::test_a_rows_sample_does_not_depend_on_its_batch[{'cache'",  # klass with dual is one of them
    "diffusion/test_sampler.py::test_the_compiled_loop_and_the_stream_call_the_same_steps[{'cache'",
    "inference/test_policy.py::test_a_prompt_alone_or_in_a_batch_gives_the_same_text[0.0",
    "inference/test_policy.py::test_a_prompt_alone_or_in_a_batch_gives_the_same_text[1.0-dream]",
    "inference/test_policy.py::test_logits_of_real_tokens_do_not_know_of_padding[dream]",
    "inference/test_policy.py::test_eight_devices_sample_what_one_does[0.0]",
    "inference/test_policy.py::test_eight_devices_give_the_logits_of_one[shifted]",
    "inference/test_policy.py::test_watching_shows_every_step_and_ends_with_the_sample[0.0]",
    "inference/test_policy.py::test_what_is_saved_loads_as_it_was[native-dream]",
    "inference/test_policy.py::test_weights_and_activations_have_the_dtype_asked_for[float16-None-True",
    "inference/test_infill.py::test_a_batch_of_texts_with_other_holes_gives_each_its_own_text[same_position]",
    "models/test_attention.py::test_the_splash_kernel_is_xla_s_attention[0-None]",
    "models/test_attention.py::test_the_splash_kernel_is_xla_s_attention[0-mesh2]",
    "models/test_attention.py::test_the_splash_kernel_is_xla_s_attention[40-mesh",
    "models/test_transformer.py::test_remat_recomputes_and_gives_the_same_gradients[dots]",
    "reward_model/test_loop.py::test_a_stage_learns_to_order_pairs_that_it_has_not_seen[pointwise]",
    "rl/test_value_model.py::test_it_learns_the_returns_whatever_the_micro_batches[1]",
    "rollouts/test_generate.py::test_parts_hold_the_rows_of_the_whole[4]",
    "rollouts/test_generate.py::test_parts_hold_the_rows_of_the_whole[32]",
    "test_recipes.py::test_rollout_and_update_lower[d1_gsm8k_8b-llada_8b]",
    "test_recipes.py::test_rollout_and_update_lower[d1_sudoku_8b-diffucoder_7b]",
    "notebook/test_stages.py::test_any_number_is_a_reward_and_a_grade[int64",
    "notebook/test_stages.py::test_any_number_is_a_reward_and_a_grade[float32_1",
    "notebook/test_stages.py::test_any_number_is_a_reward_and_a_grade[bool",
    "diffusion/test_sampler.py::test_tokens_and_steps_equal_dreams_sampler[entropy_topk50_s16]",
    "diffusion/test_sampler.py::test_tokens_and_steps_equal_dreams_sampler[entropy_s8]",
    "diffusion/test_sampler.py::test_tokens_and_steps_equal_dreams_sampler[entropy_s20]",
    "diffusion/test_sampler.py::test_tokens_and_steps_equal_dreams_sampler[maskgit_plus_s32]",
    "diffusion/test_sampler.py::test_whole_sequences_follow_the_enumerated_distribution[left_to_right-1.4]",
    "diffusion/test_sampler.py::test_whole_sequences_follow_the_enumerated_distribution[random-1.4]",
    "diffusion/test_sampler.py::test_whole_sequences_follow_the_enumerated_distribution[random-0.5]",
    "diffusion/test_sampler.py::test_tokens_steps_and_passes_equal_decoding_with_a_cache[fast_prefix_conf",
    "diffusion/test_sampler.py::test_tokens_steps_and_passes_equal_decoding_with_a_cache[fast_prefix_b8_thr]",
    "diffusion/test_sampler.py::test_tokens_steps_and_passes_equal_decoding_with_a_cache[fast_dual_conf_b8]",
    "diffusion/test_sampler.py::test_tokens_steps_and_passes_equal_decoding_with_a_cache[fast_dual_b16_thr]",
    "diffusion/test_sampler.py::test_tokens_steps_and_passes_equal_decoding_with_a_cache[fast_dual_b8_thr]",
    "diffusion/test_sampler.py::test_a_stream_compiles_each_step_once[dual-{'data': 8}]",
    "diffusion/test_sampler.py::test_each_step_reveals_its_scheduled_count_inside_its_block[0.0]",
    "test_train.py::test_lora_trains_adapters_only_and_merges",
    "test_train.py::test_negative_controls[zero",
    "weights/test_adapted.py::test_an_adapted_llama_is_a_dream_or_an_a2d_and_exports_as_one[same_position]",
    "weights/test_mixtures.py::test_a_mixture_decodes[lladamoe-none]",
    "weights/test_gguf.py::test_a_real_model_predicts_english",
    "weights/test_generation_config.py::test_a_small_tokenizer_that_was_apart_is_exported_too",
    "weights/test_generation_config.py::test_a_runs_settings_go_into_its_export_and_are_the_default_of_both[native]",
    "weights/test_hf_io.py::test_what_was_saved_loads_bit_for_bit_and_in_place[dream",
    "models/test_mixture_of_experts.py::test_what_is_computed_again_changes_no_gradient",
    "models/test_mixture_of_experts.py::test_hidden_units_are_cut_where_the_devices_do_not_divide_the_experts",
    "adapt/test_loop.py::test_a_stream_without_its_place_is_not_begun_again",
    "adapt/test_loop.py::test_a_cut_run_goes_on_bit_for_bit[False]",
    "adapt/test_loop.py::test_every_stage_from_the_start_is_measured_against_the_autoregressive_model",
    "adapt/test_loop.py::test_the_mask_is_opened_step_by_step",
    "training/test_setup.py::test_the_base_of_a_lora_run_is_that_of_its_own_seed",
    "training/test_setup.py::test_a_stopped_run_resumes_to_the_same_metrics",
    "training/test_longer.py::test_a_longer_run_is_the_run_that_was_long_from_the_start",
    "training/test_damage.py::test_an_evaluation_on_other_rows_than_the_run_was_measured_on_says_so",
    "test_metrics_page.py::test_every_metric_has_a_line_and_every_line_a_metric",
    "reward_model/test_loop.py::test_single_texts_need_the_pointwise_loss",
    "reward_model/test_loop.py::test_later_stages_ask_the_model_and_its_scores_are_those_of_a_pass_by_hand",
    "reward_model/test_steps.py::test_held_out_lines_that_are_all_right_have_no_order",
    "generation/test_teacher.py::test_a_smaller_student_learns_what_a_teacher_has_written",
    "rl/test_update.py::test_the_entropy_does_not_depend_on_the_weights_of_the_views",
    "rl/test_update.py::test_ratio_is_exactly_one_at_the_first_inner_update[lora1]",
    "rl/test_update.py::test_completions_that_are_shown_alike_are_scored_by_one_pass[one",
    "rl/test_update.py::test_completions_that_are_shown_alike_are_scored_by_one_pass[mesh",
    "rl/test_update.py::test_completions_that_are_shown_alike_are_scored_by_one_pass[coupled",
    "rl/test_update.py::test_completions_that_are_shown_alike_are_scored_by_one_pass[elbo",
    "diffusion/test_estimators.py::test_a_segment_a_step_gives_the_log_probabilities_that_the_sampler_drew_with[two blocks",
    "diffusion/test_estimators.py::test_a_segment_a_step_gives_the_log_probabilities_that_the_sampler_drew_with[by chance",
    "diffusion/test_estimators.py::test_a_segment_a_step_gives_the_log_probabilities_that_the_sampler_drew_with[no early",
    "diffusion/test_estimators.py::test_a_segment_a_step_gives_the_log_probabilities_that_the_sampler_drew_with[several tokens",
    "inference/test_policy.py::test_weights_and_activations_have_the_dtype_asked_for[float16-None-False",
    "inference/test_policy.py::test_weights_and_activations_have_the_dtype_asked_for[float32-bfloat16-False",
    "diffusion/test_sampler.py::test_the_compiled_loop_and_the_stream_call_the_same_steps[{'sch",
    "test_recipes.py::test_rollout_and_update_lower[d1_sudoku_8b-dream_7b]",
    "test_recipes.py::test_rollout_and_update_lower[d1_countdown_8b-llada_8b]",
    "notebook/test_stages.py::test_a_batch_of_the_loss_may_have_any_number_of_rows",
    "models/test_processes.py::test_processes_that_do_different_stages_say_so",
    "test_audit.py::test_a_run_is_audited_and_again_the_same",
    *(f"rl/test_methods.py::test_the_ratio_is_one_at_the_first_inner_update[{name}]" for name in ("d2", "espo", "spg")),
    "generation/test_teacher.py::test_the_weights_of_the_step_that_is_named_write",
    "models/test_mixture_of_experts.py::test_eight_devices_equal_one_with_gradients",
    "weights/test_hf_io.py::test_what_was_saved_loads_bit_for_bit_and_in_place[llada-bfloat16",
    "weights/test_mixtures.py::test_a_loaded_model_gives_the_logits_of_a_plain_loop[lladamoe",
    "rl/test_update.py::test_the_check_compares_two_programs_and_masks_that_are_not_shared[policy",
    "adapt/test_loop.py::test_instruction_tuning_follows_and_is_evaluated",
    "reward_model/test_steps.py::test_rl_is_rewarded_by_the_lines_of_its_texts",
    "weights/test_mixtures.py::test_native_form_there_and_back",
    "weights/test_mixtures.py::test_a_mixture_decodes[llada2-dual]",
    "weights/test_mixtures.py::test_there_and_back_bit_for_bit_in_shards_and_on_a_mesh",
    "weights/test_hf_io.py::test_native_form_loads_bit_for_bit_and_in_place[dream",
    "training/test_longer.py::test_a_stage_from_which_a_later_one_has_begun_stays_as_it_is",
    "notebook/test_stages.py::test_an_adapter_stays_beside_the_weights_and_is_trained_on",
    "models/test_mixture_of_experts.py::test_a_row_depends_neither_on_other_rows_nor_on_padding",
    "rl/test_update.py::test_zero_advantages_leave_the_parameters_unchanged[lora1]",
    "diffusion/test_sampler.py::test_a_rows_sample_does_not_depend_on_its_batch[{'sch",
    "diffusion/test_sampler.py::test_a_stream_compiles_each_step_once[none",
)


def is_written(entry: str) -> bool:
    """Whether there is a test whose name begins so; which parameters it has is not asked."""
    file, _, name = entry.partition("::")
    path = Path(__file__).parent / file
    return path.exists() and (not name or f"def {name.partition('[')[0]}" in path.read_text())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gone = [entry for entry in (*SLOW, *THOROUGH) if not is_written(entry)]
    assert not gone, f"SLOW and THOROUGH name tests that have another name now: {gone}"
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
        if item.nodeid.removeprefix("tests/").startswith(THOROUGH):
            item.add_marker(pytest.mark.thorough)


MAPS, MOST_MAPS = Path("/proc/self/maps"), 6_000


@pytest.fixture(scope="module", autouse=True)
def programs_of_few_modules() -> Iterator[None]:
    """Each compiled program holds memory maps, of which Linux gives a process 65530: a worker that kept all programs would crash."""
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


# -- the golden checkpoint ---------------------------------------------------------------------------------------------


class Golden(NamedTuple):
    """A tiny model with what the reference PyTorch code computed from it (tests/golden)."""

    config: ModelConfig
    model: Transformer
    special: SpecialTokens
    tensors: dict[str, np.ndarray]  # the state dict
    variables: dict[str, Any]
    io: dict[str, np.ndarray]
    cases: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def golden() -> Golden:
    return _golden("llada-mha", "llada", SpecialTokens(mask=490, end=491, turn_end=492))


@pytest.fixture(scope="session")
def golden_dream() -> Golden:
    return _golden("dream-gqa", "dream", SpecialTokens(mask=500, end=501))


def _golden(name: str, family: str, special: SpecialTokens) -> Golden:
    folder = Path(__file__).parent / "golden" / name
    published = json.loads((folder / "config.json").read_text())
    config = read_config(published, "config.json")
    tensors = load_file(folder / "model.safetensors")
    cases = json.loads((folder / "cases.json").read_text())
    with np.load(folder / "io.npz") as arrays:
        io = dict(arrays)
    return Golden(
        config, Transformer(config), special, tensors, from_published(tensors, config, FAMILIES[family]), io, cases
    )


# -- small random models -----------------------------------------------------------------------------------------------

TINY = ModelConfig(width=16, layers=2, heads=2, kv_heads=2, mlp_width=24, vocab_size=13)
NO_ADAPTER = LoraConfig(rank=0)
SPREAD = {"kernel": 1.5, "wte": 1.0, "ff_out": 2.0, "scale": 0.3, "bias": 0.5, "expert_bias": 0.3, "a": 1.0, "b": 0.5}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., tuple[Transformer, dict[str, Any]]]:
    """`tiny(width=32, qkv_bias=True, ...)` -> (model, variables), all random: gains, biases and adapters too."""

    @functools.cache
    def make(seed: int = 0, lora: LoraConfig = NO_ADAPTER, **changes: Any) -> tuple[Transformer, dict[str, Any]]:
        model = Transformer(ModelConfig(**{**vars(TINY), **changes}), lora)
        rng = np.random.default_rng(seed)

        def draw(path: tuple[Any, ...], box: nn.LogicallyPartitioned) -> jax.Array:
            name = next(key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))
            shape, dtype = box.value.shape, box.value.dtype
            fan_in = 1 if name in ("wte", "scale", "bias", "expert_bias") else shape[-2]
            noise = rng.standard_normal(shape) * SPREAD[name] / np.sqrt(fan_in)
            return jnp.asarray(noise + (name == "scale"), dtype)

        zeros = jnp.zeros((1, 1), jnp.int32)
        keys = {"params": jax.random.key(0), "lora": jax.random.key(0)}
        shapes = jax.eval_shape(model.init, keys, zeros, zeros, jnp.ones(1, jnp.int32))
        shapes = {name: shapes[name] for name in ("params", "lora") if name in shapes}
        boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
        return model, jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=boxed)

    return make


@pytest.fixture
def write_checkpoint(tmp_path, tiny) -> Callable[..., tuple[Path, Transformer, dict[str, Any]]]:
    """`write_checkpoint("name", shard_bytes=..., qkv_bias=True, ...)` -> (Hugging Face directory, model, its variables).

    The tokenizer has the characters a-k, then <end> (11) and <mask> (12). alignment="shifted" makes it a Dream.
    """

    def write(
        name: str = "checkpoint", shard_bytes: int = 10**9, **changes: Any
    ) -> tuple[Path, Transformer, dict[str, Any]]:
        if changes.get("alignment") == "shifted":
            changes = {"qkv_bias": True, "rope_full_precision": False, **changes}
        model, variables = tiny(**changes)
        out, tokenizer = tmp_path / name, CharacterTokenizer("abcdefghijk")
        companions = lambda beside: write_new_companions(model.config, tokenizer, beside, published=True)  # noqa: E731
        family = family_for(model.config)
        arrays = in_memory(variables, model.config, family)
        save_weights(arrays, model.config, family, out, companions, shard_bytes)
        return out, model, variables

    return write


@pytest.fixture(scope="session")
def initialized() -> dict[str, Any]:
    """Fresh parameters and adapters on data 2 x fsdp 2 x tensor 2."""
    config = ModelConfig(width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, vocab_size=14, qkv_bias=True)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        return initialize(Transformer(config, LoraConfig(rank=3)), jax.random.key(0), mesh, ("params", "lora"))


SMALL_RUN = {
    "task.train_rows": 32, "task.eval_rows": 8, "model.width": 8, "model.layers": 1, "model.heads": 2, "model.kv_heads": 2,
    "model.mlp_width": 8, "model.rope_theta": 100, "sampler.completion_length": 20, "sampler.block_length": 20,
    "sampler.steps": 2, "sft.steps": 2, "sft.batch_size": 8, "checkpoint_every": 1, "evaluation.batch_size": 8,
    "stages": "[sft]",
}  # fmt: skip


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two SFT steps on Sudoku, to be read only."""
    run_dir = tmp_path_factory.mktemp("small") / "run"
    train.run(parse([f"--{key}={value}" for key, value in {**SMALL_RUN, "run_dir": run_dir}.items()]))
    return run_dir


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with interrupted("rl", 1): ...`: a run is stopped behind the checkpoint of that step of that stage."""

    @contextlib.contextmanager
    def stopped(stage: str, step: int) -> Iterator[None]:
        save = StageLog.save_checkpoint

        def stopping(self: StageLog, at: int, items: dict[str, Any], *more: Any) -> None:
            save(self, at, items, *more)
            if (self.stage, at) == (stage, step):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(StageLog, "save_checkpoint", stopping)
            yield

    return stopped


@pytest.fixture(scope="session")
def oracle() -> Callable[[Transformer, dict[str, Any]], Callable[[list[int]], tuple[np.ndarray, np.ndarray]]]:
    """`oracle(model, variables)(tokens)` -> (hidden [T, D], logits [T, V]) of a row in natural order without padding.

    LLaDA's forward pass once more, in float64 NumPy with a loop over layers, heads and queries. No adapters. `keep` collects
    the keys and values of every layer; with `past` (such a list) those of the positions in `stale` are taken from it.
    """

    def of(model: Transformer, variables: dict[str, Any]) -> Callable[[list[int]], tuple[np.ndarray, np.ndarray]]:
        config = model.config
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
        head = params["wte"].T if config.tied_head else params["ff_out"]
        size, sharing = config.width // config.heads, config.heads // config.kv_heads

        def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * gain

        def turn(vector: np.ndarray, position: int) -> np.ndarray:
            pairs = vector[: size // 2] + 1j * vector[size // 2 :]
            pairs = pairs * np.exp(1j * position / config.rope_theta ** (np.arange(size // 2) * 2 / size))
            return np.concatenate([pairs.real, pairs.imag])

        def attention(x: np.ndarray, layer: dict[str, Any], past: Any, stale: Any, keep: Any) -> np.ndarray:
            q, k, v = (x @ layer[n]["kernel"] + layer[n].get("bias", 0) for n in ("q_proj", "k_proj", "v_proj"))
            if past is not None:
                k[stale], v[stale] = past[0][stale], past[1][stale]
            if keep is not None:
                keep.append((k, v))
            mixed = np.zeros_like(x)
            for head_index in range(config.heads):
                own = slice(head_index * size, (head_index + 1) * size)
                shared = slice(head_index // sharing * size, (head_index // sharing + 1) * size)
                keys = np.stack([turn(k[t, shared], t) for t in range(len(x))])
                for t in range(len(x)):
                    score = keys @ turn(q[t, own], t) / np.sqrt(size)
                    weight = np.exp(score - score.max())
                    mixed[t, own] = weight / weight.sum() @ v[:, shared]
            return mixed @ layer["attn_out"]["kernel"]

        def feed_forward(x: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
            gate, up = x @ layer["ff_proj"]["kernel"], x @ layer["up_proj"]["kernel"]
            return (gate / (1 + np.exp(-gate)) * up) @ layer["ff_out"]["kernel"]

        def forward(
            tokens: list[int], past: Any = None, stale: Any = None, keep: Any = None
        ) -> tuple[np.ndarray, np.ndarray]:
            x = params["wte"][np.asarray(tokens)]
            for index in range(config.layers):
                layer = jax.tree.map(lambda stacked: stacked[index], params["blocks"])  # noqa: B023
                known = None if past is None else past[index]
                x = x + attention(norm(x, layer["attn_norm"]["scale"]), layer, known, stale, keep)
                x = x + feed_forward(norm(x, layer["ff_norm"]["scale"]), layer)
            hidden = norm(x, params["ln_f"]["scale"])
            return hidden, hidden @ head

        return forward

    return of


@pytest.fixture(scope="session")
def plain_mixture() -> Callable[..., np.ndarray]:
    """`plain_mixture(config, variables, tokens)` -> logits [T, V] of a row: experts in float64 NumPy, loops over everything."""

    def forward(config: ModelConfig, variables: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
        size, sharing = config.head_columns, config.heads // config.kv_heads
        rotated, experts = config.rotary_columns or size, config.mlp

        def norm(x: np.ndarray, gain: dict[str, np.ndarray]) -> np.ndarray:
            return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * gain["scale"]

        def turn(vector: np.ndarray, position: int) -> np.ndarray:
            half = rotated // 2
            pairs = vector[:half] + 1j * vector[half:rotated]
            pairs = pairs * np.exp(1j * position / config.rope_theta ** (np.arange(half) * 2 / rotated))
            return np.concatenate([pairs.real, pairs.imag, vector[rotated:]])

        def sees(query: int, key: int) -> bool:
            return config.attention_mask == "full" or key // config.mask_block <= query // config.mask_block

        def attention(x: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
            q, k, v = ((x @ layer[n]["kernel"]).reshape(len(x), -1, size) for n in ("q_proj", "k_proj", "v_proj"))
            if config.qk_norm:
                q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
            mixed = np.zeros((len(x), config.heads, size))
            for t in range(len(x)):
                seen = [s for s in range(len(x)) if sees(t, s)]
                for head in range(config.heads):
                    score = np.array([turn(k[s, head // sharing], s) @ turn(q[t, head], t) for s in seen]) / np.sqrt(
                        size
                    )
                    weight = np.exp(score - score.max())
                    mixed[t, head] = weight / weight.sum() @ v[seen, head // sharing]
            return mixed.reshape(len(x), -1) @ layer["attn_out"]["kernel"]

        def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> np.ndarray:
            a = x @ gate
            return (a / (1 + np.exp(-a)) * (x @ up)) @ out

        def feed_forward(x: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
            if "router" not in layer:
                return swiglu(x, *(layer[n]["kernel"] for n in ("ff_proj", "up_proj", "ff_out")))
            logit = x @ layer["router"]["kernel"]
            score = np.exp(logit) / np.exp(logit).sum() if experts.router == "softmax" else 1 / (1 + np.exp(-logit))
            chance = score + layer["router"].get("expert_bias", 0)
            groups = chance.reshape(experts.groups, -1)
            if experts.groups > 1:
                best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1), kind="stable")[
                    : experts.groups_per_token
                ]
                groups = np.where(np.isin(np.arange(experts.groups), best)[:, None], groups, -np.inf)
            chosen = np.argsort(-groups.reshape(-1), kind="stable")[: experts.experts_per_token]
            weight = score[chosen]
            if experts.router == "sigmoid":
                weight = experts.scaling * weight / weight.sum()
            names = ("experts_ff_proj", "experts_up_proj", "experts_ff_out")
            y = sum(w * swiglu(x, *(layer[n]["kernel"][e] for n in names)) for w, e in zip(weight, chosen, strict=True))
            if experts.shared_width:
                y = y + swiglu(x, *(layer[n]["kernel"] for n in ("shared_ff_proj", "shared_up_proj", "shared_ff_out")))
            return y

        x = params["wte"][tokens]
        for stack in ("blocks_dense", "blocks"):
            for index in range(len(params.get(stack, {"attn_norm": {"scale": ()}})["attn_norm"]["scale"])):
                layer = jax.tree.map(lambda stacked: stacked[index], params[stack])  # noqa: B023
                x = x + attention(norm(x, layer["attn_norm"]), layer)
                x = x + np.stack([feed_forward(row, layer) for row in norm(x, layer["ff_norm"])])
        return norm(x, params["ln_f"]) @ params["ff_out"]

    return forward
