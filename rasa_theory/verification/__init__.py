"""Random instances, the laws that hold on every one of them, and the tally."""

from rasa_theory.verification.evidence import Subject, VerificationSettings
from rasa_theory.verification.instances import FAMILIES, Instance, draw_instance
from rasa_theory.verification.laws import LAWS
from rasa_theory.verification.replay import Replay, load_replay, save_replay
from rasa_theory.verification.scorecard import describe, table, verdict_lines
from rasa_theory.verification.tally import Tally, results
from rasa_theory.verification.trial import Trial, run_trial
from rasa_theory.verification.workers import Drawn, shared_trials, suitable_jobs, trials

__all__ = [
    "FAMILIES",
    "LAWS",
    "Drawn",
    "Instance",
    "Replay",
    "Subject",
    "Tally",
    "Trial",
    "VerificationSettings",
    "describe",
    "draw_instance",
    "load_replay",
    "results",
    "run_trial",
    "save_replay",
    "shared_trials",
    "suitable_jobs",
    "table",
    "trials",
    "verdict_lines",
]
