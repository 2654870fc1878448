"""Counts and worst margins per family, and the results as plain data: data/verify.schema.json."""

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
    """Counts of one law: instances on which it was checked, violations, and its worst margin."""

    checked: int = 0
    violations: int = 0
    worst: float = -math.inf

    def add(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self.checked += 1
        self.violations += not outcome.holds
        self.worst = max(self.worst, outcome.margin)


@dataclass
class FamilyTally:
    """Counts of one family: instances, strict inequalities, crossings of e_lora, and its laws by name."""

    instances: int = 0
    strict: int = 0
    crossed: int = 0
    laws: dict[str, LawTally] = field(default_factory=dict)

    def add(self, trial: Trial) -> None:
        """Count a trial."""
        self.instances += 1
        self.strict += trial.strict
        self.crossed += trial.crossed
        for law, outcome in trial.outcomes.items():
            self.laws.setdefault(law, LawTally()).add(outcome)


@dataclass
class Tally:
    """Counts by family, and the failed trials, each with the file that reproduces it (None: it was not written)."""

    families: dict[str, FamilyTally] = field(default_factory=dict)
    failures: list[tuple[Trial, str | None]] = field(default_factory=list)

    def add(self, trial: Trial, file: str | None) -> None:
        """Count a trial. `file` reproduces it if it failed."""
        self.families.setdefault(trial.instance.family, FamilyTally()).add(trial)
        if trial.failed:
            self.failures.append((trial, file))

    @property
    def instances(self) -> int:
        """Number of instances that were tried."""
        return sum(family.instances for family in self.families.values())


def replay_command(file: str) -> str:
    """The command that tries a failed instance again."""
    return f"rasa verify --replay {shlex.quote(file)}"


@dataclass(frozen=True)
class Run:
    """A run of the verification, apart from its tally.

    - command: the words of the command.
    - settings: certificate and sweeps.
    - seed: seed of all instances.
    - instances: number of instances that were to be tried.
    - environment: versions and hardware.
    - seconds: duration.
    """

    command: Sequence[str]
    settings: VerificationSettings
    seed: int
    instances: int
    environment: dict[str, Any]
    seconds: float


def results(tally: Tally, run: Run) -> dict[str, Any]:
    """The tally of a run as plain data. Infinite margins are null, and so is the worst margin of such a law."""
    finished = tally.instances
    tried = any(family.laws for family in tally.families.values())  # if no law applied, none held
    return {
        "schema": 1,
        "command": list(run.command),
        "seed": run.seed,
        "instances": run.instances,
        "finished": finished,
        "sweeps": run.settings.sweeps,
        "certificate": run.settings.certificate,
        "environment": run.environment,
        "seconds": run.seconds,
        "statements": {law: LAWS[law].statement for law in LAWS},
        "families": [_family(name, family) for name, family in tally.families.items()],
        "failures": [_failure(trial, file) for trial, file in tally.failures],
        "verdict": "violated" if tally.failures else "holds" if tried and finished == run.instances else "undecided",
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
