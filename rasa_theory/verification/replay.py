"""The `.npz` file of a failing instance, written and read."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from rasa_theory.common import InputError, whole_number
from rasa_theory.problem import LayerStack, RankBudget
from rasa_theory.solvers import SolverOptions
from rasa_theory.verification.evidence import VerificationSettings
from rasa_theory.verification.instances import MET_BY_ALL, Draw, Instance, Known
from rasa_theory.verification.laws import LAWS

_UNSOUND = (OSError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Exceptions of numpy for damaged archives, for `.npy` files, and for archives with a password."""


class Replay(NamedTuple):
    """The contents of a file: an instance, the laws to try on it, and the settings."""

    instance: Instance
    laws: list[str]
    settings: VerificationSettings


def replay_path(instance: Instance, folder: Path) -> Path:
    """The file in `folder` for a failing instance."""
    return folder / f"{instance.family}-{instance.number}-{instance.seed}.npz"


def save_replay(replay: Replay, file: IO[bytes]) -> None:
    """Write values, r, k, seed, laws, and everything else on which the outcome depends."""
    instance, draw, settings = replay.instance, replay.instance.draw, replay.settings
    held: dict[str, Any] = {"values": draw.values.numpy(), "r": draw.budget.rank, "k": draw.budget.shared_rank}
    held |= {"seed": instance.seed, "law": replay.laws, "family": instance.family, "number": instance.number}
    held |= {"sweeps": settings.sweeps, "certificate": settings.certificate}
    if draw.known is not None:
        held |= {"optimum": draw.known.e_rasa, "met_by": sorted(draw.known.met_by)}
    np.savez(file, **held)


def load_replay(path: Path, **instead: Any) -> Replay:
    """Read a file of `save_replay`, or one made by hand: `values` (L, b, a), `r` and `k` are enough, for all laws.

    Settings in `instead` take the place of the file's. Raises InputError, naming the file, for anything that is
    missing, damaged or impossible. Pickles are never opened.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            held = {name: np.asarray(archive[name]) for name in archive.files}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a .npz file that a failed run has written") from None
    except _UNSOUND:
        raise InputError(f"{path}: not a sound .npz file; name one that a failed run has written") from None
    try:
        return _replay(held, instead)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: an entry is of the wrong kind ({error})") from None


def _replay(held: dict[str, Any], instead: dict[str, Any]) -> Replay:
    missing = [name for name in ("values", "r", "k") if name not in held]
    if missing:
        raise InputError(f"it holds no {missing[0]!r}; values (L, b, a), r and k are needed")
    stack, budget = LayerStack(held["values"], "values"), RankBudget(_whole(held, "r"), _whole(held, "k"))
    budget.check_fits(stack)
    laws = [str(law) for law in np.atleast_1d(held.get("law", np.array(list(LAWS))))]
    if not laws:
        raise InputError("its 'law' is empty; leave it out to try all")
    unknown = [law for law in laws if law not in LAWS]
    if unknown:
        raise InputError(f"unknown law {unknown[0]!r}; --list names those that there are")
    settings: dict[str, Any] = {"sweeps": _whole(held, "sweeps")} if "sweeps" in held else {}
    settings |= {"certificate": str(held["certificate"])} if "certificate" in held else {}
    settings |= instead
    draw = Draw(stack.values, budget, _known(held))
    seed = SolverOptions(seed=_whole(held, "seed")).seed
    instance = Instance(str(held.get("family", "replay")), _whole(held, "number"), seed, draw)
    return Replay(instance, laws, VerificationSettings(**settings))


def _whole(held: dict[str, Any], name: str) -> int:
    """The entry of this name as a whole number, 0 if it is missing."""
    return whole_number(name, held[name].item()) if name in held else 0


def _known(held: dict[str, Any]) -> Known | None:
    if "optimum" not in held:
        return None
    met_by = frozenset(str(name) for name in np.atleast_1d(held.get("met_by", [])))
    if not met_by <= MET_BY_ALL:
        raise InputError(f"met_by holds {sorted(met_by)}; known: {', '.join(sorted(MET_BY_ALL))}")
    optimum = float(held["optimum"])
    if not 0 <= optimum < math.inf:
        raise InputError(f"optimum must be a finite number, at least 0, got {optimum}")
    return Known(optimum, met_by)
