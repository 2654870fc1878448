"""python -m rasa_theory.extract, or `rasa extract`: from two checkpoints to an adapter, with a report of its errors."""

import functools
import sys

from rasa_theory.commands.main import run

main = functools.partial(run, "extract")

if __name__ == "__main__":
    sys.exit(main())
