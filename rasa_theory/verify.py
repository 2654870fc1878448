"""python -m rasa_theory.verify: the laws around Theorem 3.1, tried on random instances of many families."""

import sys

from rasa_theory.commands.verify import main

if __name__ == "__main__":
    sys.exit(main())
