"""Trials -> counts and worst margins per family, as plain data: data/verify.schema.json."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rasa_theory.verification.evidence import VerificationSettings
from rasa_theory.verification.laws import LAWS
from rasa_theory.verification.trial import Outcome, Trial


@dataclass
class LawTally:
    """Of one law: on how many instances it was tried, on how many it failed, and its worst margin."""

    checked: int = 0
    violations: int = 0
    worst: float = -math.inf

    def add(self, outcome: Outcome) -> None:
        """Count one more outcome."""
        self.checked += 1
        self.violations += not outcome.holds
        self.worst = max(self.worst, outcome.margin)


@dataclass
class FamilyTally:
    """Of one family: instances, those with a strict inequality, those on which the iteration crossed, and its laws."""

    instances: int = 0
    strict: int = 0
    crossed: int = 0
    laws: dict[str, LawTally] = field(default_factory=dict)

    def add(self, trial: Trial) -> None:
        """Count one more trial."""
        self.instances += 1
        self.strict += trial.strict
        self.crossed += trial.crossed
        for law, outcome in trial.outcomes.items():
            self.laws.setdefault(law, LawTally()).add(outcome)


@dataclass
class Tally:
    """Everything tried so far: by family, and the trials that failed with the file that reproduces each, if written."""

    families: dict[str, FamilyTally] = field(default_factory=dict)
    failures: list[tuple[Trial, str | None]] = field(default_factory=list)

    def add(self, trial: Trial, file: str | None) -> None:
        """Count one more trial; `file` reproduces it if it failed."""
        self.families.setdefault(trial.instance.family, FamilyTally()).add(trial)
        if trial.failed:
            self.failures.append((trial, file))

    @property
    def instances(self) -> int:
        """How many were tried."""
        return sum(family.instances for family in self.families.values())


def replay_command(file: str) -> str:
    """The one command that tries a failed instance again."""
    return f"python -m rasa_theory.verify --replay {shlex.quote(file)}"


def results(
    tally: Tally,
    settings: VerificationSettings,
    *,
    seed: int,
    asked: int,
    command: Sequence[str],
    environment: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The tally as plain data. An infinite margin is null, and so is the worst margin of such a law."""
    finished = tally.instances
    tried = any(family.laws for family in tally.families.values())  # if no law applied, none held
    return {
        "schema": 1,
        "command": list(command),
        "seed": seed,
        "instances": asked,
        "finished": finished,
        "sweeps": settings.sweeps,
        "certificate": settings.certificate,
        "environment": environment,
        "seconds": seconds,
        "statements": {law: LAWS[law].statement for law in LAWS},
        "families": [_family(name, family) for name, family in tally.families.items()],
        "failures": [_failure(trial, file) for trial, file in tally.failures],
        "verdict": "violated" if tally.failures else "holds" if tried and finished == asked else "undecided",
    }


def _finite(margin: float) -> float | None:
    return margin if math.isfinite(margin) else None


def _family(name: str, family: FamilyTally) -> dict[str, Any]:
    laws = {law: family.laws[law] for law in LAWS if law in family.laws}
    return {
        "name": name,
        "instances": family.instances,
        "checks": sum(law.checked for law in laws.values()),
        "violations": sum(law.violations for law in laws.values()),
        "strict": family.strict,
        "crossed": family.crossed,
        "laws": [
            {
                "name": name,
                "checked": law.checked,
                "violations": law.violations,
                "worst_margin": _finite(law.worst),
            }
            for name, law in laws.items()
        ],
    }


def _failure(trial: Trial, file: str | None) -> dict[str, Any]:
    instance = trial.instance
    return {
        "family": instance.family,
        "number": instance.number,
        "seed": instance.seed,
        "shape": list(instance.draw.values.shape),
        "rank": instance.draw.budget.rank,
        "k": instance.draw.budget.shared_rank,
        "laws": [
            {"name": law, "margin": _finite(outcome.margin), "raised": outcome.raised}
            for law, outcome in trial.failed.items()
        ],
        "file": file,
        "replay": None if file is None else replay_command(file),
    }
