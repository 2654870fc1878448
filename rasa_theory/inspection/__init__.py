"""Norms, spectra and shared subspaces of updates, before a rank is chosen, and the ranks that reach a goal."""

from rasa_theory.inspection.energy_table import EnergyTable
from rasa_theory.inspection.inspect_settings import RANKS, InspectSettings, RankGoal
from rasa_theory.inspection.inspection_folder import FILES, InspectionFolder, inspection_folder
from rasa_theory.inspection.inspection_job import InspectionJob, left_out_rows, measure_all
from rasa_theory.inspection.inspection_report import inspection_report, stack_row, warnings
from rasa_theory.inspection.overview import inspection_csv, inspection_notes, recommendation_lines
from rasa_theory.inspection.survey import inspect

__all__ = [
    "FILES",
    "RANKS",
    "EnergyTable",
    "InspectSettings",
    "InspectionFolder",
    "InspectionJob",
    "RankGoal",
    "inspect",
    "inspection_csv",
    "inspection_folder",
    "inspection_notes",
    "inspection_report",
    "left_out_rows",
    "measure_all",
    "recommendation_lines",
    "stack_row",
    "warnings",
]
