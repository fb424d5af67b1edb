"""A worker process (d1jax/tasks/grading/pool.py) for grader_table.py: math-verify finds and compares the answer of a whole text."""

import json
import logging
import os
import sys


def main() -> None:
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), open(os.devnull, "w")
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    print("true", file=answers, flush=True)  # ready
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            gold = parse(f"\\boxed{{{asked['gold']}}}", parsing_timeout=None)
            told = verify(gold, parse(asked["offer"], parsing_timeout=None), timeout_seconds=None)
        except Exception:
            told = None
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
