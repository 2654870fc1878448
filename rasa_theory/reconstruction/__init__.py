"""The study of a source: bounds, best error, attempts and verdict for every stack and k."""

from rasa_theory.reconstruction.decomposition import Gain, gain
from rasa_theory.reconstruction.driver import StudyState, study, study_steps
from rasa_theory.reconstruction.results_folder import ResultsFolder
from rasa_theory.reconstruction.rows import new_results
from rasa_theory.reconstruction.study_job import StudyJob, run_study, stacks_left, take_up
from rasa_theory.reconstruction.study_progress import SEARCHING, StudyProgress
from rasa_theory.reconstruction.study_settings import WEIGHTS, StudySettings
from rasa_theory.reconstruction.summary import StudyTable, explanation_lines, history_csv, table, verdict_lines

__all__ = [
    "SEARCHING",
    "WEIGHTS",
    "Gain",
    "ResultsFolder",
    "StudyJob",
    "StudyProgress",
    "StudySettings",
    "StudyState",
    "StudyTable",
    "explanation_lines",
    "gain",
    "history_csv",
    "new_results",
    "run_study",
    "stacks_left",
    "study",
    "study_steps",
    "table",
    "take_up",
    "verdict_lines",
]
