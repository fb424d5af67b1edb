"""One generate stage: completions of the policy as it is, or of a teacher, graded; those that pass are kept as rows for later stages.

The rows are a JSONL file, written when all are there; a stage that was stopped begins again, and makes the same rows.

Source: RFT in DeepSeekMath's unified view, arXiv 2402.03300, section 5.2; DeepSeek-R1, arXiv 2501.12948, section 2.3.3.

B rows of a rollout batch.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from d1jax.config import GenerateConfig
from d1jax.data.tokenizers import Tokenizer
from d1jax.diffusion.rollout import Rollout
from d1jax.evaluation.decode import decoding_copy
from d1jax.generation.filters import Text, dropped_by
from d1jax.generation.rows import is_done, write
from d1jax.generation.teacher import identity, same_tokens, with_teacher
from d1jax.models import processes
from d1jax.models.transformer import Variables
from d1jax.rollouts.generate import Generator, Graded, Prompts, fetch_and_grade
from d1jax.tasks.task import DataError
from d1jax.training.context import Context
from d1jax.training.stage_log import Clock
from d1jax.training.stopping import StopRequest

# Why a completion that passes is dropped all the same.
REPEATED, ENOUGH, UNWRITABLE = "the text of another one", "keep_per_prompt", "characters that the tokenizer here lacks"


@dataclass
class Kept:
    """What passes, in the order of sampling, and how many were dropped by what."""

    config: GenerateConfig
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    _texts: dict[int, set[str]] = field(default_factory=dict)  # those that are kept of each problem

    def look_at(
        self, context: Context, writer: Context, prompts: Prompts, rollout: Rollout, graded: Graded, count: int
    ) -> None:
        """Keeps what passes of the first `count` rows of a batch, which `writer` has decoded and the model of `context` will read."""
        grid = context.task.columns is not None
        for index in range(count):
            place, text = prompts.ids[index], graded.texts[index]
            length = int(rollout.length_B[index])
            tokens = rollout.tokens_BC[index, :length].tolist()
            has_end_token = length > 0 and tokens[-1] in writer.tokenizer.special.end_ids
            seen = Text(text, length - has_end_token, has_end_token or (grid and text.endswith("\n")))
            rewards = {name: float(values_B[index]) for name, values_B in graded.parts_B.items()}
            reward = float(graded.reward_QG.reshape(-1)[index])
            reason = self._reason(place, seen, rewards)
            if reason is None and writer is not context:
                tokens, reason = rewritten(context.tokenizer, text, has_end_token)
            if reason is not None:
                self.dropped[reason] += 1
                continue
            self._texts.setdefault(place, set()).add(text)
            prompt = context.task.prompt(prompts.rows[index])
            row = {"row": place, "prompt": prompt, "completion": text, "tokens": tokens}
            self.rows.append({**row, "reward": reward, "rewards": rewards})

    def _reason(self, place: int, seen: Text, rewards: dict[str, float]) -> str | None:
        """Why a completion is not kept; None where it is."""
        # A reward that does not apply to a row (NaN) is not earned.
        missed = next((name for name, least in self.config.accept.items() if not rewards[name] >= least), None)
        if missed is not None:
            return f"{missed} below {self.config.accept[missed]:g}"
        by_filter = dropped_by(seen, self.config.filters)
        if by_filter is not None:
            return by_filter
        known = self._texts.get(place, set())
        if seen.text in known:
            return REPEATED
        return ENOUGH if self.config.keep_per_prompt and len(known) >= self.config.keep_per_prompt else None


def rewritten(tokenizer: Tokenizer, text: str, has_end_token: bool) -> tuple[list[int], str | None]:
    """(the text in another tokenizer's tokens, with an end where it has one; why it cannot be written in them)."""
    try:
        if not has_end_token:
            return tokenizer.encode(text), None
        tokens = tokenizer.answer(text)
    except ValueError:
        return [], UNWRITABLE
    closed = bool(tokens) and tokens[-1] in tokenizer.special.end_ids
    return tokens if closed else [*tokens, tokenizer.special.end], None


def run(context: Context, variables: Variables, stage: str, out: Path, stop: StopRequest) -> None:
    """Writes the kept rows of a stage: {"row": place among the training rows, "prompt", "completion", "tokens", "reward",
    "rewards"}.

    Beside them stands how many were sampled and what dropped the others. Raises DataError where nothing is kept: nothing could be learnt.
    """
    if processes.agreed(lambda: is_done(out)):
        return
    config = context.config.generate
    writer, teacher = context, {}
    if config.teacher:
        teacher = {"teacher": identity(context, stage)}
        writer, variables = with_teacher(context, stage)
    generate = Generator(writer, config)
    policy = decoding_copy(writer, variables)
    if same_tokens(writer.tokenizer, context.tokenizer):
        context = writer  # what was decoded is what will be learnt
    wanted = config.prompts or len(context.train)
    kept, sampled, group = Kept(config), 0, config.num_generations
    weights = {**dict.fromkeys(config.accept, 0.0), **config.reward_weights}
    for step, first in enumerate(range(0, wanted, config.prompts_per_step)):
        stop.check(f"{stage}, after {first} of {wanted} problems")
        prompts = generate.prompts(step)
        parts = generate(policy, prompts, jax.random.fold_in(context.key(stage), step))
        rollout, graded = fetch_and_grade(writer, weights, prompts, parts, group, Clock())
        # The last batch is as large as the others, for one compiled program; what is beyond the wanted problems does not count.
        count = min(len(prompts.rows), (wanted - first) * group)
        sampled += count
        kept.look_at(context, writer, prompts, rollout, graded, count)
    told = ", ".join(f"{number} by {reason}" for reason, number in kept.dropped.most_common()) or "none"
    if not kept.rows:
        raise DataError(
            f"stage {stage!r}: none of {sampled} completions is kept; dropped: {told}. Sample more of them (generate.num_generations), "
            "loosen generate.accept or generate.filters, or train longer before"
        )
    write(out, kept.rows, {"sampled": sampled, "dropped": dict(kept.dropped.most_common()), **teacher})
    problems = len({one["row"] for one in kept.rows})
    print(
        f"{stage}: kept {len(kept.rows)} of {sampled} completions, of {problems} problems; dropped: {told}",
        file=sys.stderr,
    )
