"""Checkpoints between formats: `d1jax convert` (d1jax/convert.py) for a clone that is not installed as a command."""

import sys

from d1jax.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
