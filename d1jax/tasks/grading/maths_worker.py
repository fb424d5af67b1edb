"""A process that asks math-verify whether two answers are equal: a line of JSON in, a line of JSON out. Run by equivalence.py
as a file, so that it imports neither d1jax nor JAX.

    {"gold": "\\\\frac{1}{2}", "offer": "0.5"}  ->  true

It may hang, die or run out of memory: that costs the row that it is asked for.
"""

import json
import logging
import os
import resource
import signal
import sys
import warnings

MEMORY = 2 << 30  # bytes of address space


def main(seconds: int) -> None:
    # What SymPy prints goes nowhere: the parent reads one line a row.
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), open(os.devnull, "w")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    from math_verify import LatexExtractionConfig, parse, verify

    def read(latex: str) -> list:
        # Of the ways to read an answer the one that never calls Python's own parser.
        return parse(f"${latex}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)

    print("true", file=answers, flush=True)  # ready
    for line in sys.stdin:
        # A parent that has gone cannot end a worker that hangs: the alarm does, without any Python.
        signal.alarm(seconds)
        try:
            asked = json.loads(line)
            gold, offer = read(asked["gold"]), read(asked["offer"])
            equal = bool(verify(gold, offer, timeout_seconds=None))
        except (Exception, RecursionError):
            equal = None
        signal.alarm(0)
        print(json.dumps(equal), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
