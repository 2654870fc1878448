"""Random numbers for one purpose each."""

from __future__ import annotations

import hashlib

import torch


def stream(*purpose: object) -> torch.Generator:
    """A generator whose numbers depend on the purpose alone, and are independent of those for any other purpose.

    A bound from random probes holds only if what it bounds does not depend on the probes. Small seeds would not do: two
    purposes could share one, and people make data with them.
    """
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
