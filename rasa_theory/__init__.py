"""How much more rank-sharing adapters (RaSA) express than LoRA, and why: reconstruction of fine-tuning updates."""

import os

import lazy_loader

# Threads of OpenMP wait for each other by spinning. On a machine with other users a thread then spins on the very core
# that the awaited one needs, and small steps take many times longer. Passive threads sleep instead. OpenMP reads this
# once, when torch is loaded, so it stands here, before any import of torch. A value that the user has set stays, and
# a program that has imported torch before this package keeps torch's waiting.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # ms: LLVM's and Intel's OpenMP spin that long before they sleep

# Importing torch takes seconds, in which Ctrl-C would end in a traceback, and `rasa --help` needs none of it. So names
# are imported when they are first used; the stub beside this file lists them, for type checkers as well.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
