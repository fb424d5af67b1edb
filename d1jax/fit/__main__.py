"""python -m d1jax.fit."""

import sys

from d1jax.fit.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
