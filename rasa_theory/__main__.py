"""python -m rasa_theory: the command `rasa`, for a checkout that is not installed."""

import sys

from rasa_theory.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
