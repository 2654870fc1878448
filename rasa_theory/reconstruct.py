"""python -m rasa_theory.reconstruct: how well LoRA and RaSA of one budget reconstruct fine-tuning updates."""

import sys

from rasa_theory.commands.reconstruct import main

if __name__ == "__main__":
    sys.exit(main())
