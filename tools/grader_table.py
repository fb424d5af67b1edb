"""The confusion table of docs/graders.md: d1jax's grader, math-verify alone and d1's rules on stored generations.

    python tools/grader_table.py --data /path/of/shared/data [--d1 /path/of/d1/eval/eval_baselines] --out table.json

--data holds d1_eval_baselines/gsm8k_llada8b_instruct.jsonl.gz and its Sudoku counterpart: 4,158 generations. --d1 is the folder of d1's
repository with its *_generations.json, of which MATH and Countdown are read too. A row's id is its line in the file, or its place in the
sorted shards.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d1jax.evaluation.regrade import stored_rows, task_of
from d1jax.files import write_json
from d1jax.tasks.grading import d1_rules
from d1jax.tasks.grading.numbers import read_number
from d1jax.tasks.grading.offers import offer, without_end_tokens
from d1jax.tasks.grading.pool import Pool
from d1jax.tasks.judging import grade_all

EXCERPT = 60  # characters of an answer that the table quotes


def math_verify_alone(references: Sequence[str | None], texts: Sequence[str]) -> list[bool]:
    """What math-verify says of whole texts, finding the answer by itself, as a reward function of TRL calls it."""
    pool = Pool(program=Path(__file__).with_name("whole_text_worker.py"))
    try:
        told = pool.ask([(reference or "", text) for reference, text in zip(references, texts, strict=True)])
    finally:
        pool.close()
    return [answer is True for answer in told]


def by_d1(name: str, row: dict[str, Any], text: str) -> bool:
    """Whether d1's evaluation counts a text as right; a Sudoku where all 16 cells are those of the stored solution."""
    if name == "gsm8k":
        return row["number"] is not None and d1_rules.gsm8k_value(text) == float(read_number(row["number"]))
    if name == "math":
        return d1_rules.math_correct(text, row["answer"])
    if name == "countdown":
        return d1_rules.countdown_correct(text, row["numbers"], row["target"])
    return d1_rules.sudoku_cells(text) == row["solution"]


def table_of(name: str, rows: list[tuple[int, int | None, dict[str, Any], str]]) -> dict[str, Any]:
    """Counts of (ours, math-verify, d1) by length, and the rows on which they differ."""
    task = task_of(name)
    problems, texts = [row for _, _, row, _ in rows], [without_end_tokens(text) for *_, text in rows]
    ours = [grade["solved"] == 1.0 for grade in grade_all(task, problems, texts)]
    key = {"gsm8k": "number", "math": "answer"}.get(name)
    verified = math_verify_alone([row[key] for row in problems], texts) if key else [None] * len(rows)
    counts: dict[str, Counter[str]] = {}
    differing = []
    for (place, length, row, raw), own, verify, text in zip(rows, ours, verified, texts, strict=True):
        reference = by_d1(name, row, raw)
        mark = "".join("-" if value is None else "1" if value else "0" for value in (own, verify, reference))
        counts.setdefault(str(length), Counter())[mark] += 1
        if len({value for value in (own, verify, reference) if value is not None}) > 1:
            found = offer(text)
            told = {"id": place, "gen_length": length, "ours,math_verify,d1": mark, "reference": row.get(key, "")}
            differing.append({**told, "offer": found.text[:EXCERPT] if found else None, "place": found and found.place})
    return {"counts": counts, "differing": differing}


def read(name: str, paths: Sequence[Path]) -> list[tuple[int, int | None, dict[str, Any], str]]:
    """[(id, gen_length, row, text with its end-of-text tokens)] of all files."""
    task = task_of(name)
    found = [one for path in paths for one in stored_rows(path, task)]
    return [(place, length, row, text) for place, (length, row, text) in enumerate(found, start=1)]


def main(data: Path, d1: Path | None, out: Path, say: Callable[[str], None] = print) -> None:
    files = {name: [data / "d1_eval_baselines" / f"{name}_llada8b_instruct.jsonl.gz"] for name in ("gsm8k", "sudoku")}
    if d1 is not None:
        files |= {"math": sorted(d1.glob("math500_*.json")), "countdown": sorted(d1.glob("countdown_*.json"))}
    tables = {name: table_of(name, read(name, paths)) for name, paths in files.items()}
    for name, table in tables.items():
        for length, counts in table["counts"].items():
            say(
                f"{name} {length}: {sum(counts.values())} texts, (ours, math-verify, d1) {dict(sorted(counts.items()))}"
            )
    write_json(out, tables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--d1", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    main(given.data, given.d1, given.out)
