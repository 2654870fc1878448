"""Random instances, the laws that hold on every one of them, and the tally."""

from rasa_theory.verification.evidence import Subject, VerificationSettings
from rasa_theory.verification.instances import FAMILIES, Instance, draw_instance
from rasa_theory.verification.laws import LAWS
from rasa_theory.verification.replay import Replay, load_replay, replay_path, save_replay
from rasa_theory.verification.scorecard import describe, table, verdict_lines
from rasa_theory.verification.tally import Run, Tally, results
from rasa_theory.verification.trial import Trial, run_trial
from rasa_theory.verification.workers import InstanceKey, instances_in_turn, shared_trials, suitable_jobs, trials

__all__ = [
    "FAMILIES",
    "LAWS",
    "Instance",
    "InstanceKey",
    "Replay",
    "Run",
    "Subject",
    "Tally",
    "Trial",
    "VerificationSettings",
    "describe",
    "draw_instance",
    "instances_in_turn",
    "load_replay",
    "replay_path",
    "results",
    "run_trial",
    "save_replay",
    "shared_trials",
    "suitable_jobs",
    "table",
    "trials",
    "verdict_lines",
]
