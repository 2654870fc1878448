"""The state of a training run on disk, from which a killed run goes on and ends with the same numbers."""

from __future__ import annotations

import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from rasa_theory.common import InputError, write_file


class Snapshot:
    """A file with the weights, the optimiser, the random states and the losses of a run.

    The number of losses is the position in the run. The order of the batches follows from the seed and the position.
    A snapshot is written at most every `every` seconds, whole or not at all.
    """

    def __init__(self, path: Path, every: float = 300.0) -> None:
        self.path, self._every = path, every
        self._begun = self._written = time.monotonic()
        self._earlier = 0.0

    @property
    def seconds(self) -> float:
        """The duration of the run up to now, with what came before the snapshot that was restored."""
        return self._earlier + time.monotonic() - self._begun

    def restore(self, model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> list[float]:
        """Set model, optimiser and random states to the snapshot's; returns the losses, none if there is no snapshot.

        Raises InputError if the file cannot be read.
        """
        if not self.path.exists():
            return []
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{self.path} cannot be read ({reason}); delete it to begin this run anew") from None
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self._begun, self._earlier = time.monotonic(), state["seconds"]
        losses: list[float] = state["losses"]
        return losses

    def save_if_due(self, model: torch.nn.Module, optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
        """Write the state if the last writing is long enough ago. Raises InputError if it cannot be written."""
        if time.monotonic() - self._written < self._every:
            return
        state = {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "losses": losses,
            "seconds": self.seconds,
        }
        write_file(self.path, lambda file: torch.save(state, file))
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)
