"""python -m rasa_theory.verify, or `rasa verify`: the laws around Theorem 3.1, tried on random instances."""

import functools
import sys

from rasa_theory.commands.main import run

main = functools.partial(run, "verify")

if __name__ == "__main__":
    sys.exit(main())
