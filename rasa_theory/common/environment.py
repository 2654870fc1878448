"""The versions and the hardware that numerical results depend on."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rasa_theory.common.version import __version__

if TYPE_CHECKING:
    import torch


def environment(device: torch.device, dtype: torch.dtype, world_size: int = 1) -> dict[str, Any]:
    """Return the versions and the hardware that results depend on; with several processes also their number."""
    import numpy as np  # imported here, so that the help of a command need not wait for them
    import torch

    processes = {} if world_size == 1 else {"processes": world_size}
    return processes | {
        "rasa_theory": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "platform": f"{sys.platform} {platform.machine()}",
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that holds this package; None if it is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
