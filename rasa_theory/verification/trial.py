"""All laws on one instance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rasa_theory.linalg import not_above
from rasa_theory.verification.evidence import Evidence, Subject, VerificationSettings
from rasa_theory.verification.instances import Instance
from rasa_theory.verification.laws import LAWS, Law


@dataclass(frozen=True)
class Outcome:
    """The margin of a law in units of its tolerance. If an exception was raised, `raised` names it: infinite margin."""

    margin: float
    raised: str = ""

    @property
    def holds(self) -> bool:
        """Whether the margin is at most 1."""
        return self.margin <= 1


@dataclass(frozen=True)
class Trial:
    """The outcomes of the laws that apply to `instance`, by name.

    - strict: mixing_drop > 0 at the LoRA embedding, so that Theorem 3.1 holds with <.
    - crossed: 30 iterations of the paper from a random start came below e_lora.
    """

    instance: Instance
    outcomes: dict[str, Outcome]
    strict: bool
    crossed: bool

    @property
    def failed(self) -> dict[str, Outcome]:
        """The laws that do not hold."""
        return {law: outcome for law, outcome in self.outcomes.items() if not outcome.holds}


def run_trial(
    instance: Instance, subject: Subject, settings: VerificationSettings, laws: Iterable[str] = tuple(LAWS)
) -> Trial:
    """Try `laws` on `instance`. An exception of the subject breaks the law that called it."""
    evidence = Evidence(instance, subject, settings)
    with evidence.stack.suitable_threads():
        tried = {law: _outcome(LAWS[law], evidence) for law in laws}
        outcomes = {law: outcome for law, outcome in tried.items() if outcome is not None}
        try:
            strict = max(step.drop for step in evidence.embeddings) > 0
            lowest = min(evidence.random_runs["paper"].history)
            crossed = not not_above(evidence.lora.error, lowest, evidence.stack.rounding)
        except Exception:  # already the outcome of a law
            strict = crossed = False
    return Trial(instance, outcomes, strict, crossed)


def _outcome(law: Law, evidence: Evidence) -> Outcome | None:
    try:
        margin = law.margin(evidence)
    except Exception as error:
        return Outcome(math.inf, f"{type(error).__name__}: {error}")
    return None if margin is None else Outcome(margin)
