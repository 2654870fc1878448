"""The study of a source: bounds, best error, attempts and verdict for every stack and k."""

from rasa_theory.reconstruction.decomposition import Gain, gain
from rasa_theory.reconstruction.driver import StudyProgress, StudyState, new_results, study, study_steps
from rasa_theory.reconstruction.study_settings import WEIGHTS, StudySettings
from rasa_theory.reconstruction.summary import history_csv, table, verdict_lines

__all__ = [
    "WEIGHTS",
    "Gain",
    "StudyProgress",
    "StudySettings",
    "StudyState",
    "gain",
    "history_csv",
    "new_results",
    "study",
    "study_steps",
    "table",
    "verdict_lines",
]
