"""Used by all rooms: errors, checks of options, files written whole, runs that resume, tables, versions, hardware."""

from rasa_theory.common.checks import at_least, fraction, one_of, positive, real_number, whole_number
from rasa_theory.common.environment import environment
from rasa_theory.common.errors import DamagedFile, FailedElsewhere, InputError, NotFinite, ProcessLost, UnsoundFile
from rasa_theory.common.files import identity, unfinished, writable_folder, write_file
from rasa_theory.common.interrupts import keeping_interrupts
from rasa_theory.common.labels import columns_of, shortened, unique_labels
from rasa_theory.common.resume import PartsFolder, Plan, RunFolder, locked, occupied, plan_of, read_run_json, write_json
from rasa_theory.common.tables import WIDTH, TextTable, aligned, csv_text, wrapped
from rasa_theory.common.version import __version__

__all__ = [
    "WIDTH",
    "DamagedFile",
    "FailedElsewhere",
    "InputError",
    "NotFinite",
    "PartsFolder",
    "Plan",
    "ProcessLost",
    "RunFolder",
    "TextTable",
    "UnsoundFile",
    "__version__",
    "aligned",
    "at_least",
    "columns_of",
    "csv_text",
    "environment",
    "fraction",
    "identity",
    "keeping_interrupts",
    "locked",
    "occupied",
    "one_of",
    "plan_of",
    "positive",
    "read_run_json",
    "real_number",
    "shortened",
    "unfinished",
    "unique_labels",
    "whole_number",
    "wrapped",
    "writable_folder",
    "write_file",
    "write_json",
]
