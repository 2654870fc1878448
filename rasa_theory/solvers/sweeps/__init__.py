"""The sweeps that `solve_rasa` knows by name. A new one is a file, its import and its place in `SWEEPS`."""

from __future__ import annotations

from rasa_theory.solvers.sweeps.core import CoreSweep
from rasa_theory.solvers.sweeps.joint import JointSweep
from rasa_theory.solvers.sweeps.paper import PaperSweep
from rasa_theory.solvers.sweeps.protocol import RasaSweep

SWEEPS: dict[str, type[RasaSweep]] = {sweep.name: sweep for sweep in (CoreSweep, JointSweep, PaperSweep)}

__all__ = ["SWEEPS", "CoreSweep", "JointSweep", "PaperSweep", "RasaSweep"]
