"""python -m rasa_theory.extract: from two checkpoints to an adapter that loads, with a report of what it misses."""

import sys

from rasa_theory.commands.extract import main

if __name__ == "__main__":
    sys.exit(main())
