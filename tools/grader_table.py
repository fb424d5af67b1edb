"""The confusion of three graders on stored generations: ours, math-verify alone, and d1's rules.

    python tools/grader_table.py --gsm8k FILE.jsonl.gz --sudoku FILE.jsonl.gz [--math FILE] [--countdown FILE] [--rows]

Files are what `d1jax evaluate --regrade` reads. --rows also lists every row on which ours and d1's differ.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d1jax.evaluation.regrade import TEXT_KEYS
from d1jax.tasks import make
from d1jax.tasks.grading import d1_rules
from d1jax.tasks.grading.numbers import final_number
from d1jax.tasks.grading.offers import offer, without_end_tokens
from d1jax.tasks.jsonl import records_of
from d1jax.tasks.judging import grade_all


def d1_says(task: str, row: Any, text: str) -> bool:
    """Whether d1's parser counts the text as right; of Sudoku, whether all blank cells agree with the stored solution."""
    if task == "gsm8k":
        value = d1_rules.gsm8k_value(text)
        return value is not None and row["answer"] != "" and value == float(row["answer"].replace(",", ""))
    if task == "math":
        return d1_rules.math_correct(text, row["answer"])
    if task == "countdown":
        return d1_rules.countdown_correct(text, row["numbers"], row["target"])
    cells = d1_rules.sudoku_cells(text)
    return all(cells[place] == row["solution"][place] for place in range(16) if row["puzzle"][place] == "0")


def math_verify_says(task: str, row: Any, text: str) -> bool | None:
    """math-verify on the whole text, without any rule of where the answer stands; None where it has no say."""
    if task not in ("gsm8k", "math"):
        return None
    import math_verify

    gold = math_verify.parse(f"${row['answer']}$", parsing_timeout=3)
    return bool(math_verify.verify(gold, math_verify.parse(text, parsing_timeout=3), timeout_seconds=3))


def table(task: str, path: str, show_rows: bool) -> None:
    """Prints, a length, how many texts each grader counts as right, and in which combinations."""
    judge = make(task, style="instruct", split_seed=0)
    by_length: dict[int, list[tuple[str, Any, str]]] = {}
    for where, record in records_of(Path(path)):
        text = next(record[key] for key in TEXT_KEYS if key in record)
        by_length.setdefault(record.get("gen_length", 0), []).append((where, judge.from_stored(record, where), text))
    for length, found in sorted(by_length.items()):
        texts = [without_end_tokens(text) for _, _, text in found]
        ours = [grade["solved"] == 1.0 for grade in grade_all(judge, [row for _, row, _ in found], texts)]
        theirs = [d1_says(task, row, text) for _, row, text in found]
        alone = [math_verify_says(task, row, text) for (_, row, _), text in zip(found, texts, strict=True)]
        print(
            f"\n{task}, {length} tokens, {len(found)} rows: ours {sum(ours)}, d1's {sum(theirs)}, math-verify alone {_sum(alone)}"
        )
        for (o, t, m), count in sorted(Counter(zip(ours, theirs, alone, strict=True)).items(), key=str, reverse=True):
            print(f"  ours {_word(o)}  d1 {_word(t)}  math-verify {_word(m)}  {count:>5}")
        if show_rows:
            for (where, row, _), text, o, t in zip(found, texts, ours, theirs, strict=True):
                if o != t:
                    print(
                        f"  {where.rpartition(':')[2]}: ours {_word(o)}: {_offered(task, text)} for {_reference(row)}"
                    )


def _sum(values: list[bool | None]) -> int | str:
    return "-" if None in values else sum(map(bool, values))


def _word(value: bool | None) -> str:
    return {True: "right", False: "wrong", None: "-"}[value]


def _offered(task: str, text: str) -> str:
    found = offer(text)
    shown = f"{found.text[:60]!r} ({found.place})" if found else f"nothing, ends {text[-60:]!r}"
    return f"{shown} = {final_number(text)}" if task == "gsm8k" else shown


def _reference(row: Any) -> str:
    return repr(row.get("answer", row.get("target", row.get("solution"))))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    graders: dict[str, Callable[..., Any]] = dict.fromkeys(("gsm8k", "sudoku", "math", "countdown"), table)
    for task in graders:
        parser.add_argument(f"--{task}", metavar="FILE")
    parser.add_argument("--rows", action="store_true", help="list the rows on which ours and d1's differ")
    arguments = parser.parse_args(argv)
    for task in graders:
        if getattr(arguments, task):
            table(task, getattr(arguments, task), arguments.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
