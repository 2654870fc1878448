"""python -m rasa_theory.reconstruct, or `rasa reconstruct`: how well LoRA and RaSA reconstruct updates."""

import functools
import sys

from rasa_theory.commands.main import run

main = functools.partial(run, "reconstruct")

if __name__ == "__main__":
    sys.exit(main())
